//! Reads ranges of objects without promoting them.
//!
//! Ownership: staging, the space for the result and the version that is read belong to the task
//! until it has ended; what it returns goes into a parcel. Called by reads of ranges.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::{count_hit, load};
use crate::buffer::IoBuf;
use crate::chunk::{CHUNK_BYTES, chunk_count, chunks_of};
use crate::copy::Found;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::latency::{self, ReadStage};
use crate::object::{MapIdentity, Object, Shared, Version};
use crate::parcel::{Parcel, SetAside};
use crate::tier::{Class, Need};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// What a read of a part found.
pub(crate) enum Piece {
    Copied(Copied),
    /// The object is in host memory by now.
    Resident,
    /// The object was never written.
    Zeros,
}

/// A piece of a version: the range `at` of `bytes`. `map` tells versions apart.
pub(crate) struct Copied {
    pub(crate) bytes: IoBuf,
    pub(crate) at: Range<usize>,
    pub(crate) map: MapIdentity,
    /// It keeps extents that others may need, so it can be taken back alone: the bytes stay valid.
    pub(crate) version: Parcel<Version>,
}

impl SetAside for Piece {
    fn is_shared(&self) -> bool {
        match self {
            Piece::Copied(copied) => copied.bytes.is_shared(),
            Piece::Resident | Piece::Zeros => false,
        }
    }
}

/// The bytes of a part.
pub(crate) enum Part {
    /// In memory outside of object space.
    Owned(Bytes),
    /// In object space.
    Held(Bytes),
}

impl Part {
    pub(crate) fn into_bytes(self) -> Bytes {
        match self {
            Part::Owned(bytes) | Part::Held(bytes) => bytes,
        }
    }
}

impl SetAside for Part {
    fn is_shared(&self) -> bool {
        matches!(self, Part::Held(_))
    }
}

/// Reads as much of the front of `range` as a piece of staging holds: of `version`, or else of the
/// current one. With `owned` it is one chunk, in memory of its own, which is never taken back.
pub(crate) async fn read_piece(
    object: Arc<Object>,
    version: Option<Version>,
    mut range: Range<usize>,
    owned: bool,
    class: Class,
    deadline: Deadline,
) -> Result<Piece> {
    let version = match version {
        Some(version) => version,
        None => match below(&object, &deadline).await? {
            Below::Version(version) => {
                count_hit(&object, &version);
                version
            }
            Below::Resident(_) => return Ok(Piece::Resident),
            Below::Zeros => return Ok(Piece::Zeros),
        },
    };
    if owned {
        range.end = range.end.min((range.start / CHUNK_BYTES + 1) * CHUNK_BYTES);
    }
    let (mut bytes, mut at) = staged(&object, &version, &range, class, &deadline).await?;
    if owned {
        bytes = IoBuf::from_vec(bytes[at].to_vec());
        at = 0..bytes.len();
    }
    let map = version.identity();
    let version = Parcel::set_aside(version, &object.shared.unclaimed);
    Ok(Piece::Copied(Copied { bytes, at, map, version }))
}

/// Reads a range of the object: into memory of its own if it is small (`copied`), else into object
/// space.
pub(crate) async fn read_part(
    object: Arc<Object>,
    range: Range<usize>,
    copied: bool,
    class: Class,
    deadline: Deadline,
) -> Result<Part> {
    let shared = object.shared.clone();
    let mut small = Vec::new();
    let to_hold = if copied { 0 } else { Shared::to_hold(range.len()) };
    // Stands for the bytes until they are counted as held.
    let _promise = shared.promise(to_hold, &deadline).await?;
    let mut space = None;
    if copied {
        small = vec![0; range.len()];
    } else {
        let need = Need::one(range.len(), object.id, class);
        space = Some(shared.host_space_or_error(&need, &deadline).await?);
    }
    let to = space.as_mut().map_or(&mut small[..], |space| space.as_mut_slice());
    match below(&object, &deadline).await? {
        Below::Version(version) => {
            count_hit(&object, &version);
            copy_all(&object, &version, &range, to, class, &deadline).await?;
        }
        Below::Resident(bytes) => {
            let _stage = latency::enter(ReadStage::Copy);
            to.copy_from_slice(&bytes[range]);
        }
        Below::Zeros => to.fill(0),
    }
    Ok(match space {
        Some(space) => Part::Held(space.into_bytes(&shared.copies)),
        None => Part::Owned(Bytes::from(small)),
    })
}

/// Copies a range of a version through staging.
pub(super) async fn copy_all(
    object: &Arc<Object>,
    version: &Version,
    range: &Range<usize>,
    to: &mut [u8],
    class: Class,
    deadline: &Deadline,
) -> Result<()> {
    let mut done = 0;
    while done < range.len() {
        let rest = range.start + done..range.end;
        let (bytes, at) = staged(object, version, &rest, class, deadline).await?;
        let stage = latency::enter(ReadStage::Copy);
        to[done..done + at.len()].copy_from_slice(&bytes[at.clone()]);
        drop(stage);
        done += at.len();
    }
    Ok(())
}

/// Where the current bytes of an object were found.
enum Below {
    Version(Version),
    Resident(Bytes),
    Zeros,
}

async fn below(object: &Arc<Object>, deadline: &Deadline) -> Result<Below> {
    loop {
        if let Some(damage) = object.damage() {
            return Err(damage);
        }
        if let Some(version) = object.cold_version() {
            return Ok(Below::Version(version));
        }
        if let Found::Copy(guard) = object.copy.acquire(&object.shared.copies) {
            return Ok(Below::Resident(guard.into_bytes()));
        }
        let pass = object.gate(deadline).await?;
        // Space that was set apart holds no bytes: the object is zeros.
        if object.has_spare() {
            return Ok(Below::Zeros);
        }
        drop(pass);
    }
}

/// Loads the front of the range into a piece of staging; returns it with the place of the bytes in
/// it.
async fn staged(
    object: &Arc<Object>,
    version: &Version,
    range: &Range<usize>,
    class: Class,
    deadline: &Deadline,
) -> Result<(IoBuf, Range<usize>)> {
    let piece = object.shared.staging(version.tier(), deadline).await?;
    let first = range.start / CHUNK_BYTES;
    let fit = (piece.len() / CHUNK_BYTES).max(1);
    let last = (first + fit).min(chunks_of(range).end).min(chunk_count(object.len));
    let (piece, outcome) = load(object, version, first..last, piece, 0, class).await;
    outcome?;
    let start = range.start - first * CHUNK_BYTES;
    let end = range.end.min(last * CHUNK_BYTES) - first * CHUNK_BYTES;
    Ok((piece, start..end))
}
