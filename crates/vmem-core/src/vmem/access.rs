//! One device of a store, for the backend that adds operations on it.
//!
//! Invariant: a future of these holds nothing between polls; tasks take what leases ask for
//! (`lease_set.rs`). Called by `vmem-gpu` through `backend`.

use std::sync::Arc;

use super::lease::{LEASE, VramChange, VramHold, VramSet, VramShare};
use super::lease_request::LeaseRequest;
use super::lease_set::{follow, take};
use super::pin::HoldGuard;
use super::{Result, VirtualMemory};
use crate::buffer::IoBuf;
use crate::device::{DeviceBackend, DeviceError};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::tier::{Class, HoldKind, Need};

/// One device of a store, for backends that add operations on it.
///
/// ```
/// # use vmem::{MemoryTier, VirtualMemoryConfig};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
/// use vmem::backend::DeviceAccess;
///
/// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
/// let vmem = vmem::open(config.gpu(vmem::GpuSelection::Off).build()?).await?;
/// assert_eq!(DeviceAccess::all(&vmem).count(), 0);
/// # vmem.close().await
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DeviceAccess {
    vmem: VirtualMemory,
    device: usize,
}

impl DeviceAccess {
    /// The devices of a store, in the order of their numbers.
    pub fn all(vmem: &VirtualMemory) -> impl ExactSizeIterator<Item = DeviceAccess> + use<> {
        let vmem = vmem.clone();
        (0..vmem.shared.devices().len())
            .map(move |device| DeviceAccess { vmem: vmem.clone(), device })
    }

    /// The store.
    pub fn store(&self) -> &VirtualMemory {
        &self.vmem
    }

    /// What moves the bytes.
    pub fn backend(&self) -> &Arc<dyn DeviceBackend> {
        &self.vmem.shared.devices()[self.device].backend
    }

    /// Tells operators that an operation of the device failed, as a fault of the tier. Returns the
    /// error for its caller.
    pub fn fault(&self, error: DeviceError) -> VirtualMemoryError {
        self.vmem.shared.devices()[self.device].fault(error)
    }

    pub(super) fn number(&self) -> usize {
        self.device
    }

    /// Its memory, as a tier.
    pub fn tier(&self) -> MemoryTier {
        self.vmem.shared.devices()[self.device].tier()
    }

    /// A share of this version of the object, if the device has it now. It is not held: its memory
    /// stays, and a write makes another version.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`.
    pub fn share(&self, handle: &VMemHandle) -> Result<Option<VramShare>> {
        let object = self.vmem.check(handle)?;
        let share = object.share_on(self.device);
        if share.is_some() {
            object.touch();
        }
        Ok(share.map(|range| VramShare::new(range, false)))
    }

    /// Whether any plan follows the use of devices.
    pub fn has_plans(&self) -> bool {
        self.vmem.shared.plans.follow()
    }

    /// Tells the plans for this device that a kernel is going to use this object.
    pub fn tell_plans(&self, handle: &VMemHandle) {
        self.vmem.shared.plans.used(self.device, handle.id());
    }

    /// Space in host memory for bytes in passage, charged like any other.
    ///
    /// # Errors
    ///
    /// Those of making space in host memory.
    pub async fn scratch(&self, len: usize) -> Result<IoBuf> {
        let vmem = &self.vmem;
        vmem.check_open()?;
        let need = Need::one(len, 0, Class::Demand);
        let space = vmem.shared.host_space_or_error(&need, &vmem.shared.deadline()).await?;
        Ok(IoBuf::from_copy(space))
    }

    /// Brings the object to the device and keeps this version there, for a kernel that reads it.
    ///
    /// # Errors
    ///
    /// Those of a [`pin`](VirtualMemory::pin) there.
    pub async fn hold(&self, handle: &VMemHandle) -> Result<VramHold> {
        self.vmem.check(handle)?.touch();
        self.vmem.shared.device(self.device)?;
        if let Some(held) = HoldGuard::now(handle, self.tier(), HoldKind::Lease)? {
            let range = handle.object().share_on(self.device);
            if range.is_some() || handle.is_empty() {
                self.vmem.shared.plans.used(self.device, handle.id());
                let after = Vec::new();
                return Ok(VramHold { range, after, _held: held, _handle: handle.clone() });
            }
        } else if let Some(hold) = follow(handle, self.device) {
            self.vmem.shared.plans.used(self.device, handle.id());
            return Ok(hold);
        }
        let mut set = self.set(std::slice::from_ref(handle), &[]).await?;
        Ok(set.reads.pop().expect("invariant: one was asked for"))
    }

    /// The object on the device, for a kernel that writes to it: waits until it has no other user
    /// there, but those that are gone and of which it is known where their work ends. With
    /// `overwrite` the kernel writes all of it: it waits for these too, the bytes before are not
    /// loaded, and it begins as zeros.
    ///
    /// # Errors
    ///
    /// Those of a [`pin`](VirtualMemory::pin) there and of making space in host memory, where the
    /// new version will be too.
    pub async fn change(&self, handle: &VMemHandle, overwrite: bool) -> Result<VramChange> {
        let request = LeaseRequest { reads: Vec::new(), writes: vec![handle.clone()], overwrite };
        let mut set = self.take(request).await?;
        Ok(set.writes.pop().expect("invariant: one was asked for"))
    }

    /// Several objects on the device at once, some for kernels that read them, some for kernels
    /// that write: all or none. Nothing is held while any of them has to be waited for.
    ///
    /// # Errors
    ///
    /// Those of [`hold`](Self::hold) and [`change`](Self::change); `ExceedsCapacity` if all could
    /// never be there at once; `InvalidConfig` if an object that is written is in the set more than
    /// once.
    pub async fn set(&self, reads: &[VMemHandle], writes: &[VMemHandle]) -> Result<VramSet> {
        self.take(LeaseRequest { reads: reads.to_vec(), writes: writes.to_vec(), overwrite: false })
            .await
    }

    async fn take(&self, request: LeaseRequest) -> Result<VramSet> {
        let vmem = &self.vmem;
        vmem.shared.device(self.device)?;
        for handle in request.handles() {
            vmem.check(handle)?.touch();
            vmem.shared.plans.used(self.device, handle.id());
        }
        request.check_distinct()?;
        request.check_fits(&vmem.shared, self.device)?;
        let deadline = vmem.shared.deadline();
        let request = Arc::new(request);
        loop {
            let taken = take(vmem.shared.clone(), self.device, request.clone(), deadline);
            let parcel = vmem.shared.spawn_for_caller_briefly("vmem-lease", taken);
            if let Some(set) = vmem.shared.answer(&parcel, &deadline, LEASE).await? {
                return Ok(set);
            }
            vmem.check_open()?;
        }
    }
}
