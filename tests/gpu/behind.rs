//! Leases that begin behind kernels which have not ended, on the emulated driver.
//!
//! Excluded: a wait of the host for what the device can order by itself, kernels of two leases that
//! run out of order or at once over the same bytes, versions of a chain of kernels that are lost or
//! shown half written, and readers on the host that such a chain starves.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use vmem::gpu::cudarc::driver::{CudaStream, result};
use vmem::gpu::{Scratch, VramExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    DISK, HANGS, HOST, LEN, VRAM, begin_capture, bytes, end, end_capture, launch, plus, stream,
    until,
};

/// The kernels of a test that do not end by themselves.
const STEPS: u8 = 5;

async fn open(write_back: WriteBack) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .max_pinned(1.0)
        .write_back(write_back)
        .wait_timeout(HANGS);
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// A promoted object, and its bytes.
async fn put(vmem: &VirtualMemory, seed: u8) -> VMemHandle {
    let handle = vmem.put(bytes(seed), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    handle
}

/// What is granted without the end of a kernel.
async fn at_once<T>(granted: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANGS / 2, granted).await.expect("it waits for a kernel")
}

/// A kernel adds `n` to every byte; its lease is dropped.
async fn add(vmem: &VirtualMemory, handle: &VMemHandle, n: u64, stream: &Arc<CudaStream>) {
    let lease = at_once(vmem.device_mut_on(handle, stream)).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, n, stream);
}

/// A kernel copies the object to `to`; its lease is dropped.
async fn copy(vmem: &VirtualMemory, handle: &VMemHandle, to: u64, stream: &Arc<CudaStream>) {
    let lease = at_once(vmem.device_on(handle, stream)).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_slow_copy", to, unsafe { lease.device_ptr() }, LEN as u64, stream);
}

/// The `nth` copy, after what its stream has.
fn copied(copies: &Scratch, nth: usize, stream: &CudaStream) -> Vec<u8> {
    let mut found = vec![0; LEN];
    // SAFETY: it is used by a copy that the call waits for, since the memory is pageable.
    let from = unsafe { copies.device_ptr() } + (nth * LEN) as u64;
    stream.context().bind_to_thread().unwrap();
    // SAFETY: both are as long as an object.
    unsafe { result::memcpy_dtoh_async(&mut found, from, stream.cu_stream()) }.unwrap();
    found
}

/// On the stream of the kernels before, or on others.
fn streams(others: bool) -> Vec<Arc<CudaStream>> {
    let first = stream();
    let one = |_| if others { stream() } else { first.clone() };
    (0..STEPS).map(one).collect()
}

#[tokio::test]
async fn writer_comes_behind_readers_without_a_wait_of_the_host() {
    let emulator = Emulator::load().unwrap();
    for write_back in [WriteBack::Eager, WriteBack::OnEvict] {
        for others in [false, true] {
            let vmem = open(write_back).await;
            let handle = put(&vmem, 1).await;
            let streams = streams(others);
            let copies = vmem.allocate_scratch(LEN * STEPS as usize, &streams[0]).await.unwrap();
            // SAFETY: used by kernels that have ended before it is dropped.
            let to = unsafe { copies.device_ptr() };
            emulator.hold(Kind::Kernel);
            let waits = emulator.calls("cuStreamWaitEvent");
            // Twice, and the last of each stream is what the writer comes after.
            for _ in 0..2 {
                for (n, stream) in streams.iter().enumerate() {
                    copy(&vmem, &handle, to + (n * LEN) as u64, stream).await;
                }
            }
            add(&vmem, &handle, 7, &streams[0]).await;
            let waits = emulator.calls("cuStreamWaitEvent") - waits;
            // A notice of the end of each stream is one too.
            let least = if others { u64::from(STEPS) - 1 } else { 0 };
            assert!((least..=least + streams.len() as u64).contains(&waits), "{waits} waits");
            assert!(emulator.counter("in_flight") > 0, "the kernels wait");
            emulator.release_all();
            assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(1), 7));
            for (n, stream) in streams.iter().enumerate() {
                assert!(copied(&copies, n, stream) == bytes(1), "the writer came first");
            }
            drop(copies);
            end(vmem, vec![handle], &emulator).await;
        }
    }
}

