//! What an object has in the memory of devices.
//!
//! Invariant: a valid range holds the bytes of the current version, which host memory or the disk
//! has too, unless the object is dirty there (`dirty_on_device.rs`); one that is not valid is space
//! that was set apart. Each change of the version makes
//! every range invalid in the same step, except one that a kernel wrote. Changed by the holder of
//! the gate only. A user of a range holds a share of it, whose end wakes the waiters for that.

use smallvec::SmallVec;

use super::{GatePass, Inner, Object};
use crate::device::DeviceRange;
use crate::memory_tier::MemoryTier;
use crate::policy::{Entry, Probe, Token};
use crate::stats;
use crate::tier::{Device, HoldCount, HoldKind};

/// What an object has on one device: a range, holds, or both.
#[derive(Debug)]
pub(super) struct OnDevice {
    device: usize,
    place: Option<Place>,
    holds: HoldCount,
}

/// A range of device memory, and what the policy of the tier calls it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) range: DeviceRange,
    pub(super) is_valid: bool,
    pub(super) token: Token,
    /// The accesses that the policy has seen.
    pub(super) seen: u32,
    /// Whether it was prefetched, and how many accesses there were then.
    prefetched: bool,
    touches: u32,
}

/// Ranges that were taken out of the object, for `Object::left_devices`.
#[must_use]
#[derive(Debug, Default)]
pub(super) struct Left(SmallVec<[(usize, Place); 1]>);

impl Inner {
    fn on(&self, device: usize) -> Option<&OnDevice> {
        self.rare.devices.iter().find(|on| on.device == device)
    }

    fn on_mut(&mut self, device: usize) -> Option<&mut OnDevice> {
        self.rare.get_mut()?.devices.iter_mut().find(|on| on.device == device)
    }

    fn change_on<T>(&mut self, device: usize, change: impl FnOnce(&mut OnDevice) -> T) -> T {
        self.rare.change(|rare| {
            let devices = &mut rare.devices;
            let at = devices.iter().position(|on| on.device == device).unwrap_or_else(|| {
                devices.push(OnDevice { device, place: None, holds: HoldCount::NONE });
                devices.len() - 1
            });
            change(&mut devices[at])
        })
    }

    pub(super) fn place(&self, device: usize) -> Option<&Place> {
        self.on(device)?.place.as_ref()
    }

    pub(super) fn place_mut(&mut self, device: usize) -> Option<&mut Place> {
        self.on_mut(device)?.place.as_mut()
    }

    fn take_place(&mut self, device: usize) -> Option<Place> {
        let place = self.on_mut(device)?.place.take();
        self.forget_empty();
        place
    }

    /// Nothing is kept of devices where the object has nothing.
    fn forget_empty(&mut self) {
        self.rare.change(|rare| rare.devices.retain(|on| on.place.is_some() || on.holds.any()));
    }

    /// Outdates the copies, since the version has changed. A range stays as space where the object
    /// is held or has its home, unless the range is in use. What leaves is for
    /// `Object::left_devices`, where no lock is held.
    pub(super) fn outdate_devices(&mut self, home: MemoryTier) -> Left {
        let mut left = Left::default();
        // What a kernel wrote is what is being published.
        let written = self.rare.pending.as_ref().map(|pending| pending.device);
        let Some(rare) = self.rare.get_mut() else { return left };
        for on in &mut rare.devices {
            let Some(place) = &mut on.place else { continue };
            let stays_valid = match written {
                Some(_) if crate::planted!("device-siblings") => place.is_valid,
                _ => crate::planted!("vram-stale") && place.is_valid,
            };
            place.is_valid = stays_valid || written == Some(on.device);
            let belongs = on.holds.any() || home.device() == Some(on.device);
            let stays = place.is_valid || belongs && place.range.is_idle();
            if !stays {
                left.0.extend(on.place.take().map(|place| (on.device, place)));
            }
        }
        self.forget_empty();
        left
    }

    /// One more hold of what is held there: without the gate, since nothing that is held leaves.
    pub(super) fn add_hold_again(&mut self, device: usize) -> bool {
        self.on_mut(device).is_some_and(|on| on.holds.try_add())
    }

    /// Everything, of an object that is freed.
    pub(super) fn take_devices(&mut self) -> Left {
        let devices = self.rare.get_mut().into_iter().flat_map(|rare| rare.devices.iter_mut());
        let places = devices.filter_map(|on| Some((on.device, on.place.take()?)));
        let left = Left(places.collect());
        self.forget_empty();
        left
    }

    /// Whether another device that serves has the current version.
    pub(super) fn is_valid_elsewhere(&self, device: usize, devices: &[Device]) -> bool {
        let mut others = self.rare.devices.iter().filter(|on| on.device != device);
        others.any(|on| {
            let is_valid = on.place.as_ref().is_some_and(|place| place.is_valid);
            is_valid && devices[on.device].backend.lost().is_none()
        })
    }

