//! The chunks that a write to disk covers only in part.
//!
//! Invariant: called with the gate held, so that the bytes around the new ones are those of the
//! previous version; space is taken if there is some, and never waited for. Called by
//! `disk_write.rs`.

use std::ops::Range;

use bytes::Bytes;

use super::load;
use super::transfer::write_chunks;
use crate::chunk::{CHUNK_BYTES, chunk_lens, chunks_of, range_of};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::object::{GatePass, Object, Shared, Version};
use crate::stats::add;
use crate::storage::{Extent, TierError};
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// The outcome of one write that is in flight.
pub(super) type Written = std::result::Result<Vec<Extent>, TierError>;

/// The data in a chunk that it covers in part, and where in the object that is.
pub(super) type Edge = (Range<usize>, Bytes);

/// Writes the chunks that the data covers in part; the rest of each comes from the previous
/// version.
pub(super) async fn write_edges(
    pass: &GatePass,
    edges: &[Edge],
    deadline: &Deadline,
) -> Result<Vec<(usize, Extent)>> {
    let object = pass.object();
    let mut written = Vec::with_capacity(edges.len());
    for (range, data) in edges {
        let index = range.start / CHUNK_BYTES;
        let chunk = range_of(object.len, index);
        let from = if object.copy.is_some() { MemoryTier::Host } else { object.version().tier() };
        let mut piece = object.shared.staging(from, deadline).await?;
        match object.copy.acquire(&object.shared.copies) {
            Found::Copy(old) => {
                piece[..chunk.len()].copy_from_slice(&old.as_ref()[chunk.clone()]);
            }
            Found::Locked | Found::Nothing => {
                if let Some(damage) = object.damage() {
                    return Err(damage);
                }
                let below: Version = object.version();
                let (loaded, outcome) =
                    load(object, &below, index..index + 1, piece, 0, Class::Demand).await;
                outcome?;
                piece = loaded;
            }
        }
        piece[range.start - chunk.start..range.end - chunk.start].copy_from_slice(data);
        let extent = reserve(object, [index])?;
        let bytes = piece.freeze().slice(..chunk.len());
        let pieces = extent.into_iter().map(|extent| (extent, bytes.clone())).collect();
        drop(bytes);
        let outcome = write_chunks(&object.shared, pieces).await;
        let extents = account(&object.shared, object.id, outcome)?;
        written.extend(extents.into_iter().map(|extent| (index, extent)));
    }
    Ok(written)
}

/// Writes what only host memory has of the chunks outside of `range`: its copy is about to go.
pub(super) async fn write_rest(
    pass: &GatePass,
    range: &Range<usize>,
    host: Bytes,
) -> Result<Vec<(usize, Extent)>> {
    let object = pass.object();
    let touched = chunks_of(range);
    let missing = object.extents().missing(object.len);
    let rest: Vec<_> = missing.into_iter().filter(|index| !touched.contains(index)).collect();
    if rest.is_empty() {
        return Ok(Vec::new());
    }
    let extents = reserve(object, rest.iter().copied())?;
    let slice = |(&index, extent)| (extent, host.slice(range_of(object.len, index)));
    let pieces = rest.iter().zip(extents).map(slice).collect();
    drop(host);
    let written = write_chunks(&object.shared, pieces).await;
    let extents = account(&object.shared, object.id, written)?;
    Ok(rest.into_iter().zip(extents).collect())
}

/// Space for these chunks, for the holder of the gate: what may come back soon is not waited for.
fn reserve(object: &Object, chunks: impl IntoIterator<Item = usize>) -> Result<Vec<Extent>> {
    let lens = chunk_lens(object.len, chunks);
    let reserved = object.shared.reserve(object.home_level(), &lens);
    reserved.map_err(|error| object.shared.tier_error(object.id, error))
}

/// The outcome of a write of chunks of this object, in the terms of callers.
pub(super) fn account(shared: &Shared, handle: u64, outcome: Written) -> Result<Vec<Extent>> {
    outcome.map_err(|error| {
        add(&shared.counters.errors, 1);
        shared.tier_error(handle, error)
    })
}
