//! Publishes what a kernel wrote as the current version.
//!
//! Ownership: the change holds the gate, a share of the range, the space in host memory that was
//! taken before the kernel was admitted, and the previous version. However it ends, either the new
//! version is published in both tiers or readers get the previous one again: nothing is lost, and
//! no reader waits for ever.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Record;
use crate::buffer::IoBuf;
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::GatePass;
use crate::stats::add;

/// A version that a kernel wrote, or is still writing, in device memory.
pub(crate) struct Changed {
    pass: GatePass,
    device: usize,
    range: DeviceRange,
    /// Space for the new version; `None` once the copy has it.
    space: Option<OwnedCopy>,
    /// The host copy of the previous version.
    old: Option<Bytes>,
    deadline: Deadline,
    /// Gets the outcome; the caller may have dropped the other end.
    reply: Option<oneshot::Sender<Result<(), VirtualMemoryError>>>,
}

impl Changed {
    /// Begins the change: readers wait until it ends.
    pub(crate) fn begin(
        pass: GatePass,
        (device, range): (usize, DeviceRange),
        space: OwnedCopy,
        reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
    ) -> Self {
        let old = pass.object().begin_pending(&pass, device);
        let deadline = pass.object().shared.deadline();
        Changed { pass, device, range, space: Some(space), old, deadline, reply: Some(reply) }
    }

    /// Waits for the kernel, copies the new version to the host and publishes it.
    pub(crate) async fn finish(mut self, ready: DeviceAnswer<Result<(), DeviceError>>) {
        let object = self.pass.object().clone();
        let shared = &object.shared;
        let from = shared.devices()[self.device].tier();
        let route = (from, MemoryTier::Host);
        let record =
            Record::start(shared, object.id, route, MigrationCause::Kernel, &self.deadline);
        let outcome = match self.copy_to_host(ready).await {
            Ok(copy) => {
                add(&shared.counters.vram_to_host_bytes, object.len as u64);
                object.publish_changed(&self.pass, copy);
                record.end(Ok(object.len as u64));
                Ok(())
            }
            Err(error) => {
                record.end(Err(&error));
                Err(error)
            }
        };
        let reply = self.reply.take();
        // After a failure this restores the previous version.
        drop(self);
        if let Some(reply) = reply {
            drop(reply.send(outcome));
        }
    }

    async fn copy_to_host(
        &mut self,
        ready: DeviceAnswer<Result<(), DeviceError>>,
    ) -> Result<OwnedCopy, VirtualMemoryError> {
        let shared = self.pass.object().shared.clone();
        tokio::select! {
            biased;
            ready = ready => ready.map_err(DeviceError::public)?,
            // The previous version is still whole here.
            _ = shared.kernels_abandoned.acquire() => return Err(VirtualMemoryError::Closed),
        }
        let device = shared.device(self.device)?;
        let space = self.space.take().expect("invariant: taken here, and put back after a failure");
        let into = IoBuf::from_copy(space);
        let len = self.pass.object().len;
        let (buf, outcome) =
            device.backend.download(Arc::new(self.range.share()), 0, len, into, 0).await;
        match outcome {
            Ok(()) => Ok(buf.into_copy()),
            Err(error) => {
                self.space = Some(buf.into_copy());
                Err(error.public())
            }
        }
    }
}

impl Drop for Changed {
    /// Restores the previous version, unless the new one was published. Half way through the copy
    /// to the host the copy has the space that it would be restored to; that drop happens only with
    /// the store itself, and then the host copy is lost.
    fn drop(&mut self) {
        let object = self.pass.object();
        if !object.is_pending() {
            return;
        }
        let restored = self.space.take().zip(self.old.take()).map(|(mut space, old)| {
            space.as_mut_slice().copy_from_slice(&old);
            space
        });
        object.give_up_pending(&self.pass, restored);
        object.detach_from(&self.pass, self.device);
    }
}
