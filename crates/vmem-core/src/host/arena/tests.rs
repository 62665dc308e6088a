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
            let arena = arena.clone();
            let stop = stop.clone();
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
fn scattered_space_is_reported_and_the_sparsest_spans_give_it_back() {
    let arena = HostArena::new(MIB).unwrap();
    let mut slots = Vec::new();
    while let Ok(slot) = arena.try_alloc(1000, slots.len() as u64) {
        slots.push(Some(slot));
    }
    assert_eq!(arena.try_alloc(1000, 0).unwrap_err(), NoSlot { scattered: false });
    slots.iter_mut().step_by(2).for_each(|slot| *slot = None);
    // Half of the bytes are free, and not one page.
    assert_eq!(arena.try_alloc(64 * 1024, 0).unwrap_err(), NoSlot { scattered: true });
    assert!(arena.largest_free_bytes() < 64 * 1024);
    let mut emptied = 0;
    let large = loop {
        if let Ok(large) = arena.try_alloc(64 * 1024, 0) {
            break large;
        }
        for owner in
            arena.sparsest_span(&|owner| owner == 1).expect("there are sparse spans").owners
        {
            assert!(slots[owner as usize].take().is_some() && owner != 1);
        }
        emptied += 1;
    };
    assert_eq!(emptied, 4, "four spans of sixteen KiB");
    assert_eq!(large.as_slice().len(), 64 * 1024);
}

/// With free bytes in partly used spans of other sizes a request was refused, or something was
/// written to disk for it, or dropped, though moving small objects together makes whole spans free.
/// It takes no further memory: neither pages, nor a moment beyond the budget.
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
    assert_eq!(arena.try_alloc(300 * 1024, 0).unwrap_err(), NoSlot { scattered: true });
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
fn large_objects_find_space_whatever_lies_scattered() {
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
        assert_eq!(arena.try_alloc(len, 0).unwrap_err(), NoSlot { scattered: false });
    }
    assert_eq!(arena.try_alloc(0, 0).unwrap().as_slice(), []);
}

#[test]
fn the_hook_is_called_after_the_space_is_there() {
    let arena = HostArena::new(MIB).unwrap();
    let seen = Arc::new(AtomicU64::new(u64::MAX));
    let hook_arena = Arc::downgrade(&arena);
    let hook_seen = seen.clone();
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
    let pool = StagingPool::new(2 * 64 * 1024, 1).unwrap();
    let mut one = pool.acquire(Some(0)).await;
    let mut two = pool.acquire(Some(0)).await;
    one.as_mut_slice().fill(1);
    two.as_mut_slice().fill(2);
    assert!(one.as_slice().iter().all(|&byte| byte == 1));
    let mut waits = std::pin::pin!(pool.acquire(None));
    assert!(futures::poll!(waits.as_mut()).is_pending());
    drop(two);
    assert!(futures::poll!(waits.as_mut()).is_ready());
}

#[tokio::test]
async fn share_of_staging_leaves_half_to_others() {
    use crate::host::StagingPool;
    let pool = StagingPool::new(4 * 64 * 1024, 2).unwrap();
    let one = pool.acquire(Some(0)).await;
    let two = pool.acquire(Some(0)).await;
    let mut next = std::pin::pin!(pool.acquire(Some(0)));
    assert!(futures::poll!(next.as_mut()).is_pending(), "it has its share");
    let other = pool.acquire(Some(1)).await;
    let last = pool.acquire(None).await;
    drop(two);
    assert!(futures::poll!(next.as_mut()).is_ready());
    drop((one, other, last));
}

/// A device that knows what was registered, and touches all of it, as pinning does.
#[cfg(all(target_os = "linux", not(miri)))]
mod registered;
