//! Fetches objects to host memory, from disk or from VRAM: to stay, or for the current readers
//! only.
//!
//! Ownership: the space is an [`OwnedCopy`]; it moves into the I/O buffer, and with it into the
//! backend, until the read has completed. When a fetch is dropped half way the operation keeps
//! space and extents, and gives them back when it ends.

use bytes::Bytes;

use super::from_device::KeepsFloor;
use super::{Job, Record, load};
use crate::buffer::IoBuf;
use crate::chunk::chunk_count;
use crate::copy::{Found, OwnedCopy};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::latency;
use crate::memory_tier::MemoryTier;
use crate::object::{Arrival, GatePass, Object, Version};
use crate::stats;
use crate::tier::Class;

/// Loads the bytes of an object into host memory.
///
/// # Errors
///
/// Those of making space, of reading and of verifying; everything taken was given back.
pub(crate) async fn fetch(job: &Job) -> Result<Bytes, VirtualMemoryError> {
    fetch_with(job, None).await
}

/// As `fetch`, with space that was taken already; then it never waits for space.
pub(crate) async fn fetch_with(
    job: &Job,
    mut taken: Option<OwnedCopy>,
) -> Result<Bytes, VirtualMemoryError> {
    let object = &job.object;
    if object.len == 0 {
        return Ok(Bytes::new());
    }
    // Kept until the bytes are counted as held. It comes first, since a task that has space must
    // not wait for readers.
    let _promise = job.while_wanted(object.shared.promise(job.to_hold, &job.deadline)).await?;
    loop {
        if object.has_host_space() {
            let pass = object.gate(&job.deadline).await?;
            if object.has_host_space() {
                return fetch_into(job, &pass, taken).await;
            }
            // It has left meanwhile.
        }
        // Space is never awaited under the gate: tasks that have space wait for the gate, and a
        // write must not wait for a read that finds no space.
        let space = match taken.take() {
            Some(space) => space,
            None => take_space(job).await?,
        };
        if job.stay {
            let pass = object.gate(&job.deadline).await?;
            return fetch_into(job, &pass, Some(space)).await;
        }
        if let Some(version) = object.cold_version() {
            let copy = fill(job, &version, space).await.map_err(|(_space, error)| error)?;
            count_hit(object, &version);
            return Ok(copy.into_bytes(&object.shared.copies));
        }
        if let Found::Copy(guard) = object.copy.acquire(&object.shared.copies) {
            return Ok(guard.into_bytes());
        }
        // Another task is loading, changing or evicting it: wait for the gate, behind that task.
        taken = Some(space);
        drop(object.gate(&job.deadline).await?);
    }
}

/// As `fetch`, for the holder of the gate: the copy is published.
pub(crate) async fn fetch_into(
    job: &Job,
    pass: &GatePass,
    taken: Option<OwnedCopy>,
) -> Result<Bytes, VirtualMemoryError> {
    let object = &job.object;
    let shared = &object.shared;
    if !object.copy.is_some() {
        if let Some(damage) = object.damage() {
            return Err(damage);
        }
        let _keeps = KeepsFloor(pass);
        let own = object.take_spare(pass).or_else(|| object.take_floor_in_host(pass));
        let space = match own.or(taken) {
            Some(space) => space,
            None => take_space(job).await?,
        };
        let version = object.version();
        let copy = match fill(job, &version, space).await {
            Ok(copy) => copy,
            Err((space, error)) => {
                object.return_floor(pass, space);
                return Err(error);
            }
        };
        if job.cause == MigrationCause::Read {
            count_hit(object, &version);
        }
        object.publish_fetched(pass, copy, arrival(job));
        stats::add(&shared.counters.promotions, 1);
    }
    match object.copy.acquire(&shared.copies) {
        Found::Copy(guard) => Ok(guard.into_bytes()),
        Found::Locked | Found::Nothing => {
            unreachable!("the holder of the gate alone locks a copy or takes it away")
        }
    }
}

fn arrival(job: &Job) -> Arrival {
    match job.cause {
        MigrationCause::WriteBack | MigrationCause::Evict => Arrival::WrittenBack,
        _ if job.class == Class::Prefetch => Arrival::Prefetched,
        _ => Arrival::Asked,
    }
}

/// Counts a read that the tier of this version served.
pub(crate) fn count_hit(object: &Object, version: &Version) {
    latency::served_by(version.tier());
    let shared = &object.shared;
    let hits = match &version.device {
        Some((device, _)) => &shared.devices()[*device].hits,
        None => &shared.storage()[version.extents.slowest_level()].hits,
    };
    stats::add(hits, 1);
}

async fn take_space(job: &Job) -> Result<OwnedCopy, VirtualMemoryError> {
    let need = if job.may_spill { job.need().or_spill() } else { job.need() };
    job.while_wanted(job.object.shared.host_space_or_error(&need, &job.deadline)).await
}

/// Copies and verifies the whole object into `space`, which comes back after an error too.
async fn fill(
    job: &Job,
    version: &Version,
    space: OwnedCopy,
) -> Result<OwnedCopy, (Option<OwnedCopy>, VirtualMemoryError)> {
    let object = &job.object;
    let route = (version.tier(), MemoryTier::Host);
    let record = Record::start(&object.shared, object, route, job.cause, &job.deadline);
    let chunks = 0..chunk_count(object.len);
    let space = IoBuf::from_copy(space);
    let (buf, outcome) = load(object, version, chunks, space, 0, job.class).await;
    match outcome {
        Ok(()) => {
            record.end(Ok(object.len as u64));
            Ok(buf.into_copy())
        }
        Err(error) => {
            record.end(Err(&error));
            Err((buf.into_copy_if_back(), error))
        }
    }
}
