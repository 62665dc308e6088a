//! Scenario 46: device memory that is waited for, used by kernels, in pieces, and scarce.
//!
//! Each clause has a test, over the emulated driver: the last drop of a share wakes the waiter on
//! whatever thread; no range is reused under a kernel; no error that passes ends the tier; eviction
//! among fragments; small requests beside large ones; driver calls linear in leases.

use std::time::Duration;

use futures::FutureExt;
use vmem::gpu::{DeviceTarget, VramExt};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::pressure::{open, put};
use crate::support::{
    DISK, HANGS, HOST, LEN, VRAM, begin_capture, bytes, end, end_capture, launch, open_within,
    plus, stream, until,
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// No waiter is woken by its deadline before a test calls it a hang.
const DEADLINE: Duration = Duration::from_secs(120);
/// Device memory for one object of `LEN` bytes and not for two.
const FOR_ONE: u64 = 512 * 300;

/// How the memory of an object is let go of, while another one waits for it.
#[derive(Clone, Copy, Debug)]
enum LastUse {
    /// A reader that is dropped while its copy down stands still.
    Read,
    /// A gather that is dropped while its copy stands still.
    Gather,
    /// A lease that is dropped on a thread without a runtime, before its kernel ends.
    Lease,
    /// A lease that is dropped there after its kernel has ended.
    LeaseAlone,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_46_last_drop_of_a_share_wakes_the_waiter_on_any_thread() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(FOR_ONE, DEADLINE).await;
    let stream = stream();
    let used = vmem.put(bytes(1), HOST).await.unwrap();
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    for last in [LastUse::Read, LastUse::Gather, LastUse::Lease, LastUse::LeaseAlone] {
        for round in 0..3 {
            vmem.promote(&used, VRAM).await.unwrap();
            let waiting = || {
                let vmem = vmem.clone();
                let other = other.clone();
                tokio::spawn(async move { vmem.promote(&other, VRAM).await })
            };
            let waiter = match last {
                LastUse::Read => {
                    // Host memory has it too, but a copy down is made for a kernel's version.
                    let lease = vmem.device_mut_on(&used, &stream).await.unwrap();
                    // SAFETY: never followed. A lease that nobody has used would be given up.
                    let _ = unsafe { lease.device_ptr() };
                    emulator.hold(Kind::Down);
                    drop(lease.finish());
                    until("the copy down", || emulator.counter("in_flight") > 0).await;
                    let waiter = waiting();
                    let mut read = Box::pin(vmem.read(&used));
                    drop((&mut read).now_or_never());
                    drop(read);
                    waiter
                }
                LastUse::Gather => {
                    emulator.hold(Kind::Within);
                    let target = DeviceTarget::from_slice(&mut buffer);
                    let pieces = [(&used, 0..LEN, 0)];
                    let mut gather = Box::pin(vmem.gather(&pieces, &target));
                    assert!((&mut gather).now_or_never().is_none());
                    until("the copy", || emulator.counter("queued_within") > 0).await;
                    drop(gather);
                    waiting()
                }
                LastUse::Lease => {
                    let lease = vmem.device_on(&used, &stream).await.unwrap();
                    emulator.hold(Kind::Kernel);
                    // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
                    let at = unsafe { lease.device_ptr() };
                    launch("vmem_add", at, LEN as u64, 0, &stream);
                    std::thread::spawn(move || drop(lease)).join().unwrap();
                    waiting()
                }
                LastUse::LeaseAlone => {
                    let lease = vmem.device_on(&used, &stream).await.unwrap();
                    let waiter = waiting();
                    until("the waiter", || vmem.stats().waiters > 0).await;
                    std::thread::spawn(move || drop(lease)).join().unwrap();
                    waiter
                }
            };
            if !matches!(last, LastUse::LeaseAlone) {
                until("the waiter", || vmem.stats().waiters > 0).await;
                assert!(!waiter.is_finished(), "{last:?}, round {round}: the memory is in use");
            }
            emulator.release_all();
            let woken = tokio::time::timeout(HANGS, waiter).await;
            woken
                .unwrap_or_else(|_| panic!("{last:?}, round {round}: not woken"))
                .unwrap()
                .unwrap();
            vmem.demote(&other, HOST).await.unwrap();
        }
    }
    drop(buffer);
    end(vmem, vec![used, other], &emulator).await;
}

/// How a lease ends while its kernel runs.
#[derive(Clone, Copy, Debug)]
enum End {
    Drop,
    Finish,
    Abandon,
    Panic,
    InCapture,
    InBrokenCapture,
    /// The object is freed too.
    Free,
    /// An event cannot be had, for an error that passes.
    Refused,
}

#[tokio::test]
async fn scenario_46_no_range_is_reused_under_a_running_kernel() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(FOR_ONE, DEADLINE).await;
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let ends = [
        End::Drop,
        End::Finish,
        End::Abandon,
        End::Panic,
        End::InCapture,
        End::InBrokenCapture,
        End::Free,
        End::Refused,
    ];
    for end in ends {
        // One that has been in a capture is done with.
        let stream = stream();
        let handle = vmem.put(bytes(1), HOST).await.unwrap();
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        emulator.hold(Kind::Kernel);
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        let mut is_changed = true;
        match end {
            End::Drop => drop(lease),
            End::Finish => drop(lease.finish()),
            End::Abandon => {
                lease.abandon();
                is_changed = false;
            }
            End::Panic => {
                let panicked = std::thread::spawn(move || {
                    let _lease = lease;
                    panic!("half way");
                });
                panicked.join().unwrap_err();
                is_changed = false;
            }
            End::InCapture | End::InBrokenCapture => {
                begin_capture(&stream);
                if matches!(end, End::InBrokenCapture) {
                    emulator.invalidate_captures();
                }
                drop(lease);
            }
            End::Free => {
                drop(lease);
                vmem.free(handle.clone()).await.unwrap();
            }
            End::Refused => {
                emulator.refuse("cuEventRecord", 999);
                drop(lease);
            }
        }
        let mut promote = Box::pin(vmem.promote(&other, VRAM));
        let early = tokio::time::timeout(Duration::from_millis(250), &mut promote).await;
        assert!(early.is_err(), "{end:?}: {early:?}: it took what a kernel uses");
        emulator.refuse("cuEventRecord", 0);
        match end {
            End::InCapture => assert_eq!(end_capture(&stream), 0),
            End::InBrokenCapture => assert_eq!(end_capture(&stream), 901),
            _ => {}
        }
        let early = tokio::time::timeout(Duration::from_millis(250), &mut promote).await;
        assert!(early.is_err(), "{end:?}: {early:?}: it took what a kernel uses");
        emulator.release_all();
        let promoted = tokio::time::timeout(HANGS, promote).await;
        promoted.unwrap_or_else(|_| panic!("{end:?}: not woken")).unwrap();
        vmem.demote(&other, HOST).await.unwrap();
        if !matches!(end, End::Free) {
            let expected = plus(&bytes(1), u8::from(is_changed));
            assert!(vmem.read(&handle).await.unwrap() == expected, "{end:?}");
        }
        assert_eq!(emulator.violations(), [""; 0], "{end:?}");
    }
    end(vmem, vec![other], &emulator).await;
}

