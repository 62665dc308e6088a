//! Budgets of device memory that change while the store serves, on the emulated driver.
//!
//! Excluded: memory that a budget gave up and the device has not, more evictions than that takes,
//! bytes that are lost or wrong meanwhile, callers of others that wait for a change, and a change
//! that a driver, a pin or a dropped future leaves half done in a way that another cannot mend.

mod random;

use std::time::{Duration, Instant};

use futures::FutureExt;
use vmem::gpu::VramExt;
use vmem::{GpuSelection, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem::{VirtualMemoryConfigBuilder, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HANGS, HOST, VRAM, end_all, launch, stream, until};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// The size of a page, and the device memory of these stores when they open.
const PAGE: u64 = 2 << 20;
const PAGES: u64 = 32;
/// The driver has no memory for that.
const OUT_OF_MEMORY: i32 = 2;

fn config() -> VirtualMemoryConfigBuilder {
    VirtualMemoryConfig::builder()
        .host_capacity(160 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(PAGES * PAGE)
        .max_pinned(1.0)
        .wait_timeout(HANGS)
}

async fn open() -> VirtualMemory {
    vmem::open(config().build().unwrap()).await.unwrap()
}

/// Objects of this length in device memory, which they fill.
async fn fill(vmem: &VirtualMemory, len: usize) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for n in 0..(PAGES * PAGE) as usize / len {
        let handle = vmem.put(vec![n as u8; len], HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    assert_eq!(vmem.stats().vram.used_bytes, PAGES * PAGE, "it is full");
    handles
}

async fn check(vmem: &VirtualMemory, handles: &[VMemHandle]) {
    for (n, handle) in handles.iter().enumerate() {
        assert!(vmem.read(handle).await.unwrap() == vec![n as u8; handle.len()][..], "{n}");
    }
}

#[tokio::test]
async fn budget_that_shrinks_gives_its_memory_to_the_device() {
    const LEN: usize = 16 * KIB;
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let handles = fill(&vmem, LEN).await;
    let wanted = 20 * PAGE;
    let before = vmem.stats().evictions;
    // Rounded down to pages.
    let capacity = vmem.set_vram_capacity(VRAM, wanted + PAGE - 1).await.unwrap();
    let vram = vmem.stats().vram;
    assert_eq!((capacity, vram.capacity_bytes), (wanted, wanted));
    assert_eq!((emulator.counter("created"), emulator.counter("device_bytes")), (20, wanted));
    let evicted = (vmem.stats().evictions - before) * LEN as u64;
    assert!(evicted <= 13 * PAGE, "{evicted} bytes were evicted for {}", 12 * PAGE);
    // The last ones to be used have stayed.
    let resident = |handle: &VMemHandle| vmem.residency(handle).unwrap().vram;
    let late = handles.iter().rev().take(16 * MIB / LEN).filter(|&handle| resident(handle));
    assert_eq!(late.count(), 16 * MIB / LEN);
    check(&vmem, &handles).await;
    // What was free is found again, and no more.
    for handle in &handles {
        vmem.promote(handle, VRAM).await.unwrap();
    }
    assert_eq!(vmem.stats().vram.used_bytes, wanted);
    end_all(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn budget_that_grows_serves_without_evictions() {
    const LEN: usize = 16 * KIB;
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let mut handles = fill(&vmem, LEN).await;
    let before = vmem.stats().evictions;
    let wanted = 40 * PAGE;
    // In several steps, none of which has used what the one before brought.
    for pages in [33, 35, 40] {
        assert_eq!(vmem.set_vram_capacity(VRAM, pages * PAGE).await.unwrap(), pages * PAGE);
        assert_eq!(emulator.counter("created"), pages);
    }
    // Small ones, and a large one that needs most of what is new.
    for n in handles.len()..handles.len() + 2 * MIB / LEN {
        let handle = vmem.put(vec![n as u8; LEN], HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    let n = handles.len() as u8;
    let large = vmem.put(vec![n; 7 * PAGE as usize], HOST).await.unwrap();
    vmem.promote(&large, VRAM).await.unwrap();
    handles.push(large);
    assert_eq!(vmem.stats().evictions, before, "there was memory");
    assert_eq!(vmem.stats().vram.used_bytes, wanted);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

/// A change of the part that pins may hold goes with it.
#[tokio::test]
async fn pins_may_hold_their_part_of_what_the_budget_is() {
    let emulator = Emulator::load().unwrap();
    let config = config().max_pinned(0.5).wait_timeout(Duration::from_secs(2));
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let handles = fill(&vmem, 8 * MIB).await;
    let mut pins = Vec::new();
    for handle in &handles[..4] {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let refused = vmem.pin(&handles[4], VRAM).await;
    assert!(matches!(refused, Err(VirtualMemoryError::AllPinned { .. })), "{refused:?}");
    vmem.set_vram_capacity(VRAM, 40 * PAGE).await.unwrap();
    pins.push(vmem.pin(&handles[4], VRAM).await.unwrap());
    // What is pinned stays, though it is more than half now; and no more is.
    vmem.set_vram_capacity(VRAM, 30 * PAGE).await.unwrap();
    for handle in &handles[..5] {
        assert!(vmem.residency(handle).unwrap().vram);
    }
    let refused = vmem.pin(&handles[5], VRAM).await;
    assert!(matches!(refused, Err(VirtualMemoryError::AllPinned { .. })), "{refused:?}");
    pins.truncate(2);
    pins.push(vmem.pin(&handles[5], VRAM).await.unwrap());
    drop(pins);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

/// What is pinned is given up once it is not; what is not pinned has been by then.
#[tokio::test]
async fn budget_goes_down_as_far_as_pins_allow() {
    let emulator = Emulator::load().unwrap();
    let config = config().wait_timeout(Duration::from_secs(2));
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let handles = fill(&vmem, PAGE as usize).await;
    let mut pins = Vec::new();
    for handle in handles.iter().step_by(2) {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let refused = vmem.set_vram_capacity(VRAM, 4 * PAGE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::AllPinned { .. })), "{refused:?}");
    assert_eq!(vmem.stats().vram.capacity_bytes, 16 * PAGE);
    assert_eq!(emulator.counter("created"), 16);
    drop(pins);
    assert_eq!(vmem.set_vram_capacity(VRAM, 4 * PAGE).await.unwrap(), 4 * PAGE);
    assert_eq!(emulator.counter("created"), 4);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

/// Pages on which something small is pinned stay, and what else lies there is not evicted for
/// nothing.
#[tokio::test]
async fn budget_goes_down_by_the_pages_that_can_be_emptied() {
    const LEN: usize = 64 * KIB;
    const PER_PAGE: usize = PAGE as usize / LEN;
    let emulator = Emulator::load().unwrap();
    let config = config().wait_timeout(Duration::from_secs(2));
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let handles = fill(&vmem, LEN).await;
    let mut pins = Vec::new();
    for handle in handles.iter().step_by(PER_PAGE).take(22) {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let before = vmem.stats().evictions;
    let refused = vmem.set_vram_capacity(VRAM, 4 * PAGE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::AllPinned { .. })), "{refused:?}");
    // The last one may stay: a place for a page takes parts of two.
    let left = vmem.stats().vram.capacity_bytes / PAGE;
    assert!((22..=23).contains(&left), "{left} pages");
    assert_eq!(vmem.stats().evictions - before, (PAGES - left) * PER_PAGE as u64);
    drop(pins);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn growth_ends_where_the_device_has_no_more() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    // Others have taken all but twelve pages; they are left one of those.
    emulator.memory((PAGES + 12) * PAGE);
    let capacity = vmem.set_vram_capacity(VRAM, 100 * PAGE).await.unwrap();
    assert_eq!(capacity, (PAGES + 11) * PAGE);
    assert_eq!(emulator.counter("created"), PAGES + 11);
    end_all(vmem, Vec::new(), &emulator).await;
}

#[tokio::test]
async fn refusal_of_the_driver_changes_nothing() {
    let emulator = Emulator::load().unwrap();
    for function in ["cuMemUnmap", "cuMemRelease", "cuMemCreate"] {
        let vmem = open().await;
        let handles = fill(&vmem, MIB).await;
        emulator.refuse(function, 1);
        let wanted = if function == "cuMemCreate" { 40 } else { 20 };
        let refused = vmem.set_vram_capacity(VRAM, wanted * PAGE).await;
        assert!(
            matches!(refused, Err(VirtualMemoryError::Device { .. })),
            "{function}: {refused:?}"
        );
        assert_eq!(vmem.stats().vram.capacity_bytes, PAGES * PAGE, "{function}");
        emulator.refuse(function, 0);
        // All of it serves still, and the next one succeeds.
        for handle in &handles {
            vmem.promote(handle, VRAM).await.unwrap();
        }
        assert_eq!(vmem.stats().vram.used_bytes, PAGES * PAGE, "{function}");
        assert_eq!(vmem.set_vram_capacity(VRAM, wanted * PAGE).await.unwrap(), wanted * PAGE);
        check(&vmem, &handles).await;
        end_all(vmem, handles, &emulator).await;
    }
    // Memory that is there, and cannot be mapped now, is mapped when it is needed.
    let vmem = open().await;
    let handles = fill(&vmem, MIB).await;
    emulator.fail("cuMemMap", 1, OUT_OF_MEMORY);
    assert_eq!(vmem.set_vram_capacity(VRAM, 40 * PAGE).await.unwrap(), 40 * PAGE);
    let large = vmem.put(vec![7; 8 * PAGE as usize], HOST).await.unwrap();
    vmem.promote(&large, VRAM).await.unwrap();
    assert_eq!(vmem.stats().vram.used_bytes, 40 * PAGE);
    drop(large);
    end_all(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn last_change_counts() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let handles = fill(&vmem, 64 * KIB).await;
    let down = vmem.set_vram_capacity(VRAM, 2 * PAGE);
    let up = vmem.set_vram_capacity(VRAM, 36 * PAGE);
    let (down, up) = futures::join!(down, up);
    assert_eq!(up.unwrap(), 36 * PAGE);
    assert!(down.unwrap() >= 2 * PAGE);
    assert_eq!(vmem.stats().vram.capacity_bytes, 36 * PAGE);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

/// One that is polled once and left alone, and one that is dropped.
#[tokio::test]
async fn change_that_nobody_polls_delays_nobody() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let mut handles = fill(&vmem, MIB).await;
    let mut neglected = Box::pin(vmem.set_vram_capacity(VRAM, 2 * PAGE));
    assert!((&mut neglected).now_or_never().is_none());
    for _ in 0..20 {
        let n = handles.len() as u8;
        let handle = vmem.put(vec![n; MIB], HOST).await.unwrap();
        let served = tokio::time::timeout(HANGS / 2, vmem.promote(&handle, VRAM)).await;
        served.expect("it waits for a future that nobody polls").unwrap();
        handles.push(handle);
        // Some of the way.
        if n % 8 == 7 && (&mut neglected).now_or_never().is_some() {
            break;
        }
    }
    drop(neglected);
    let left = vmem.stats().vram.capacity_bytes;
    until("what was given back is there", || emulator.counter("device_bytes") == left).await;
    assert_eq!(vmem.set_vram_capacity(VRAM, 8 * PAGE).await.unwrap(), 8 * PAGE);
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

/// A driver that unmaps only once no kernel runs delays the change, and nobody else.
#[tokio::test]
async fn kernel_delays_the_change_alone() {
    let emulator = Emulator::load().unwrap();
    emulator.unmap_waits(true);
    let vmem = open().await;
    let stream = stream();
    let handles = fill(&vmem, MIB).await;
    emulator.hold(Kind::Kernel);
    let lease = vmem.device_mut_on(&handles[63], &stream).await.unwrap();
    // SAFETY: the kernel is launched on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, MIB as u64, 1, &stream);
    drop(lease);
    let mut change = Box::pin(vmem.set_vram_capacity(VRAM, 16 * PAGE));
    assert!((&mut change).now_or_never().is_none());
    let begun = Instant::now();
    while emulator.calls("cuMemUnmap") == 0 {
        assert!((&mut change).now_or_never().is_none() && begun.elapsed() < HANGS);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for handle in &handles[..20] {
        let served = tokio::time::timeout(HANGS / 2, vmem.promote(handle, VRAM)).await;
        served.expect("it waits for a kernel of others").unwrap();
    }
    emulator.release_all();
    assert_eq!(change.await.unwrap(), 16 * PAGE);
    assert!(vmem.read(&handles[63]).await.unwrap() == vec![64; MIB][..], "the kernel's bytes");
    check(&vmem, &handles[..63]).await;
    end_all(vmem, handles, &emulator).await;
}

/// A request that waits and can never fit any more gets an error at once.
#[tokio::test]
async fn waiter_that_never_fits_any_more_is_refused() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let handles = fill(&vmem, PAGE as usize).await;
    let mut pins = Vec::new();
    for handle in &handles[..20] {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let large = vmem.put(vec![1; 24 * PAGE as usize], HOST).await.unwrap();
    let mut waiting = Box::pin(vmem.promote(&large, VRAM));
    assert!((&mut waiting).now_or_never().is_none());
    assert_eq!(vmem.set_vram_capacity(VRAM, 22 * PAGE).await.unwrap(), 22 * PAGE);
    let refused = tokio::time::timeout(HANGS / 2, waiting).await.expect("it waits for nothing");
    assert!(matches!(refused, Err(VirtualMemoryError::ExceedsCapacity { .. })), "{refused:?}");
    drop((pins, large));
    check(&vmem, &handles).await;
    end_all(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn change_that_cannot_be_is_a_typed_error() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let too_small = vmem.set_vram_capacity(VRAM, 2 * PAGE - 1).await.unwrap_err();
    assert!(too_small.to_string().contains("at least 4194304 bytes"), "{too_small}");
    for tier in [HOST, MemoryTier::of_device(1)] {
        let refused = vmem.set_vram_capacity(tier, 8 * PAGE).await;
        assert!(
            matches!(refused, Err(VirtualMemoryError::TierNotAvailable { .. })),
            "{tier}: {refused:?}"
        );
    }
    end_all(vmem, Vec::new(), &emulator).await;
    emulator.paged(false);
    let vmem = open().await;
    let one_block = vmem.set_vram_capacity(VRAM, 16 * PAGE).await.unwrap_err();
    assert!(one_block.to_string().contains("one block"), "{one_block}");
    let closed = vmem.clone();
    end_all(vmem, Vec::new(), &emulator).await;
    emulator.paged(true);
    let refused = closed.set_vram_capacity(VRAM, 16 * PAGE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Closed)), "{refused:?}");
}

#[tokio::test]
async fn budgets_of_two_devices_change_by_themselves() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let second = MemoryTier::of_device(1);
    let config = config().gpus([0, 1].map(GpuSelection::Device)).vram_capacity(16 * PAGE);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    assert_eq!(vmem.set_vram_capacity(second, 24 * PAGE).await.unwrap(), 24 * PAGE);
    assert_eq!(vmem.set_vram_capacity(VRAM, 8 * PAGE).await.unwrap(), 8 * PAGE);
    let capacities = [VRAM, second].map(|tier| vmem.tier_stats(tier).capacity_bytes);
    assert_eq!(capacities, [8 * PAGE, 24 * PAGE]);
    assert_eq!(emulator.counter("created"), 32);
    end_all(vmem, Vec::new(), &emulator).await;
}
