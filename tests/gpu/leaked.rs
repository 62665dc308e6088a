//! Futures of gathers and scatters that are leaked, on the emulated driver.
//!
//! Invariant: no copy goes to memory that safe code of the caller has freed, or has back. The
//! emulator counts a copy over freed memory as a violation, and the end of each test looks for it.

use std::sync::Arc;

use futures::FutureExt;
use vmem::VMemHandle;
use vmem::gpu::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::gather::on_disk;
use crate::support::{LEN, bytes, end, launch, open, stream, until};

fn buffer(stream: &Arc<CudaStream>) -> CudaSlice<u8> {
    let buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    buffer
}

/// What comes from disk is copied on a stream of the tier.
fn pieces(handles: &[VMemHandle]) -> Vec<(&VMemHandle, std::ops::Range<usize>, usize)> {
    vec![(&handles[0], 0..LEN, 0)]
}

#[tokio::test]
async fn leaked_targets_take_the_memory_with_them() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = buffer(&stream);
    emulator.hold(Kind::Up);
    {
        let handles = handles.clone();
        let vmem = vmem.clone();
        let target = DeviceTarget::from_slice(&mut buffer);
        let mut gather = Box::pin(async move {
            vmem.gather(&pieces(&handles), &target).await.unwrap();
        });
        assert!((&mut gather).now_or_never().is_none());
        until("the copy", || emulator.counter("queued_up") > 0).await;
        // The future, and in it the target, never ends.
        Box::leak(Box::new(gather));
    }
    assert_eq!(buffer.len(), 0, "the memory is still that of the copy");
    drop(buffer);
    emulator.release_all();
    until("the copy", || emulator.counter("in_flight") == 0).await;
    // The leaked future keeps its own handle and store: only the rules of the driver count here.
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn targets_end_the_calls_of_which_futures_were_leaked() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = buffer(&stream);
    emulator.hold(Kind::Up);
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = pieces(&handles);
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        until("the copy", || emulator.counter("queued_up") > 0).await;
        std::mem::forget(gather);
    }
    assert_eq!(buffer.len(), LEN, "the memory is back");
    // What the stream gets now comes after the copy, which stands still.
    launch("vmem_fill", buffer.device_ptr(&stream).0, LEN as u64, 7, &stream);
    emulator.release_all();
    assert!(stream.clone_dtoh(&buffer).unwrap() == vec![7; LEN]);
    drop(buffer);
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(50), "the object is as it was");
    end(vmem, handles, &emulator).await;
}

/// What the scatter had taken was written still, over what came after the target was dropped.
#[tokio::test]
async fn scatters_of_which_futures_were_leaked_write_nothing_more() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = buffer(&stream);
    let copies = emulator.calls("cuMemcpyDtoHAsync_v2");
    let host_bytes = vmem.stats().host.used_bytes;
    emulator.hold(Kind::Down);
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = [(0, &handles[0], 0..LEN)];
        let mut scatter = Box::pin(vmem.scatter(&target, &pieces));
        assert!((&mut scatter).now_or_never().is_none());
        until("the copy", || emulator.calls("cuMemcpyDtoHAsync_v2") > copies).await;
        std::mem::forget(scatter);
    }
    emulator.release_all();
    until("the copy", || emulator.counter("in_flight") == 0).await;
    until("the end of the scatter", || vmem.stats().host.used_bytes == host_bytes).await;
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(50), "the object is as it was");
    drop(buffer);
    end(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn targets_that_were_used_keep_no_memory_of_a_closed_store() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = buffer(&stream);
    let target = DeviceTarget::from_slice(&mut buffer);
    vmem.gather(&pieces(&handles), &target).await.unwrap();
    end(vmem, handles, &emulator).await;
    until("the memory", || emulator.counter("device_bytes") <= LEN as u64).await;
    drop(target);
    assert!(stream.clone_dtoh(&buffer).unwrap() == bytes(50));
}

#[tokio::test]
async fn copies_of_leaked_futures_that_have_not_begun_never_begin() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = buffer(&stream);
    let up = emulator.counter("copies_up");
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = pieces(&handles);
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        std::mem::forget(gather);
    }
    drop(buffer);
    // The task has had its turn.
    drop(vmem.read(&handles[0]).await.unwrap());
    until("the end of the read", || vmem.stats().held_bytes == 0).await;
    assert_eq!(emulator.counter("copies_up"), up);
    end(vmem, handles, &emulator).await;
}