#[tokio::test]
async fn scenario_46_no_passing_error_ends_the_tier() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(4 << 20, DEADLINE).await;
    let stream = stream();
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    let other = vmem.put(bytes(8), HOST).await.unwrap();
    vmem.promote(&other, VRAM).await.unwrap();
    // Each refused for a while: out of memory, an isolated capture, a captured event, unknown.
    let functions = [
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuStreamWaitEvent",
        "cuLaunchHostFunc",
        "cuStreamIsCapturing",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemcpyBatchAsync",
        "cuLaunchKernel",
        "cuMemHostRegister_v2",
        "cuMemGetInfo_v2",
    ];
    for function in functions {
        for code in [2, 905, 907, 999] {
            let handle = vmem.put(bytes(7), HOST).await.unwrap();
            let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel, on the stream of the lease.
            launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
            let before = emulator.calls(function);
            if function == "cuEventCreate" {
                emulator.hold(Kind::Kernel);
                // SAFETY: as above; it adds nothing.
                launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 0, &stream);
            }
            emulator.refuse(function, code);
            // Behind a kernel that stands all events that there are come into use.
            while function == "cuEventCreate" && emulator.calls(function) == before {
                drop(vmem.device_on(&other, &stream).await.unwrap());
            }
            drop(lease);
            let target = DeviceTarget::from_slice(&mut buffer);
            let pieces = [(&handle, 0..LEN, 0)];
            let calls = async {
                // Each ends, well or with what the driver said.
                let _ = vmem.promote(&handle, VRAM).await;
                let _ = vmem.gather(&pieces, &target).await;
                let _ = vmem.read(&handle).await;
            };
            let allow = async {
                tokio::time::sleep(Duration::from_millis(15)).await;
                emulator.refuse(function, 0);
                emulator.release_all();
            };
            let both = async { futures::join!(calls, allow) };
            tokio::time::timeout(HANGS, both).await.expect("it ends");
            let what = format!("{function} {code}");
            let read = tokio::time::timeout(HANGS, vmem.read(&handle)).await.expect(&what);
            assert!(read.expect(&what) == plus(&bytes(7), 1), "{what}");
            let leased = tokio::time::timeout(HANGS, vmem.device_on(&handle, &stream)).await;
            drop(leased.expect(&what).expect(&what));
            vmem.gather(&pieces, &target).await.expect(&what);
            drop(target);
            // What the driver refused to the user's own objects is the user's to see.
            let _ = stream.context().check_err();
            assert!(stream.clone_dtoh(&buffer).unwrap() == plus(&bytes(7), 1), "{what}");
        }
    }
    drop(buffer);
    end(vmem, vec![other], &emulator).await;
}

