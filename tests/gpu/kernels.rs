//! Objects under the kernels of a user: what they change, how they end, and how they do not.
//!
//! Invariant: no kernel and no copy touches a range that another one has not done with; what a
//! kernel wrote is the version after it, whole or not at all.

use std::time::Duration;

use futures::FutureExt;
use vmem::gpu::VramExt;
use vmem::{MemoryTier, VirtualMemoryConfig, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HOST, LEN, VRAM, bytes, end, launch, open_small as open, plus, stream};

/// A kernel that reads, still running when its lease is dropped, the object freed and others in
/// need of space.
#[tokio::test]
async fn a_range_is_not_reused_under_a_kernel() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(512 * 300).await;
    let target = stream().context().new_stream().unwrap();
    let stream = stream();
    // SAFETY: it is written before it is read.
    let mut sink = unsafe { target.alloc::<u8>(LEN) }.unwrap();
    target.synchronize().unwrap();
    let sink_at = {
        use vmem::gpu::cudarc::driver::DevicePtrMut;
        let (at, _sync) = sink.device_ptr_mut(&target);
        at
    };
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    assert_eq!((lease.len(), lease.is_empty()), (LEN, false));
    // SAFETY: read by the kernel below, on the stream of the lease.
    let source = unsafe { lease.device_ptr() };
    assert_eq!(source % 256, 0);
    emulator.hold(Kind::Kernel);
    launch("vmem_slow_copy", sink_at, source, LEN as u64, &stream);
    drop(lease);
    vmem.free(handle).await.unwrap();
    // Space for one of them: the second has to wait for the kernel.
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let mut promote = Box::pin(vmem.promote(&other, VRAM));
    tokio::select! {
        _ = &mut promote => panic!("it took what a kernel reads"),
        () = tokio::time::sleep(Duration::from_millis(150)) => {}
    }
    assert_eq!(emulator.counter("kernels"), 0);
    emulator.release_all();
    promote.await.unwrap();
    stream.synchronize().unwrap();
    let copied = target.clone_dtoh(&sink).unwrap();
    assert!(copied == bytes(1), "the kernel read what it was given");
    drop(sink);
    end(vmem, vec![other], &emulator).await;
}

/// What a kernel writes is the current version after the drop; until then the previous one is read.
#[tokio::test]
async fn a_kernel_changes_an_object() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    let mut expected = bytes(3);
    for round in 1..4_u8 {
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        emulator.hold(Kind::Kernel);
        // SAFETY: used by the kernel below, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, round.into(), &stream);
        assert!(vmem.read(&handle).await.unwrap() == expected, "the previous version");
        drop(lease);
        // A read that comes after the drop waits for the kernel; so does a demotion.
        let mut read = Box::pin(vmem.read(&handle));
        assert!((&mut read).now_or_never().is_none());
        let part = vmem.read_at(&handle, 10..20);
        let demote = vmem.demote(&handle, MemoryTier::Disk);
        let release = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            emulator.release_all();
        };
        let (read, part, demote, ()) = futures::join!(read, part, demote, release);
        expected = plus(&expected, round);
        assert!(read.unwrap() == expected && part.unwrap() == expected[10..20]);
        demote.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == expected, "all of it was demoted");
    }
    // It is where it was written, and below.
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: as above.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 7, &stream);
    lease.finish().await.unwrap();
    let residency = vmem.residency(&handle).unwrap();
    assert!(residency.vram && residency.host && residency.dirty, "{residency:?}");
    assert!(vmem.read(&handle).await.unwrap() == plus(&expected, 7));
    end(vmem, vec![handle], &emulator).await;
}

/// All of it is written: its bytes of before are not loaded.
#[tokio::test]
async fn a_kernel_overwrites_an_object() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), MemoryTier::Disk).await.unwrap();
    let before = emulator.counter("bytes_up");
    let lease = vmem.device_overwrite_on(&handle, &stream).await.unwrap();
    assert_eq!(emulator.counter("bytes_up"), before);
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_fill", unsafe { lease.device_ptr() }, LEN as u64, 9, &stream);
    drop(lease);
    assert!(vmem.read(&handle).await.unwrap() == vec![9; LEN]);
    // What the kernel does not write is zeros, and nothing that others left there.
    let lease = vmem.device_overwrite_on(&handle, &stream).await.unwrap();
    // SAFETY: as above.
    launch("vmem_fill", unsafe { lease.device_ptr() }, 10, 1, &stream);
    drop(lease);
    let read = vmem.read(&handle).await.unwrap();
    assert!(read[..10] == [1; 10] && read[10..].iter().all(|&byte| byte == 0));
    drop(read);
    // A named object is durable with what the kernel wrote.
    let named = vmem.put_named("state", bytes(4), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&named, &stream).await.unwrap();
    // SAFETY: as above.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    drop(lease);
    vmem.flush(&named).await.unwrap();
    assert!(!vmem.residency(&named).unwrap().dirty);
    assert!(vmem.read(&named).await.unwrap() == plus(&bytes(4), 1));
    vmem.remove_named("state").await.unwrap();
    end(vmem, vec![handle, named], &emulator).await;
}

/// A kernel that fails leaves the previous version, in a store that goes on without its device.
#[tokio::test]
async fn a_kernel_that_fails() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(8), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    let finished = lease.finish();
    emulator.sticky(719);
    let error = finished.await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Device { .. }), "{error:?}");
    assert!(vmem.read(&handle).await.unwrap() == bytes(8), "the previous version");
    let error = vmem.device_on(&handle, &stream).await.unwrap_err();
    assert!(
        matches!(
            error,
            VirtualMemoryError::TierNotAvailable { .. } | VirtualMemoryError::Device { .. }
        ),
        "{error:?}"
    );
    vmem.write(&handle, bytes(9)).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(9));
    drop(handle);
    vmem.close().await.unwrap();
    emulator.sticky(0);
}

