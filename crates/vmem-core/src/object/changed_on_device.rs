//! An object while a kernel changes it on a device: claimed, pending, published or given up.
//!
//! Invariant: while a change is pending no read begins that could see the previous version, and the
//! new one is not read until it is published, but by kernels that come after it on its device
//! (`successors.rs`). Called by leases that change, under the gate, and by `migrate/kernel`.

use std::sync::Arc;

use bytes::Bytes;

use super::successors::{Pending, Successors};
use super::{Arrival, ExtentMap, GatePass, Object};
use crate::copy::{Found, OwnedCopy};
use crate::device::{DeviceRange, UseEnd};

impl Object {
    /// Takes the current copy, or the space, on this device for a kernel that will write to it:
    /// from now on it is not the current version. `None` if it is in use; users that are gone, and
    /// whose work has not ended, are no reason unless it is to be `idle`: it comes after these.
    pub(crate) fn claim_on(
        &self,
        _pass: &GatePass,
        device: usize,
        idle: bool,
    ) -> Option<(DeviceRange, Vec<UseEnd>)> {
        let mut inner = self.inner.lock();
        let place = inner.place_mut(device)?;
        let is_free = if idle { place.range.is_idle() } else { place.range.others_are_gone(1) };
        if !is_free && !crate::planted!("lease-alone") {
            return None;
        }
        place.is_valid = false;
        let range = place.range.share();
        let after = range.ends(false);
        inner.set_claimed(true);
        Some((range, after))
    }

    /// What was claimed was not written: it is as it was.
    pub(crate) fn restore_on(&self, _pass: &GatePass, device: usize, was_valid: bool) {
        let mut inner = self.inner.lock();
        if let Some(place) = inner.place_mut(device) {
            place.is_valid = was_valid;
        }
        inner.set_claimed(false);
    }

    /// Hides the version that is in host memory or on disk until what a kernel wrote on this device
    /// is published or given up. Reads that have begun go on. Returns the host copy.
    pub(crate) fn begin_pending(
        &self,
        _pass: &GatePass,
        device: usize,
        successors: Option<Arc<Successors>>,
    ) -> Option<Bytes> {
        let before = self.standing();
        let old = match self.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => Some(guard.into_bytes()),
            Found::Locked | Found::Nothing => None,
        };
        let flight = {
            let mut inner = self.inner.lock();
            inner.rare.change(|rare| rare.pending = Some(Pending { device, successors }));
            if !crate::planted!("lease-pending") {
                self.copy.detach(&self.shared.copies);
            }
            // A read that comes now does not join one of the previous version.
            inner.flight.take()
        };
        drop(flight);
        self.leave_order();
        self.count_change(before);
        if self.has_host_space() {
            self.enter_order(false);
        }
        old
    }

    /// What a kernel wrote is the current version: in device memory, and here in host memory.
    pub(crate) fn publish_changed(self: &Arc<Self>, pass: &GatePass, copy: OwnedCopy) {
        self.publish(pass, Some(copy), ExtentMap::clear);
        self.inner.lock().rare.change(|rare| rare.pending = None);
    }

    /// Whether a kernel has written a version that is not published yet.
    pub(crate) fn is_pending(&self) -> bool {
        self.inner.lock().rare.pending.is_some()
    }

    /// Makes the previous version the current one again; `old` is its host copy if it had one.
    pub(crate) fn give_up_pending(self: &Arc<Self>, pass: &GatePass, old: Option<OwnedCopy>) {
        if let Some(old) = old {
            self.publish_fetched(pass, old, Arrival::Asked);
        }
        self.inner.lock().rare.change(|rare| rare.pending = None);
    }
}
