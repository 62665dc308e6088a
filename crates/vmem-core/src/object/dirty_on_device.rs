//! An object whose current version is in device memory alone, since a kernel wrote it there: it is
//! dirty on the device.
//!
//! Invariant: as long as it is dirty there it has no host copy and an empty disk map, so nothing
//! else can be taken for its version: a valid range on a device has all of it, or it is lost, and
//! then every read fails. It keeps a floor, which is space for it below, so that it can always
//! leave; and as its base the version that was last written back, for `revert` alone. Changed by
//! the holder of the gate. Called by `migrate/kernel` and `migrate/from_device`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{ExtentMap, GatePass, Inner, Named, Object};
use crate::chunk::{chunk_count, chunk_lens};
use crate::config::WriteBack;
use crate::copy::OwnedCopy;
use crate::error::VirtualMemoryError;
use crate::storage::{Extent, TierError};

/// Tells a version that only a device has from every other one.
#[derive(Debug)]
pub(crate) struct Mark;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct DirtyOnDevice {
    mark: Arc<Mark>,
    /// None if nothing of the object was whole below host memory when it became dirty.
    base: Option<ExtentMap>,
    floor: Floor,
    /// When its timer is to write it back: the earliest of the moments that were asked for.
    due: Option<Instant>,
    /// The only range that has the version was claimed by a lease that changes it.
    is_claimed: bool,
}

/// Space for the version below.
#[derive(Debug, Default)]
enum Floor {
    #[default]
    Gone,
    InHost(OwnedCopy),
    InStorage(Vec<Extent>),
}

impl DirtyOnDevice {
    fn new(base: Option<ExtentMap>, floor: Floor, due: Option<Instant>) -> Self {
        DirtyOnDevice { mark: Arc::new(Mark), base, floor, due, is_claimed: false }
    }

    pub(super) fn mark(&self) -> &Arc<Mark> {
        &self.mark
    }

    /// Its space in host memory.
    pub(super) fn host_space(&self) -> Option<&OwnedCopy> {
        match &self.floor {
            Floor::InHost(space) => Some(space),
            Floor::InStorage(_) | Floor::Gone => None,
        }
    }

    /// Puts other space in the place of that in host memory. Returns what it replaces.
    pub(super) fn replace_host_space(&mut self, space: OwnedCopy) -> Option<OwnedCopy> {
        match std::mem::replace(&mut self.floor, Floor::InHost(space)) {
            Floor::InHost(space) => Some(space),
            Floor::InStorage(_) | Floor::Gone => None,
        }
    }

    /// What the base takes to say where it is, in bytes.
    pub(super) fn map_bytes(&self) -> u64 {
        self.base.as_ref().map_or(0, ExtentMap::memory_bytes)
    }
}

impl Inner {
    /// Notes whether a lease has claimed a range, where no other tier has the version.
    pub(super) fn set_claimed(&mut self, is_claimed: bool) {
        let dirty = self.rare.get_mut().and_then(|rare| rare.dirty.as_mut());
        if let Some(dirty) = dirty {
            dirty.is_claimed = is_claimed && !crate::planted!("dirty-claimed");
        }
    }

    /// Whether a lease has claimed the only range that has the version: it comes back with the
    /// gate, or is lost then, or there is another one.
    pub(super) fn is_version_claimed(&self, object: &Object) -> bool {
        let is_claimed = self.rare.dirty.as_ref().is_some_and(|dirty| dirty.is_claimed);
        is_claimed && self.device_share(object.shared.devices()).is_none()
    }

    /// Why the current version can be read nowhere, if that is so.
    pub(super) fn lost_version(&self, object: &Object) -> Option<VirtualMemoryError> {
        let dirty = self.rare.dirty.as_ref().filter(|dirty| !dirty.is_claimed)?;
        if self.rare.pending.is_some() || self.device_share(object.shared.devices()).is_some() {
            return None;
        }
        let below = match dirty.base {
            Some(_) => "`revert` gives the version last written back",
            None => "no version was written back",
        };
        let message = format!("only a device had it, and it is lost there: {below}");
        let operation = "reading what a kernel wrote";
        Some(VirtualMemoryError::Device { operation, code: 0, message: message.into() })
    }
}

impl Object {
    /// Whether only devices have the current version.
    pub(crate) fn is_dirty_on_device(&self) -> bool {
        self.inner.lock().rare.dirty.is_some()
    }

    /// After how long what a kernel wrote is written back; none if only once something asks for
    /// that.
    pub(crate) fn write_back_pause(&self) -> Option<Duration> {
        // What is pinned to host memory has a copy there.
        let is_pinned = self.pins() > 0 && !crate::planted!("dirty-unpins");
        match self.shared.limits.write_back {
            WriteBack::After(pause) if !is_pinned => Some(pause),
            WriteBack::OnEvict if !is_pinned => None,
            _ => Some(Duration::ZERO),
        }
    }

