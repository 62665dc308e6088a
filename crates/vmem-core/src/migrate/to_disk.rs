//! Downwards: from host to disk, alone or many small ones in one run.
//!
//! Ownership: the bytes travel as a reader's count on the host copy, the space as reserved extents;
//! both are the backend's until the write has completed. The host copy is dropped only after the
//! map says that the disk has it all, and only once nobody reads it.

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
/// Batches of a flush that are on their way at once.
const BATCHES_MAX: usize = 8;

/// An object that is written back, with the extents that its missing chunks will have.
#[derive(Debug)]
pub(crate) struct Leaving {
    pass: GatePass,
    missing: Vec<usize>,
    extents: Vec<Extent>,
    bytes: Bytes,
}

/// What becomes of the host copy once the disk has it all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyFate {
    /// It goes, unless somebody reads it.
    Drop,
    /// It goes; whoever reads it keeps an old version.
    Detach,
    /// It stays, clean.
    Keep,
}

impl Leaving {
    /// Takes space for what the disk does not have. The pass comes back with the error.
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

    /// Takes the pieces to write out of it.
    fn pieces(&mut self) -> Vec<(Extent, Bytes)> {
        let bytes = &self.bytes;
        let piece = |(&index, extent): (&usize, Extent)| {
            let start = index * CHUNK_BYTES;
            let end = start + extent.len() as usize;
            (extent, bytes.slice(start..end))
        };
        self.missing.iter().zip(std::mem::take(&mut self.extents)).map(piece).collect()
    }

    /// The disk has it all: says so, and lets the host copy go as asked. Returns where the disk has
    /// it.
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

/// Writes a batch of objects, in one run where the free space allows it. One that fails does not
/// keep the others: each is tried alone then. Returns the first error; what failed stays where it
/// was.
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
        // It counts as a reader, and would keep the copy from going.
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

/// Writes a batch, all or none, and returns where each is. After an error the batch still holds its
/// passes.
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
/// `Pinned`, or what the disk says; the object is then where it was.
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

/// Writes what the disk does not have of one object, which stays in host memory.
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

/// Writes what the disk does not have of these objects, which stay in host memory, many in one run.
/// All are tried. Returns how many failed, and the first error.
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
            // Another change is under way: this one waits for it, the others do not.
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

/// Brings the current bytes of one object to disk, where it keeps its host copy, and says where
/// they are. What has no extent there is zeros.
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

/// An object that nobody has written yet gives up its host memory for space on disk: zeros need
/// no copy.
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
