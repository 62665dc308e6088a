//! The chunks that a write to disk covers only in part, and the figures of such writes.
//!
//! Invariant: called with the gate held, so that the bytes around the new ones are those of the
//! previous version; space is taken if there is some, and never waited for. Called by
//! `disk_write.rs`; the figures by `stream.rs` too.

use std::ops::Range;

use bytes::Bytes;

use super::load;
use crate::chunk::CHUNK_BYTES;
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::disk::{DiskError, Extent};
use crate::error::VirtualMemoryError;
use crate::object::{GatePass, Object, Shared, Version, chunk_lens, chunks_of, range_of};
use crate::stats::add;
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// The outcome of one write that is in flight.
pub(super) type Written = std::result::Result<Vec<Extent>, DiskError>;

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
        let mut piece = object.shared.staging(deadline).await?;
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
        let extents = account(&object.shared, object.id, object.shared.disk.write(pieces).await)?;
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
    let missing = object.disk().missing(object.len);
    let rest: Vec<_> = missing.into_iter().filter(|index| !touched.contains(index)).collect();
    if rest.is_empty() {
        return Ok(Vec::new());
    }
    let extents = reserve(object, rest.iter().copied())?;
    let slice = |(&index, extent)| (extent, host.slice(range_of(object.len, index)));
    let pieces = rest.iter().zip(extents).map(slice).collect();
    drop(host);
    let extents = account(&object.shared, object.id, object.shared.disk.write(pieces).await)?;
    Ok(rest.into_iter().zip(extents).collect())
}

/// Space for these chunks, for the holder of the gate: what may come back soon is not waited for.
fn reserve(object: &Object, chunks: impl IntoIterator<Item = usize>) -> Result<Vec<Extent>> {
    let reserved = object.shared.reserve(&chunk_lens(object.len, chunks));
    reserved.map_err(|error| object.shared.disk_error(object.id, error))
}

/// Counts a write of chunks of this object, in the terms of callers.
pub(super) fn account(shared: &Shared, handle: u64, outcome: Written) -> Result<Vec<Extent>> {
    let counters = &shared.counters;
    match outcome {
        Ok(extents) => {
            let bytes = extents.iter().map(|extent| u64::from(extent.len())).sum();
            add(&counters.host_to_disk_bytes, bytes);
            Ok(extents)
        }
        Err(error) => {
            add(&counters.errors, 1);
            Err(shared.disk_error(handle, error))
        }
    }
}
