//! Object space against a model, fragmentation, and the budget under threads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const MIB: u64 = 1024 * 1024;

/// Runs a seeded check and names the seed if it fails.
fn seeded(rounds: u64, check: impl Fn(u64, &mut SmallRng)) {
    let given = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in given.map_or(0..rounds, |seed| seed..seed + 1) {
        println!("VMEM_SEED={seed}");
        check(seed, &mut SmallRng::seed_from_u64(seed));
    }
}

fn random_len(rng: &mut SmallRng) -> usize {
    if cfg!(miri) {
        return rng.random_range(0..300);
    }
    match rng.random_range(0..10) {
        0 => 0,
        1..=5 => rng.random_range(1..=4096),
        6..=8 => rng.random_range(4097..=SMALL_MAX),
        _ => rng.random_range(SMALL_MAX + 1..=200 * 1024),
    }
}

fn fill(slot: &mut HostSlot, owner: u64) {
    for (at, byte) in slot.as_mut_slice().iter_mut().enumerate() {
        *byte = (owner as usize ^ at) as u8;
    }
}

fn verify(slot: &HostSlot, owner: u64) {
    let wrong =
        slot.as_slice().iter().enumerate().find(|&(at, &b)| b != (owner as usize ^ at) as u8);
    assert_eq!(wrong, None, "slot {slot:?} of {owner} was overwritten");
}

#[test]
fn slots_do_not_overlap_and_the_ledger_is_their_sum() {
    let (rounds, steps) = if cfg!(miri) { (1, 60) } else { (8, 4000) };
    seeded(rounds, |_, rng| {
        let arena = HostArena::new(2 * MIB).unwrap();
        let mut live: Vec<(u64, HostSlot)> = Vec::new();
        for owner in 0..steps {
            if rng.random_bool(0.6) {
                let len = random_len(rng);
                if let Ok(mut slot) = arena.try_alloc(len, owner) {
                    fill(&mut slot, owner);
                    live.push((owner, slot));
                }
            } else if !live.is_empty() {
                let (owner, slot) = live.swap_remove(rng.random_range(0..live.len()));
                verify(&slot, owner);
            }
            let sum: u64 = live.iter().map(|(_, slot)| slot.footprint()).sum();
            assert_eq!(arena.used_bytes(), sum);
            assert!(arena.pages.physical() * PAGE_BYTES as u64 <= arena.capacity_bytes());
        }
        live.iter().for_each(|(owner, slot)| verify(slot, *owner));
        drop(live);
        assert_eq!((arena.used_bytes(), arena.pages.live()), (0, 0));
        assert_eq!(arena.largest_free_bytes(), arena.capacity_bytes());
    });
}

#[test]
fn threads_share_the_budget() {
    let arena = HostArena::new(if cfg!(miri) { MIB } else { 4 * MIB }).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..4)
        .map(|thread: u64| {
            let (arena, stop) = (arena.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut rng = SmallRng::seed_from_u64(thread);
                let mut live = Vec::new();
                for round in 0..if cfg!(miri) { 15 } else { 20_000 } {
                    let owner = thread << 32 | round;
                    if let Ok(mut slot) = arena.try_alloc(random_len(&mut rng), owner) {
                        fill(&mut slot, owner);
                        live.push((owner, slot));
                    }
                    if live.len() > 40 {
                        let (owner, slot) = live.swap_remove(rng.random_range(0..live.len()));
                        verify(&slot, owner);
                    }
                }
                stop.store(true, Ordering::Relaxed);
                live.iter().for_each(|(owner, slot)| verify(slot, *owner));
            })
        })
        .collect();
    while !stop.load(Ordering::Relaxed) {
        assert!(arena.pages.physical() * PAGE_BYTES as u64 <= arena.capacity_bytes());
        std::thread::yield_now();
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!((arena.used_bytes(), arena.pages.live()), (0, 0));
}

