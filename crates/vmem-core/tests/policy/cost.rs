//! What a look costs, counted in answers asked for, and what an entry costs, in bytes.

use std::hint::black_box;
use std::time::Instant;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vmem_core::PolicyKind;
use vmem_core::policy::{
    Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token, VICTIM_STEPS_MAX, build,
};

use crate::{KINDS, seeds};

/// Objects by number, without a map in the way.
struct Dense {
    policy: Box<dyn Policy>,
    stamps: Vec<u64>,
    touches: Vec<u32>,
    tokens: Vec<Token>,
}

impl Dense {
    fn new(kind: PolicyKind, count: u64) -> Self {
        let mut policy = build(kind);
        let tokens = (0..count).map(|id| policy.insert(Entry::new(id, id, 64))).collect();
        let touches = vec![0; count as usize];
        Dense { policy, stamps: (0..count).collect(), touches, tokens }
    }

    /// Everything is used once more, in the order of `order`.
    fn touch_all(&mut self, order: &[u64]) {
        for (n, &id) in order.iter().enumerate() {
            self.stamps[id as usize] = (self.stamps.len() + n) as u64;
            self.touches[id as usize] = 3;
        }
    }

    fn victim(&mut self) -> (Pick, usize) {
        self.victim_of(&mut Pass::default())
    }

    fn victim_of(&mut self, pass: &mut Pass) -> (Pick, usize) {
        let mut steps = 0;
        let pick = self.policy.victim(pass, &mut |id| {
            steps += 1;
            let touches = std::mem::take(&mut self.touches[id as usize]);
            Probe::Evictable { stamp: self.stamps[id as usize], touches }
        });
        (pick, steps)
    }

    fn settle(&mut self, steps: usize) -> bool {
        self.policy.settle(steps, &mut |id| Probe::Evictable {
            stamp: self.stamps[id as usize],
            touches: 0,
        })
    }

    fn remove(&mut self, id: u64) {
        self.policy.remove(self.tokens[id as usize]);
    }
}

fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(seed));
    order
}

/// Right after everything was used again, the first victims cost what they cost among few.
#[test]
fn a_look_is_bounded_however_many_were_used_again() {
    for kind in KINDS {
        for count in [1_000, 1_000_000] {
            let mut objects = Dense::new(kind, count);
            objects.touch_all(&shuffled(count, 1));
            let mut since = 0;
            let mut found = 0;
            let mut pass = Pass::default();
            while found < 20 {
                let (pick, steps) = objects.victim_of(&mut pass);
                assert!(steps <= STEPS_MAX, "{kind}: {steps} steps among {count}");
                since += steps;
                let bound = if kind == PolicyKind::Lru { STEPS_MAX } else { VICTIM_STEPS_MAX };
                assert!(since <= bound, "{kind}: {since} steps for one victim among {count}");
                if let Pick::Victim { id, .. } = pick {
                    objects.remove(id);
                    (since, found) = (0, found + 1);
                }
            }
        }
    }
}

/// Before the order has caught up, a victim is old if not the oldest; after, it is the oldest.
#[test]
fn lru_in_a_hurry_is_close_and_catches_up() {
    const COUNT: u64 = 100_000;
    for seed in seeds(3) {
        let mut objects = Dense::new(PolicyKind::Lru, COUNT);
        objects.touch_all(&shuffled(COUNT, seed));
        let mut ages = 0;
        for _ in 0..200 {
            let (Pick::Victim { id, hurried }, _) = objects.victim() else { panic!("no victim") };
            assert!(hurried, "VMEM_SEED={seed}");
            ages += objects.stamps[id as usize] - COUNT;
            objects.remove(id);
            objects.stamps[id as usize] = u64::MAX;
        }
        let mean = ages as f64 / 200.0 / COUNT as f64;
        println!("mean age rank of a hurried victim: {mean:.4} (0 is the oldest)");
        assert!(mean < 0.03, "{mean} VMEM_SEED={seed}");

        let mut slices = 0;
        while objects.settle(1_000) {
            slices += 1;
        }
        assert!(slices <= COUNT / 1_000, "one lap, not {slices} slices VMEM_SEED={seed}");
        let mut left: Vec<u64> = (0..COUNT).collect();
        left.sort_by_key(|&id| objects.stamps[id as usize]);
        for &oldest in &left[..1_000] {
            let (pick, steps) = objects.victim();
            assert_eq!(pick, Pick::Victim { id: oldest, hurried: false }, "VMEM_SEED={seed}");
            assert_eq!(steps, 1);
            objects.remove(oldest);
        }
    }
}

