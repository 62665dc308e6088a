//! Reading chunks of one version from disk, verified.
//!
//! Invariant: the bytes are those of the disk map that was handed in, or an error; the clone of
//! the map keeps its extents from being reused until the last of them was read. Used by fetches,
//! range reads and partial writes.

use std::ops::Range;

use crate::buffer::IoBuf;
use crate::disk::{CHUNK_BYTES, DiskError, ReadChunk};
use crate::error::VirtualMemoryError;
use crate::host_queue::Class;
use crate::object::{DiskMap, Object, chunk_len};
use crate::stats;

/// Chunks that a read ahead of need takes at a time: small, since demand waits behind it.
const AHEAD_CHUNKS: usize = 2;

/// Reads these chunks of `object`, as `disk` has them, into `buf`, the first at `front`. Chunks that were
/// never written are zeros. The buffer comes back in any case.
pub(crate) async fn load(
    object: &Object,
    disk: &DiskMap,
    chunks: Range<usize>,
    mut buf: IoBuf,
    front: usize,
    class: Class,
) -> (IoBuf, Result<(), VirtualMemoryError>) {
    let first = chunks.start;
    let mut next = chunks.start;
    while next < chunks.end {
        // Somebody may have come to wait for what was begun ahead of need.
        let class = if object.has_flight() { Class::Demand } else { class };
        let step = match class {
            Class::Demand => chunks.len(),
            Class::Prefetch => AHEAD_CHUNKS,
        };
        let piece = next..(next + step).min(chunks.end);
        next = piece.end;
        let mut reads = Vec::with_capacity(piece.len());
        for index in piece.clone() {
            let at = front + (index - first) * CHUNK_BYTES;
            match disk.chunk(index) {
                Some(extent) if extent.sum().is_some() => {
                    reads.push(ReadChunk { extent: extent.clone(), at });
                }
                _ => buf[at..at + chunk_len(object.len, index) as usize].fill(0),
            }
        }
        if reads.is_empty() {
            continue;
        }
        let outcome;
        (buf, outcome) = read_piece(object, reads, buf, class).await;
        if let Err(error) = outcome {
            return (buf, Err(in_object(object, disk, piece, error)));
        }
    }
    (buf, Ok(()))
}

async fn read_piece(
    object: &Object,
    reads: Vec<ReadChunk>,
    buf: IoBuf,
    class: Class,
) -> (IoBuf, Result<(), DiskError>) {
    let shared = &object.shared;
    let bytes: u64 = reads.iter().map(|read| u64::from(read.extent.len())).sum();
    let _place = match class {
        Class::Demand => shared.disk_link.demand().await,
        Class::Prefetch => shared.disk_link.ahead().await,
    };
    let (buf, outcome) = shared.disk.read(reads, buf).await;
    if outcome.is_ok() {
        stats::add(&shared.counters.disk_to_host_bytes, bytes);
    }
    (buf, outcome)
}

/// The error of a read of `piece`, in terms of the object; damage is remembered.
fn in_object(
    object: &Object,
    disk: &DiskMap,
    piece: Range<usize>,
    error: DiskError,
) -> VirtualMemoryError {
    let error = match error {
        DiskError::Corrupt { chunk: nth, expected, actual } => {
            let sealed = |&index: &usize| disk.chunk(index).is_some_and(|e| e.sum().is_some());
            let chunk = piece.filter(sealed).nth(nth).unwrap_or(nth);
            DiskError::Corrupt { chunk, expected, actual }
        }
        other => other,
    };
    let error = object.shared.disk_error(object.id, error);
    if matches!(error, VirtualMemoryError::Corrupt { .. }) {
        object.set_damage(disk, error.clone());
    }
    error
}
