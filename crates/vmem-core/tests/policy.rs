//! The policies against references that are told of every access, and at their cost.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{HashMap, HashSet, VecDeque};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem_core::PolicyKind;
use vmem_core::policy::{Pick, Policy, Probe, STEPS_MAX, Token, build};

/// What the objects of a store would say of themselves.
#[derive(Default)]
struct Objects {
    now: u64,
    marks: HashMap<u64, Mark>,
}

#[derive(Clone, Copy)]
struct Mark {
    stamp: u64,
    touches: u32,
    pinned: bool,
    token: Token,
}

impl Objects {
    fn touch(&mut self, id: u64) {
        self.now += 1;
        if let Some(mark) = self.marks.get_mut(&id) {
            (mark.stamp, mark.touches) = (self.now, mark.touches + 1);
        }
    }

    fn probe(&mut self, id: u64) -> Probe {
        let Some(mark) = self.marks.get_mut(&id) else { return Probe::Gone };
        let touches = std::mem::take(&mut mark.touches);
        if mark.pinned {
            return Probe::Pinned;
        }
        Probe::Evictable { stamp: mark.stamp, touches }
    }

    fn insert(&mut self, policy: &mut dyn Policy, id: u64) {
        self.now += 1;
        let (stamp, touches, pinned) = (self.now, 0, false);
        let token = policy.insert(id, stamp, 1);
        self.marks.insert(id, Mark { stamp, touches, pinned, token });
    }

    fn remove(&mut self, policy: &mut dyn Policy, id: u64) {
        let mark = self.marks.remove(&id).unwrap();
        policy.remove(mark.token);
    }

    /// The victim, after the policy has caught up.
    fn settled_victim(&mut self, policy: &mut dyn Policy) -> Option<u64> {
        while policy.settle(1000, &mut |id| self.probe(id)) {}
        loop {
            match policy.victim(&mut |id| self.probe(id)) {
                Pick::Victim { id, hurried } => {
                    assert!(!hurried, "settled, so not in a hurry");
                    return Some(id);
                }
                Pick::Retry => {}
                Pick::Empty => return None,
            }
        }
    }
}

fn seeds(rounds: u64) -> std::ops::Range<u64> {
    let given: Option<u64> = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    given.map_or(0..rounds, |seed| seed..seed + 1)
}

/// Scenario 22, for the order itself: pins, touches, removals and re-inserts at random; single-threaded
/// and settled, the victims are those of a list that is told of everything.
#[test]
fn lru_victims_equal_those_of_a_list() {
    for seed in seeds(300) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut policy = build(PolicyKind::Lru);
        let mut objects = Objects::default();
        let mut list: Vec<u64> = Vec::new();
        let mut pinned: HashSet<u64> = HashSet::new();
        for _ in 0..300 {
            let some = list.get(rng.random_range(0..list.len().max(1))).copied();
            match (rng.random_range(0..10), some) {
                (0..=2, _) | (_, None) => {
                    let id = rng.random_range(0..60);
                    if !list.contains(&id) {
                        objects.insert(&mut *policy, id);
                        list.push(id);
                    }
                }
                (3..=5, Some(id)) => {
                    objects.touch(id);
                    list.retain(|&other| other != id);
                    list.push(id);
                }
                (6, Some(id)) => {
                    objects.remove(&mut *policy, id);
                    list.retain(|&other| other != id);
                    pinned.remove(&id);
                }
                (7, Some(id)) => {
                    objects.marks.get_mut(&id).unwrap().pinned = true;
                    pinned.insert(id);
                }
                (8, Some(id)) => {
                    let mark = objects.marks.get_mut(&id).unwrap();
                    mark.pinned = false;
                    policy.unpark(mark.token);
                    pinned.remove(&id);
                }
                (_, Some(_)) => {
                    let expected = list.iter().find(|id| !pinned.contains(id)).copied();
                    let victim = objects.settled_victim(&mut *policy);
                    assert_eq!(victim, expected, "VMEM_SEED={seed}");
                    if let Some(id) = victim {
                        objects.remove(&mut *policy, id);
                        list.retain(|&other| other != id);
                    }
                }
            }
            assert_eq!(policy.len(), list.len(), "VMEM_SEED={seed}");
        }
    }
}

/// A cache that is told of every access, as the papers draw it.
trait Reference {
    /// Whether it was there.
    fn access(&mut self, id: u64) -> bool;
}

struct ListLru {
    capacity: usize,
    order: VecDeque<u64>,
    there: HashSet<u64>,
}

impl Reference for ListLru {
    fn access(&mut self, id: u64) -> bool {
        if self.there.contains(&id) {
            let at = self.order.iter().position(|&other| other == id).unwrap();
            self.order.remove(at);
            self.order.push_back(id);
            return true;
        }
        if self.there.len() == self.capacity {
            let victim = self.order.pop_front().unwrap();
            self.there.remove(&victim);
        }
        self.order.push_back(id);
        self.there.insert(id);
        false
    }
}

/// SIEVE with an array: index 0 is the oldest.
struct ArraySieve {
    capacity: usize,
    queue: Vec<(u64, bool)>,
    there: HashMap<u64, ()>,
    hand: usize,
}

