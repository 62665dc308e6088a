//! Memory of the tier's own, for what waits to be in the bucket.
//!
//! Invariant: no more is copied than the bound, and each copy is counted until its call has ended.
//! The caller's memory, which is staging that all tiers need, is free once it was copied: a bucket
//! that does not answer keeps none of it. What exceeds the bound waits in the caller's memory, so
//! that a bucket that is merely slow slows its writers. Called by the tier, for each write.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

/// The bound, and what is taken of it.
#[derive(Debug)]
pub(crate) struct Buffers {
    bytes_max: u64,
    bytes: AtomicU64,
}

/// What one call takes.
#[derive(Debug)]
pub(crate) struct Buffered {
    of: Arc<Buffers>,
    bytes: u64,
}

impl Buffers {
    pub(crate) fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Buffers { bytes_max, bytes: AtomicU64::new(0) })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Puts copies in the place of these payloads, if the bound allows it.
    pub(crate) fn copy(self: &Arc<Self>, payloads: &mut [Bytes]) -> Option<Buffered> {
        let bytes = payloads.iter().map(|payload| payload.len() as u64).sum::<u64>();
        let fits = |taken: u64| Some(taken + bytes).filter(|taken| *taken <= self.bytes_max);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        let taken = Buffered { of: Arc::clone(self), bytes };
        let mut copy = Vec::with_capacity(bytes as usize);
        payloads.iter().for_each(|payload| copy.extend_from_slice(payload));
        let mut copy = Bytes::from(copy);
        for payload in payloads {
            *payload = copy.split_to(payload.len());
        }
        Some(taken)
    }
}

impl Drop for Buffered {
    fn drop(&mut self) {
        let before = self.of.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        assert!(before >= self.bytes, "no more is given back than was taken");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_counted_and_bounded() {
        let buffers = Buffers::new(10);
        let original = Bytes::from(vec![1, 2, 3, 4, 5, 6]);
        let mut payloads = [original.slice(..2), original.slice(2..2), original.slice(2..)];
        let taken = buffers.copy(&mut payloads).unwrap();
        assert_eq!(payloads.concat(), original);
        assert!(original.is_unique(), "the caller's memory is free");
        assert_eq!(buffers.bytes(), 6);
        let mut more = [original.clone()];
        assert!(buffers.copy(&mut more).is_none());
        assert!(!original.is_unique(), "it stays where it is");
        drop(taken);
        assert_eq!(buffers.bytes(), 0);
        assert!(buffers.copy(&mut more).is_some());
    }
}
