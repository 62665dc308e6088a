//! Moves objects between the tiers below host memory.
//!
//! Ownership: an object that moves, with its gate, belongs to its [`Demotion`], or to the task that
//! promotes it, until the new extents are published. The task never waits for space while it has
//! the gate. Called by the evictor, by public calls, and before an object gets a name.

use std::sync::Arc;

use bytes::Bytes;

use super::copying::{Copying, Moved, NotCopied, copy, write};
use super::{CopyFate, Job, Record};
use crate::chunk::{CHUNK_BYTES, chunk_len, chunk_lens, range_of};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{ExtentMap, GatePass, Object, Shared};
use crate::stats::add;
use crate::storage::{Extent, TierError};
use crate::tier::Need;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// An object that is copied to a slower tier, with the extents for what that lacks.
pub(crate) struct Demotion {
    pass: GatePass,
    level: usize,
    chunks: Vec<(usize, Arc<Extent>, Extent)>,
}

impl Demotion {
    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.pass.object().shared.clone()
    }

    /// Reserves extents for what neither the tier `level` nor a slower one has. An error returns
    /// the pass.
    pub(crate) fn prepare(
        pass: GatePass,
        level: usize,
    ) -> std::result::Result<Self, (GatePass, TierError)> {
        let object = pass.object();
        let missing = object.extents().missing_in(level);
        let lens = chunk_lens(object.len, missing.iter().map(|&(index, _)| index));
        match object.shared.reserve(level, &lens) {
            Ok(extents) => {
                let chunks = missing.into_iter().zip(extents);
                let chunks = chunks.map(|((index, from), to)| (index, from, to)).collect();
                Ok(Demotion { pass, level, chunks })
            }
            Err(error) => Err((pass, error)),
        }
    }

    /// Payload that will be written, in bytes.
    pub(crate) fn payload(&self) -> u64 {
        let written = self.chunks.iter().filter(|(_, from, _)| from.sum().is_some());
        written.map(|(_, _, to)| u64::from(to.len())).sum()
    }

    /// Publishes what was copied; unless the copies of the faster tiers are kept, these leave.
    /// Returns the new map.
    fn publish(self, moved: Vec<Moved>, fate: CopyFate) -> ExtentMap {
        let Demotion { pass, level, .. } = self;
        let object = pass.object();
        let (left, map) = object.with_extents(&pass, |map, old| {
            for Moved { from, to, .. } in moved {
                from.set_below(to);
            }
            let levels = if fate == CopyFate::Keep { 0..0 } else { 0..level };
            let left = levels.filter(|&level| map.drop_from(object.len, level, old)).count();
            (left, map.clone())
        });
        add(&object.shared.counters.evictions, left as u64);
        map
    }
}

