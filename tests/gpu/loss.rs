//! One of two emulated GPUs is lost.
//!
//! Excluded: an object of the other device, or a call over it, that suffers; an older version of
//! what the lost one alone had, without an error before it; and host memory that stays known to the
//! driver by a registration of the lost device, so that the other one copies pages that are gone.

use std::time::Duration;

use futures::FutureExt;
use rand::Rng;
use vmem::gpu::cudarc::driver::DevicePtr;
use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_testkit::Seed;

use crate::devices::{add, found, open, second_tier, streams};
use crate::support::{DISK, HANGS, HOST, LEN, VRAM, bytes, launch, plus, until};

const LAUNCH_FAILED: i32 = 719;

/// Whether an error says that a version went with its device.
fn is_loss(error: &VirtualMemoryError) -> bool {
    matches!(
        error,
        VirtualMemoryError::Device { .. }
            | VirtualMemoryError::TierNotAvailable { .. }
            | VirtualMemoryError::NotFlushed { .. }
    )
}

#[tokio::test]
async fn a_lost_device_leaves_objects_leases_and_gathers_of_the_other() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(&emulator, 16 << 20, WriteBack::OnEvict).await;
    let [first, second] = streams();
    let kept = vmem.put(bytes(1), HOST).await.unwrap();
    let deep = vmem.put(bytes(2), HOST).await.unwrap();
    let lost = vmem.put_named("lost", bytes(3), HOST).await.unwrap();
    let there = vmem.put(bytes(4), HOST).await.unwrap();
    let dirty = vmem.put(bytes(5), HOST).await.unwrap();
    vmem.promote(&kept, VRAM).await.unwrap();
    vmem.promote(&deep, VRAM).await.unwrap();
    vmem.demote(&deep, DISK).await.unwrap();
    vmem.promote(&there, second_tier()).await.unwrap();
    add(&vmem, &lost, 9, &first).await;
    add(&vmem, &dirty, 5, &second).await;

    // Leases of the other device live meanwhile, and a gather into it is under way.
    let reading = vmem.device_on(&there, &second).await.unwrap();
    let writing = vmem.device_mut_on(&dirty, &second).await.unwrap();
    let mut buffer = second.alloc_zeros::<u8>(3 * LEN).unwrap();
    second.synchronize().unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    emulator.hold(Kind::Up);
    let pieces = [(&kept, 0..LEN, 0), (&deep, 0..LEN, LEN), (&there, 0..LEN, 2 * LEN)];
    let mut gather = Box::pin(vmem.gather(&pieces, &target));
    assert!((&mut gather).now_or_never().is_none());
    emulator.sticky_on(0, LAUNCH_FAILED);
    // The calls below are made on a thread whose context is the lost one.
    first.context().bind_to_thread().unwrap();
    emulator.release_all();
    tokio::time::timeout(HANGS, gather).await.expect("the gather goes on").unwrap();
    drop(target);
    let got = second.clone_dtoh(&buffer).unwrap();
    for (got, expected) in got.chunks(LEN).zip([bytes(1), bytes(2), bytes(4)]) {
        assert!(got == expected);
    }
    first.context().bind_to_thread().unwrap();
    drop(reading);
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { writing.device_ptr() }, LEN as u64, 1, &second);
    first.context().bind_to_thread().unwrap();
    tokio::time::timeout(HANGS, writing.finish()).await.expect("the lease ends").unwrap();

    // What the lost device alone had is an error wherever it is asked for; the rest is as it was.
    let whole = [(&lost, 0..LEN, 0)];
    let target = DeviceTarget::from_slice(&mut buffer);
    for round in 0..2 {
        let refused = [
            vmem.read(&lost).await.map(drop).unwrap_err(),
            vmem.device_on(&lost, &second).await.map(drop).unwrap_err(),
            vmem.device_set(&second)
                .read(&there)
                .write(&lost)
                .acquire()
                .await
                .map(drop)
                .unwrap_err(),
            vmem.gather(&whole, &target).await.unwrap_err(),
            vmem.promote(&kept, VRAM).await.unwrap_err(),
            vmem.device_on(&kept, &first).await.map(drop).unwrap_err(),
        ];
        for (nth, error) in refused.iter().enumerate() {
            assert!(is_loss(error), "round {round}, {nth}: {error:?}");
        }
    }
    drop(target);
    let expected = [bytes(1), bytes(2), bytes(4), plus(&bytes(5), 6)];
    for (handle, expected) in [&kept, &deep, &there, &dirty].into_iter().zip(&expected) {
        assert!(
            found(&vmem, handle, &second).await == *expected,
            "by a kernel of the other device"
        );
        assert!(vmem.read(handle).await.unwrap() == *expected, "by a reader");
        assert!(!vmem.residency(handle).unwrap().is_in(VRAM));
    }
    vmem.revert(&lost).await.unwrap();
    add(&vmem, &lost, 2, &second).await;
    assert!(vmem.read(&lost).await.unwrap() == plus(&bytes(3), 2), "the version before, changed");

    // Back from the buffer, too.
    launch("vmem_fill", buffer.device_ptr(&second).0, LEN as u64, 77, &second);
    let target = DeviceTarget::from_slice(&mut buffer);
    vmem.scatter(&target, &[(0, &kept, 0..LEN), (LEN, &there, 0..LEN)]).await.unwrap();
    assert!(vmem.read(&kept).await.unwrap() == [77; LEN][..]);
    assert!(vmem.read(&there).await.unwrap() == bytes(2));
    drop(target);
    drop((buffer, kept, deep, lost, there, dirty));
    drop((first, second));
    tokio::time::timeout(HANGS, vmem.close()).await.expect("the close ends").unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
    emulator.sticky(0);
}

