//! Object space as a device uses it: slabs that it registers, and copies that touch them.
//!
//! Invariant: a slab that a copy has entered stays as it is, registered or not, until the copy has
//! left it. Called by `space`.

use super::*;

/// The pages of some bytes.
fn pages_of(bytes: &Range<usize>) -> Range<u64> {
    let page = PAGE_BYTES as u64;
    bytes.start as u64 / page..(bytes.end as u64).div_ceil(page)
}

impl Pages {
    /// Lets a device register slabs from now on. Called once.
    pub(in super::super) fn serve(&self, registrar: Arc<dyn Registrar>) {
        if self.registrar.set(registrar).is_ok() {
            self.state.lock().slabs = Some(Slabs::new(self.capacity));
        }
    }

    /// Has registered slabs given back by that thread: a driver unregisters only once the device is
    /// idle, and a request for memory must not wait for a user's kernels. Called once.
    pub(in super::super) fn unregister_by(&self, thread: Sender<Leaving>) {
        let _ = self.unregisters.set(thread);
    }

    /// Gives registered slabs back; called on that thread.
    pub(in super::super) fn unregister_now(&self, leaving: Leaving) {
        self.give_back(leaving);
        let mut state = self.state.lock();
        assert!(state.unregistering > 0, "a lot is unregistered once");
        state.unregistering -= 1;
        state.slow &= state.unregistering > 0;
        self.settle(state);
    }

    /// Has pages given back. False if that takes long: then `has_settled` says when it is done.
    pub(super) fn hand_over(&self, leaving: Leaving) -> bool {
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
    pub(in super::super) fn enter(&self, bytes: Range<usize>) -> Vec<Entered> {
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

    /// Begins copies of those that the device reaches directly, by one look for all. `part` gets
    /// each part of them, none of which crosses a registration, with the number of its copy.
    /// Returns their slabs.
    pub(in super::super) fn enter_registered(
        &self,
        all: &[Range<usize>],
        mut part: impl FnMut(usize, Range<usize>),
    ) -> Vec<u64> {
        let mut entered = Vec::with_capacity(all.len());
        let mut state = self.state.lock();
        let Some(slabs) = &mut state.slabs else { return entered };
        let slab_bytes = (slabs.pages_each() * PAGE_BYTES as u64) as usize;
        for (number, bytes) in all.iter().enumerate() {
            if bytes.is_empty() || !slabs.are_registered(pages_of(bytes)) {
                continue;
            }
            let mut start = bytes.start;
            while start < bytes.end {
                let slab = start / slab_bytes;
                let end = bytes.end.min((slab + 1) * slab_bytes);
                slabs.enter(slab as u64, (end - start) as u64, slab_bytes as u64);
                entered.push(slab as u64);
                part(number, start..end);
                start = end;
            }
        }
        entered
    }

    /// Ends copies that touched these slabs.
    pub(in super::super) fn leave(&self, all: &[u64]) {
        let mut state = self.state.lock();
        if let Some(slabs) = &mut state.slabs {
            all.iter().for_each(|&slab| slabs.leave(slab));
        }
        self.settle(state);
    }

    /// Unregisters all slabs, once all copies of the device have ended. False if some may still be
    /// registered.
    pub(in super::super) fn retire(&self, unregister: &dyn Fn(usize, usize) -> bool) -> bool {
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
    pub(in super::super) fn registered_bytes(&self) -> u64 {
        let state = self.state.lock();
        let slabs = state.slabs.as_ref();
        slabs.map_or(0, |slabs| slabs.count_registered() * slabs.pages_each() * PAGE_BYTES as u64)
    }

    /// The length of a slab, in bytes; 0 without a device.
    pub(in super::super) fn slab_bytes(&self) -> usize {
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

    pub(super) fn unregister(&self, slab: u64) -> bool {
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
