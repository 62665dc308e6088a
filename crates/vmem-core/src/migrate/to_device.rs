//! Promotes objects to the memory of a device, from host memory or, through staging, from disk; and
//! demotes them.
//!
//! Ownership: the object owns the range before the first byte is copied; each copy has a share of
//! it and owns the bytes that it reads, until it has completed. The gate is held throughout, so the
//! version that is copied is the version that is published; a task that is dropped half way leaves
//! space that holds nothing.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::{Job, Record, fetch_into, host_space, load, write_back_from_device};
use crate::chunk::{CHUNK_BYTES, chunk_count};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{GatePass, Object};
use crate::stats::add;
use crate::tier::{Class, Device};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one object that are read and uploaded at once.
const PIECES_MAX: usize = 4;

/// Promotes the current version of an object to the memory of this device.
///
/// # Errors
///
/// Those of making space, of the device, and of reading the disk; the object is then where it was.
pub(crate) async fn promote_to_device(job: &Job, number: usize) -> Result<()> {
    let object = &job.object;
    let device = object.shared.device(number)?;
    if object.len == 0 {
        return Ok(());
    }
    loop {
        if object.is_on(number) {
            object.touch();
            return Ok(());
        }
        // Space is never awaited under the gate: a write must not wait for a copy that finds no
        // space.
        let space = match object.has_space_on(number) {
            true => None,
            false => job.while_wanted(device.state.take(&job.need(), &job.deadline)).await?.pop(),
        };
        let pass = object.gate(&job.deadline).await?;
        if fill_device(job, number, (&pass, space), true).await? {
            return Ok(());
        }
    }
}

/// Fills memory of this device that was taken for the object, or that it has already; for the
/// holder of the gate. With `with_bytes` the version is copied too. False if the object had lost
/// its memory there meanwhile.
pub(crate) async fn fill_device(
    job: &Job,
    number: usize,
    (pass, space): (&GatePass, Option<DeviceRange>),
    with_bytes: bool,
) -> Result<bool> {
    let object = &job.object;
    let device = object.shared.device(number)?;
    if object.is_on(number) {
        return Ok(true);
    }
    match space {
        Some(space) if !object.has_space_on(number) => {
            let is_prefetched = job.cause == MigrationCause::Prefetch;
            object.set_space_on(pass, number, space, is_prefetched);
        }
        Some(_) => {}
        // The object has left the device meanwhile.
        None if !object.has_space_on(number) => return Ok(false),
        None => {}
    }
    if !with_bytes {
        return Ok(true);
    }
    let Some(range) = object.space_on(pass, number) else {
        // The previous range is still in use and stays with its users, so another one is taken.
        object.detach_from(pass, number);
        return Ok(false);
    };
    let filling = Filling { pass, device: number, is_published: false };
    let outcome = fill(job, device, pass, &range).await;
    drop(range);
    if outcome.is_ok() {
        filling.publish();
    }
    outcome.map(|()| true)
}

/// Space that is being filled. Dropped unpublished it is given back, unless the object has its home
/// there.
struct Filling<'a> {
    pass: &'a GatePass,
    device: usize,
    is_published: bool,
}

impl Filling<'_> {
    fn publish(mut self) {
        let object = self.pass.object();
        object.publish_on(self.pass, self.device);
        add(&object.shared.counters.promotions, 1);
        self.is_published = true;
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        let object = self.pass.object();
        if !self.is_published && !object.devices_to_refresh().contains(&self.device) {
            object.detach_from(self.pass, self.device);
        }
    }
}

/// Copies the current version to the range.
async fn fill(job: &Job, device: &Device, pass: &GatePass, range: &DeviceRange) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    let host = match object.copy.acquire(&shared.copies) {
        Found::Copy(guard) => Some(guard.into_bytes()),
        Found::Locked | Found::Nothing => None,
    };
    let from = if host.is_some() { MemoryTier::Host } else { object.version().tier() };
    let route = (from, device.tier());
    let record = Record::start(shared, object, route, job.cause, &job.deadline);
    let outcome = match host {
        Some(bytes) => device
            .upload(Arc::new(range.share()), 0, bytes, job.class)
            .await
            .map_err(|error| device.fault(error)),
        None => fill_from_below(job, device, pass, range).await,
    };
    match &outcome {
        Ok(()) => {
            add(&shared.counters.host_to_vram_bytes, object.len as u64);
            record.end(Ok(object.len as u64));
        }
        Err(error) => record.end(Err(error)),
    }
    outcome
}

