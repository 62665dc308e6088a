//! Errors that pass, captures and busy streams around leases, on the emulated driver.
//!
//! Invariant: whatever the driver says in passing, no range is used by two, and the tier serves on.

use std::time::{Duration, Instant};

use futures::FutureExt;
use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::{DriverError, sys};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    HANGS, HOST, LEN, VRAM, begin_capture, bytes, end, end_capture, launch, open, plus, stream,
    until,
};

/// Mechanism: a broken capture refuses both a record (901) and a wait (900) on its stream. Effect:
/// the dropped lease took that for a dead context and freed its range under a running kernel. Fix:
/// only a context that is proven dead frees; else the range is kept and the record is tried again.
#[tokio::test]
async fn a_lease_dropped_in_a_broken_capture_keeps_its_range() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(512 * 300).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    emulator.hold(Kind::Kernel);
    launch("vmem_add", at, LEN as u64, 0, &stream);
    begin_capture(&stream);
    emulator.invalidate_captures();
    drop(lease);
    vmem.free(handle).await.unwrap();
    // There is space for one object, and a kernel still reads the first.
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let mut promote = Box::pin(vmem.promote(&other, VRAM));
    let early = tokio::time::timeout(Duration::from_millis(400), &mut promote).await;
    assert!(early.is_err(), "{early:?}: it took what a kernel uses");
    assert_eq!(end_capture(&stream), 901);
    let early = tokio::time::timeout(Duration::from_millis(400), &mut promote).await;
    assert!(early.is_err(), "{early:?}: it took what a kernel uses");
    emulator.release_all();
    promote.await.unwrap();
    end(vmem, vec![other], &emulator).await;
}

/// Mechanism: an event that was recorded in a capture answers a query with 907, and the query
/// breaks the capture. Effect: the tier was lost for good and the user's graph with it. Fix: a
/// lease that is dropped in a capture is parked until the capture has ended.
#[tokio::test]
async fn a_lease_dropped_in_a_capture_waits_for_its_end() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
    begin_capture(&stream);
    drop(lease);
    let mut read = Box::pin(vmem.read(&handle));
    let early = tokio::time::timeout(Duration::from_millis(400), &mut read).await;
    assert!(early.is_err(), "the capture goes on, and with it the lease");
    assert_eq!(end_capture(&stream), 0, "the capture is whole");
    assert!(read.await.unwrap() == plus(&bytes(3), 1));
    drop(vmem.device_on(&handle, &stream).await.unwrap());
    assert_eq!(emulator.counter("captures_broken"), 0);
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: any error of a query or of a creation counted as one that sticks. Effect:
/// `TierNotAvailable` for ever, while the driver answered. Fix: a second look confirms it.
#[tokio::test]
async fn a_passing_error_leaves_the_tier_in_service() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let functions = [
        "cuEventQuery",
        "cuEventRecord",
        "cuEventCreate",
        "cuStreamIsCapturing",
        "cuMemGetInfo_v2",
    ];
    for (round, function) in functions.into_iter().enumerate() {
        for code in [2, 907, 999] {
            let handle = vmem.put(bytes(round as u8), HOST).await.unwrap();
            let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel below, on the stream of the lease.
            launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
            // The end of a lease, and the copies beside it.
            emulator.refuse(function, code);
            drop(lease);
            let other = vmem.put(bytes(9), HOST).await.unwrap();
            let promote = vmem.promote(&other, VRAM);
            let allow = async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                emulator.refuse(function, 0);
            };
            let (promoted, ()) = futures::join!(promote, allow);
            promoted.unwrap();
            let read = tokio::time::timeout(HANGS, vmem.read(&handle)).await.unwrap().unwrap();
            assert!(read == plus(&bytes(round as u8), 1), "{function} {code}");
            drop(vmem.device_on(&handle, &stream).await.unwrap());
        }
    }
    end(vmem, vec![], &emulator).await;
}

/// Mechanism: each wake-up queried every event, and each lease launched a host function. Effect:
/// 731 queries a lease at 2,000 leases. Fix: a line for each stream, of which the front is queried,
/// and one notice at a time.
#[tokio::test]
async fn ended_leases_cost_a_constant_number_of_driver_calls() {
    const LEASES: u64 = 2000;
    let emulator = Emulator::load().unwrap();
    let vmem = open(64 << 20).await;
    let stream = stream();
    let handle = vmem.put(vec![1; 1000], HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    emulator.queue_max(100_000);
    // Once behind one kernel that is slow, once each behind a kernel of its own.
    for kernels in [1, LEASES] {
        emulator.hold(Kind::Kernel);
        let names = ["cuEventQuery", "cuLaunchHostFunc", "cuStreamWaitEvent"];
        let before = names.map(|name| emulator.calls(name));
        for nth in 0..LEASES {
            let lease = vmem.device_on(&handle, &stream).await.unwrap();
            if nth < kernels {
                // SAFETY: used by the kernel below, on the stream of the lease.
                launch("vmem_add", unsafe { lease.device_ptr() }, 1000, 0, &stream);
            }
            drop(lease);
            if nth % 5 == 0 {
                // The thread that looks at them is woken each time, and has its turn.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        emulator.release_all();
        // The last lease has ended once a writer is let in.
        vmem.device_mut_on(&handle, &stream).await.unwrap().finish().await.unwrap();
        let after = names.map(|name| emulator.calls(name));
        let counts: Vec<_> = std::iter::zip(after, before).map(|(n, before)| n - before).collect();
        println!("{LEASES} leases, {kernels} kernels: {names:?} {counts:?}");
        assert!(counts[0] <= 3 * LEASES, "queries: {counts:?}");
        assert!(counts[1] <= kernels + LEASES / 20, "host functions: {counts:?}");
    }
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: an error that a drop had left in the user's context object refused the record, and
/// the drop of the lease then waited for the whole stream. Effect: a thread stood still as long as
/// the user's kernels. Fix: leases never go through the user's context object, and never wait.
#[tokio::test]
async fn a_stale_error_of_the_user_does_not_delay_a_drop() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(4), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 0, &stream);
    let stale: Result<(), _> = Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE));
    stream.context().record_err(stale);
    let dropping = std::thread::spawn(move || drop(lease));
    until("the end of the drop", || dropping.is_finished()).await;
    assert_eq!(emulator.counter("kernels"), 0, "the kernel still stands");
    assert!(stream.context().check_err().is_err(), "the error is still the user's to see");
    emulator.release_all();
    end(vmem, vec![handle], &emulator).await;
}

