//! Leases: objects in device memory under the kernels of a user, on the emulated driver.
//!
//! Invariant: the emulated driver has seen no rule broken: no kernel and no copy touched a range
//! that another one had not done with.

use std::time::Duration;

use futures::FutureExt;
use vmem::gpu::cudarc::driver::{CudaContext, result, sys};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{MemoryTier, VirtualMemoryConfig, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    HANGS, HOST, LEN, VRAM, bytes, end, launch, open_small as open, plus, stream,
};

/// Readers share, a writer is alone.
#[tokio::test]
async fn a_writer_waits_for_readers() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let other = stream();
    let stream = stream();
    let handle = vmem.put(bytes(5), HOST).await.unwrap();
    let first = vmem.device_on(&handle, &stream).await.unwrap();
    let second = vmem.device_on(&handle, &other).await.unwrap();
    let mut writer = Box::pin(vmem.device_mut_on(&handle, &stream));
    tokio::select! {
        _ = &mut writer => panic!("it is not alone"),
        () = tokio::time::sleep(Duration::from_millis(50)) => {}
    }
    drop(first);
    // Its kernel still reads.
    let sink = {
        // SAFETY: it is written and never read.
        let sink = unsafe { other.alloc::<u8>(LEN) }.unwrap();
        sink.leak()
    };
    emulator.hold(Kind::Kernel);
    // SAFETY: read by the kernel below, on the stream of the lease.
    launch("vmem_slow_copy", sink, unsafe { second.device_ptr() }, LEN as u64, &other);
    drop(second);
    // The device has the writer's kernel wait for that one.
    let lease = tokio::time::timeout(HANGS / 2, writer).await.expect("readers are gone").unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    drop(lease);
    emulator.release_all();
    let read = |copied: &mut [u8]| {
        // SAFETY: both are as long as the object; the memory is pageable, so the call waits.
        unsafe { result::memcpy_dtoh_async(copied, sink, other.cu_stream()) }.unwrap();
    };
    let mut copied = vec![0; LEN];
    read(&mut copied);
    assert!(copied == bytes(5), "it came before the writer");
    // The next reader sees what it wrote.
    let lease = vmem.device_on(&handle, &other).await.unwrap();
    // SAFETY: as above.
    launch("vmem_slow_copy", sink, unsafe { lease.device_ptr() }, LEN as u64, &other);
    drop(lease);
    read(&mut copied);
    assert!(copied == plus(&bytes(5), 1));
    // SAFETY: it was leaked above, and nothing uses it any more.
    unsafe { result::free_sync(sink) }.unwrap();
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: a reader queued behind the writer that waited for it. Effect: it stood still until
/// the deadline of the writer. Fix: a writer that waits holds nothing.
#[tokio::test]
async fn readers_lease_again_what_they_have_beside_a_waiting_writer() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(5), HOST).await.unwrap();
    let first = vmem.device_on(&handle, &stream).await.unwrap();
    let mut writer = Box::pin(vmem.device_mut_on(&handle, &stream));
    for _ in 0..20 {
        assert!((&mut writer).now_or_never().is_none(), "it is not alone");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut set = Box::pin(vmem.device_set(&stream).read(&handle).acquire());
    let second = vmem.device_on(&handle, &stream).await.unwrap();
    let set = (&mut set).await.unwrap();
    assert!((&mut writer).now_or_never().is_none(), "readers have it");
    drop((first, second, set));
    writer.await.unwrap().abandon();
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: space was made before anybody asked whether there could be enough. Effect: an object
/// larger than the device emptied it, for nothing. Fix: the capacity is looked at first.
#[tokio::test]
async fn objects_larger_than_the_device_evict_nothing() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(2 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for n in 0..8 {
        let handle = vmem.put(bytes(n), HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    let before = vmem.stats().vram;
    // It stays below.
    let large = vmem.allocate(3 << 20, VRAM).await.unwrap();
    vmem.write(&large, vec![1; 3 << 20]).await.unwrap();
    let refused = [
        vmem.promote(&large, VRAM).await.err(),
        vmem.device_on(&large, &stream).await.err(),
        vmem.allocate_scratch(3 << 20, &stream).await.err(),
    ];
    for error in refused {
        let is_named =
            matches!(error, Some(VirtualMemoryError::ExceedsCapacity { tier: VRAM, .. }));
        assert!(is_named, "{error:?}");
    }
    let after = vmem.stats().vram;
    assert_eq!((after.objects, after.used_bytes), (before.objects, before.used_bytes));
    handles.push(large);
    end(vmem, handles, &emulator).await;
}

/// Pins, writes and frees beside leases; a lease that is cancelled while it waits leaves nothing.
#[tokio::test]
async fn leases_among_other_calls() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(512 * 500).await;
    let stream = stream();
    let handle = vmem.put(bytes(6), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    let refused = vmem.demote(&handle, HOST).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Pinned { .. })), "{refused:?}");
    // A write makes another version; the lease keeps its own.
    vmem.write(&handle, bytes(7)).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(7));
    let mut kept = vec![0; LEN];
    // SAFETY: it is read below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: both are as long as the object; the memory of the vector is pageable, so the call
    // waits.
    unsafe { result::memcpy_dtoh_async(&mut kept, at, stream.cu_stream()) }.unwrap();
    assert!(kept == bytes(6));
    // Cancelled at every stage of its waiting.
    for wait in [0, 1, 5, 20] {
        let mut writer = Box::pin(vmem.device_mut_on(&handle, &stream));
        assert!((&mut writer).now_or_never().is_none_or(|lease| lease.is_ok()));
        tokio::time::sleep(Duration::from_millis(wait)).await;
        drop(writer);
        assert!(vmem.read(&handle).await.unwrap() == bytes(7));
    }
    drop(lease);
    let pins = vmem.residency(&handle).unwrap().pins;
    assert!(pins <= 1, "{pins}");
    // No bytes are an object too.
    let empty = vmem.put([], HOST).await.unwrap();
    let lease = vmem.device_on(&empty, &stream).await.unwrap();
    assert!(lease.is_empty());
    drop(lease);
    vmem.device_mut_on(&empty, &stream).await.unwrap().finish().await.unwrap();
    end(vmem, vec![handle, empty], &emulator).await;
}

