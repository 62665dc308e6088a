//! To VRAM, from host memory or, through staging, from disk; and out of it.
//!
//! Ownership: the range is the object's from before the first byte; each copy has a share of it and owns the
//! bytes that it reads, until it has completed. The gate is held throughout, so the version that goes up
//! is the version that is published; a task that is dropped half way leaves room that holds nothing.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesOrdered;

use super::{Job, Record, fetch_into, load};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::disk::CHUNK_BYTES;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{GatePass, Object, chunk_count};
use crate::stats::add;
use crate::tier::{Class, Need};
use crate::vram::Vram;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one object that are on their way up at once.
const PIECES_MAX: usize = 4;

/// Brings the current version of an object to VRAM.
///
/// # Errors
///
/// Those of making room, of the device, and of reading the disk; the object is then where it was.
pub(crate) async fn promote_to_device(job: &Job) -> Result<()> {
    let object = &job.object;
    let vram = object.shared.vram()?;
    if object.len == 0 {
        return Ok(());
    }
    loop {
        if object.in_vram() {
            object.touch();
            return Ok(());
        }
        // Never behind the gate: a write is not to be kept waiting by a copy that finds no room.
        let room = if object.has_vram_room() { None } else { Some(room(job, vram).await?) };
        let pass = object.gate(&job.deadline).await?;
        if object.in_vram() {
            return Ok(());
        }
        match room {
            Some(room) if !object.has_vram_room() => object.set_vram_room(&pass, room),
            Some(_) => {}
            // It has left meanwhile.
            None if !object.has_vram_room() => continue,
            None => {}
        }
        let Some(range) = object.vram_room(&pass) else {
            // Something still uses what was there before: it keeps that, and we take something else.
            object.detach_from_vram(&pass);
            continue;
        };
        let filling = Filling { pass: &pass, published: false };
        let outcome = fill(job, vram, &pass, &range).await;
        drop(range);
        if outcome.is_ok() {
            filling.publish();
        }
        return outcome;
    }
}

/// Room that is being filled. Whatever keeps it from being published, it goes back, unless the object lives there.
struct Filling<'a> {
    pass: &'a GatePass,
    published: bool,
}

impl Filling<'_> {
    fn publish(mut self) {
        let object = self.pass.object();
        object.publish_in_vram(self.pass);
        add(&object.shared.counters.promotions, 1);
        self.published = true;
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        let object = self.pass.object();
        if !self.published && !object.belongs_in_vram() {
            object.detach_from_vram(self.pass);
        }
    }
}

async fn room(job: &Job, vram: &Vram) -> Result<DeviceRange> {
    job.while_wanted(vram.room(&job.need(), &job.deadline)).await
}

/// Copies the current version to the range.
async fn fill(job: &Job, vram: &Vram, pass: &GatePass, range: &DeviceRange) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    let host = match object.copy.acquire(&shared.copies) {
        Found::Copy(guard) => Some(guard.into_bytes()),
        Found::Locked | Found::Nothing => None,
    };
    let from = if host.is_some() { MemoryTier::Host } else { MemoryTier::Disk };
    let route = (from, MemoryTier::Vram);
    let record = Record::start(shared, object.id, route, job.cause, &job.deadline);
    let outcome = match host {
        Some(bytes) => vram
            .backend
            .upload(Arc::new(range.share()), 0, bytes)
            .await
            .map_err(DeviceError::public),
        None => fill_from_disk(job, vram, pass, range).await,
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

/// Piece by piece through staging: host memory needs no room for it.
async fn fill_from_disk(
    job: &Job,
    vram: &Vram,
    pass: &GatePass,
    range: &DeviceRange,
) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    if let Some(damage) = object.damage() {
        return Err(damage);
    }
    let version = object.version();
    let written = |index| version.disk.chunk(index).is_some_and(|extent| extent.sum().is_some());
    if !(0..chunk_count(object.len)).any(written) {
        return vram.backend.zero(Arc::new(range.share())).await.map_err(DeviceError::public);
    }
    let per_piece = (shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
    let mut uploads: FuturesOrdered<DeviceAnswer<std::result::Result<(), DeviceError>>> =
        FuturesOrdered::new();
    let mut outcome = Ok(());
    for first in (0..chunk_count(object.len)).step_by(per_piece) {
        let chunks = first..(first + per_piece).min(chunk_count(object.len));
        let (start, end) = (first * CHUNK_BYTES, object.len.min(chunks.end * CHUNK_BYTES));
        // An upload that has started goes on whether it is polled or not, and gives its piece back.
        let piece = match shared.staging(&job.deadline).await {
            Ok(piece) => piece,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        };
        let (piece, loaded) = load(object, &version, chunks, piece, 0, job.class).await;
        outcome = outcome.and(loaded);
        if outcome.is_err() {
            break;
        }
        let bytes = piece.freeze().slice(..end - start);
        uploads.push_back(vram.backend.upload(Arc::new(range.share()), start, bytes));
        while uploads.len() >= PIECES_MAX
            && let Some(uploaded) = uploads.next().await
        {
            outcome = outcome.and(uploaded.map_err(DeviceError::public));
        }
    }
    // All of them, whatever went wrong: the room is idle again then.
    while let Some(uploaded) = uploads.next().await {
        outcome = outcome.and(uploaded.map_err(DeviceError::public));
    }
    outcome
}

/// Takes an object out of VRAM, to host memory if there is space for it; else it stays where it is below.
///
/// # Errors
///
/// `Pinned`.
pub(crate) async fn leave_device(object: &Arc<Object>, deadline: &Deadline) -> Result<()> {
    let pass = object.gate(deadline).await?;
    check_unpinned(object)?;
    if object.in_vram() && !object.has_host_room() && object.shared.fits_host(object.len) {
        let need = Need::one(object.len, object.id, Class::Demand);
        if let Some(room) = object.shared.try_host_room(&need) {
            let job = Job::new(object.clone(), MigrationCause::Demote, *deadline);
            if let Err(error) = fetch_into(&job, &pass, Some(room)).await {
                tracing::debug!(target: "vmem::migration", %error, "it stays on disk");
            }
        }
    }
    object.detach_from_vram(&pass);
    Ok(())
}

/// Whether nothing keeps the object in VRAM.
///
/// # Errors
///
/// `Pinned`.
pub(crate) fn check_unpinned(object: &Object) -> Result<()> {
    match object.vram_pins() {
        0 => Ok(()),
        pins => Err(VirtualMemoryError::Pinned { handle: object.id, tier: MemoryTier::Vram, pins }),
    }
}
