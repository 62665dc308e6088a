//! What a lease asks for, and what may be in its way.
//!
//! Invariant: an object is in a request once, however often it is named. Made by the leases, read
//! by the task that takes them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::Result;
use super::lease::LEASE;
use super::pin::until_unheld;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::object::{Object, Shared};

/// What a lease asks for.
pub(super) struct LeaseRequest {
    pub(super) reads: Vec<VMemHandle>,
    pub(super) writes: Vec<VMemHandle>,
    /// The bytes of what is written do not matter: it begins as zeros.
    pub(super) overwrite: bool,
}

/// What keeps a set from being taken now.
pub(super) enum Obstacle {
    /// It is not on the device, or not the current version.
    Missing,
    /// A change of this object is under way.
    Changing(Arc<Object>),
    /// Copies or kernels use what is to be written, and that has to wait until they have ended, or
    /// until it is known where they end.
    Used(Arc<Object>, bool),
    /// The budget for holds has no place for this many bytes more.
    Budget(u64),
}

impl LeaseRequest {
    /// All objects, those to be read first.
    pub(super) fn handles(&self) -> impl Iterator<Item = &VMemHandle> {
        self.reads.iter().chain(&self.writes)
    }

    /// Each object that has bytes, once.
    pub(super) fn objects(&self) -> Vec<Arc<Object>> {
        let mut seen = HashSet::new();
        let objects = self.handles().map(VMemHandle::object);
        objects.filter(|object| object.len > 0 && seen.insert(object.id)).cloned().collect()
    }

    /// Whether the bytes of this object do not matter.
    pub(super) fn overwrites(&self, object: &Object) -> bool {
        self.overwrite && self.writes.iter().any(|handle| handle.object().id == object.id)
    }

    /// Whether the version before has to be below the device before the lease begins.
    pub(super) fn keeps_version(&self, object: &Object) -> bool {
        let is_due_at_once = object.write_back_pause() == Some(Duration::ZERO);
        let is_kept = self.overwrite || is_due_at_once && !crate::planted!("eager-unkept");
        is_kept && self.writes.iter().any(|handle| handle.object().id == object.id)
    }

    /// Whether it may go on behind a kernel that has not ended.
    pub(super) fn follows(&self, object: &Object, number: usize) -> bool {
        let is_written = self.writes.iter().any(|handle| handle.object().id == object.id);
        object.is_followed_on(number, is_written) && !(self.overwrite && is_written)
    }

    /// Whether the device has what the lease needs of this object.
    pub(super) fn is_there(&self, object: &Object, number: usize) -> bool {
        match self.overwrites(object) {
            true => object.has_space_on(number),
            false => object.is_on(number),
        }
    }

    /// Whether what is written is in the request once.
    ///
    /// # Errors
    ///
    /// `InvalidConfig`.
    pub(super) fn check_distinct(&self) -> Result<()> {
        let mut seen = HashSet::new();
        let is_once = self.writes.iter().all(|handle| seen.insert(handle.id()))
            && !self.reads.iter().any(|handle| seen.contains(&handle.id()));
        if is_once {
            return Ok(());
        }
        let reason = "an object that a set writes to is in it more than once";
        Err(VirtualMemoryError::invalid_config("device_set", reason))
    }

    /// Whether all of it could ever be on the device at once.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity`.
    pub(super) fn check_fits(&self, shared: &Shared, number: usize) -> Result<()> {
        let device = shared.device(number)?;
        let footprints =
            self.objects().into_iter().map(|object| device.backend.footprint(object.len));
        shared.check_fits_holds(device.tier(), footprints.fold(0, u64::saturating_add))
    }
}

/// Waits until what was in the way may have gone.
pub(super) async fn wait(
    shared: &Arc<Shared>,
    number: usize,
    blocked: Obstacle,
    deadline: &Deadline,
) -> Result<()> {
    let device = shared.device(number)?;
    match blocked {
        Obstacle::Missing => Ok(()),
        Obstacle::Changing(object) => object.gate_opened(deadline).await,
        Obstacle::Budget(footprint) => {
            until_unheld(shared, device.tier(), footprint, deadline).await
        }
        Obstacle::Used(object, until_passed) => loop {
            let _gate = crate::planted!("writer-holds").then(|| object.try_gate());
            // Before the look, so that no drop in between is missed.
            let released = device.released();
            if shared.is_closed() {
                return Err(VirtualMemoryError::Closed);
            }
            if !object.is_used_on(number, until_passed) {
                return Ok(());
            }
            // Other waiters for the same kernel notify too, when they give up what they had.
            let late = |Late| match device.state.holds.bytes().total() {
                0 => deadline.error(LEASE),
                _ => {
                    let footprint = device.backend.footprint(object.len);
                    shared.all_held(device.tier(), footprint, deadline.waited())
                }
            };
            deadline.bound(released).await.map_err(late)?;
            if crate::planted!("writers-ring") {
                return Ok(());
            }
        },
    }
}
