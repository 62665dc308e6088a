//! The slowest recent reads.
//!
//! Invariant: the list has at most `SLOW_MAX` reads, none older than `KEPT_FOR`. A read that is not
//! slower than all of a full list costs two loads and takes no lock. Called by `Latencies`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{ReadOp, ReadStage, ReadTimes};
use crate::error::VirtualMemoryError;
use crate::locks::{self, Lock};
use crate::memory_tier::MemoryTier;

/// Reads in the list.
const SLOW_MAX: usize = 32;
/// How long a read stays in it.
const KEPT_FOR: Duration = Duration::from_secs(300);

/// How a read ended.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum ReadOutcome {
    /// The caller got its bytes.
    Served,
    /// The caller got this error.
    Failed(VirtualMemoryError),
    /// The caller dropped the future of its read.
    Cancelled,
}

impl ReadOutcome {
    /// The word for it, without the error.
    pub fn as_str(&self) -> &'static str {
        match self {
            ReadOutcome::Served => "served",
            ReadOutcome::Failed(_) => "failed",
            ReadOutcome::Cancelled => "cancelled",
        }
    }
}

/// A read that was slow, and why. See
/// [`VirtualMemoryStats::slow_reads`](crate::VirtualMemoryStats::slow_reads).
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct SlowRead {
    /// The object; the first one of `read_many`.
    pub handle: u64,
    /// The name with which it came into memory, if it has one.
    pub name: Option<Arc<str>>,
    /// How many objects were read.
    pub objects: usize,
    /// What was asked for, in bytes.
    pub bytes: usize,
    /// How the caller read.
    pub op: ReadOp,
    /// The tier that served it, or was about to; host memory for one that got no further.
    pub tier: MemoryTier,
    /// How long it was in each stage.
    pub times: ReadTimes,
    /// How it ended.
    pub outcome: ReadOutcome,
    /// Whether it waited for the fetch that another read had begun.
    pub joined: bool,
    /// When it ended.
    pub ended: SystemTime,
}

impl SlowRead {
    /// The stage in which it was longest.
    pub fn cause(&self) -> ReadStage {
        self.times.longest()
    }
}

impl fmt::Display for SlowRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SlowRead { op, tier, bytes, times, .. } = self;
        match &self.name {
            Some(name) => write!(f, "{name:?}")?,
            None => write!(f, "object {}", self.handle)?,
        }
        let outcome = self.outcome.as_str();
        write!(f, ", {bytes} bytes from {tier} ({op}), {outcome}: {times}")
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Slowest {
    list: Lock<Vec<(Instant, SlowRead)>, { locks::SLOW }>,
    origin: Instant,
    /// What a read must exceed to get into the list, in nanoseconds; 0 while it is not full.
    floor_ns: AtomicU64,
    /// When the oldest read of the list is too old, in nanoseconds since `origin`.
    stale_ns: AtomicU64,
}

impl Slowest {
    pub(super) fn new() -> Self {
        Slowest {
            list: Lock::new(Vec::new()),
            origin: Instant::now(),
            floor_ns: AtomicU64::new(0),
            stale_ns: AtomicU64::new(u64::MAX),
        }
    }

    /// Takes up a read if it is one of the slowest.
    pub(super) fn offer(&self, total: Duration, read: impl FnOnce() -> SlowRead) {
        let exceeds = total.as_nanos() > u128::from(self.floor_ns.load(Ordering::Relaxed));
        let stale = Duration::from_nanos(self.stale_ns.load(Ordering::Relaxed));
        if !exceeds && self.origin.elapsed() < stale {
            return;
        }
        let now = Instant::now();
        let read = read();
        let mut list = self.list.lock();
        forget_stale(&mut list);
        if list.len() == SLOW_MAX {
            let fastest = (0..SLOW_MAX).min_by_key(|&at| list[at].1.times.total());
            match fastest {
                Some(at) if list[at].1.times.total() < total => list[at] = (now, read),
                _ => {}
            }
        } else {
            list.push((now, read));
        }
        self.note(&list);
    }

    /// The list, the slowest first.
    pub(super) fn list(&self) -> Vec<SlowRead> {
        let mut list = self.list.lock();
        forget_stale(&mut list);
        self.note(&list);
        let mut reads: Vec<_> = list.iter().map(|(_, read)| read.clone()).collect();
        drop(list);
        reads.sort_by_key(|read| std::cmp::Reverse(read.times.total()));
        reads
    }

    /// What the next read is compared with.
    fn note(&self, list: &[(Instant, SlowRead)]) {
        let totals = list.iter().map(|(_, read)| read.times.total());
        let floor = totals.min().filter(|_| list.len() == SLOW_MAX).unwrap_or_default();
        let oldest = list.iter().map(|(at, _)| *at).min();
        let stale = oldest.map(|at| at.saturating_duration_since(self.origin) + KEPT_FOR);
        self.floor_ns.store(nanos(floor), Ordering::Relaxed);
        self.stale_ns.store(stale.map_or(u64::MAX, nanos), Ordering::Relaxed);
    }
}

fn forget_stale(list: &mut Vec<(Instant, SlowRead)>) {
    list.retain(|(at, _)| at.elapsed() < KEPT_FOR);
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
