//! Checksums of chunks, made and compared in slices that leave other tasks their turn.
//!
//! Invariant: a chunk passes only if its CRC-32C is the one that was sealed into its extent, and
//! what was never written is zeros. Called by the disk tier; the sum alone by the catalog too.

use bytes::Bytes;
use vmem_core::backend::{IoBuf, ReadChunk, TierError};

/// After this many bytes of checksums, other tasks get their turn.
const YIELD_BYTES: usize = 256 * 1024;

/// The CRC-32C of some bytes.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The CRC-32C of each chunk.
pub(crate) async fn checksums(payloads: Vec<Bytes>) -> Vec<u32> {
    let mut turn = Turn::default();
    let mut sums = Vec::with_capacity(payloads.len());
    for payload in payloads {
        turn.took(payload.len()).await;
        sums.push(crc32c(&payload));
    }
    sums
}

/// Verifies what was read, chunk by chunk, and makes the zeros of what was never written. After
/// an unexpected end of the file (`cut`) the first chunk that does not verify is the one that is
/// missing.
pub(crate) async fn settle(
    chunks: Vec<ReadChunk>,
    mut buf: IoBuf,
    cut: bool,
) -> (IoBuf, Result<(), TierError>) {
    let mut turn = Turn::default();
    for (chunk, ReadChunk { extent, at }) in chunks.iter().enumerate() {
        let bytes = &mut buf[*at..at + extent.len() as usize];
        turn.took(bytes.len()).await;
        match extent.sum() {
            None => bytes.fill(0),
            Some(expected) => {
                let actual = crc32c(bytes);
                if actual != expected {
                    let actual = if cut { 0 } else { actual };
                    let corrupt = TierError::Corrupt { chunk, expected, actual };
                    return (buf, Err(corrupt));
                }
            }
        }
    }
    (buf, Ok(()))
}

/// Counts bytes of work and yields between slices of it.
#[derive(Default)]
struct Turn {
    bytes: usize,
}

impl Turn {
    async fn took(&mut self, bytes: usize) {
        if self.bytes >= YIELD_BYTES {
            self.bytes = 0;
            tokio::task::yield_now().await;
        }
        self.bytes += bytes;
    }
}
