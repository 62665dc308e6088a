//! One pass, whatever happens between its calls: it ends, it finds what can go, and what it passes
//! over stays where it was.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::PolicyKind;
use vmem_core::policy::{Entry, Pass, Pick, Policy, PolicyChoice, build};

use crate::world::World;
use crate::{KINDS, seeds};

fn filled(policy: Box<dyn Policy>, rng: &mut SmallRng, count: u64) -> World {
    let mut world = World::new(policy);
    (0..count).for_each(|id| world.insert(id, 64 * rng.random_range(1..50)));
    (0..count).filter(|_| rng.random_bool(0.5)).for_each(|id| world.touch(id));
    world
}

/// Between two calls: some enter, some are used, some change what they answer. `fit` says whether
/// some may answer that they can go.
fn disturb(world: &mut World, rng: &mut SmallRng, next: &mut u64, fit: bool) {
    for _ in 0..rng.random_range(0..2 * vmem_core::policy::STEPS_MAX) {
        let id = rng.random_range(0..*next);
        let known = world.marks.contains_key(&id).then_some(id);
        match (rng.random_range(0..10), known) {
            (_, None) => {}
            (0..5, _) => {
                // Back after a while, or new.
                let last_use = rng.random_range(0..=world.now);
                let stamp = if rng.random() { last_use } else { world.now };
                let prefetched = rng.random();
                world.enter(Entry { prefetched, ..Entry::new(*next, stamp, 64) });
                world.set_unfit(*next, !fit || rng.random());
                *next += 1;
            }
            (5..8, Some(id)) => world.touch(id),
            (8, Some(id)) if world.marks[&id].pinned => world.unpin(id),
            (8, Some(id)) if rng.random_bool(0.2) => world.pin(id),
            (_, Some(id)) if world.marks[&id].busy => {
                world.set_busy(id, false);
                world.set_unfit(id, !fit || rng.random());
            }
            (_, Some(id)) => world.set_busy(id, true),
        }
    }
}

/// The evictor spun for the whole of a deadline where nothing could go: a look that was resumed
/// never ended, since what it met was filed anew before it, and what entered made it
/// begin again. A pass asks each entry once at most where none can go, and ends, though more enters
/// between two calls than one call asks.
#[test]
fn a_pass_ends_after_one_visit_each_where_nothing_can_go() {
    for (kind, seed) in KINDS.into_iter().flat_map(|kind| seeds(30).map(move |seed| (kind, seed))) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..2_000);
        let mut world = filled(build(kind), &mut rng, count);
        for id in 0..count {
            world.set_unfit(id, true);
            world.set_busy(id, rng.random_bool(0.3));
        }
        let mut pass = Pass::default();
        let mut next = count;
        while world.look(&mut pass) == Pick::Retry {
            disturb(&mut world, &mut rng, &mut next, false);
        }
        let most = world.asked.values().max();
        assert!(most <= Some(&1), "{kind}: asked {most:?} times VMEM_SEED={seed}");
        let late = world.asked.keys().filter(|&&id| id >= count).count();
        assert_eq!(late, 0, "{kind}: whatever entered later is not asked VMEM_SEED={seed}");
        assert_eq!(world.look(&mut pass), Pick::Empty, "{kind}: it stays over VMEM_SEED={seed}");
    }
}

