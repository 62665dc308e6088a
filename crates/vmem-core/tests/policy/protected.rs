//! What was prefetched and not used yet, under every policy.

use vmem_core::PolicyKind;
use vmem_core::policy::{Entry, Pass, Pick, Policy, PolicyChoice, Probe, Token};

use crate::KINDS;
use crate::contract::Fifo;
use crate::world::World;

fn choices() -> Vec<PolicyChoice> {
    let own = PolicyChoice::custom("fifo", || Box::<Fifo>::default());
    KINDS.into_iter().map(PolicyChoice::from).chain([own]).collect()
}

/// Layers of a model, used one after the other over and over, the next ones prefetched. A layer
/// that was prefetched was the first to go, since it had no use yet: S3-FIFO had none of 96 there
/// in time, SIEVE 72. What is prefetched stays until its first use.
#[test]
fn a_prefetched_layer_stays_until_its_first_use_in_a_cycle() {
    const LAYERS: u64 = 96;
    const SPACE: usize = 32;
    const PREFETCHED: u64 = 4;
    for choice in choices() {
        let mut world = World::new(choice.build(SPACE as u64));
        let mut unused = std::collections::HashSet::new();
        let bring = |world: &mut World, layer, unused: &std::collections::HashSet<u64>| {
            if world.marks.contains_key(&layer) {
                return false;
            }
            if world.marks.len() == SPACE {
                let (victim, _) = world.victim().unwrap();
                assert!(!unused.contains(&victim), "{choice}: {victim} left before its first use");
                world.remove(victim);
            }
            true
        };
        let mut missed = 0;
        for step in 0..5 * LAYERS {
            let layer = step % LAYERS;
            if bring(&mut world, layer, &unused) {
                missed += 1;
                world.insert(layer, 1);
            } else {
                world.touch(layer);
            }
            unused.remove(&layer);
            for next in (step + 1..=step + PREFETCHED).map(|next| next % LAYERS) {
                if bring(&mut world, next, &unused) {
                    world.prefetch(next, 1);
                    unused.insert(next);
                }
            }
        }
        assert_eq!(missed, 1, "{choice}: all but the first are there in time");
    }
}

/// What is prefetched and never used does not stay for good: neither more than half of the tier,
/// nor longer than one turnover of it.
#[test]
fn protection_is_bounded_in_bytes_and_in_time() {
    for choice in choices() {
        let mut world = World::new(choice.build(100));
        (0..60).for_each(|id| world.prefetch(id, 1));
        (60..100).for_each(|id| world.insert(id, 1));
        // Ten came when fifty were protected; they go as all others do.
        let mut gone: Vec<u64> = std::iter::from_fn(|| {
            let (id, _) = world.victim()?;
            world.remove(id);
            Some(id)
        })
        .collect();
        assert_eq!(gone.len(), 100, "{choice}: all can go");
        let late = gone.split_off(50);
        assert!(late.iter().all(|id| *id < 50), "{choice}: the protected ones go last");
        assert!(late.is_sorted_by(|a, b| a > b), "{choice}: the last that came goes first");

        (0..10).for_each(|id| world.prefetch(id, 1));
        (100..190).for_each(|id| world.insert(id, 1));
        let protected = world.victim().unwrap().0 >= 100;
        (190..202).for_each(|id| world.insert(id, 1));
        let goes: Vec<u64> = (0..102)
            .map(|_| {
                let (id, _) = world.victim().unwrap();
                world.remove(id);
                id
            })
            .collect();
        assert!(protected && goes.iter().any(|id| *id < 10), "{choice}: it ends with a turnover");
    }
}

/// Pins, removals and any token of the policy below leave the books right.
#[test]
fn protected_entries_are_parked_and_removed_like_others() {
    for choice in choices() {
        let mut world = World::new(choice.build(100));
        (0..10).for_each(|id| world.prefetch(id, 1));
        (10..20).for_each(|id| world.insert(id, 1));
        (0..20).for_each(|id| world.pin(id));
        assert_eq!(world.victim(), None);
        assert_eq!(world.policy.len(), 20);
        world.unpin(3);
        world.unpin(14);
        assert_eq!(world.victim().map(|(id, _)| id), Some(14), "{choice}");
        world.remove(14);
        assert_eq!(world.victim().map(|(id, _)| id), Some(3), "{choice}");
        (0..20).filter(|&id| id != 14).for_each(|id| world.remove(id));
        assert!(world.policy.is_empty(), "{choice}");
    }
}

/// First in, first out, with tokens from the end of the numbers.
#[derive(Debug, Default)]
struct HighTokens(Fifo);

impl Policy for HighTokens {
    fn insert(&mut self, entry: Entry) -> Token {
        Token::new(u32::MAX - 1 - self.0.insert(entry).position())
    }

    fn remove(&mut self, token: Token) {
        self.0.remove(Token::new(u32::MAX - 1 - token.position()));
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        self.0.victim(pass, probe)
    }

    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        self.0.settle(steps, probe)
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.0.coldest(limit, visit);
    }

    fn unpark(&mut self, token: Token) {
        self.0.unpark(Token::new(u32::MAX - 1 - token.position()));
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn memory_bytes(&self) -> usize {
        self.0.memory_bytes()
    }
}

#[test]
fn a_policy_of_ones_own_may_use_any_token() {
    let choice = PolicyChoice::custom("high", || Box::<HighTokens>::default());
    let mut world = World::new(choice.build(100));
    (0..10).for_each(|id| world.insert(id, 1));
    (10..15).for_each(|id| world.prefetch(id, 1));
    world.pin(0);
    let order = [1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 13, 12, 11, 10];
    for expected in order {
        assert_eq!(world.victim(), Some((expected, false)));
        world.remove(expected);
    }
    world.unpin(0);
    assert_eq!(world.victim(), Some((0, false)));
    world.remove(0);
    assert!(world.policy.is_empty());
}

#[test]
fn a_choice_names_what_it_builds() {
    let built_in = PolicyChoice::from(PolicyKind::S3Fifo);
    assert_eq!(
        (built_in.kind(), built_in.to_string()),
        (Some(PolicyKind::S3Fifo), "s3-fifo".into())
    );
    let own = PolicyChoice::custom("fifo", || Box::<Fifo>::default());
    assert_eq!((own.kind(), format!("{own:?}")), (None, "PolicyChoice(fifo)".into()));
    assert!(own.clone().build(1).is_empty() && own != PolicyKind::Lru);
}
