//! The bodies of gets and puts.
//!
//! Invariant: a body is of one version from start to end; the bytes of a get lie in memory of their
//! own or in the reserve for streams, never in object space, however long they are kept; and only
//! what one `get_ranges` asks for is held whole. Called by `store.rs` and `upload.rs`.

use std::io;
use std::ops::Range;
use std::pin::pin;

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{PutPayload, PutResult, Result, coalesce_ranges};
use tokio::io::AsyncWriteExt;
use vmem_core::{
    MemoryTier, ObjectWriter, PutOptions, VMemHandle, VirtualMemory, VirtualMemoryError,
};

use crate::error::{self, RequestError};

/// Ranges that lie no farther apart are read at once: the disk reads and verifies as many bytes.
const GAP: u64 = vmem_core::backend::CHUNK_BYTES as u64;

/// A part of an object, a window at a time.
pub(crate) fn stream(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    path: Path,
    range: Range<usize>,
) -> BoxStream<'static, Result<Bytes>> {
    let windows = vmem.reader(handle, range).into_stream();
    windows.map_err(move |error| error::of(error, &path)).boxed()
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
    path: &Path,
    payload: &PutPayload,
    home: MemoryTier,
) -> Result<VMemHandle> {
    let mut writer = vmem.writer(home);
    write(&mut writer, path, payload).await?;
    writer.commit().await.map_err(|error| error::of(error, path))
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
    if payload.as_ref().len() > 1 {
        let mut writer = vmem.writer_named(name, options);
        write(&mut writer, path, &payload).await?;
        return commit(vmem, writer, name, path, &metadata).await;
    }
    let put = vmem.put_named_with(name, Bytes::from(payload), options).await;
    let handle = put.map_err(|error| error::of(error, path))?;
    Ok(put_result(vmem, name, &handle, &metadata).await)
}

/// A payload, behind what the writer has already.
pub(crate) async fn write(
    writer: &mut ObjectWriter,
    path: &Path,
    payload: &PutPayload,
) -> Result<()> {
    for piece in payload {
        writer.write_all(piece).await.map_err(|error| of_io(error, path))?;
    }
    Ok(())
}

/// The bytes of another object, behind what the writer has already.
pub(crate) async fn append(
    vmem: &VirtualMemory,
    writer: &mut ObjectWriter,
    path: &Path,
    part: &VMemHandle,
) -> Result<()> {
    let mut windows = pin!(vmem.reader(part, ..).into_stream());
    while let Some(window) = windows.try_next().await.map_err(|error| error::of(error, path))? {
        writer.write_all(&window).await.map_err(|error| of_io(error, path))?;
    }
    Ok(())
}

/// Gives the name to what was written.
pub(crate) async fn commit(
    vmem: &VirtualMemory,
    writer: ObjectWriter,
    name: &str,
    path: &Path,
    metadata: &Bytes,
) -> Result<PutResult> {
    let handle = writer.commit().await.map_err(|error| error::of(error, path))?;
    Ok(put_result(vmem, name, &handle, metadata).await)
}

/// The result of a put, if the name still has it. Else it has a tag that nothing has: a caller that
/// asks for it learns that the name has changed.
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
        Ok((_, entry)) if vmem_core::planted!("object-store-tag") => entry.version.to_string(),
        _ => format!("replaced-{}", handle.id()),
    };
    PutResult { e_tag: Some(e_tag), version: None }
}

/// What a writer says as an error of its trait.
fn of_io(error: io::Error, path: &Path) -> object_store::Error {
    let said = error.get_ref().and_then(|said| said.downcast_ref::<VirtualMemoryError>());
    match said {
        Some(said) => error::of(said.clone(), path),
        None => error::generic(error),
    }
}

fn zeros(len: usize) -> Result<Vec<u8>, RequestError> {
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len);
    reserved.map_err(|_| RequestError::OutOfMemory { len: len as u64 })?;
    bytes.resize(len, 0);
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
