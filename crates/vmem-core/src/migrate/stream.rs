//! What the tasks of a stream do: fill windows from one version, and put windows on disk.
//!
//! Ownership: the window belongs to the task until it has ended. The version that a reader reads is
//! its extents on disk, or, where the disk cannot take it, its host copy; both are shared with the
//! reader, whose other tasks need them. Extents that were written belong to the writer, and are
//! given back with it. Called by `vmem/reader.rs` and `vmem/writer.rs`.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::edges::account;
use super::part::copy_all;
use super::settle::settle_copy;
use super::transfer::write_chunks;
use super::{count_hit, load, write_back_from_device};
use crate::buffer::IoBuf;
use crate::chunk::{CHUNK_BYTES, chunk_lens, chunks_of};
use crate::copy::ReadGuard;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::latency::{self, ReadStage};
use crate::object::{ExtentMap, NO_OBJECT, Object, Shared, Version};
use crate::parcel::SetAside;
use crate::storage::Extent;
use crate::tier::Class;
use crate::windows::Window;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// What is copied from host memory before others run.
const STEP: usize = 256 * 1024;

/// The version that a stream reads.
pub(crate) enum Source {
    /// It can be read whatever happens to the object.
    Below(Version),
    /// Only host memory has all of it, and the disk has no space for the rest.
    Host(Bytes),
}

/// A window with bytes of this version, for its reader.
pub(crate) struct Filled {
    pub(crate) source: Arc<Source>,
    pub(crate) window: Window,
    /// Host memory did not serve it.
    pub(crate) missed: bool,
}

impl SetAside for Filled {
    /// The memory is the reader's own, whether it comes for it or not.
    fn is_shared(&self) -> bool {
        false
    }
}

/// Fills a window with these bytes of `source`, or else of the version that is current now. `all`:
/// the reader wants nothing else. For a task.
///
/// # Errors
///
/// `HandleNotFound`, `Corrupt`, `TimedOut`, `Io`.
pub(crate) async fn fill_window(
    object: Arc<Object>,
    source: Option<Arc<Source>>,
    range: Range<usize>,
    all: bool,
    mut window: Window,
    deadline: Deadline,
) -> Result<Filled> {
    let source = match source {
        Some(source) => source,
        None => Arc::new(open(&object, all, &deadline).await?),
    };
    for len in (0..range.len()).step_by(STEP) {
        window.set_len(range.len().min(len + STEP));
        tokio::task::yield_now().await;
    }
    let mut missed = false;
    match &*source {
        Source::Host(bytes) => copy(&bytes[range], window.as_mut_slice()).await,
        Source::Below(version) => match host_copy_of(&object, version) {
            Some(guard) => {
                guard.count_hit();
                copy(&guard.as_ref()[range], window.as_mut_slice()).await;
            }
            None => {
                missed = true;
                count_hit(&object, version);
                window = read(&object, version, range, window, &deadline).await?;
            }
        },
    }
    Ok(Filled { source, window, missed })
}

/// Reads a range from below host memory: whole chunks to where they stay, others through staging.
async fn read(
    object: &Arc<Object>,
    version: &Version,
    range: Range<usize>,
    mut window: Window,
    deadline: &Deadline,
) -> Result<Window> {
    let whole = range.end == object.len || range.end.is_multiple_of(CHUNK_BYTES);
    if range.start.is_multiple_of(CHUNK_BYTES) && whole {
        let chunks = chunks_of(&range);
        let buf = IoBuf::from_window(window);
        let (buf, outcome) = load(object, version, chunks, buf, 0, Class::Demand).await;
        return outcome.map(|()| buf.into_window());
    }
    copy_all(object, version, &range, window.as_mut_slice(), Class::Demand, deadline).await?;
    Ok(window)
}

/// The host copy, if it is of this version.
fn host_copy_of(object: &Object, version: &Version) -> Option<ReadGuard> {
    let (guard, map) = object.host_version()?;
    map.is_some_and(|map| map.is_same(&version.identity())).then_some(guard)
}

async fn copy(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.chunks(STEP).zip(to.chunks_mut(STEP)) {
        to.copy_from_slice(from);
        tokio::task::yield_now().await;
    }
}