/// `Empty` is the truth: each entry that could go throughout is named before it.
#[test]
fn a_pass_names_whatever_could_go_throughout() {
    for (kind, seed) in KINDS.into_iter().flat_map(|kind| seeds(40).map(move |seed| (kind, seed))) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..1_000);
        let policy = match seed % 2 {
            0 => build(kind),
            _ => PolicyChoice::from(kind).build(rng.random_range(0..100_000)),
        };
        let mut world = filled(policy, &mut rng, count);
        for id in 0..count {
            if rng.random_bool(0.3) {
                world.remove(id);
                world.prefetch(id, 64);
            }
        }
        let share = rng.random_range(0.0..0.2);
        for id in 0..count {
            world.set_unfit(id, !rng.random_bool(share));
        }
        let fit = |world: &World, id: &u64| {
            let mark = world.marks.get(id);
            mark.is_some_and(|mark| !mark.pinned && !mark.busy && !mark.unfit)
        };
        let mut throughout: BTreeSet<u64> = (0..count).filter(|id| fit(&world, id)).collect();
        let mut pass = Pass::default();
        let mut next = count;
        let mut calls = 0;
        loop {
            calls += 1;
            assert!(calls < 40_000, "{kind}: no end VMEM_SEED={seed}");
            match world.look(&mut pass) {
                Pick::Victim { id, .. } => {
                    assert!(fit(&world, &id), "{kind}: {id} cannot go VMEM_SEED={seed}");
                    throughout.remove(&id);
                    if rng.random_bool(0.7) {
                        world.remove(id);
                    } else {
                        world.set_busy(id, true);
                    }
                }
                Pick::Retry => {}
                Pick::Empty => break,
            }
            // A pass that finds something goes on as long as others enter and are used.
            if calls < 100 {
                disturb(&mut world, &mut rng, &mut next, true);
            } else if let Some(&id) = throughout.first() {
                world.touch(id);
            }
            throughout.retain(|id| fit(&world, id));
        }
        assert_eq!(throughout, BTreeSet::new(), "{kind}: not named VMEM_SEED={seed}");
    }
}

/// What was passed over for the purpose of one pass goes as if there had been none.
#[test]
fn an_unfit_entry_keeps_its_place_and_its_uses() {
    for (kind, seed) in KINDS.into_iter().flat_map(|kind| seeds(40).map(move |seed| (kind, seed))) {
        let made = || {
            let mut rng = SmallRng::seed_from_u64(seed);
            let count = rng.random_range(1..300);
            (filled(build(kind), &mut rng, count), count, rng)
        };
        let (mut world, count, mut rng) = made();
        let (mut twin, ..) = made();
        // Both are in the midst of their work.
        for _ in 0..count / 3 {
            assert_eq!(world.victim(), twin.victim());
            let id = rng.random_range(0..count);
            for world in [&mut world, &mut twin] {
                world.touch(id);
            }
        }
        (0..count).for_each(|id| world.set_unfit(id, true));
        for _ in 0..rng.random_range(1..4) {
            assert_eq!(world.victim(), None);
        }
        (0..count).for_each(|id| world.set_unfit(id, false));
        assert_eq!(world.order(), twin.order(), "{kind} VMEM_SEED={seed}");
        for _ in 0..count {
            let found = world.victim();
            let expected = twin.victim();
            assert_eq!(found, expected, "{kind} VMEM_SEED={seed}");
            let (id, _) = found.unwrap();
            world.remove(id);
            twin.remove(id);
        }
    }
}

/// Where others go past it, it keeps its place among those that stay.
#[test]
fn unfit_entries_keep_their_order_while_others_go() {
    for (kind, seed) in KINDS.into_iter().flat_map(|kind| seeds(40).map(move |seed| (kind, seed))) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(2..600);
        let mut world = filled(build(kind), &mut rng, count);
        (0..count).filter(|_| rng.random()).for_each(|id| world.set_unfit(id, true));
        let stays = |world: &World| {
            let order = world.order().into_iter();
            order.filter(|id| world.marks[id].unfit).collect::<Vec<u64>>()
        };
        let before = stays(&world);
        let touches = |world: &World| before.iter().map(|id| world.marks[id].touches).sum::<u32>();
        let uses = touches(&world);
        let mut pass = Pass::default();
        while let Some((id, _)) = world.victim_of(&mut pass) {
            assert!(!world.marks[&id].unfit, "{kind} VMEM_SEED={seed}");
            world.remove(id);
        }
        assert_eq!(stays(&world), before, "{kind} VMEM_SEED={seed}");
        assert_eq!(touches(&world), uses, "{kind} VMEM_SEED={seed}");
        assert_eq!(world.marks.len(), before.len(), "{kind}: all others went VMEM_SEED={seed}");
    }
}

/// A pass for what is cold does not ask what is known to be hot.
#[test]
fn an_lru_pass_for_the_cold_ends_at_the_hot() {
    let mut policy = build(PolicyKind::Lru);
    (0..10_000).for_each(|id| {
        policy.insert(Entry::new(id, id, 64));
    });
    let mut pass = Pass::colder_than(100);
    let mut asked = 0;
    let mut unfit = |_| {
        asked += 1;
        vmem_core::policy::Probe::Unfit
    };
    while policy.victim(&mut pass, &mut unfit) == Pick::Retry {}
    assert_eq!(asked, 100);
}
