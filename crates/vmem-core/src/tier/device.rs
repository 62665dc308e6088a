//! Device memory as space that is granted.
//!
//! Invariant: each range tells the tier of every share that is dropped, so nobody who waits for memory, or for the
//! last user of a range, misses it. Called by the queue of the tier.

use std::sync::Arc;

use super::{NoSpace, Space};
use crate::device::{DeviceBackend, DeviceRange, ShareWatcher};

/// The memory of one device.
pub(crate) struct DeviceSpace {
    backend: Arc<dyn DeviceBackend>,
    watcher: ShareWatcher,
}

impl DeviceSpace {
    pub(crate) fn new(backend: Arc<dyn DeviceBackend>, watcher: ShareWatcher) -> Self {
        DeviceSpace { backend, watcher }
    }
}

impl Space for DeviceSpace {
    type Slot = DeviceRange;

    fn footprint(&self, len: usize) -> u64 {
        self.backend.footprint(len)
    }

    fn used_bytes(&self) -> u64 {
        self.backend.usage().used_bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.backend.usage().capacity_bytes
    }

    fn try_take(&self, len: usize, _owner: u64) -> Result<DeviceRange, NoSpace> {
        match self.backend.reserve(len) {
            Some(range) => {
                range.watch(self.watcher.clone());
                Ok(range)
            }
            None => {
                let usage = self.backend.usage();
                let free = usage.capacity_bytes.saturating_sub(usage.used_bytes);
                Err(NoSpace { scattered: self.backend.footprint(len) <= free })
            }
        }
    }

    fn put_back(&self, slot: DeviceRange) {
        slot.put_back();
    }
}
