//! Chores: dead segments are deleted, and what is alive of mostly dead ones is copied together.
//!
//! Invariant: one task at a time does them, and only while there are any. A segment is deleted when
//! nothing leads there and nobody reads it, so that a copy is never made at a reader's cost.
//! Started by the ends of extents, writes and reads.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::timeout;

use crate::error::RequestError;
use crate::inner::Inner;
use crate::ledger::{Chore, Compaction, Placed};
use crate::plan::{Wanted, groups};
use crate::read::fetch;

/// The longest pause after a chore that failed.
const PAUSE_MAX: Duration = Duration::from_secs(60);

impl Inner {
    /// Starts a task for the chores, unless there is one.
    pub(crate) fn tidy(&self) {
        if self.is_closed() || self.is_tidying.swap(true, Ordering::AcqRel) {
            return;
        }
        self.tracker.spawn_on(do_chores(Tidying(self.me())), &self.runtime);
    }
}

/// The one task that does chores.
struct Tidying(Arc<Inner>);

impl Drop for Tidying {
    fn drop(&mut self) {
        self.0.is_tidying.store(false, Ordering::Release);
    }
}

async fn do_chores(tidying: Tidying) {
    let inner = Arc::clone(&tidying.0);
    let first_pause = inner.client.options().circuit_pause;
    let mut pause = first_pause;
    loop {
        if inner.is_closed() {
            return;
        }
        let chore = inner.ledger.lock().next_chore();
        let done = match chore {
            None => break,
            Some(Chore::Delete(segments)) => delete(&inner, segments).await,
            Some(Chore::Compact(compaction)) => compact(&inner, compaction).await,
        };
        if let Err(error) = done {
            tracing::debug!(target: "vmem::remote", %error, "a chore failed");
            let _ = timeout(pause, inner.closing.cancelled()).await;
            pause = (pause * 2).min(PAUSE_MAX);
        } else {
            pause = first_pause;
        }
    }
    drop(tidying);
    // What came between the last look and the end had no task of its own.
    if inner.ledger.lock().has_chore() {
        inner.tidy();
    }
}

async fn delete(inner: &Inner, segments: Vec<u64>) -> Result<(), RequestError> {
    let paths: Vec<_> = segments.iter().map(|&segment| inner.path(segment)).collect();
    let deleted = inner.client.delete(&paths).await;
    if deleted.is_err() {
        inner.ledger.lock().not_deleted(segments);
    }
    deleted
}

/// Segments that a compaction keeps until it ends.
struct Copying<'a> {
    inner: &'a Inner,
    segments: Vec<u64>,
    /// Nothing of these can be copied.
    damaged: Vec<u64>,
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        let mut ledger = self.inner.ledger.lock();
        for segment in &self.segments {
            ledger.end_compaction(*segment, !self.damaged.contains(segment));
        }
    }
}

/// Copies what is alive of some segments into a new one.
async fn compact(inner: &Inner, compaction: Compaction) -> Result<(), RequestError> {
    let segments = compaction.segments.clone();
    let mut copying = Copying { inner, segments, damaged: Vec::new() };
    let (wanted, bytes) = wanted(&compaction);
    if bytes == 0 {
        return Ok(());
    }
    let options = inner.client.options();
    let buf = Mutex::new(vec![0; bytes]);
    for group in groups(wanted, options.gap_bytes, options.get_bytes) {
        if let Err(error) = fetch(inner, &group, &buf).await {
            // Its readers will see that, and nothing is gained by another try.
            let is_its_fault = !error.is_of_store() && !error.is_refusal();
            copying.damaged.extend(is_its_fault.then_some(group.segment));
            return Err(error);
        }
    }
    let copied = Bytes::from(buf.into_inner());
    let segment = inner.ledger.lock().begin_segment();
    let put = inner.client.put(&inner.path(segment), &[copied], |_| ()).await;
    let mut ledger = inner.ledger.lock();
    match &put {
        Ok(()) => ledger.switch(segment, &copies(segment, &compaction), &compaction),
        Err(_) => ledger.abandon_segment(segment, true),
    }
    put
}

/// The chunks of a compaction one behind the other, and how many bytes they are.
fn wanted(compaction: &Compaction) -> (Vec<Wanted>, usize) {
    let mut to = 0;
    let mut wanted = Vec::with_capacity(compaction.chunks.len());
    for (chunk, &(_, placed)) in compaction.chunks.iter().enumerate() {
        wanted.push(Wanted { placed, call: 0, to, chunk });
        to += placed.len as usize;
    }
    (wanted, to)
}

/// Where the chunks of a compaction are in the new segment.
fn copies(segment: u64, compaction: &Compaction) -> Vec<(u64, Placed)> {
    let mut at = 0;
    let mut copies = Vec::with_capacity(compaction.chunks.len());
    for &(offset, placed) in &compaction.chunks {
        copies.push((offset, Placed { segment, at, ..placed }));
        at += u64::from(placed.len);
    }
    copies
}
