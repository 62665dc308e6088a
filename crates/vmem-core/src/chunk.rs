//! Chunks: the pieces in which objects are stored, verified and changed below host memory.
//!
//! Invariant: a chunk has one checksum, over all of its bytes. Used by everything that knows of
//! places below host memory.

use smallvec::SmallVec;

/// The unit of checksums and of partial rewrites, in bytes: objects up to this size are one chunk,
/// larger ones are cut at its multiples.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// A run of bytes of the disk tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Space taken, in bytes, rounding included.
    pub footprint: u32,
}

/// The runs of one chunk, in its order. Only where the free space is in pieces it is more than one.
pub type Runs = SmallVec<[Run; 1]>;

/// Where the disk tier has a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Its runs, in the order in which it fills them.
    pub runs: Runs,
    /// The CRC-32C of the chunk.
    pub sum: u32,
}