/// Copies piece by piece through staging, without space in host memory.
async fn fill_from_below(
    job: &Job,
    device: &Device,
    pass: &GatePass,
    range: &DeviceRange,
) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    if let Some(damage) = object.damage() {
        return Err(damage);
    }
    let version = object.version();
    let written = |index| version.extents.chunk(index).is_some_and(|extent| extent.sum().is_some());
    let is_zeros = version.only_there.is_none() && !(0..chunk_count(object.len)).any(written);
    if is_zeros {
        let zeroed = device.backend.zero(Arc::new(range.share())).await;
        return zeroed.map_err(|error| device.fault(error));
    }
    if crate::planted!("staging-space") {
        drop(shared.host_spaces_or_error(&job.need(), &job.deadline).await?);
    }
    let per_piece = (shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
    let count = chunk_count(object.len);
    // A read takes its piece itself, and then never waits for another one; one that is dropped
    // gives it back once the disk has let go of it.
    let version = &version;
    let read = |first: usize| async move {
        let chunks = first..(first + per_piece).min(count);
        let len = object.len.min(chunks.end * CHUNK_BYTES) - first * CHUNK_BYTES;
        let piece = shared.staging(device.tier(), &job.deadline).await?;
        let (piece, loaded) = load(object, version, chunks, piece, 0, job.class).await;
        loaded.map(|()| (first * CHUNK_BYTES, piece.freeze().slice(..len)))
    };
    let reads_max = reads_at_once(job.class, shared.staging.pieces());
    let mut parts = (0..count).step_by(per_piece);
    let mut reads = FuturesUnordered::new();
    let mut uploads: FuturesUnordered<DeviceAnswer<std::result::Result<(), DeviceError>>> =
        FuturesUnordered::new();
    let mut outcome = Ok(());
    loop {
        while reads.len() < reads_max
            && reads.len() + uploads.len() < PIECES_MAX
            && outcome.is_ok()
            && let Some(first) = parts.next()
        {
            reads.push(read(first));
        }
        let error = tokio::select! {
            biased;
            Some(uploaded) = uploads.next() => {
                uploaded.err().filter(|_| outcome.is_ok()).map(|error| device.fault(error))
            }
            Some(loaded) = reads.next() => match loaded {
                Ok((start, bytes)) => {
                    // An upload that has started goes on whether it is polled or not, and gives its
                    // piece back.
                    let to = Arc::new(range.share());
                    uploads.push(device.upload(to, start, bytes, job.class));
                    None
                }
                Err(error) => Some(error),
            },
            // All uploads have ended, also after an error, so that the space is idle again.
            else => return outcome,
        };
        // The first one that fails says why, once; nothing more is read for it.
        if let Some(error) = error {
            outcome = outcome.and(Err(error));
            reads.clear();
        }
    }
}

/// Reads of one object that are in flight at once: at most half of staging where a caller waits for
/// it, else a quarter.
fn reads_at_once(class: Class, pieces: usize) -> usize {
    if crate::planted!("read-by-read") {
        return 1;
    }
    let share = match class {
        Class::Demand => pieces / 2,
        Class::Prefetch => pieces / 4,
    };
    share.clamp(1, PIECES_MAX)
}

/// Takes an object out of the memory of devices, to host memory if there is space for it; else it
/// stays on disk.
///
/// # Errors
///
/// `Pinned`; those of writing back what only a device has.
pub(crate) async fn leave_devices(object: &Arc<Object>, deadline: &Deadline) -> Result<()> {
    let pass = object.gate(deadline).await?;
    check_unheld(object)?;
    write_back_from_device(&pass, MigrationCause::Demote, deadline).await?;
    if object.is_on_any_device()
        && !object.has_host_space()
        && let Some(space) = host_space(object)
    {
        let job = Job::new(object.clone(), MigrationCause::Demote, *deadline);
        if let Err(error) = fetch_into(&job, &pass, Some(space)).await {
            tracing::debug!(target: "vmem::migration", %error, "it stays on disk");
        }
    }
    object.detach_from_devices(&pass);
    Ok(())
}

/// Whether nothing keeps the object on a device.
///
/// # Errors
///
/// `Pinned`.
pub(crate) fn check_unheld(object: &Object) -> Result<()> {
    for device in object.devices_with_space() {
        let tier = object.shared.devices()[device].tier();
        let pins = object.holds_in(tier);
        if pins > 0 {
            return Err(VirtualMemoryError::Pinned { handle: object.id, tier, pins });
        }
    }
    Ok(())
}
