//! Gathers and scatters that are dropped, left alone or refused, on the emulated driver.
//!
//! Invariant: a call over a buffer of the user delays no other call, and its copies are in the
//! order of the buffer's stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
use vmem::VirtualMemoryError;
use vmem::gpu::cudarc::driver::{CudaStream, DevicePtr};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    DISK, HOST, LEN, VRAM, begin_capture, bytes, end, end_capture, launch, open, open_within,
    stream, until,
};

/// A gather of an object that is on disk alone, so that a stream of the tier copies it, which is
/// dropped once its copy has begun and stands still.
async fn dropped_in_flight(
    emulator: &Emulator,
    stream: &Arc<CudaStream>,
) -> (vmem::VirtualMemory, Vec<vmem::VMemHandle>, vmem::gpu::cudarc::driver::CudaSlice<u8>) {
    let vmem = open(1 << 20).await;
    let handles = on_disk(&vmem, emulator, stream).await;
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    emulator.hold(Kind::Up);
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = [(&handles[0], 0..LEN, 0)];
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        until("the copy", || emulator.counter("queued_up") > 0).await;
        drop(gather);
    }
    (vmem, handles, buffer)
}

/// An object that is on disk alone, and will be read into memory that the device reaches directly;
/// behind it others, which keep the slabs around it as they are.
pub(crate) async fn on_disk(
    vmem: &vmem::VirtualMemory,
    emulator: &Emulator,
    stream: &Arc<CudaStream>,
) -> Vec<vmem::VMemHandle> {
    let mut handles = Vec::new();
    for n in 0..100 {
        handles.push(vmem.put(bytes(n), HOST).await.unwrap());
    }
    handles.swap(0, 50);
    let handle = &handles[0];
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    let registered = async {
        loop {
            let detours = emulator.counter("blocking_copies");
            vmem.demote(handle, DISK).await.unwrap();
            let target = DeviceTarget::from_slice(&mut buffer);
            vmem.gather(&[(handle, 0..LEN, 0)], &target).await.unwrap();
            vmem.demote(handle, DISK).await.unwrap();
            if emulator.counter("blocking_copies") == detours {
                return;
            }
        }
    };
    tokio::time::timeout(crate::support::HANGS, registered).await.expect("it is registered");
    handles
}

/// Mechanism: the drop of a gather slept until its copies had ended. Effect: a worker of the
/// runtime stood still, 15 of 160 ticks of its timers came. Fix: the caller's stream is put behind
/// the copies.
#[tokio::test]
async fn a_dropped_gather_puts_the_stream_behind_its_copies() {
    let emulator = Emulator::load().unwrap();
    let stream = stream();
    let (vmem, handles, mut buffer) = dropped_in_flight(&emulator, &stream).await;
    assert!(emulator.counter("queued_up") > 0, "the copy stands still, and this thread goes on");
    // What the stream, or another one, does to the buffer comes after the copy.
    launch("vmem_fill", buffer.device_ptr(&stream).0, LEN as u64, 7, &stream);
    let other = stream.context().new_stream().unwrap();
    other.memset_zeros(&mut buffer).unwrap();
    launch("vmem_fill", buffer.device_ptr(&other).0, 10, 9, &other);
    emulator.release_all();
    let got = other.clone_dtoh(&buffer).unwrap();
    assert!(got[..10] == [9; 10] && got[10..].iter().all(|&byte| byte == 0));
    drop(buffer);
    end(vmem, handles, &emulator).await;
}

/// A stream in a capture cannot be put behind anything: the drop waits for the copies, and the
/// capture stays whole.
#[tokio::test]
async fn a_gather_dropped_in_a_capture_waits_for_its_copies() {
    let emulator = Arc::new(Emulator::load().unwrap());
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handles = on_disk(&vmem, &emulator, &stream).await;
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    emulator.hold(Kind::Up);
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = [(&handles[0], 0..LEN, 0)];
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        until("the copy", || emulator.counter("queued_up") > 0).await;
        begin_capture(&stream);
        let theirs = emulator.clone();
        let released = Arc::new(AtomicBool::new(false));
        let releases = released.clone();
        let releasing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            releases.store(true, Ordering::SeqCst);
            theirs.release_all();
        });
        drop(gather);
        assert!(released.load(Ordering::SeqCst), "a copy can still write to the buffer");
        releasing.join().unwrap();
    }
    assert_eq!(end_capture(&stream), 0, "the capture is whole");
    drop(buffer);
    end(vmem, handles, &emulator).await;
}

