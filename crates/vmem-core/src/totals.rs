//! What migrations have moved since the store was opened, by link and cause.
//!
//! Invariant: each migration that ended is counted once, under the tiers and the cause of its
//! event. Totals only grow. Counted by the record of a migration; read by `stats` and by the
//! metrics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::events::{MigrationCause, MigrationEvent};
use crate::latency::{LatencySnapshot, Times};
use crate::memory_tier::MemoryTier;

/// What the migrations by one link and for one cause have moved, up to now. See
/// [`VirtualMemoryStats::migrations`](crate::VirtualMemoryStats::migrations).
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct MigrationStats {
    /// The tier that the bytes came from.
    pub from: MemoryTier,
    /// The tier that they went to.
    pub to: MemoryTier,
    /// Why.
    pub cause: MigrationCause,
    /// Those that ended well.
    pub migrations: u64,
    /// Those that failed.
    pub failed: u64,
    /// Payload that was moved, in bytes.
    pub bytes: u64,
    /// How long those took that ended well, from the first byte to publication.
    pub took: LatencySnapshot,
}

type Route = (MemoryTier, MemoryTier, MigrationCause);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Totals(RwLock<HashMap<Route, Total>>);

#[derive(Debug, Default)]
struct Total {
    migrations: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    took: Times,
}

impl Total {
    fn add(&self, event: &MigrationEvent) {
        if event.error.is_some() {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.migrations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(event.bytes, Ordering::Relaxed);
        self.took.record(event.copied);
    }
}

impl Totals {
    pub(crate) fn add(&self, event: &MigrationEvent) {
        let route = (event.from, event.to, event.cause);
        if let Some(total) = self.0.read().get(&route) {
            return total.add(event);
        }
        self.0.write().entry(route).or_default().add(event);
    }

    pub(crate) fn list(&self) -> Vec<MigrationStats> {
        let totals = self.0.read();
        let one = |(&(from, to, cause), total): (&Route, &Total)| MigrationStats {
            from,
            to,
            cause,
            migrations: total.migrations.load(Ordering::Relaxed),
            failed: total.failed.load(Ordering::Relaxed),
            bytes: total.bytes.load(Ordering::Relaxed),
            took: total.took.snapshot(),
        };
        totals.iter().map(one).collect()
    }
}