/// Both have kernels, copies and waiters under way when one is lost.
#[tokio::test]
async fn a_device_lost_under_kernels_and_copies_ends_its_own_calls_alone() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(&emulator, 16 << 20, WriteBack::Eager).await;
    let streams = streams();
    let mut handles = Vec::new();
    for seed in 0..8 {
        handles.push(vmem.put(bytes(seed), HOST).await.unwrap());
    }
    let [theirs, ours] = [&handles[..4], &handles[4..]];
    emulator.hold(Kind::Kernel);
    let mut ends = Vec::new();
    for (device, handle) in [(0, &theirs[0]), (1, &ours[0])] {
        let stream = &streams[device];
        let lease = vmem.device_mut_on(handle, stream).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 3, stream);
        ends.push(tokio::spawn(lease.finish()));
    }
    emulator.hold(Kind::Up);
    let promote = |handle: &VMemHandle, tier| {
        let vmem = vmem.clone();
        let handle = handle.clone();
        tokio::spawn(async move { vmem.promote(&handle, tier).await })
    };
    let mut moves: Vec<_> = theirs[1..].iter().map(|handle| promote(handle, VRAM)).collect();
    moves.extend(ours[1..].iter().map(|handle| promote(handle, second_tier())));
    until("the copies", || emulator.counter("in_flight") >= 4).await;
    emulator.sticky_on(0, LAUNCH_FAILED);
    for (nth, moved) in moves.drain(..3).enumerate() {
        let moved = tokio::time::timeout(HANGS, moved).await.expect("it hangs").unwrap();
        assert!(is_loss(&moved.unwrap_err()), "{nth}");
    }
    let ended = tokio::time::timeout(HANGS, ends.remove(0)).await.expect("it hangs").unwrap();
    assert!(is_loss(&ended.unwrap_err()));
    assert!(moves.iter().all(|moved| !moved.is_finished()), "the other device stands still");
    assert!(!ends[0].is_finished());
    emulator.release_all();
    for moved in moves {
        tokio::time::timeout(HANGS, moved).await.expect("it hangs").unwrap().unwrap();
    }
    ends.remove(0).await.unwrap().unwrap();
    for (seed, handle) in handles.iter().enumerate() {
        let changed = if seed == 4 { 3 } else { 0 };
        assert!(vmem.read(handle).await.unwrap() == plus(&bytes(seed as u8), changed), "{seed}");
    }
    handles.clear();
    tokio::time::timeout(HANGS, vmem.close()).await.expect("the close ends").unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
    emulator.sticky(0);
}

/// What registers host memory with a device.
const REGISTER: &str = "cuMemHostRegister_v2";

/// Mechanism: host memory that both devices reach was registered by one of them, and was taken for
/// unregistered once that was lost. Effect: its pages were given back under the registration, and
/// the other device copied those instead of the bytes that were at their addresses. Fix: a device
/// that lives unregisters it, also where neither could register staging.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_memory_is_unregistered_after_the_loss_of_the_device_that_registered_it() {
    for refused in [0, 2] {
        let emulator = Emulator::load().unwrap();
        emulator.refuse(REGISTER, refused);
        let vmem = open(&emulator, 4 << 20, WriteBack::Eager).await;
        emulator.refuse(REGISTER, 0);
        let reason = vmem.capabilities().vram_reason.to_string();
        assert_eq!(reason.is_empty(), refused == 0, "{reason}");
        change_host_memory_beside_a_loss(vmem, &emulator).await;
        until("the end of what was registered", || emulator.counter("registrations") == 0).await;
        assert_eq!(emulator.violations(), [""; 0]);
        emulator.sticky(0);
    }
}

