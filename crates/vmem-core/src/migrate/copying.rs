//! Copies chunks from one tier below host memory to another, many in one run.
//!
//! Ownership: a piece of staging belongs to one copy, and the backend owns it until its part has
//! completed. Called by demotions and promotions between these tiers, which publish the copies.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::transfer::{read_chunks, write_chunks};
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::object::Shared;
use crate::storage::{Extent, ReadChunk, TierError};
use crate::tier::Class;

/// Pieces of one batch that are in flight at once.
const PIECES_MAX: usize = 4;
/// Where the chunks in a piece of staging start, in bytes: what every disk can read to directly.
const ALIGNMENT: usize = 4096;

/// A chunk that is copied: of which object of the batch, which one, from where and to where.
pub(super) struct Copying {
    pub(super) object: usize,
    pub(super) index: usize,
    pub(super) from: Arc<Extent>,
    pub(super) to: Extent,
}

/// A chunk that was copied.
pub(super) struct Moved {
    pub(super) object: usize,
    pub(super) index: usize,
    pub(super) from: Arc<Extent>,
    pub(super) to: Arc<Extent>,
}

/// Why chunks were not copied.
pub(super) enum NotCopied {
    Storage(TierError),
    Late(VirtualMemoryError),
}

impl NotCopied {
    pub(super) fn public(self, shared: &Shared, handle: u64) -> VirtualMemoryError {
        match self {
            NotCopied::Storage(error) => shared.attempt_error(handle, error),
            NotCopied::Late(error) => error,
        }
    }
}

/// Copies chunks, many in one run; in turn with other reads if there is a class. An error names the
/// first object of the piece that failed.
pub(super) async fn copy(
    shared: &Arc<Shared>,
    chunks: Vec<Copying>,
    class: Option<Class>,
    deadline: &Deadline,
) -> std::result::Result<Vec<Moved>, (usize, NotCopied)> {
    let (written, unwritten): (Vec<_>, Vec<_>) =
        chunks.into_iter().partition(|one| one.from.sum().is_some());
    let copies = pieces(written, shared.staging.piece_bytes())
        .into_iter()
        .map(|piece| copy_piece(shared, piece, class, deadline));
    let copies = futures::stream::iter(copies).buffer_unordered(PIECES_MAX);
    let copied: Vec<Vec<Moved>> = copies.try_collect().await?;
    // What was never written is zeros there too.
    let unwritten = unwritten.into_iter().map(|Copying { object, index, from, to }| Moved {
        object,
        index,
        from,
        to: Arc::new(to),
    });
    Ok(copied.into_iter().flatten().chain(unwritten).collect())
}

/// Chunks in portions that fit a piece of staging.
fn pieces(chunks: Vec<Copying>, piece_bytes: usize) -> Vec<Vec<Copying>> {
    let mut pieces: Vec<Vec<Copying>> = Vec::new();
    let mut used = piece_bytes;
    for chunk in chunks {
        let bytes = (chunk.to.len() as usize).next_multiple_of(ALIGNMENT);
        if used + bytes > piece_bytes {
            pieces.push(Vec::new());
            used = 0;
        }
        used += bytes;
        pieces.last_mut().expect("a piece was begun above").push(chunk);
    }
    pieces
}

async fn copy_piece(
    shared: &Arc<Shared>,
    chunks: Vec<Copying>,
    class: Option<Class>,
    deadline: &Deadline,
) -> std::result::Result<Vec<Moved>, (usize, NotCopied)> {
    let first = chunks.first().map_or(0, |one| one.object);
    let levels = chunks.iter().flat_map(|one| [one.from.level(), one.to.level()]);
    let slowest = MemoryTier::of_level(levels.max().unwrap_or(0));
    let piece = shared.staging(slowest, deadline).await;
    let piece = piece.map_err(|late| (first, NotCopied::Late(late)))?;
    let mut at = 0;
    let mut reads = Vec::with_capacity(chunks.len());
    for one in &chunks {
        reads.push(ReadChunk { extent: one.from.clone(), at });
        at += (one.to.len() as usize).next_multiple_of(ALIGNMENT);
    }
    let places: Vec<_> = reads.iter().map(|read| read.at).collect();
    let (piece, outcome) = read_chunks(shared, reads, piece, class).await;
    outcome.map_err(|error| {
        let object = damaged(&chunks, &error);
        let number = |nth: usize| chunks.get(nth).map(|one| one.index);
        (object, NotCopied::Storage(error.renumbered(number)))
    })?;
    let bytes: Bytes = piece.freeze();
    let slice = |one: &Copying, at: usize| bytes.slice(at..at + one.to.len() as usize);
    let writes = chunks.into_iter().zip(places);
    let writes = writes.map(|(one, at)| (slice(&one, at), one)).collect();
    drop(bytes);
    write(shared, writes).await.map_err(|error| (first, NotCopied::Storage(error)))
}

/// Writes the bytes of chunks to where they are copied to.
///
/// # Errors
///
/// What the tier says.
pub(super) async fn write(
    shared: &Shared,
    chunks: Vec<(Bytes, Copying)>,
) -> std::result::Result<Vec<Moved>, TierError> {
    let mut known = Vec::with_capacity(chunks.len());
    let mut pieces = Vec::with_capacity(chunks.len());
    for (bytes, Copying { object, index, from, to }) in chunks {
        pieces.push((to, bytes));
        known.push((object, index, from));
    }
    let written = write_chunks(shared, pieces).await?;
    let moved = known.into_iter().zip(written).map(|((object, index, from), to)| Moved {
        object,
        index,
        from,
        to: Arc::new(to),
    });
    Ok(moved.collect())
}

/// The object that an error of a read concerns.
fn damaged(chunks: &[Copying], error: &TierError) -> usize {
    let nth = match error {
        TierError::Corrupt { chunk, .. } => *chunk,
        TierError::Full { .. } | TierError::Io { .. } | TierError::Closed => 0,
    };
    chunks.get(nth).map_or(0, |one| one.object)
}
