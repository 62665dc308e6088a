//! What an object has in device memory.
//!
//! Invariant: a valid range holds the bytes of the current version, which host memory or the disk has too; one
//! that is not valid is room that was set apart. Whatever changes the version makes it invalid in the same
//! step. Changed by the holder of the gate only; whoever uses the range holds a share of it, whose end wakes who waits
//! for that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::{DiskMap, GatePass, Inner, Object};
use crate::copy::{Found, OwnedCopy};
use crate::device::DeviceRange;
use crate::memory_tier::MemoryTier;
use crate::policy::Token;
use crate::stats;

/// A range, and what the policy of the tier calls it.
#[derive(Debug)]
pub(super) struct InVram {
    range: DeviceRange,
    valid: bool,
    token: Token,
}

impl Inner {
    /// The version has changed: a copy of the one before is no use. What it leaves is for
    /// `Object::left_vram`, where no lock is held.
    pub(super) fn outdate_vram(&mut self, keep_room: bool) -> Option<Box<InVram>> {
        // What a kernel wrote is what is being published.
        if self.pending {
            if let Some(in_vram) = &mut self.vram {
                in_vram.valid = true;
            }
            return None;
        }
        let in_vram = self.vram.as_mut()?;
        in_vram.valid = false;
        let mine = in_vram.range.is_idle();
        if keep_room && mine { None } else { self.vram.take() }
    }
}

impl Object {
    /// Whether device memory has the current version.
    pub(crate) fn in_vram(&self) -> bool {
        let valid = self.inner.lock().vram.as_ref().is_some_and(|in_vram| in_vram.valid);
        valid && self.shared.vram().is_ok()
    }

    /// Whether it has device memory, with the current version in it or not.
    pub(crate) fn has_vram_room(&self) -> bool {
        self.inner.lock().vram.is_some()
    }

    /// Whether a copy or a kernel uses its device memory right now; a hint.
    pub(crate) fn is_used_in_vram(&self) -> bool {
        let inner = self.inner.lock();
        inner.vram.as_ref().is_some_and(|in_vram| !in_vram.range.is_idle())
    }

    /// Whether a change of the object is to come up again: it lives in device memory, or is pinned there.
    pub(crate) fn belongs_in_vram(&self) -> bool {
        self.home == MemoryTier::Vram || self.vram_pins() > 0
    }

    /// Sets device memory apart.
    pub(crate) fn set_vram_room(&self, _pass: &GatePass, range: DeviceRange) {
        let Some(vram) = self.shared.vram_if_any() else { return };
        assert!(!self.has_vram_room(), "device memory is set apart once");
        let token = vram.enter(self.id, self.stamp(), range.footprint());
        let in_vram = InVram { range, valid: false, token };
        self.inner.lock().vram = Some(Box::new(in_vram));
        stats::add(&self.shared.counters.vram_objects, 1);
    }

    /// A share of the room that was set apart, if nothing uses it any more.
    pub(crate) fn vram_room(&self, _pass: &GatePass) -> Option<DeviceRange> {
        let inner = self.inner.lock();
        let in_vram = inner.vram.as_ref()?;
        let idle = !in_vram.valid && in_vram.range.is_idle();
        idle.then(|| in_vram.range.share())
    }

    /// A share of the copy in device memory, under the object's lock.
    pub(super) fn vram_share(&self, inner: &Inner) -> Option<DeviceRange> {
        let in_vram = inner.vram.as_ref()?;
        (in_vram.valid && self.shared.vram().is_ok()).then(|| in_vram.range.share())
    }

    /// The room holds the current version now.
    pub(crate) fn publish_in_vram(&self, _pass: &GatePass) {
        if let Some(in_vram) = &mut self.inner.lock().vram {
            in_vram.valid = true;
        }
        // Whoever asked for it has not used it yet: it is not to be the next that leaves.
        self.stamp.fetch_max(self.shared.now(), Ordering::Relaxed);
    }

