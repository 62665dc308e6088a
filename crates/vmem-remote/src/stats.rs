//! The figures of a remote tier.
//!
//! Invariant: what lies in the bucket is at least what its chunks need. Read by services that
//! watch what a bucket costs.

use std::sync::atomic::Ordering;

use crate::inner::Inner;

/// Requests, and what lies in the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteStats {
    /// Puts that were sent, each part of an upload as one, with those that failed.
    pub puts: u64,
    /// Reads that were sent.
    pub gets: u64,
    /// Deletions that were sent, of up to 1,000 objects each.
    pub deletes: u64,
    /// Requests of any kind that failed; most were sent again.
    pub failed: u64,
    /// Objects in the bucket that hold chunks.
    pub segments: u64,
    /// What those take, in bytes, with what is no longer in use of them.
    pub stored_bytes: u64,
    /// Memory that what waits to be put takes, in bytes.
    pub buffered_bytes: u64,
    /// Whether requests fail at once, since too many have failed.
    pub is_circuit_open: bool,
    /// Whether a collector has ended the lease of this instance, since it was not renewed for four
    /// times the grace: it has to be opened again.
    pub is_lease_ended: bool,
}

impl RemoteStats {
    pub(crate) fn of(inner: &Inner) -> Self {
        let counts = &inner.client.counts;
        let (segments, stored_bytes) = inner.ledger.lock().stored();
        RemoteStats {
            puts: counts.puts.load(Ordering::Relaxed),
            gets: counts.gets.load(Ordering::Relaxed),
            deletes: counts.deletes.load(Ordering::Relaxed),
            failed: counts.failed.load(Ordering::Relaxed),
            segments,
            stored_bytes,
            buffered_bytes: inner.buffers.bytes(),
            is_circuit_open: inner.client.is_circuit_open(),
            is_lease_ended: inner.lease.is_ended(),
        }
    }
}
