//! Histograms of times: one for each kind of read and tier, and whatever else is timed.
//!
//! They are `histogram::AtomicHistogram`: buckets of equal width within each power of two, each an
//! atomic counter, so that a reader records by one addition. `hdrhistogram` has the same buckets
//! and needs a lock, or a recorder for each thread and a phase in which all of them are merged.
//!
//! Invariant: a bucket is at most 1/32 of its lower end wide, so no quantile is off by more. A
//! histogram takes 9.5 KiB and exists from its first value on. Called by `Latencies` and by the
//! totals of migrations.

use std::time::Duration;

use histogram::{AtomicHistogram, Histogram};
use once_cell::race::OnceBox;

use super::ReadOp;
use crate::memory_tier::MemoryTier;

/// 32 buckets for each power of two.
const GROUPING_POWER: u8 = 5;
/// Nanoseconds: up to 73 minutes. What takes longer counts as that.
const MAX_POWER: u8 = 42;

/// One for each tier; memory of devices is numbered from the last on.
const OTHERS: usize = 3;
/// All devices that a store may have.
const TIERS: usize = OTHERS + 256;

/// The distribution of one kind of time.
#[derive(Debug)]
pub(crate) struct Times(OnceBox<AtomicHistogram>);

impl Default for Times {
    fn default() -> Self {
        Times(OnceBox::new())
    }
}

impl Times {
    pub(crate) fn record(&self, took: Duration) {
        let new = || {
            let histogram = AtomicHistogram::new(GROUPING_POWER, MAX_POWER);
            Box::new(histogram.expect("invariant: the powers are in order"))
        };
        let most = (1 << MAX_POWER) - 1;
        let nanos = u64::try_from(took.as_nanos()).map_or(most, |nanos| nanos.min(most));
        let recorded = self.0.get_or_init(new).increment(nanos);
        recorded.expect("invariant: no more than the most");
    }

    pub(crate) fn snapshot(&self) -> LatencySnapshot {
        LatencySnapshot(self.0.get().map(AtomicHistogram::load))
    }
}

/// The times of reads, by kind and tier.
#[derive(Debug)]
pub(super) struct Histograms(Box<[Times]>);

impl Default for Histograms {
    fn default() -> Self {
        let places = ReadOp::ALL.len() * TIERS;
        Histograms((0..places).map(|_| Times::default()).collect())
    }
}

impl Histograms {
    pub(super) fn of(&self, op: ReadOp, tier: MemoryTier) -> &Times {
        let tier = match tier {
            MemoryTier::Host => 0,
            MemoryTier::Disk => 1,
            MemoryTier::Remote => 2,
            MemoryTier::Vram => OTHERS,
            MemoryTier::OtherVram(device) => OTHERS + usize::from(device.get()),
        };
        &self.0[op as usize * TIERS + tier]
    }
}

/// How long reads took, or what else was timed, as a histogram at one moment. See
/// [`VirtualMemoryStats::latency`](crate::VirtualMemoryStats::latency).
#[derive(Clone, Debug, Default)]
pub struct LatencySnapshot(Option<Histogram>);

impl LatencySnapshot {
    /// How many were timed.
    pub fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, |histogram| histogram.as_slice().iter().sum())
    }

    /// What this fraction of them, from 0 to 1, took at most; too long by 1/32 at most. `None`
    /// without any, and for a fraction beyond these.
    pub fn quantile(&self, fraction: f64) -> Option<Duration> {
        let bucket = self.0.as_ref()?.quantile_bucket(fraction).ok()??;
        Some(Duration::from_nanos(bucket.end()))
    }

    /// These and those of another snapshot together.
    pub fn merged(&self, other: &LatencySnapshot) -> LatencySnapshot {
        LatencySnapshot(match (&self.0, &other.0) {
            (Some(one), Some(other)) => one.wrapping_add(other).ok(),
            (one, other) => one.as_ref().or(other.as_ref()).cloned(),
        })
    }

    /// Those since an earlier snapshot of the same histogram.
    pub fn since(&self, earlier: &LatencySnapshot) -> LatencySnapshot {
        LatencySnapshot(match (&self.0, &earlier.0) {
            (Some(now), Some(earlier)) => now.checked_sub(earlier).ok(),
            (now, _) => now.clone(),
        })
    }

    /// Each time that was taken, to 1/64, and how often.
    #[cfg(feature = "metrics")]
    pub(crate) fn times(&self) -> impl Iterator<Item = (Duration, u64)> {
        let buckets = self.0.iter().flatten().filter(|bucket| bucket.count() > 0);
        buckets.map(|bucket| {
            let middle = bucket.start() + (bucket.end() - bucket.start()) / 2;
            (Duration::from_nanos(middle), bucket.count())
        })
    }
}