    /// Whether only this device has it.
    pub(crate) fn is_alone_on(&self, device: usize) -> bool {
        let inner = self.inner.lock();
        inner.rare.dirty.is_some()
            && inner.place(device).is_some_and(|place| place.is_valid)
            && !inner.is_valid_elsewhere(device, self.shared.devices())
    }

    /// What a kernel wrote on this device is the current version, which only the device has.
    /// `space` is its floor, unless it has one; the version before was whole below host memory, or
    /// zeros, if it had no copy above it (`had_copy`) or the map says so.
    pub(crate) fn publish_dirty(&self, pass: &GatePass, space: Option<OwnedCopy>, had_copy: bool) {
        self.publish_on_device(pass, space, had_copy, false);
    }

    /// What kernels wrote on this device was the current version, and is lost by now.
    pub(crate) fn publish_lost(&self, pass: &GatePass, space: Option<OwnedCopy>, had_copy: bool) {
        self.publish_on_device(pass, space, had_copy, true);
    }

    fn publish_on_device(
        &self,
        _pass: &GatePass,
        space: Option<OwnedCopy>,
        had_copy: bool,
        is_lost: bool,
    ) {
        let durable = self.named.get().and_then(Named::state).and_then(|(_, durable)| durable);
        let before = self.standing();
        let (left, replaced) = {
            let mut inner = self.inner.lock();
            let map = std::mem::take(&mut inner.extents);
            if is_lost {
                // No range has it.
                inner.rare.change(|rare| rare.pending = None);
            }
            let left = inner.outdate_devices(self.home);
            let flight = inner.flight.take();
            let replaced = inner.rare.change(|rare| {
                rare.pending = None;
                let (dirty, spare_space) = match rare.dirty.take() {
                    Some(dirty) => {
                        let DirtyOnDevice { base, floor, due, .. } = *dirty;
                        let (floor, spare_space) = match (floor, space) {
                            (Floor::Gone, Some(space)) => (Floor::InHost(space), None),
                            (floor, space) => (floor, space),
                        };
                        (DirtyOnDevice::new(base, floor, due), spare_space)
                    }
                    None => {
                        let is_whole = !had_copy || map.is_whole(self.len);
                        let base = is_whole.then(|| map.clone()).or(durable);
                        let floor = space.map_or(Floor::Gone, Floor::InHost);
                        (DirtyOnDevice::new(base, floor, None), None)
                    }
                };
                rare.dirty = Some(Box::new(dirty));
                (rare.corrupt.take(), rare.spare.take(), spare_space)
            });
            (left, (replaced, flight, map))
        };
        drop(replaced);
        self.left_devices(left);
        self.leave_order();
        self.count_change(before);
        if self.has_host_space() {
            self.enter_order(false);
        }
    }

    /// Has it written back at `due` at the latest. Returns what wakes its timer if the caller is to
    /// start that, since there is none; a timer that sleeps longer is woken.
    pub(crate) fn set_due(&self, due: Instant) -> Option<Arc<Notify>> {
        let mut inner = self.inner.lock();
        inner.rare.change(|rare| {
            let known = &mut rare.dirty.as_mut()?.due;
            let is_earlier = known.is_none_or(|known| due < known);
            if is_earlier {
                *known = Some(due);
            }
            if let Some(timer) = &rare.timer {
                if is_earlier && !crate::planted!("timer-sleeps") {
                    timer.notify_one();
                }
                return None;
            }
            let timer = Arc::new(Notify::new());
            rare.timer = Some(timer.clone());
            Some(timer)
        })
    }

    /// When its timer is to write it back. None if it is not dirty on a device, or lost, or nothing
    /// asks for it: then it has no timer any more.
    pub(crate) fn timer_due(&self) -> Option<Instant> {
        let mut inner = self.inner.lock();
        let is_lost = inner.lost_version(self).is_some();
        inner.rare.change(|rare| {
            let due = rare.dirty.as_ref().filter(|_| !is_lost).and_then(|dirty| dirty.due);
            rare.timer.take_if(|_| due.is_none());
            due
        })
    }

    /// Its timer has failed at what was due then, and tries again at this time. A version that has
    /// become due since stays so.
    pub(crate) fn postpone(&self, tried: Instant, again: Instant) {
        let mut inner = self.inner.lock();
        let dirty = inner.rare.get_mut().and_then(|rare| rare.dirty.as_mut());
        if let Some(due) = dirty.and_then(|dirty| dirty.due.as_mut())
            && *due <= tried
        {
            *due = again;
        }
    }

