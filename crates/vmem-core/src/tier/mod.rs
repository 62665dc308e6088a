//! One tier in which space is granted: its queue of requests.
//!
//! Invariant: every tier with a budget grants space through one kind of queue, by one set of rules. Called by the
//! migrations and the public calls, which ask, and by the actor, which serves.

mod device;
mod queue;

use std::sync::Arc;

use crate::host::{HostArena, HostSlot};

pub(crate) use device::DeviceSpace;
pub(crate) use queue::{Class, Need, Queue, Refused, Space, Wanted};

/// Why there is no space now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoSpace {
    /// By its footprint it would fit: the space lies in pieces, or in spans of other objects.
    pub(crate) scattered: bool,
}

impl Space for Arc<HostArena> {
    type Slot = HostSlot;

    fn footprint(&self, len: usize) -> u64 {
        HostArena::footprint(len)
    }

    fn used_bytes(&self) -> u64 {
        HostArena::used_bytes(self)
    }

    fn capacity_bytes(&self) -> u64 {
        HostArena::capacity_bytes(self)
    }

    fn try_take(&self, len: usize, owner: u64) -> Result<HostSlot, NoSpace> {
        self.try_alloc(len, owner).map_err(|why| NoSpace { scattered: why.scattered })
    }

    fn put_back(&self, slot: HostSlot) {
        slot.put_back();
    }
}
