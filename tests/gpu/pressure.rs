//! Requests for device memory that is full, in pieces, or held, on the emulated driver.
//!
//! Excluded: an eviction of far more than was asked for, a small request that stands behind a large
//! one until its deadline, and holds that are counted twice, not at all, or against the caller.
//! Noticed by counters.

use std::time::Duration;

use futures::FutureExt;
use vmem::gpu::VramExt;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HANGS, HOST, VRAM, end, launch, stream, until};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

pub(crate) async fn open(vram: usize, max_pinned: f64, wait_timeout: Duration) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(32 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(vram as u64)
        .max_pinned(max_pinned)
        .wait_timeout(wait_timeout);
    vmem::open(config.build().unwrap()).await.unwrap()
}

pub(crate) async fn put(vmem: &VirtualMemory, count: usize, len: usize) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for n in 0..count {
        handles.push(vmem.put(vec![n as u8; len], HOST).await.unwrap());
    }
    handles
}

/// Where memory is one block.
#[tokio::test]
async fn objects_move_out_of_the_way_of_a_large_one() {
    const SMALL: usize = 16 * KIB;
    const LARGE: usize = 256 * KIB;
    let emulator = Emulator::load().unwrap();
    emulator.paged(false);
    let vmem = open(MIB, 0.8, HANGS).await;
    let mut handles = put(&vmem, MIB / SMALL, SMALL).await;
    for handle in &handles {
        vmem.promote(handle, VRAM).await.unwrap();
    }
    for handle in handles.iter().skip(1).step_by(2) {
        vmem.demote(handle, HOST).await.unwrap();
    }
    let large = vmem.put(vec![99; LARGE], HOST).await.unwrap();
    let evictions = vmem.stats().evictions;
    let up = emulator.counter("bytes_up");
    vmem.promote(&large, VRAM).await.unwrap();
    let stats = vmem.stats();
    assert_eq!(stats.evictions, evictions, "there is space for all");
    assert!((1..=LARGE as u64).contains(&stats.relocated_bytes), "{}", stats.relocated_bytes);
    assert_eq!(emulator.counter("bytes_up"), up + LARGE as u64, "moves are within the device");
    let stream = stream();
    for (n, handle) in handles.iter().enumerate().step_by(2) {
        let lease = vmem.device_on(handle, &stream).await.unwrap();
        assert!(stream.clone_dtoh(&lease.view()).unwrap() == vec![n as u8; SMALL], "object {n}");
    }
    assert_eq!(emulator.counter("bytes_up"), up + LARGE as u64, "all are there");
    handles.push(large);
    end(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn a_large_promotion_among_small_objects_evicts_at_most_twice_what_it_needs() {
    const SMALL: usize = 16 * KIB;
    let emulator = Emulator::load().unwrap();
    for need in [256 * KIB, MIB, 4 * MIB] {
        let vmem = open(8 * MIB, 0.8, HANGS).await;
        let mut handles = put(&vmem, 8 * MIB / SMALL, SMALL).await;
        // The order of the last use has nothing to do with where they lie.
        for step in [1, 37] {
            for n in 0..handles.len() {
                vmem.promote(&handles[n * step % handles.len()], VRAM).await.unwrap();
            }
        }
        assert_eq!(vmem.stats().vram.used_bytes, 8 * MIB as u64, "it is full");
        let large = vmem.put(vec![9; need], HOST).await.unwrap();
        let before = vmem.stats().evictions;
        vmem.promote(&large, VRAM).await.unwrap();
        let evicted = (vmem.stats().evictions - before) as usize * SMALL;
        assert!(evicted <= 2 * need, "{need} bytes: {evicted} evicted");
        handles.push(large);
        end(vmem, handles, &emulator).await;
    }
}

/// A lease keeps the space that the large one waits for.
#[tokio::test]
async fn a_small_promotion_is_served_beside_a_large_one_that_waits() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 * MIB, 1.0, Duration::from_secs(60)).await;
    let stream = stream();
    let leased = put(&vmem, 1, MIB).await.remove(0);
    let large = put(&vmem, 1, 3 * MIB + 512 * KIB).await.remove(0);
    let small = put(&vmem, 20, 64 * KIB).await;
    let lease = vmem.device_on(&leased, &stream).await.unwrap();
    let mut waiting = Box::pin(vmem.promote(&large, VRAM));
    assert!((&mut waiting).now_or_never().is_none());
    until("the large one waits", || vmem.stats().waiters > 0).await;
    for handle in &small {
        let served = tokio::time::timeout(HANGS, vmem.promote(handle, VRAM)).await;
        served.expect("it stands behind the large one").unwrap();
    }
    assert!((&mut waiting).now_or_never().is_none(), "a lease has its space");
    drop(lease);
    waiting.await.unwrap();
    let handles = small.into_iter().chain([leased, large]).collect();
    end(vmem, handles, &emulator).await;
}

