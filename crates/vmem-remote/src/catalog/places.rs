//! Where chunks are in the bucket, as every process may know it.
//!
//! Invariant: a place says the same to all processes that share the bucket. Implemented by the tier
//! whose chunks have names; called by the catalog.

use std::fmt;

use uuid::Uuid;
use vmem_core::backend::StoredChunk;

use crate::lease::SegmentId;

/// A range of an object in the bucket that holds a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The instance that put it.
    pub instance: Uuid,
    /// The number of the segment among those of the instance.
    pub segment: u64,
    /// Where in the segment the chunk begins, in bytes.
    pub at: u64,
    /// Its length, in bytes.
    pub len: u32,
    /// The CRC-32C of the chunk.
    pub sum: u32,
}

impl Place {
    /// The segment, among those of all instances.
    pub(crate) fn segment_id(&self) -> SegmentId {
        (self.instance, self.segment)
    }
}

/// What translates between the chunks of a tier, whose offsets mean something to it alone, and
/// their places in the bucket.
pub trait Places: fmt::Debug + Send + Sync + 'static {
    /// Where in the bucket the chunk is; None if it was not written there.
    fn place(&self, chunk: &StoredChunk) -> Option<Place>;

    /// A chunk that perhaps another process has put, as this tier names it from now on.
    fn enter(&self, place: Place) -> StoredChunk;
}