/// Mechanism: two pieces over the same bytes of the buffer were copied in no order. Effect:
/// whichever came last stayed. Fix: such a call is refused before anything is touched.
#[tokio::test]
async fn pieces_over_each_other_are_refused() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    for (first, second) in [(0..100, 99), (0..1, 0), (500..700, 300)] {
        let pieces = [(&handle, first, 200), (&handle, 0..100, 200 + second)];
        let outcome = vmem.gather(&pieces, &target).await;
        let refused = matches!(
            outcome,
            Err(VirtualMemoryError::InvalidConfig { field: "target", .. }) | Ok(())
        );
        assert!(refused, "{outcome:?}");
        assert_eq!(outcome.is_ok(), second == 300, "{pieces:?}");
    }
    // Side by side is well, and so is nothing at all anywhere.
    let pieces = [
        (&handle, 0..100, 100),
        (&handle, 5..5, 150),
        (&handle, 100..200, 200),
        (&handle, 0..100, 0),
    ];
    vmem.gather(&pieces, &target).await.unwrap();
    drop(target);
    let got = stream.clone_dtoh(&buffer).unwrap();
    assert!(got[100..300] == bytes(1)[..200] && got[..100] == bytes(1)[..100]);
    drop(buffer);
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: a gather and a scatter held reads, shares and space of the host in the caller's
/// future. Effect: one that was polled once and left alone kept them. Fix: a task of the runtime
/// holds them.
#[tokio::test]
async fn a_gather_and_a_scatter_left_alone_come_to_their_ends() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for n in 0..60 {
        let handle = vmem.put(bytes(n), HOST).await.unwrap();
        if n % 2 == 0 {
            vmem.promote(&handle, VRAM).await.unwrap();
        }
        handles.push(handle);
    }
    let mut buffer = stream.alloc_zeros::<u8>(60 * 1000).unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    let pieces: Vec<_> = (0..60).map(|n| (&handles[n], 0..1000, n * 1000)).collect();
    let mut gather = Box::pin(vmem.gather(&pieces, &target));
    assert!((&mut gather).now_or_never().is_none());
    // The last of them has no other way to become this.
    until("the gather", || {
        vmem.stats().held_bytes == 0
            && emulator.counter("in_flight") == 0
            && emulator.counter("bytes_up") >= 30 * 1000
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let copies = emulator.counter("copies_up");
    gather.await.unwrap();
    assert_eq!(emulator.counter("copies_up"), copies, "it was not done again");
    drop(target);
    let got = stream.clone_dtoh(&buffer).unwrap();
    assert!((0..60).all(|n| got[n * 1000..(n + 1) * 1000] == bytes(n as u8)[..1000]));

    launch("vmem_fill", buffer.device_ptr(&stream).0, 60_000, 3, &stream);
    let target = DeviceTarget::from_slice(&mut buffer);
    let pieces: Vec<_> = (0..60).map(|n| (n * 1000, &handles[n], 0..1000)).collect();
    let mut scatter = Box::pin(vmem.scatter(&target, &pieces));
    assert!((&mut scatter).now_or_never().is_none());
    for (n, handle) in handles.iter().enumerate() {
        let mut expected = bytes(n as u8);
        expected[..1000].fill(3);
        let written = async {
            while vmem.read(handle).await.unwrap() != expected {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(crate::support::HANGS, written).await.expect("it is written");
    }
    scatter.await.unwrap();
    drop(target);
    drop(buffer);
    end(vmem, handles, &emulator).await;
}

/// Mechanism: nothing limited the wait for a copy of the device. Effect: a gather hung for as long
/// as the device stood still. Fix: each wait ends at the store's deadline.
#[tokio::test]
async fn a_gather_over_a_device_that_stands_still_times_out() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(1 << 20, Duration::from_millis(500)).await;
    let stream = stream();
    let handle = vmem.put(bytes(2), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    emulator.hold(Kind::Within);
    for _ in 0..2 {
        let pieces = [(&handle, 0..LEN, 0)];
        let gather =
            tokio::time::timeout(crate::support::HANGS, vmem.gather(&pieces, &target)).await;
        let error = gather.expect("it ends").unwrap_err();
        // The second stands behind the copy of the first, on the caller's own stream.
        assert!(matches!(error, VirtualMemoryError::TimedOut { .. }), "{error:?}");
    }
    drop(target);
    launch("vmem_fill", buffer.device_ptr(&stream).0, LEN as u64, 7, &stream);
    emulator.release_all();
    assert!(stream.clone_dtoh(&buffer).unwrap() == vec![7; LEN], "what was queued comes last");
    drop(buffer);
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: a scatter took one piece at a time. Effect: 181 us a piece, where a gather took 30 to
/// 89. Fix: pieces are taken early, and objects do not wait for each other.
#[tokio::test]
async fn a_scatter_has_many_copies_under_way() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for n in 0..16 {
        handles.push(vmem.put(bytes(n), HOST).await.unwrap());
    }
    let mut buffer = stream.alloc_zeros::<u8>(16 * 1000).unwrap();
    let at = buffer.device_ptr(&stream).0;
    launch("vmem_fill", at, 16_000, 5, &stream);
    stream.synchronize().unwrap();
    let used = vmem.stats().host.used_bytes;
    emulator.hold(Kind::Down);
    let target = DeviceTarget::from_slice(&mut buffer);
    let pieces: Vec<_> = (0..16).map(|n| (n * 1000, &handles[n], 0..1000)).collect();
    let mut scatter = Box::pin(vmem.scatter(&target, &pieces));
    assert!((&mut scatter).now_or_never().is_none());
    until("the copies", || vmem.stats().host.used_bytes >= used + 16 * 1000).await;
    emulator.release_all();
    scatter.await.unwrap();
    // Two pieces over the same bytes of an object: the later one stays.
    let pieces = [(0, &handles[0], 0..500), (1000, &handles[0], 100..600)];
    launch("vmem_fill", at, 1000, 6, &stream);
    vmem.scatter(&target, &pieces).await.unwrap();
    let read = vmem.read(&handles[0]).await.unwrap();
    assert!(read[..100] == [6; 100] && read[100..600] == [5; 500]);
    drop(target);
    drop(read);
    drop(buffer);
    end(vmem, handles, &emulator).await;
}
