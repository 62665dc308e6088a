//! Holds and changes of objects on a device, from which device backends build their leases.
//!
//! Invariant: a hold keeps the bytes of one version where they are; a change has the object alone
//! from when it is granted until what the kernel wrote is published or given up, or another comes
//! after it on the device (`object/successors`). Both own what they
//! keep and give it back when they are dropped; the caller drops them only after its kernel, or
//! says where on the device that ends. Called by `vmem-gpu` through `backend`.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::Result;
use super::pin::HoldGuard;
use super::place::refresh;
use super::read::check_range;
use crate::copy::OwnedCopy;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange, EndedUse, UseEnd};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::migrate::{Changed, request_finish};
use crate::object::{GatePass, Successor, Successors};

/// One version of an object in device memory, which stays there until this is dropped.
#[derive(Debug)]
pub struct VramHold {
    /// None for an object of no bytes.
    pub(super) range: Option<DeviceRange>,
    /// What the kernel comes after.
    pub(super) after: Vec<UseEnd>,
    pub(super) _held: HoldGuard,
    /// Keeps the object alive while it is read.
    pub(super) _handle: VMemHandle,
}

impl VramHold {
    /// Where it is; none for an object of no bytes.
    pub fn range(&self) -> Option<Arc<DeviceRange>> {
        self.range.as_ref().map(|range| Arc::new(range.share()))
    }

    /// What the kernel has to come after, on the device: kernels that write what it reads.
    pub fn take_after(&mut self) -> Vec<UseEnd> {
        std::mem::take(&mut self.after)
    }

    /// Ends the hold, except on the memory, which a kernel may still read: the object may leave it,
    /// but it is not reused before the share is dropped.
    pub fn end(self) -> Option<VramShare> {
        self.range.map(|range| VramShare::new(range, false))
    }
}

/// An object in device memory that a kernel may write to, alone.
#[must_use = "dropping it gives the change up; `finish` publishes what was written"]
pub struct VramChange {
    /// None for an object of no bytes.
    pub(super) inner: Option<Taken>,
    /// What the kernel comes after.
    pub(super) after: Vec<UseEnd>,
    /// Keeps the object alive while it is changed.
    pub(super) handle: VMemHandle,
    /// Somebody knows where the range is, and may have written to it.
    pub(super) is_used: AtomicBool,
    /// What was written of it; all of it if this is empty.
    pub(super) touched: Vec<Range<usize>>,
}

/// What a change keeps.
pub(super) enum Taken {
    /// The object alone.
    Claim(Claim),
    /// Its turn behind changes that are under way.
    Turn(Turn),
}

impl Taken {
    fn range(&self) -> &DeviceRange {
        match self {
            Taken::Claim(claim) => &claim.range,
            Taken::Turn(turn) => &turn.range,
        }
    }

    /// Nothing was written: it is as it was.
    pub(super) fn give_up(self) {
        match self {
            Taken::Claim(claim) => claim.give_up(),
            Taken::Turn(turn) => turn.give_up(),
        }
    }
}

/// A change behind others that have not ended, which has the gate by these.
pub(super) struct Turn {
    pub(super) range: DeviceRange,
    pub(super) successors: Arc<Successors>,
    pub(super) held: HoldGuard,
}

impl Turn {
    fn give_up(self) {
        let Turn { range, successors, held } = self;
        drop((range, held));
        successors.end(None, true);
    }
}