#[tokio::test]
async fn streams_that_will_not_do() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let context = CudaContext::new(0).unwrap();
    let refused = |error: VirtualMemoryError, why: &str| {
        let VirtualMemoryError::InvalidConfig { field: "stream", reason } = error else {
            panic!("{error:?}")
        };
        assert!(reason.contains(why), "{reason}");
    };
    let own = context.per_thread_stream();
    refused(vmem.device_on(&handle, &own).await.unwrap_err(), "on each thread");
    let captured = context.new_stream().unwrap();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    captured.begin_capture(mode).unwrap();
    refused(vmem.device_mut_on(&handle, &captured).await.unwrap_err(), "captured");
    drop(captured.end_capture(
        sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
    ));
    emulator.devices(2);
    let other = CudaContext::new(1).unwrap().new_stream().unwrap();
    refused(vmem.device_on(&handle, &other).await.unwrap_err(), "another context");
    end(vmem, vec![handle], &emulator).await;
}

/// The store is closed under a lease: its memory stays until it is dropped, and the kernel has
/// ended.
#[tokio::test]
async fn a_lease_outlives_the_store() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(2), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    vmem.close().await.unwrap();
    assert_eq!(emulator.counter("device_bytes"), 4 << 20, "a lease has it");
    let mut read = vec![0; LEN];
    stream.context().bind_to_thread().unwrap();
    // SAFETY: it is read below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: both are as long as the object; the memory of the vector is pageable, so the call
    // waits.
    unsafe { result::memcpy_dtoh_async(&mut read, at, stream.cu_stream()) }.unwrap();
    assert!(read == bytes(2));
    drop((lease, handle));
    for _ in 0..2000 {
        if emulator.counter("device_bytes") == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(emulator.counter("device_bytes"), 0, "the last lease frees it");
    assert_eq!(emulator.violations(), [""; 0]);
}

/// Within a scope the calling thread's own stream is in the order of the lease.
#[tokio::test]
async fn a_scope_orders_the_own_stream_of_a_thread() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let own = stream.context().per_thread_stream();
    let handle = vmem.put(bytes(5), HOST).await.unwrap();
    emulator.delay(Kind::Kernel, 20_000);
    let mut lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernels below, on the stream of the lease and within its scope.
    let at = unsafe { lease.device_ptr() };
    launch("vmem_add", at, LEN as u64, 1, &stream);
    lease.scope(|view| {
        assert_eq!(view.len(), LEN);
        launch("vmem_add", at, LEN as u64, 2, &own);
    });
    launch("vmem_add", at, LEN as u64, 4, &stream);
    // A panic of the work leaves what it queued in order too.
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        lease.scope(|_| {
            launch("vmem_add", at, LEN as u64, 8, &own);
            panic!("of the work");
        })
    }));
    assert!(panicked.is_err());
    lease.finish().await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(5), 15));
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    let sink = stream.alloc_zeros::<u8>(LEN).unwrap();
    let to = {
        use vmem::gpu::cudarc::driver::DevicePtr;
        sink.device_ptr(&stream).0
    };
    lease.scope(|_| launch("vmem_slow_copy", to, at, LEN as u64, &own));
    drop(lease);
    vmem.free(handle).await.unwrap();
    stream.synchronize().unwrap();
    assert!(stream.clone_dtoh(&sink).unwrap() == plus(&bytes(5), 15));
    drop(sink);
    end(vmem, vec![], &emulator).await;
}