/// Mechanism: a lease that was dropped after `close` started a thread that waited for its kernel.
/// Effect: 1,000 leases, 1,000 threads. Fix: one thread serves all of them, while there are any.
#[tokio::test]
async fn leases_dropped_after_close_share_one_thread() {
    fn threads() -> usize {
        std::fs::read_dir("/proc/self/task").unwrap().count()
    }
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(vec![1; 1000], HOST).await.unwrap();
    let mut leases = Vec::new();
    for _ in 0..1000 {
        leases.push(vmem.device_on(&handle, &stream).await.unwrap());
    }
    drop(handle);
    vmem.close().await.unwrap();
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the leases.
    launch("vmem_add", unsafe { leases[0].device_ptr() }, 1000, 0, &stream);
    let before = threads();
    drop(leases);
    let during = threads();
    assert!(during <= before + 20, "{before} threads before, {during} after");
    assert!(emulator.counter("device_bytes") > 0, "a kernel uses it");
    emulator.release_all();
    drop(stream);
    until("the end of every use", || emulator.counter("device_bytes") == 0).await;
    until("the end of the context", || emulator.counter("contexts") == 0).await;
    assert_eq!(emulator.violations(), [""; 0]);
}

/// A host function of the user that is slow delays every notice; the ends are still seen.
#[tokio::test]
async fn a_slow_host_function_of_the_user_delays_ends_by_a_watchdog_only() {
    unsafe extern "C" fn slow(_argument: *mut std::ffi::c_void) {
        std::thread::sleep(Duration::from_secs(5));
    }
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let theirs = stream();
    let stream = stream();
    let handle = vmem.put(bytes(5), HOST).await.unwrap();
    let nothing = std::ptr::null_mut();
    let theirs_at = theirs.cu_stream();
    // SAFETY: the function uses no argument.
    unsafe {
        vmem::gpu::cudarc::driver::result::stream::launch_host_function(theirs_at, slow, nothing)
    }
    .unwrap();
    until("the host function", || emulator.counter("host_functions") > 0).await;
    let begun = Instant::now();
    for round in 0..3 {
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        // SAFETY: used by the kernel below, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        lease.finish().await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(5), round + 1));
    }
    let took = begun.elapsed();
    theirs.synchronize().unwrap();
    assert!(took < begun.elapsed(), "{took:?}: nothing waited for the host function");
    end(vmem, vec![handle], &emulator).await;
}

/// A device that fails for good is still noticed, and frees what it had.
#[tokio::test]
async fn an_error_that_sticks_ends_the_tier() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(6), HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    emulator.sticky(700);
    drop(lease);
    until("the loss", || {
        vmem.promote(&handle, VRAM).now_or_never().is_some_and(|promoted| promoted.is_err())
    })
    .await;
    assert!(vmem.read(&handle).await.unwrap() == bytes(6));
    drop(handle);
    tokio::time::timeout(HANGS, vmem.close()).await.unwrap().unwrap();
    emulator.sticky(0);
}

/// Mechanism: there was no way out of a mutable lease but a new version. Effect: a step that was
/// given up, or a panic half way, published half of a change. Fix: a lease is abandoned, by name or
/// by a panic; the previous version stays, and the range is not reused before the kernel has ended.
#[tokio::test]
async fn an_abandoned_change_leaves_the_version_before() {
    let emulator = Emulator::load().unwrap();
    // Space for one object.
    let vmem = open(512 * 300).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    emulator.hold(Kind::Kernel);
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    launch("vmem_add", at, LEN as u64, 9, &stream);
    lease.abandon();
    // Only requests for its memory wait for the kernel.
    let read = tokio::time::timeout(HANGS, vmem.read(&handle)).await.expect("it waits");
    assert!(read.unwrap() == bytes(1));
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let mut promote = Box::pin(vmem.promote(&other, VRAM));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut promote).await;
    assert!(early.is_err(), "{early:?}: it took what a kernel writes to");
    emulator.release_all();
    promote.await.unwrap();
    vmem.demote(&other, HOST).await.unwrap();

    let panicked = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handle.clone();
        let stream = stream.clone();
        async move {
            let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel below, on the stream of the lease.
            launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 9, &stream);
            panic!("half way");
        }
    });
    assert!(panicked.await.unwrap_err().is_panic());
    let set = vmem.device_set(&stream).write(&handle);
    let panicked = tokio::spawn(async move {
        let set = set.acquire().await.unwrap();
        assert!(set.write.is_empty(), "half way");
    });
    assert!(panicked.await.unwrap_err().is_panic());
    assert!(vmem.read(&handle).await.unwrap() == bytes(1), "half of a change");
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 9, &stream);
    lease.finish().await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(1), 9));
    end(vmem, vec![handle, other], &emulator).await;
}
