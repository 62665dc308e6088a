//! Small copies and many at once: by a kernel, by one call of the driver, or one by one.
//!
//! Invariant: bytes are right whichever way they went, and a driver that refuses a way is no error.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::{join_all, try_join_all};
use vmem::gpu::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{SwitchPoints, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HANGS, HOST, VRAM, begin_capture, end, end_capture, launch, stream, until};

const KIB: usize = 1024;
/// Objects of a test.
const COUNT: usize = 64;
const INVALID: i32 = 1;

fn bytes(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at >> 2) as u8).wrapping_mul(seed as u8 | 1) ^ seed as u8).collect()
}

/// A store with objects of this length, all in host memory that the device reaches directly.
async fn open(len: usize) -> (VirtualMemory, Vec<VMemHandle>) {
    open_with(len, SwitchPoints::default()).await
}

async fn open_with(len: usize, points: SwitchPoints) -> (VirtualMemory, Vec<VMemHandle>) {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(16 << 20)
        .switch_points(points)
        .max_pinned(1.0);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let mut handles = Vec::new();
    for n in 0..COUNT {
        handles.push(vmem.put(bytes(n, len), HOST).await.unwrap());
    }
    let registered = async {
        while vmem.stats().registered_bytes < (COUNT * len) as u64 {
            promote(&vmem, &handles).await;
            demote(&vmem, &handles).await;
        }
    };
    tokio::time::timeout(HANGS, registered).await.expect("host memory is registered");
    (vmem, handles)
}

async fn promote(vmem: &VirtualMemory, handles: &[VMemHandle]) {
    try_join_all(handles.iter().map(|handle| vmem.promote(handle, VRAM))).await.unwrap();
}

async fn demote(vmem: &VirtualMemory, handles: &[VMemHandle]) {
    try_join_all(handles.iter().map(|handle| vmem.demote(handle, HOST))).await.unwrap();
}

/// Promotes all while copies stand still, so that they come to the lane together.
async fn promote_together(vmem: &VirtualMemory, handles: &[VMemHandle], emulator: &Emulator) {
    emulator.hold(Kind::Up);
    let all = join_all(handles.iter().map(|handle| {
        let promote = vmem.promote(handle, VRAM);
        async move { promote.await.unwrap() }
    }));
    let mut all = std::pin::pin!(all);
    assert!((&mut all).now_or_never().is_none());
    // Each has its space then, and its copy is queued or waits in the lane.
    let bytes: usize = handles.iter().map(VMemHandle::len).sum();
    until("the copies", || {
        vmem.stats().vram.used_bytes >= bytes as u64 && emulator.counter("queued_up") > 0
    })
    .await;
    emulator.release_all();
    all.await;
}

/// What a user finds in device memory.
async fn are_there(
    vmem: &VirtualMemory,
    handles: &[VMemHandle],
    stream: &Arc<CudaStream>,
    len: usize,
) {
    for (n, handle) in handles.iter().enumerate() {
        assert!(vmem.residency(handle).unwrap().vram);
        let lease = vmem.device_on(handle, stream).await.unwrap();
        assert!(stream.clone_dtoh(&lease.view()).unwrap() == bytes(n, len), "object {n}");
    }
}

fn buffer(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<u8> {
    let buffer = stream.alloc_zeros::<u8>(len).unwrap();
    stream.synchronize().unwrap();
    buffer
}

/// Mechanism: each small copy was one of the copy engine. Effect: 3 GiB/s of a link of 50. Fix: a
/// kernel copies those that come together.
#[tokio::test]
async fn small_objects_come_up_by_kernels() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    let stream = stream();
    let kernels = emulator.counter("piece_kernels");
    let single = emulator.calls("cuMemcpyHtoDAsync_v2");
    promote_together(&vmem, &handles, &emulator).await;
    let kernels = emulator.counter("piece_kernels") - kernels;
    let single = emulator.calls("cuMemcpyHtoDAsync_v2") - single;
    // Eight batches may have been under way before the rest came together.
    assert!((1..=16).contains(&kernels) && single <= 24, "{kernels} kernels, {single} copies");
    are_there(&vmem, &handles, &stream, 16 * KIB).await;
    end(vmem, handles, &emulator).await;
}