/// Tasks over {A, B} and {C, D}, and over both in opposite orders, in a tier that holds three of
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_10_device_sets_in_opposite_orders() {
    let emulator = Emulator::load().unwrap();
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(3 * 100_352)
        .max_pinned(0.9)
        .wait_timeout(Duration::from_secs(20));
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let mut handles = Vec::new();
    for _ in 0..4 {
        handles.push(vmem.put(vec![0; LEN], HOST).await.unwrap());
    }
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..4 {
        let vmem = vmem.clone();
        let handles = handles.clone();
        let order = [[0, 1], [1, 0], [2, 3], [3, 2]][task];
        tasks.spawn(async move {
            let stream = stream();
            for round in 0..20_u64 {
                let set = vmem.device_set(&stream).write(&handles[order[0]]);
                let set = set.write(&handles[order[1]]).acquire().await.unwrap();
                for lease in &set.write {
                    // SAFETY: used by the kernel, on the stream of the lease.
                    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
                }
                match round % 2 {
                    0 => drop(set),
                    _ => set.finish().await.unwrap(),
                }
            }
        });
    }
    tasks.join_all().await;
    for handle in &handles {
        assert!(vmem.read(handle).await.unwrap() == vec![40; LEN], "each was changed 40 times");
    }
    let stream = stream();
    let all = handles.iter().fold(vmem.device_set(&stream), |set, handle| set.read(handle));
    let error = all.acquire().await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::ExceedsCapacity { tier: VRAM, .. }), "{error:?}");
    let both = vmem.device_set(&stream).read(&handles[0]).write(&handles[0]);
    let error = both.acquire().await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::InvalidConfig { field: "device_set", .. }));
    let set = vmem.device_set(&stream).read(&handles[0]).read(&handles[0]).acquire().await.unwrap();
    assert_eq!(set.read.len(), 2, "two kernels may read one object");
    drop(set);
    end(vmem, handles, &emulator).await;
}

/// A table of rows in three tiers, gathered into one buffer after what its stream does, and
/// scattered back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_gathered_and_scattered() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20).await;
    let stream = stream();
    let row = |n: usize, version: u8| -> Vec<u8> {
        (0..3000).map(|at| (at / 7 + n * 13) as u8 ^ version).collect()
    };
    let mut rows = Vec::new();
    for n in 0..90 {
        let home = if n % 3 == 0 { MemoryTier::Disk } else { HOST };
        let handle = vmem.put(row(n, 0), home).await.unwrap();
        if n % 3 == 1 {
            vmem.promote(&handle, VRAM).await.unwrap();
        }
        rows.push(handle);
    }
    let mut buffer = stream.alloc_zeros::<u8>(90 * 1000).unwrap();
    let used = vmem.stats().vram.used_bytes;
    // A kernel that is slow to fill the buffer comes first.
    let address = {
        use vmem::gpu::cudarc::driver::DevicePtr;
        buffer.device_ptr(&stream).0
    };
    emulator.hold(Kind::Kernel);
    launch("vmem_fill", address, 90_000, 0xFF, &stream);
    let pieces: Vec<_> = (0..90).map(|n| (&rows[n], n..n + 900, n * 1000)).collect();
    let target = DeviceTarget::from_slice(&mut buffer);
    assert_eq!((target.len(), target.is_empty()), (90_000, false));
    let mut gather = Box::pin(vmem.gather(&pieces, &target));
    tokio::select! {
        _ = &mut gather => panic!("it did not wait for the stream"),
        () = tokio::time::sleep(Duration::from_millis(120)) => {}
    }
    emulator.release_all();
    gather.await.unwrap();
    drop(target);
    assert_eq!(vmem.stats().vram.used_bytes, used, "it takes no space in device memory");
    let got = stream.clone_dtoh(&buffer).unwrap();
    for n in 0..90 {
        assert!(got[n * 1000..n * 1000 + 900] == row(n, 0)[n..n + 900], "row {n}");
        assert!(got[n * 1000 + 900..(n + 1) * 1000] == [0xFF; 100], "between the rows");
    }

    // The other way: what a kernel leaves there becomes parts of the rows.
    launch("vmem_add", address, 90_000, 1, &stream);
    let pieces: Vec<_> = (0..90).map(|n| (n * 1000, &rows[n], n..n + 900)).collect();
    vmem.scatter(&DeviceTarget::from_slice(&mut buffer), &pieces).await.unwrap();
    for (n, handle) in rows.iter().enumerate() {
        let mut expected = row(n, 0);
        expected[n..n + 900].copy_from_slice(&plus(&row(n, 0)[n..n + 900], 1));
        assert!(vmem.read(handle).await.unwrap() == expected, "row {n}");
    }

    // What does not fit is refused before anything is touched.
    let target = DeviceTarget::from_slice(&mut buffer);
    let error = vmem.gather(&[(&rows[0], 0..10, 89_991)], &target).await.unwrap_err();
    assert!(
        matches!(error, VirtualMemoryError::InvalidConfig { field: "target", .. }),
        "{error:?}"
    );
    let error = vmem.gather(&[(&rows[0], 2999..3001, 0)], &target).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::OutOfRange { .. }), "{error:?}");
    emulator.fail("cuMemcpyHtoDAsync_v2", 1, 1);
    let error = vmem.gather(&[(&rows[0], 0..10, 0)], &target).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Device { code: 1, .. }), "{error:?}");
    drop(target);
    drop(buffer);
    end(vmem, rows, &emulator).await;
}
