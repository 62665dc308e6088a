//! Writes objects back from host to disk, one alone or many small ones in one run.
//!
//! Ownership: the backend owns the bytes, by a reader count on the host copy, and the reserved
//! extents until the write has completed. The host copy is dropped only after the map says that the
//! disk has all of it, and only once it has no reader.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;

use super::Record;
use super::to_device::check_unheld;
use crate::chunk::CHUNK_BYTES;
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::disk::{DiskError, Extent};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{DiskMap, GatePass, Object, Shared, chunk_count, chunk_lens};
use crate::stats::{self, add};

/// Payload of one batch of a flush, in bytes, unless one object alone has more.
const BATCH_BYTES: u64 = 1024 * 1024;
/// Objects in one batch of a flush.
const BATCH_OBJECTS: usize = 256;
/// Batches of a flush that are in flight at once.
const BATCHES_MAX: usize = 8;

/// An object being written back, with the extents for the chunks that the disk lacks.
#[derive(Debug)]
pub(crate) struct Leaving {
    pass: GatePass,
    missing: Vec<usize>,
    extents: Vec<Extent>,
    bytes: Bytes,
}

/// What to do with the host copy once the disk has all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyFate {
    /// Drop it, unless it has a reader.
    Drop,
    /// Detach it: its readers keep it as an old version.
    Detach,
    /// Keep it, clean.
    Keep,
}

impl Leaving {
    /// Reserves extents for what the disk does not have. An error returns the pass.
    pub(crate) fn prepare(pass: GatePass) -> Result<Self, (GatePass, DiskError)> {
        let object = pass.object();
        let shared = &object.shared;
        let missing = object.disk().missing(object.len);
        let extents = match shared.reserve(&chunk_lens(object.len, missing.iter().copied())) {
            Ok(extents) => extents,
            Err(error) => return Err((pass, error)),
        };
        let Found::Copy(guard) = object.copy.acquire(&shared.copies) else {
            unreachable!("the holder of the gate found a host copy, and alone takes it away")
        };
        let bytes = guard.into_bytes();
        Ok(Leaving { pass, missing, extents, bytes })
    }

    /// Payload that will be written, in bytes.
    pub(crate) fn payload(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.len())).sum()
    }

    /// Takes out the pieces to write.
    fn pieces(&mut self) -> Vec<(Extent, Bytes)> {
        let bytes = &self.bytes;
        let piece = |(&index, extent): (&usize, Extent)| {
            let start = index * CHUNK_BYTES;
            let end = start + extent.len() as usize;
            (extent, bytes.slice(start..end))
        };
        self.missing.iter().zip(std::mem::take(&mut self.extents)).map(piece).collect()
    }

    /// Publishes that the disk has all of it, and treats the host copy as asked. Returns the new
    /// disk map.
    fn publish(self, written: Vec<Extent>, fate: CopyFate) -> DiskMap {
        let Leaving { pass, missing, bytes, .. } = self;
        let object = pass.object();
        let extents = missing.into_iter().zip(written);
        let map = object.with_disk(&pass, |disk, old| {
            disk.put(object.len, extents, old);
            disk.clone()
        });
        drop(bytes);
        let gone = match fate {
            CopyFate::Drop => object.drop_clean_copy(&pass).is_some(),
            CopyFate::Detach => {
                object.detach_clean_copy(&pass);
                true
            }
            CopyFate::Keep => false,
        };
        if gone {
            add(&object.shared.counters.evictions, 1);
        }
        map
    }
}

