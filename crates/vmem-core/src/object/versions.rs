//! Where the current version of an object is, and how the next one takes its place.
//!
//! Invariant: a reader sees the bytes and the map of one version: both change in one step, under
//! the object's lock. Only the holder of the gate changes them; what a change replaces is dropped
//! where no lock is held. Called by the migrations, the writes and the evictor.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    ExtentMap, GatePass, Inner, MapIdentity, Object, Replaced, Standing, Version, on_devices,
};
use crate::chunk::chunks_of;
use crate::copy::{Found, OwnedCopy, ReadGuard};
use crate::host::HostSlot;
use crate::stats;

impl Inner {
    /// Host memory that is set apart for the object and has none of its bytes.
    fn host_space(&self) -> Option<&OwnedCopy> {
        let floor = self.rare.dirty.as_ref().and_then(|dirty| dirty.host_space());
        self.rare.spare.as_ref().or(floor)
    }
}

/// Why bytes are in host memory from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    Asked,
    Prefetched,
    /// A device alone had them, and nobody has used them since: where the object stands among
    /// others does not change.
    WrittenBack,
}

impl Object {
    /// A clone of the disk map: it keeps the extents alive.
    pub(crate) fn extents(&self) -> ExtentMap {
        self.inner.lock().extents.clone()
    }

    /// The current version without its host copy; for the holder of the gate, or a caller that
    /// knows that there is no host copy.
    pub(crate) fn version(&self) -> Version {
        self.version_in(&self.inner.lock())
    }

    fn version_in(&self, inner: &Inner) -> Version {
        let device = inner.device_share(self.shared.devices());
        let only_there = inner.rare.dirty.as_ref().map(|dirty| dirty.mark().clone());
        Version { extents: inner.extents.clone(), device, only_there }
    }

    /// The current host copy, and what tells its version, if the disk has all of it too.
    pub(crate) fn host_version(&self) -> Option<(ReadGuard, Option<MapIdentity>)> {
        let map = self.extents();
        let Found::Copy(guard) = self.copy.acquire(&self.shared.copies) else { return None };
        // Every change of the bytes takes chunks out of the map: one that is whole and the same
        // before and after has been that of the copy.
        let is_its = map.is_whole(self.len) && self.extents().is_same(&map);
        Some((guard, is_its.then(|| map.identity())))
    }

    /// The current version, if host memory holds no copy of it and no space for it. None
    /// of a dead object either: its map may have been given back, and an empty one reads as zeros.
    pub(crate) fn cold_version(&self) -> Option<Version> {
        let inner = self.inner.lock();
        let held = self.copy.is_some()
            || inner.rare.spare.is_some()
            || inner.rare.pending.is_some()
            || inner.is_version_claimed(self);
        let cold = !held && !self.is_dead();
        cold.then(|| self.version_in(&inner))
    }

