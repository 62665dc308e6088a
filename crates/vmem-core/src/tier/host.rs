//! Host memory as space that is granted.
//!
//! Invariant: the bytes that readers hold are charged to the space until the last reader drops
//! them. Called by the queue of the tier.

use std::sync::Arc;

use super::{NoSpace, Space};
use crate::copy::Copies;
use crate::host::{HostArena, HostSlot};

/// Object space in host memory.
pub(crate) struct HostSpace {
    pub(crate) arena: Arc<HostArena>,
    /// Counts what readers hold.
    copies: Copies,
}

impl HostSpace {
    pub(crate) fn new(arena: Arc<HostArena>, copies: Copies) -> Self {
        HostSpace { arena, copies }
    }
}

impl Space for HostSpace {
    type Slot = HostSlot;

    fn footprint(&self, len: usize) -> u64 {
        HostArena::footprint(len)
    }

    fn used_bytes(&self) -> u64 {
        self.arena.used_bytes()
    }

    fn capacity_bytes(&self) -> u64 {
        self.arena.capacity_bytes()
    }

    fn held_bytes(&self) -> u64 {
        self.copies.held_bytes()
    }

    fn try_take(&self, len: usize, owner: u64) -> Result<HostSlot, NoSpace> {
        self.arena.try_alloc(len, owner).map_err(|why| NoSpace::scattered(why.scattered))
    }

    fn put_back(&self, slot: HostSlot) {
        slot.put_back();
    }
}
