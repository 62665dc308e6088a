//! Which pages are live, which are kept for reuse, and which were given back.
//!
//! Invariant: live pages and kept pages together are at most the budget, at every moment; asserted
//! at every change. A page is in exactly one of four places: live (somebody owns it), kept (it has
//! memory, nobody owns it), on its way back to the system (it still counts as kept), or fresh
//! (it has no memory). Called by `arena` and `spans`; takes no other lock.

use std::ops::Range;

use parking_lot::Mutex;

use super::mapping::{Mapping, PAGE_BYTES};
use super::runs::FreeRuns;

/// One part in so many of the budget may be kept for reuse.
const KEPT_PART: u64 = 8;

/// Rounds of giving kept pages back that one allocation waits for.
const GIVE_BACK_TRIES: usize = 8;

/// The pages of object space.
#[derive(Debug)]
pub(super) struct Pages {
    mapping: Mapping,
    capacity: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    fresh: FreeRuns,
    kept: FreeRuns,
    live: u64,
    /// Pages that are being given back; they count as kept until that is done.
    leaving: u64,
}

impl State {
    fn check(&self, capacity: u64) {
        let physical = self.live + self.kept.total() + self.leaving;
        assert!(physical <= capacity, "{physical} pages of a budget of {capacity}");
    }
}

enum Plan {
    Take(Range<u64>),
    /// These have to be given back first.
    GiveBack(Vec<Range<u64>>),
    NoRoom,
}

impl Pages {
    /// A budget of `capacity` pages in an address space of several times as many.
    pub(super) fn new(capacity: u64) -> std::io::Result<Self> {
        let mut factor = if cfg!(miri) { 2 } else { 8 };
        let mapping = loop {
            let pages = capacity.checked_mul(factor);
            let bytes = pages.and_then(|pages| pages.checked_mul(PAGE_BYTES as u64));
            let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
            let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            match bytes.ok_or_else(too_large).and_then(Mapping::reserve) {
                Ok(mapping) => break mapping,
                // Where address space is limited less of it has to do.
                Err(error) if factor == 1 => return Err(error),
                Err(_) => factor /= 2,
            }
        };
        let mut state = State::default();
        state.fresh.add(0..capacity * factor);
        Ok(Pages { mapping, capacity, state: Mutex::new(state) })
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// A run of `len` pages, with whatever bytes are in it.
    pub(super) fn take(&self, len: u64) -> Option<Range<u64>> {
        // What the system does not take back is kept, so giving back may not help: not for ever.
        for _ in 0..GIVE_BACK_TRIES {
            match self.plan(len) {
                Plan::Take(run) => return Some(run),
                Plan::NoRoom => return None,
                Plan::GiveBack(runs) => self.give_back(runs),
            }
        }
        None
    }

    fn plan(&self, len: u64) -> Plan {
        let mut state = self.state.lock();
        if let Some(run) = state.kept.take(len) {
            state.live += len;
            state.check(self.capacity);
            return Plan::Take(run);
        }
        if state.live + state.leaving + len > self.capacity {
            return Plan::NoRoom;
        }
        let physical = state.live + state.kept.total() + state.leaving;
        let over = (physical + len).saturating_sub(self.capacity);
        if over == 0 {
            let Some(run) = state.fresh.take(len) else { return Plan::NoRoom };
            state.live += len;
            state.check(self.capacity);
            return Plan::Take(run);
        }
        let mut runs = Vec::new();
        let mut left = over;
        while left > 0
            && let Some(run) = state.kept.take_longest(left)
        {
            left -= run.end - run.start;
            runs.push(run);
        }
        state.leaving += over - left;
        if runs.is_empty() { Plan::NoRoom } else { Plan::GiveBack(runs) }
    }

    /// Gives pages back to the system that are nobody's and are counted as leaving. Those that the
    /// system does not take stay, and count as kept.
    fn give_back(&self, runs: Vec<Range<u64>>) {
        let bytes = |page: u64| page as usize * PAGE_BYTES;
        let gone: Vec<bool> = runs
            .iter()
            .map(|run| self.mapping.give_back(bytes(run.start)..bytes(run.end)))
            .collect();
        let mut state = self.state.lock();
        for (run, gone) in runs.into_iter().zip(gone) {
            state.leaving -= run.end - run.start;
            if gone {
                state.fresh.add(run);
            } else {
                state.kept.add(run);
            }
        }
    }

    /// Takes a run back from its owner.
    pub(super) fn put(&self, run: Range<u64>) {
        let len = run.end - run.start;
        let mut state = self.state.lock();
        assert!(state.live >= len, "more pages come back than went out");
        state.live -= len;
        if state.kept.total() + len <= self.capacity / KEPT_PART {
            state.kept.add(run);
            return;
        }
        state.leaving += len;
        drop(state);
        self.give_back(vec![run]);
    }

    /// Pages that could be taken now in one run.
    pub(super) fn free_in_one_run(&self) -> u64 {
        let state = self.state.lock();
        let free = self.capacity - state.live - state.leaving;
        // What is kept joins what is fresh when it is given back, wherever it lies.
        free.min(state.fresh.longest().max(state.kept.longest()))
    }

    /// Pages that somebody owns.
    #[cfg(test)]
    pub(super) fn live(&self) -> u64 {
        self.state.lock().live
    }

    /// Pages that have memory.
    #[cfg(test)]
    pub(super) fn physical(&self) -> u64 {
        let state = self.state.lock();
        state.live + state.kept.total() + state.leaving
    }
}
