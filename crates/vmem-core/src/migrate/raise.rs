//! To VRAM, from host memory or, through staging, from disk; and out of it.
//!
//! Ownership: the range is the object's from before the first byte; each copy has a share of it and owns the
//! bytes that it reads, until it has completed. The gate is held throughout, so the version that goes up
//! is the version that is published; a task that is dropped half way leaves room that holds nothing.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Fetch, Record, fetch_into, load};
use crate::buffer::IoBuf;
use crate::copy::Found;
use crate::device::{DeviceAnswer, DeviceError};
use crate::disk::CHUNK_BYTES;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::host_queue::{Class, Need};
use crate::object::{GatePass, Object, VramUse, chunk_count};
use crate::stats::add;
use crate::tier::MemoryTier;
use crate::vram::{Vram, Wanted};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one object that are on their way up at once.
const PIECES_MAX: usize = 4;

/// A request for an object in VRAM.
#[derive(Clone, Debug)]
pub(crate) struct Raise {
    pub(crate) object: Arc<Object>,
    pub(crate) class: Class,
    pub(crate) cause: MigrationCause,
    pub(crate) asked: Instant,
    pub(crate) deadline: Instant,
    /// Told once whoever asked has gone: then it is not worth waiting for room.
    pub(crate) unwanted: Option<Arc<Notify>>,
}

/// Brings the current version of an object to VRAM.
///
/// # Errors
///
/// Those of making room, of the device, and of reading the disk; the object is then where it was.
pub(crate) async fn raise(job: &Raise) -> Result<()> {
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
        let pass = object.gate(job.deadline).await?;
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

async fn room(job: &Raise, vram: &Vram) -> Result<crate::device::DeviceRange> {
    let (len, class, asked, deadline) = (job.object.len, job.class, job.asked, job.deadline);
    let room = vram.room(&job.object.shared, Wanted { len, class, asked, deadline });
    let Some(unwanted) = &job.unwanted else { return room.await };
    tokio::select! {
        biased;
        room = room => room,
        () = unwanted.notified() => Err(VirtualMemoryError::TimedOut {
            operation: "a promotion that nobody waits for any more",
            waited: job.asked.elapsed(),
        }),
    }
}

/// Copies the current version to the range.
async fn fill(job: &Raise, vram: &Vram, pass: &GatePass, range: &VramUse) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    let host = match object.copy.acquire(&shared.copies) {
        Found::Copy(guard) => Some(guard.into_bytes()),
        Found::Locked | Found::Nothing => None,
    };
    let from = if host.is_some() { MemoryTier::Host } else { MemoryTier::Disk };
    let route = (from, MemoryTier::Vram);
    let record = Record::start(shared, object.id, route, job.cause, job.asked);
    let outcome = match host {
        Some(bytes) => {
            vram.backend.upload(range.range(), 0, bytes).await.map_err(DeviceError::public)
        }
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
async fn fill_from_disk(job: &Raise, vram: &Vram, pass: &GatePass, range: &VramUse) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    if let Some(damage) = object.damage() {
        return Err(damage);
    }
    let version = object.version();
    let written = |index| version.disk.chunk(index).is_some_and(|extent| extent.sum().is_some());
    if !(0..chunk_count(object.len)).any(written) {
        return vram.backend.zero(range.range()).await.map_err(DeviceError::public);
    }
    let per_piece = (shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
    let mut uploads: FuturesOrdered<DeviceAnswer<std::result::Result<(), DeviceError>>> =
        FuturesOrdered::new();
    let mut outcome = Ok(());
    for first in (0..chunk_count(object.len)).step_by(per_piece) {
        let chunks = first..(first + per_piece).min(chunk_count(object.len));
        let (start, end) = (first * CHUNK_BYTES, object.len.min(chunks.end * CHUNK_BYTES));
        // An upload that has started goes on whether it is polled or not, and gives its piece back.
        let piece = IoBuf::from_staging(shared.staging.acquire().await);
        let (piece, loaded) = load(object, &version, chunks, piece, 0, job.class).await;
        outcome = outcome.and(loaded);
        if outcome.is_err() {
            break;
        }
        let bytes = piece.freeze().slice(..end - start);
        uploads.push_back(vram.backend.upload(range.range(), start, bytes));
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

/// Takes an object out of VRAM, to host memory if there is room for it; else it stays where it is below.
///
/// # Errors
///
/// `Pinned`.
pub(crate) async fn lower(object: &Arc<Object>, asked: Instant, deadline: Instant) -> Result<()> {
    let pass = object.gate(deadline).await?;
    check_unpinned(object)?;
    if object.in_vram() && !object.has_host_room() && object.shared.fits_host(object.len) {
        let (len, owner, class) = (object.len, object.id, Class::Demand);
        let need = Need { len, owner, class, may_spill: true };
        if let Some(room) = object.shared.try_host_room(need) {
            let (cause, stay, unwanted) = (MigrationCause::Demote, true, None);
            let job =
                Fetch { object: object.clone(), class, cause, stay, asked, deadline, unwanted };
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