/// The notice of a kernel's end is lost; the end is still seen.
#[tokio::test]
async fn a_lost_notice_of_a_kernel() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    emulator.suppress_host_functions(true);
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    drop(lease);
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(1), 1));
    end(vmem, vec![handle], &emulator).await;
}

/// Kernels that have not ended take no other request's place; `close` waits for them, but not for
/// ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kernel_that_does_not_end() {
    let emulator = Emulator::load().unwrap();
    for ends in [true, false] {
        let config = VirtualMemoryConfig::builder()
            .host_capacity(64 << 20)
            .disk_capacity(64 << 20)
            .vram_capacity(32 << 20)
            .max_pinned(1.0)
            .wait_timeout(Duration::from_millis(1500));
        let vmem = vmem::open(config.build().unwrap()).await.unwrap();
        let stream = stream();
        emulator.hold(Kind::Kernel);
        let mut changed = Vec::new();
        emulator.queue_max(10_000);
        // More than there are places for migrations.
        for _ in 0..1100 {
            let handle = vmem.put([7; 1000], HOST).await.unwrap();
            let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel below, on the stream of the lease.
            let at = unsafe { lease.device_ptr() };
            launch("vmem_add", at, 1000, 1, &stream);
            drop(lease);
            changed.push(handle);
        }
        let other = vmem.put(bytes(200), MemoryTier::Disk).await.unwrap();
        vmem.demote(&other, MemoryTier::Disk).await.unwrap();
        assert!(vmem.read(&other).await.unwrap() == bytes(200), "a read is served beside them");
        let named = vmem.put_named("kept", bytes(201), HOST).await.unwrap();
        let releasing = ends.then_some(async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            emulator.release_all();
        });
        let begun = std::time::Instant::now();
        let closing = vmem.close();
        let outcome = match releasing {
            Some(releasing) => futures::future::join(closing, releasing).await.0,
            None => tokio::time::timeout(Duration::from_secs(60), closing).await.expect("it ends"),
        };
        assert_eq!(outcome.is_ok(), ends, "{outcome:?} after {:?}", begun.elapsed());
        if !ends {
            assert!(matches!(outcome, Err(VirtualMemoryError::Device { .. })), "{outcome:?}");
            assert!(emulator.counter("device_bytes") > 0, "what a kernel uses is not freed");
        }
        emulator.release_all();
        stream.synchronize().unwrap();
        drop((changed, other, named, stream));
        // The threads of the store end by themselves now.
        for _ in 0..5000 {
            if emulator.counter("device_bytes") + emulator.counter("contexts") == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(emulator.counter("device_bytes"), 0, "and is, once they have ended");
        assert_eq!(emulator.violations(), [""; 0]);
    }
}

/// A version that is being copied to the host when the wait for kernels ends is not given up, nor
/// is the previous one.
#[tokio::test]
async fn a_copy_down_that_is_slow_at_the_end() {
    let emulator = Emulator::load().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = || {
        let config = VirtualMemoryConfig::builder().disk_path(folder.path());
        let config = config.host_capacity(16 << 20).disk_capacity(64 << 20).vram_capacity(8 << 20);
        config.wait_timeout(Duration::from_secs(1)).build().unwrap()
    };
    let vmem = vmem::open(config()).await.unwrap();
    let named = vmem.put_named("weights", bytes(3), HOST).await.unwrap();
    // Newer than what is durable.
    vmem.write(&named, bytes(9)).await.unwrap();
    let stream = stream();
    let lease = vmem.device_mut_on(&named, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    launch("vmem_add", at, LEN as u64, 4, &stream);
    emulator.hold(Kind::Down);
    drop((lease, named));
    let mut closing = Box::pin(vmem.close());
    tokio::select! {
        _ = &mut closing => panic!("what the kernel wrote is still being copied"),
        () = tokio::time::sleep(Duration::from_millis(1500)) => emulator.release_all(),
    }
    closing.await.unwrap();
    let vmem = vmem::open(config()).await.unwrap();
    let again = vmem.open_named("weights").await.unwrap();
    assert!(vmem.read(&again).await.unwrap() == plus(&bytes(9), 4));
    drop(again);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// What a kernel writes to a named object while the store is being closed is durable.
#[tokio::test]
async fn a_kernel_that_ends_while_the_store_is_closed() {
    let emulator = Emulator::load().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = || {
        let config = VirtualMemoryConfig::builder().disk_path(folder.path());
        config
            .host_capacity(16 << 20)
            .disk_capacity(64 << 20)
            .vram_capacity(8 << 20)
            .build()
            .unwrap()
    };
    let vmem = vmem::open(config()).await.unwrap();
    let named = vmem.put_named("weights", bytes(3), HOST).await.unwrap();
    let stream = stream();
    emulator.hold(Kind::Kernel);
    let lease = vmem.device_mut_on(&named, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    launch("vmem_add", at, LEN as u64, 4, &stream);
    drop((lease, named));
    let mut closing = Box::pin(vmem.close());
    tokio::select! {
        _ = &mut closing => panic!("a kernel still writes"),
        () = tokio::time::sleep(Duration::from_millis(100)) => emulator.release_all(),
    }
    closing.await.unwrap();
    let vmem = vmem::open(config()).await.unwrap();
    let again = vmem.open_named("weights").await.unwrap();
    assert!(vmem.read(&again).await.unwrap() == plus(&bytes(3), 4));
    drop(again);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}
