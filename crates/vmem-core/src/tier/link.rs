//! The link between disk and host: how much is in flight on it, and which reads go first.
//!
//! Invariant: demand reads are bounded in number and served in order. Background reads go a few at
//! a time while no demand read waits or has just waited; else one at a time, when the link is
//! quiet, except for one piece in a while, so that they end at all. Used by `load.rs`.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Reads that are in flight at once.
const READS_MAX: usize = 64;
/// Background reads that are in flight at once while there are no demand reads.
const BACKGROUND_MAX: usize = 32;
/// A prefetch waits at least this long after the last read of demand.
const QUIET_MIN: Duration = Duration::from_micros(200);
/// A prefetch that found no quiet moment for this long takes a turn anyway.
const QUIET_WAIT_MAX: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Link {
    reads: Semaphore,
    /// Reads of demand that wait or are in flight.
    demand: AtomicUsize,
    /// When the last one ended, and how long such a read takes, in nanoseconds since `origin`.
    last_ns: AtomicU64,
    service_ns: AtomicU64,
    origin: Instant,
    /// Background reads that may be in flight.
    background: Semaphore,
    /// The turn of the one that waits for a quiet moment.
    quiet: Mutex<()>,
}

impl Default for Link {
    fn default() -> Self {
        Link {
            reads: Semaphore::new(READS_MAX),
            demand: AtomicUsize::new(0),
            last_ns: AtomicU64::new(0),
            service_ns: AtomicU64::new(0),
            origin: Instant::now(),
            background: Semaphore::new(BACKGROUND_MAX),
            quiet: Mutex::const_new(()),
        }
    }
}

/// A place on the link, until it is dropped.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// For a demand read.
    #[expect(dead_code, reason = "held for their drops")]
    Demand(SemaphorePermit<'a>, DemandMark<'a>),
    /// For a background read.
    #[expect(dead_code, reason = "held for their drops")]
    Background(SemaphorePermit<'a>, Option<MutexGuard<'a, ()>>),
}

/// Counts one read of demand.
#[derive(Debug)]
pub(crate) struct DemandMark<'a> {
    link: &'a Link,
    started: Instant,
}

impl Drop for DemandMark<'_> {
    fn drop(&mut self) {
        let link = self.link;
        let took = self.started.elapsed().as_nanos() as u64;
        let usual = link.service_ns.load(Ordering::Relaxed);
        link.service_ns.store(usual - usual / 8 + took / 8, Ordering::Relaxed);
        link.last_ns.store(link.origin.elapsed().as_nanos() as u64, Ordering::Relaxed);
        let before = link.demand.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a read of demand ends once");
    }
}

impl Link {
    /// Waits for a place for a demand read.
    pub(crate) async fn demand(&self) -> Place<'_> {
        self.demand.fetch_add(1, Ordering::Relaxed);
        let mark = DemandMark { link: self, started: Instant::now() };
        let permit = self.reads.acquire().await.expect("invariant: the semaphore is never closed");
        Place::Demand(permit, mark)
    }

    /// A place for one piece of a background read.
    pub(crate) async fn background(&self) -> Place<'_> {
        let permit = self.background.acquire().await;
        let permit = permit.expect("invariant: the semaphore is never closed");
        if self.until_quiet().is_none() {
            return Place::Background(permit, None);
        }
        let turn = self.quiet.lock().await;
        let asked = Instant::now();
        while asked.elapsed() < QUIET_WAIT_MAX {
            let Some(wait) = self.until_quiet() else { break };
            tokio::time::sleep(wait).await;
        }
        Place::Background(permit, Some(turn))
    }

    /// The time left until the link counts as quiet, as far as known now.
    fn until_quiet(&self) -> Option<Duration> {
        let service = Duration::from_nanos(self.service_ns.load(Ordering::Relaxed));
        let quiet = (2 * service).clamp(QUIET_MIN, QUIET_WAIT_MAX / 4);
        if self.demand.load(Ordering::Relaxed) > 0 {
            return Some(quiet);
        }
        let last = self.last_ns.load(Ordering::Relaxed);
        if last == 0 {
            return None;
        }
        let since = self.origin.elapsed().saturating_sub(Duration::from_nanos(last));
        quiet.checked_sub(since).filter(|wait| !wait.is_zero())
    }
}
