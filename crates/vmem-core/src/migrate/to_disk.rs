//! Writes objects back from host memory, to disk or to a tier below it, one alone or many small
//! ones in one run.
//!
//! Ownership: the backend owns the bytes, by a reader count on the host copy, and the reserved
//! extents until the write has completed. The host copy is dropped only after the map says that the
//! tiers below have all of it, and only once it has no reader.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;

use super::between::demote_one;
use super::to_device::check_unheld;
use super::transfer::write_chunks;
use super::{Record, refresh_below, write_back_from_device};
use crate::chunk::{CHUNK_BYTES, chunk_count, chunk_lens};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{ExtentMap, GatePass, Object, Shared};
use crate::stats::{self, add};
use crate::storage::{Extent, TierError};

/// Payload of one batch of a flush, in bytes, unless one object alone has more.
const BATCH_BYTES: u64 = 1024 * 1024;
/// Objects in one batch of a flush.
const BATCH_OBJECTS: usize = 256;
/// Batches of a flush that are in flight at once.
const BATCHES_MAX: usize = 8;

/// An object being written back to the tier `level`, with the extents for the chunks that neither
/// this nor a slower one has.
#[derive(Debug)]
pub(crate) struct Leaving {
    pass: GatePass,
    level: usize,
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
    /// Reserves extents for what neither the tier `level` nor a slower one has: there, or below. An
    /// error returns the pass.
    pub(crate) fn prepare(pass: GatePass, level: usize) -> Result<Self, (GatePass, TierError)> {
        Self::prepare_in(pass, level, level)
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.pass.object().shared.clone()
    }