impl Reference for ArraySieve {
    fn access(&mut self, id: u64) -> bool {
        if self.there.contains_key(&id) {
            self.queue.iter_mut().find(|entry| entry.0 == id).unwrap().1 = true;
            return true;
        }
        if self.queue.len() == self.capacity {
            while self.queue[self.hand % self.queue.len()].1 {
                let at = self.hand % self.queue.len();
                self.queue[at].1 = false;
                self.hand = (at + 1) % self.queue.len();
            }
            let at = self.hand % self.queue.len();
            let (victim, _) = self.queue.remove(at);
            self.there.remove(&victim);
            // The next newer one moved to this index; past the newest the hand starts over.
            self.hand = if at == self.queue.len() { usize::MAX } else { at };
        }
        if self.hand == usize::MAX {
            self.hand = 0;
        }
        self.queue.push((id, false));
        self.there.insert(id, ());
        false
    }
}

/// Runs a policy of ours as a cache.
fn hit_ratio_of_ours(kind: PolicyKind, capacity: usize, trace: &[u64]) -> f64 {
    let mut policy = build(kind);
    let mut objects = Objects::default();
    let mut hits = 0;
    for &id in trace {
        if objects.marks.contains_key(&id) {
            objects.touch(id);
            hits += 1;
            continue;
        }
        if objects.marks.len() == capacity {
            let victim = objects.settled_victim(&mut *policy).unwrap();
            objects.remove(&mut *policy, victim);
        }
        objects.insert(&mut *policy, id);
    }
    f64::from(hits) / trace.len() as f64
}

fn hit_ratio(reference: &mut dyn Reference, trace: &[u64]) -> f64 {
    let hits = trace.iter().filter(|&&id| reference.access(id)).count();
    hits as f64 / trace.len() as f64
}

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
    let mut next_once = 1_000_000;
    while trace.len() < len {
        trace.extend(zipf(rng, 2000, 1000));
        trace.extend(next_once..next_once + 500);
        next_once += 500;
    }
    trace
}

#[test]
fn hit_ratios_equal_those_of_the_references() {
    const CAPACITY: usize = 200;
    for seed in seeds(3) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let looped: Vec<u64> = (0..20_000).map(|n| n % 250).collect();
        for trace in [zipf(&mut rng, 2000, 20_000), with_scans(&mut rng, 20_000), looped] {
            let mut list =
                ListLru { capacity: CAPACITY, order: VecDeque::new(), there: HashSet::new() };
            let (ours, reference) = (
                hit_ratio_of_ours(PolicyKind::Lru, CAPACITY, &trace),
                hit_ratio(&mut list, &trace),
            );
            assert!((ours - reference).abs() < 1e-9, "lru {ours} {reference} VMEM_SEED={seed}");
            let mut array =
                ArraySieve { capacity: CAPACITY, queue: vec![], there: HashMap::new(), hand: 0 };
            let (ours, reference) = (
                hit_ratio_of_ours(PolicyKind::Sieve, CAPACITY, &trace),
                hit_ratio(&mut array, &trace),
            );
            assert!((ours - reference).abs() < 0.001, "sieve {ours} {reference} VMEM_SEED={seed}");
        }
    }
}

#[test]
fn the_queue_policies_beat_lru_where_much_is_used_once() {
    for seed in seeds(3) {
        let trace = with_scans(&mut SmallRng::seed_from_u64(seed), 30_000);
        let of = |kind| hit_ratio_of_ours(kind, 200, &trace);
        let (lru, sieve, s3_fifo) =
            (of(PolicyKind::Lru), of(PolicyKind::Sieve), of(PolicyKind::S3Fifo));
        println!("seed {seed}: lru {lru:.3}, sieve {sieve:.3}, s3-fifo {s3_fifo:.3}");
        assert!(sieve > lru && s3_fifo > lru, "{lru} {sieve} {s3_fifo} VMEM_SEED={seed}");
    }
}

/// Right after every object was used again, a look costs what it costs among few: counted in steps.
#[test]
fn a_look_is_bounded_however_many_were_used_again() {
    for kind in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        for count in [1_000, 200_000_u64] {
            let mut policy = build(kind);
            let mut objects = Objects::default();
            (0..count).for_each(|id| objects.insert(&mut *policy, id));
            (0..count).for_each(|id| objects.touch(id));
            for _ in 0..100 {
                let mut steps = 0;
                let pick = policy.victim(&mut |id| {
                    steps += 1;
                    objects.probe(id)
                });
                assert!(steps <= STEPS_MAX, "{kind}: {steps} steps among {count}");
                if let Pick::Victim { id, .. } = pick {
                    objects.remove(&mut *policy, id);
                }
            }
        }
    }
}

/// Allocating and freeing without any eviction leaves nothing behind.
#[test]
fn what_is_removed_is_gone() {
    for kind in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        let mut policy = build(kind);
        for id in 0..10_000 {
            let token = policy.insert(id, id, 1);
            policy.remove(token);
        }
        assert!(policy.is_empty());
        assert_eq!(policy.victim(&mut |_| Probe::Gone), Pick::Empty);
    }
}

/// What is busy goes to the warm end, so that a look does not meet it for ever.
#[test]
fn busy_objects_do_not_hide_the_others() {
    for kind in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        let mut policy = build(kind);
        for id in 0..1000 {
            let _token = policy.insert(id, id, 1);
        }
        let busy_until = 900;
        let mut looks = 0;
        loop {
            looks += 1;
            let pick = policy.victim(&mut |id| {
                if id < busy_until {
                    Probe::Busy { stamp: 10_000 + id }
                } else {
                    Probe::Evictable { stamp: id, touches: 0 }
                }
            });
            match pick {
                Pick::Victim { id, .. } => {
                    assert!(id >= busy_until);
                    break;
                }
                Pick::Retry => assert!(looks < 100, "{kind}"),
                Pick::Empty => panic!("{kind}: there are evictable ones"),
            }
        }
    }
}
