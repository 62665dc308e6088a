//! Spans and events in the form that `console-subscriber` takes for tasks and resources.
//!
//! Invariant: as `console/mod.rs` says. A resource learns of a change by an event inside of its
//! span, so each span is entered for that alone, and left at once.

use std::cell::LazyCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use tokio::runtime::Handle;
use tracing::{Span, trace, trace_span};

use super::{Moved, Now, TierNow};
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::task::spawn_named;

/// How often the figures are sent; the console itself draws once a second.
const EVERY: Duration = Duration::from_millis(500);

/// Letters of the name of an object in the name of a row.
const NAME: usize = 32;

/// Tells the resource whose span is entered the value of one attribute. Without `op` a number would
/// stay what it was first.
macro_rules! state {
    ($($name:ident = $value:expr),+ $(,)?) => {
        $(trace!(
            target: "runtime::resource::state_update",
            $name = $value,
            $name.op = "override",
        );)+
    };
}

/// A row among the tasks, from its start to its drop.
#[derive(Debug)]
pub(crate) struct Migration {
    row: Span,
}

impl Migration {
    /// `moved` is asked for what the row says of the object, if there is a console.
    pub(crate) fn start(
        (from, to): (MemoryTier, MemoryTier),
        cause: MigrationCause,
        moved: impl FnOnce() -> Moved,
    ) -> Self {
        let moved = LazyCell::new(moved);
        // All in the name, since the fields are beyond the right edge of most terminals.
        let row = trace_span!(
            target: "vmem::migration",
            parent: None,
            "runtime.spawn",
            kind = "migration",
            task.name = format!("{from} to {to}: {cause} {}", tail(&moved.object)).as_str(),
            object = moved.object.as_str(),
            %cause,
            bytes = moved.bytes,
        );
        // A task that nothing can wake looks lost to the console. This one is woken by the disk.
        waker(&row, "waker.clone");
        Migration { row }
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        waker(&self.row, "waker.drop");
    }
}

/// The end of a long name: there the names of objects differ.
fn tail(name: &str) -> &str {
    let start = name.char_indices().rev().nth(NAME - 1);
    start.map_or(name, |(start, _)| &name[start..])
}

fn waker(row: &Span, op: &'static str) {
    if let Some(id) = row.id() {
        trace!(target: "tokio::task::waker", op, task.id = id.into_u64());
    }
}

/// The reads of one store: a resource, with an operation for each read that is not a hit.
#[derive(Debug)]
pub(crate) struct Reads {
    row: Span,
}

impl Reads {
    pub(crate) fn new() -> Self {
        let row = trace_span!(
            target: "vmem::read",
            parent: None,
            "runtime.resource",
            concrete_type = "reads",
            kind = "vmem",
            is_internal = false,
        );
        Reads { row }
    }
}

/// One read that is under way.
#[derive(Debug)]
pub(crate) struct Read {
    reads: Span,
    row: Span,
}

impl Read {
    /// `what` names it, if there is a console.
    pub(crate) fn start(reads: &Reads, what: impl FnOnce() -> String) -> Self {
        let reads = reads.row.clone();
        let row = reads.in_scope(|| {
            trace_span!(
                target: "vmem::read",
                "runtime.resource.async_op",
                source = what().as_str(),
                inherits_child_attrs = false,
            )
        });
        Read { reads, row }
    }

    /// Shows what it waits for now.
    pub(crate) fn waits_for(&self, stage: &'static str) {
        self.row.in_scope(|| {
            trace!(target: "runtime::resource::async_op::state_update", waits_for = stage);
        });
    }

    /// Shows in which stage it was longest, for as long as the console keeps what has ended.
    pub(crate) fn ended(&self, longest: impl Fn() -> &'static str) {
        self.row.in_scope(|| {
            trace!(
                target: "runtime::resource::async_op::state_update",
                waits_for = format!("nothing, was mostly {}", longest()).as_str(),
            );
        });
    }

    /// Shows which task polls it, and how often.
    pub(crate) fn watch<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        let reads = self.reads.clone();
        let row = self.row.clone();
        async move {
            let mut work = pin!(work);
            let mut shown = None;
            poll_fn(|context| {
                let _reads = reads.enter();
                let _row = row.enter();
                let polled = work.as_mut().poll(context);
                // Not at each poll: the console has a buffer of events, and all that it learns of
                // this one is the task.
                let task = tokio::task::try_id();
                if shown != Some(task) {
                    shown = Some(task);
                    trace!(
                        target: "runtime::resource::poll_op",
                        op_name = "poll_read",
                        is_ready = polled.is_ready(),
                    );
                }
                polled
            })
            .await
        }
    }
}

/// Tells what `now` says until it says no more, by a task of its own.
pub(crate) fn show(
    runtime: &Handle,
    reads: &Reads,
    now: impl Fn() -> Option<Now> + Send + 'static,
) {
    let reads = reads.row.clone();
    let showing = async move {
        let mut tiers = Vec::new();
        let mut every = tokio::time::interval(EVERY);
        while let Some(now) = now() {
            for (number, tier) in now.tiers.iter().enumerate() {
                if number == tiers.len() {
                    tiers.push(row_of(tier.tier));
                }
                tiers[number].in_scope(|| tell_tier(tier));
            }
            reads.in_scope(|| tell_reads(&now));
            every.tick().await;
        }
    };
    drop(spawn_named(runtime, "vmem-console", showing));
}

fn row_of(tier: MemoryTier) -> Span {
    trace_span!(
        target: "vmem::tier",
        parent: None,
        "runtime.resource",
        concrete_type = tier.to_string().as_str(),
        kind = "vmem",
        is_internal = false,
    )
}

/// The console sorts attributes by their names: what fills a tier comes first.
fn tell_tier(tier: &TierNow) {
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let percent = 100.0 * tier.used_bytes as f64 / (tier.capacity_bytes as f64).max(1.0);
    let fill = format!("{percent:.0}% of {:.1} MiB", mib(tier.capacity_bytes));
    let pinned = format!("{:.1} MiB", mib(tier.pinned_bytes));
    state!(fill = fill.as_str(), pinned = pinned.as_str(), waiters = tier.waiters);
}

fn tell_reads(now: &Now) {
    let held = format!("{:.1} MiB", now.held_bytes as f64 / (1 << 20) as f64);
    let reads = now.reads.iter().filter(|(_, count)| *count > 0);
    let stages: Vec<_> = reads.map(|(stage, count)| format!("{count} {stage}")).collect();
    let stages = if stages.is_empty() { "none".to_owned() } else { stages.join(", ") };
    state!(held = held.as_str(), migrations = now.migrations, now = stages.as_str());
}
