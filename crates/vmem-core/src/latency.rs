//! How long reads take that are not hits, and in which stage they spend it.
//!
//! A read that host memory does not serve at once has a [`StageClock`]. It travels with the read:
//! the caller's future and the tasks that serve it run on it (`clock.rs`), and where one of them
//! waits or works it [enters](enter) a stage. A read that joins the fetch of another one follows
//! the clock of that one. At its end the read goes into the histogram of its kind and tier, and, if
//! it took long, into a short list (`slow.rs`).
//!
//! A hit is counted by the tier that serves it and never measured: it has no clock, and reads none.
//!
//! Invariant: the times of a read add up to what it took; what no stage accounts for is `runtime`.
//! Nothing here waits, and recording takes no lock but that of the read's own clock and, for one of
//! the slowest, that of the list. Entered by everything that a read waits for; begun and ended by
//! `vmem/timed.rs`; read by `stats`.

mod clock;
mod histograms;
mod slow;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) use clock::{
    Moving, StageClock, Trace, current, enter, follow, inherit, moves_under, on_clock, served_by,
    trace,
};
pub use histograms::LatencySnapshot;
pub(crate) use histograms::Times;
pub use slow::{ReadOutcome, SlowRead};

use crate::console;
use crate::memory_tier::MemoryTier;
use histograms::Histograms;
use slow::Slowest;

/// How a caller reads.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadOp {
    /// All of an object: `read`, and `read_with` without a range.
    Whole,
    /// A part of it: `read_at`, and `read_with` with a range.
    Part,
    /// Into memory of the caller: `read_into`.
    Into,
    /// Several objects at once: `read_many`.
    Many,
    /// One window of an [`ObjectReader`](crate::ObjectReader).
    Stream,
}

impl ReadOp {
    /// All of them.
    pub const ALL: [ReadOp; 5] =
        [ReadOp::Whole, ReadOp::Part, ReadOp::Into, ReadOp::Many, ReadOp::Stream];

    /// The word for it, as it is displayed.
    pub fn as_str(self) -> &'static str {
        match self {
            ReadOp::Whole => "whole",
            ReadOp::Part => "part",
            ReadOp::Into => "into",
            ReadOp::Many => "many",
            ReadOp::Stream => "stream",
        }
    }
}

impl fmt::Display for ReadOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a read waits for, or does.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadStage {
    /// It waits for memory: object space, staging, or readers to hold less than `max_held`.
    Space,
    /// It waits for its turn: for the actor to start it, or for a place on the link to the disk.
    Turn,
    /// Its bytes come from disk, or from a device, and are verified.
    Io,
    /// Its bytes are copied within host memory.
    Copy,
    /// It waits for another change of the object.
    Gate,
    /// None of these: the runtime has not polled one of its tasks, or the caller its future.
    Runtime,
}

impl ReadStage {
    /// All of them, in the order of [`ReadTimes`].
    pub const ALL: [ReadStage; 6] = [
        ReadStage::Space,
        ReadStage::Turn,
        ReadStage::Io,
        ReadStage::Copy,
        ReadStage::Gate,
        ReadStage::Runtime,
    ];

    /// The word for it, as it is displayed.
    pub fn as_str(self) -> &'static str {
        match self {
            ReadStage::Space => "space",
            ReadStage::Turn => "turn",
            ReadStage::Io => "io",
            ReadStage::Copy => "copy",
            ReadStage::Gate => "gate",
            ReadStage::Runtime => "runtime",
        }
    }
}

impl fmt::Display for ReadStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How long one read was in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadTimes([Duration; ReadStage::ALL.len()]);

impl ReadTimes {
    /// How long it was in this stage.
    pub fn of(&self, stage: ReadStage) -> Duration {
        self.0[stage as usize]
    }

    /// How long it took.
    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }

    /// The stage in which it was longest: why the read was slow.
    pub fn longest(&self) -> ReadStage {
        let longest = ReadStage::ALL.into_iter().rev().max_by_key(|&stage| self.of(stage));
        longest.unwrap_or(ReadStage::Runtime)
    }
}

impl fmt::Display for ReadTimes {
    /// The total, and each stage that took a microsecond or more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1?}", self.total())?;
        for stage in ReadStage::ALL {
            if self.of(stage) >= Duration::from_micros(1) {
                write!(f, ", {stage} {:.1?}", self.of(stage))?;
            }
        }
        Ok(())
    }
}

/// The reads of one store that are not hits.
#[derive(Debug)]
pub(crate) struct Latencies {
    histograms: Histograms,
    /// How long reads were in each stage that they were in.
    stages: [Times; ReadStage::ALL.len()],
    slowest: Slowest,
    /// Reads that are under way, by the stage in which they are now.
    now: [AtomicU64; ReadStage::ALL.len()],
    failed: AtomicU64,
    cancelled: AtomicU64,
    /// All of them, as tokio-console shows them.
    pub(crate) row: console::Reads,
    /// A read that took this long causes an event.
    pub(crate) threshold: Duration,
}

impl Latencies {
    pub(crate) fn new(threshold: Duration) -> Arc<Self> {
        Arc::new(Latencies {
            histograms: Histograms::default(),
            stages: Default::default(),
            slowest: Slowest::new(),
            now: std::array::from_fn(|_| AtomicU64::new(0)),
            failed: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            row: console::Reads::new(),
            threshold,
        })
    }

    /// Takes up a read that has ended. `slow` is made for one of the slowest alone.
    pub(crate) fn record(
        &self,
        op: ReadOp,
        tier: MemoryTier,
        outcome: &ReadOutcome,
        times: &ReadTimes,
        slow: impl FnOnce() -> SlowRead,
    ) {
        let total = times.total();
        for stage in ReadStage::ALL {
            let spent = times.of(stage);
            if !spent.is_zero() {
                self.stages[stage as usize].record(spent);
            }
        }
        match outcome {
            ReadOutcome::Served => self.histograms.of(op, tier).record(total),
            ReadOutcome::Failed(_) => drop(self.failed.fetch_add(1, Ordering::Relaxed)),
            ReadOutcome::Cancelled => drop(self.cancelled.fetch_add(1, Ordering::Relaxed)),
        }
        self.slowest.offer(total, slow);
    }

    pub(crate) fn snapshot(&self, op: ReadOp, tier: MemoryTier) -> LatencySnapshot {
        self.histograms.of(op, tier).snapshot()
    }

    pub(crate) fn times_in(&self, stage: ReadStage) -> LatencySnapshot {
        self.stages[stage as usize].snapshot()
    }

    pub(crate) fn slow_reads(&self) -> Vec<SlowRead> {
        self.slowest.list()
    }

    /// Reads that are in this stage now.
    pub(crate) fn in_stage(&self, stage: ReadStage) -> u64 {
        self.now[stage as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    pub(crate) fn cancelled(&self) -> u64 {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Counts `before` readers out of one stage, and `after` into another.
    fn shift(&self, (from, before): (ReadStage, u32), (to, after): (ReadStage, u32)) {
        if (from, before) == (to, after) {
            return;
        }
        self.now[to as usize].fetch_add(u64::from(after), Ordering::Relaxed);
        let readers = self.now[from as usize].fetch_sub(u64::from(before), Ordering::Relaxed);
        assert!(readers >= u64::from(before), "a reader is counted in the stage where it was");
    }
}

#[cfg(test)]
mod tests;
