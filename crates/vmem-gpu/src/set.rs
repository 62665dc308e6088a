//! Several objects in device memory at once.
//!
//! Invariant: a set is granted whole or not at all, and one that waits holds nothing, so that sets
//! over the same objects, in whatever order, never wait for each other in a ring. The stream is
//! checked once, and a set that is dropped whole ends with one event. Called by users.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use futures::future::BoxFuture;
use vmem_core::backend::{VramChange, VramHold, VramSet};
use vmem_core::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::ext::device_of;
use crate::lease::{DeviceLease, DeviceLeaseMut, end_together};
use crate::order::follow;

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
        DeviceSetRequest {
            vmem: vmem.clone(),
            stream: stream.clone(),
            read: Vec::new(),
            write: Vec::new(),
        }
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

    /// All of them, or none. While it waits it holds nothing.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` if one object is both read and written, or written twice; `ExceedsCapacity`
    /// at once if device memory, or what leases may hold of it, could never have all of them;
    /// and those of a single lease.
    pub async fn acquire(self) -> Result<DeviceSet> {
        let DeviceSetRequest { vmem, stream, read, write } = self;
        let access = device_of(&vmem, &stream)?;
        let VramSet { mut reads, mut writes } = access.set(&read, &write).await?;
        let granted = reads.len() == read.len() && writes.len() == write.len();
        assert!(granted, "a set is granted whole");
        let mut after: Vec<_> = reads.iter_mut().flat_map(VramHold::take_after).collect();
        after.extend(writes.iter_mut().flat_map(VramChange::take_after));
        follow(&access, &stream, after)?;
        let read = reads.into_iter().map(|hold| DeviceLease::new(&access, &stream, hold));
        let read = read.collect::<Result<_>>()?;
        let write = writes.into_iter().map(|change| DeviceLeaseMut::new(&access, &stream, change));
        let write = write.collect::<Result<_>>()?;
        Ok(DeviceSet { stream, read, write })
    }
}

/// Several objects in device memory, each a lease, in the order in which they were asked for.
///
/// A lease that is taken out of it ends on its own. Those that kernels change and that nobody has
/// used are abandoned when the set is dropped, as [single ones](DeviceLeaseMut) are.
#[derive(Debug)]
#[must_use = "dropping it ends the leases"]
pub struct DeviceSet {
    stream: Arc<CudaStream>,
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
    pub async fn finish(mut self) -> Result<()> {
        let mut outcome = Ok(());
        for finished in self.end(false) {
            outcome = outcome.and(finished.await);
        }
        outcome
    }

    fn end(&mut self, dropped: bool) -> Vec<BoxFuture<'static, Result<()>>> {
        let read = std::mem::take(&mut self.read);
        let write = std::mem::take(&mut self.write);
        end_together(&self.stream, read, write, dropped)
    }
}

impl Drop for DeviceSet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Each lease is given up on its own.
            return;
        }
        // The future is not needed: the end goes on without it.
        drop(self.end(true));
    }
}
