//! How many spans a store makes.
//!
//! A subscriber that formats or exports a span takes microseconds for it, about as much as a small
//! read does. So beyond a rate spans are left out and counted, and what it costs to be traced does
//! not grow with the load. What moves for a read or a prefetch has a span if that has one, and
//! counts too: those that follow wait for longer. Of one that moves very many objects the first
//! have spans.
//!
//! Invariant: only spans that a subscriber wants count. In the long run there are no more than the
//! rate says. At once there are no more that begin a trace than it says for a second, and no more
//! in all than for two. Each of the former has the number of those that were left out since the one
//! before. Called by the reads that are not hits, and by migrations and prefetches that run for
//! none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{Level, Span};

/// What was not used of the rate is kept for this long.
const KEPT_NS: u64 = Duration::from_secs(1).as_nanos() as u64;
/// How long what follows may wait for those that are parts.
const OWED_NS: u64 = KEPT_NS;

/// The spans of one kind.
#[derive(Debug)]
pub(crate) struct SpanRate {
    origin: Instant,
    /// How far apart spans are where there are too many, in nanoseconds; 0: there never are.
    apart_ns: u64,
    /// Whether a subscriber wants them.
    is_wanted: fn() -> bool,
    /// When all spans so far were due, `apart_ns` apart, in nanoseconds since `origin`.
    due_ns: AtomicU64,
    /// Since the last one.
    left_out: AtomicU64,
    left_out_total: AtomicU64,
}

impl SpanRate {
    /// Those of reads.
    pub(crate) fn of_reads(per_second: u32) -> Self {
        let is_wanted = || tracing::span_enabled!(target: "vmem::read", Level::DEBUG);
        SpanRate::new(per_second, is_wanted)
    }

    /// Those of migrations and prefetches.
    pub(crate) fn of_migrations(per_second: u32) -> Self {
        let is_wanted = || tracing::span_enabled!(target: "vmem::migration", Level::DEBUG);
        SpanRate::new(per_second, is_wanted)
    }

    /// This many a second; `u32::MAX` is no bound.
    fn new(per_second: u32, is_wanted: fn() -> bool) -> Self {
        let apart_ns = match per_second {
            u32::MAX => 0,
            0 => u64::MAX,
            rate => KEPT_NS / u64::from(rate),
        };
        let zero = || AtomicU64::new(0);
        SpanRate {
            origin: Instant::now(),
            apart_ns,
            is_wanted,
            due_ns: zero(),
            left_out: zero(),
            left_out_total: zero(),
        }
    }

    /// A span, which `make` makes with the number of those that were left out before it, if there
    /// are any. None if it is left out itself.
    pub(crate) fn span(&self, make: impl FnOnce(Option<u64>) -> Span) -> Option<Span> {
        if self.is_late(KEPT_NS) {
            if (self.is_wanted)() {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                self.left_out_total.fetch_add(1, Ordering::Relaxed);
            }
            return None;
        }
        let left_out = match self.left_out.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.left_out.swap(0, Ordering::Relaxed),
        };
        let span = self.counted(make(Some(left_out).filter(|&left_out| left_out > 0)));
        if span.is_disabled() {
            self.left_out.fetch_add(left_out, Ordering::Relaxed);
        }
        Some(span)
    }

    /// A span that is part of one that was not left out. None if there are too many parts.
    pub(crate) fn part(&self, make: impl FnOnce() -> Span) -> Option<Span> {
        if self.is_late(KEPT_NS + OWED_NS) {
            if (self.is_wanted)() {
                self.left_out_total.fetch_add(1, Ordering::Relaxed);
            }
            return None;
        }
        Some(self.counted(make()))
    }

    /// Those that were left out since the store was opened, without what would have been part of
    /// one of them.
    pub(crate) fn left_out_total(&self) -> u64 {
        self.left_out_total.load(Ordering::Relaxed)
    }

    /// Whether another span would be due more than this after now.
    fn is_late(&self, by_ns: u64) -> bool {
        let due = self.due_ns.load(Ordering::Relaxed);
        // Without a subscriber no span ever was due, and no clock is read.
        let now = if due == 0 { 0 } else { self.now_ns() };
        due.saturating_add(self.apart_ns) > now.saturating_add(by_ns)
    }

    fn counted(&self, span: Span) -> Span {
        if self.apart_ns > 0 && !span.is_disabled() {
            let now = self.now_ns();
            let next = |due: u64| Some(due.max(now).saturating_add(self.apart_ns));
            // Several threads at once may exceed the rate by as many spans.
            let _always = self.due_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        }
        span
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