#[test]
fn scattered_room_is_reported_and_the_sparsest_spans_give_it_back() {
    let arena = HostArena::new(MIB).unwrap();
    let mut slots = Vec::new();
    while let Ok(slot) = arena.try_alloc(1000, slots.len() as u64) {
        slots.push(Some(slot));
    }
    assert_eq!(arena.try_alloc(1000, 0).unwrap_err(), NoRoom { scattered: false });
    slots.iter_mut().step_by(2).for_each(|slot| *slot = None);
    // Half of the bytes are free, and not one page.
    assert_eq!(arena.try_alloc(64 * 1024, 0).unwrap_err(), NoRoom { scattered: true });
    assert!(arena.largest_free_bytes() < 64 * 1024);
    let mut emptied = 0;
    let large = loop {
        if let Ok(large) = arena.try_alloc(64 * 1024, 0) {
            break large;
        }
        for owner in arena.sparsest_span(&|owner| owner == 1).expect("there are sparse spans") {
            assert!(slots[owner as usize].take().is_some() && owner != 1);
        }
        emptied += 1;
    };
    assert_eq!(emptied, 4, "four spans of sixteen KiB");
    assert_eq!(large.as_slice().len(), 64 * 1024);
}

/// With free bytes in partly used spans of other sizes a request was refused, or something was written
/// to disk for it, or dropped, though moving small objects together makes whole spans free. It
/// takes no memory beside what is there: neither pages, nor a moment beyond the budget.
#[test]
fn moving_slots_out_of_a_sparse_span_frees_its_pages() {
    let arena = HostArena::new(MIB).unwrap();
    let mut slots = Vec::new();
    while let Ok(mut slot) = arena.try_alloc(1000, slots.len() as u64) {
        fill(&mut slot, slots.len() as u64);
        slots.push(Some(slot));
    }
    slots.iter_mut().step_by(2).for_each(|slot| *slot = None);
    let used = arena.used_bytes();
    assert_eq!(arena.try_alloc(300 * 1024, 0).unwrap_err(), NoRoom { scattered: true });
    let mut spans = 0;
    let large = loop {
        if let Ok(large) = arena.try_alloc(300 * 1024, 0) {
            break large;
        }
        let evacuation = arena.evacuation(&|owner| owner == 1).expect("spans can be emptied");
        assert!(evacuation.live_bytes() < evacuation.pages() * PAGE_BYTES as u64);
        let live = arena.pages.live();
        for &owner in evacuation.owners() {
            let place = slots[owner as usize].as_mut().unwrap();
            assert!(owner != 1 && evacuation.holds(place));
            let mut moved = evacuation.take(1000, owner).expect("they fit into other spans");
            assert!(!evacuation.holds(&moved), "out of the span");
            moved.as_mut_slice().copy_from_slice(place.as_slice());
            *place = moved;
        }
        assert_eq!(arena.pages.live(), live - evacuation.pages(), "the last move freed it");
        spans += 1;
    };
    assert!(spans > 10, "{spans} spans of four pages");
    assert_eq!(arena.used_bytes(), used + large.footprint());
    let live = slots.iter().enumerate().filter_map(|(owner, slot)| Some((owner, slot.as_ref()?)));
    live.for_each(|(owner, slot)| verify(slot, owner as u64));
}

#[test]
fn an_evacuation_is_not_begun_where_the_slots_fit_nowhere() {
    let arena = HostArena::new(MIB).unwrap();
    let mut slots: Vec<_> = (0..33).map(|owner| arena.try_alloc(1024, owner).ok()).collect();
    // Two full spans of sixteen and one with one slot.
    assert!(arena.evacuation(&|_| false).is_none(), "it would take a page");
    slots[0] = None;
    let other = arena.evacuation(&|owner| owner == 32).expect("the other one, into that");
    assert_eq!(other.owners(), (1..16).collect::<Vec<u64>>());
    assert!(arena.evacuation(&|_| false).is_none(), "its slots are not free meanwhile");
    drop(other);
    let evacuation = arena.evacuation(&|_| false).expect("one slot is free elsewhere");
    assert_eq!(evacuation.owners(), [32]);
    assert!(evacuation.take(500, 32).is_none() && evacuation.take(0, 32).is_none());
}

