//! Holds and changes of objects on a device, from which device backends build their leases.
//!
//! Invariant: a hold keeps the bytes of one version where they are; a change has the object alone
//! from when it is granted until what the kernel wrote is published or given up. Both own what they
//! keep and give it back when they are dropped; the caller drops them only after its kernel. Called
//! by `vmem-gpu` through `backend`.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::lease_request::LeaseRequest;
use super::lease_set::take;
use super::pin::HoldGuard;
use super::place::refresh;
use super::read::check_range;
use super::{Result, VirtualMemory};
use crate::buffer::IoBuf;
use crate::copy::OwnedCopy;
use crate::device::{DeviceAnswer, DeviceBackend, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::migrate::{Changed, request_finish};
use crate::object::GatePass;
use crate::tier::{Class, HoldKind, Need};

/// One version of an object in device memory, which stays there until this is dropped.
#[derive(Debug)]
pub struct VramHold {
    /// None for an object of no bytes.
    pub(super) range: Option<DeviceRange>,
    pub(super) _held: HoldGuard,
    /// Keeps the object alive while it is read.
    pub(super) _handle: VMemHandle,
}

impl VramHold {
    /// Where it is; none for an object of no bytes.
    pub fn range(&self) -> Option<Arc<DeviceRange>> {
        self.range.as_ref().map(|range| Arc::new(range.share()))
    }

    /// Ends the hold, except on the memory, which a kernel may still read: the object may leave it,
    /// but it is not reused before the share is dropped.
    pub fn end(self) -> Option<VramShare> {
        self.range.map(VramShare)
    }
}

/// An object in device memory that a kernel may write to, alone.
#[must_use = "dropping it gives the change up; `finish` publishes what was written"]
pub struct VramChange {
    /// None for an object of no bytes.
    pub(super) inner: Option<Claim>,
    /// Keeps the object alive while it is changed.
    pub(super) handle: VMemHandle,
    /// Somebody knows where the range is, and may have written to it.
    pub(super) is_used: AtomicBool,
    /// What was written of it; all of it if this is empty.
    pub(super) touched: Vec<Range<usize>>,
}

/// What a change keeps.
pub(super) struct Claim {
    pub(super) device: usize,
    pub(super) range: DeviceRange,
    /// Whether the range had the current version.
    pub(super) was_valid: bool,
    /// It begins as zeros.
    pub(super) is_overwritten: bool,
    /// For the new version below: taken before, so that what was written can never be lost for want
    /// of space. None if the object has such space already.
    pub(super) space: Option<OwnedCopy>,
    pub(super) pass: GatePass,
    pub(super) held: HoldGuard,
}

impl Claim {
    /// Nothing was written: it is as it was.
    pub(super) fn give_up(self) {
        let Claim { device, range, pass, was_valid, .. } = self;
        drop(range);
        pass.object().restore_on(&pass, device, was_valid);
    }
}

impl VramChange {
    /// Where it is, for a use that writes to it; none for an object of no bytes.
    pub fn range(&self) -> Option<Arc<DeviceRange>> {
        self.mark_used();
        self.unused_range()
    }

    /// From now on a kernel may write to the range. A change that is dropped before leaves the
    /// object as it was.
    pub fn mark_used(&self) {
        self.is_used.store(true, Ordering::Relaxed);
    }

    /// As [`range`](Self::range), for a caller that keeps it and does not write to it.
    pub fn unused_range(&self) -> Option<Arc<DeviceRange>> {
        self.inner.as_ref().map(|inner| Arc::new(inner.range.share()))
    }

    /// Says that the kernel writes to this range of the object. What no such call names it does not
    /// write to; without any call it may write to all of it. Of a change that overwrites the object
    /// all is written anyway, with zeros.
    ///
    /// # Errors
    ///
    /// `OutOfRange`.
    pub fn touched(&mut self, range: Range<usize>) -> Result<()> {
        check_range(self.handle.object(), &range)?;
        self.touched.push(range);
        Ok(())
    }

    /// Publishes what was written as the new version, once `ready` says that it was written. Reads
    /// that begin from now on wait for that; if it fails the previous version stays, or, if the
    /// device alone had it, is lost. It goes on whether its answer is awaited or not.
    ///
    /// # Errors
    ///
    /// `Device` if the kernel failed, or the device was lost before the copy; `Closed`.
    pub fn finish(
        mut self,
        ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
    ) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        let (reply, answer) = oneshot::channel();
        match self.inner.take() {
            Some(inner) => self.hand_over(inner, ready, reply),
            None => drop(reply.send(Ok(()))),
        }
        async move { answer.await.unwrap_or(Err(VirtualMemoryError::Closed)) }
    }

    fn hand_over(
        &mut self,
        inner: Claim,
        ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
        reply: oneshot::Sender<Result<()>>,
    ) {
        let Claim { device, range, space, pass, held, is_overwritten, .. } = inner;
        let shared = pass.object().shared.clone();
        let handle = self.handle.clone();
        let mut touched = std::mem::take(&mut self.touched);
        if is_overwritten && !crate::planted!("overwrite-mixed") {
            touched.clear();
        }
        let change = Changed::begin(pass, (device, range), (space, touched), reply);
        let ready = Box::pin(async move {
            let outcome = if crate::planted!("lease-order") { Ok(()) } else { ready.await };
            // They were kept for as long as the kernel could write.
            drop((held, handle));
            outcome
        });
        request_finish(&shared, change, ready);
    }
}

impl Drop for VramChange {
    /// The change is abandoned: the contents of the range are undefined, unless nobody knew where
    /// it is.
    fn drop(&mut self) {
        let Some(claim) = self.inner.take() else { return };
        if claim.was_valid && !self.is_used.load(Ordering::Relaxed) {
            return claim.give_up();
        }
        let Claim { device, range, pass, .. } = claim;
        drop(range);
        let object = pass.object().clone();
        object.lose_version(&pass, device);
        drop(pass);
        // Others may hold it there, or it lives there.
        refresh(&object);
    }
}

impl std::fmt::Debug for VramChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VramChange").field("handle", &self.handle).finish_non_exhaustive()
    }
}

/// A share of a copy in device memory.
#[derive(Debug)]
pub struct VramShare(DeviceRange);

impl VramShare {
    /// Where it is.
    pub fn range(&self) -> Arc<DeviceRange> {
        Arc::new(self.0.share())
    }
}

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
        Ok(share.map(VramShare))
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
                return Ok(VramHold { range, _held: held, _handle: handle.clone() });
            }
        }
        let mut set = self.set(std::slice::from_ref(handle), &[]).await?;
        Ok(set.reads.pop().expect("invariant: one was asked for"))
    }

    /// The object on the device, for a kernel that writes to it: waits until it has no other user
    /// there. With `overwrite` the kernel writes all of it: the bytes before are not loaded, it
    /// begins as zeros.
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

/// Objects that are on a device at once.
#[derive(Debug)]
pub struct VramSet {
    /// Those for kernels that read, in the order in which they were asked for.
    pub reads: Vec<VramHold>,
    /// Those for kernels that write.
    pub writes: Vec<VramChange>,
}

pub(super) const LEASE: &str = "bringing objects to a device";
