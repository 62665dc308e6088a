//! The pool of host-copy descriptors, and the anchors that keep it alive.
//!
//! Invariant: a descriptor's memory is given back only when the pool is dropped, and the pool is
//! dropped only when neither the runtime nor any reader holds it. Called by `copy/mod.rs`, and by
//! the statistics.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

use crate::locks::{self, Lock};

use super::HostCopy;
use crate::wake::Wake;

/// Descriptors are made this many at a time.
const CHUNK: usize = 128;
/// Reader counters are spread over this many anchors.
const ANCHORS: usize = 16;

/// All descriptors of one store.
pub(crate) struct CopyPool {
    free: Lock<Free, { locks::COPIES }>,
    wake: Arc<Wake>,
}

struct Free {
    list: Vec<NonNull<HostCopy>>,
    /// The memory into which `list` and every copy in use point. Each was a `Box`, and is kept as a
    /// pointer: a `Box` that is moved claims to be the only way to its memory.
    chunks: Vec<NonNull<[HostCopy]>>,
}

impl Drop for Free {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            // SAFETY: made by `Box::leak`, and no pointer into it is left: the pool is dropped
            // last.
            drop(unsafe { Box::from_raw(chunk.as_ptr()) });
        }
    }
}

// SAFETY: the pointers lead into `chunks`, and descriptors are `Send + Sync`.
unsafe impl Send for Free {}

impl CopyPool {
    /// An unused descriptor, the caller's alone.
    pub(super) fn take(&self) -> NonNull<HostCopy> {
        let mut free = self.free.lock();
        if let Some(copy) = free.list.pop() {
            return copy;
        }
        let chunk: Box<[HostCopy]> = (0..CHUNK).map(|_| HostCopy::unused()).collect();
        let chunk: &'static mut [HostCopy] = Box::leak(chunk);
        let whole = NonNull::from(chunk);
        for at in 0..CHUNK {
            let first = whole.cast::<HostCopy>();
            // SAFETY: `at` is within the chunk.
            free.list.push(unsafe { first.add(at) });
        }
        free.chunks.push(whole);
        free.list.pop().expect("invariant: a chunk is not empty")
    }

    /// Takes a descriptor back that the caller owned and emptied.
    pub(super) fn put(&self, copy: NonNull<HostCopy>) {
        let mut free = self.free.lock();
        let made = free.chunks.len() * CHUNK;
        assert!(free.list.len() < made, "a descriptor is given back once: {made} were made");
        free.list.push(copy);
    }
}

impl fmt::Debug for CopyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.free.lock();
        f.debug_struct("CopyPool")
            .field("made", &(free.chunks.len() * CHUNK))
            .field("unused", &free.list.len())
            .finish()
    }
}

/// What a reader holds of the runtime. There are several, one for each of a few threads, so that
/// readers of distinct objects share no cache line that they write.
#[derive(Debug)]
pub(crate) struct Anchor {
    pool: Arc<CopyPool>,
    /// Footprint of the copies that got their first reader here, less that of those that lost
    /// their last reader here. It may be negative; the sum over all anchors is what readers hold.
    held_bytes: AtomicI64,
    hits: AtomicU64,
    /// Keeps two anchors off one pair of cache lines.
    _apart: [u64; 12],
}

impl Anchor {
    pub(super) fn pool(&self) -> Arc<CopyPool> {
        self.pool.clone()
    }

    pub(super) fn add_held(&self, footprint: u64) {
        self.held_bytes.fetch_add(footprint as i64, Ordering::Relaxed);
    }

    pub(super) fn count_hit(&self) {
        self.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// The last reader of a copy let go.
    pub(super) fn released(&self, footprint: u64) {
        // Before the look for a waiter, so that none is missed.
        self.held_bytes.fetch_sub(footprint as i64, Ordering::SeqCst);
        self.pool.wake.if_waiting();
    }
}

/// The runtime's end of the pool. Clones are of the same pool.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    pool: Arc<CopyPool>,
    anchors: [Arc<Anchor>; ANCHORS],
}

impl Copies {
    /// An empty pool; `wake` is called when the last reader of a copy releases it.
    pub(crate) fn new(wake: Arc<Wake>) -> Self {
        let free = Lock::new(Free { list: Vec::new(), chunks: Vec::new() });
        let pool = Arc::new(CopyPool { free, wake });
        let anchor = || {
            Arc::new(Anchor {
                pool: pool.clone(),
                held_bytes: AtomicI64::new(0),
                hits: AtomicU64::new(0),
                _apart: [0; 12],
            })
        };
        let anchors = std::array::from_fn(|_| anchor());
        Copies { pool, anchors }
    }

    pub(crate) fn pool(&self) -> &Arc<CopyPool> {
        &self.pool
    }

    /// The anchor of this thread.
    pub(super) fn anchor(&self) -> &Arc<Anchor> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            /// The number of this thread plus one; 0 before it has a number. There is no
            /// destructor, so that the destructors of other thread-locals can still read.
            static MINE: Cell<usize> = const { Cell::new(0) };
        }
        let mine = MINE.with(|mine| {
            if mine.get() == 0 {
                mine.set(NEXT.fetch_add(1, Ordering::Relaxed) + 1);
            }
            mine.get() - 1
        });
        &self.anchors[mine % ANCHORS]
    }

    /// Reads that host memory served, so far.
    pub(crate) fn hits(&self) -> u64 {
        self.anchors.iter().map(|anchor| anchor.hits.load(Ordering::Relaxed)).sum()
    }

    /// Footprint of the copies that readers hold, in bytes. Not exact while readers come and go.
    pub(crate) fn held_bytes(&self) -> u64 {
        let sum: i64 =
            self.anchors.iter().map(|anchor| anchor.held_bytes.load(Ordering::SeqCst)).sum();
        sum.max(0) as u64
    }
}