/// Given up half way, or overtaken by others, an evacuation leaves the arena as it was.
#[test]
fn an_evacuation_that_is_dropped_opens_its_span_again() {
    seeded(if cfg!(miri) { 1 } else { 8 }, |_, rng| {
        let arena = HostArena::new(MIB).unwrap();
        let mut live: Vec<(u64, HostSlot)> = Vec::new();
        let mut moved = 0;
        for owner in 0..if cfg!(miri) { 60 } else { 4000 } {
            match rng.random_range(0..10) {
                0..5 => {
                    if let Ok(mut slot) =
                        arena.try_alloc([300, 1000, 2500][rng.random_range(0..3)], owner)
                    {
                        fill(&mut slot, owner);
                        live.push((owner, slot));
                    }
                }
                5..9 if !live.is_empty() => {
                    live.swap_remove(rng.random_range(0..live.len()));
                }
                _ => {
                    let Some(evacuation) = arena.evacuation(&|_| false) else { continue };
                    let all: HashMap<u64, usize> =
                        live.iter().enumerate().map(|(at, (owner, _))| (*owner, at)).collect();
                    for owner in evacuation.owners().iter().filter(|_| rng.random_bool(0.9)) {
                        let slot = &mut live[all[owner]].1;
                        let len = slot.as_slice().len();
                        let mut to = evacuation.take(len, *owner).expect("they fit");
                        to.as_mut_slice().copy_from_slice(slot.as_slice());
                        *slot = to;
                        moved += 1;
                    }
                }
            }
            let sum: u64 = live.iter().map(|(_, slot)| slot.footprint()).sum();
            assert_eq!(arena.used_bytes(), sum);
        }
        assert!(cfg!(miri) || moved > 0, "some were moved");
        live.iter().for_each(|(owner, slot)| verify(slot, *owner));
        live.clear();
        assert_eq!((arena.used_bytes(), arena.pages.live()), (0, 0));
        assert_eq!(arena.largest_free_bytes(), arena.capacity_bytes());
    });
}

#[test]
fn large_objects_find_room_whatever_lies_scattered() {
    if cfg!(miri) {
        return; // Miri has little address space.
    }
    let arena = HostArena::new(4 * MIB).unwrap();
    let mut slots: Vec<_> = (0..64).map(|n| arena.try_alloc(64 * 1024, n).ok()).collect();
    slots.iter_mut().step_by(2).for_each(|slot| *slot = None);
    // Half of the pages are free, no two runs of them are neighbours.
    assert_eq!(arena.largest_free_bytes(), 2 * MIB);
    let large = arena.try_alloc(2 * MIB as usize, 99).unwrap();
    assert_eq!(arena.used_bytes(), arena.capacity_bytes());
    drop(large);
}

#[test]
fn impossible_lengths_are_refused() {
    let arena = HostArena::new(MIB).unwrap();
    for len in [MIB as usize + 1, usize::MAX / 2, usize::MAX - 4095, usize::MAX] {
        assert_eq!(arena.try_alloc(len, 0).unwrap_err(), NoRoom { scattered: false });
    }
    assert_eq!(arena.try_alloc(0, 0).unwrap().as_slice(), []);
}

