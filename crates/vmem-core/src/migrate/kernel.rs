//! Publishes what a kernel wrote as the current version.
//!
//! Ownership: the change holds the gate, a share of the range, the space in host memory that was
//! taken before the kernel was admitted, and the previous version. However it ends, either the new
//! version is published or readers get the previous one again, and no reader waits for ever. What a
//! kernel has written is not lost because it cannot be copied now: then the device alone has it.
//! A kernel that fails over a version that the device alone had loses that, and readers get an
//! error.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::from_device::KeepsFloor;
use super::{Record, write_back_after, write_back_from_device};
use crate::buffer::IoBuf;
use crate::config::WriteBack;
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::GatePass;
use crate::stats::add;

/// What is copied within host memory before others run, in bytes.
const STEP: usize = 256 * 1024;

/// Tries of a copy from the device, before it waits for its timer.
const COPY_TRIES: u32 = 3;
/// Before it is tried again.
const COPY_PAUSE: Duration = Duration::from_millis(10);

/// Ranges in order, those that meet as one; without what is empty.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// A version that a kernel wrote, or is still writing, in device memory.
pub(crate) struct Changed {
    pass: GatePass,
    device: usize,
    range: DeviceRange,
    /// Space for the new version; `None` once the copy has it, and where the object has such space.
    space: Option<OwnedCopy>,
    /// What the kernel writes; all of it if this is empty.
    touched: Vec<Range<usize>>,
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
        (space, touched): (Option<OwnedCopy>, Vec<Range<usize>>),
        reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
    ) -> Self {
        let old = pass.object().begin_pending(&pass, device);
        let deadline = pass.object().shared.deadline();
        Changed { pass, device, range, space, touched, old, deadline, reply: Some(reply) }
    }

    /// Waits for the kernel and publishes the new version: with a copy in host memory, or, where
    /// the configuration says so, without.
    pub(crate) async fn finish(mut self, ready: DeviceAnswer<Result<(), DeviceError>>) {
        let object = self.pass.object().clone();
        // What is pinned to host memory has a copy there.
        let is_pinned = object.pins() > 0 && !crate::planted!("dirty-unpins");
        let pause = match object.shared.limits.write_back {
            WriteBack::After(pause) if !is_pinned => Some(pause),
            WriteBack::OnEvict if !is_pinned => None,
            _ => Some(Duration::ZERO),
        };
        let outcome = if pause == Some(Duration::ZERO) && self.space.is_some() {
            self.finish_with_copy(ready).await
        } else {
            self.finish_on_device(ready, pause).await
        };
        let reply = self.reply.take();
        // After a failure this restores the previous version.
        drop(self);
        if let Some(reply) = reply {
            drop(reply.send(outcome));
        }
    }

    /// The device alone has the new version, and for so long.
    async fn finish_on_device(
        &mut self,
        ready: DeviceAnswer<Result<(), DeviceError>>,
        pause: Option<Duration>,
    ) -> Result<(), VirtualMemoryError> {
        self.wait(ready).await?;
        let object = self.pass.object();
        object.publish_dirty(&self.pass, self.space.take(), self.old.is_some());
        match pause {
            None => Ok(()),
            Some(_) if object.is_dead() => Ok(()),
            Some(Duration::ZERO) => {
                // The object had its space already.
                let deadline = &self.deadline;
                let written =
                    write_back_from_device(&self.pass, MigrationCause::Kernel, deadline).await;
                match written {
                    Err(error) if object.damage().is_none() => {
                        self.stays(&error);
                        Ok(())
                    }
                    written => written,
                }
            }
            Some(pause) => {
                write_back_after(object, pause);
                Ok(())
            }
        }
    }

    /// It could not be copied, and is not lost: it is tried again.
    fn stays(&self, error: &VirtualMemoryError) {
        let object = self.pass.object();
        let handle = object.id;
        tracing::warn!(target: "vmem::migration", handle, %error, "it stays on the device for now");
        write_back_after(object, Duration::ZERO);
    }

    async fn finish_with_copy(
        &mut self,
        ready: DeviceAnswer<Result<(), DeviceError>>,
    ) -> Result<(), VirtualMemoryError> {
        let object = self.pass.object().clone();
        let shared = &object.shared;
        let from = shared.devices()[self.device].tier();
        let route = (from, MemoryTier::Host);
        let record = Record::start(shared, &object, route, MigrationCause::Kernel, &self.deadline);
        if let Err(error) = self.wait(ready).await {
            record.end(Err(&error));
            return Err(error);
        }
        if object.is_dead() && !crate::planted!("eager-for-nobody") {
            // Nobody can read it.
            record.end(Ok(0));
            return Ok(());
        }
        match self.copy_to_host().await {
            Ok((copy, bytes)) => {
                add(&shared.counters.vram_to_host_bytes, bytes);
                object.publish_changed(&self.pass, copy);
                record.end(Ok(bytes));
                Ok(())
            }
            Err(error) => {
                let is_kept = matches!(error, DeviceError::Failed { .. })
                    && shared.device(self.device).is_ok()
                    && !crate::planted!("eager-loses");
                let error = shared.devices()[self.device].fault(error);
                record.end(Err(&error));
                if !is_kept {
                    return Err(error);
                }
                let _keeps = KeepsFloor(&self.pass);
                object.publish_dirty(&self.pass, self.space.take(), self.old.is_some());
                self.stays(&error);
                Ok(())
            }
        }
    }

    async fn wait(
        &self,
        ready: DeviceAnswer<Result<(), DeviceError>>,
    ) -> Result<(), VirtualMemoryError> {
        let shared = &self.pass.object().shared;
        tokio::select! {
            biased;
            ready = ready => ready.map_err(|error| shared.devices()[self.device].fault(error)),
            // What the kernel has written so far is no version.
            _ = shared.kernels_abandoned.acquire() => {
                Err(VirtualMemoryError::Closed)
            }
        }
    }

    /// The new version in host memory, and how many bytes were copied from the device for it.
    async fn copy_to_host(&mut self) -> Result<(OwnedCopy, u64), DeviceError> {
        let shared = self.pass.object().shared.clone();
        let device = &shared.devices()[self.device];
        let mut space = self.space.take().expect("invariant: it was taken with the lease");
        let parts = match &self.old {
            Some(old) if !self.touched.is_empty() => {
                // The kernel has left the rest as it was.
                for (to, from) in space.as_mut_slice().chunks_mut(STEP).zip(old.chunks(STEP)) {
                    to.copy_from_slice(from);
                    tokio::task::yield_now().await;
                }
                joined(std::mem::take(&mut self.touched))
            }
            _ => std::iter::once(0..self.pass.object().len).collect(),
        };
        let mut buf = IoBuf::from_copy(space);
        let mut bytes = 0;
        for Range { start, end } in parts {
            let len = end - start;
            let mut outcome = Ok(());
            for attempt in 0..COPY_TRIES {
                if attempt > 0 {
                    tokio::time::sleep(COPY_PAUSE).await;
                }
                let range = Arc::new(self.range.share());
                (buf, outcome) = device.backend.download(range, start, len, buf, start).await;
                if !matches!(outcome, Err(DeviceError::Failed { .. })) {
                    break;
                }
            }
            if let Err(error) = outcome {
                self.space = buf.into_copy_if_back();
                return Err(error);
            }
            bytes += len as u64;
        }
        Ok((buf.into_copy(), bytes))
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
        if object.is_dirty_on_device() {
            return object.lose_version(&self.pass, self.device);
        }
        if object.is_dead() {
            // Nobody can read it.
            object.give_up_pending(&self.pass, None);
            return object.detach_from(&self.pass, self.device);
        }
        let restored = self.space.take().zip(self.old.take()).map(|(mut space, old)| {
            space.as_mut_slice().copy_from_slice(&old);
            space
        });
        object.give_up_pending(&self.pass, restored);
        object.detach_from(&self.pass, self.device);
    }
}
