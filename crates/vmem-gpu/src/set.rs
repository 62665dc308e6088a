//! Several objects in device memory at once.
//!
//! Invariant: a set is granted whole or not at all, and one set at a time gathers what it needs: whoever waits for his turn
//! holds nothing, so that sets over the same objects, in whatever order, never wait for each other in a ring. Called by users.

use std::collections::HashSet;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use vmem_core::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::lease::{DeviceLease, DeviceLeaseMut, VramExt, tier};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// What a set is to have; [`acquire`](Self::acquire) gets it.
#[derive(Debug)]
#[must_use = "it gets nothing before `acquire`"]
pub struct DeviceSetRequest {
    vmem: VirtualMemory,
    stream: Arc<CudaStream>,
    read: Vec<VMemHandle>,
    write: Vec<VMemHandle>,
}

impl DeviceSetRequest {
    pub(crate) fn new(vmem: &VirtualMemory, stream: &Arc<CudaStream>) -> Self {
        let (vmem, stream) = (vmem.clone(), stream.clone());
        DeviceSetRequest { vmem, stream, read: Vec::new(), write: Vec::new() }
    }

    /// One more object that kernels read.
    pub fn read(mut self, handle: &VMemHandle) -> Self {
        self.read.push(handle.clone());
        self
    }

    /// One more object that kernels change.
    pub fn write(mut self, handle: &VMemHandle) -> Self {
        self.write.push(handle.clone());
        self
    }

    /// All of them, or none. While it waits for its turn it holds nothing.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` if one object is both read and written, or written twice; `ExceedsCapacity` at once if device memory, or what
    /// leases may hold of it, could never have all of them; and those of a single lease.
    pub async fn acquire(self) -> Result<DeviceSet> {
        let DeviceSetRequest { vmem, stream, read, write } = self;
        let mut seen = HashSet::new();
        let twice = !write.iter().all(|handle| seen.insert(handle.id()))
            || read.iter().any(|handle| seen.contains(&handle.id()));
        if twice {
            let reason = "an object that a set writes to is in it more than once".into();
            return Err(VirtualMemoryError::InvalidConfig { field: "device_set", reason });
        }
        seen.extend(read.iter().map(VMemHandle::id));
        let mut each: Vec<_> = read.iter().chain(&write).collect();
        each.sort_unstable_by_key(|handle| handle.id());
        each.dedup_by_key(|handle| handle.id());
        vmem.check_fits_leases(&each)?;
        let _turn = tier(&vmem)?.set_turn().await;
        let mut set = DeviceSet { read: Vec::new(), write: Vec::new() };
        for handle in &read {
            set.read.push(vmem.device_on(handle, &stream).await?);
        }
        for handle in &write {
            set.write.push(vmem.device_mut_on(handle, &stream).await?);
        }
        Ok(set)
    }
}

/// Several objects in device memory, each a lease, in the order in which they were asked for.
#[derive(Debug)]
#[must_use = "dropping it ends the leases"]
pub struct DeviceSet {
    /// Those that kernels read.
    pub read: Vec<DeviceLease>,
    /// Those that kernels change.
    pub write: Vec<DeviceLeaseMut>,
}

impl DeviceSet {
    /// Ends all leases, and says how that went for those that kernels changed.
    ///
    /// # Errors
    ///
    /// The first of [`DeviceLeaseMut::finish`].
    pub async fn finish(self) -> Result<()> {
        drop(self.read);
        let mut outcome = Ok(());
        for finished in self.write.into_iter().map(DeviceLeaseMut::end_now).collect::<Vec<_>>() {
            outcome = outcome.and(finished.await);
        }
        outcome
    }
}