/// Writes a batch of objects, in one run where the free space allows it. If the batch fails, each
/// object is tried alone. Returns the first error; an object that failed stays where it was.
pub(crate) async fn write_back(
    mut batch: Vec<Leaving>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<(), DiskError> {
    let Err(error) = write_batch(&mut batch, fate, cause, deadline).await else { return Ok(()) };
    if batch.len() < 2 || matches!(error, DiskError::Closed) {
        return Err(error);
    }
    let mut first_error = None;
    for Leaving { pass, bytes, .. } in batch {
        // This counts as a reader, and would keep the copy from being dropped.
        drop(bytes);
        let alone = match Leaving::prepare(pass) {
            Ok(victim) => write_batch(&mut vec![victim], fate, cause, deadline).await.map(drop),
            Err((_pass, error)) => Err(error),
        };
        if let Err(error) = alone {
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Writes a batch, all or none, and returns the disk map of each object. After an error the batch
/// still has its passes.
async fn write_batch(
    batch: &mut Vec<Leaving>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<Vec<DiskMap>, DiskError> {
    let Some(first) = batch.first() else { return Ok(Vec::new()) };
    let shared = first.pass.object().shared.clone();
    let route = (MemoryTier::Host, MemoryTier::Disk);
    let start =
        |victim: &Leaving| Record::start(&shared, victim.pass.object().id, route, cause, deadline);
    let records: Vec<_> = batch.iter().map(start).collect();
    let counts: Vec<_> = batch.iter().map(|victim| victim.missing.len()).collect();
    let payload: u64 = batch.iter().map(Leaving::payload).sum();
    let pieces = batch.iter_mut().flat_map(Leaving::pieces).collect();
    match shared.disk.write(pieces).await {
        Ok(written) => {
            add(&shared.counters.host_to_disk_bytes, payload);
            let mut written = written.into_iter();
            let mut maps = Vec::with_capacity(counts.len());
            for ((leaving, count), record) in batch.drain(..).zip(counts).zip(records) {
                let extents: Vec<_> = written.by_ref().take(count).collect();
                let bytes = extents.iter().map(|extent| u64::from(extent.len())).sum();
                maps.push(leaving.publish(extents, fate));
                record.end(Ok(bytes));
            }
            shared.space_was_freed();
            Ok(maps)
        }
        Err(error) => {
            for (victim, record) in batch.iter().zip(records) {
                let id = victim.pass.object().id;
                record.end(Err(&shared.disk_error(id, error.clone())));
            }
            Err(error)
        }
    }
}

/// Demotes one object to disk, out of device and host memory.
///
/// # Errors
///
/// `Pinned`, or those of the disk; the object then stays where it was.
pub(crate) async fn demote(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let pass = object.gate(deadline).await?;
    check_unheld(object)?;
    if object.pins() > 0 {
        return Err(VirtualMemoryError::Pinned {
            handle: object.id,
            tier: MemoryTier::Host,
            pins: object.pins(),
        });
    }
    object.detach_from_devices(&pass);
    if object.has_spare() {
        return demote_unwritten(&pass).map_err(|error| object.shared.disk_error(object.id, error));
    }
    write_one(pass, CopyFate::Detach, MigrationCause::Demote, deadline).await
}

/// Writes the chunks of one object that the disk does not have; its host copy stays.
///
/// # Errors
///
/// What the disk says.
pub(crate) async fn flush(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let pass = object.gate(deadline).await?;
    write_one(pass, CopyFate::Keep, MigrationCause::Flush, deadline).await
}

/// Writes the chunks of these objects that the disk does not have, many in one run; their host
/// copies stay. All objects are tried. Returns how many failed, and the first error.
pub(crate) async fn flush_many(
    shared: &Arc<Shared>,
    objects: Vec<Arc<Object>>,
    deadline: &Deadline,
) -> (usize, Option<VirtualMemoryError>) {
    let mut batches: Vec<(u64, Vec<Arc<Object>>)> = Vec::new();
    for object in objects {
        let len = object.len as u64;
        match batches.last_mut() {
            Some((payload, batch)) if *payload < BATCH_BYTES && batch.len() < BATCH_OBJECTS => {
                *payload += len;
                batch.push(object);
            }
            _ => batches.push((len, vec![object])),
        }
    }
    let flushes = batches.into_iter().map(|(_, batch)| flush_batch(shared, batch, deadline));
    let mut flushes = futures::stream::iter(flushes).buffer_unordered(BATCHES_MAX);
    let mut failed = 0;
    let mut first_error = None;
    while let Some((more, error)) = flushes.next().await {
        failed += more;
        first_error = first_error.or(error);
    }
    (failed, first_error)
}

async fn flush_batch(
    shared: &Arc<Shared>,
    objects: Vec<Arc<Object>>,
    deadline: &Deadline,
) -> (usize, Option<VirtualMemoryError>) {
    let mut batch = Vec::new();
    let mut alone = Vec::new();
    for object in objects {
        match object.try_gate() {
            Some(pass) if object.is_dirty() => match Leaving::prepare(pass) {
                Ok(victim) => batch.push(victim),
                Err(_) => alone.push(object),
            },
            Some(_) => {}
            // Another change holds the gate: only this object waits for it.
            None if object.is_dead() => {}
            None => alone.push(object),
        }
    }
    let mut failed = 0;
    let mut first_error = None;
    let mut note = |outcome: Result<(), VirtualMemoryError>| match outcome {
        // Freed meanwhile: there is nothing left to flush.
        Ok(()) | Err(VirtualMemoryError::HandleNotFound { .. }) => {}
        Err(error) => {
            failed += 1;
            first_error.get_or_insert(error);
        }
    };
    let written = write_back(batch, CopyFate::Keep, MigrationCause::Flush, deadline).await;
    note(written.map_err(|error| shared.disk_error(0, error)));
    for object in alone {
        note(flush(&object, deadline).await);
    }
    (failed, first_error)
}

/// Writes the current bytes of one object to disk, keeps its host copy and returns the disk map. A
/// chunk without an extent is zeros.
///
/// # Errors
///
/// What the disk says.
pub(crate) async fn settle(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<DiskMap, VirtualMemoryError> {
    let pass = object.gate(deadline).await?;
    if !object.copy.is_some() {
        return Ok(object.disk());
    }
    settle_copy(pass, deadline).await
}

/// As [`settle`], of an object that has a host copy.
///
/// # Errors
///
/// As there.
pub(crate) async fn settle_copy(
    pass: GatePass,
    deadline: &Deadline,
) -> Result<DiskMap, VirtualMemoryError> {
    let object = pass.object().clone();
    let public = |error| object.shared.disk_error(object.id, error);
    let victim = Leaving::prepare(pass).map_err(|(_pass, error)| public(error))?;
    let mut batch = vec![victim];
    let written = write_batch(&mut batch, CopyFate::Keep, MigrationCause::Flush, deadline).await;
    let map = written.map_err(public)?.pop();
    Ok(map.expect("invariant: one was written"))
}

async fn write_one(
    pass: GatePass,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let object = pass.object().clone();
    if !object.copy.is_some() {
        return Ok(());
    }
    let public = |error| object.shared.disk_error(object.id, error);
    let victim = Leaving::prepare(pass).map_err(|(_pass, error)| public(error))?;
    write_back(vec![victim], fate, cause, deadline).await.map_err(public)
}

/// Exchanges the host space of an object that was never written for extents on disk: zeros need no
/// copy.
pub(crate) fn demote_unwritten(pass: &GatePass) -> Result<(), DiskError> {
    let object = pass.object();
    let chunks = 0..chunk_count(object.len);
    let extents = object.shared.reserve(&chunk_lens(object.len, chunks.clone()))?;
    let Some(spare) = object.take_spare(pass) else { return Ok(()) };
    object.with_disk(pass, |disk, old| disk.put(object.len, chunks.zip(extents), old));
    drop(spare);
    add(&object.shared.counters.evictions, 1);
    stats::add(&object.shared.counters.clean_drops, 1);
    Ok(())
}