/// A tier full of small objects in no order, some of which are pinned or leased where they lie.
#[tokio::test]
async fn scenario_46_eviction_among_fragments_is_at_most_eight_times_the_need() {
    const SMALL: usize = 16 * KIB;
    const VRAM_BYTES: usize = 16 * MIB;
    let emulator = Emulator::load().unwrap();
    for need in [64 * KIB, 256 * KIB, MIB] {
        let vmem = open(VRAM_BYTES, 1.0, DEADLINE).await;
        let stream = stream();
        let mut handles = put(&vmem, VRAM_BYTES / SMALL, SMALL).await;
        for step in [1, 37] {
            for n in 0..handles.len() {
                vmem.promote(&handles[n * step % handles.len()], VRAM).await.unwrap();
            }
        }
        // Islands that stay: one in two MiB, so that runs of a MiB are between them.
        let mut pins = Vec::new();
        let mut leases = Vec::new();
        for n in (0..handles.len()).step_by(2 * MIB / SMALL) {
            pins.push(vmem.pin(&handles[n], VRAM).await.unwrap());
            leases.push(vmem.device_on(&handles[n + 1], &stream).await.unwrap());
        }
        assert_eq!(vmem.stats().vram.used_bytes, VRAM_BYTES as u64, "it is full");
        let large = put(&vmem, 1, need).await.remove(0);
        let before = vmem.stats().evictions;
        tokio::time::timeout(HANGS, vmem.promote(&large, VRAM)).await.expect("it fits").unwrap();
        let evicted = (vmem.stats().evictions - before) as usize * SMALL;
        assert!((need..=8 * need).contains(&evicted), "{need} bytes: {evicted} evicted");
        drop((pins, leases));
        handles.push(large);
        end(vmem, handles, &emulator).await;
    }
}

/// What waits for much does not keep those that need little from what is free, be they on demand or
/// prefetched, from host memory or from disk; and it is served itself in the end.
#[tokio::test]
async fn scenario_46_small_requests_are_served_beside_a_large_one() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 * MIB, 1.0, DEADLINE).await;
    let stream = stream();
    let leased = put(&vmem, 1, MIB).await.remove(0);
    let large = put(&vmem, 1, 3 * MIB + 512 * KIB).await.remove(0);
    let small = put(&vmem, 24, 64 * KIB).await;
    for handle in &small[12..] {
        vmem.demote(handle, DISK).await.unwrap();
    }
    let lease = vmem.device_on(&leased, &stream).await.unwrap();
    let waiting = tokio::spawn({
        let vmem = vmem.clone();
        let large = large.clone();
        async move { vmem.promote(&large, VRAM).await }
    });
    until("the large one waits", || vmem.stats().waiters > 0).await;
    for (n, handle) in small.iter().enumerate() {
        let served = async {
            match n % 3 {
                0 => vmem.promote(handle, VRAM).await,
                1 => vmem.device_on(handle, &stream).await.map(drop),
                _ => vmem.prefetch(handle, VRAM).await,
            }
        };
        let served = tokio::time::timeout(HANGS, served).await;
        served.unwrap_or_else(|_| panic!("{n} stands behind the large one")).unwrap();
        assert!(n % 3 == 2 || vmem.residency(handle).unwrap().vram);
    }
    assert!(!waiting.is_finished(), "a lease has its space");
    drop(lease);
    tokio::time::timeout(HANGS, waiting).await.expect("it is served").unwrap().unwrap();
    let handles = small.into_iter().chain([leased, large]).collect();
    end(vmem, handles, &emulator).await;
}

/// Behind one kernel that stands, with a wake-up of the thread that looks at them for each few.
#[tokio::test]
async fn scenario_46_queries_and_notices_are_linear_in_leases() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(64 << 20, DEADLINE).await;
    let stream = stream();
    let handle = vmem.put(vec![1; 1000], HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    emulator.queue_max(100_000);
    let mut of_a_lease = Vec::new();
    for leases in [250_u64, 500, 1000, 2000] {
        emulator.hold(Kind::Kernel);
        let counted = || ["cuEventQuery", "cuLaunchHostFunc"].map(|name| emulator.calls(name));
        let before = counted();
        for nth in 0..leases {
            let lease = vmem.device_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
            launch("vmem_add", unsafe { lease.device_ptr() }, 1000, 0, &stream);
            drop(lease);
            if nth % 5 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        emulator.release_all();
        // The last lease has ended once a writer is let in.
        vmem.device_mut_on(&handle, &stream).await.unwrap().abandon();
        let after = counted();
        of_a_lease.push([0, 1].map(|nth| (after[nth] - before[nth]) as f64 / leases as f64));
    }
    println!("queries and notices a lease, of 250 to 2,000: {of_a_lease:.2?}");
    for counts in &of_a_lease {
        // It was 32 queries of 250, and 731 of 2,000.
        assert!(counts[0] <= 3.0 && counts[1] <= 1.0, "{of_a_lease:?}");
    }
    end(vmem, vec![handle], &emulator).await;
}
