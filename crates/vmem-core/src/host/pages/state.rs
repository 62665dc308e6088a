//! The ledger of the pages, under one lock.
//!
//! Invariant: that of `pages`. Called by it alone.

use std::collections::BTreeSet;
use std::ops::Range;

use super::super::slabs::Slabs;
use crate::ranges::{End, Ranges};

/// Kept runs that one look passes by because copies use them.
const LOOKS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) fresh: Ranges,
    pub(super) kept: Ranges,
    pub(super) live: u64,
    /// Pages that are being given back; they count as kept until that is done.
    pub(super) leaving: u64,
    pub(super) leaving_runs: Ranges,
    /// Lots that the unregistering thread was given and has not finished.
    pub(super) unregistering: usize,
    /// An allocation gave up waiting for that thread, which has not caught up since.
    pub(super) slow: bool,
    /// None without a device.
    pub(super) slabs: Option<Slabs>,
    /// Whether a request found no space because copies use what could have been given back.
    pub(super) starved: bool,
}

impl State {
    pub(super) fn check(&self, capacity: u64) {
        let physical = self.live + self.kept.total() + self.leaving;
        assert!(physical <= capacity, "{physical} pages of a budget of {capacity}");
        assert!(self.leaving == self.leaving_runs.total(), "pages leave that are not counted");
    }
}

pub(super) enum Plan {
    Take(Range<u64>),
    /// These have to be given back first.
    GiveBack(Leaving),
    NoSpace,
}

/// Pages that are being given back to the system.
#[derive(Debug, Default)]
pub(in super::super) struct Leaving {
    /// With their slabs, where there are slabs.
    pub(super) runs: Vec<(Range<u64>, u64)>,
    /// The slabs among them that are registered.
    pub(super) unregister: BTreeSet<u64>,
}

/// What of object space a copy touches: bytes of the mapping, the slab that they are in, and
/// whether that is registered.
pub(in super::super) type Entered = (Range<usize>, Option<u64>, bool);

impl State {
    /// Chooses kept pages that are to be given back, at most `left`: of slabs that no device knows,
    /// or of those that one knows and no copy uses.
    pub(super) fn choose(&mut self, left: &mut u64, registered: bool, leaving: &mut Leaving) {
        let mut aside = Vec::new();
        let mut useless = 0;
        while *left > 0
            && useless < LOOKS_MAX
            && let Some(run) = self.kept.take_longest()
        {
            let before = *left;
            for (slab, pages) in self.split(run) {
                let len = (pages.end - pages.start).min(*left);
                if len == 0 || !self.may_leave(slab, registered, leaving) {
                    aside.push(pages);
                    continue;
                }
                aside.push(pages.start + len..pages.end);
                *left -= len;
                self.leave(slab, pages.start..pages.start + len, leaving);
            }
            useless += usize::from(before == *left);
        }
        aside.into_iter().for_each(|run| self.kept.add(run));
    }

    /// Chooses which pages of a run that was put back go to the system at once, because enough are
    /// kept: those that no device has registered. Registered slabs stay until their pages are
    /// needed elsewhere: a driver unregisters only once the device is idle, for which a thread that
    /// frees memory must not wait, and the next copies would go by the detour until the slab is
    /// registered anew.
    pub(super) fn let_go(&mut self, run: Range<u64>, kept_max: u64) -> Leaving {
        let mut leaving = Leaving::default();
        for (slab, pages) in self.split(run) {
            let may = self.may_leave(slab, false, &leaving) && self.kept.total() > kept_max;
            if may && self.kept.take_exact(&pages) {
                self.leave(slab, pages, &mut leaving);
            }
        }
        leaving
    }

    pub(super) fn may_leave(&self, slab: u64, registered: bool, leaving: &Leaving) -> bool {
        let Some(slabs) = &self.slabs else { return true };
        let chosen = || leaving.unregister.contains(&slab);
        slabs.is_plain(slab) || (registered && (slabs.is_idle(slab) || chosen()))
    }

    /// Marks pages that are no longer kept as leaving.
    pub(super) fn leave(&mut self, slab: u64, pages: Range<u64>, leaving: &mut Leaving) {
        if let Some(slabs) = &mut self.slabs {
            if slabs.is_idle(slab) {
                slabs.change(slab);
                leaving.unregister.insert(slab);
            } else if slabs.is_plain(slab) {
                // What was copied of it was of other pages.
                slabs.plain(slab);
            }
        }
        self.leaving += pages.end - pages.start;
        assert!(!self.fresh.touches(&pages), "only pages with memory can lose it");
        self.leaving_runs.add(pages.clone());
        leaving.runs.push((pages, slab));
    }

    pub(super) fn split(&self, run: Range<u64>) -> Vec<(u64, Range<u64>)> {
        match &self.slabs {
            Some(slabs) => slabs.split(run).collect(),
            None => vec![(0, run)],
        }
    }

    /// Whether each of these pages has memory, and none is about to lose it.
    pub(super) fn has_memory(&self, pages: &Range<u64>) -> bool {
        !self.fresh.touches(pages) && !self.leaving_runs.touches(pages)
    }

    /// Takes `len` pages within the budget of `capacity`, or says what has to be given back for
    /// that.
    pub(super) fn plan(&mut self, len: u64, capacity: u64) -> Plan {
        if let Some(run) = self.kept.take(len, End::Low) {
            self.live += len;
            self.check(capacity);
            return Plan::Take(run);
        }
        if self.live + self.leaving + len > capacity {
            self.starved |= self.leaving > 0;
            return Plan::NoSpace;
        }
        let physical = self.live + self.kept.total() + self.leaving;
        let over = (physical + len).saturating_sub(capacity);
        if over == 0 {
            let Some(run) = self.fresh.take(len, End::Low) else { return Plan::NoSpace };
            self.live += len;
            self.check(capacity);
            return Plan::Take(run);
        }
        if self.slow && self.leaving >= over {
            // The pages that are leaving suffice.
            self.starved = true;
            return Plan::NoSpace;
        }
        let mut leaving = Leaving::default();
        let mut left = over;
        for registered in [false, true] {
            self.choose(&mut left, registered, &mut leaving);
        }
        if leaving.runs.is_empty() {
            self.starved |= self.kept.total() > 0;
            return Plan::NoSpace;
        }
        Plan::GiveBack(leaving)
    }
}
