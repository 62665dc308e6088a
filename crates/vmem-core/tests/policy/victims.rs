//! Scenario 22 for the order itself: pins, touches, removals and re-inserts at random.
//! Single-threaded and settled, the victims are those of a reference that sees everything.

use std::collections::HashSet;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::PolicyKind;
use vmem_core::policy::build;

use crate::reference::{Reference, State, reference};
use crate::seeds;
use crate::world::World;

/// When background work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settle {
    AfterEachStep,
    /// At random; that is exact too, as long as there are no more entries than steps of a look.
    Sometimes,
}

struct Pair {
    world: World,
    reference: Box<dyn Reference>,
    ids: u64,
    settle: Settle,
}

impl Pair {
    fn states(&self) -> impl Fn(u64) -> State + use<> {
        let marks = self.world.marks.clone();
        move |id| match marks[&id] {
            mark if mark.pinned => State::Pinned,
            mark if mark.busy => State::Busy,
            mark if mark.unfit => State::Unfit,
            _ => State::Free,
        }
    }

    fn settle(&mut self) {
        while self.world.settle(7) {}
        let found = std::mem::take(&mut self.world.met_busy);
        self.reference.found_busy(&found);
    }

    /// Both find the same victim, which goes, or is left where it is.
    fn victim(&mut self, goes: bool) -> Result<(), String> {
        let expected = self.reference.victim(&self.states());
        let found = self.world.victim();
        if found.map(|(id, _)| id) != expected {
            return Err(format!("victim {found:?}, the reference says {expected:?}"));
        }
        self.check_busy(expected)?;
        match found {
            Some((_, true)) if self.settle == Settle::AfterEachStep => {
                return Err("hurried, although settled".into());
            }
            Some((id, _)) if goes => {
                self.world.remove(id);
                self.reference.remove(id);
            }
            _ => {}
        }
        Ok(())
    }

    /// All busy ones that are colder than the victim must have been found, each once. An order that
    /// learns of accesses late may find more of them; they are in use as well.
    fn check_busy(&mut self, victim: Option<u64>) -> Result<(), String> {
        let found = std::mem::take(&mut self.world.met_busy);
        let state = self.states();
        let is_busy = |id: &u64| state(*id) == State::Busy;
        let Some(colder) = self.reference.colder_than(victim) else { return Ok(()) };
        let missed = colder.into_iter().filter(is_busy).filter(|id| !found.contains(id));
        let missed: Vec<u64> = missed.collect();
        let once: HashSet<u64> = found.iter().copied().collect();
        if !missed.is_empty() || once.len() < found.len() {
            return Err(format!("found {found:?} busy, and missed {missed:?}"));
        }
        self.reference.found_busy(&found);
        Ok(())
    }

    fn step(&mut self, rng: &mut SmallRng) -> Result<(), String> {
        let id = rng.random_range(0..self.ids);
        let known = self.world.marks.get(&id).copied();
        match (rng.random_range(0..20), known) {
            (0..=15, None) => {
                let footprint = 64 * rng.random_range(1..100);
                self.world.insert(id, footprint);
                self.reference.insert(id, footprint);
            }
            (0..=7, Some(_)) => {
                self.world.touch(id);
                self.reference.touch(id);
            }
            (8, Some(_)) => {
                self.world.remove(id);
                self.reference.remove(id);
            }
            (9..=10, Some(mark)) if !mark.pinned => self.world.pin(id),
            (9..=12, Some(mark)) if mark.pinned => {
                self.world.unpin(id);
                self.reference.unpin(id);
            }
            (11..=12, Some(mark)) => self.world.set_busy(id, !mark.busy),
            (13..=14, Some(mark)) => self.world.set_unfit(id, !mark.unfit),
            (15, _) if self.settle == Settle::Sometimes => self.settle(),
            (roll, _) => self.victim(roll > 16)?,
        }
        if self.settle == Settle::AfterEachStep {
            self.settle();
        }
        let ours = self.world.policy.len();
        let theirs = self.reference.len();
        if ours == theirs { Ok(()) } else { Err(format!("{ours} entries, not {theirs}")) }
    }
}

fn compare(kind: PolicyKind, settle: Settle, sequences: u64, ids_max: u64) {
    for seed in seeds(sequences) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let ids = rng.random_range(1..=ids_max);
        let world = World::new(build(kind));
        let mut pair = Pair { world, reference: reference(kind), ids, settle };
        for step in 0..250 {
            if let Err(difference) = pair.step(&mut rng) {
                panic!("{kind}, {settle:?}, step {step}: {difference}; VMEM_SEED={seed}");
            }
        }
    }
}

#[test]
fn lru_victims_equal_those_of_the_reference_when_settled() {
    compare(PolicyKind::Lru, Settle::AfterEachStep, 1_000, 200);
}

#[test]
fn lru_of_few_entries_settled_or_not() {
    compare(PolicyKind::Lru, Settle::Sometimes, 2_000, 30);
}

#[test]
fn sieve_victims_equal_those_of_the_reference_always() {
    compare(PolicyKind::Sieve, Settle::Sometimes, 1_500, 120);
}

#[test]
fn s3_fifo_always() {
    compare(PolicyKind::S3Fifo, Settle::Sometimes, 1_500, 120);
}