#[test]
fn the_coldest_come_in_order_and_stay() {
    let mut rng = SmallRng::seed_from_u64(3);
    let mut policy = build(PolicyKind::Lru);
    let mut stamps: Vec<(u64, u64)> =
        (0..5_000).map(|id| (rng.random_range(0..u64::MAX), id)).collect();
    for &(stamp, id) in &stamps {
        policy.insert(Entry::new(id, stamp, 64));
    }
    stamps.sort_unstable();
    for limit in [0, 1, 2, 300, 5_000, usize::MAX] {
        let mut seen = Vec::new();
        policy.coldest(limit, &mut |id| seen.push(id));
        let expected: Vec<u64> = stamps.iter().take(limit).map(|&(_, id)| id).collect();
        assert_eq!(seen, expected, "the coldest {limit}");
    }
}

#[test]
fn an_entry_has_at_most_64_bytes() {
    // The worst of all sizes around: a table that doubles would have twice that here.
    for (kind, count) in KINDS.into_iter().flat_map(|kind| [(kind, 1_000_000), (kind, 1_048_577)]) {
        let objects = Dense::new(kind, count);
        let bytes = objects.policy.memory_bytes() as f64 / count as f64;
        println!("{kind}, {count} entries: {bytes:.1} bytes each");
        assert!(bytes <= 64.0, "{kind}: {bytes}");
    }
}

/// Allocating and freeing leaves nothing behind, with and without evictions.
#[test]
fn memory_follows_what_is_there() {
    for kind in KINDS {
        let mut policy = build(kind);
        let kept: Vec<Token> = (0..1_000).map(|id| policy.insert(Entry::new(id, id, 64))).collect();
        let mut high = 0;
        for id in 1_000..201_000 {
            let token = policy.insert(Entry::new(id, id, 64));
            if id % 2 == 0 {
                // Named and taken, as the evictor does.
                let only = |at| {
                    if at == id {
                        Probe::Evictable { stamp: id, touches: 0 }
                    } else {
                        Probe::Pinned
                    }
                };
                let mut pass = Pass::default();
                while policy.victim(&mut pass, &mut { only }) == Pick::Retry {}
            }
            policy.remove(token);
            if id == 51_000 {
                high = policy.memory_bytes();
            }
        }
        // A hash index may double once more, late; what stays behind would be twenty times this.
        let now = policy.memory_bytes();
        assert!(now <= high + high / 2, "{kind}: {now} bytes after {high}");
        assert_eq!(policy.len(), 1_000);
        kept.into_iter().for_each(|token| policy.remove(token));
        assert!(policy.is_empty());

        let tokens: Vec<Token> =
            (0..100_000).map(|id| policy.insert(Entry::new(id, id, 64))).collect();
        let full = policy.memory_bytes();
        tokens.into_iter().for_each(|token| policy.remove(token));
        assert!(policy.memory_bytes() < full / 10, "{kind}: an empty policy gives memory back");
    }
}

/// Not a test: times of a release build. `cargo test --release -p vmem-core --test policy --
/// --ignored --nocapture times_of_each_policy`
#[test]
#[ignore = "prints times"]
fn times_of_each_policy() {
    for kind in KINDS {
        for count in [1_000, 1_000_000, 10_000_000] {
            let mut objects = Dense::new(kind, count);
            let rounds = 1_000_000;
            let per_op = |start: Instant| start.elapsed().as_nanos() as u64 / rounds;

            let mut rng = SmallRng::seed_from_u64(1);
            let start = Instant::now();
            for now in 0..rounds {
                let id = rng.random_range(0..count) as usize;
                objects.policy.remove(objects.tokens[id]);
                objects.tokens[id] = objects.policy.insert(Entry::new(id as u64, count + now, 64));
            }
            let random = per_op(start);

            let mut objects = Dense::new(kind, count);
            let start = Instant::now();
            for now in 0..rounds {
                let (Pick::Victim { id, .. }, _) = objects.victim() else { continue };
                objects.remove(id);
                objects.stamps[id as usize] = count + now;
                objects.tokens[id as usize] =
                    objects.policy.insert(Entry::new(id, count + now, 64));
            }
            let churn = per_op(start);

            let mut objects = Dense::new(kind, count);
            objects.touch_all(&shuffled(count, 1));
            let start = Instant::now();
            let first = black_box(objects.victim());
            let first_us = start.elapsed().as_micros();
            let start = Instant::now();
            let mut slices = 1;
            while objects.settle(1_024) {
                slices += 1;
            }
            let slice_us = start.elapsed().as_micros() / slices;
            println!(
                "{kind} {count}: remove + insert {random} ns, victim + remove + insert {churn} ns; \
                 used again: first look {first_us} us ({} steps), slice {slice_us} us",
                first.1
            );
        }
    }
}