/// Demotes a batch of objects. If it fails, each object is tried alone. Returns the first error; an
/// object that failed stays where it was.
///
/// # Errors
///
/// Those of reading and of writing; `TimedOut`. A refusal is for the caller to count.
pub(crate) async fn demote_between(
    mut batch: Vec<Demotion>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<()> {
    let Err(error) = demote_batch(&mut batch, fate, cause, deadline).await else { return Ok(()) };
    let is_over = batch.len() < 2 || crate::planted!("below-all-or-none");
    if is_over || matches!(error, VirtualMemoryError::Closed) {
        return Err(error);
    }
    let mut outcome = Ok(());
    for Demotion { pass, level, .. } in batch {
        let object = pass.object().clone();
        let alone = match Demotion::prepare(pass, level) {
            Ok(one) => demote_batch(&mut vec![one], fate, cause, deadline).await.map(drop),
            Err((_pass, error)) => Err(object.shared.attempt_error(object.id, error)),
        };
        outcome = outcome.and(alone);
    }
    outcome
}

/// Demotes a batch, all or none, and returns the map of each object. After an error the batch still
/// has its passes.
async fn demote_batch(
    batch: &mut Vec<Demotion>,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<Vec<ExtentMap>> {
    let Some(first) = batch.first() else { return Ok(Vec::new()) };
    let shared = first.pass.object().shared.clone();
    let start = |one: &Demotion| {
        let from = one.chunks.first().map_or(0, |(_, from, _)| from.level());
        let route = (MemoryTier::of_level(from), MemoryTier::of_level(one.level));
        let record = Record::start(&shared, one.pass.object(), route, cause, deadline);
        (record, one.payload())
    };
    let records: Vec<_> = batch.iter().map(start).collect();
    let mut all = Vec::new();
    for (object, one) in batch.iter_mut().enumerate() {
        let chunks = std::mem::take(&mut one.chunks).into_iter();
        all.extend(chunks.map(|(index, from, to)| Copying { object, index, from, to }));
    }
    match copy(&shared, all, None, deadline).await {
        Ok(moved) => {
            let mut of_object: Vec<Vec<_>> = batch.iter().map(|_| Vec::new()).collect();
            moved.into_iter().for_each(|one| of_object[one.object].push(one));
            let mut maps = Vec::with_capacity(batch.len());
            for ((one, moved), (record, bytes)) in batch.drain(..).zip(of_object).zip(records) {
                maps.push(one.publish(moved, fate));
                record.end(Ok(bytes));
            }
            shared.space_was_freed();
            Ok(maps)
        }
        Err((failed, error)) => {
            let id = batch.get(failed).map_or(0, |one| one.pass.object().id);
            let error = error.public(&shared, id);
            if let ([one], VirtualMemoryError::Corrupt { chunk, .. }) = (&batch[..], &error) {
                note_damage(&one.pass, *chunk as usize, &error);
            }
            records.into_iter().for_each(|(record, _)| record.end(Err(&error)));
            Err(error)
        }
    }
}

/// A chunk cannot be read. What host memory has as well is to be written again; else the object is
/// damaged.
fn note_damage(pass: &GatePass, chunk: usize, error: &VirtualMemoryError) {
    let object = pass.object();
    if object.copy.is_some() && !crate::planted!("below-damage") {
        object.with_extents(pass, |map, old| map.forget(object.len, chunk..chunk + 1, old));
    } else {
        object.set_damage(&object.extents(), error.clone());
    }
}

/// Copies what the tier `level` lacks of an object there from faster tiers below host memory, which
/// keep it, and returns its map. A refusal is for the caller to count.
///
/// # Errors
///
/// Those of [`demote_one`].
pub(super) async fn settle_below(
    pass: GatePass,
    level: usize,
    deadline: &Deadline,
) -> Result<ExtentMap> {
    let object = pass.object().clone();
    let prepared = Demotion::prepare(pass, level);
    let one = prepared.map_err(|(_pass, error)| object.shared.attempt_error(object.id, error))?;
    let mut batch = vec![one];
    let maps = demote_batch(&mut batch, CopyFate::Keep, MigrationCause::Flush, deadline).await?;
    Ok(maps.into_iter().next().expect("invariant: one was copied"))
}

/// Demotes one object from faster tiers below host memory to the tier `level`, or copies it there
/// if these keep it.
///
/// # Errors
///
/// `TierFull`, those of reading and of writing; the object is then where it was.
pub(crate) async fn demote_one(
    pass: GatePass,
    level: usize,
    fate: CopyFate,
    cause: MigrationCause,
    deadline: &Deadline,
) -> Result<()> {
    if level == 0 {
        return Ok(());
    }
    let object = pass.object().clone();
    let prepared = Demotion::prepare(pass, level);
    let one = prepared.map_err(|(_pass, error)| object.shared.attempt_error(object.id, error))?;
    demote_between(vec![one], fate, cause, deadline).await
}

/// Copies an object from slower tiers to the tier `level` below host memory; it stays in them too.
///
/// # Errors
///
/// Those of making space, of reading and of writing; the object is then where it was.
pub(crate) async fn promote_between(job: &Job, level: usize) -> Result<()> {
    let object = &job.object;
    let state = &object.shared.storage()[level].state;
    loop {
        let slower = object.extents().slower_than(level);
        if slower.is_empty() {
            return Ok(());
        }
        // Space is never awaited under the gate, and only for what is to move.
        let lens = chunk_lens(object.len, slower);
        let len = lens.into_iter().map(|len| len as usize).sum();
        let need = Need::one(len, object.id, job.class);
        let need = if job.may_spill { need.or_spill() } else { need };
        let space = job.while_wanted(state.take(&need, &job.deadline)).await?.pop();
        let pass = object.gate(&job.deadline).await?;
        if let Some(damage) = object.damage() {
            return Err(damage);
        }
        let is_all = promote_into(job, &pass, level, space.unwrap_or_default()).await?;
        // It may have left again by now, as others may.
        if is_all {
            return Ok(());
        }
    }
}

/// As `promote_between`, of as much as there is space for; true if that was all.
async fn promote_into(
    job: &Job,
    pass: &GatePass,
    level: usize,
    space: Vec<Extent>,
) -> Result<bool> {
    let object = &job.object;
    let shared = &object.shared;
    let map = object.extents();
    // The map may have changed since the space was asked for, so a chunk takes what is as long.
    let is_whole = |extent: &Extent| extent.len() as usize == CHUNK_BYTES;
    let (mut whole, mut last): (Vec<_>, Vec<_>) = space.into_iter().rev().partition(is_whole);
    let into_space = |index| {
        let from = map.chunk(index)?.clone();
        let is_whole = chunk_len(object.len, index) as usize == CHUNK_BYTES;
        let to = if is_whole { whole.pop() } else { last.pop() };
        Some(Copying { object: 0, index, from, to: to? })
    };
    let slower = map.slower_than(level);
    let count = slower.len();
    let chunks: Vec<_> = slower.into_iter().filter_map(into_space).collect();
    let is_all = chunks.len() == count;
    let Some(first) = chunks.first() else { return Ok(is_all) };
    let route = (MemoryTier::of_level(first.from.level()), MemoryTier::of_level(level));
    let bytes = chunks.iter().map(|one| u64::from(one.to.len())).sum();
    drop(map);
    let record = Record::start(shared, object, route, job.cause, &job.deadline);
    let copied = match object.copy.acquire(&shared.copies) {
        // Nothing is to be read that is at hand.
        Found::Copy(host) if !crate::planted!("below-host-unused") => {
            copy_from_host(object, chunks, host.into_bytes()).await
        }
        _ => copy(shared, chunks, Some(job.class), &job.deadline).await,
    };
    match copied {
        Ok(moved) => {
            object.with_extents(pass, |map, old| {
                let chunks = moved.into_iter().map(|Moved { index, from, to, .. }| {
                    // What was only reserved there is not needed any more.
                    if from.sum().is_some() {
                        to.set_below(from);
                    }
                    (index, to)
                });
                map.put_shared(object.len, chunks, old);
            });
            record.end(Ok(bytes));
            add(&shared.counters.promotions, 1);
            Ok(is_all)
        }
        Err((_, error)) => {
            let error = shared.refused(error.public(shared, object.id));
            record.end(Err(&error));
            Err(error)
        }
    }
}

/// Writes chunks of one object from its host copy; as [`copy`].
async fn copy_from_host(
    object: &Object,
    chunks: Vec<Copying>,
    host: Bytes,
) -> std::result::Result<Vec<Moved>, (usize, NotCopied)> {
    let chunks = chunks.into_iter();
    let chunks = chunks.map(|one| (host.slice(range_of(object.len, one.index)), one)).collect();
    drop(host);
    let written = write(&object.shared, chunks).await;
    written.map_err(|error| (0, NotCopied::Storage(error)))
}