/// The current version, in a form that keeps no host memory from others: what only host memory has
/// goes to disk first, unless the reader will have read it all in a moment (`brief`).
async fn open(object: &Arc<Object>, brief: bool, deadline: &Deadline) -> Result<Source> {
    let mut may_hold = brief || crate::planted!("stream-holds");
    loop {
        if let Some(damage) = object.damage() {
            return Err(damage);
        }
        if object.is_dead() {
            return Err(object.not_found());
        }
        if let Some(mut version) = object.cold_version() {
            if version.only_there.is_some() && !may_hold {
                // Else a slow reader would keep device memory.
                let pass = object.gate(deadline).await?;
                if let Err(error) =
                    write_back_from_device(&pass, MigrationCause::Read, deadline).await
                {
                    let handle = object.id;
                    tracing::debug!(
                        target: "vmem::migration", handle, %error, "a stream holds device memory"
                    );
                    may_hold = true;
                }
                if deadline.is_past() {
                    return Err(deadline.error("reading a stream"));
                }
                continue;
            }
            if version.is_unwritten() {
                // Zeros need no extents: the first write takes those that were reserved for it.
                version = Version::of_extents(ExtentMap::default());
            } else if version.extents.is_whole(object.len) {
                // A slow reader keeps no device memory.
                version.device = None;
            }
            return Ok(Source::Below(version));
        }
        match object.host_version() {
            Some((_, Some(map))) => {
                let extents = object.extents();
                if extents.identity().is_same(&map) {
                    return Ok(Source::Below(Version::of_extents(extents)));
                }
            }
            Some((guard, None)) if may_hold => return Ok(Source::Host(guard.into_bytes())),
            Some((guard, None)) => {
                drop(guard);
                let pass = object.gate(deadline).await?;
                if !object.copy.is_some() {
                    continue;
                }
                // The extents are read under the gate: a write that follows at once
                // makes another version.
                let stage = latency::enter(ReadStage::Io);
                let settled = settle_copy(pass, 0, deadline).await;
                drop(stage);
                match settled {
                    Ok(extents) => return Ok(Source::Below(Version::of_extents(extents))),
                    Err(error) => {
                        let handle = object.id;
                        tracing::debug!(
                            target: "vmem::migration", handle, %error,
                            "a stream holds its host copy"
                        );
                        may_hold = true;
                    }
                }
            }
            None => {
                let pass = object.gate(deadline).await?;
                // Space that was set apart holds no bytes: the object is zeros.
                if object.has_spare() {
                    return Ok(Source::Below(Version::of_extents(ExtentMap::default())));
                }
                drop(pass);
            }
        }
        if deadline.is_past() {
            return Err(deadline.error("reading a stream"));
        }
    }
}

/// Chunks of an object that does not exist yet.
pub(crate) struct Sent(pub(crate) Vec<Extent>);

impl SetAside for Sent {
    /// They are the writer's own, as the object will be.
    fn is_shared(&self) -> bool {
        false
    }
}

/// Puts the bytes of a window into the tier `level`, or below it, chunk by chunk: the last one may
/// be short. For a task.
///
/// # Errors
///
/// `TierFull`, `TimedOut`, `Io`.
pub(crate) async fn send_window(
    shared: Arc<Shared>,
    level: usize,
    window: Window,
    deadline: Deadline,
) -> Result<Sent> {
    let len = window.as_slice().len();
    let lens = chunk_lens(len, 0..len.div_ceil(CHUNK_BYTES));
    let extents = shared.reserve_soon(level, &lens, &deadline).await;
    let extents = extents.map_err(|error| shared.tier_error(NO_OBJECT, error))?;
    let bytes = IoBuf::from_window(window).freeze();
    let chunk = |start: usize| bytes.slice(start..len.min(start + CHUNK_BYTES));
    let chunks = extents.into_iter().zip((0..len).step_by(CHUNK_BYTES).map(chunk));
    let written = write_chunks(&shared, chunks.collect());
    drop(bytes);
    let written = deadline.bound(written).await;
    let written = written.map_err(|Late| deadline.error("writing a stream"))?;
    account(&shared, NO_OBJECT, written).map(Sent)
}