    /// Takes it out of device memory, unless it is pinned or used there. False if it stays.
    pub(crate) fn leave_vram(&self, _pass: &GatePass) -> bool {
        if self.vram_pins() > 0 {
            return false;
        }
        let mut inner = self.inner.lock();
        let idle = inner.vram.as_ref().is_some_and(|in_vram| in_vram.range.is_idle());
        let in_vram = if idle { inner.vram.take() } else { None };
        drop(inner);
        let left = in_vram.is_some();
        self.left_vram(in_vram);
        left
    }

    /// Takes it out of device memory, whoever uses it there: they keep the range.
    pub(crate) fn detach_from_vram(&self, _pass: &GatePass) {
        let in_vram = self.inner.lock().vram.take();
        self.left_vram(in_vram);
    }

    /// What was taken out of the object leaves the order of eviction; its range goes back with the last
    /// share. Where no lock is held.
    pub(super) fn left_vram(&self, in_vram: Option<Box<InVram>>) {
        let Some(in_vram) = in_vram else { return };
        let InVram { range, token, .. } = *in_vram;
        if let Some(vram) = self.shared.vram_if_any() {
            vram.leave(token);
        }
        stats::sub(&self.shared.counters.vram_objects, 1);
        drop(range);
    }

    // ---- Changes by kernels ------------------------------------------------------------------

    /// The current copy, or the room, in device memory for somebody who will write to it: from now on it is
    /// not the current version. None if somebody else uses it.
    pub(crate) fn claim_vram(&self, _pass: &GatePass) -> Option<DeviceRange> {
        let mut inner = self.inner.lock();
        let in_vram = inner.vram.as_mut()?;
        if !in_vram.range.is_idle() {
            return None;
        }
        in_vram.valid = false;
        Some(in_vram.range.share())
    }

    /// Hides the version that is in host memory or on disk until what a kernel wrote is published, or was given up.
    /// Whoever reads already goes on. Returns the host copy.
    pub(crate) fn begin_pending(&self, _pass: &GatePass) -> Option<Bytes> {
        let before = self.standing();
        let old = match self.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => Some(guard.into_bytes()),
            Found::Locked | Found::Nothing => None,
        };
        let flight = {
            let mut inner = self.inner.lock();
            inner.pending = true;
            self.copy.detach(&self.shared.copies);
            // A read that comes now does not join one of the version before.
            inner.flight.take()
        };
        drop(flight);
        self.leave_policy();
        self.count_change(before);
        if self.has_spare() {
            self.enter_policy();
        }
        old
    }

    /// What a kernel wrote is the current version: in device memory, and here in host memory.
    pub(crate) fn publish_changed(self: &Arc<Self>, pass: &GatePass, copy: OwnedCopy) {
        self.publish(pass, Some(copy), DiskMap::clear);
        self.inner.lock().pending = false;
    }

    /// Whether what a kernel wrote is on its way.
    pub(crate) fn is_pending(&self) -> bool {
        self.inner.lock().pending
    }

    /// The version before is the current one again; `old` is its host copy if it had one.
    pub(crate) fn give_up_pending(self: &Arc<Self>, pass: &GatePass, old: Option<OwnedCopy>) {
        if let Some(old) = old {
            self.publish_fetched(pass, old);
        }
        self.inner.lock().pending = false;
    }

    // ---- Pins ------------------------------------------------------------------------------

    pub(crate) fn vram_pins(&self) -> u32 {
        self.vram_pins.load(Ordering::SeqCst)
    }

    /// Is asked about again by the policy, after the last pin in device memory went.
    pub(crate) fn unpark_in_vram(&self) {
        if let Some(vram) = self.shared.vram_if_any() {
            vram.unpark(|| self.inner.lock().vram.as_ref().map(|in_vram| in_vram.token));
            vram.ring();
        }
    }
}
