//! Chunks: the pieces in which objects are stored, verified and changed below host memory.
//!
//! Invariant: a chunk has one checksum, over all of its bytes. Used by everything that knows of
//! places below host memory.

use std::ops::Range;

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

/// How many chunks an object of `len` bytes has.
pub(crate) fn chunk_count(len: usize) -> usize {
    len.div_ceil(CHUNK_BYTES)
}

/// The length of chunk `index` of an object of `len` bytes.
pub(crate) fn chunk_len(len: usize, index: usize) -> u32 {
    (len - index * CHUNK_BYTES).min(CHUNK_BYTES) as u32
}

/// The bytes of chunk `index` of an object of `len` bytes.
pub(crate) fn range_of(len: usize, index: usize) -> Range<usize> {
    let start = index * CHUNK_BYTES;
    start..start + chunk_len(len, index) as usize
}

/// The lengths of these chunks of an object of `len` bytes.
pub(crate) fn chunk_lens(len: usize, chunks: impl IntoIterator<Item = usize>) -> Vec<u32> {
    chunks.into_iter().map(|index| chunk_len(len, index)).collect()
}

/// The chunks that a range of bytes touches.
pub(crate) fn chunks_of(range: &Range<usize>) -> Range<usize> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES)
}
