//! Checksums of chunks, in slices that leave other tasks their turn.
//!
//! Invariant: the sum of some bytes is the same in every tier. Called by the tiers, which seal it
//! into the extents that they write.

use bytes::Bytes;

/// After this many bytes of checksums, other tasks get their turn.
const YIELD_BYTES: usize = 256 * 1024;

/// The CRC-32C of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The CRC-32C of each chunk.
pub async fn checksums(payloads: impl IntoIterator<Item = Bytes>) -> Vec<u32> {
    let mut slices = Slices::default();
    let mut sums = Vec::new();
    for payload in payloads {
        slices.took(payload.len()).await;
        sums.push(crc32c(&payload));
    }
    sums
}

/// Counts bytes of work and yields between slices of it.
#[derive(Debug, Default)]
pub struct Slices {
    bytes: usize,
}

impl Slices {
    /// That many bytes are worked on now; other tasks first, if it is their turn.
    pub async fn took(&mut self, bytes: usize) {
        if self.bytes >= YIELD_BYTES {
            self.bytes = 0;
            tokio::task::yield_now().await;
        }
        self.bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    #[test]
    fn sum_is_that_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[tokio::test]
    async fn long_work_is_done_in_slices() {
        let payloads: Vec<_> = (0..64_u8).map(|n| Bytes::from(vec![n; 64 * 1024])).collect();
        let expected: Vec<_> = payloads.iter().map(|payload| crc32c(payload)).collect();
        let mut sums = pin!(checksums(payloads));
        let mut polls = 0;
        let sums = poll_fn(|context| {
            polls += 1;
            sums.as_mut().poll(context)
        });
        assert_eq!(sums.await, expected);
        assert_eq!(polls, 64 / 4, "a slice is four of them");
        assert!(
            matches!(futures::poll!(pin!(checksums([]))), Poll::Ready(sums) if sums.is_empty())
        );
    }
}