    /// As `prepare`, with extents in the tier `reserved` or below it.
    fn prepare_in(
        pass: GatePass,
        level: usize,
        reserved: usize,
    ) -> Result<Self, (GatePass, TierError)> {
        let object = pass.object();
        let shared = &object.shared;
        let missing = object.extents().absent_from(object.len, level);
        let lens = chunk_lens(object.len, missing.iter().copied());
        let extents = match shared.reserve(reserved, &lens) {
            Ok(extents) => extents,
            Err(error) => return Err((pass, error)),
        };
        let Found::Copy(guard) = object.copy.acquire(&shared.copies) else {
            unreachable!("the holder of the gate found a host copy, and alone takes it away")
        };
        let bytes = guard.into_bytes();
        Ok(Leaving { pass, level, missing, extents, bytes })
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

    /// Publishes that the tier has all of it, and treats the host copy, and those of the faster
    /// tiers below host memory, as asked. Returns the new map.
    fn publish(self, written: Vec<Extent>, fate: CopyFate) -> ExtentMap {
        let Leaving { pass, level, missing, bytes, .. } = self;
        let object = pass.object();
        let extents = missing.into_iter().zip(written);
        let map = object.with_extents(&pass, |map, old| {
            match fate {
                CopyFate::Keep => map.put_below(object.len, extents),
                CopyFate::Drop | CopyFate::Detach => {
                    map.put(object.len, extents, old);
                    for faster in 0..level {
                        map.drop_from(object.len, faster, old);
                    }
                }
            }
            map.clone()
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
        let object = object.clone();
        drop(pass);
        refresh_below(&object);
        map
    }
}

/// Writes a batch of objects, in one run where the free space allows it. If the batch fails, each
/// object is tried alone, below a tier whose medium has no space left after all. Returns the first
/// error; an object that failed stays where it was.
pub(crate) async fn write_back(
    mut batch: Vec<Leaving>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<(), TierError> {
    let Err(error) = write_batch(&mut batch, fate, cause, deadline).await else { return Ok(()) };
    let is_full = matches!(error, TierError::Full { .. });
    let below = |one: &Leaving| {
        (is_full && one.pass.object().shared.evicts_from(one.level)).then_some(one.level + 1)
    };
    let ends = batch.len() < 2 && batch.iter().all(|one| below(one).is_none());
    if ends || matches!(error, TierError::Closed) {
        return Err(error);
    }
    let mut first_error = None;
    for leaving in batch {
        let reserved = below(&leaving).unwrap_or(leaving.level);
        let Leaving { pass, level, bytes, .. } = leaving;
        // This counts as a reader, and would keep the copy from being dropped.
        drop(bytes);
        let alone = match Leaving::prepare_in(pass, level, reserved) {
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
pub(super) async fn write_batch(
    batch: &mut Vec<Leaving>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<Vec<ExtentMap>, TierError> {
    let Some(first) = batch.first() else { return Ok(Vec::new()) };
    let shared = first.pass.object().shared.clone();
    let start = |victim: &Leaving| {
        let level = victim.extents.first().map_or(victim.level, Extent::level);
        let route = (MemoryTier::Host, MemoryTier::of_level(level));
        Record::start(&shared, victim.pass.object(), route, cause, deadline)
    };
    let records: Vec<_> = batch.iter().map(start).collect();
    let counts: Vec<_> = batch.iter().map(|victim| victim.missing.len()).collect();
    let pieces = batch.iter_mut().flat_map(Leaving::pieces).collect();
    match write_chunks(&shared, pieces).await {
        Ok(written) => {
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
                record.end(Err(&shared.attempt_error(id, error.clone())));
            }
            Err(error)
        }
    }
}

/// Demotes one object to the tier `level` below host memory, out of device and host memory.
///
/// # Errors
///
/// `Pinned`, or those of the tier; the object then stays where it was.
pub(crate) async fn demote(
    object: &Arc<Object>,
    level: usize,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let pass = object.gate(deadline).await?;
    let level = object.level_at_most(level);
    check_unheld(object)?;
    check_unpinned(object, level)?;
    write_back_from_device(&pass, MigrationCause::Demote, deadline).await?;
    object.detach_from_devices(&pass);
    if object.has_spare() {
        let demoted = demote_unwritten(&pass, level);
        return demoted.map_err(|error| object.shared.tier_error(object.id, error));
    }
    let moved = move_one(pass, level, CopyFate::Detach, MigrationCause::Demote, deadline).await;
    moved.map_err(|error| object.shared.refused(error))
}

/// Whether an object may leave host memory and what is below it for the tier `level`.
///
/// # Errors
///
/// `Pinned`.
fn check_unpinned(object: &Object, level: usize) -> Result<(), VirtualMemoryError> {
    let mut tiers = std::iter::once(MemoryTier::Host).chain((0..level).map(MemoryTier::of_level));
    let held = tiers.find_map(|tier| Some((tier, object.holds_in(tier))).filter(|(_, n)| *n > 0));
    held.map_or(Ok(()), |(tier, pins)| {
        Err(VirtualMemoryError::Pinned { handle: object.id, tier, pins })
    })
}

/// Writes the chunks of one object that its home tier lacks; the other copies stay.
///
/// # Errors
///
/// What the tier says.
pub(crate) async fn flush(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let outcome = flush_one(object, deadline).await;
    outcome.map_err(|error| object.shared.refused(error))
}

/// As [`flush`]; a refusal is for the caller to count.
async fn flush_one(object: &Arc<Object>, deadline: &Deadline) -> Result<(), VirtualMemoryError> {
    let pass = object.gate(deadline).await?;
    write_back_from_device(&pass, MigrationCause::Flush, deadline).await?;
    move_one(pass, object.flush_level(), CopyFate::Keep, MigrationCause::Flush, deadline).await
}

/// Writes the chunks of these objects that no tier below host memory has, many in one run; their
/// host copies stay. All objects are tried. Returns how many failed, and the first error; a refusal
/// is for the caller to count.
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
            Some(pass) if object.is_dirty() => match Leaving::prepare(pass, object.flush_level()) {
                Ok(victim) => batch.push(victim),
                Err(_) => alone.push(object),
            },
            // A kernel wrote it meanwhile.
            Some(_pass) if object.is_dirty_on_device() => alone.push(object.clone()),
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
    note(written.map_err(|error| shared.attempt_error(0, error)));
    for object in alone {
        note(flush_one(&object, deadline).await);
    }
    (failed, first_error)
}

/// Moves one object to the tier `level`, or copies it there: from host memory if that has it, else
/// from the faster tiers below. A refusal is for the caller to count.
async fn move_one(
    pass: GatePass,
    level: usize,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let object = pass.object().clone();
    if !object.copy.is_some() {
        return demote_one(pass, level, fate, cause, deadline).await;
    }
    let public = |error| object.shared.attempt_error(object.id, error);
    let victim = Leaving::prepare(pass, level).map_err(|(_pass, error)| public(error))?;
    write_back(vec![victim], fate, cause, deadline).await.map_err(public)
}

/// Exchanges the host space of an object that was never written for extents in the tier `level`:
/// zeros need no copy.
pub(crate) fn demote_unwritten(pass: &GatePass, level: usize) -> Result<(), TierError> {
    let object = pass.object();
    let chunks = 0..chunk_count(object.len);
    let extents = object.shared.reserve(level, &chunk_lens(object.len, chunks.clone()))?;
    let Some(spare) = object.take_spare(pass) else { return Ok(()) };
    object.with_extents(pass, |map, old| map.put(object.len, chunks.zip(extents), old));
    drop(spare);
    add(&object.shared.counters.evictions, 1);
    stats::add(&object.shared.counters.clean_drops, 1);
    Ok(())
}
