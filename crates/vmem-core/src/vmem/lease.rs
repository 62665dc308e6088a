//! What `vmem-gpu` builds its leases on: objects that stay in device memory while kernels use them.
//!
//! Invariant: a hold keeps the bytes of one version where they are; a change is alone with the object from when it is
//! granted until what the kernel wrote is published or given up. Both own what they keep and give it back when they are
//! dropped; a kernel that still runs is the caller's matter: he drops them after it.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::pin::{Charge, PinGuard, charge_pin, pin, pin_now};
use super::place::ask;
use super::{Result, VirtualMemory};
use crate::actor::{Move, Request};
use crate::buffer::IoBuf;
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceBackend, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::migrate::Changed;
use crate::object::GatePass;
use crate::tier::{Class, Need};

/// One version of an object in device memory, which stays there until this is dropped.
#[derive(Debug)]
pub struct VramHold {
    /// None for an object of no bytes.
    range: Option<DeviceRange>,
    _pin: PinGuard,
}

impl VramHold {
    /// Where it is; none for an object of no bytes.
    pub fn range(&self) -> Option<Arc<DeviceRange>> {
        self.range.as_ref().map(|range| Arc::new(range.share()))
    }

    /// Ends the hold, but for the memory, which a kernel may still read: the object may leave it, and nobody else gets it
    /// before the share is dropped.
    pub fn end(self) -> Option<VramShare> {
        self.range.map(VramShare)
    }
}

/// An object in device memory that a kernel may write to, alone.
#[must_use = "dropped, it leaves the version before; `finish` publishes what was written"]
pub struct VramChange {
    /// None for an object of no bytes.
    inner: Option<Inner>,
    /// The object lives as long as somebody changes it.
    handle: VMemHandle,
}

struct Inner {
    range: DeviceRange,
    /// For the new version below: taken before, so that what was written can never be lost for want of room.
    room: OwnedCopy,
    pass: GatePass,
    charge: Charge,
}

impl VramChange {
    /// Where it is; none for an object of no bytes.
    pub fn range(&self) -> Option<Arc<DeviceRange>> {
        self.inner.as_ref().map(|inner| Arc::new(inner.range.share()))
    }

    /// What was written is the new version, once `ready` says that it was written. Who reads from now on waits for that;
    /// if it fails the version before stays. It goes on whether its answer is awaited or not.
    ///
    /// # Errors
    ///
    /// `Device` if the kernel or the copy of what it wrote failed; `Closed`.
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
        &self,
        inner: Inner,
        ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
        reply: oneshot::Sender<Result<()>>,
    ) {
        let Inner { range, room, pass, charge } = inner;
        let (shared, handle) = (pass.object().shared.clone(), self.handle.clone());
        let change = Box::new(Changed::begin(pass, range, room, reply));
        let ready = Box::pin(async move {
            let outcome = ready.await;
            // They were kept for as long as the kernel could write.
            drop((charge, handle));
            outcome
        });
        shared.requests.send(&shared, Request::Finish { change, ready });
    }
}