    /// A share of the current version on a device that serves, and which that is.
    pub(super) fn device_share(&self, devices: &[Device]) -> Option<(usize, DeviceRange)> {
        if self.rare.pending.is_some() {
            return None;
        }
        self.rare.devices.iter().find_map(|on| {
            let place = on.place.as_ref().filter(|place| place.is_valid)?;
            let serves = devices[on.device].backend.lost().is_none();
            serves.then(|| (on.device, place.range.share()))
        })
    }
}

impl Object {
    /// Whether this device has the current version.
    pub(crate) fn is_on(&self, device: usize) -> bool {
        let inner = self.inner.lock();
        let is_valid = inner.place(device).is_some_and(|place| place.is_valid);
        let is_current = is_valid && inner.rare.pending.is_none();
        drop(inner);
        is_current && self.shared.device(device).is_ok()
    }

    /// Whether any device has the current version.
    pub(crate) fn is_on_any_device(&self) -> bool {
        self.inner.lock().device_share(self.shared.devices()).is_some()
    }

    /// A share of the current version on this device.
    pub(crate) fn share_on(&self, device: usize) -> Option<DeviceRange> {
        self.shared.device(device).ok()?;
        let inner = self.inner.lock();
        if inner.rare.pending.is_some() && !crate::planted!("sibling-stale") {
            // A kernel has written a new version that is not published yet: this is the previous
            // one.
            return None;
        }
        inner.place(device).filter(|place| place.is_valid).map(|place| place.range.share())
    }

    /// Whether it has memory of this device, with the current version in it or not.
    pub(crate) fn has_space_on(&self, device: usize) -> bool {
        self.inner.lock().place(device).is_some()
    }

    /// The devices where it has memory.
    pub(crate) fn devices_with_space(&self) -> SmallVec<[usize; 4]> {
        let inner = self.inner.lock();
        inner.rare.devices.iter().filter(|on| on.place.is_some()).map(|on| on.device).collect()
    }

    /// The devices to which a change of the object is to come again: it lives there, or is held
    /// there.
    pub(crate) fn devices_to_refresh(&self) -> SmallVec<[usize; 1]> {
        let inner = self.inner.lock();
        let held = inner.rare.devices.iter().filter(|on| on.holds.any()).map(|on| on.device);
        let mut all: SmallVec<[usize; 1]> = held.collect();
        all.extend(self.home.device().filter(|home| !all.contains(home)));
        all
    }

    /// Sets device memory apart.
    pub(crate) fn set_space_on(
        &self,
        _pass: &GatePass,
        device: usize,
        range: DeviceRange,
        prefetched: bool,
    ) {
        let tier = &self.shared.devices()[device];
        assert!(!self.has_space_on(device), "device memory is set apart once");
        let fits = range.len() == self.len || crate::planted!("set-mixed");
        assert!(fits, "a range is as long as its object");
        let id = self.id;
        let stamp = self.stamp();
        let footprint = range.footprint();
        let prefetched = prefetched && !crate::planted!("prefetch-unprotected");
        let token = tier.enter(Entry { id, stamp, footprint, prefetched }, &range);
        let touches = self.touches();
        let is_valid = false;
        let place = Place { range, is_valid, token, seen: touches, prefetched, touches };
        self.inner.lock().change_on(device, |on| on.place = Some(place));
        stats::add(&tier.state.objects, 1);
    }

    /// A share of the space that was set apart, if nothing uses it any more.
    pub(crate) fn space_on(&self, _pass: &GatePass, device: usize) -> Option<DeviceRange> {
        let inner = self.inner.lock();
        let place = inner.place(device)?;
        let is_idle = !place.is_valid && place.range.is_idle();
        is_idle.then(|| place.range.share())
    }

    /// The space holds the current version now.
    pub(crate) fn publish_on(&self, _pass: &GatePass, device: usize) {
        if let Some(place) = self.inner.lock().place_mut(device) {
            place.is_valid = true;
        }
        // Its bytes have arrived for a caller that has not used them yet: it is not to be the next
        // that leaves.
        self.mark_now();
    }

    /// Takes it out of device memory, unless it is held or used there, or only there. False if it
    /// stays.
    pub(crate) fn leave_device(&self, _pass: &GatePass, device: usize) -> bool {
        if self.is_alone_on(device) && !crate::planted!("dirty-dropped") {
            return false;
        }
        let mut inner = self.inner.lock();
        let leaves = inner.on(device).is_some_and(|on| {
            (!on.holds.any() || crate::planted!("vram-pins"))
                && on.place.as_ref().is_some_and(|place| place.range.is_idle())
        });
        let place = if leaves { inner.take_place(device) } else { None };
        drop(inner);
        self.left_devices(Left(place.map(|place| (device, place)).into_iter().collect()));
        leaves
    }

    /// Takes it out of the memory of this device. Users of the range keep that.
    pub(crate) fn detach_from(&self, _pass: &GatePass, device: usize) {
        let place = self.inner.lock().take_place(device);
        self.left_devices(Left(place.map(|place| (device, place)).into_iter().collect()));
    }

    /// Takes it out of the memory of every device.
    pub(crate) fn detach_from_devices(&self, _pass: &GatePass) {
        let left = self.inner.lock().take_devices();
        self.left_devices(left);
    }

