//! Two emulated GPUs in one store.
//!
//! Invariant: a lease is on the device of its stream, whichever device has the newest version; a
//! gather reads what its own device has there, and everything else from below.

use std::sync::Arc;

use vmem::gpu::cudarc::driver::{CudaContext, CudaStream, DevicePtr};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{GpuSelection, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig, WriteBack};
use vmem_cuda_emulator::Emulator;

use crate::support::{DISK, HOST, LEN, VRAM, bytes, launch, plus};

/// The tier of the second device.
pub(crate) fn second_tier() -> MemoryTier {
    MemoryTier::of_device(1)
}

/// A store with both devices, each with 4 MiB for objects.
pub(crate) async fn open(emulator: &Emulator, host: u64, write_back: WriteBack) -> VirtualMemory {
    emulator.devices(2);
    let config = VirtualMemoryConfig::builder()
        .host_capacity(host)
        .staging_capacity(128 << 10)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .gpus([GpuSelection::Device(0), GpuSelection::Device(1)])
        .write_back(write_back);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    assert_eq!(vmem.capabilities().devices.len(), 2);
    vmem
}

/// A stream on each device.
pub(crate) fn streams() -> [Arc<CudaStream>; 2] {
    [0, 1].map(|gpu| CudaContext::new(gpu).unwrap().new_stream().unwrap())
}

/// A kernel adds `n` to every byte, and its lease ends.
pub(crate) async fn add(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    n: u64,
    stream: &Arc<CudaStream>,
) {
    let lease = vmem.device_mut_on(handle, stream).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, lease.len() as u64, n, stream);
    lease.finish().await.unwrap();
}

/// What kernels on this stream find in an object.
pub(crate) async fn found(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    stream: &Arc<CudaStream>,
) -> Vec<u8> {
    let lease = vmem.device_on(handle, stream).await.unwrap();
    stream.clone_dtoh(&lease.view()).unwrap()
}

#[tokio::test]
async fn devices_have_budgets_of_their_own() {
    const MEMORY: [u64; 2] = [1 << 20, 3 << 20];
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .gpus([GpuSelection::Device(0), GpuSelection::Device(1)])
        .vram_capacities(MEMORY);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let mut handles = Vec::new();
    for seed in 0..40 {
        handles.push(vmem.put(bytes(seed), HOST).await.unwrap());
    }
    for (device, memory) in (0..).zip(MEMORY) {
        let tier = MemoryTier::of_device(device);
        assert_eq!(vmem.tier_stats(tier).capacity_bytes, memory);
        assert_eq!(vmem.config().vram_budget_of(device.into()).bytes(), Some(memory));
        for handle in &handles {
            vmem.promote(handle, tier).await.unwrap();
        }
        let used = vmem.tier_stats(tier).used_bytes;
        assert!(used <= memory && used > memory / 2, "{used} bytes of {memory}");
    }
    drop(handles);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// Kernels on two GPUs change one object in turn: each lease is where its stream is, and what
/// one wrote the other reads.
#[tokio::test]
async fn leases_are_on_the_device_of_their_stream() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(&emulator, 16 << 20, WriteBack::Eager).await;
    let streams = streams();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    for round in 0..10_u8 {
        let device = usize::from(round % 2);
        let lease = vmem.device_mut_on(&handle, &streams[device]).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &streams[device]);
        lease.finish().await.unwrap();
        let residency = vmem.residency(&handle).unwrap();
        let tiers = [VRAM, second_tier()];
        assert!(residency.is_in(tiers[device]) && !residency.is_in(tiers[1 - device]));
        let after = vmem.read(&handle).await.unwrap();
        assert!(after == plus(&bytes(3), round + 1), "round {round}");
    }
    let set = vmem.device_set(&streams[1]).read(&handle).acquire().await.unwrap();
    assert_eq!(set.read[0].len(), LEN);
    drop(set);
    drop(handle);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// Pieces from host memory, from disk, from the second device's own memory, and of what the first
/// device alone has, into a buffer on the second device and back.
#[tokio::test]
async fn gathers_and_scatters_of_the_second_device_reach_every_tier() {
    const PART: std::ops::Range<usize> = 16..50_016;
    let emulator = Emulator::load().unwrap();
    let vmem = open(&emulator, 16 << 20, WriteBack::OnEvict).await;
    let [first, second] = streams();
    let mut handles = Vec::new();
    for seed in 1..=5 {
        handles.push(vmem.put(bytes(seed), HOST).await.unwrap());
    }
    let added = [0, 0, 0, 7, 9];
    let expected = (1..).zip(added).map(|(seed, n)| plus(&bytes(seed), n));
    let expected: Vec<Vec<u8>> = expected.collect();
    vmem.demote(&handles[1], DISK).await.unwrap();
    vmem.promote(&handles[2], second_tier()).await.unwrap();
    // The newest version of these is on one device and nowhere else.
    add(&vmem, &handles[3], 7, &second).await;
    add(&vmem, &handles[4], 9, &first).await;
    let only = |at: usize, tier: MemoryTier| {
        let residency = vmem.residency(&handles[at]).unwrap();
        let tiers = [VRAM, second_tier(), HOST, DISK];
        tiers.into_iter().filter(|&tier| residency.is_in(tier)).eq([tier])
    };
    assert!(only(3, second_tier()) && only(4, VRAM));

    let part = PART.len();
    let mut buffer = second.alloc_zeros::<u8>(5 * part).unwrap();
    second.synchronize().unwrap();
    let down = emulator.counter("bytes_down");
    let pieces: Vec<_> =
        handles.iter().enumerate().map(|(n, handle)| (handle, PART, n * part)).collect();
    vmem.gather(&pieces, &DeviceTarget::from_slice(&mut buffer)).await.unwrap();
    // What the second device has went nowhere else for that.
    let down = emulator.counter("bytes_down") - down;
    assert!(
        (1..=LEN as u64).contains(&down),
        "{down} bytes were copied to the host, of one object"
    );
    assert!(only(3, second_tier()), "{:?}", vmem.residency(&handles[3]));
    let got = second.clone_dtoh(&buffer).unwrap();
    for (n, got) in got.chunks(part).enumerate() {
        assert!(got == &expected[n][PART], "piece {n}");
    }

    launch("vmem_add", buffer.device_ptr(&second).0, 5 * part as u64, 1, &second);
    let pieces: Vec<_> =
        handles.iter().enumerate().map(|(n, handle)| (n * part, handle, PART)).collect();
    vmem.scatter(&DeviceTarget::from_slice(&mut buffer), &pieces).await.unwrap();
    for (handle, mut expected) in handles.iter().zip(expected) {
        let changed = plus(&expected[PART], 1);
        expected[PART].copy_from_slice(&changed);
        assert!(vmem.read(handle).await.unwrap() == expected);
        for stream in [&first, &second] {
            assert!(found(&vmem, handle, stream).await == expected);
        }
    }
    drop(pieces);
    drop((buffer, handles));
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}