    /// Whether host memory holds the only current bytes of some chunk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.standing().dirty
    }

    /// Whether a host copy exists or space for one is set apart.
    pub(crate) fn has_host_space(&self) -> bool {
        self.copy.is_some() || self.inner.lock().host_space().is_some()
    }

    /// Whether host memory is set apart for an object of zeros.
    pub(crate) fn has_spare(&self) -> bool {
        self.inner.lock().rare.spare.is_some()
    }

    /// Sets host memory apart for the first write.
    pub(crate) fn set_spare(self: &Arc<Self>, _pass: &GatePass, spare: OwnedCopy) {
        let before = self.standing();
        assert!(self.has_nothing(), "space is set apart for an object that has bytes nowhere");
        self.inner.lock().rare.change(|rare| rare.spare = Some(spare));
        self.count_change(before);
        self.enter_order(false);
    }

    /// Sets space apart again that was taken for a first write, unless the object has bytes by now.
    pub(crate) fn return_spare(self: &Arc<Self>, pass: &GatePass, spare: OwnedCopy) {
        if self.has_nothing() && !self.is_dead() {
            self.set_spare(pass, spare);
        }
    }

    /// Whether it has neither bytes nor space anywhere: it is zeros.
    pub(crate) fn has_nothing(&self) -> bool {
        let standing = self.standing();
        !standing.in_host && standing.levels == 0 && !standing.dirty_on_device
    }

    /// The space that was set apart.
    pub(crate) fn take_spare(&self, _pass: &GatePass) -> Option<OwnedCopy> {
        let before = self.standing();
        let spare = self.inner.lock().rare.change(|rare| rare.spare.take())?;
        self.leave_order();
        self.count_change(before);
        Some(spare)
    }

    /// Changes the disk map; what it replaces goes into the vector.
    pub(crate) fn with_extents<T>(
        &self,
        _pass: &GatePass,
        change: impl FnOnce(&mut ExtentMap, &mut Replaced) -> T,
    ) -> T {
        let before = self.standing();
        let mut old = Replaced::new();
        let result = change(&mut self.inner.lock().extents, &mut old);
        self.count_change(before);
        result
    }

    /// Publishes a new version: `copy` if it is in host memory, and a changed disk map. Readers of
    /// the previous version keep it; no reader joins a read of it any more.
    pub(crate) fn publish(
        self: &Arc<Self>,
        _pass: &GatePass,
        copy: Option<OwnedCopy>,
        change: impl FnOnce(&mut ExtentMap, &mut Replaced),
    ) {
        let before = self.standing();
        let mut old = Replaced::new();
        let left;
        let leftover = {
            let mut inner = self.inner.lock();
            // Together under the lock: a reader that finds no copy sees the map of this version.
            change(&mut inner.extents, &mut old);
            left = inner.outdate_devices(self.home);
            match copy {
                Some(copy) => self.copy.publish(copy, &self.shared.copies),
                None => self.copy.detach(&self.shared.copies),
            }
            let spare = inner.rare.change(|rare| {
                rare.corrupt = None;
                (rare.spare.take(), rare.dirty.take())
            });
            (inner.flight.take(), spare)
        };
        drop((old, leftover));
        self.left_devices(left);
        self.leave_order();
        self.count_change(before);
        if self.copy.is_some() {
            self.enter_order(false);
        }
    }

    /// The same version, now in host memory too.
    pub(crate) fn publish_fetched(
        self: &Arc<Self>,
        _pass: &GatePass,
        copy: OwnedCopy,
        arrival: Arrival,
    ) {
        let before = self.standing();
        let spare = {
            let mut inner = self.inner.lock();
            self.chunks_moved.store(0, Ordering::Relaxed);
            self.copy.publish(copy, &self.shared.copies);
            inner.rare.change(|rare| (rare.spare.take(), rare.dirty.take()))
        };
        drop(spare);
        self.leave_order();
        self.count_change(before);
        if arrival != Arrival::WrittenBack || crate::planted!("write-back-uses") {
            // Its bytes have arrived for a caller that has not used them yet: it is not to be the
            // next that leaves.
            self.mark_now();
        }
        self.enter_order(arrival == Arrival::Prefetched);
    }

    /// Whether what it has in host memory lies there.
    pub(crate) fn lies_in(&self, _pass: &GatePass, is_there: impl Fn(&HostSlot) -> bool) -> bool {
        match self.copy.peek(&is_there) {
            Some(is_there) => is_there,
            None => self.inner.lock().host_space().is_some_and(|space| is_there(space.slot())),
        }
    }

    /// Moves what it has in host memory to another slot. False if it has a reader there.
    pub(crate) fn relocate(&self, _pass: &GatePass, mut to: OwnedCopy) -> bool {
        let old = match self.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => guard.into_bytes(),
            Found::Locked => return false,
            Found::Nothing => {
                // Space that was never written.
                let before = self.inner.lock().rare.change(|rare| match &mut rare.dirty {
                    Some(dirty) => dirty.replace_host_space(to),
                    None => rare.spare.replace(to),
                });
                drop(before);
                return true;
            }
        };
        to.as_mut_slice().copy_from_slice(&old);
        let inner = self.inner.lock();
        self.copy.publish(to, &self.shared.copies);
        drop(inner);
        drop(old);
        true
    }

    /// Changes the bytes of the host copy where they are, if they have no reader; the chunks of
    /// `range` are then in host memory alone.
    pub(crate) fn write_in_place(
        &self,
        _pass: &GatePass,
        range: std::ops::Range<usize>,
        data: &[u8],
    ) -> bool {
        let before = self.standing();
        let mut old = Replaced::new();
        let mut flight = None;
        let mut left = on_devices::Left::default();
        let written = self.copy.write_in_place(|bytes| {
            // Under the copy's own lock: no reader sees new bytes with an old map.
            let mut inner = self.inner.lock();
            inner.extents.forget(self.len, chunks_of(&range), &mut old);
            left = inner.outdate_devices(self.home);
            flight = inner.flight.take();
            drop(inner);
            bytes[range].copy_from_slice(data);
        });
        drop((old, flight));
        self.left_devices(left);
        if written {
            self.count_change(before);
        }
        written
    }

    /// Takes the host copy away if it has no reader and the disk has all of it.
    pub(crate) fn drop_clean_copy(&self, _pass: &GatePass) -> Option<OwnedCopy> {
        let before = self.standing();
        assert!(!before.dirty, "the only copy of some bytes is never dropped");
        let copy = self.copy.take_idle(&self.shared.copies)?;
        self.leave_order();
        self.count_change(before);
        Some(copy)
    }

    /// Takes the host copy away, whether it has readers or not; the disk has all of it.
    pub(crate) fn detach_clean_copy(&self, _pass: &GatePass) {
        let before = self.standing();
        assert!(!before.dirty, "the only copy of some bytes is never dropped");
        self.copy.detach(&self.shared.copies);
        self.leave_order();
        self.count_change(before);
    }

    /// Where the object stands, for the gauges.
    pub(super) fn standing(&self) -> Standing {
        let in_copy = self.copy.is_some();
        let inner = self.inner.lock();
        Standing {
            in_host: in_copy || inner.host_space().is_some(),
            levels: self.levels_of(&inner.extents),
            dirty: in_copy && !inner.extents.is_whole(self.len),
            dirty_on_device: inner.rare.dirty.is_some(),
            map_bytes: inner.extents.memory_bytes()
                + inner.rare.dirty.as_ref().map_or(0, |dirty| dirty.map_bytes()),
        }
    }

    /// Keeps the gauges of the store equal to the sum over its objects.
    pub(super) fn count_change(&self, before: Standing) {
        let after = self.standing();
        let counters = &self.shared.counters;
        let gauge =
            |gauge: &AtomicU64, before: bool, after: bool, weight: u64| match (before, after) {
                (false, true) => stats::add(gauge, weight),
                (true, false) => stats::sub(gauge, weight),
                _ => {}
            };
        gauge(&self.shared.host.objects, before.in_host, after.in_host, 1);
        gauge(&counters.dirty_bytes, before.dirty, after.dirty, self.len as u64);
        let on_device = (before.dirty_on_device, after.dirty_on_device);
        gauge(&counters.vram_dirty_bytes, on_device.0, on_device.1, self.len as u64);
        stats::shift(&counters.map_bytes, before.map_bytes, after.map_bytes);
        for (level, storage) in self.shared.storage().iter().enumerate() {
            let is_in = |standing: &Standing| standing.levels >> level & 1 == 1;
            gauge(&storage.state.objects, is_in(&before), is_in(&after), 1);
            match (is_in(&before), is_in(&after)) {
                (false, true) => self.enter_order_in(level),
                (true, false) => self.leave_order_in(level),
                _ => {}
            }
        }
    }

    /// The tiers below host memory that have something of a map, one bit each.
    fn levels_of(&self, map: &ExtentMap) -> u8 {
        match self.shared.evicts_from(0) {
            true => map.levels(),
            // All of it is on disk: no extent has to be asked.
            false => u8::from(!map.is_empty()),
        }
    }
}
