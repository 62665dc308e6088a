//! Writes back what only a device has: to host memory, or, where that has no space, to the tier
//! below it.
//!
//! Ownership: the caller has the gate, and keeps it. The space is the floor of the object if it has
//! one, so nothing is waited for but the copies; each copy has a share of the range. However it
//! ends, the device still has the version. Called by the evictor of the device, and before anything
//! that asks for bytes below it.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::StreamExt;

use super::relocate::relocate_on_device;
use super::transfer::write_chunks;
use super::{CopyFate, Job, Record, fetch_into, load, refresh_below};
use crate::chunk::{CHUNK_BYTES, chunk_count, chunk_len, chunk_lens};
use crate::copy::OwnedCopy;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{ExtentMap, GatePass, Object};
use crate::stats::add;
use crate::storage::Extent;
use crate::tier::{Class, Destination, Need};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Objects of one batch that are copied at once.
const AT_ONCE: usize = 8;

/// Writes the object back if only a device has it.
///
/// # Errors
///
/// `Device` if the version is lost, or cannot be copied; `TierFull`, `Io`.
pub(crate) async fn write_back_from_device(
    pass: &GatePass,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<()> {
    let object = pass.object();
    if !object.is_dirty_on_device() {
        return Ok(());
    }
    if let Some(lost) = object.damage() {
        return Err(lost);
    }
    let has_floor = object.has_floor_in_host();
    let space = if has_floor { None } else { host_space(object) };
    if has_floor || space.is_some() {
        let job = Job::new(object.clone(), cause, *deadline);
        return fetch_into(&job, pass, space).await.map(drop);
    }
    write_to_storage(pass, cause, deadline).await
}

/// Space in host memory, if there is some now.
pub(crate) fn host_space(object: &Object) -> Option<OwnedCopy> {
    let need = Need::one(object.len, object.id, Class::Demand).or_spill();
    let shared = &object.shared;
    shared.fits_host(object.len).then(|| shared.try_host_space(&need)).flatten()
}

/// Sees to it that an object has a floor again if the copy into its floor failed, or its task was
/// dropped.
pub(super) struct KeepsFloor<'a>(pub(super) &'a GatePass);

impl Drop for KeepsFloor<'_> {
    fn drop(&mut self) {
        let object = self.0.object();
        let lacks = object.is_dirty_on_device() && !object.has_floor() && !object.is_dead();
        if lacks && !crate::planted!("dirty-floorless") {
            // If there is none now the evictor tries again.
            drop(object.lower_floor(self.0));
        }
    }
}

/// Through staging to the tier below host memory.
async fn write_to_storage(
    pass: &GatePass,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<()> {
    let object = pass.object();
    let shared = &object.shared;
    let _keeps = KeepsFloor(pass);
    let lens = chunk_lens(object.len, 0..chunk_count(object.len));
    let extents = match object.take_floor_in_storage(pass) {
        Some(extents) => extents,
        None => shared
            .reserve(object.home_level(), &lens)
            .map_err(|error| shared.tier_error(object.id, error))?,
    };
    let from = object.version().tier();
    let to = extents.first().map_or(0, Extent::level);
    let route = (from, MemoryTier::of_level(to));
    let record = Record::start(shared, object, route, cause, deadline);
    match copy_to(object, extents.into(), deadline).await {
        Ok(written) => {
            object.publish_written_back(pass, ExtentMap::of(written));
            record.end(Ok(object.len as u64));
            refresh_below(object);
            Ok(())
        }
        Err(error) => {
            record.end(Err(&error));
            Err(error)
        }
    }
}

async fn copy_to(
    object: &Arc<Object>,
    mut extents: VecDeque<Extent>,
    deadline: &Deadline,
) -> Result<Vec<Extent>> {
    let shared = &object.shared;
    let version = object.version();
    let per_piece = (shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
    let count = chunk_count(object.len);
    let mut written = Vec::with_capacity(count);
    for first in (0..count).step_by(per_piece) {
        let chunks = first..(first + per_piece).min(count);
        let piece = shared.staging(version.tier(), deadline).await?;
        let (piece, loaded) = load(object, &version, chunks.clone(), piece, 0, Class::Demand).await;
        loaded?;
        let bytes = piece.freeze();
        let pieces = chunks.filter_map(|index| {
            let start = (index - first) * CHUNK_BYTES;
            let end = start + chunk_len(object.len, index) as usize;
            Some((extents.pop_front()?, bytes.slice(start..end)))
        });
        let pieces = pieces.collect();
        drop(bytes);
        let outcome = write_chunks(shared, pieces).await;
        written.extend(outcome.map_err(|error| shared.tier_error(object.id, error))?);
    }
    assert!(written.len() == count, "an object is written back whole");
    Ok(written)
}

/// An object that is to leave a device, which alone has it, or to move there; with its gate.
pub(crate) struct LeavingDevice {
    pub(crate) pass: GatePass,
    pub(crate) device: usize,
    /// Where it moves on the device instead.
    pub(crate) to: Option<Destination>,
}

/// Writes a batch back, and lets its objects leave the device unless the copies there are kept;
/// what is to move does so instead, or leaves where it cannot. All are tried.
///
/// # Errors
///
/// The first of [`write_back_from_device`], if none of them could be written.
pub(crate) async fn write_back_from_devices(
    batch: Vec<LeavingDevice>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<()> {
    let one = |LeavingDevice { pass, device, to }: LeavingDevice| async move {
        if let Some(to) = to {
            let moved = relocate_on_device(&pass, device, to).await;
            let Err(error) = moved else { return Ok(false) };
            let handle = pass.object().id;
            tracing::debug!(target: "vmem::migration", handle, %error, "it leaves instead");
        }
        if let Err(error) = write_back_from_device(&pass, cause, deadline).await {
            if fate != CopyFate::Keep {
                // Others have their turn first.
                pass.object().touch();
            }
            return Err(error);
        }
        if fate != CopyFate::Keep && pass.object().leave_device(&pass, device) {
            add(&pass.object().shared.counters.evictions, 1);
        }
        Ok(true)
    };
    let mut ended = futures::stream::iter(batch).map(one).buffer_unordered(AT_ONCE);
    let mut any = false;
    let mut first_error = None;
    while let Some(one) = ended.next().await {
        match one {
            // What moves says nothing of the tier below.
            Ok(is_written) => any |= is_written,
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    first_error.filter(|_| !any).map_or(Ok(()), Err)
}