/// Mechanism: copies of some length were handed in one by one. Effect: 16 GiB/s of a link of 50 at
/// 64 KiB. Fix: one call of the driver takes those that come together.
#[tokio::test]
async fn copies_go_the_way_that_the_configuration_says() {
    let emulator = Emulator::load().unwrap();
    let default = SwitchPoints::default();
    for (len, points, ways) in [
        (64 * KIB, SwitchPoints { small_max: 64 * KIB, small_min: 2, ..default }, [true, false]),
        (16 * KIB, SwitchPoints { small_max: 8 * KIB, ..default }, [false, true]),
        (16 * KIB, SwitchPoints { small_min: usize::MAX, ..default }, [false, true]),
        (16 * KIB, SwitchPoints { small_max: 0, batch_min: usize::MAX, ..default }, [false, false]),
    ] {
        let (vmem, handles) = open_with(len, points).await;
        let count = || [emulator.counter("piece_kernels"), emulator.calls("cuMemcpyBatchAsync")];
        let before = count();
        promote_together(&vmem, &handles, &emulator).await;
        let are_taken = [0, 1].map(|way| count()[way] > before[way]);
        assert_eq!(are_taken, ways, "{len} bytes, {points:?}");
        are_there(&vmem, &handles, &stream(), len).await;
        end(vmem, handles, &emulator).await;
    }
}

#[tokio::test]
async fn many_objects_come_up_by_one_call() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(64 * KIB).await;
    let stream = stream();
    let kernels = emulator.counter("piece_kernels");
    let batches = emulator.calls("cuMemcpyBatchAsync");
    let single = emulator.calls("cuMemcpyHtoDAsync_v2");
    promote_together(&vmem, &handles, &emulator).await;
    let batches = emulator.calls("cuMemcpyBatchAsync") - batches;
    let single = emulator.calls("cuMemcpyHtoDAsync_v2") - single;
    assert_eq!(emulator.counter("piece_kernels"), kernels, "they are too long for a kernel");
    assert!((1..=16).contains(&batches) && single <= 8, "{batches} calls, {single} copies");
    are_there(&vmem, &handles, &stream, 64 * KIB).await;
    end(vmem, handles, &emulator).await;
}

/// A driver that refuses the kernel and the call of many copies them one by one; one that has no
/// such kernel at all as well.
#[tokio::test]
async fn copies_are_made_one_by_one_where_nothing_else_serves() {
    for (is_open, refused) in [(false, "cuModuleLoadData"), (true, "cuLaunchKernel")] {
        let emulator = Emulator::load().unwrap();
        let refuse = |code| {
            emulator.refuse(refused, code);
            emulator.refuse("cuMemcpyBatchAsync", code);
        };
        if !is_open {
            refuse(INVALID);
        }
        let (vmem, handles) = open(16 * KIB).await;
        refuse(INVALID);
        let kernels = emulator.counter("piece_kernels");
        promote_together(&vmem, &handles, &emulator).await;
        assert_eq!(emulator.counter("piece_kernels"), kernels, "{refused} is refused");
        let stream = stream();
        let mut all = buffer(&stream, COUNT * 16 * KIB);
        let numbered = handles.iter().enumerate();
        let pieces: Vec<_> =
            numbered.map(|(n, handle)| (handle, 0..16 * KIB, n * 16 * KIB)).collect();
        vmem.gather(&pieces, &DeviceTarget::from_slice(&mut all)).await.unwrap();
        refuse(0);
        let got = stream.clone_dtoh(&all).unwrap();
        assert!(got.chunks(16 * KIB).enumerate().all(|(n, got)| got == bytes(n, 16 * KIB)));
        drop(all);
        end(vmem, handles, &emulator).await;
    }
}

/// Mechanism: a gather waited for its stream, and then for its copies. Effect: two wake-ups of
/// about 70 us each behind a kernel, where one by hand has one. Fix: what the device reaches is
/// copied on the buffer's own stream.
#[tokio::test]
async fn pieces_that_the_device_reaches_are_queued_behind_a_kernel() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    // Some from device memory, too.
    promote(&vmem, &handles[..8]).await;
    let stream = stream();
    // At odd places and of odd lengths. Of four the kernel takes three: the addresses of the others
    // differ modulo 16.
    let place = |n: usize| n * 16 * KIB + if n % 4 == 3 { n + 7 } else { n };
    let mut all = buffer(&stream, (COUNT + 1) * 16 * KIB);
    let at = all.device_ptr(&stream).0;
    emulator.hold(Kind::Kernel);
    launch("vmem_fill", at, all.len() as u64, 9, &stream);
    let target = DeviceTarget::from_slice(&mut all);
    let range = |n: usize| n..n + 5000 + n;
    let pieces: Vec<_> =
        handles.iter().enumerate().map(|(n, handle)| (handle, range(n), place(n))).collect();
    let kernels = emulator.calls("cuLaunchKernel");
    let pieces_before = emulator.counter("pieces");
    let mut gather = Box::pin(vmem.gather(&pieces, &target));
    assert!((&mut gather).now_or_never().is_none());
    // They stand behind the kernel already, though nothing has been waited for.
    assert!(emulator.counter("queued_up") + emulator.counter("queued_within") > 0);
    assert_eq!(emulator.calls("cuLaunchKernel"), kernels + 1);
    emulator.release_all();
    gather.await.unwrap();
    let by_kernel = emulator.counter("pieces") - pieces_before;
    assert!(by_kernel >= (COUNT * 3 / 4) as u64, "one kernel has the most of them: {by_kernel}");
    drop(target);
    let got = stream.clone_dtoh(&all).unwrap();
    let mut expected = vec![9; got.len()];
    for n in 0..COUNT {
        let range = range(n);
        expected[place(n)..][..range.len()].copy_from_slice(&bytes(n, 16 * KIB)[range]);
    }
    assert!(got == expected);
    drop(all);
    end(vmem, handles, &emulator).await;
}

