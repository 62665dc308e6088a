//! Checksums of chunks, in slices that leave other tasks their turn.
//!
//! Invariant: the sum is the CRC-32C that the disk tier has for the same bytes. Called by writes,
//! reads and compactions.

use bytes::Bytes;

/// After this many bytes of checksums, other tasks get their turn.
const YIELD_BYTES: usize = 256 * 1024;

/// The CRC-32C of some bytes.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The CRC-32C of each chunk.
pub(crate) async fn checksums(payloads: &[Bytes]) -> Vec<u32> {
    let mut turn = Turn::default();
    let mut sums = Vec::with_capacity(payloads.len());
    for payload in payloads {
        turn.took(payload.len()).await;
        sums.push(crc32c(payload));
    }
    sums
}

/// Counts bytes of work and yields between slices of it.
#[derive(Default)]
pub(crate) struct Turn {
    bytes: usize,
}

impl Turn {
    pub(crate) async fn took(&mut self, bytes: usize) {
        if self.bytes >= YIELD_BYTES {
            self.bytes = 0;
            tokio::task::yield_now().await;
        }
        self.bytes += bytes;
    }
}
