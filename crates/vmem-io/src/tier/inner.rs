//! What the disk tier and the extents that it lent have in common.
//!
//! Invariant: an extent that is released is free, or stale, before its space is handed out again.
//! Called by the tier, and by extents that are dropped.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use vmem_core::backend::{Extent, ExtentOwner, IoBuf, ReadChunk, TierError};

use crate::directory::StoreDirectory;
use crate::driver::{Driver, is_closed};
use crate::ledger::Ledger;
use crate::sync_gate::SyncGate;

/// What extents keep alive.
pub(crate) struct Inner {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) ledger: Mutex<Ledger>,
    /// Notified when a punch has ended.
    pub(crate) punched: Notify,
    pub(super) gate: Arc<SyncGate>,
    pub(super) closed: AtomicBool,
    pub(super) described: Arc<str>,
    /// Below the driver, so that the file is closed before its directory goes.
    pub(super) directory: Mutex<Option<StoreDirectory>>,
    pub(crate) me: Weak<Inner>,
}

impl Inner {
    pub(super) fn check_open(&self) -> Result<(), TierError> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(TierError::Closed),
            false => Ok(()),
        }
    }

    pub(super) fn check_write(&self, pieces: &[(Extent, Bytes)]) -> Result<(), TierError> {
        self.check_open()?;
        let end = self.ledger.lock().space.end_bytes();
        for (extent, payload) in pieces {
            if payload.len() != extent.len() as usize {
                return Err(invalid("write", "a chunk has not the length of its extent"));
            }
            if extent.runs().any(|run| run.offset + u64::from(run.footprint) > end) {
                return Err(invalid("write", "an extent of another tier"));
            }
        }
        Ok(())
    }

    pub(super) fn check_read(&self, chunks: &[ReadChunk], buf: &IoBuf) -> Result<(), TierError> {
        self.check_open()?;
        let fits = |chunk: &ReadChunk| {
            let end = chunk.at.checked_add(chunk.extent.len() as usize);
            end.is_some_and(|end| end <= buf.len())
        };
        match chunks.iter().all(fits) {
            true => Ok(()),
            false => Err(invalid("read", "a chunk has no place in the buffer")),
        }
    }

    pub(super) async fn failed(
        &self,
        operation: &'static str,
        source: Arc<io::Error>,
        requested: u64,
    ) -> TierError {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if !matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
            return failure(operation, source);
        }
        self.reclaim().await;
        let usage = self.ledger.lock().space.usage();
        TierError::Full {
            requested_bytes: requested,
            free_bytes: usage.capacity_bytes - usage.used_bytes,
            source: Some(source),
        }
    }
}

impl ExtentOwner for Inner {
    fn release(&self, offset: u64, footprint: u32) {
        let mut ledger = self.ledger.lock();
        ledger.space.release(offset, footprint);
        if !self.closed.load(Ordering::Acquire) {
            ledger.stale.add(offset..offset + u64::from(footprint));
            drop(ledger);
            self.pump();
        }
    }
}

pub(super) fn failure(operation: &'static str, source: Arc<io::Error>) -> TierError {
    match is_closed(&source) {
        true => TierError::Closed,
        false => TierError::Io { operation, source },
    }
}

pub(super) fn invalid(operation: &'static str, why: &'static str) -> TierError {
    failure(operation, Arc::new(io::Error::new(io::ErrorKind::InvalidInput, why)))
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskTier")
            .field("driver", &self.driver)
            .field("usage", &self.ledger.lock().space.usage())
            .field("closed", &self.closed)
            .finish()
    }
}
