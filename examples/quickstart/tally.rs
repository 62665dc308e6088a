//! What the tasks count, for the display and the summary.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmem::VirtualMemoryStats;

/// Of each kind of message only the first few are kept.
const MESSAGES_MAX: usize = 10;

/// Counts of the whole run, shared by all tasks.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) files_stored: Counter,
    pub(crate) bytes_stored: Counter,
    pub(crate) bytes_compared: Counter,
    pub(crate) whole_reads: Counter,
    pub(crate) range_reads: Counter,
    pub(crate) reads_into: Counter,
    pub(crate) prefetches: Counter,
    /// Files that were compared from the first byte to the last.
    pub(crate) files_compared: Counter,
    /// Stored bytes that are not those of the file: the store would be at fault.
    pub(crate) differ: Messages,
    /// Calls of the store that failed.
    pub(crate) failed: Messages,
    /// Files that were changed meanwhile.
    pub(crate) changed: Messages,
    /// Files that the system did not let us read.
    pub(crate) unreadable: Messages,
    phases: Mutex<Vec<Phase>>,
}

/// One phase: from here on, or until it ended.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) goal: Goal,
    pub(crate) began: Instant,
    pub(crate) took: Option<Duration>,
    /// Bytes that went through in this phase.
    pub(crate) bytes: u64,
    /// Reads in it that host memory served, and that it did not.
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

/// When a phase is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    Bytes(u64),
    Time(Duration),
}

impl Phase {
    pub(crate) fn elapsed(&self) -> Duration {
        self.took.unwrap_or_else(|| self.began.elapsed())
    }

    /// How much of it is done, between 0 and 1.
    pub(crate) fn fraction(&self) -> f64 {
        let fraction = match self.goal {
            Goal::Bytes(bytes) => self.bytes as f64 / bytes.max(1) as f64,
            Goal::Time(length) => self.elapsed().as_secs_f64() / length.as_secs_f64().max(1e-9),
        };
        fraction.min(1.0)
    }

    /// Bytes in a second.
    pub(crate) fn rate(&self) -> u64 {
        (self.bytes as f64 / self.elapsed().as_secs_f64().max(1e-9)) as u64
    }

    pub(crate) fn hit_ratio(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }
}

impl Tally {
    /// Ends the phase that runs, if any, and begins another.
    pub(crate) fn begin(&self, name: &'static str, goal: Goal, stats: &VirtualMemoryStats) {
        self.end(stats);
        let began = Instant::now();
        lock(&self.phases).push(Phase {
            name,
            goal,
            began,
            took: None,
            bytes: self.bytes_so_far(),
            hits: stats.host.hits,
            misses: stats.misses,
        });
    }

    /// Ends the phase that runs, if any.
    pub(crate) fn end(&self, stats: &VirtualMemoryStats) {
        let Some(mut phase) = self.current(stats).filter(|phase| phase.took.is_none()) else {
            return;
        };
        phase.took = Some(phase.began.elapsed());
        let mut phases = lock(&self.phases);
        phases.pop();
        phases.push(phase);
    }

    /// The phase that runs, or the last one.
    pub(crate) fn current(&self, stats: &VirtualMemoryStats) -> Option<Phase> {
        let mut phase = lock(&self.phases).last()?.clone();
        if phase.took.is_none() {
            // While it runs, these hold the counts at its beginning.
            phase.bytes = self.bytes_so_far() - phase.bytes;
            phase.hits = stats.host.hits - phase.hits;
            phase.misses = stats.misses - phase.misses;
        }
        Some(phase)
    }

    /// Every phase that began.
    pub(crate) fn phases(&self) -> Vec<Phase> {
        lock(&self.phases).clone()
    }

    fn bytes_so_far(&self) -> u64 {
        self.bytes_stored.get() + self.bytes_compared.get()
    }
}

/// A count that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Messages of one kind: all are counted, the first few kept.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    count: Counter,
    first: Mutex<Vec<String>>,
}

impl Messages {
    pub(crate) fn push(&self, message: String) {
        self.count.add(1);
        let mut first = lock(&self.first);
        if first.len() < MESSAGES_MAX {
            first.push(message);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.get()
    }

    pub(crate) fn first(&self) -> Vec<String> {
        lock(&self.first).clone()
    }
}

/// What these locks guard is whole at every moment, even if a holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
