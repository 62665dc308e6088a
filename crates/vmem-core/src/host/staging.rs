//! The staging reserve: memory for bytes in passage.
//!
//! Invariant: it is made once and never lent to object space, nor the other way round, so that what
//! passes through it always moves. A [`StagingPiece`] is exclusive; the pieces are served first
//! come first served. The holder of a piece gives it back without waiting for another one. A
//! device, or a tier below the disk, that stands still keeps half of the pieces at most, if there
//! are four. Called by the paths that bypass object space.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::locks::{self, Lock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::mapping::Mapping;
use crate::chunk::CHUNK_BYTES;

/// The largest piece, in bytes.
const PIECE_MAX: usize = 1024 * 1024;
/// The least number of pieces: with less memory they become smaller, not fewer.
const PIECES_WANTED: usize = 8;
/// With fewer pieces there are no shares: one piece alone would be read and uploaded in turns.
const PIECES_SHARED_MIN: usize = 4;

/// All of the reserve.
pub(crate) struct StagingPool {
    mapping: Mapping,
    piece_bytes: usize,
    pieces: usize,
    free: Lock<Vec<u32>, { locks::STAGING }>,
    permits: Arc<Semaphore>,
    /// The pieces that may be in passage through one tier at once, for each that has such a share.
    shares: Box<[Arc<Semaphore>]>,
}

impl StagingPool {
    /// A reserve of at most `total_bytes`, which holds two chunks at least, with shares for this
    /// many tiers.
    ///
    /// # Errors
    ///
    /// If the system refuses the address space.
    pub(crate) fn new(total_bytes: u64, shares: usize) -> io::Result<Arc<Self>> {
        let total = usize::try_from(total_bytes).map_err(io::Error::other)?;
        let chunks_each = (total / PIECES_WANTED / CHUNK_BYTES).clamp(1, PIECE_MAX / CHUNK_BYTES);
        let piece_bytes = chunks_each * CHUNK_BYTES;
        let pieces = total / piece_bytes;
        assert!(pieces >= 2, "a staging reserve of {total} bytes holds two chunks");
        let share = if pieces < PIECES_SHARED_MIN { pieces } else { pieces / 2 };
        Ok(Arc::new(StagingPool {
            mapping: Mapping::reserve(pieces * piece_bytes)?,
            piece_bytes,
            pieces,
            free: Lock::new((0..pieces as u32).rev().collect()),
            permits: Arc::new(Semaphore::new(pieces)),
            shares: (0..shares).map(|_| Arc::new(Semaphore::new(share))).collect(),
        }))
    }

    /// The length of a piece, in bytes: a multiple of the chunk's.
    pub(crate) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    /// How many pieces there are: two at least.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces
    }

    /// A piece, in turn, with whatever bytes are in it; within this share, if there is one.
    pub(crate) async fn acquire(self: &Arc<Self>, share: Option<usize>) -> StagingPiece {
        let taken = async |permits: &Arc<Semaphore>| {
            let permit = permits.clone().acquire_owned().await;
            permit.expect("invariant: the semaphores are never closed")
        };
        // The share first: nobody waits for one while it has a piece.
        let share = match share.filter(|_| !crate::planted!("staging-unshared")) {
            Some(share) => Some(taken(&self.shares[share]).await),
            None => None,
        };
        let permit = taken(&self.permits).await;
        let number = self.free.lock().pop().expect("invariant: as many pieces as permits");
        StagingPiece { pool: self.clone(), number, _permit: permit, _share: share }
    }
}

/// The staging reserve as a whole, for a backend that registers memory with a device.
///
/// It stays mapped, and none of its pages is given back to the system, as long as this lives. Its
/// bytes belong to the holders of the pieces.
#[derive(Clone, Debug)]
pub struct StagingMemory(Arc<StagingPool>);

impl StagingMemory {
    pub(crate) fn new(pool: Arc<StagingPool>) -> Self {
        StagingMemory(pool)
    }

    /// Its address; the provenance of the memory is exposed.
    pub fn address(&self) -> usize {
        self.0.mapping.at(0).as_ptr().expose_provenance()
    }

    /// Its length, in bytes: not zero.
    #[allow(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.0.pieces * self.0.piece_bytes
    }
}

impl fmt::Debug for StagingPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagingPool")
            .field("piece_bytes", &self.piece_bytes)
            .field("free", &self.free.lock().len())
            .finish_non_exhaustive()
    }
}

/// One piece of the reserve, exclusively; dropping it gives it back.
pub(crate) struct StagingPiece {
    pool: Arc<StagingPool>,
    number: u32,
    /// Given back after the number: fields are dropped after `drop`.
    _permit: OwnedSemaphorePermit,
    _share: Option<OwnedSemaphorePermit>,
}

impl StagingPiece {
    fn start(&self) -> *mut u8 {
        self.pool.mapping.at(self.number as usize * self.pool.piece_bytes).as_ptr()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the piece's number is its own until it is dropped, and the mapping is
        // initialised and lives as long as the pool.
        unsafe { std::slice::from_raw_parts(self.start(), self.pool.piece_bytes) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.pool.piece_bytes) }
    }
}

impl Drop for StagingPiece {
    fn drop(&mut self) {
        self.pool.free.lock().push(self.number);
    }
}

impl fmt::Debug for StagingPiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagingPiece").field("number", &self.number).finish_non_exhaustive()
    }
}
