//! Segments that commits in flight lead to.
//!
//! Invariant: what a commit leads to counts as used from before its first put until it has
//! succeeded, or, however it ended else, until none of its puts may arrive any more. A future that
//! is dropped ends its commit. Made by commits, read by renewals.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use super::SegmentId;
use crate::inner::Inner;

/// All of an instance.
#[derive(Debug, Default)]
pub(super) struct All {
    entries: BTreeMap<u64, Entry>,
    next: u64,
    is_closed: bool,
}

#[derive(Debug)]
struct Entry {
    segments: HashSet<SegmentId>,
    /// None while the commit runs.
    until: Option<Instant>,
}

impl All {
    /// None once it is closed.
    pub(super) fn enter(&mut self, segments: HashSet<SegmentId>) -> Option<u64> {
        if self.is_closed {
            return None;
        }
        self.forget_late();
        self.next += 1;
        self.entries.insert(self.next, Entry { segments, until: None });
        Some(self.next)
    }

    /// All that may still be led to.
    pub(super) fn segments(&mut self) -> HashSet<SegmentId> {
        self.forget_late();
        self.entries.values().flat_map(|entry| &entry.segments).copied().collect()
    }

    /// Takes no more; returns whether nothing is held.
    pub(super) fn close(&mut self) -> bool {
        self.is_closed = true;
        self.forget_late();
        self.entries.is_empty()
    }

    fn forget_late(&mut self) {
        let now = Instant::now();
        self.entries.retain(|_, entry| entry.until.is_none_or(|until| until > now));
    }
}

/// What one commit leads to.
#[derive(Debug)]
pub(crate) struct Held {
    inner: Arc<Inner>,
    key: u64,
    is_settled: bool,
}

impl Held {
    pub(super) fn new(inner: Arc<Inner>, key: u64) -> Self {
        Held { inner, key, is_settled: false }
    }

    /// All puts of the commit have succeeded: names lead there.
    pub(crate) fn settle(mut self) {
        self.is_settled = true;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let until = Instant::now() + self.inner.late();
        let entries = &mut self.inner.lease.state.lock().held.entries;
        if self.is_settled {
            entries.remove(&self.key);
        } else if let Some(entry) = entries.get_mut(&self.key) {
            entry.until = Some(until);
        }
    }
}
