//! What the store must survive, with device memory: each scenario by its number, on the card and on
//! the emulated driver, seeded.
//!
//! Invariant: bytes are compared wherever they were last written, and a store gives everything back
//! at its end. On the emulated driver no rule of the driver's was broken either: `run` looks at
//! that. Called by `parts`.

#![allow(unsafe_code, reason = "a user launches kernels over device memory")]

mod devices;
mod dirty;
mod order;
mod pages;
mod pressure;
mod residency;
mod trouble;

use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cudarc::driver::CudaStream;
use serde_json::json;
use std::sync::Arc;
use vmem::gpu::VramExt;
use vmem::{MemoryTier, VMemHandle, VirtualMemory};

use crate::parts::{On, Outcome, Part};
use crate::user::{DeviceMemory, Env, User, processor_time};

const VRAM: MemoryTier = MemoryTier::Vram;
const HOST: MemoryTier = MemoryTier::Host;
const DISK: MemoryTier = MemoryTier::Disk;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

pub(crate) fn parts() -> Vec<Part> {
    let part = |name, on, run, about| Part { name, about, on, run };
    vec![
        part(
            "scenario-01",
            On::Both,
            pressure::staging,
            "disk to device while host memory is held",
        ),
        part("scenario-04", On::Both, residency::dropped, "futures dropped at every point"),
        part("scenario-06", On::Both, residency::evicted_under_readers, "evictions against reads"),
        part(
            "scenario-07",
            On::Both,
            order::leaves_after_a_kernel,
            "eviction right after a kernel wrote",
        ),
        part(
            "scenario-08",
            On::Both,
            order::reused_under_a_reader,
            "a range that a slow kernel reads",
        ),
        part(
            "scenario-09",
            On::Both,
            order::freed_under_a_kernel,
            "freed and evicted under a kernel",
        ),
        part("scenario-10", On::Both, order::sets, "sets of leases in opposite orders"),
        part(
            "scenario-12",
            On::Both,
            pressure::all_pinned,
            "everything in device memory is pinned",
        ),
        part("scenario-18", On::Emulated, trouble::errors, "the device refuses copies"),
        part("scenario-21", On::Both, pressure::fragments, "random sizes in a device that is full"),
        part("scenario-24", On::Both, residency::closed, "closed during a thousand operations"),
        part("scenario-31", On::Both, residency::slabs, "slabs given back while copies run"),
        part(
            "scenario-32",
            On::Emulated,
            trouble::notices,
            "notices lost, doubled, and after a fault",
        ),
        part("scenario-33", On::Both, order::neighbours, "another library captures and allocates"),
        part(
            "scenario-47",
            On::Both,
            dirty::written_back,
            "what a device alone has, under each policy of writing back; scratch",
        ),
        part(
            "scenario-pages",
            On::Both,
            pages::rearranged,
            "device memory in pieces, whose pages are brought together",
        ),
        part(
            "scenario-two-devices",
            On::Both,
            devices::two,
            "two devices in one store, where there are two",
        ),
    ]
}

/// The bytes of one version of one object. Each word differs from its neighbours and from those of
/// all other versions.
fn bytes(object: u64, version: u64, len: usize) -> Vec<u8> {
    let key =
        (object + 1).wrapping_mul(0xA24B_AED4_963E_E407) ^ version.wrapping_mul(0x9E37_79B9_7F4A);
    let word = |at: u64| (at + 1).wrapping_mul(key | 1).rotate_left(17) ^ key;
    let mut bytes: Vec<u8> =
        (0..len.div_ceil(8) as u64).flat_map(|at| word(at).to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

fn plus(bytes: &[u8], n: u8) -> Vec<u8> {
    bytes.iter().map(|byte| byte.wrapping_add(n)).collect()
}

/// What a kernel of the user finds in an object, on a stream of its own.
async fn kernel_reads(vmem: &VirtualMemory, user: &User, handle: &VMemHandle) -> Result<Vec<u8>> {
    let stream = user.context.new_stream()?;
    let sink = user.allocate(handle.len())?;
    let lease = vmem.device_on(handle, &stream).await.context("a lease")?;
    // SAFETY: read by the kernel on the stream of the lease, before it is dropped.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above; the sink is read after it.
    unsafe { user.copy(sink.address, at, handle.len(), &stream) }?;
    drop(lease);
    sink.read(&stream)
}

/// Queues a kernel that takes so long, and then copies an object out.
async fn slow_copy(
    vmem: &VirtualMemory,
    user: &User,
    handle: &VMemHandle,
    time: Duration,
    stream: &Arc<CudaStream>,
) -> Result<DeviceMemory> {
    let sink = user.allocate(handle.len())?;
    let lease = vmem.device_on(handle, stream).await.context("a lease")?;
    user.spin(time, stream)?;
    // SAFETY: as above.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above; the caller keeps the sink until the stream has done everything.
    unsafe { user.copy(sink.address, at, handle.len(), stream) }?;
    drop(lease);
    Ok(sink)
}

/// Polls a call so often at most, and drops it then. Its outcome if it ended before.
async fn dropped_after<T>(polls: usize, call: impl Future<Output = T>) -> Option<T> {
    let mut call = pin!(call);
    for _ in 0..polls {
        let polled = std::future::poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await;
        if let Poll::Ready(outcome) = polled {
            return Some(outcome);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// The store is given everything back, and ends.
async fn end(env: &Env, vmem: VirtualMemory, handles: Vec<VMemHandle>) -> Result<()> {
    drop(handles);
    for _ in 0..5000 {
        let stats = vmem.stats();
        if stats.vram.used_bytes + stats.host.used_bytes == 0 && stats.migrations_in_flight == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let stats = vmem.stats();
    let left =
        [stats.vram.used_bytes, stats.vram.objects, stats.host.used_bytes, stats.disk.used_bytes];
    ensure!(left == [0; 4], "something is left: {stats:#?}");
    ensure!(stats.vram.peak_bytes <= stats.vram.capacity_bytes, "more than the budget");
    vmem.close().await.context("closing")?;
    if let Some(emulator) = &env.emulator {
        ensure!(
            emulator.counter("context_synchronisations") == 0,
            "the whole device was waited for"
        );
        ensure!(emulator.counter("registrations") == 0, "memory stays registered");
    }
    Ok(())
}

fn passed(figures: serde_json::Value) -> Result<Outcome> {
    Ok(Outcome::Passed(figures))
}

fn counted(what: &str, count: usize) -> Result<Outcome> {
    passed(json!({ what: count }))
}