/// The object alone, for a change.
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
        self.inner.as_ref().map(|inner| Arc::new(inner.range().share()))
    }

    /// What the kernel has to come after, on the device: kernels that use what it writes to.
    pub fn take_after(&mut self) -> Vec<UseEnd> {
        std::mem::take(&mut self.after)
    }

    /// A share of its memory, to be kept until the kernel has ended.
    pub fn share(&self) -> Option<VramShare> {
        self.inner.as_ref().map(|inner| VramShare::new(inner.range().share(), true))
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
    /// device alone had it, is lost. It goes on whether its answer is awaited or not. If it is
    /// known where the kernel will `end`, leases of the device may come behind it before `ready`
    /// says so, where the store does not write back eagerly.
    ///
    /// # Errors
    ///
    /// `Device` if the kernel failed, or the device was lost before the copy; `Closed`.
    pub fn finish(
        mut self,
        ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
        end: Option<UseEnd>,
    ) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        let (reply, answer) = oneshot::channel();
        match self.inner.take() {
            Some(Taken::Claim(claim)) => self.hand_over(claim, (ready, end), reply),
            Some(Taken::Turn(turn)) => self.hand_on(turn, (ready, end), reply),
            None => drop(reply.send(Ok(()))),
        }
        async move { answer.await.unwrap_or(Err(VirtualMemoryError::Closed)) }
    }

    fn hand_over(
        &mut self,
        claim: Claim,
        (ready, end): (DeviceAnswer<std::result::Result<(), DeviceError>>, Option<UseEnd>),
        reply: oneshot::Sender<Result<()>>,
    ) {
        let Claim { device, range, space, pass, held, is_overwritten, .. } = claim;
        let shared = pass.object().shared.clone();
        let handle = self.handle.clone();
        let mut touched = std::mem::take(&mut self.touched);
        if is_overwritten && !crate::planted!("overwrite-mixed") {
            touched.clear();
        }
        let change = Changed::begin(pass, (device, range, end), (space, touched), reply);
        let successors = change.successors();
        let ready = Box::pin(async move {
            let outcome = if crate::planted!("lease-order") { Ok(()) } else { ready.await };
            if let Some(successors) = successors.filter(|_| outcome.is_err()) {
                // While it is held: nothing begins behind a kernel that has failed.
                successors.close();
            }
            // They were kept for as long as the kernel could write.
            drop((held, handle));
            outcome
        });
        request_finish(&shared, change, ready);
    }

    /// The change before it is published with this one, by the task that waits for both.
    fn hand_on(
        &self,
        turn: Turn,
        (ready, end): (DeviceAnswer<std::result::Result<(), DeviceError>>, Option<UseEnd>),
        reply: oneshot::Sender<Result<()>>,
    ) {
        let Turn { range, successors, held } = turn;
        let is_known = end.is_some();
        let kept = VramShare::new(range, true).until(end);
        let handle = self.handle.clone();
        let chain = successors.clone();
        let ready = Box::pin(async move {
            let outcome = ready.await;
            if outcome.is_err() {
                chain.close();
            }
            drop((held, handle, kept));
            outcome
        });
        successors.end(Some(Successor { ready, reply }), is_known);
    }
}

impl Drop for VramChange {
    /// The change is abandoned: the contents of the range are undefined, unless nobody knew where
    /// it is.
    fn drop(&mut self) {
        let is_used = self.is_used.load(Ordering::Relaxed);
        let claim = match self.inner.take() {
            None => return,
            Some(Taken::Turn(turn)) if is_used => {
                let Turn { range, successors, held } = turn;
                drop((range, held));
                return successors.abandon();
            }
            Some(Taken::Claim(claim)) if is_used || !claim.was_valid => claim,
            Some(taken) => return taken.give_up(),
        };
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
pub struct VramShare(Share);

#[derive(Debug)]
enum Share {
    InUse { range: DeviceRange, writes: bool },
    Until(EndedUse),
}

impl VramShare {
    pub(super) fn new(range: DeviceRange, writes: bool) -> Self {
        VramShare(Share::InUse { range, writes })
    }

    /// Its user is gone, and what that has queued on the device ends there, if it is known where:
    /// what changes the object is put behind it from now on. Else that waits until this is dropped.
    pub fn until(self, end: Option<UseEnd>) -> Self {
        VramShare(match (self.0, end.filter(|_| !crate::planted!("ends-unknown"))) {
            (Share::InUse { range, writes }, Some(end)) => Share::Until(range.ends_at(end, writes)),
            (share, _) => share,
        })
    }

    /// Where it is.
    pub fn range(&self) -> Arc<DeviceRange> {
        Arc::new(match &self.0 {
            Share::InUse { range, .. } => range.share(),
            Share::Until(ended) => ended.range().share(),
        })
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
