//! A tier below host memory, which stores chunks: the disk, and what lies below it.
//!
//! Invariant: these tiers form a chain, numbered from 0; each extent knows in which of them it is.
//! An object leaves one of them for the next, and the last one is left by nothing. Asked by the
//! migrations and the writes; what leaves is served by the actor.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::chunk::{CHUNK_BYTES, chunk_count, chunk_lens};
use crate::memory_tier::MemoryTier;
use crate::parcel::Unclaimed;
use crate::policy::Policy;
use crate::stats::{TierStats, get};
use crate::storage::{Extent, Tier, TierError};
use crate::wake::Wake;

use super::{Holds, Link, NoSpace, Queue, Space, TierState, Watermarks};

/// One tier below host memory.
pub(crate) struct Storage {
    pub(crate) backend: Arc<dyn Tier>,
    /// The way to host memory.
    pub(crate) link: Link,
    pub(crate) state: TierState<StorageSpace>,
    /// Reads that it served.
    pub(crate) hits: AtomicU64,
    /// Payload, in bytes.
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
}

impl Storage {
    /// The tier at this place in the chain; if `is_last`, nothing leaves it. Objects leave it early
    /// between these watermarks, which are fractions of its capacity.
    pub(crate) fn new(
        (level, is_last): (usize, bool),
        backend: Arc<dyn Tier>,
        order: Box<dyn Policy>,
        max_held: f64,
        (low, high): (f64, f64),
        wake: &Arc<Wake>,
        unclaimed: &Arc<Unclaimed>,
    ) -> Self {
        let capacity = backend.usage().capacity_bytes as f64;
        let marks =
            Watermarks { low_bytes: (capacity * low) as u64, high_bytes: (capacity * high) as u64 };
        let freed = (!is_last).then(|| wake.clone());
        let space = StorageSpace { backend: backend.clone(), level, freed };
        let tier = MemoryTier::of_level(level);
        let holds = Holds::of(backend.usage().capacity_bytes, max_held);
        let queue = Queue::new(tier, space, marks.high_bytes, wake.clone(), unclaimed.clone());
        Storage {
            backend,
            link: Link::default(),
            state: TierState::new(tier, queue, order, holds, marks),
            hits: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
        }
    }

    pub(crate) fn tier(&self) -> MemoryTier {
        self.state.tier
    }

    /// Its figures, now.
    pub(crate) fn stats(&self) -> TierStats {
        let usage = self.backend.usage();
        assert!(usage.used_bytes <= usage.capacity_bytes, "{usage:?}");
        self.state.notices().counted(TierStats {
            used_bytes: usage.used_bytes,
            capacity_bytes: usage.capacity_bytes,
            peak_bytes: usage.peak_bytes,
            objects: get(&self.state.objects),
            hits: get(&self.hits),
            largest_free_bytes: usage.largest_free_bytes,
            ..TierStats::default()
        })
    }
}

/// The space of such a tier, granted for whole objects.
pub(crate) struct StorageSpace {
    backend: Arc<dyn Tier>,
    level: usize,
    /// Woken when an extent was released, where requests may wait for that.
    freed: Option<Arc<Wake>>,
}

impl StorageSpace {
    /// Extents for chunks of these lengths, at once or not at all.
    ///
    /// # Errors
    ///
    /// What the backend says.
    pub(crate) fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        let mut extents = self.backend.reserve(lens)?;
        assert!(extents.len() == lens.len(), "a backend takes space for each chunk, or for none");
        extents.iter_mut().for_each(|extent| extent.set_level(self.level));
        if let (Some(wake), Some(extent)) = (&self.freed, extents.first()) {
            extent.on_release(|| {
                let wake = wake.clone();
                Box::new(move || wake.if_waiting())
            });
        }
        Ok(extents)
    }
}

impl TierState<StorageSpace> {
    /// Whether extents for chunks of these lengths may be taken before those for which requests
    /// wait.
    pub(crate) fn lets_pass(&self, lens: &[u32]) -> bool {
        let footprint = lens.iter().map(|&len| self.space().backend.footprint(len)).sum();
        self.queue.lets_pass(footprint)
    }
}

impl Space for StorageSpace {
    type Slot = Vec<Extent>;

    fn footprint(&self, len: usize) -> u64 {
        let whole = (len / CHUNK_BYTES) as u64 * self.backend.footprint(CHUNK_BYTES as u32);
        match len % CHUNK_BYTES {
            0 => whole,
            rest => whole + self.backend.footprint(rest as u32),
        }
    }

    fn used_bytes(&self) -> u64 {
        self.backend.usage().used_bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.backend.usage().capacity_bytes
    }

    /// Unknown: versions that have passed are not told from current ones.
    fn held_bytes(&self) -> u64 {
        0
    }

    fn try_take(&self, len: usize, _owner: u64) -> Result<Vec<Extent>, NoSpace> {
        let lens = chunk_lens(len, 0..chunk_count(len));
        // A chunk goes into pieces where the free space is in pieces, so that is never in the way.
        self.reserve(&lens).map_err(|_| NoSpace::scattered(false))
    }

    fn put_back(&self, slot: Vec<Extent>) {
        drop(slot);
    }
}

impl std::fmt::Debug for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Storage").field("backend", &self.backend).finish_non_exhaustive()
    }
}