    /// What was taken out of the object leaves the order of eviction; its range goes back with the
    /// last share. Where no lock is held.
    pub(super) fn left_devices(&self, left: Left) {
        for (device, Place { range, token, .. }) in left.0 {
            let tier = &self.shared.devices()[device];
            tier.leave(token, &range);
            stats::sub(&tier.state.objects, 1);
            drop(range);
        }
    }

    /// A share of what it has on this device, and whether that is the current version.
    pub(crate) fn lies_on(&self, _pass: &GatePass, device: usize) -> Option<(DeviceRange, bool)> {
        self.inner.lock().place(device).map(|place| (place.range.share(), place.is_valid))
    }

    /// What lies at `from` on this device lies in `to` from now on. False if it has left meanwhile,
    /// or is in use there, which would keep the old range.
    pub(crate) fn relocate_on(
        &self,
        _pass: &GatePass,
        device: usize,
        from: u64,
        to: DeviceRange,
    ) -> bool {
        let tier = &self.shared.devices()[device];
        tier.enter_again(self.id, &to);
        let mut inner = self.inner.lock();
        let is_idle = |place: &&mut Place| place.range.address() == from && place.range.is_idle();
        let place = inner.place_mut(device).filter(is_idle);
        let (moved, left) = match place {
            Some(place) => (true, std::mem::replace(&mut place.range, to)),
            None => (false, to),
        };
        drop(inner);
        tier.forget(&left);
        moved
    }

    /// Where its copy on this device lies.
    pub(crate) fn address_on(&self, device: usize) -> Option<u64> {
        self.inner.lock().place(device).map(|place| place.range.address())
    }

    /// Whether its copy could leave this device now; a hint.
    pub(crate) fn is_evictable_on(&self, device: usize) -> bool {
        !self.is_changing() && self.may_leave_device(device)
    }

    /// Whether it has memory there that nobody uses or holds.
    pub(crate) fn may_leave_device(&self, device: usize) -> bool {
        let inner = self.inner.lock();
        let is_free = |on: &OnDevice| {
            !on.holds.any() && on.place.as_ref().is_some_and(|place| place.range.is_idle())
        };
        inner.on(device).is_some_and(is_free)
    }

    /// How it stands on this device, for the policy. What was used at `spared_since` or later is
    /// not to go.
    pub(crate) fn probe_on(&self, device: usize, spared_since: u64) -> Probe {
        let mut inner = self.inner.lock();
        if self.is_changing() {
            // Its place may be half way in or out; to say that it is gone would be for ever.
            return Probe::Busy { stamp: self.mark_now() };
        }
        let Some(on) = inner.on_mut(device) else { return Probe::Gone };
        let Some(place) = &mut on.place else { return Probe::Gone };
        let stamp = self.stamp();
        if on.holds.any() && !crate::planted!("vram-pins") {
            Probe::Pinned
        } else if !place.range.is_idle() {
            Probe::Busy { stamp: self.mark_now() }
        } else if stamp >= spared_since {
            Probe::Unfit
        } else {
            let now = self.touches();
            let touches = now.wrapping_sub(std::mem::replace(&mut place.seen, now));
            Probe::Evictable { stamp, touches }
        }
    }

    /// Whether it was prefetched to this device and not used yet.
    pub(crate) fn is_unused_on(&self, device: usize) -> bool {
        let inner = self.inner.lock();
        let is_unused = |place: &Place| place.prefetched && place.touches == self.touches();
        inner.place(device).is_some_and(is_unused)
    }

    /// Whether a copy or a kernel uses its memory on this device right now; a hint.
    pub(crate) fn is_used_on(&self, device: usize, until_passed: bool) -> bool {
        let inner = self.inner.lock();
        inner.place(device).is_some_and(|place| match until_passed {
            true => !place.range.is_idle(),
            false => !place.range.others_are_gone(1),
        })
    }

    // ---- Holds -----------------------------------------------------------------------------

    pub(super) fn holds_on(&self, device: usize) -> u32 {
        self.inner.lock().on(device).map_or(0, |on| on.holds.count())
    }

    pub(super) fn add_hold_on(&self, device: usize, charged_as: HoldKind) -> bool {
        self.inner.lock().change_on(device, |on| on.holds.add(charged_as))
    }

    /// One more hold, unless it were the first.
    pub(super) fn try_add_hold_on(&self, device: usize) -> bool {
        self.inner.lock().add_hold_again(device)
    }

    /// One hold less. Returns what to uncharge if it was the last.
    pub(super) fn remove_hold_on(&self, device: usize) -> Option<HoldKind> {
        let mut inner = self.inner.lock();
        let on = inner.on_mut(device).expect("invariant: a hold is counted until it goes");
        let last = on.holds.remove();
        inner.forget_empty();
        drop(inner);
        if last.is_some() {
            let tier = &self.shared.devices()[device];
            tier.state.unpark(|| self.inner.lock().place(device).map(|place| place.token));
            tier.ring();
        }
        last
    }
}
