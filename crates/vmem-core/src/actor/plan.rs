//! What leaves a tier: decided here, carried out elsewhere.
//!
//! Invariant: pure. A plan always ends; it frees at most what is asked for plus the last object
//! that it takes, or plus the neighbours of one that need to go with it; its cost is bounded by its
//! own length and by `TRIES_MAX` looks, never by how many objects there are. Where nothing can go
//! it says why. Called by the evictor of each tier.

use super::evict::{BATCH_BYTES, BATCH_OBJECTS};
use crate::tier::{Wanted, Watermarks};

/// Candidates that one plan looks at.
pub(super) const TRIES_MAX: usize = 1024;

/// How a tier stands. Bytes are footprints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Situation {
    pub(super) wanted: Wanted,
    pub(super) capacity_bytes: u64,
    pub(super) used_bytes: u64,
    /// The bytes that are leaving already.
    pub(super) leaving_bytes: u64,
    pub(super) marks: Watermarks,
    /// The high watermark was crossed and the low one not reached yet.
    pub(super) is_above_mark: bool,
}

impl Situation {
    /// Bytes to take out of the tier beyond what is already going.
    pub(super) fn deficit_bytes(&self) -> u64 {
        let Situation { wanted, marks, .. } = self;
        let free = self.capacity_bytes.saturating_sub(self.used_bytes);
        let mut deficit = wanted.demand_bytes.min(self.capacity_bytes).saturating_sub(free);
        if wanted.demand_bytes > 0 && wanted.scattered {
            deficit = deficit.max(1);
        }
        if wanted.demand_bytes == 0 && wanted.prefetch_bytes > 0 {
            let space = marks.high_bytes.saturating_sub(self.used_bytes);
            let next = wanted.prefetch_bytes.min(BATCH_BYTES.max(wanted.smallest_prefetch));
            deficit = next.saturating_sub(space);
            if wanted.prefetch_scattered {
                deficit = deficit.max(wanted.smallest_prefetch);
            }
        }
        if self.is_above_mark {
            deficit = deficit.max(self.used_bytes.saturating_sub(marks.low_bytes));
        }
        deficit.saturating_sub(self.leaving_bytes)
    }

    /// Whether early eviction is under way after this, if it was before.
    pub(super) fn is_still_above(&self) -> bool {
        let Watermarks { low_bytes, high_bytes } = self.marks;
        let staying = self.used_bytes.saturating_sub(self.leaving_bytes);
        self.used_bytes > high_bytes || self.is_above_mark && staying > low_bytes
    }

    /// Whether objects in use stay, since only prefetches wait for space.
    pub(super) fn spares_hot(&self) -> bool {
        self.wanted.demand_bytes == 0 && !self.is_above_mark
    }
}

/// What a look for a victim came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Candidate {
    Object(Victim),
    /// The bound of the policy on its own work was reached: look again.
    Again,
    /// Everything was looked at.
    End,
}

/// An object that could go. Bytes are footprints, but for the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Victim {
    pub(super) id: u64,
    pub(super) footprint: u64,
    /// What has to be written first; none if it can be dropped.
    pub(super) payload: Option<u64>,
}

/// Why a plan takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It frees what was asked for, or one batch of writes is full.
    Enough,
    /// The bound on looks was reached: the rest is for the next plan.
    Bound,
    /// There is nothing more that could go.
    Nothing,
}

/// What leaves, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) victims: Vec<Victim>,
    pub(super) stop: Stop,
}

