//! Leases and sets of leases that are left alone, and what they cost, on the emulated driver.
//!
//! Invariant: a future that is polled once and never again delays only itself.

use std::time::Duration;

use futures::FutureExt;
use vmem::VirtualMemoryError;
use vmem::gpu::VramExt;
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    HANGS, HOST, LEN, VRAM, bytes, end, launch, open, open_within, plus, stream, until,
};

/// Mechanism: the turn of a set, and the leases it had so far, were held by the caller's future.
/// Effect: one that was polled once and left alone stopped all other sets, for ever. Fix: a task of
/// the runtime has the turn; what it gathered for a caller that does not claim it is given back.
#[tokio::test]
async fn a_set_left_alone_delays_no_other_set() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let first = vmem.put(bytes(1), HOST).await.unwrap();
    let second = vmem.put(bytes(2), HOST).await.unwrap();
    let both = || vmem.device_set(&stream).write(&first).write(&second).acquire();
    let mut left = Box::pin(both());
    assert!((&mut left).now_or_never().is_none(), "it has to promote");
    for round in 0..3 {
        let set = tokio::time::timeout(HANGS, both()).await.expect("it is delayed").unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        let at = unsafe { set.write[0].device_ptr() };
        launch("vmem_add", at, LEN as u64, 1, &stream);
        set.finish().await.unwrap();
        assert!(vmem.read(&first).await.unwrap() == plus(&bytes(1), round + 1));
    }
    // It comes after all, later than it was ready.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let set = tokio::time::timeout(HANGS, left).await.expect("it is gathered anew").unwrap();
    assert_eq!(set.write.len(), 2);
    drop(set);
    end(vmem, vec![first, second], &emulator).await;
}

/// Mechanism: the empty objects of a set stood before the others. Effect: a kernel wrote to
/// another object than the one that it was given for. Fix: each has the place it was asked for.
#[tokio::test]
async fn leases_of_a_set_are_in_the_order_asked_for_with_empty_objects_among_them() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for len in [LEN, 0, LEN / 2, 0, LEN / 4] {
        handles.push(vmem.put(vec![0; len], HOST).await.unwrap());
    }
    let set = handles.iter().fold(vmem.device_set(&stream), |set, handle| set.write(handle));
    let set = set.acquire().await.unwrap();
    let lens: Vec<_> = set.write.iter().map(|lease| lease.len()).collect();
    assert_eq!(lens, [LEN, 0, LEN / 2, 0, LEN / 4]);
    set.finish().await.unwrap();
    end(vmem, handles, &emulator).await;
}

/// The same with single leases, which held the gate of their object.
#[tokio::test]
async fn a_lease_left_alone_delays_nobody() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let mut left = Box::pin(vmem.device_mut_on(&handle, &stream));
    assert!((&mut left).now_or_never().is_none(), "it has to promote");
    let mut reading = Box::pin(vmem.device_on(&handle, &stream));
    drop((&mut reading).now_or_never());
    tokio::time::timeout(HANGS, vmem.write(&handle, bytes(2))).await.expect("a delay").unwrap();
    let lease = tokio::time::timeout(HANGS, vmem.device_mut_on(&handle, &stream)).await;
    lease.expect("a delay").unwrap().finish().await.unwrap();
    drop((left, reading));
    end(vmem, vec![handle], &emulator).await;
}

/// A set whose turn does not come says so at the store's deadline.
#[tokio::test]
async fn a_set_that_waits_for_its_turn_has_a_deadline() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_within(4 << 20, Duration::from_millis(700)).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    let sets: Vec<_> = (0..4)
        .map(|_| {
            let set = vmem.device_set(&stream).write(&handle).read(&other).acquire();
            tokio::spawn(tokio::time::timeout(HANGS, set))
        })
        .collect();
    for set in sets {
        let error = set.await.unwrap().expect("it ends").unwrap_err();
        assert!(
            matches!(
                error,
                VirtualMemoryError::TimedOut { .. } | VirtualMemoryError::AllPinned { .. }
            ),
            "{error:?}"
        );
    }
    drop(lease);
    end(vmem, vec![handle, other], &emulator).await;
}

