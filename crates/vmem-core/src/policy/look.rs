//! What the looks for victims have in common: when to say that all is busy, and when to stop.
//!
//! Invariant: a run of busy answers as long as there are entries is a run over all of them, since a
//! policy files a busy entry behind the others. Pure;
//! called by the policies.

use super::{PATIENCE_STEPS, Probe};

/// The looks since the last victim.
#[derive(Debug, Default)]
pub(super) struct Look {
    steps: usize,
    /// Busy answers since any other one.
    busy_run: usize,
}

impl Look {
    /// One step, answered so. Pinned entries leave the order, so they do not end a run.
    pub(super) fn answered(&mut self, answer: Probe) {
        self.steps += 1;
        match answer {
            Probe::Busy { .. } => self.busy_run += 1,
            Probe::Evictable { .. } => self.busy_run = 0,
            Probe::Pinned | Probe::Gone => {}
        }
    }

    /// Whether by now all the `entries` that are left have said that they are busy.
    pub(super) fn is_all_busy(&mut self, entries: usize) -> bool {
        let all_busy = self.busy_run >= entries;
        if all_busy {
            self.is_over();
        }
        all_busy
    }

    /// A victim was found, or there is none.
    pub(super) fn is_over(&mut self) {
        *self = Look::default();
    }

    /// An entry came that was not asked.
    pub(super) fn entry_came(&mut self) {
        self.busy_run = 0;
    }

    /// Whether the next best has to do.
    pub(super) fn is_long(&self) -> bool {
        self.steps >= PATIENCE_STEPS
    }
}

/// The candidate of a look that may have to do: the least by `R`, the first among equals.
#[derive(Debug)]
pub(super) struct Least<R>(Option<(R, u64)>);

impl<R: Ord + Copy> Least<R> {
    pub(super) fn new() -> Self {
        Least(None)
    }

    pub(super) fn offer(&mut self, rank: R, id: u64) {
        if self.0.is_none_or(|(least, _)| rank < least) {
            self.0 = Some((rank, id));
        }
    }

    pub(super) fn id(&self) -> Option<u64> {
        self.0.map(|(_, id)| id)
    }
}