    /// Its version was written back into these extents; devices have it too.
    pub(crate) fn publish_written_back(&self, _pass: &GatePass, map: ExtentMap) {
        let before = self.standing();
        let replaced = {
            let mut inner = self.inner.lock();
            let map = std::mem::replace(&mut inner.extents, map);
            (map, inner.rare.change(|rare| rare.dirty.take()))
        };
        drop(replaced);
        self.leave_order();
        self.count_change(before);
    }

    /// A kernel may have written half of a version over the current one of this device: it is
    /// lost, unless another device has it.
    pub(crate) fn lose_version(&self, pass: &GatePass, device: usize) {
        let mut inner = self.inner.lock();
        inner.rare.change(|rare| rare.pending = None);
        inner.set_claimed(false);
        drop(inner);
        self.detach_from(pass, device);
    }

    /// Makes the version that was last written back the current one, if that is lost.
    ///
    /// # Errors
    ///
    /// `Device` if none was written back.
    pub(crate) fn revert(&self, _pass: &GatePass) -> Result<(), VirtualMemoryError> {
        let before = self.standing();
        let (left, dirty) = {
            let mut inner = self.inner.lock();
            let Some(lost) = inner.lost_version(self) else { return Ok(()) };
            let dirty = inner.rare.change(|rare| rare.dirty.take_if(|dirty| dirty.base.is_some()));
            let Some(mut dirty) = dirty else { return Err(lost) };
            inner.extents = dirty.base.take().unwrap_or_default();
            (inner.take_devices(), dirty)
        };
        drop(dirty);
        self.left_devices(left);
        self.leave_order();
        self.count_change(before);
        self.shared.space_was_freed();
        Ok(())
    }

    // ---- The floor -------------------------------------------------------------------------

    /// Whether space for it is set apart below the device.
    pub(crate) fn has_floor(&self) -> bool {
        let inner = self.inner.lock();
        inner.rare.dirty.as_ref().is_some_and(|dirty| !matches!(dirty.floor, Floor::Gone))
    }

    /// Whether that is in host memory.
    pub(crate) fn has_floor_in_host(&self) -> bool {
        let inner = self.inner.lock();
        inner.rare.dirty.as_ref().is_some_and(|dirty| dirty.host_space().is_some())
    }

    /// Puts space in host memory back that was taken and did not get the version; the object, if it
    /// has no floor, has it as that.
    pub(crate) fn return_floor(&self, _pass: &GatePass, space: Option<OwnedCopy>) {
        let before = self.standing();
        let mut inner = self.inner.lock();
        let dirty = inner.rare.get_mut().and_then(|rare| rare.dirty.as_mut());
        let dirty = dirty.filter(|dirty| matches!(dirty.floor, Floor::Gone));
        match (dirty, space) {
            (Some(dirty), Some(space)) => dirty.floor = Floor::InHost(space),
            (_, space) => {
                drop(inner);
                drop(space);
                return;
            }
        }
        drop(inner);
        self.leave_order();
        self.count_change(before);
        self.enter_order(false);
    }

    /// Takes the space in host memory.
    pub(crate) fn take_floor_in_host(&self, _pass: &GatePass) -> Option<OwnedCopy> {
        let before = self.standing();
        let mut inner = self.inner.lock();
        let dirty = inner.rare.get_mut()?.dirty.as_mut()?;
        let space = match std::mem::take(&mut dirty.floor) {
            Floor::InHost(space) => space,
            floor => {
                dirty.floor = floor;
                return None;
            }
        };
        drop(inner);
        self.leave_order();
        self.count_change(before);
        Some(space)
    }

    /// Takes the space below host memory.
    pub(crate) fn take_floor_in_storage(&self, _pass: &GatePass) -> Option<Vec<Extent>> {
        let mut inner = self.inner.lock();
        let dirty = inner.rare.get_mut()?.dirty.as_mut()?;
        match std::mem::take(&mut dirty.floor) {
            Floor::InStorage(extents) => Some(extents),
            floor => {
                dirty.floor = floor;
                None
            }
        }
    }

    /// Reserves its floor below host memory, and gives back what it has of that in host memory.
    ///
    /// # Errors
    ///
    /// What the tier below says; the floor is then where it was.
    pub(crate) fn lower_floor(&self, pass: &GatePass) -> Result<(), TierError> {
        let lens = chunk_lens(self.len, 0..chunk_count(self.len));
        let extents = self.shared.reserve(self.home_level(), &lens)?;
        let space = self.take_floor_in_host(pass);
        let mut inner = self.inner.lock();
        if let Some(dirty) = inner.rare.get_mut().and_then(|rare| rare.dirty.as_mut()) {
            dirty.floor = Floor::InStorage(extents);
        }
        drop(inner);
        drop(space);
        Ok(())
    }
}
