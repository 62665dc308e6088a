//! A store over a chain of tiers: host memory, a disk, and a tier below it. The last one is
//! simulated: the same traits over another disk in memory.
//!
//! Invariant: no test names anything of the store that is only for the last tier; what holds of
//! one step of the chain holds of the next. Run in `it`.

mod faults;
mod moves;
mod named_below;
mod names;
mod pressure;

use std::sync::Arc;

use vmem::backend::{Backends, Remote};
use vmem::{
    Capabilities, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder,
    VirtualMemoryStats,
};
use vmem_io::DiskTier;

use crate::support::{self, MemDriver, STAGING};

const REMOTE: MemoryTier = MemoryTier::Remote;

/// A store, and the two media below its host memory.
pub(crate) struct Chain {
    pub(crate) vmem: VirtualMemory,
    pub(crate) disk: Arc<MemDriver>,
    pub(crate) remote: Arc<MemDriver>,
}

/// A store with these bytes of object space, on disk and below that.
pub(crate) fn open(
    (space, disk, remote): (usize, usize, usize),
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> Chain {
    let drivers = (MemDriver::new(), MemDriver::new());
    let backends = Backends {
        host_capacity_bytes: (space + STAGING) as u64,
        disk: DiskTier::new(drivers.0.clone(), disk as u64),
        remote: Some(Remote::Unnamed(DiskTier::new(drivers.1.clone(), remote as u64))),
        catalog: None,
        devices: Vec::new(),
        capabilities: Capabilities::new("memory".into(), "not in this test".into()),
    };
    let vmem = VirtualMemory::with_backends(&support::config(space, set), backends);
    Chain { vmem: vmem.expect("opens"), disk: drivers.0, remote: drivers.1 }
}

impl Chain {
    /// Waits until nothing is in flight and there is no waiter.
    async fn settle(&self) -> VirtualMemoryStats {
        let in_flight = || self.disk.in_flight() + self.remote.in_flight();
        support::settle_with(&self.vmem, in_flight).await
    }

    /// Which tiers have an object: host memory, disk, the one below.
    fn places(&self, handle: &VMemHandle) -> [bool; 3] {
        let residency = self.vmem.residency(handle).expect("alive");
        [residency.host, residency.disk, residency.remote]
    }

    /// All objects were freed: nothing is left in any tier.
    async fn assert_empty(&self) {
        let stats = self.settle().await;
        support::assert_empty(&stats, "the chain");
        let below = [stats.remote.used_bytes, stats.remote.objects, stats.disk.objects];
        assert_eq!(below, [0; 3], "{stats:#?}");
    }
}
