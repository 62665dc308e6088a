//! Why a look for victims found nothing, and what the waiters learn of that.
//!
//! Invariant: a waiter is refused only where no amount of waiting for the evictor would help it, or
//! where it does without. Called by the evictor once a look has ended.

use std::time::Duration;

use tokio::time::Instant;

use super::Evictor;
use crate::actor::tiers::Evicting;
use crate::object::Shared;
use crate::tier::{Class, Refused, Wanted};

/// It is looked for what has cooled down at most this often.
const COOLS_MIN: Duration = Duration::from_millis(20);

/// Why the evictor cannot help the waiters, for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stuck {
    /// Nothing can be taken but what is held or busy.
    Held,
    /// What could be taken is too hot to make way for a prefetch.
    TooHot,
    /// What could be taken finds no space below.
    FullBelow,
}

impl<T: Evicting> Evictor<T> {
    /// Why a look that has ended found nothing; and when it may be worth another one.
    pub(super) fn why_stuck(&mut self, shared: &Shared) -> Stuck {
        if self.look.clean_only {
            return Stuck::FullBelow;
        }
        let Some(spares) = self.look.spares else { return Stuck::Held };
        // What is filed as too hot is not even asked.
        let mut coldest = None;
        self.tier.state(shared).order.lock().coldest(1, &mut |id| coldest = Some(id));
        let filed = coldest.and_then(|id| shared.find(id)).map(|object| object.stamp());
        let hot = filed.filter(|&stamp| stamp >= spares.since).into_iter().chain(self.look.spared);
        let Some(stamp) = hot.min() else { return Stuck::Held };
        if let Some(cools_in) = self.tier.cools_in(shared, stamp) {
            let cools_at = Instant::now() + cools_in.max(COOLS_MIN);
            self.wakes_at = self.wakes_at.into_iter().chain([cools_at]).min();
        }
        Stuck::TooHot
    }

    /// Fails the waiters that no amount of waiting for the evictor would help, and those that do
    /// without.
    pub(super) fn refuse_hopeless(&self, shared: &Shared, wanted: &Wanted, stuck: Stuck) {
        if !wanted.any() || self.batches > 0 {
            return;
        }
        let state = self.tier.state(shared);
        state.set_blocked_by_holds(stuck == Stuck::Held);
        let is_full = stuck == Stuck::FullBelow;
        state.queue.refuse(|need, footprint| match need.class {
            Class::Demand if need.may_spill => Some(Refused::Spill),
            Class::Prefetch if need.spares_since.is_some() => Some(Refused::Spill),
            _ => is_full.then(|| Refused::Error(state.full(footprint))),
        });
    }
}
