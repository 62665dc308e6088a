//! A look for victims.
//!
//! Invariant: a look is one pass of the policy and ends; what it has passed over it does not ask
//! again. Begun by the evictor once something has happened.

use super::plan::Candidate;
use super::tiers::Evicting;
use crate::object::Shared;
use crate::policy::{Pass, Pick, Probe};

/// A look for victims, over several turns.
#[derive(Debug, Default)]
pub(super) struct Look {
    pass: Pass,
    /// What was used since is not to go; where nothing is spared, none.
    pub(super) spared_since: Option<u64>,
    /// It has met an object that the disk has no space for: clean ones can still be evicted.
    pub(super) clean_only: bool,
    /// Nothing is written for a while: only what needs no write can be evicted.
    writes_nothing: bool,
    /// The longest unused of what it met and spared, in nanoseconds of the store's clock.
    pub(super) spared: Option<u64>,
    /// It has ended.
    is_over: bool,
    /// Moves within the tier that it has made.
    pub(super) compactions: usize,
    /// Neighbours could not go.
    pub(super) neighbours_stay: bool,
    /// The policy has not seen all accesses.
    pub(super) is_hurried: bool,
}

impl Look {
    /// From now on it spares what was used since, or nothing; if that is new it begins at the cold
    /// end again.
    pub(super) fn spare(&mut self, since: Option<u64>) {
        if self.spared_since.is_some() != since.is_some() {
            let pass = since.map_or_else(Pass::default, Pass::colder_than);
            let before = std::mem::take(self);
            *self = Look { pass, spared_since: since, is_over: false, ..before };
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
        let Look { pass, clean_only, writes_nothing, spared, .. } = self;
        let spared_since = self.spared_since.unwrap_or(u64::MAX);
        let pick = tier.state(shared).order.lock().victim(pass, &mut |id| {
            let Some(object) = shared.find(id) else { return Probe::Gone };
            let needs_space = *clean_only && tier.needs_space_below(&object);
            if needs_space || *writes_nothing && tier.is_written_first(&object) {
                return Probe::Unfit;
            }
            let probe = tier.probe(&object, spared_since);
            if probe == Probe::Unfit {
                *spared = spared.iter().copied().chain([object.stamp()]).min();
            }
            probe
        });
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
