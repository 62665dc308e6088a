//! Which pages are live, which are kept for reuse, and which were given back.
//!
//! Invariant: live pages and kept pages together are at most the budget, at every moment; asserted
//! at every change. A page is in exactly one of four states: live (it has an owner), kept (it has
//! memory and no owner), leaving (it is being given back to the system, and still counts as kept),
//! or fresh (it has no memory). A page of a slab that a device has registered has memory, and is
//! not given back before the slab was unregistered. Called by `arena` and `spans`, and by `space`
//! for a device; takes no other lock.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

mod device;
mod state;

use state::{Entered, Leaving, Plan, State};

use super::mapping::{Mapping, PAGE_BYTES};
use super::slabs::{Slabs, Way};
use super::space::Registrar;

/// One part in this many of the budget may be kept for reuse.
const KEPT_PART: u64 = 8;

/// How often one allocation gives kept pages back before it fails.
const GIVE_BACK_TRIES: usize = 8;

/// How long an allocation waits for registered slabs to be given back; if the device is idle they
/// take a fraction of that.
const UNREGISTER_WAIT_MAX: Duration = Duration::from_millis(2);

/// The pages of object space.
#[derive(Debug)]
pub(super) struct Pages {
    mapping: Mapping,
    capacity: u64,
    state: Mutex<State>,
    /// The device that registers slabs, if there is one.
    registrar: OnceLock<Arc<dyn Registrar>>,
    /// Leads to the thread that gives registered slabs back, if there is one.
    unregisters: OnceLock<Sender<Leaving>>,
    /// Whether a request that found no space may find some now.
    settled: AtomicBool,
    /// Notified when the change of a slab has ended.
    changed: Condvar,
}

impl Pages {
    /// Makes a budget of `capacity` pages, in address space for several times as many.
    pub(super) fn new(capacity: u64) -> std::io::Result<Self> {
        let mut factor = if cfg!(miri) { 2 } else { 8 };
        let mapping = loop {
            let pages = capacity.checked_mul(factor);
            let bytes = pages.and_then(|pages| pages.checked_mul(PAGE_BYTES as u64));
            let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
            let too_large = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            match bytes.ok_or_else(too_large).and_then(Mapping::reserve) {
                Ok(mapping) => break mapping,
                // Where address space is limited, less of it must do.
                Err(error) if factor == 1 => return Err(error),
                Err(_) => factor /= 2,
            }
        };
        let mut state = State::default();
        state.fresh.add(0..capacity * factor);
        Ok(Pages {
            mapping,
            capacity,
            state: Mutex::new(state),
            registrar: OnceLock::new(),
            unregisters: OnceLock::new(),
            settled: AtomicBool::new(false),
            changed: Condvar::new(),
        })
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Takes a run of `len` pages; its bytes are arbitrary.
    pub(super) fn take(&self, len: u64) -> Option<Range<u64>> {
        // Pages that the system does not take back are kept, so giving back may not help: the tries
        // are bounded.
        for _ in 0..GIVE_BACK_TRIES {
            let plan = self.state.lock().plan(len, self.capacity);
            match plan {
                Plan::Take(run) => return Some(run),
                Plan::NoSpace => return None,
                Plan::GiveBack(leaving) => {
                    if !self.hand_over(leaving) {
                        return None;
                    }
                }
            }
        }
        None
    }

    /// Whether a request that found no space may find some, since the last call.
    pub(super) fn has_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed) && self.settled.swap(false, Ordering::SeqCst)
    }

    /// Gives pages without an owner, which count as leaving, back to the system. Those that the
    /// system does not take count as kept again.
    fn give_back(&self, leaving: Leaving) {
        let bytes = |page: u64| page as usize * PAGE_BYTES;
        let mut stuck = BTreeSet::new();
        for slab in leaving.unregister {
            let unregistered = crate::planted!("slab-registered") || self.unregister(slab);
            let mut state = self.state.lock();
            let Some(slabs) = &mut state.slabs else { continue };
            if unregistered {
                slabs.plain(slab);
            } else {
                slabs.stuck(slab);
                stuck.insert(slab);
            }
        }
        let goes = |(pages, slab): &(Range<u64>, u64)| {
            let range = bytes(pages.start)..bytes(pages.end);
            !stuck.contains(slab) && self.mapping.give_back(range)
        };
        let gone: Vec<bool> = leaving.runs.iter().map(goes).collect();
        let mut state = self.state.lock();
        for ((pages, _), gone) in leaving.runs.into_iter().zip(gone) {
            assert!(state.leaving >= pages.end - pages.start, "pages leave once");
            state.leaving -= pages.end - pages.start;
            let left = state.leaving_runs.take_exact(&pages);
            assert!(left, "pages that were given back were leaving");
            if gone {
                state.fresh.add(pages);
            } else {
                state.kept.add(pages);
            }
        }
        state.check(self.capacity);
        self.settle(state);
    }

    /// Wakes waiting threads, and has a request that found no space look again.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        self.changed.notify_all();
        if std::mem::take(&mut state.starved) {
            self.settled.store(!crate::planted!("settle"), Ordering::SeqCst);
        }
    }

    /// Takes a run back from its owner.
    pub(super) fn put(&self, run: Range<u64>) {
        let len = run.end - run.start;
        let mut state = self.state.lock();
        assert!(state.live >= len, "more pages are put back than were taken");
        state.live -= len;
        state.kept.add(run.clone());
        state.check(self.capacity);
        let kept_max = self.capacity / KEPT_PART;
        if state.kept.total() <= kept_max {
            return;
        }
        let leaving = state.let_go(run, kept_max);
        drop(state);
        if !leaving.runs.is_empty() {
            self.give_back(leaving);
        }
    }

    /// Pages that could be taken now in one run.
    pub(super) fn free_in_one_run(&self) -> u64 {
        let state = self.state.lock();
        let free = self.capacity - state.live - state.leaving;
        // Kept pages become fresh once they are given back, wherever they lie.
        free.min(state.fresh.longest_len().max(state.kept.longest_len()))
    }

    /// Pages that have an owner.
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

#[cfg(all(test, not(miri)))]
mod tests;
