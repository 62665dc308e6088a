//! Bytes on their way out and in.
//!
//! Invariant: a body is of one version, since a put never changes an object; and what goes out lies
//! in memory of its own, so that nobody who keeps it takes space of the store. Called by `store.rs`
//! and `upload.rs`.

use std::ops::Range;

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt, try_unfold};
use object_store::path::Path;
use object_store::{PutPayload, PutResult, Result, coalesce_ranges};
use vmem_core::{MemoryTier, PutOptions, VMemHandle, VirtualMemory};

use crate::error::{self, RequestError};

/// What is read of a body at a time, in bytes.
const PIECE: usize = 256 * 1024;

/// Ranges that lie no farther apart are read at once: the disk reads and verifies as many bytes.
const GAP: u64 = vmem_core::backend::CHUNK_BYTES as u64;

/// A part of an object, a piece at a time.
pub(crate) fn stream(
    vmem: VirtualMemory,
    handle: VMemHandle,
    path: Path,
    range: Range<usize>,
) -> BoxStream<'static, Result<Bytes>> {
    let from = (vmem, handle, path, range.start);
    try_unfold(from, move |(vmem, handle, path, start)| async move {
        if start == range.end {
            return Ok(None);
        }
        let end = range.end.min(start.saturating_add(PIECE));
        let piece = read(&vmem, &handle, &path, start..end).await?;
        Ok(Some((piece, (vmem, handle, path, end))))
    })
    .boxed()
}

/// Several parts of an object at once.
pub(crate) async fn read_ranges(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    path: &Path,
    ranges: &[Range<u64>],
) -> Result<Vec<Bytes>> {
    let fetch = |range: Range<u64>| async move {
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let (start, end) = range.ok_or(RequestError::OutOfMemory { len: u64::MAX })?;
        read(vmem, handle, path, start..end).await
    };
    coalesce_ranges(ranges, fetch, GAP).await
}

/// A part of an object, in memory of its own.
async fn read(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    path: &Path,
    range: Range<usize>,
) -> Result<Bytes> {
    let mut bytes = zeros(range.len())?;
    let read = vmem.read_into(handle, range, &mut bytes).await;
    read.map_err(|error| error::of(error, path))?;
    Ok(bytes.into())
}

/// An unnamed object that has these bytes.
pub(crate) async fn put_unnamed(
    vmem: &VirtualMemory,
    payload: PutPayload,
    home: MemoryTier,
) -> Result<VMemHandle> {
    let put = vmem.put(contiguous(payload)?, home).await;
    put.map_err(|error| error::of(error, &Path::ROOT))
}

/// A named object that has these bytes.
pub(crate) async fn put_named(
    vmem: &VirtualMemory,
    name: &str,
    path: &Path,
    payload: PutPayload,
    options: PutOptions,
) -> Result<PutResult> {
    let metadata = options.metadata.clone();
    let put = vmem.put_named_with(name, contiguous(payload)?, options).await;
    let handle = put.map_err(|error| error::of(error, path))?;
    Ok(put_result(vmem, name, &handle, &metadata).await)
}

/// A named object that has the bytes of these objects, one behind the other.
pub(crate) async fn put_joined(
    vmem: &VirtualMemory,
    name: &str,
    path: &Path,
    parts: &[VMemHandle],
    options: PutOptions,
) -> Result<PutResult> {
    let len = parts.iter().try_fold(0, |sum: usize, part| sum.checked_add(part.len()));
    let mut bytes = zeros(len.unwrap_or(usize::MAX))?;
    let mut start = 0;
    for part in parts {
        let end = start + part.len();
        let read = vmem.read_into(part, 0..part.len(), &mut bytes[start..end]).await;
        read.map_err(|error| error::of(error, path))?;
        start = end;
    }
    put_named(vmem, name, path, bytes.into(), options).await
}

/// What was put, if the name still has it. Else a tag that nothing has: whoever asks for it learns
/// that the name has moved on.
async fn put_result(
    vmem: &VirtualMemory,
    name: &str,
    handle: &VMemHandle,
    metadata: &Bytes,
) -> PutResult {
    let e_tag = match vmem.open_entry(name).await {
        Ok((now, entry)) if now == *handle && entry.metadata == metadata => {
            entry.version.to_string()
        }
        _ => format!("replaced-{}", handle.id()),
    };
    PutResult { e_tag: Some(e_tag), version: None }
}

/// A payload in one piece; those that are one already are not copied.
fn contiguous(payload: PutPayload) -> Result<Bytes> {
    if payload.as_ref().len() > 1 {
        let mut bytes = reserve(payload.content_length())?;
        payload.iter().for_each(|piece| bytes.extend_from_slice(piece));
        return Ok(bytes.into());
    }
    Ok(payload.into())
}

fn zeros(len: usize) -> Result<Vec<u8>> {
    let mut bytes = reserve(len)?;
    bytes.resize(len, 0);
    Ok(bytes)
}

fn reserve(len: usize) -> Result<Vec<u8>, RequestError> {
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len);
    reserved.map_err(|_| RequestError::OutOfMemory { len: len as u64 })?;
    Ok(bytes)
}

/// The error of an update: what does not exist has no version.
pub(crate) fn precondition(error: object_store::Error) -> object_store::Error {
    match error {
        object_store::Error::NotFound { path, source } => {
            object_store::Error::Precondition { path, source }
        }
        _ => error,
    }
}