#[tokio::test]
async fn chain_of_kernels_needs_no_wait_of_the_host() {
    let emulator = Emulator::load().unwrap();
    for write_back in [WriteBack::OnEvict, WriteBack::After(Duration::from_secs(3600))] {
        for others in [false, true] {
            let vmem = open(write_back).await;
            let handle = put(&vmem, 2).await;
            let streams = streams(others);
            let pin = vmem.pin(&handle, VRAM).await.unwrap();
            let copies = vmem.allocate_scratch(LEN * STEPS as usize, &streams[1]).await.unwrap();
            // SAFETY: used by kernels that have ended before it is dropped.
            let to = unsafe { copies.device_ptr() };
            emulator.hold(Kind::Kernel);
            let down = emulator.calls("cuMemcpyDtoHAsync_v2");
            let waits = emulator.calls("cuStreamWaitEvent");
            for n in 1..STEPS as usize {
                add(&vmem, &handle, 1, &streams[n]).await;
                // In between, also on another stream, and in a set with others.
                copy(&vmem, &handle, to + (n * LEN) as u64, &streams[(n + 1) % streams.len()])
                    .await;
                let set = vmem.device_set(&streams[n]).write(&handle).acquire();
                drop(at_once(set).await.unwrap());
            }
            // At most one for each of these, and for a notice of each stream.
            let waits = emulator.calls("cuStreamWaitEvent") - waits;
            assert!(waits <= if others { 17 } else { 1 }, "{waits} waits");
            assert!(emulator.counter("in_flight") > 0, "the kernels wait");
            let mut read = Box::pin(vmem.read(&handle));
            assert!((&mut read).now_or_never().is_none(), "it shows what is not written yet");
            assert_eq!(emulator.calls("cuMemcpyDtoHAsync_v2"), down);
            emulator.release_all();
            assert!(read.await.unwrap() == plus(&bytes(2), STEPS - 1));
            for n in 1..STEPS as usize {
                let found = copied(&copies, n, &streams[(n + 1) % streams.len()]);
                assert!(found == plus(&bytes(2), n as u8), "what the kernels before it wrote");
            }
            drop((copies, pin));
            // It leaves, and comes again, as any other.
            vmem.demote(&handle, DISK).await.unwrap();
            add(&vmem, &handle, 1, &streams[0]).await;
            assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(2), STEPS));
            end(vmem, vec![handle], &emulator).await;
        }
    }
}

/// Leases that say how they went, and one that nobody used, at whatever place of the chain.
#[tokio::test]
async fn each_lease_of_a_chain_learns_how_it_ended() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(WriteBack::OnEvict).await;
    let stream = stream();
    let handle = put(&vmem, 3).await;
    emulator.hold(Kind::Kernel);
    let mut finished = Vec::new();
    for n in 0..STEPS {
        let lease = at_once(vmem.device_mut_on(&handle, &stream)).await.unwrap();
        if n % 2 == 1 {
            // Unused.
            drop(lease);
            continue;
        }
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        finished.push(tokio::spawn(lease.finish()));
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(finished.iter().all(|one| !one.is_finished()), "no kernel has ended");
    emulator.release(Kind::Kernel, 1);
    let mut finished = finished.into_iter();
    finished.next().unwrap().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(finished.as_slice().iter().all(|one| !one.is_finished()), "one kernel has ended");
    emulator.release_all();
    for one in finished {
        one.await.unwrap().unwrap();
    }
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(3), STEPS / 2 + 1));
    end(vmem, vec![handle], &emulator).await;
}

#[tokio::test]
async fn reader_on_the_host_is_not_starved_by_a_chain() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(WriteBack::OnEvict).await;
    let stream = stream();
    let handle = put(&vmem, 4).await;
    emulator.hold(Kind::Kernel);
    add(&vmem, &handle, 1, &stream).await;
    add(&vmem, &handle, 1, &stream).await;
    let reader = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handle.clone();
        async move { vmem.read(&handle).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The next one comes after the reader.
    let mut next = Box::pin(vmem.device_mut_on(&handle, &stream));
    tokio::time::timeout(Duration::from_millis(50), &mut next).await.expect_err("it came first");
    emulator.release_all();
    assert!(reader.await.unwrap() == plus(&bytes(4), 2));
    let lease = next.await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    drop(lease);
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(4), 3));
    end(vmem, vec![handle], &emulator).await;
}