impl Drop for VramChange {
    /// Nothing was written, or nobody wants it: what is in the range means nothing.
    fn drop(&mut self) {
        if let Some(Inner { range, pass, .. }) = self.inner.take() {
            drop(range);
            pass.object().detach_from_vram(&pass);
        }
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

impl VirtualMemory {
    /// The device of the VRAM tier, for those who extend the store with what only they know of it.
    pub fn device(&self) -> Option<&Arc<dyn DeviceBackend>> {
        self.shared.vram_if_any().map(|vram| &vram.backend)
    }

    /// A share of this version of the object, if device memory has it now. It is not pinned: its memory stays, and a
    /// write makes another version.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`.
    pub fn share_in_vram(&self, handle: &VMemHandle) -> Result<Option<VramShare>> {
        let object = self.check(handle)?;
        let share = object.version().vram;
        if share.is_some() {
            object.touch();
        }
        Ok(share.map(VramShare))
    }

    /// Room in host memory for bytes in passage, charged like any other.
    ///
    /// # Errors
    ///
    /// Those of making room in host memory.
    pub async fn scratch(&self, len: usize) -> Result<IoBuf> {
        self.check_open()?;
        let need = Need::one(len, 0, Class::Demand);
        let room = self.shared.host_room_or_error(&need, &self.shared.deadline()).await?;
        Ok(IoBuf::from_copy(room))
    }

    /// Whether leases of all these objects could ever be there at once.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity`; `HandleNotFound`, `TierNotAvailable`, `Closed`.
    pub fn check_fits_leases(&self, handles: &[&VMemHandle]) -> Result<()> {
        let capacity_bytes = self.shared.vram()?.pins.max();
        let mut requested_bytes = 0_u64;
        for handle in handles {
            let footprint = self.shared.footprint_in(MemoryTier::Vram, self.check(handle)?.len);
            requested_bytes = requested_bytes.saturating_add(footprint);
        }
        if requested_bytes <= capacity_bytes {
            return Ok(());
        }
        let tier = MemoryTier::Vram;
        Err(VirtualMemoryError::ExceedsCapacity { tier, requested_bytes, capacity_bytes })
    }

    /// Brings the object to device memory and keeps this version there, for a kernel that reads it.
    ///
    /// # Errors
    ///
    /// Those of a [`pin`](Self::pin) in VRAM.
    pub async fn hold_in_vram(&self, handle: &VMemHandle) -> Result<VramHold> {
        self.check(handle)?.touch();
        self.shared.vram()?;
        if let Some(pin) = pin_now(handle, MemoryTier::Vram)? {
            let range = handle.object().version().vram;
            if range.is_some() || handle.is_empty() {
                return Ok(VramHold { range, _pin: pin });
            }
        }
        let deadline = self.shared.deadline();
        loop {
            let held = hold(handle.clone(), deadline);
            let parcel = self.shared.spawn_for_caller_briefly("vmem-lease", held);
            if let Some(hold) = self.shared.answer(&parcel, &deadline, LEASE).await? {
                return Ok(hold);
            }
            self.check(handle)?;
        }
    }

    /// The object in device memory, for a kernel that writes to it: waits for whoever else uses it there. With
    /// `overwrite` the kernel writes all of it: the bytes before are not brought up, it begins as zeros.
    ///
    /// # Errors
    ///
    /// Those of a [`pin`](Self::pin) in VRAM and of making space in host memory, where the new version will be too.
    pub async fn change_in_vram(&self, handle: &VMemHandle, overwrite: bool) -> Result<VramChange> {
        let object = self.check(handle)?;
        self.shared.vram()?;
        if object.len == 0 {
            return Ok(VramChange { inner: None, handle: handle.clone() });
        }
        let deadline = self.shared.deadline();
        loop {
            let change = change(handle.clone(), overwrite, deadline);
            let parcel = self.shared.spawn_for_caller_briefly("vmem-lease", change);
            if let Some(change) = self.shared.answer(&parcel, &deadline, LEASE).await? {
                return Ok(change);
            }
            self.check(handle)?;
        }
    }
}

const LEASE: &str = "bringing an object to vram";

/// Pins an object in device memory and takes a share of its current version there; for a task.
async fn hold(handle: VMemHandle, deadline: Deadline) -> Result<VramHold> {
    let pin = pin(handle.clone(), MemoryTier::Vram, deadline).await?;
    let object = handle.object();
    loop {
        let pass = object.gate(&deadline).await?;
        let range = object.version().vram;
        drop(pass);
        if range.is_some() || object.len == 0 {
            return Ok(VramHold { range, _pin: pin });
        }
        if deadline.is_past() {
            return Err(deadline.error(LEASE));
        }
        // It was written since: the new version is promoted.
        ask(&object.shared, object, Move::ToDevice, &deadline).await?;
    }
}

/// Takes an object for a kernel that writes to it; for a task.
async fn change(handle: VMemHandle, overwrite: bool, deadline: Deadline) -> Result<VramChange> {
    let object = handle.object();
    let shared = &object.shared;
    let charge = charge_pin(object, MemoryTier::Vram, &deadline).await?;
    let need = Need::one(object.len, object.id, Class::Demand);
    let room = shared.host_room_or_error(&need, &deadline).await?;
    loop {
        let vram = shared.vram()?;
        let mut fresh = None;
        if !overwrite {
            ask(shared, object, Move::ToDevice, &deadline).await?;
        } else if !object.has_vram_room() {
            fresh = Some(vram.room(&need, &deadline).await?);
        }
        let pass = object.gate(&deadline).await?;
        object.touch();
        if let Some(fresh) = fresh.filter(|_| !object.has_vram_room()) {
            object.set_vram_room(&pass, fresh);
        }
        let there = if overwrite { object.has_vram_room() } else { object.in_vram() };
        if there {
            let range = vram.until_idle(&pass, &deadline).await?;
            let to_zero = overwrite.then(|| Arc::new(range.share()));
            let inner = Inner { range, room, pass, charge };
            // From here on its drop gives everything back.
            let change = VramChange { inner: Some(inner), handle: handle.clone() };
            if let Some(range) = to_zero {
                // What is not written must not show what others left there.
                vram.backend.zero(range).await.map_err(DeviceError::public)?;
            }
            return Ok(change);
        }
        if deadline.is_past() {
            return Err(deadline.error(LEASE));
        }
    }
}