/// A device that knows registered memory by other addresses is given none to a kernel.
#[tokio::test]
async fn kernel_is_not_used_where_addresses_differ() {
    let emulator = Emulator::load().unwrap();
    emulator.addressed_alike(false);
    let (vmem, handles) = open(16 * KIB).await;
    emulator.addressed_alike(true);
    let kernels = emulator.counter("piece_kernels");
    promote_together(&vmem, &handles, &emulator).await;
    assert_eq!(emulator.counter("piece_kernels"), kernels);
    are_there(&vmem, &handles, &stream(), 16 * KIB).await;
    end(vmem, handles, &emulator).await;
}

/// Mechanism: a gather of several groups yields between two, and looked for captures once. Effect:
/// the later groups became part of a graph, which was replayed over freed memory. Fix: each group
/// looks; in a capture the tier's own stream copies, once that has ended.
#[tokio::test]
async fn capture_that_begins_between_two_groups_gets_no_copies() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    let stream = stream();
    let mut all = buffer(&stream, 600 * KIB);
    let target = DeviceTarget::from_slice(&mut all);
    let pieces: Vec<_> = (0..600).map(|n| (&handles[n % COUNT], n..n + KIB, n * KIB)).collect();
    let captured = emulator.counter("captured_operations");
    let mut gather = Box::pin(vmem.gather(&pieces, &target));
    assert!((&mut gather).now_or_never().is_none());
    begin_capture(&stream);
    // The next groups, while the capture goes on.
    for _ in 0..10 {
        assert!((&mut gather).now_or_never().is_none());
        tokio::task::yield_now().await;
    }
    assert_eq!(emulator.counter("captured_operations"), captured, "the graph has a copy");
    assert_eq!(end_capture(&stream), 0, "the capture is whole");
    drop((gather.await.unwrap(), target));
    let got = stream.clone_dtoh(&all).unwrap();
    assert!((0..600).all(|n| got[n * KIB..][..KIB] == bytes(n % COUNT, 16 * KIB)[n..n + KIB]));
    drop(all);
    end(vmem, handles, &emulator).await;
}

/// A gather that is dropped behind a kernel keeps what it copies until it has: no source is reused
/// before, and what the stream has next comes after.
#[tokio::test]
async fn dropped_gather_keeps_its_sources_behind_a_kernel() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    promote(&vmem, &handles[..8]).await;
    let stream = stream();
    let mut all = buffer(&stream, COUNT * 16 * KIB);
    let at = all.device_ptr(&stream).0;
    emulator.hold(Kind::Kernel);
    launch("vmem_fill", at, all.len() as u64, 9, &stream);
    {
        let target = DeviceTarget::from_slice(&mut all);
        let piece = |(n, handle)| (handle, 0..16 * KIB, n * 16 * KIB);
        let pieces: Vec<_> = handles.iter().enumerate().map(piece).collect();
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        drop(gather);
    }
    // Their memory is wanted for others meanwhile: the emulated driver sees a source that changes.
    demote(&vmem, &handles[..8]).await;
    drop(handles);
    let mut others = Vec::new();
    for n in 0..2 * COUNT {
        others.push(vmem.put(bytes(n + 100, 16 * KIB), HOST).await.unwrap());
        vmem.promote(&others[n], VRAM).await.unwrap();
    }
    emulator.release_all();
    let got = stream.clone_dtoh(&all).unwrap();
    assert!(got.chunks(16 * KIB).enumerate().all(|(n, got)| got == bytes(n, 16 * KIB)));
    drop(all);
    end(vmem, others, &emulator).await;
}

