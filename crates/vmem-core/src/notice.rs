//! What a tier tells operators: pressure, refusals, faults and fallbacks, as events.
//!
//! Invariant: a storm leaves one event a second for each kind, tier and store, with the number of
//! those before it that were left out. Nothing here is called by a hit, and without a subscriber no
//! clock is read. Called by the queues, by what refuses requests, and by the transfers.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tracing::Level;

use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;

/// How far apart events of one kind are.
const EVERY: Duration = Duration::from_secs(1);

/// Lets one event a second pass.
#[derive(Debug)]
struct Throttle {
    origin: Instant,
    /// When the next one passes, in nanoseconds since `origin`.
    next_ns: AtomicU64,
    left_out: AtomicU64,
}

impl Throttle {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Throttle { origin: Instant::now(), next_ns: zero(), left_out: zero() }
    }

    /// How many were left out before this event; none if it is to be left out itself.
    fn pass(&self) -> Option<u64> {
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let next = self.next_ns.load(Ordering::Relaxed);
        let after = now.saturating_add(EVERY.as_nanos() as u64);
        let passes = now >= next
            && self
                .next_ns
                .compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !passes {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Ordering::Relaxed))
    }
}

/// The events of one tier.
#[derive(Debug)]
pub(crate) struct Notices {
    tier: MemoryTier,
    pressure: Throttle,
    refusals: Throttle,
    faults: Throttle,
    fallbacks: Throttle,
}

impl Notices {
    pub(crate) fn new(tier: MemoryTier) -> Self {
        let throttle = Throttle::new;
        Notices {
            tier,
            pressure: throttle(),
            refusals: throttle(),
            faults: throttle(),
            fallbacks: throttle(),
        }
    }

    /// A request has to wait for this many bytes. A tier that is full by intent does this all day.
    /// `figures` are the bytes that it asks for, those in use, and the requests that wait.
    pub(crate) fn pressure(&self, figures: impl FnOnce() -> (u64, u64, usize)) {
        if !tracing::enabled!(target: "vmem::pressure", Level::DEBUG) {
            return;
        }
        let Some(left_out) = self.pressure.pass() else { return };
        let (requested_bytes, used_bytes, waiters) = figures();
        let tier = self.tier;
        tracing::debug!(
            target: "vmem::pressure",
            %tier, requested_bytes, used_bytes, waiters, left_out,
            "a request waits for space"
        );
    }

    /// A caller gets this error for want of space. Other errors are no refusals.
    pub(crate) fn refusal(&self, error: &VirtualMemoryError) {
        let is_refusal = matches!(
            error,
            VirtualMemoryError::TierFull { .. }
                | VirtualMemoryError::AllPinned { .. }
                | VirtualMemoryError::TimedOut { .. }
        );
        if !is_refusal || !tracing::enabled!(target: "vmem::refusal", Level::WARN) {
            return;
        }
        let Some(left_out) = self.refusals.pass() else { return };
        let tier = self.tier;
        tracing::warn!(
            target: "vmem::refusal", %tier, %error, left_out, "a request gets no space"
        );
    }

    /// An operation of the tier failed: its machine, or the bytes that it keeps, are at fault.
    pub(crate) fn fault(&self, error: &dyn Debug) {
        if !tracing::enabled!(target: "vmem::fault", Level::WARN) {
            return;
        }
        let Some(left_out) = self.faults.pass() else { return };
        let tier = self.tier;
        tracing::warn!(target: "vmem::fault", %tier, ?error, left_out, "an operation failed");
    }

    /// Another tier serves what this one could not read.
    pub(crate) fn fallback(&self, error: &dyn Debug) {
        if !tracing::enabled!(target: "vmem::fallback", Level::WARN) {
            return;
        }
        let Some(left_out) = self.fallbacks.pass() else { return };
        let tier = self.tier;
        tracing::warn!(
            target: "vmem::fallback", %tier, ?error, left_out, "the tier below serves instead"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn storm_passes_once_a_second_and_is_counted() {
        let throttle = Throttle::new();
        assert_eq!(throttle.pass(), Some(0), "the first one passes at once");
        for _ in 0..1000 {
            assert_eq!(throttle.pass(), None);
        }
        tokio::time::advance(EVERY).await;
        assert_eq!(throttle.pass(), Some(1000));
        assert_eq!(throttle.pass(), None);
        tokio::time::advance(EVERY).await;
        assert_eq!(throttle.pass(), Some(1));
    }
}
