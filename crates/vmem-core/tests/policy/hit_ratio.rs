//! The policies as caches: hit ratios on skewed, scanned and looped traces (bar P11).

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::PolicyKind;
use vmem_core::policy::build;

use crate::reference::{State, reference};
use crate::world::World;
use crate::{KINDS, seeds};

const CAPACITY: usize = 400;

/// Skewed accesses to `objects` objects: object n with a weight of 1 / (n + 1).
fn zipf(rng: &mut SmallRng, objects: usize, len: usize) -> Vec<u64> {
    let mut sums = Vec::with_capacity(objects);
    let mut sum = 0.0;
    for n in 0..objects {
        sum += 1.0 / (n + 1) as f64;
        sums.push(sum);
    }
    let pick = |at: f64| sums.partition_point(|&sum| sum < at) as u64;
    (0..len).map(|_| pick(rng.random_range(0.0..sum))).collect()
}

/// Skewed accesses with runs over objects that are never used again.
fn with_scans(rng: &mut SmallRng, len: usize) -> Vec<u64> {
    let mut trace = Vec::new();
    let mut once = 1_000_000;
    while trace.len() < len {
        trace.extend(zipf(rng, 4_000, 2_000));
        trace.extend(once..once + 800);
        once += 800;
    }
    trace
}

fn looped(len: u64) -> Vec<u64> {
    (0..len).map(|n| n % (CAPACITY as u64 * 5 / 4)).collect()
}

fn ours(kind: PolicyKind, capacity: usize, settled: bool, trace: &[u64]) -> f64 {
    let mut world = World::new(build(kind));
    let mut hits = 0;
    for &id in trace {
        if world.marks.contains_key(&id) {
            hits += 1;
            world.touch(id);
            continue;
        }
        if world.marks.len() == capacity {
            while settled && world.settle(100) {}
            let (victim, _) = world.victim().unwrap();
            world.remove(victim);
        }
        world.insert(id, 1);
    }
    f64::from(hits) / trace.len() as f64
}

fn theirs(kind: PolicyKind, trace: &[u64]) -> f64 {
    let mut cache = reference(kind);
    let mut there = std::collections::HashSet::new();
    let mut hits = 0;
    for &id in trace {
        if there.contains(&id) {
            hits += 1;
            cache.touch(id);
            continue;
        }
        if there.len() == CAPACITY {
            let victim = cache.victim(&|_| State::Free).unwrap();
            cache.remove(victim);
            there.remove(&victim);
        }
        cache.insert(id, 1);
        there.insert(id);
    }
    f64::from(hits) / trace.len() as f64
}

#[test]
fn equal_those_of_the_references() {
    for seed in seeds(2) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let traces = [
            ("zipf", zipf(&mut rng, 4_000, 20_000)),
            ("scans", with_scans(&mut rng, 20_000)),
            ("loop", looped(10_000)),
        ];
        for (name, trace) in &traces {
            for kind in KINDS {
                let found = ours(kind, CAPACITY, true, trace);
                let expected = theirs(kind, trace);
                println!("seed {seed}, {name}, {kind}: {found:.4}, reference {expected:.4}");
                let differ = (found - expected).abs();
                assert!(differ < 0.001, "{name}, {kind}: {found} {expected} VMEM_SEED={seed}");
            }
        }
    }
}

#[test]
fn the_queue_policies_beat_lru_where_much_is_used_once() {
    for seed in seeds(3) {
        let trace = with_scans(&mut SmallRng::seed_from_u64(seed), 60_000);
        let of = |kind| ours(kind, CAPACITY, true, &trace);
        let [lru, sieve, s3_fifo] = KINDS.map(of);
        println!("seed {seed}: lru {lru:.3}, sieve {sieve:.3}, s3-fifo {s3_fifo:.3}");
        assert!(sieve > lru && s3_fifo > lru, "{lru} {sieve} {s3_fifo} VMEM_SEED={seed}");
    }
}

/// Background work that never runs costs next to nothing, even where a look cannot be exact.
#[test]
fn lru_that_never_settles_is_as_good() {
    for seed in seeds(2) {
        let mut rng = SmallRng::seed_from_u64(seed);
        for trace in [zipf(&mut rng, 40_000, 100_000), with_scans(&mut rng, 60_000)] {
            let [with, without] =
                [true, false].map(|settled| ours(PolicyKind::Lru, 4_000, settled, &trace));
            println!("seed {seed}: settled {with:.4}, never {without:.4}");
            assert!((with - without).abs() < 0.005, "{with} {without} VMEM_SEED={seed}");
        }
    }
}