/// Mechanism: the calls of each gather were limited, those of a stream were not. Effect: behind one
/// kernel several gathers filled the launch queue of the stream, and a worker of the runtime stood
/// in the driver until the kernel ended. Fix: calls are planned before the first, and counted by
/// stream; what would be too many is copied on the tier's own stream.
#[tokio::test]
async fn gathers_behind_a_kernel_do_not_fill_the_launch_queue() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    let stream = stream();
    let mut buffers: Vec<_> = (0..100).map(|_| buffer(&stream, COUNT * KIB)).collect();
    let held = buffer(&stream, KIB);
    let at = held.device_ptr(&stream).0;
    // As CUDA has it. Each gather has some events on the stream besides.
    emulator.queue_max(1000);
    emulator.hold(Kind::Kernel);
    launch("vmem_fill", at, held.len() as u64, 9, &stream);
    let targets: Vec<_> = buffers.iter_mut().map(DeviceTarget::from_slice).collect();
    let pieces: Vec<_> =
        handles.iter().enumerate().map(|(n, handle)| (handle, n..n + 512, n * KIB)).collect();
    let mut gathers: Vec<_> =
        targets.iter().map(|target| Box::pin(vmem.gather(&pieces, target))).collect();
    // On a thread of its own, which the driver may stop.
    let runtime = tokio::runtime::Handle::current();
    let (done, all_polled) = std::sync::mpsc::channel();
    let polled = std::thread::scope(|scope| {
        let gathers = &mut gathers;
        scope.spawn(move || {
            let _within = runtime.enter();
            for gather in gathers {
                assert!(gather.now_or_never().is_none(), "the kernel stands still");
            }
            done.send(()).unwrap();
        });
        let polled = all_polled.recv_timeout(HANGS);
        emulator.release_all();
        polled
    });
    polled.expect("no call waits for the launch queue");
    try_join_all(gathers).await.unwrap();
    drop(targets);
    for buffer in &buffers {
        let got = stream.clone_dtoh(buffer).unwrap();
        assert!((0..COUNT).all(|n| got[n * KIB..][..512] == bytes(n, 16 * KIB)[n..n + 512]));
    }
    drop((buffers, held));
    end(vmem, handles, &emulator).await;
}

/// With all tables in use, copies are made by other calls, and the tables come back.
#[tokio::test]
async fn more_launches_than_tables_go_other_ways() {
    let emulator = Emulator::load().unwrap();
    let (vmem, handles) = open(16 * KIB).await;
    let streams: Vec<_> = (0..4).map(|_| stream()).collect();
    let mut buffers: Vec<_> = (0..100).map(|n| buffer(&streams[n % 4], COUNT * KIB)).collect();
    emulator.hold(Kind::Up);
    emulator.hold(Kind::Kernel);
    let pieces: Vec<_> =
        handles.iter().enumerate().map(|(n, handle)| (handle, 0..512, n * KIB)).collect();
    for round in 0..2 {
        let kernels = emulator.calls("cuLaunchKernel");
        let batches = emulator.calls("cuMemcpyBatchAsync");
        let targets: Vec<_> = buffers.iter_mut().map(DeviceTarget::from_slice).collect();
        let mut gathers: Vec<_> =
            targets.iter().map(|target| Box::pin(vmem.gather(&pieces, target))).collect();
        for gather in &mut gathers {
            let has_ended = gather.now_or_never().is_some();
            assert!(round > 0 || !has_ended, "the copies stand still");
        }
        if round == 0 {
            let kernels = emulator.calls("cuLaunchKernel") - kernels;
            let batches = emulator.calls("cuMemcpyBatchAsync") - batches;
            // 88 tables, 24 of which are for lanes. Of the other gathers six fit into the rest of
            // each stream's 512 places.
            assert_eq!((kernels, batches), (64, 24));
            emulator.release_all();
            try_join_all(gathers).await.unwrap();
        } else {
            drop(gathers);
            let kernels = emulator.calls("cuLaunchKernel") - kernels;
            assert!(kernels >= 60, "the tables came back: {kernels}");
        }
    }
    for (n, buffer) in buffers.iter().enumerate() {
        let got = streams[n % 4].clone_dtoh(buffer).unwrap();
        assert!((0..COUNT).all(|n| got[n * KIB..][..512] == bytes(n, 16 * KIB)[..512]));
    }
    drop(buffers);
    end(vmem, handles, &emulator).await;
}
