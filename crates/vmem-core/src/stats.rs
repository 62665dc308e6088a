//! The figures of a store.
//!
//! Invariant: the bytes of a tier come from its ledger, so they never exceed its capacity;
//! counters only grow and may lag. Filled in by `Shared`, read by users.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::latency::{Latencies, LatencySnapshot, ReadOp, ReadStage, SlowRead};
use crate::memory_tier::MemoryTier;
use crate::totals::{MigrationStats, Totals};

/// One tier, now. Bytes are footprints: rounding included.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Bytes in use.
    pub used_bytes: u64,
    /// The budget; for host, that of object space: `host_capacity` less staging.
    pub capacity_bytes: u64,
    /// The largest that `used_bytes` ever was.
    pub peak_bytes: u64,
    /// Objects with a copy, or with space taken, in this tier.
    pub objects: u64,
    /// Reads that this tier served.
    pub hits: u64,
    /// The largest object that would fit now without moving others, in bytes.
    pub largest_free_bytes: u64,
    /// Requests, and moves in the background, that got no space here.
    pub refusals: u64,
    /// Operations of the tier that failed, or read what was not written.
    pub faults: u64,
    /// Reads that the tier below served, since this one failed.
    pub fallbacks: u64,
}

/// The store, now. See each field for its unit.
#[non_exhaustive]
#[derive(Clone, Debug, Default)]
pub struct VirtualMemoryStats {
    /// Memory of the first device; all zero without a GPU. See
    /// [`VirtualMemory::tier_stats`](crate::VirtualMemory::tier_stats) for the others.
    pub vram: TierStats,
    /// Object space in host memory.
    pub host: TierStats,
    /// The data file.
    pub disk: TierStats,
    /// The tier below the disk; all zero without one.
    pub remote: TierStats,
    /// Objects in memory: those that have a handle, and named ones that were opened and have not
    /// left memory yet.
    pub objects: u64,
    /// Memory of objects and names beside their payload, in bytes: computed from their number, the
    /// sizes of their entries, and their chunks on disk; with what is counted of gathers, if these
    /// promote. Not counted: the order of eviction (about
    /// 32 bytes for each object in host memory or VRAM), what the allocator rounds up, some 128
    /// bytes for each object in host memory that was never written, and the catalog's cache. A
    /// name without a handle leaves memory once its object is durable and nowhere but in the tier
    /// that names lead to, mostly the disk; the last 1,024 such names stay.
    pub metadata_bytes: u64,
    /// Names whose objects are in memory.
    pub names_in_memory: u64,
    /// Host memory set apart for staging, in bytes.
    pub staging_bytes: u64,
    /// Memory that streams may hold now, in bytes. It is not part of `host_capacity`. It exceeds
    /// `stream_capacity` only by 64 KiB for each writer, and by 4 KiB for each reader and for each
    /// `Bytes` of its stream that is kept.
    pub stream_bytes: u64,
    /// Object space that the device reaches directly, in bytes. The driver copies the rest by a
    /// detour.
    pub registered_bytes: u64,
    /// Footprint that `Bytes` given to callers keep in host memory, in bytes.
    pub held_bytes: u64,
    /// Footprint that pins keep in host memory, in bytes; those in device memory are counted apart.
    pub pinned_bytes: u64,
    /// Payload in host memory without an equal copy below, in bytes.
    pub dirty_bytes: u64,
    /// Payload in device memory that kernels wrote and that no other tier has, in bytes.
    pub vram_dirty_bytes: u64,
    /// Requests that wait for space in a tier.
    pub waiters: u64,
    /// Migrations that have started and not ended.
    pub migrations_in_flight: u64,
    /// Reads that host memory did not serve.
    pub misses: u64,
    /// Reads that were no hits and ended with an error.
    pub reads_failed: u64,
    /// Reads that were no hits and whose callers dropped them.
    pub reads_cancelled: u64,
    /// Copies that left a tier to make space.
    pub evictions: u64,
    /// Copies that a promotion made.
    pub promotions: u64,
    /// Evictions that had nothing to write.
    pub clean_drops: u64,
    /// Footprint that was moved within host memory, or within a device, to make free space
    /// contiguous, in bytes.
    pub relocated_bytes: u64,
    /// Payload copied to device memory, in bytes.
    pub host_to_vram_bytes: u64,
    /// Payload copied from device memory, in bytes.
    pub vram_to_host_bytes: u64,
    /// Payload read from disk, in bytes.
    pub disk_to_host_bytes: u64,
    /// Payload written to disk, in bytes.
    pub host_to_disk_bytes: u64,
    /// Payload read from the tier below the disk, in bytes.
    pub remote_to_host_bytes: u64,
    /// Payload written to the tier below the disk, in bytes; what comes from the disk too.
    pub host_to_remote_bytes: u64,
    /// Changes of named objects that were made durable.
    pub named_changes: u64,
    /// Commits of these changes; each commits all changes that waited, after one sync of the data.
    pub commits: u64,
    /// Whether a sync failed: no change of a named object is made durable any more, and none was
    /// since, until the store is opened again.
    pub commits_stopped: bool,
    /// Operations of a backend that failed.
    pub errors: u64,
    /// Spans of reads, prefetches and migrations that
    /// [`spans_per_second`](crate::VirtualMemoryConfigBuilder::spans_per_second) did not allow,
    /// without what would have been below them.
    pub spans_left_out: u64,
    /// Of the store that these figures are of.
    pub(crate) latencies: Option<Arc<Latencies>>,
    pub(crate) totals: Option<Arc<Totals>>,
}

