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
use tokio::time::Instant;

use super::from_device::KeepsFloor;
use super::{Record, write_back_after, write_back_from_device};
use crate::buffer::IoBuf;
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange, EndedUse, UseEnd};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{GatePass, Next, Successor, Successors};
use crate::stats::add;

/// What is copied within host memory before others run, in bytes.
const STEP: usize = 256 * 1024;

/// Tries of a copy from the device, before it waits for its timer.
pub(crate) const COPY_TRIES: u32 = 3;
/// Before it is tried again.
pub(crate) const COPY_PAUSE: Duration = Duration::from_millis(10);

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

/// The memory that a kernel writes to.
enum Written {
    By(DeviceRange),
    /// Other work of the device can be put behind it.
    Until(EndedUse),
}

impl Written {
    fn get(&self) -> &DeviceRange {
        match self {
            Written::By(range) => range,
            Written::Until(ended) => ended.range(),
        }
    }
}

/// A change was given up that had begun to write over the one before it.
fn abandoned() -> VirtualMemoryError {
    let message = "a change after it was abandoned".into();
    VirtualMemoryError::Device { operation: "changing an object", code: 0, message }
}

/// A version that a kernel wrote, or is still writing, in device memory.
pub(crate) struct Changed {
    pass: GatePass,
    device: usize,
    range: Written,
    /// Space for the new version; `None` once the copy has it, and where the object has such space.
    space: Option<OwnedCopy>,
    /// What the kernel writes; all of it if this is empty.
    touched: Vec<Range<usize>>,
    /// The host copy of the previous version, as long as that may come back.
    old: Option<Bytes>,
    /// Whether it had one.
    had_copy: bool,
    /// Since when the device alone has what kernels wrote.
    alone_since: Option<Instant>,
    deadline: Deadline,
    /// Leases that go on behind it, if any may.
    successors: Option<Arc<Successors>>,
    /// Gets the outcome; the caller may have dropped the other end.
    reply: Option<oneshot::Sender<Result<(), VirtualMemoryError>>>,
}

impl Changed {
    /// Begins the change: readers on the host wait until it ends. Other leases of the device go on
    /// behind it if it is known where it `ends`, and the version is not copied down first.
    pub(crate) fn begin(
        pass: GatePass,
        (device, range, end): (usize, DeviceRange, Option<UseEnd>),
        (space, touched): (Option<OwnedCopy>, Vec<Range<usize>>),
        reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
    ) -> Self {
        let object = pass.object();
        let pause = object.write_back_pause();
        let range = match end {
            Some(end) => Written::Until(range.ends_at(end, true)),
            None => Written::By(range),
        };
        let is_followed = matches!(range, Written::Until(_)) && pause != Some(Duration::ZERO);
        let successors = is_followed.then(|| Successors::new(pause));
        let old = object.begin_pending(&pass, device, successors.clone());
        let deadline = object.shared.deadline();
        let reply = Some(reply);
        let had_copy = old.is_some();
        Changed {
            pass,
            device,
            range,
            space,
            touched,
            old,
            had_copy,
            alone_since: None,
            deadline,
            successors,
            reply,
        }
    }

    /// Leases that go on behind it, if any may.
    pub(crate) fn successors(&self) -> Option<Arc<Successors>> {
        self.successors.clone()
    }

    /// Waits for the kernel and publishes the new version: with a copy in host memory, or, where
    /// the configuration says so, without.
    pub(crate) async fn finish(mut self, ready: DeviceAnswer<Result<(), DeviceError>>) {
        let successors = self.successors.clone();
        let is_eager = self.pass.object().write_back_pause() == Some(Duration::ZERO);
        let outcome = match &successors {
            Some(successors) => self.finish_with_successors(ready, successors).await,
            None if is_eager && self.space.is_some() => self.finish_with_copy(ready).await,
            None => self.finish_on_device(ready).await,
        };
        if let (Some(successors), Err(error)) = (&successors, &outcome) {
            successors.fail(error);
        }
        let reply = self.reply.take();
        // After a failure this restores the previous version.
        drop(self);
        if let Some(reply) = reply {
            drop(reply.send(outcome));
        }
    }

    /// Waits for those that go on behind it too: what the last of them wrote is the new version.
    async fn finish_with_successors(
        &mut self,
        mut ready: DeviceAnswer<Result<(), DeviceError>>,
        successors: &Successors,
    ) -> Result<(), VirtualMemoryError> {
        // What a later one overwrites was whole, and nothing else has it.
        let mut is_written = false;
        let failed = loop {
            match self.wait(ready).await {
                Ok(()) => {
                    is_written = true;
                    self.old = None;
                    self.alone_since.get_or_insert_with(Instant::now);
                }
                Err(error) => break error,
            }
            if successors.are_over() {
                return self.stay_on_device().await;
            }
            // What it wrote is published with what comes after it.
            let reply = self.reply.take();
            drop(reply.map(|reply| reply.send(Ok(()))));
            match self.unless_closed(successors.next()).await {
                Ok(Next::Successor(Successor { ready: next, reply })) => {
                    ready = next;
                    self.reply = Some(reply);
                }
                Ok(Next::Abandoned) => break abandoned(),
                Ok(Next::None) => return self.stay_on_device().await,
                Err(error) => break error,
            }
        };
        if is_written {
            self.pass.object().publish_lost(&self.pass, self.space.take(), self.had_copy);
        }
        Err(failed)
    }

    /// The device alone has the new version.
    async fn finish_on_device(
        &mut self,
        ready: DeviceAnswer<Result<(), DeviceError>>,
    ) -> Result<(), VirtualMemoryError> {
        self.wait(ready).await?;
        self.stay_on_device().await
    }

    /// Publishes it there, and has it written back when its time comes.
    async fn stay_on_device(&mut self) -> Result<(), VirtualMemoryError> {
        let object = self.pass.object();
        object.publish_dirty(&self.pass, self.space.take(), self.had_copy);
        match object.write_back_pause() {
            None => Ok(()),
            Some(_) if object.is_dead() => Ok(()),
            Some(Duration::ZERO) => {
                // The object had its space already.
                let deadline = &self.deadline.renewed();
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
                let waited = self.alone_since.map_or(Duration::ZERO, |since| since.elapsed());
                write_back_after(object, pause.saturating_sub(waited));
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
                object.publish_dirty(&self.pass, self.space.take(), self.had_copy);
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
        let ready = self.unless_closed(ready).await?;
        ready.map_err(|error| shared.devices()[self.device].fault(error))
    }

    /// # Errors
    ///
    /// `Closed` once the store waits for kernels no more: what they have written so far is no
    /// version.
    async fn unless_closed<T>(
        &self,
        wait: impl Future<Output = T>,
    ) -> Result<T, VirtualMemoryError> {
        tokio::select! {
            biased;
            output = wait => Ok(output),
            _ = self.pass.object().shared.kernels_abandoned.acquire() => {
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
                let range = Arc::new(self.range.get().share());
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