#[test]
fn the_hook_is_called_after_the_room_is_there() {
    let arena = HostArena::new(MIB).unwrap();
    let seen = Arc::new(AtomicU64::new(u64::MAX));
    let (hook_arena, hook_seen) = (Arc::downgrade(&arena), seen.clone());
    arena.set_freed_hook(Box::new(move || {
        if let Some(arena) = hook_arena.upgrade() {
            hook_seen.store(arena.used_bytes(), Ordering::SeqCst);
        }
    }));
    drop(arena.try_alloc(100, 0));
    assert_eq!(seen.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn staging_pieces_are_exclusive_and_come_back() {
    use crate::host::StagingPool;
    let pool = StagingPool::new(2 * 64 * 1024).unwrap();
    let (mut one, mut two) = (pool.acquire().await, pool.acquire().await);
    one.as_mut_slice().fill(1);
    two.as_mut_slice().fill(2);
    assert!(one.as_slice().iter().all(|&byte| byte == 1));
    let mut waits = std::pin::pin!(pool.acquire());
    assert!(futures::poll!(waits.as_mut()).is_pending());
    drop(two);
    assert!(futures::poll!(waits.as_mut()).is_ready());
}

/// A device that knows what was registered, and touches all of it, as pinning does.
#[cfg(all(target_os = "linux", not(miri)))]
mod registered {
    use std::collections::BTreeMap;
    use std::io::{self, Read, Seek, SeekFrom};
    use std::sync::atomic::AtomicUsize;

    use parking_lot::Mutex;

    use super::*;
    use crate::host::{InUse, ObjectSpace, Registrar};

    #[derive(Debug, Default)]
    struct Device {
        known: Mutex<BTreeMap<usize, usize>>,
        registrations: AtomicUsize,
        refuses: AtomicBool,
    }

    impl Registrar for Device {
        fn register(&self, address: usize, len: usize) -> io::Result<()> {
            if self.refuses.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            for page in (address..address + len).step_by(PAGE_BYTES) {
                let byte = std::ptr::with_exposed_provenance_mut::<u8>(page);
                // SAFETY: the page is mapped, and this test has one thread.
                let read = unsafe { byte.read_volatile() };
                // SAFETY: as above.
                unsafe { byte.write_volatile(read) };
            }
            assert_eq!(self.known.lock().insert(address, len), None, "registered twice");
            self.registrations.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn unregister(&self, address: usize, len: usize) -> io::Result<()> {
            assert_eq!(self.known.lock().remove(&address), Some(len), "what was registered");
            Ok(())
        }
    }

    impl Device {
        /// Each page of what is registered has the memory that it had: a page that was given back, and not touched
        /// since, has none.
        fn assert_has_memory(&self) {
            let mut map = std::fs::File::open("/proc/self/pagemap").unwrap();
            for (&address, &len) in &*self.known.lock() {
                map.seek(SeekFrom::Start((address / PAGE_BYTES * 8) as u64)).unwrap();
                let mut entries = vec![0; len / PAGE_BYTES * 8];
                map.read_exact(&mut entries).unwrap();
                let there = entries.chunks(8).all(|entry| entry[7] >> 6 != 0);
                assert!(there, "a registered page was given back");
            }
        }

        fn covers(&self, address: usize, len: usize) -> bool {
            let known = self.known.lock();
            let slab = known.range(..=address).next_back();
            slab.is_some_and(|(&start, &slab)| address + len <= start + slab)
        }
    }

    fn served(capacity: u64) -> (Arc<HostArena>, ObjectSpace, Arc<Device>) {
        let arena = HostArena::new(capacity).unwrap();
        let (space, device) = (ObjectSpace::new(arena.clone()), Arc::new(Device::default()));
        space.serve(device.clone());
        (arena, space, device)
    }

    /// Room, once what is being unregistered for it was: a thread of the arena's does that, in its own time.
    fn alloc_soon(arena: &Arc<HostArena>, len: usize) -> Option<HostSlot> {
        let begun = std::time::Instant::now();
        loop {
            match arena.try_alloc(len, 3) {
                Ok(slot) => return Some(slot),
                Err(_) if begun.elapsed().as_secs() > 20 => return None,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        }
    }

    /// What a copy of a slot does: each part that it uses is registered as one.
    fn copy(space: &ObjectSpace, device: &Device, slot: &HostSlot) -> Vec<InUse> {
        let bytes = slot.as_slice();
        let mut at = 0;
        let mut uses = Vec::new();
        for part in space.enter(bytes.as_ptr().addr(), bytes.len()) {
            assert_eq!(part.range.start, at, "the parts are all of it, in order");
            at = part.range.end;
            let address = bytes[part.range.clone()].as_ptr().addr();
            let covered = !part.range.is_empty() && device.covers(address, part.range.len());
            assert_eq!(covered, part.direct, "registered as one");
            uses.extend(part.in_use.filter(|_| part.direct));
        }
        assert_eq!(at, bytes.len());
        uses
    }

    #[test]
    fn nothing_registered_is_given_back() {
        seeded(6, |_, rng| {
            let (arena, space, device) = served(4 * MIB);
            let mut live: Vec<(u64, HostSlot, Vec<InUse>)> = Vec::new();
            for owner in 0..6000 {
                match rng.random_range(0..12) {
                    0..5 => {
                        let len = match rng.random_range(0..4) {
                            0 => rng.random_range(SMALL_MAX..1 << 20),
                            _ => random_len(rng),
                        };
                        if let Ok(mut slot) = arena.try_alloc(len, owner) {
                            fill(&mut slot, owner);
                            live.push((owner, slot, Vec::new()));
                        }
                    }
                    5..8 if !live.is_empty() => {
                        let at = rng.random_range(0..live.len());
                        let (_, slot, uses) = &mut live[at];
                        *uses = copy(&space, &device, slot);
                    }
                    8 => live.iter_mut().for_each(|(_, _, uses)| uses.clear()),
                    _ if !live.is_empty() => {
                        let at = rng.random_range(0..live.len());
                        let (owner, slot, uses) = live.swap_remove(at);
                        verify(&slot, owner);
                        drop(uses);
                    }
                    _ => {}
                }
                if owner % 16 == 0 {
                    device.assert_has_memory();
                    assert!(arena.pages().physical() <= 4 * MIB / PAGE_BYTES as u64);
                }
            }
            assert!(device.registrations.load(Ordering::SeqCst) > 10, "slabs come and go");
            live.iter().for_each(|(owner, slot, _)| verify(slot, *owner));
            live.clear();
            let all = alloc_soon(&arena, 4 * MIB as usize);
            assert!(all.is_some(), "all of it, in one piece, wherever slabs were registered");
            space.retire(&|address, len| device.unregister(address, len).is_ok());
            assert_eq!(device.known.lock().len(), 0);
            assert_eq!(space.registered_bytes(), 0);
        });
    }

    #[test]
    fn what_copies_use_stays_and_its_end_is_told() {
        let (arena, space, device) = served(MIB);
        let told = Arc::new(AtomicUsize::new(0));
        let rung = told.clone();
        arena.set_freed_hook(Box::new(move || {
            rung.fetch_add(1, Ordering::SeqCst);
        }));
        let part = |kib: usize| arena.try_alloc(kib * 1024, 1).unwrap();
        let (first, middle, last) = (part(448), part(128), part(448));
        let uses = [&first, &last].map(|slot| copy(&space, &device, slot));
        assert!(uses.iter().all(|uses| !uses.is_empty()), "whole slabs register at once");
        drop((first, last));
        let before = told.load(Ordering::SeqCst);
        let refused = arena.try_alloc(512 * 1024, 2);
        assert!(refused.is_err(), "what would have to go is in use");
        device.assert_has_memory();
        drop(uses);
        assert!(told.load(Ordering::SeqCst) > before, "whoever waits is told");
        assert!(alloc_soon(&arena, 512 * 1024).is_some(), "slabs are unregistered for it");
        device.assert_has_memory();
        drop(middle);
    }

    #[test]
    fn a_device_that_refuses() {
        let (arena, space, device) = served(4 * MIB);
        device.refuses.store(true, Ordering::SeqCst);
        let slot = arena.try_alloc(2 * MIB as usize, 1).unwrap();
        for _ in 0..3 {
            assert!(copy(&space, &device, &slot).is_empty(), "by the detour");
        }
        device.refuses.store(false, Ordering::SeqCst);
        assert!(!copy(&space, &device, &slot).is_empty(), "it is tried again");
        let outside = [0_u8; 100];
        let parts = space.enter(outside.as_ptr().addr(), outside.len());
        assert!(parts.len() == 1 && parts[0].range == (0..100) && parts[0].in_use.is_none());
    }
}