impl VirtualMemoryStats {
    /// The share of reads that host memory served, between 0 and 1; 0 before the first read.
    pub fn hit_ratio(&self) -> f64 {
        let reads = self.host.hits + self.misses;
        if reads == 0 { 0.0 } else { self.host.hits as f64 / reads as f64 }
    }

    /// How long the reads of this kind took that this tier served, up to now. Hits are not
    /// measured: those that host memory served, but not at once, are under
    /// [`MemoryTier::Host`]. Reads that failed or were dropped are not among them.
    ///
    /// ```
    /// use vmem::{MemoryTier, ReadOp};
    /// # use vmem::VirtualMemoryConfig;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Disk).await?;
    /// vmem.read(&handle).await?;
    /// let from_disk = vmem.stats().latency(ReadOp::Whole, MemoryTier::Disk);
    /// assert_eq!(from_disk.count(), 1);
    /// println!("half of them took at most {:?}", from_disk.quantile(0.5));
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn latency(&self, op: ReadOp, tier: MemoryTier) -> LatencySnapshot {
        self.latencies.as_ref().map_or_else(LatencySnapshot::default, |all| all.snapshot(op, tier))
    }

    /// How long the reads that were no hits were in this stage, each that was in it, up to now.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Disk).await?;
    /// vmem.read(&handle).await?;
    /// assert_eq!(vmem.stats().waits(vmem::ReadStage::Io).count(), 1);
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn waits(&self, stage: ReadStage) -> LatencySnapshot {
        self.latencies.as_ref().map_or_else(LatencySnapshot::default, |all| all.times_in(stage))
    }

    /// What migrations have moved up to now, by link and cause; in no order. A link and a cause are
    /// there once a migration had both.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Disk).await?;
    /// vmem.promote(&handle, MemoryTier::Host).await?;
    /// let [moved] = &vmem.stats().migrations()[..] else { panic!("one migration") };
    /// assert_eq!((moved.from, moved.to, moved.bytes), (MemoryTier::Disk, MemoryTier::Host, 3));
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn migrations(&self) -> Vec<MigrationStats> {
        self.totals.as_ref().map_or_else(Vec::new, |totals| totals.list())
    }

    /// The slowest reads of the last five minutes, 32 at most, the slowest first: what each waited
    /// for, and how it ended. Hits are never among them.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Disk).await?;
    /// vmem.read(&handle).await?;
    /// for slow in vmem.stats().slow_reads() {
    ///     // object 1, 3 bytes from disk (whole), served: 210.0us, io 180.0us, runtime 30.0us
    ///     println!("{slow}: mostly {}", slow.cause());
    /// }
    /// # assert_eq!(vmem.stats().slow_reads()[0].handle, handle.id());
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn slow_reads(&self) -> Vec<SlowRead> {
        self.latencies.as_ref().map_or_else(Vec::new, |all| all.slow_reads())
    }

    /// The number of reads that are under way and in this stage, at this moment.
    ///
    /// ```
    /// # use vmem::VirtualMemoryConfig;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// for stage in vmem::ReadStage::ALL {
    ///     println!("{stage}: {}", vmem.stats().reads_in(stage));
    /// }
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn reads_in(&self, stage: ReadStage) -> u64 {
        self.latencies.as_ref().map_or(0, |all| all.in_stage(stage))
    }
}

/// The counters that are not part of a ledger.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Memory of the disk maps of objects, in bytes.
    pub(crate) map_bytes: AtomicU64,
    pub(crate) host_to_vram_bytes: AtomicU64,
    pub(crate) vram_to_host_bytes: AtomicU64,
    pub(crate) dirty_bytes: AtomicU64,
    pub(crate) vram_dirty_bytes: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) evictions: AtomicU64,
    pub(crate) promotions: AtomicU64,
    pub(crate) clean_drops: AtomicU64,
    pub(crate) relocated_bytes: AtomicU64,
    pub(crate) errors: AtomicU64,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Takes from a gauge what was added before.
pub(crate) fn sub(counter: &AtomicU64, n: u64) {
    let before = counter.fetch_sub(n, Ordering::Relaxed);
    assert!(before >= n, "a gauge never falls below zero: {before} - {n}");
}

/// Changes the part of one object in a gauge.
pub(crate) fn shift(gauge: &AtomicU64, before: u64, after: u64) {
    match after.checked_sub(before) {
        Some(0) => {}
        Some(more) => add(gauge, more),
        None => sub(gauge, before - after),
    }
}

/// Reads a counter.
pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
