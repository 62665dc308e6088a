//! What a tier tells operators: pressure, refusals, faults and fallbacks, as events, as counts, and
//! as a short list of the last ones.
//!
//! Invariant: each is counted. A storm leaves one event a second for each kind, tier and store, and
//! one place in the list, with the number of those before it that were left out; the list has at
//! most `KEPT_MAX` of each kind. Nothing here is called by a hit. Called by the queues, by what
//! refuses requests, by the transfers, and by the records of migrations.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::Level;

use crate::error::VirtualMemoryError;
use crate::events::MigrationEvent;
use crate::locks::{self, Lock};
use crate::memory_tier::MemoryTier;
use crate::stats::TierStats;

/// Incidents of each kind that a tier remembers.
const KEPT_MAX: usize = 8;
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

/// What went wrong. See [`Incident`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IncidentKind {
    /// A request, or a move in the background, got no space in the tier.
    Refusal,
    /// An operation of the tier failed, or read what was not written.
    Fault,
    /// The tier could not read something, and the one below served instead.
    Fallback,
    /// An object that was on its way to the tier stayed where it was.
    Migration,
}

impl IncidentKind {
    const ALL: [IncidentKind; 4] = [
        IncidentKind::Refusal,
        IncidentKind::Fault,
        IncidentKind::Fallback,
        IncidentKind::Migration,
    ];

    /// The word for it, as it is displayed.
    pub fn as_str(self) -> &'static str {
        match self {
            IncidentKind::Refusal => "refusal",
            IncidentKind::Fault => "fault",
            IncidentKind::Fallback => "fallback",
            IncidentKind::Migration => "migration",
        }
    }
}

impl fmt::Display for IncidentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that went wrong in a tier, and that is worth an operator's look. See
/// [`VirtualMemory::incidents`](crate::VirtualMemory::incidents).
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Incident {
    /// The tier.
    pub tier: MemoryTier,
    /// What it was.
    pub kind: IncidentKind,
    /// The object, where it concerns one that is known.
    pub handle: Option<u64>,
    /// The error, in words.
    pub error: String,
    /// Others of this kind and tier, just before it, that are not in the list.
    pub left_out: u64,
    /// When it was.
    pub at: SystemTime,
}

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Incident { tier, kind, error, .. } = self;
        write!(f, "{kind} in {tier}: ")?;
        if let Some(handle) = self.handle {
            write!(f, "object {handle}, ")?;
        }
        f.write_str(error)
    }
}

/// The incidents of one kind.
#[derive(Debug)]
struct OfKind {
    count: AtomicU64,
    throttle: Throttle,
}

/// The notices of one tier.
#[derive(Debug)]
pub(crate) struct Notices {
    tier: MemoryTier,
    pressure: Throttle,
    kinds: [OfKind; IncidentKind::ALL.len()],
    last: Lock<Vec<Incident>, { locks::SLOW }>,
}

impl Notices {
    pub(crate) fn new(tier: MemoryTier) -> Self {
        let of_kind = |_| OfKind { count: AtomicU64::new(0), throttle: Throttle::new() };
        Notices {
            tier,
            pressure: Throttle::new(),
            kinds: IncidentKind::ALL.map(of_kind),
            last: Lock::new(Vec::new()),
        }
    }

    /// Counts an incident. How many others were left out before it; none if it is to be left out
    /// itself.
    fn note(&self, kind: IncidentKind, handle: Option<u64>, error: &dyn Error) -> Option<u64> {
        let of_kind = &self.kinds[kind as usize];
        of_kind.count.fetch_add(1, Ordering::Relaxed);
        let left_out = of_kind.throttle.pass()?;
        let at = SystemTime::now();
        let error = error.to_string();
        let incident = Incident { tier: self.tier, kind, handle, error, left_out, at };
        let mut last = self.last.lock();
        let is_of_kind = |incident: &Incident| incident.kind == kind;
        if last.iter().filter(|incident| is_of_kind(incident)).count() == KEPT_MAX {
            // So a storm of one kind takes the place of no other.
            let oldest = last.iter().position(is_of_kind);
            oldest.map(|oldest| last.remove(oldest));
        }
        last.push(incident);
        Some(left_out)
    }

    /// The last incidents, the newest last.
    pub(crate) fn incidents(&self) -> Vec<Incident> {
        self.last.lock().clone()
    }

    /// How many there were, as figures of the tier.
    pub(crate) fn counted(&self, stats: TierStats) -> TierStats {
        let count = |kind| self.kinds[kind as usize].count.load(Ordering::Relaxed);
        TierStats {
            refusals: count(IncidentKind::Refusal),
            faults: count(IncidentKind::Fault),
            fallbacks: count(IncidentKind::Fallback),
            ..stats
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
        if !is_refusal {
            return;
        }
        let Some(left_out) = self.note(IncidentKind::Refusal, None, error) else { return };
        let tier = self.tier;
        tracing::warn!(
            target: "vmem::refusal", %tier, %error, left_out, "a request gets no space"
        );
    }

    /// An operation of the tier failed: its machine, or the bytes that it keeps, are at fault.
    pub(crate) fn fault(&self, error: &dyn Error) {
        let Some(left_out) = self.note(IncidentKind::Fault, None, error) else { return };
        let tier = self.tier;
        tracing::warn!(target: "vmem::fault", %tier, ?error, left_out, "an operation failed");
    }

    /// Another tier serves what this one could not read.
    pub(crate) fn fallback(&self, error: &dyn Error) {
        let Some(left_out) = self.note(IncidentKind::Fallback, None, error) else { return };
        let tier = self.tier;
        tracing::warn!(
            target: "vmem::fallback", %tier, ?error, left_out, "the tier below serves instead"
        );
    }

    /// A migration to this tier failed; its own event says so in the traces.
    pub(crate) fn failed_migration(&self, event: &MigrationEvent) {
        if let Some(error) = &event.error {
            self.note(IncidentKind::Migration, Some(event.handle), error);
        }
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