/// Objects of random lengths come, go and are found on both devices, until one is lost, and then on
/// the other one. Closes the store.
async fn change_host_memory_beside_a_loss(vmem: VirtualMemory, emulator: &Emulator) {
    const KIB: usize = 1024;
    fn content(seed: usize, len: usize) -> Vec<u8> {
        (0..len).map(|at| ((at >> 3) as u8).wrapping_mul(seed as u8 | 1) ^ 0x35).collect()
    }
    let [first, second] = streams();
    let seed = Seed::from_env_or(|| 5);
    let _guard = seed.guard("host_memory_is_unregistered_after_the_loss");
    let mut rng = seed.rng();
    let mut live: Vec<(VMemHandle, usize)> = Vec::new();
    let mut unregistered = 0;
    for step in 0..400 {
        if step == 150 {
            emulator.sticky_on(0, LAUNCH_FAILED);
            let any = &live[0].0;
            until("the loss", || {
                vmem.promote(any, VRAM).now_or_never().is_some_and(|promoted| promoted.is_err())
            })
            .await;
            unregistered = emulator.calls("cuMemHostUnregister");
        }
        let used: usize = live.iter().map(|(handle, _)| handle.len()).sum();
        let len = rng.random_range(32 * KIB..700 * KIB);
        if used + len < 3 << 20 && rng.random_bool(0.6) {
            live.push((vmem.put(content(step, len), HOST).await.unwrap(), step));
            continue;
        }
        if live.is_empty() {
            continue;
        }
        let at = rng.random_range(0..live.len());
        let (handle, seed) = &live[at];
        if step < 150 && rng.random_bool(0.7) {
            assert!(found(&vmem, handle, &first).await == content(*seed, handle.len()));
        }
        let there = found(&vmem, handle, &second).await;
        assert!(there == content(*seed, handle.len()), "step {step}: on the other device");
        vmem.demote(handle, HOST).await.unwrap();
        if rng.random_bool(0.5) {
            vmem.free(live.swap_remove(at).0).await.unwrap();
        }
    }
    let again = emulator.calls("cuMemHostUnregister") - unregistered;
    assert!(again > 5, "{again} slabs were unregistered after the loss");
    live.clear();
    drop((first, second));
    vmem.close().await.unwrap();
}

/// Objects all of whose bytes both devices reach directly.
async fn registered(vmem: &VirtualMemory) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for seed in 0..30 {
        handles.push(vmem.put(bytes(seed), HOST).await.unwrap());
    }
    let registered = async {
        while vmem.stats().registered_bytes < 20 * LEN as u64 {
            for handle in &handles {
                vmem.promote(handle, VRAM).await.unwrap();
                vmem.demote(handle, HOST).await.unwrap();
            }
        }
    };
    tokio::time::timeout(HANGS, registered).await.expect("host memory is registered");
    handles
}

/// Mechanism: the first device that was closed unregistered host memory for all. Effect: it was
/// unregistered under a copy of the other one. Fix: the last device does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_closes_leaves_host_memory_to_the_copies_of_the_other() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(&emulator, 16 << 20, WriteBack::Eager).await;
    assert_eq!(vmem.capabilities().vram_reason.to_string(), "", "staging is known to both");
    let [_first, second] = streams();
    // Slabs are registered that are in use as a whole.
    let handles = registered(&vmem).await;
    let mut buffer = second.alloc_zeros::<u8>(LEN).unwrap();
    second.synchronize().unwrap();
    emulator.hold(Kind::Up);
    {
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = [(&handles[10], 0..LEN, 0)];
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        until("the copy", || emulator.counter("queued_up") > 0).await;
    }
    drop(handles);
    let closing = tokio::spawn(vmem.close());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!closing.is_finished(), "a copy is under way");
    emulator.release_all();
    tokio::time::timeout(HANGS, closing).await.expect("the close ends").unwrap().unwrap();
    assert!(second.clone_dtoh(&buffer).unwrap() == bytes(10));
    until("the end of what was registered", || emulator.counter("registrations") == 0).await;
    assert_eq!(emulator.violations(), [""; 0]);
}

/// Mechanism: a device whose context was dead, which nobody had noticed, counted as one that would
/// unregister host memory. Effect: nobody did, and it was unmapped while the driver knew it. Fix:
/// it is unregistered in a context that works, whichever of the devices goes last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_memory_is_unregistered_where_nobody_noticed_the_loss_of_a_device() {
    for lost in [0, 1] {
        let emulator = Emulator::load().unwrap();
        let vmem = open(&emulator, 16 << 20, WriteBack::Eager).await;
        let [first, second] = streams();
        let handles = registered(&vmem).await;
        assert!(emulator.counter("registrations") > 1);
        emulator.sticky_on(lost, LAUNCH_FAILED);
        drop(handles);
        tokio::time::timeout(HANGS, vmem.close()).await.expect("the close ends").unwrap();
        until("the end of both", || emulator.counter("registrations") == 0).await;
        assert_eq!(emulator.violations(), [""; 0]);
        drop((first, second));
        emulator.sticky(0);
    }
}
