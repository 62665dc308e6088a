//! What the remote tier, its extents and its tasks have in common.
//!
//! Invariant: whatever runs for the tier is counted by the tracker, from the call on, so that a
//! close can wait for it. The lock of the ledger is never held over an await, nor while an extent
//! is dropped. Called by the tier and its tasks.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use object_store::path::Path;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use vmem_core::backend::{Extent, ExtentOwner, IoBuf, ReadChunk, Run, StoredChunk, TierError};

use crate::buffers::Buffers;
use crate::catalog::{Place, Places};
use crate::client::Client;
use crate::error::{RequestError, invalid};
use crate::gather::Gather;
use crate::lease::Lease;
use crate::ledger::{Ledger, Placed};
use crate::read::Call;

/// What extents and tasks keep alive.
pub(crate) struct Inner {
    pub(crate) client: Client,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) ledger: Mutex<Ledger>,
    pub(crate) gather: Mutex<Gather>,
    /// Reads that were not begun.
    pub(crate) reads: Mutex<Vec<Call>>,
    /// Whether a task does chores.
    pub(crate) is_tidying: AtomicBool,
    /// Cancelled when the tier closes.
    pub(crate) closing: CancellationToken,
    pub(crate) tracker: TaskTracker,
    pub(crate) runtime: Handle,
    /// Where all instances write.
    pub(crate) prefix: Path,
    /// This one, and where it writes.
    pub(crate) id: Uuid,
    pub(crate) root: Path,
    pub(crate) lease: Lease,
    pub(crate) me: Weak<Inner>,
}

impl Inner {
    pub(crate) fn is_closed(&self) -> bool {
        self.closing.is_cancelled()
    }

    pub(crate) fn check_open(&self) -> Result<(), TierError> {
        if self.is_closed() { Err(TierError::Closed) } else { Ok(()) }
    }

    /// Where a segment is.
    pub(crate) fn path(&self, segment: u64) -> Path {
        match self.ledger.lock().origin(segment) {
            Some((id, number)) => segment_path(&root_of(&self.prefix, id), number),
            None => segment_path(&self.root, segment),
        }
    }

    pub(crate) fn me(&self) -> Arc<Inner> {
        self.me.upgrade().expect("a method runs while its value is alive")
    }

    pub(crate) fn check_write(&self, pieces: &[(Extent, bytes::Bytes)]) -> Result<(), TierError> {
        self.check_open()?;
        if self.lease.is_ended() {
            return Err(RequestError::LeaseEnded.of_tier("write"));
        }
        let ledger = self.ledger.lock();
        for (extent, payload) in pieces {
            if payload.len() != extent.len() as usize {
                return Err(invalid("write", "a chunk has not the length of its extent"));
            }
            if !ledger.has_given(extent.offset() + u64::from(extent.footprint())) {
                return Err(invalid("write", "an extent of another tier"));
            }
        }
        Ok(())
    }

    pub(crate) fn check_read(&self, chunks: &[ReadChunk], buf: &IoBuf) -> Result<(), TierError> {
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
}

impl ExtentOwner for Inner {
    fn release(&self, offset: u64, footprint: u32) {
        let has_chore = {
            let mut ledger = self.ledger.lock();
            ledger.release(offset, footprint);
            ledger.has_chore()
        };
        if has_chore {
            self.tidy();
        }
    }

    /// A segment to which names led is not deleted here, so that both come to the same.
    fn forget(&self, offset: u64, footprint: u32) {
        self.release(offset, footprint);
    }
}

impl Places for Inner {
    fn place(&self, chunk: &StoredChunk) -> Option<Place> {
        let [run] = &chunk.runs[..] else { return None };
        let mut ledger = self.ledger.lock();
        let placed = ledger.name(run.offset)?;
        let Placed { segment, at, len, sum } = placed;
        let (instance, segment) = ledger.origin(segment).unwrap_or((self.id, segment));
        Some(Place { instance, segment, at, len, sum })
    }

    fn enter(&self, place: Place) -> StoredChunk {
        let Place { instance, segment, at, len, sum } = place;
        let mut ledger = self.ledger.lock();
        let segment = match instance == self.id {
            true => segment,
            false => ledger.number((instance, segment)),
        };
        let offset = ledger.enter_named(Placed { segment, at, len, sum }, Instant::now());
        StoredChunk { runs: [Run { offset, footprint: len }].into(), sum }
    }
}

/// Where an instance writes.
pub(crate) fn root_of(prefix: &Path, id: Uuid) -> Path {
    prefix.clone().join(id.as_hyphenated().to_string())
}

pub(crate) fn segment_path(root: &Path, number: u64) -> Path {
    root.clone().join(format!("{number:016x}"))
}

/// Segments that stay in the bucket while this lives.
pub(crate) struct Pins {
    inner: Arc<Inner>,
    segments: Vec<u64>,
}

impl Pins {
    /// Of segments that were pinned in the ledger.
    pub(crate) fn new(inner: Arc<Inner>, segments: Vec<u64>) -> Self {
        Pins { inner, segments }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let has_chore = {
            let mut ledger = self.inner.ledger.lock();
            self.segments.iter().for_each(|&id| ledger.unpin(id));
            ledger.has_chore()
        };
        if has_chore {
            self.inner.tidy();
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteTier")
            .field("root", &self.root.as_ref())
            .field("usage", &self.ledger.lock().usage())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}
