//! Device memory as pages that are mapped where they are needed, on the emulated driver.
//!
//! Excluded: free memory that serves no request because it lies in pieces, evictions beyond the
//! pages that a request lacks, memory that moves under a copy or a kernel, and pages or addresses
//! that are not given back. Noticed by counters, by bytes, and by what the emulator says of rules
//! that were broken.

use std::time::Duration;

use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::result;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HANGS, HOST, VRAM, end_all, launch, plus, stream, until};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// The device memory of these stores: as little as is taken as pages, and the size of a page.
const MEMORY: usize = 32 * MIB;
const PAGE: usize = 2 * MIB;
/// The driver has no memory for that.
const OUT_OF_MEMORY: i32 = 2;

async fn open() -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(96 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(MEMORY as u64)
        .max_pinned(1.0)
        .wait_timeout(HANGS);
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// Fills device memory with objects of this length, in this order.
async fn fill(vmem: &VirtualMemory, len: usize) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for n in 0..MEMORY / len {
        let handle = vmem.put(vec![n as u8; len], HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    assert_eq!(vmem.stats().vram.used_bytes, MEMORY as u64, "it is full");
    handles
}

/// What a device finds.
async fn on_device(vmem: &VirtualMemory, handle: &VMemHandle) -> Vec<u8> {
    let stream = stream();
    let lease = vmem.device_on(handle, &stream).await.unwrap();
    let mut bytes = vec![0; handle.len()];
    // SAFETY: it is read below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: both are as long as the object; the memory of the vector is pageable, so the call
    // waits.
    unsafe { result::memcpy_dtoh_async(&mut bytes, at, stream.cu_stream()) }.unwrap();
    bytes
}

#[tokio::test]
async fn free_pages_that_lie_apart_hold_one_large_object() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    assert_eq!(emulator.counter("created"), (MEMORY / PAGE) as u64);
    let mut handles = fill(&vmem, PAGE).await;
    // Every other one stays, so that no two free pages lie beside each other.
    let mut pins = Vec::new();
    for handle in handles.iter().step_by(2) {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    for handle in handles.iter().skip(1).step_by(2) {
        vmem.demote(handle, HOST).await.unwrap();
    }
    assert_eq!(vmem.stats().vram.largest_free_bytes, MEMORY as u64 / 2);
    let before = vmem.stats().evictions;
    let bytes: Vec<u8> = (0..MEMORY / 2).map(|at| (at >> 7) as u8).collect();
    let large = vmem.put(bytes.clone(), HOST).await.unwrap();
    vmem.promote(&large, VRAM).await.unwrap();
    assert_eq!(vmem.stats().evictions, before, "half of the memory was free");
    assert!(on_device(&vmem, &large).await == bytes);
    drop(pins);
    handles.push(large);
    end_all(vmem, handles, &emulator).await;
}

/// Among objects of 16 KiB, some of which stay: pages without any of these are emptied.
#[tokio::test]
async fn large_promotion_evicts_the_pages_that_it_lacks() {
    const SMALL: usize = 16 * KIB;
    let emulator = Emulator::load().unwrap();
    for need in [64 * KIB, 256 * KIB, MIB, 3 * MIB, 4 * MIB, 8 * MIB] {
        let vmem = open().await;
        let mut handles = fill(&vmem, SMALL).await;
        let mut pins = Vec::new();
        for page in (0..MEMORY / PAGE).step_by(3) {
            let handle = &handles[page * (PAGE / SMALL) + 5];
            pins.push(vmem.pin(handle, VRAM).await.unwrap());
        }
        // The order of the last use has nothing to do with where they lie.
        for n in 0..handles.len() {
            vmem.promote(&handles[n * 37 % handles.len()], VRAM).await.unwrap();
        }
        let large = vmem.put(vec![9; need], HOST).await.unwrap();
        let before = vmem.stats().evictions;
        vmem.promote(&large, VRAM).await.unwrap();
        let evicted = (vmem.stats().evictions - before) as usize * SMALL;
        let enough = if need < PAGE { 2 * need } else { need.next_multiple_of(PAGE) };
        assert!((need..=enough).contains(&evicted), "{need} bytes: {evicted} evicted");
        drop(pins);
        handles.push(large);
        end_all(vmem, handles, &emulator).await;
    }
}

/// What the second one lacks is evicted once it is the first, and then as pages.
#[tokio::test]
async fn large_promotions_at_once_evict_what_they_lack_together() {
    const SMALL: usize = 16 * KIB;
    const NEED: usize = 8 * MIB;
    let emulator = Emulator::load().unwrap();
    for seed in 0..4 {
        let vmem = open().await;
        let mut handles = fill(&vmem, SMALL).await;
        // The order of the last use has nothing to do with where they lie.
        let mut random = SmallRng::seed_from_u64(seed);
        for part in 0..4 {
            handles.shuffle(&mut random);
            let some = &handles[part * 256..(part + 1) * 256];
            for handle in some {
                vmem.demote(handle, HOST).await.unwrap();
            }
            for handle in some.iter().rev() {
                vmem.promote(handle, VRAM).await.unwrap();
            }
        }
        let mut large = Vec::new();
        for n in 0..2 {
            large.push(vmem.put(vec![n; NEED], HOST).await.unwrap());
        }
        let before = vmem.stats().evictions;
        let both = large.iter().map(|handle| vmem.promote(handle, VRAM));
        assert!(futures::future::join_all(both).await.into_iter().all(|done| done.is_ok()));
        let evicted = (vmem.stats().evictions - before) as usize * SMALL;
        assert!(evicted <= 2 * NEED, "{evicted} bytes were evicted");
        handles.extend(large);
        end_all(vmem, handles, &emulator).await;
    }
}

/// A large one that nothing serves before pins go stands first, and is not in the way of another.
#[tokio::test]
async fn large_promotion_is_served_behind_one_that_pins_keep_out() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let mut handles = fill(&vmem, 64 * KIB).await;
    let mut pins = Vec::new();
    for handle in &handles[..MEMORY / 2 / (64 * KIB)] {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let out_of_reach = vmem.put(vec![8; MEMORY / 4 * 3], HOST).await.unwrap();
    let mut waiting = Box::pin(vmem.promote(&out_of_reach, VRAM));
    assert!((&mut waiting).now_or_never().is_none());
    let large = vmem.put(vec![9; 3 * PAGE], HOST).await.unwrap();
    let served = tokio::time::timeout(HANGS / 2, vmem.promote(&large, VRAM)).await;
    served.expect("it waits for what waits for pins").unwrap();
    assert!((&mut waiting).now_or_never().is_none(), "half is pinned");
    drop(pins);
    waiting.await.unwrap();
    handles.extend([out_of_reach, large]);
    end_all(vmem, handles, &emulator).await;
}

/// Nothing but moved pages serves this one: every other page is pinned.
#[tokio::test]
async fn pages_are_moved_once_a_driver_that_refused_does_it() {
    let emulator = Emulator::load().unwrap();
    for function in ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"] {
        let vmem = open().await;
        let mut handles = fill(&vmem, PAGE).await;
        let mut pins = Vec::new();
        for (n, handle) in handles.iter().enumerate() {
            match n % 2 {
                0 => pins.push(vmem.pin(handle, VRAM).await.unwrap()),
                _ => vmem.demote(handle, HOST).await.unwrap(),
            }
        }
        emulator.fail(function, 1, OUT_OF_MEMORY);
        let large = vmem.put(vec![7; 3 * PAGE], HOST).await.unwrap();
        let before = vmem.stats().evictions;
        let promoted = tokio::time::timeout(HANGS / 2, vmem.promote(&large, VRAM)).await;
        promoted.expect("nobody asks the driver again").unwrap();
        assert_eq!(vmem.stats().evictions, before, "{function}");
        assert!(on_device(&vmem, &large).await == vec![7; 3 * PAGE], "{function}");
        drop(pins);
        handles.push(large);
        end_all(vmem, handles, &emulator).await;
    }
}

/// Objects of a length that is no multiple of a page share pages, and leave none unused.
#[tokio::test]
async fn objects_of_any_length_fill_the_memory() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let len = 3 * MIB + 200 * KIB;
    let mut handles = Vec::new();
    for n in 0..MEMORY / len {
        let handle = vmem.put(vec![n as u8; len], HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        handles.push(handle);
    }
    assert_eq!((vmem.stats().vram.objects, vmem.stats().evictions), (10, 0));
    // One of the same length takes the place of the one that was used longest ago.
    let next = vmem.put(vec![99; len], HOST).await.unwrap();
    vmem.promote(&next, VRAM).await.unwrap();
    assert_eq!((vmem.stats().vram.objects, vmem.stats().evictions), (10, 1));
    handles.push(next);
    end_all(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn pages_stay_where_they_are_while_the_driver_refuses() {
    let emulator = Emulator::load().unwrap();
    for function in ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"] {
        let vmem = open().await;
        let mut handles = fill(&vmem, PAGE).await;
        for handle in handles.iter().step_by(2) {
            vmem.demote(handle, HOST).await.unwrap();
        }
        emulator.refuse(function, OUT_OF_MEMORY);
        let bytes = vec![7; 3 * PAGE];
        let large = vmem.put(bytes.clone(), HOST).await.unwrap();
        // Neighbours go instead.
        vmem.promote(&large, VRAM).await.unwrap();
        assert!(on_device(&vmem, &large).await == bytes, "{function}");
        emulator.refuse(function, 0);
        handles.push(large);
        end_all(vmem, handles, &emulator).await;
    }
}

#[tokio::test]
async fn memory_is_one_block_where_pages_are_not_to_be_had() {
    let emulator = Emulator::load().unwrap();
    emulator.paged(false);
    let vmem = open().await;
    let handles = fill(&vmem, MIB).await;
    assert_eq!((emulator.calls("cuMemCreate"), emulator.calls("cuMemAlloc_v2") > 0), (0, true));
    end_all(vmem, handles, &emulator).await;
    emulator.paged(true);
    for function in ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"] {
        emulator.refuse(function, 1);
        let vmem = open().await;
        emulator.refuse(function, 0);
        assert_eq!(vmem.stats().vram.capacity_bytes, MEMORY as u64, "{function}");
        let handles = fill(&vmem, MIB).await;
        end_all(vmem, handles, &emulator).await;
    }
}

#[tokio::test]
async fn memory_is_what_others_have_left() {
    let emulator = Emulator::load().unwrap();
    // The last pages are gone when they are asked for.
    emulator.fail("cuMemCreate", 25, OUT_OF_MEMORY);
    let config = VirtualMemoryConfig::builder()
        .host_capacity(32 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(2 * MEMORY as u64);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    // An eighth of the 24 is left for others.
    assert_eq!(vmem.stats().vram.capacity_bytes, 21 * PAGE as u64);
    assert_eq!(emulator.counter("created"), 21);
    end_all(vmem, Vec::new(), &emulator).await;
}

/// A store in which half of the pages are free, none beside another, and do not move before a
/// kernel has ended, which is held; its objects, and one of three pages, which has no place.
async fn behind_a_kernel(emulator: &Emulator) -> (VirtualMemory, Vec<VMemHandle>, VMemHandle) {
    emulator.unmap_waits(true);
    let vmem = open().await;
    let stream = stream();
    let handles = fill(&vmem, PAGE).await;
    for handle in handles.iter().skip(1).step_by(2) {
        vmem.demote(handle, HOST).await.unwrap();
    }
    emulator.hold(Kind::Kernel);
    let lease = vmem.device_mut_on(&handles[0], &stream).await.unwrap();
    // SAFETY: the kernel is launched on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, PAGE as u64, 1, &stream);
    drop(lease);
    let large = vmem.put(vec![9; 3 * PAGE], HOST).await.unwrap();
    (vmem, handles, large)
}

/// A driver that moves pages only once no kernel runs delays the one that lacks them, and nobody
/// else; and what waits for its memory evicts nothing meanwhile.
#[tokio::test]
async fn kernel_that_keeps_pages_from_moving_delays_nobody_else() {
    let emulator = Emulator::load().unwrap();
    let (vmem, mut handles, large) = behind_a_kernel(&emulator).await;
    let before = vmem.stats().evictions;
    let mut promotion = Box::pin(vmem.promote(&large, VRAM));
    assert!((&mut promotion).now_or_never().is_none());
    until("pages are on their way", || emulator.calls("cuMemUnmap") > 0).await;
    for (n, handle) in handles.iter().skip(1).step_by(2).take(6).enumerate() {
        let served = tokio::time::timeout(HANGS, vmem.promote(handle, VRAM)).await;
        served.expect("it waits for a kernel of others").unwrap();
        // The last one takes the place of another: what is to move is nobody's to take.
        assert_eq!(vmem.stats().evictions - before, u64::from(n == 5));
    }
    assert!(vmem.read(&handles[2]).await.unwrap() == vec![2; PAGE][..]);
    // Another large one is next, and what goes for it goes once it is the first.
    let second = vmem.put(vec![8; 3 * PAGE], HOST).await.unwrap();
    let mut next = Box::pin(vmem.promote(&second, VRAM));
    assert!((&mut next).now_or_never().is_none());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!((&mut promotion).now_or_never().is_none(), "the kernel still runs");
    assert_eq!(vmem.stats().evictions, before + 1, "there is memory enough");
    emulator.release_all();
    promotion.await.unwrap();
    next.await.unwrap();
    assert!(on_device(&vmem, &large).await == vec![9; 3 * PAGE]);
    assert!(vmem.read(&handles[0]).await.unwrap() == vec![1; PAGE][..]);
    handles.extend([large, second]);
    end_all(vmem, handles, &emulator).await;
}

/// A kernel that does not end before the promotion: neighbours go for it after a while.
#[tokio::test]
async fn driver_that_hangs_is_not_waited_for() {
    let emulator = Emulator::load().unwrap();
    let (vmem, mut handles, large) = behind_a_kernel(&emulator).await;
    let served = tokio::time::timeout(HANGS, vmem.promote(&large, VRAM)).await;
    served.expect("it waits for the driver").unwrap();
    assert!(emulator.counter("in_flight") > 0, "the kernel still runs");
    emulator.release_all();
    assert!(on_device(&vmem, &large).await == vec![9; 3 * PAGE]);
    handles.push(large);
    end_all(vmem, handles, &emulator).await;
}

/// Kernels, promotions and evictions of all lengths, with bytes compared at the end of each use.
#[tokio::test]
async fn pages_move_under_no_copy_and_no_kernel() {
    let emulator = Emulator::load().unwrap();
    let given = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut moved = 0;
    for seed in given.map_or(0..4, |seed| seed..seed + 1) {
        println!("VMEM_SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        emulator.unmap_waits(seed % 2 == 1);
        let vmem = open().await;
        let streams = [stream(), stream()];
        let mapped = emulator.calls("cuMemMap");
        emulator.delay(Kind::Kernel, 300);
        let mut objects: Vec<(VMemHandle, Vec<u8>)> = Vec::new();
        for n in 0..40_u8 {
            let longest = [64 * KIB, 2 * MIB, 7 * MIB][random.random_range(0..3)];
            let bytes = vec![n; random.random_range(1..longest)];
            let handle = vmem.put(bytes.clone(), HOST).await.unwrap();
            objects.push((handle, bytes));
        }
        for _ in 0..300 {
            let at = random.random_range(0..objects.len());
            let (handle, bytes) = &mut objects[at];
            match random.random_range(0..10) {
                0..=5 => {
                    let stream = &streams[random.random_range(0..2)];
                    let lease = vmem.device_mut_on(handle, stream).await.unwrap();
                    // SAFETY: the kernel is launched on the stream of the lease.
                    let address = unsafe { lease.device_ptr() };
                    launch("vmem_add", address, bytes.len() as u64, 1, stream);
                    *bytes = plus(bytes, 1);
                }
                6..=7 => vmem.promote(handle, VRAM).await.unwrap(),
                8 => vmem.demote(handle, HOST).await.unwrap(),
                _ => assert!(vmem.read(handle).await.unwrap() == bytes[..], "{at}"),
            }
        }
        for (at, (handle, bytes)) in objects.iter().enumerate() {
            assert!(vmem.read(handle).await.unwrap() == bytes[..], "{at}");
        }
        emulator.delay(Kind::Kernel, 0);
        moved += emulator.calls("cuMemMap") - mapped;
        end_all(vmem, objects.into_iter().map(|(handle, _)| handle).collect(), &emulator).await;
    }
    assert!(moved > 10, "{moved} pages moved");
}