/// Functions of the driver that a lease may reach.
const FUNCTIONS: [&str; 16] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamIsCapturing",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuLaunchHostFunc",
    "cuMemGetInfo_v2",
];

fn calls(emulator: &Emulator) -> u64 {
    FUNCTIONS.iter().map(|name| emulator.calls(name)).sum()
}

/// A lease on a resident object makes few calls of the driver, and a set not many more.
#[tokio::test]
async fn leases_on_resident_objects_make_few_driver_calls() {
    const ROUNDS: u64 = 200;
    const MEMBERS: u64 = 64;
    let emulator = Emulator::load().unwrap();
    let vmem = open(16 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for n in 0..MEMBERS {
        let handle = vmem.put(bytes(n as u8), HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    let before = calls(&emulator);
    for _ in 0..ROUNDS {
        drop(vmem.device_on(&handles[0], &stream).await.unwrap());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let read = (calls(&emulator) - before) as f64 / ROUNDS as f64;
    let before = calls(&emulator);
    for _ in 0..ROUNDS {
        vmem.device_mut_on(&handles[0], &stream).await.unwrap().finish().await.unwrap();
    }
    let changed = (calls(&emulator) - before) as f64 / ROUNDS as f64;
    let before = calls(&emulator);
    let set = handles.iter().fold(vmem.device_set(&stream), |set, handle| set.read(handle));
    drop(set.acquire().await.unwrap());
    tokio::time::sleep(Duration::from_millis(50)).await;
    let set = calls(&emulator) - before;
    println!("driver calls: read {read:.1}, changed {changed:.1}, a set of {MEMBERS} {set}");
    assert!(read <= 10.0, "{read} for a read");
    assert!(changed <= 20.0, "{changed} for a change");
    assert!(set <= 15, "{set} for a set");
    end(vmem, handles, &emulator).await;
}

/// A step of a decoder: a lease and a kernel for each of many blocks, on a thread that launches.
#[tokio::test]
async fn steps_of_2000_leases_make_at_most_4_driver_calls_a_lease() {
    const LEASES: u64 = 2000;
    let emulator = Emulator::load().unwrap();
    let vmem = open(16 << 20).await;
    let stream = stream();
    emulator.queue_max(100_000);
    let counted = || FUNCTIONS.map(|name| emulator.calls(name));
    let mut counts = Vec::new();
    // Kernels that end while others are launched, and that do not: then nobody waits for them, once
    // with new events and once with those.
    for is_held in [false, true, true] {
        let mut handles = Vec::new();
        for n in 0..LEASES / 10 {
            let handle = vmem.put(vec![n as u8; 1000], HOST).await.unwrap();
            vmem.promote(&handle, VRAM).await.unwrap();
            handles.push(handle);
        }
        if is_held {
            emulator.hold(Kind::Kernel);
        }
        let before = counted();
        for nth in 0..LEASES as usize {
            let lease = vmem.device_on(&handles[nth % handles.len()], &stream).await.unwrap();
            // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
            launch("vmem_add", unsafe { lease.device_ptr() }, 1000, 0, &stream);
            drop(lease);
        }
        emulator.release_all();
        drop(handles);
        until("the end of all", || vmem.stats().vram.used_bytes == 0).await;
        let after = counted();
        let mut calls: Vec<(&str, u64)> = Vec::new();
        for (nth, name) in FUNCTIONS.into_iter().enumerate() {
            // The user's own: each launch looks whether its context is the current one.
            let of_user = if name == "cuCtxGetCurrent" { LEASES } else { 0 };
            let made = after[nth] - before[nth] - of_user;
            calls.extend(Some((name, made)).filter(|&(_, made)| made > 0));
        }
        counts.push(calls);
    }
    // A kernel that ends at once has a query of its own, and a notice if that comes too early.
    for ((calls, what), calls_max) in
        counts.iter().zip(["kernels that end", "new events", "pooled events"]).zip([6, 4, 4])
    {
        let all: u64 = calls.iter().map(|&(_, made)| made).sum();
        println!("{LEASES} leases, {what}: {all} driver calls, {calls:?}");
        assert!(all <= calls_max * LEASES, "{what}: {all}");
        let notices = calls.iter().find(|&&(name, _)| name == "cuLaunchHostFunc");
        let notices = notices.map_or(0, |&(_, made)| made);
        assert!(notices <= LEASES, "{what}: {notices}");
        assert!(what != "pooled events" || notices <= LEASES / 10, "{notices}");
    }
    end(vmem, vec![], &emulator).await;
}

#[tokio::test]
async fn leases_behind_kernels_that_run_have_one_notice_a_stream() {
    const LEASES: usize = 2000;
    let emulator = Emulator::load().unwrap();
    let vmem = open(16 << 20).await;
    let streams = [stream(), stream(), stream()];
    emulator.queue_max(100_000);
    let mut handles = Vec::new();
    // A multiple of the streams: each object stays with one of them.
    for n in 0..201 {
        let handle = vmem.put(vec![n as u8; 1000], HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    emulator.hold(Kind::Kernel);
    let before = emulator.calls("cuLaunchHostFunc");
    for nth in 0..LEASES {
        let stream = &streams[nth % streams.len()];
        let lease = vmem.device_on(&handles[nth % handles.len()], stream).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
        launch("vmem_add", unsafe { lease.device_ptr() }, 1000, 0, stream);
    }
    let notices = emulator.calls("cuLaunchHostFunc") - before;
    assert!((1..=streams.len() as u64).contains(&notices), "{notices} for {LEASES} leases");
    emulator.release_all();
    end(vmem, handles, &emulator).await;
}

/// What ends is what has passed, however many of a stream are looked at with one query.
#[tokio::test]
async fn leases_of_a_stream_end_with_their_own_kernels() {
    const LEASES: usize = 6;
    let emulator = Emulator::load().unwrap();
    // All of them are looked at at once.
    emulator.suppress_host_functions(true);
    let vmem = open(4 << 20).await;
    let stream = stream();
    for released in 1..LEASES {
        emulator.hold(Kind::Kernel);
        for n in 0..LEASES {
            let handle = vmem.put(bytes(n as u8), HOST).await.unwrap();
            vmem.promote(&handle, VRAM).await.unwrap();
            let lease = vmem.device_on(&handle, &stream).await.unwrap();
            // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
            launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 0, &stream);
        }
        let each = vmem.stats().vram.used_bytes / LEASES as u64;
        emulator.release(Kind::Kernel, released as u64);
        let left = each * (LEASES - released) as u64;
        until("the end of some", || vmem.stats().vram.used_bytes <= left).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert_eq!(vmem.stats().vram.used_bytes, left, "the other kernels still run");
        emulator.release_all();
        until("the end of all", || vmem.stats().vram.used_bytes == 0).await;
    }
    end(vmem, vec![], &emulator).await;
}

/// Mechanism: each look at a lease whose kernel still ran asked for another notice. Effect: host
/// functions stood behind a slow kernel, one for each tenth of a second. Fix: one is kept until it
/// has come.
#[tokio::test]
async fn notices_of_a_slow_kernel_do_not_pile_up() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    emulator.hold(Kind::Kernel);
    let before = emulator.calls("cuLaunchHostFunc");
    let queries = emulator.calls("cuEventQuery");
    let lease = vmem.device_on(&handle, &stream).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease; it adds nothing.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 0, &stream);
    drop(lease);
    until("many looks", || emulator.calls("cuEventQuery") > queries + 10).await;
    assert_eq!(emulator.calls("cuLaunchHostFunc"), before + 1);
    emulator.release_all();
    vmem.device_mut_on(&handle, &stream).await.unwrap().abandon();
    end(vmem, vec![handle], &emulator).await;
}