/// Plans to free `target` bytes. Those of `neighbours` go together, all of them, before any other:
/// free space that lies in pieces becomes usable that way alone.
pub(super) fn plan(
    target: u64,
    neighbours: Vec<Victim>,
    look: &mut dyn FnMut() -> Candidate,
) -> Plan {
    let mut payload: u64 = neighbours.iter().filter_map(|victim| victim.payload).sum();
    let mut frees: u64 = neighbours.iter().map(|victim| victim.footprint).sum();
    let mut victims = neighbours;
    for _ in 0..TRIES_MAX {
        if frees >= target || payload >= BATCH_BYTES || victims.len() >= BATCH_OBJECTS {
            return Plan { victims, stop: Stop::Enough };
        }
        match look() {
            Candidate::Object(victim) => {
                frees += victim.footprint;
                payload += victim.payload.unwrap_or(0);
                victims.push(victim);
            }
            Candidate::Again => {}
            Candidate::End => return Plan { victims, stop: Stop::Nothing },
        }
    }
    Plan { victims, stop: Stop::Bound }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn situation(random: &mut SmallRng) -> Situation {
        let capacity_bytes = random.random_range(1..1 << 24);
        let high_bytes = random.random_range(0..=capacity_bytes);
        let demand_bytes = if random.random() { random.random_range(0..1 << 25) } else { 0 };
        let prefetch_bytes = if demand_bytes == 0 { random.random_range(0..1 << 22) } else { 0 };
        let wanted = Wanted {
            demand_bytes,
            prefetch_bytes,
            smallest_prefetch: prefetch_bytes / 2,
            scattered: random.random(),
            ..Wanted::default()
        };
        Situation {
            wanted,
            capacity_bytes,
            used_bytes: random.random_range(0..=capacity_bytes),
            leaving_bytes: random.random_range(0..=capacity_bytes / 4),
            marks: Watermarks { low_bytes: random.random_range(0..=high_bytes), high_bytes },
            is_above_mark: random.random(),
        }
    }

    fn candidates(random: &mut SmallRng) -> Vec<Candidate> {
        let objects = random.random_range(0..3000);
        let one = |id| match random.random_range(0..4) {
            0 => Candidate::Again,
            _ => {
                let footprint = random.random_range(1..1 << 18);
                let payload = random.random::<bool>().then_some(footprint);
                Candidate::Object(Victim { id, footprint, payload })
            }
        };
        (0..objects).map(one).collect()
    }

    #[test]
    fn plans_end_and_take_no_more_than_is_needed() {
        let mut random = SmallRng::seed_from_u64(11);
        for _ in 0..2000 {
            let target = situation(&mut random).deficit_bytes();
            let mut rest = candidates(&mut random).into_iter();
            let mut looks = 0;
            let Plan { victims, stop } = plan(target, Vec::new(), &mut || {
                looks += 1;
                rest.next().unwrap_or(Candidate::End)
            });
            assert!(looks <= TRIES_MAX, "the cost is bounded");
            let frees: u64 = victims.iter().map(|victim| victim.footprint).sum();
            let last = victims.last().map_or(0, |victim| victim.footprint);
            assert!(victims.is_empty() || frees - last < target, "more than is needed");
            let payload: u64 = victims.iter().filter_map(|victim| victim.payload).sum();
            match stop {
                Stop::Enough => assert!(
                    frees >= target || payload >= BATCH_BYTES || victims.len() >= BATCH_OBJECTS
                ),
                Stop::Bound => assert_eq!(looks, TRIES_MAX),
                Stop::Nothing => assert_eq!(rest.next(), None, "it stops before the end"),
            }
        }
    }

    #[test]
    fn neighbours_go_first_and_together() {
        let victim = |id| Victim { id, footprint: 100, payload: None };
        let neighbours = vec![victim(7), victim(8), victim(9)];
        let mut looks = 0;
        let planned = plan(150, neighbours.clone(), &mut || {
            looks += 1;
            Candidate::Object(victim(looks))
        });
        assert_eq!(planned, Plan { victims: neighbours, stop: Stop::Enough });
        assert_eq!(looks, 0, "nothing else goes with them");
    }

    #[test]
    fn deficits_never_exceed_what_is_used_or_what_is_wanted() {
        let mut random = SmallRng::seed_from_u64(12);
        for _ in 0..10_000 {
            let situation = situation(&mut random);
            let deficit = situation.deficit_bytes();
            let wanted = situation.wanted.demand_bytes + situation.wanted.prefetch_bytes;
            let early = situation.used_bytes.saturating_sub(situation.marks.low_bytes);
            assert!(deficit <= wanted.max(early).max(1), "{situation:?}");
            let full = Situation { leaving_bytes: u64::MAX, ..situation };
            assert_eq!(full.deficit_bytes(), 0, "what is leaving is not taken twice");
        }
    }
}