/// What it had begun to write over is lost, as the version of a device alone; the last one that was
/// whole below comes back.
#[tokio::test]
async fn abandoned_lease_of_a_chain_loses_what_it_wrote_over() {
    let emulator = Emulator::load().unwrap();
    for at in 0..3 {
        let vmem = open(WriteBack::OnEvict).await;
        let stream = stream();
        let handle = put(&vmem, 5).await;
        vmem.demote(&handle, DISK).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        emulator.hold(Kind::Kernel);
        for _ in 0..at {
            add(&vmem, &handle, 1, &stream).await;
        }
        let lease = at_once(vmem.device_mut_on(&handle, &stream)).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        lease.abandon();
        emulator.release_all();
        if at > 0 {
            let lost = vmem.read(&handle).await.unwrap_err();
            assert!(matches!(lost, VirtualMemoryError::Device { .. }), "{lost:?}");
            vmem.revert(&handle).await.unwrap();
        }
        assert!(vmem.read(&handle).await.unwrap() == bytes(5), "{at}");
        // The next one is as any other.
        add(&vmem, &handle, 1, &stream).await;
        assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(5), 1), "{at}");
        end(vmem, vec![handle], &emulator).await;
    }
}

/// A lease that overwrites begins as zeros, which no kernel before it is to find.
#[tokio::test]
async fn lease_that_overwrites_waits_for_kernels_before_it() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(WriteBack::OnEvict).await;
    let stream = stream();
    let handle = put(&vmem, 6).await;
    let copies = vmem.allocate_scratch(LEN, &stream).await.unwrap();
    // SAFETY: used by a kernel that has ended before it is dropped.
    let to = unsafe { copies.device_ptr() };
    emulator.hold(Kind::Kernel);
    copy(&vmem, &handle, to, &stream).await;
    let mut next = Box::pin(vmem.device_overwrite_on(&handle, &stream));
    tokio::time::timeout(Duration::from_millis(50), &mut next).await.expect_err("it came first");
    emulator.release_all();
    let lease = next.await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 9, &stream);
    drop(lease);
    assert!(vmem.read(&handle).await.unwrap() == vec![9; LEN]);
    drop(copies);
    end(vmem, vec![handle], &emulator).await;
}

/// Where the stream cannot be put behind others, the lease is refused, and nothing has changed.
#[tokio::test]
async fn stream_that_cannot_be_ordered_gets_no_lease() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(WriteBack::OnEvict).await;
    let first = stream();
    let second = stream();
    let handle = put(&vmem, 7).await;
    emulator.hold(Kind::Kernel);
    add(&vmem, &handle, 1, &first).await;
    emulator.refuse("cuStreamWaitEvent", 1);
    let refused = at_once(vmem.device_mut_on(&handle, &second)).await.unwrap_err();
    assert!(matches!(refused, VirtualMemoryError::Device { .. }), "{refused:?}");
    emulator.refuse("cuStreamWaitEvent", 0);
    add(&vmem, &handle, 1, &second).await;
    // Its end is not known while a graph is captured: the next one waits.
    let lease = at_once(vmem.device_mut_on(&handle, &first)).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &first);
    begin_capture(&first);
    drop(lease);
    let mut reader = Box::pin(vmem.device_on(&handle, &second));
    tokio::time::timeout(Duration::from_millis(50), &mut reader).await.expect_err("it came first");
    let mut next = Box::pin(vmem.device_mut_on(&handle, &second));
    tokio::time::timeout(Duration::from_millis(50), &mut next).await.expect_err("it came first");
    drop((reader, next));
    assert_eq!(end_capture(&first), 0);
    emulator.release_all();
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(7), 3));
    end(vmem, vec![handle], &emulator).await;
}

/// Freed, and the store closed, while a chain is under way.
#[tokio::test]
async fn chain_outlives_its_object_and_its_store() {
    let emulator = Emulator::load().unwrap();
    for frees in [true, false] {
        let vmem = open(WriteBack::OnEvict).await;
        let stream = stream();
        let handle = put(&vmem, 8).await;
        emulator.hold(Kind::Kernel);
        add(&vmem, &handle, 1, &stream).await;
        let lease = at_once(vmem.device_mut_on(&handle, &stream)).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        if frees {
            vmem.free(handle).await.unwrap();
            drop(lease);
            emulator.release_all();
            until("its memory is free", || vmem.stats().vram.used_bytes == 0).await;
            end(vmem, Vec::new(), &emulator).await;
        } else {
            drop(lease);
            let closed = tokio::spawn({
                let vmem = vmem.clone();
                async move { vmem.close().await }
            });
            tokio::time::sleep(Duration::from_millis(50)).await;
            emulator.release_all();
            closed.await.unwrap().unwrap();
            drop(handle);
            until("the last share is gone", || emulator.counter("device_bytes") == 0).await;
            assert_eq!(emulator.violations(), [""; 0]);
        }
    }
}
