//! A look for victims.
//!
//! Invariant: a look is one pass of the policy and ends; what it has passed over it does not ask
//! again. One that spares more than prefetches do ends where it has passed over `SPARED_MAX`. Begun
//! by the evictor once something has happened.

use super::plan::Candidate;
use super::tiers::Evicting;
use crate::object::Shared;
use crate::policy::{Pass, Pick, Probe};

/// What a look passes over for a request that does without rather than wait.
const SPARED_MAX: usize = 1024;

/// A look for victims, over several turns.
#[derive(Debug, Default)]
pub(super) struct Look {
    pass: Pass,
    /// What is not to go; where nothing is spared, none.
    pub(super) spares: Option<Spares>,
    /// It has met an object that the disk has no space for: clean ones can still be evicted.
    pub(super) clean_only: bool,
    /// Nothing is written for a while: only what needs no write can be evicted.
    writes_nothing: bool,
    /// The longest unused of what it met and spared, in nanoseconds of the store's clock.
    pub(super) spared: Option<u64>,
    /// How many it has passed over.
    passed_over: usize,
    /// It has ended.
    is_over: bool,
    /// Moves within the tier that it has made.
    pub(super) compactions: usize,
    /// Neighbours could not go.
    pub(super) neighbours_stay: bool,
    /// The policy has not seen all accesses.
    pub(super) is_hurried: bool,
}

/// What a look spares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spares {
    /// What was used at this stamp or later, in nanoseconds of the store's clock.
    pub(super) since: u64,
    /// What was prefetched and not used yet, too.
    pub(super) unused: bool,
}

impl Spares {
    /// Whether a look that spares this sees the same objects as one that spares `other`. For
    /// prefetches the time moves a little with each reckoning.
    fn is_like(&self, other: &Spares) -> bool {
        self.unused == other.unused && (!self.unused || self.since == other.since)
    }
}

impl Look {
    /// From now on it spares this, or nothing; if that is new it begins at the cold end again.
    pub(super) fn spare(&mut self, spares: Option<Spares>) {
        let is_old = match (&self.spares, &spares) {
            (Some(before), Some(now)) => before.is_like(now),
            (before, now) => before.is_none() && now.is_none(),
        };
        if !is_old {
            let pass = spares.map_or_else(Pass::default, |spares| Pass::colder_than(spares.since));
            let before = std::mem::take(self);
            *self = Look { pass, spares, passed_over: 0, is_over: false, ..before };
        }
    }

    /// Nothing is written from now on.
    pub(super) fn rest(&mut self) {
        self.clean_only = true;
        self.writes_nothing = true;
    }

    /// The next victim of the policy, if a bounded look finds one.
    pub(super) fn next<T: Evicting>(&mut self, tier: &T, shared: &Shared) -> Candidate {
        if self.is_over {
            return Candidate::End;
        }
        let Look { pass, clean_only, writes_nothing, spared, spares, passed_over, .. } = self;
        let spared_since = spares.map_or(u64::MAX, |spares| spares.since);
        let mut ask = |id| {
            let Some(object) = shared.find(id) else { return Probe::Gone };
            let needs_space = *clean_only && tier.needs_space_below(&object);
            if needs_space || *writes_nothing && tier.is_written_first(&object) {
                return Probe::Unfit;
            }
            if spares.is_some_and(|spares| tier.is_spared(&object, spares)) {
                return Probe::Unfit;
            }
            let probe = tier.probe(&object, spared_since);
            if probe == Probe::Unfit {
                *spared = spared.iter().copied().chain([object.stamp()]).min();
            }
            probe
        };
        let pick = tier.state(shared).order.lock().victim(pass, &mut |id| {
            let probe = ask(id);
            *passed_over += usize::from(probe == Probe::Unfit);
            probe
        });
        let does_without = self.spares.is_some_and(|spares| spares.unused);
        self.is_over =
            does_without && self.passed_over >= SPARED_MAX && !crate::planted!("look-unbounded");
        match pick {
            Pick::Victim { id, hurried } => {
                self.is_hurried |= hurried;
                let found = shared.find(id).map(|object| tier.victim(&object));
                found.map_or(Candidate::Again, Candidate::Object)
            }
            Pick::Retry => {
                self.is_hurried = true;
                Candidate::Again
            }
            Pick::Empty => {
                self.is_over = true;
                Candidate::End
            }
        }
    }
}