/// As many as are tried at once, whatever their bytes.
#[tokio::test]
async fn prefetches_without_space_delay_no_others() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 * MIB, 1.0, Duration::from_secs(60)).await;
    let stream = stream();
    let leased = put(&vmem, 2, MIB).await;
    let large = put(&vmem, 4, 2 * MIB + 512 * KIB).await;
    let small = put(&vmem, 20, 64 * KIB).await;
    let mut leases = Vec::new();
    for handle in &leased {
        leases.push(vmem.device_on(handle, &stream).await.unwrap());
    }
    let mut stuck: Vec<_> = large.iter().map(|handle| vmem.prefetch(handle, VRAM)).collect();
    until("they wait", || vmem.stats().waiters >= 4).await;
    // A call of their own each, and one for all.
    for handle in &small[..10] {
        let served = tokio::time::timeout(HANGS, vmem.prefetch(handle, VRAM)).await;
        served.expect("it stands behind the large ones").unwrap();
    }
    let served = tokio::time::timeout(HANGS, vmem.prefetch_many(&small[10..], VRAM)).await;
    served.expect("they stand behind the large ones").unwrap();
    assert!(small.iter().all(|handle| vmem.residency(handle).unwrap().vram));
    for stuck in &mut stuck {
        assert!(stuck.now_or_never().is_none(), "leases have its space");
    }
    drop(leases);
    drop(stuck);
    vmem.promote(&large[0], VRAM).await.unwrap();
    let handles = small.into_iter().chain(leased).chain(large).collect();
    end(vmem, handles, &emulator).await;
}

/// What a pin keeps counts once, and not again for a lease.
#[tokio::test]
async fn a_pinned_object_of_all_that_may_be_held_can_be_changed_and_stays() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(MIB, 0.5, HANGS).await;
    let stream = stream();
    let handle = put(&vmem, 1, 512 * KIB).await.remove(0);
    let pin = vmem.pin(&handle, VRAM).await.unwrap();
    let is_there = || vmem.residency(&handle).unwrap().vram;
    for round in 0..3 {
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        match round {
            // Nobody has used it.
            0 => drop(lease),
            1 => {
                // SAFETY: used by the kernel, on the stream of the lease.
                let at = unsafe { lease.device_ptr() };
                launch("vmem_add", at, 512 * KIB as u64, 1, &stream);
                lease.abandon();
            }
            _ => {
                // SAFETY: used by the kernel, on the stream of the lease.
                let at = unsafe { lease.device_ptr() };
                launch("vmem_add", at, 512 * KIB as u64, 7, &stream);
                lease.finish().await.unwrap();
            }
        }
        until("what is pinned", is_there).await;
        let expected = if round < 2 { 0 } else { 7 };
        assert!(vmem.read(&handle).await.unwrap().iter().all(|&byte| byte == expected));
    }
    drop(pin);
    end(vmem, vec![handle], &emulator).await;
}

#[tokio::test]
async fn leases_of_old_versions_count_and_the_error_names_what_holds() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(MIB, 0.5, Duration::from_secs(2)).await;
    let stream = stream();
    let handles = put(&vmem, 2, 400 * KIB).await;
    let lease = vmem.device_on(&handles[0], &stream).await.unwrap();
    for is_written in [false, true] {
        if is_written {
            vmem.write(&handles[0], vec![5; 400 * KIB]).await.unwrap();
        }
        let refused = vmem.pin(&handles[1], VRAM).await.map(drop);
        let Err(VirtualMemoryError::AllPinned { leased_bytes, pinned_bytes, .. }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!((leased_bytes, pinned_bytes), (400 << 10, 0), "not what was asked for");
    }
    drop(lease);
    let pin = vmem.pin(&handles[1], VRAM).await.unwrap();
    drop(pin);
    end(vmem, handles, &emulator).await;
}

/// The link is busy with objects that no caller waits for, many more than it takes at a time.
#[tokio::test]
async fn a_lease_passes_prefetches_that_wait_for_the_link() {
    const PREFETCHED: usize = 30;
    let emulator = Emulator::load().unwrap();
    // A prefetch has no more bytes in flight at once than staging has.
    let config = VirtualMemoryConfig::builder()
        .host_capacity(96 << 20)
        .staging_capacity(32 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(64 << 20)
        .wait_timeout(HANGS);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let stream = stream();
    let mut handles = put(&vmem, PREFETCHED, MIB - 4 * KIB).await;
    let wanted = put(&vmem, 1, MIB).await.remove(0);
    emulator.hold(Kind::Up);
    vmem.prefetch_many(&handles, VRAM).detach();
    let all = ((PREFETCHED * (MIB - 4 * KIB)) >> 20) as u64;
    until("each has its space", || vmem.stats().vram.used_bytes >> 20 >= all).await;
    let mut lease = Box::pin(vmem.device_on(&wanted, &stream));
    assert!((&mut lease).now_or_never().is_none(), "its copy is held");
    until("it has its space", || vmem.stats().vram.used_bytes >> 20 > all).await;
    // Its task hands it to the link.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let resident = || {
        let on_device = |handle: &&VMemHandle| vmem.residency(handle).unwrap().vram;
        handles.iter().filter(on_device).count()
    };
    while (&mut lease).now_or_never().is_none() {
        let before = resident();
        assert!(before <= 16, "two batches of 8 MiB at most are before it: {before}");
        emulator.release(Kind::Up, 1);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before = resident();
    assert!(before <= 17, "{before} of {PREFETCHED} came before it");
    drop(lease);
    emulator.release_all();
    until("the others come", || resident() == PREFETCHED).await;
    handles.push(wanted);
    end(vmem, handles, &emulator).await;
}
