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

/// For a device.
impl Pages {
    /// Lets a device register slabs from now on. Called once.
    pub(super) fn serve(&self, registrar: Arc<dyn Registrar>) {
        if self.registrar.set(registrar).is_ok() {
            self.state.lock().slabs = Some(Slabs::new(self.capacity));
        }
    }

    /// Has registered slabs given back by that thread: a driver unregisters only once the device is
    /// idle, and a request for memory must not wait for a user's kernels. Called once.
    pub(super) fn unregister_by(&self, thread: Sender<Leaving>) {
        let _ = self.unregisters.set(thread);
    }

    /// Gives registered slabs back; called on that thread.
    pub(super) fn unregister_now(&self, leaving: Leaving) {
        self.give_back(leaving);
        let mut state = self.state.lock();
        assert!(state.unregistering > 0, "a lot is unregistered once");
        state.unregistering -= 1;
        state.slow &= state.unregistering > 0;
        self.settle(state);
    }

    /// Has pages given back. False if that takes long: then `has_settled` says when it is done.
    fn hand_over(&self, leaving: Leaving) -> bool {
        let thread = self.unregisters.get().filter(|_| !leaving.unregister.is_empty());
        let Some(thread) = thread else {
            self.give_back(leaving);
            return true;
        };
        self.state.lock().unregistering += 1;
        if let Err(unsent) = thread.send(leaving) {
            // The thread has ended: only an arena that is being dropped has none.
            self.unregister_now(unsent.0);
            return true;
        }
        let until = Instant::now() + UNREGISTER_WAIT_MAX;
        let mut state = self.state.lock();
        while state.unregistering > 0 && !state.slow {
            state.slow = self.changed.wait_until(&mut state, until).timed_out();
        }
        let ended = state.unregistering == 0;
        state.slow &= !ended;
        state.starved |= !ended;
        ended
    }

    /// Begins a copy to or from these bytes, which have an owner; returns its parts, none of which
    /// crosses a registration. Registers slabs that are due, and waits for those that another
    /// thread is changing.
    pub(super) fn enter(&self, bytes: Range<usize>) -> Vec<Entered> {
        let page = PAGE_BYTES as u64;
        let pages = bytes.start as u64 / page..(bytes.end as u64).div_ceil(page);
        let mut state = self.state.lock();
        let touched = loop {
            let Some(slabs) = &state.slabs else { return vec![(bytes, None, false)] };
            let touched: Vec<u64> = slabs.split(pages.clone()).map(|(slab, _)| slab).collect();
            if !touched.iter().any(|&slab| slabs.is_changing(slab)) {
                break touched;
            }
            self.changed.wait(&mut state);
        };
        let mut parts = Vec::new();
        let mut due = Vec::new();
        for slab in touched {
            let Some(slabs) = &mut state.slabs else { continue };
            let whole = slabs.pages(slab);
            let slab_bytes = slabs.pages_each() * page;
            let start = (slab * slab_bytes).max(bytes.start as u64);
            let end = ((slab + 1) * slab_bytes).min(bytes.end as u64);
            let way = slabs.enter(slab, end - start, slab_bytes);
            if way == Way::Due
                && whole.end * page <= self.mapping.len() as u64
                && state.has_memory(&whole)
                && let Some(slabs) = &mut state.slabs
            {
                slabs.change(slab);
                due.push((parts.len(), slab));
            }
            parts.push((start as usize..end as usize, Some(slab), way == Way::Direct));
        }
        drop(state);
        for (part, slab) in due {
            parts[part].2 = self.register(slab);
        }
        parts
    }

    /// Ends a copy that touched this slab.
    pub(super) fn leave(&self, slab: u64) {
        let mut state = self.state.lock();
        if let Some(slabs) = &mut state.slabs {
            slabs.leave(slab);
        }
        self.settle(state);
    }

    /// Unregisters all slabs, once all copies of the device have ended. False if some may still be
    /// registered.
    pub(super) fn retire(&self, unregister: &dyn Fn(usize, usize) -> bool) -> bool {
        let slabs = {
            let mut state = self.state.lock();
            let Some(slabs) = &mut state.slabs else { return true };
            let registered = slabs.all_registered();
            registered.iter().for_each(|&slab| slabs.change(slab));
            registered
        };
        let stays =
            |slab: &u64| self.place(*slab).is_some_and(|(address, len)| !unregister(address, len));
        let stuck: Vec<u64> = slabs.into_iter().filter(stays).collect();
        let mut state = self.state.lock();
        if let Some(slabs) = &mut state.slabs {
            let known = slabs.all_registered();
            known
                .into_iter()
                .filter(|slab| !stuck.contains(slab))
                .for_each(|slab| slabs.plain(slab));
            stuck.iter().for_each(|&slab| slabs.stuck(slab));
        }
        if stuck.is_empty() {
            state.slabs = None;
        }
        self.settle(state);
        stuck.is_empty()
    }

    /// The bytes that the device can copy directly.
    pub(super) fn registered_bytes(&self) -> u64 {
        let state = self.state.lock();
        let slabs = state.slabs.as_ref();
        slabs.map_or(0, |slabs| slabs.count_registered() * slabs.pages_each() * PAGE_BYTES as u64)
    }

    /// The length of a slab, in bytes; 0 without a device.
    pub(super) fn slab_bytes(&self) -> usize {
        let state = self.state.lock();
        state.slabs.as_ref().map_or(0, |slabs| slabs.pages_each() as usize * PAGE_BYTES)
    }

    fn register(&self, slab: u64) -> bool {
        let (Some(registrar), Some((address, len))) = (self.registrar.get(), self.place(slab))
        else {
            return false;
        };
        let registered = registrar.register(address, len);
        let mut state = self.state.lock();
        let Some(slabs) = &mut state.slabs else { return false };
        match &registered {
            Ok(()) => slabs.registered(slab),
            // It is tried again after as many bytes again were copied by the driver's detour.
            Err(_) => slabs.plain(slab),
        }
        self.settle(state);
        if let Err(error) = &registered {
            tracing::debug!(target: "vmem::host", %error, len, "a slab was not registered");
        }
        registered.is_ok()
    }

    fn unregister(&self, slab: u64) -> bool {
        let (Some(registrar), Some((address, len))) = (self.registrar.get(), self.place(slab))
        else {
            return false;
        };
        let unregistered = registrar.unregister(address, len);
        if let Err(error) = &unregistered {
            tracing::warn!(target: "vmem::host", %error, len, "a slab stays registered for ever");
        }
        unregistered.is_ok()
    }

    /// Where a slab is, and its length in bytes.
    fn place(&self, slab: u64) -> Option<(usize, usize)> {
        let pages = self.state.lock().slabs.as_ref()?.pages(slab);
        let start = pages.start as usize * PAGE_BYTES;
        let end = pages.end as usize * PAGE_BYTES;
        Some((self.mapping.at(start).as_ptr().expose_provenance(), end - start))
    }
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
