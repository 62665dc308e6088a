//! Counts what gathers copy, for those that promote.
//!
//! Invariant: while no gather promotes, nothing is counted. What a gather counts is its own until
//! its end, so one that is dropped asks for nothing; the counts of the device stay. Called by
//! `vmem-gpu` through `backend`.

use std::sync::Arc;

use super::DeviceAccess;
use crate::config::Promotion;
use crate::handle::VMemHandle;
use crate::migrate::request_gathered;
use crate::object::Object;
use crate::promotion;

/// One gather, which counts what it copies of objects that are not on its device.
#[derive(Debug)]
pub struct GatherCount<'a> {
    access: &'a DeviceAccess,
    /// When it began, in nanoseconds of the store's clock.
    now: u64,
    /// What has been gathered often enough.
    due: Vec<Arc<Object>>,
}

impl DeviceAccess {
    /// Counts a gather that begins now; none if gathers promote nothing.
    pub fn count_gather(&self) -> Option<GatherCount<'_>> {
        let shared = &self.store().shared;
        let counts = shared.limits.gather_promotion != Promotion::Never;
        counts.then(|| GatherCount { access: self, now: shared.recency.now(), due: Vec::new() })
    }
}

impl GatherCount<'_> {
    /// The gather copies `bytes` bytes of this object, which the device does not have.
    pub fn add(&mut self, handle: &VMemHandle, bytes: usize) {
        let object = handle.object();
        let shared = &object.shared;
        let gathers = &shared.devices()[self.access.number()].gathers;
        let Some(before) = gathers.count(object.id, bytes as u64, self.now) else { return };
        if promotion::promotes(shared.limits.gather_promotion, before, object.len as u64) {
            self.due.push(object.clone());
        }
    }

    /// The gather has ended well: what was gathered often enough comes to the device, in the
    /// background.
    pub fn end(self) {
        for object in self.due {
            request_gathered(&object, self.access.number());
        }
    }
}
