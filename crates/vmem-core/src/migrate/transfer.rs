//! The one way between host memory and the tiers below it: chunks to and from their extents,
//! whichever tier these are in.
//!
//! Ownership: the backend of a tier owns buffers and extents from the submission until it has
//! completed. A chunk that one tier cannot read comes from the next that has it. Called by all
//! other migrations.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::IoBuf;
use crate::latency::{self, ReadStage};
use crate::object::Shared;
use crate::stats::add;
use crate::storage::{Extent, ReadChunk, TierError};
use crate::tier::{Class, Storage};

/// Writes each chunk into its extent. All or none: after an error every extent of the call has been
/// given back.
///
/// # Errors
///
/// What the tier of a chunk says.
pub(crate) async fn write_chunks(
    shared: &Shared,
    pieces: Vec<(Extent, Bytes)>,
) -> Result<Vec<Extent>, TierError> {
    let first = pieces.first().map_or(0, |(extent, _)| extent.level());
    if pieces.iter().all(|(extent, _)| extent.level() == first) {
        return write_in(shared, first, pieces).await;
    }
    let mut written: Vec<Option<Extent>> = pieces.iter().map(|_| None).collect();
    let mut levels = BTreeMap::<usize, (Vec<usize>, Vec<_>)>::new();
    for (nth, (extent, bytes)) in pieces.into_iter().enumerate() {
        let (places, pieces) = levels.entry(extent.level()).or_default();
        places.push(nth);
        pieces.push((extent, bytes));
    }
    for (level, (places, pieces)) in levels {
        let extents = write_in(shared, level, pieces).await?;
        places.into_iter().zip(extents).for_each(|(nth, extent)| written[nth] = Some(extent));
    }
    Ok(written.into_iter().flatten().collect())
}

async fn write_in(
    shared: &Shared,
    level: usize,
    pieces: Vec<(Extent, Bytes)>,
) -> Result<Vec<Extent>, TierError> {
    let storage = &shared.storage()[level];
    let count = pieces.len();
    let written = storage.backend.write(pieces).await;
    let written = written.inspect_err(|error| note(storage, error))?;
    assert!(written.len() == count, "a backend returns the extents that it wrote");
    add(&storage.written_bytes, written.iter().map(|extent| u64::from(extent.len())).sum());
    Ok(written)
}

/// Reads chunks, each to its place in the buffer, and verifies them. With a class each tier is read
/// in turn with other reads of that class. The buffer comes back in any case.
///
/// # Errors
///
/// What the slowest tier that has the chunk says; the number of a damaged chunk is that in `reads`.
pub(crate) async fn read_chunks(
    shared: &Shared,
    reads: Vec<ReadChunk>,
    mut buf: IoBuf,
    class: Option<Class>,
) -> (IoBuf, Result<(), TierError>) {
    if !shared.evicts_from(0) {
        return read_in(shared, 0, reads, buf, class).await;
    }
    let mut left: Vec<(usize, ReadChunk)> = reads.into_iter().enumerate().collect();
    while let Some(level) = left.iter().map(|(_, read)| read.extent.level()).min() {
        let here = |(_, read): &(usize, ReadChunk)| read.extent.level() == level;
        let (now, later): (Vec<_>, Vec<_>) = left.into_iter().partition(here);
        left = later;
        let outcome;
        let reads = now.iter().map(|(_, read)| read.clone()).collect();
        (buf, outcome) = read_in(shared, level, reads, buf, class).await;
        let Err(error) = outcome else { continue };
        let is_below = |(_, read): &(usize, ReadChunk)| {
            read.extent.below().is_some() && !crate::planted!("below-unread")
        };
        // What only this tier has is read again without the others: one of them may have failed.
        let (elsewhere, only_here): (Vec<_>, Vec<_>) = now.iter().cloned().partition(is_below);
        if elsewhere.is_empty() {
            let number = |nth: usize| now.get(nth).map(|(number, _)| *number);
            return (buf, Err(error.renumbered(number)));
        }
        shared.storage()[level].state.notices().fallback(&error);
        add(&shared.counters.errors, 1);
        left.extend(elsewhere.iter().filter_map(below).chain(only_here));
    }
    (buf, Ok(()))
}

/// The same chunk in a slower tier.
fn below((nth, read): &(usize, ReadChunk)) -> Option<(usize, ReadChunk)> {
    let extent: &Arc<Extent> = read.extent.below()?;
    Some((*nth, ReadChunk { extent: extent.clone(), at: read.at }))
}

async fn read_in(
    shared: &Shared,
    level: usize,
    reads: Vec<ReadChunk>,
    buf: IoBuf,
    class: Option<Class>,
) -> (IoBuf, Result<(), TierError>) {
    let storage = &shared.storage()[level];
    let bytes: u64 = reads.iter().map(|read| u64::from(read.extent.len())).sum();
    let turn = latency::enter(ReadStage::Turn);
    let _place = match class {
        Some(Class::Demand) => Some(storage.link.demand().await),
        Some(Class::Prefetch) => Some(storage.link.background().await),
        None => None,
    };
    drop(turn);
    let _stage = latency::enter(ReadStage::Io);
    let (buf, outcome) = storage.backend.read(reads, buf).await;
    match &outcome {
        Ok(()) => add(&storage.read_bytes, bytes),
        Err(error) => note(storage, error),
    }
    (buf, outcome)
}

/// Tells operators of what is a fault of the tier.
fn note(storage: &Storage, error: &TierError) {
    if matches!(error, TierError::Io { .. } | TierError::Corrupt { .. }) {
        storage.state.notices().fault(error);
    }
}
