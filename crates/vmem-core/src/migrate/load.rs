//! Reading chunks of one version from device memory, or from the tiers below, verified.
//!
//! Invariant: the bytes are those of the version that was handed in, or an error; its shares keep
//! range and extents from being reused until the last of them was read. Used by fetches, range
//! reads, partial writes and copies to VRAM.

use std::ops::Range;
use std::sync::Arc;

use super::transfer::read_chunks;
use crate::buffer::IoBuf;
use crate::chunk::{CHUNK_BYTES, chunk_len};
use crate::device::{DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::latency::{self, ReadStage};
use crate::object::{ExtentMap, Object, Version};
use crate::stats;
use crate::storage::{ReadChunk, TierError};
use crate::tier::Class;

/// Chunks that a prefetch takes at a time: small, since demand waits behind it.
const PREFETCH_CHUNKS: usize = 2;

/// Reads these chunks of `object`, as this version has them, into `buf`, the first at `front`.
/// Chunks that were never written are zeros. The buffer comes back in any case.
pub(crate) async fn load(
    object: &Object,
    version: &Version,
    chunks: Range<usize>,
    mut buf: IoBuf,
    front: usize,
    class: Class,
) -> (IoBuf, Result<(), VirtualMemoryError>) {
    if let Some(copy) = &version.device {
        let outcome;
        (buf, outcome) = load_from_device(object, copy, chunks.clone(), buf, front).await;
        match outcome {
            Ok(()) => return (buf, Ok(())),
            Err(error) if version.only_there.is_some() && !crate::planted!("dirty-fallback") => {
                return (buf, Err(error.public()));
            }
            // The copies below go on serving.
            Err(error) => object.shared.devices()[copy.0].state.notices().fallback(&error),
        }
    } else if version.only_there.is_some() && !crate::planted!("dirty-fallback") {
        let lost = object.damage().unwrap_or_else(|| DeviceError::Lost("".into()).public());
        return (buf, Err(lost));
    }
    load_from_storage(object, &version.extents, chunks, buf, front, class).await
}

async fn load_from_device(
    object: &Object,
    (device, copy): &(usize, DeviceRange),
    chunks: Range<usize>,
    buf: IoBuf,
    at: usize,
) -> (IoBuf, Result<(), DeviceError>) {
    let shared = &object.shared;
    let device = &shared.devices()[*device];
    let start = chunks.start * CHUNK_BYTES;
    let len = object.len.min(chunks.end * CHUNK_BYTES) - start;
    let _stage = latency::enter(ReadStage::Io);
    let (buf, outcome) = device.backend.download(Arc::new(copy.share()), start, len, buf, at).await;
    match &outcome {
        Ok(()) => stats::add(&shared.counters.vram_to_host_bytes, len as u64),
        Err(error) => {
            device.note(error);
            stats::add(&shared.counters.errors, 1);
        }
    }
    (buf, outcome)
}

async fn load_from_storage(
    object: &Object,
    disk: &ExtentMap,
    chunks: Range<usize>,
    mut buf: IoBuf,
    front: usize,
    class: Class,
) -> (IoBuf, Result<(), VirtualMemoryError>) {
    let first = chunks.start;
    let mut next = chunks.start;
    while next < chunks.end {
        // A reader may wait by now for what a prefetch began.
        let class = if object.has_flight() { Class::Demand } else { class };
        let step = match class {
            Class::Demand => chunks.len(),
            Class::Prefetch => PREFETCH_CHUNKS,
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
        (buf, outcome) = read_chunks(&object.shared, reads, buf, Some(class)).await;
        if let Err(error) = outcome {
            return (buf, Err(in_object(object, disk, piece, error)));
        }
    }
    (buf, Ok(()))
}

/// The error of a read of `piece`, in terms of the object; damage is remembered.
fn in_object(
    object: &Object,
    disk: &ExtentMap,
    piece: Range<usize>,
    error: TierError,
) -> VirtualMemoryError {
    let sealed = |&index: &usize| disk.chunk(index).is_some_and(|e| e.sum().is_some());
    let error = error.renumbered(|nth| piece.filter(sealed).nth(nth));
    let error = object.shared.tier_error(object.id, error);
    if matches!(error, VirtualMemoryError::Corrupt { .. }) {
        object.set_damage(disk, error.clone());
    }
    error
}
