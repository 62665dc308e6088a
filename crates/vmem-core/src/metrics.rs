//! The figures of a store as metrics of the `metrics` facade, with the feature `metrics`.
//!
//! They are published from [`stats`](crate::VirtualMemory::stats) when a service is scraped
//! ([`publish_metrics`](crate::VirtualMemory::publish_metrics)), the distributions of times too:
//! what a histogram of the store has got since it was published last goes to the recorder then. So
//! a read or a migration costs the same with metrics and without. Names keep to the conventions of
//! Prometheus: base units, `_total` for what only grows.
//!
//! Invariant: what is published is in [`ALL`], under the name, the kind and the labels that stand
//! there, and each time once. Called by `vmem/publish.rs`.

use std::collections::HashMap;

use metrics::{Histogram, Unit, counter, gauge};

use crate::events::MigrationCause;
use crate::latency::{LatencySnapshot, ReadOp, ReadStage};
use crate::memory_tier::MemoryTier;

/// What a metric is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, while the store is open.
    Counter,
    /// It is what it is now.
    Gauge,
    /// The distribution of a time.
    Histogram,
}

/// One metric.
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// What it is called.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

const fn metric(
    kind: Kind,
    unit: Unit,
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric { name, kind, unit, labels, help }
}

const fn count(name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Counter, Unit::Count, name, &[], help)
}

const fn number(name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Gauge, Unit::Count, name, &[], help)
}

const fn bytes(name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Gauge, Unit::Bytes, name, &[], help)
}

const fn of_tier(unit: Unit, name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Gauge, unit, name, &["tier"], help)
}

const fn incidents(name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Counter, Unit::Count, name, &["tier"], help)
}

const fn moved(unit: Unit, name: &'static str, help: &'static str) -> Metric {
    metric(Kind::Counter, unit, name, &["from", "to", "cause"], help)
}

/// All metrics.
///
/// ```
/// assert!(vmem::metrics::ALL.iter().any(|metric| metric.name == "vmem_reads_total"));
/// ```
pub const ALL: &[Metric] = &[
    metric(
        Kind::Counter,
        Unit::Count,
        "vmem_reads_total",
        &["tier", "outcome"],
        "Reads that a tier has served, and those that failed or were cancelled (tier none).",
    ),
    metric(
        Kind::Histogram,
        Unit::Seconds,
        "vmem_read_seconds",
        &["op", "tier"],
        "How long reads took that were served and are not hits.",
    ),
    metric(
        Kind::Histogram,
        Unit::Seconds,
        "vmem_waits_seconds",
        &["cause"],
        "How long reads that are not hits were in each stage that they were in.",
    ),
    metric(
        Kind::Gauge,
        Unit::Count,
        "vmem_reads_in_stage",
        &["stage"],
        "Reads under way that are not hits, by what they wait for or do.",
    ),
    moved(Unit::Count, "vmem_migrations_total", "Migrations that have ended well."),
    moved(Unit::Count, "vmem_migrations_failed_total", "Migrations that have failed."),
    moved(Unit::Bytes, "vmem_moved_bytes_total", "Payload that migrations have moved."),
    metric(
        Kind::Histogram,
        Unit::Seconds,
        "vmem_migration_seconds",
        &["from", "to", "cause"],
        "How long migrations took, from their first byte to their publication.",
    ),
    metric(
        Kind::Counter,
        Unit::Bytes,
        "vmem_link_bytes_total",
        &["from", "to"],
        "Payload that has passed between two tiers, for migrations and parts.",
    ),
    of_tier(Unit::Bytes, "vmem_tier_used_bytes", "Footprint in use."),
    of_tier(Unit::Bytes, "vmem_tier_capacity_bytes", "The budget; of host: of object space."),
    of_tier(Unit::Bytes, "vmem_tier_peak_bytes", "The largest footprint that was in use."),
    of_tier(Unit::Bytes, "vmem_tier_largest_free_bytes", "What fits without moving others."),
    of_tier(Unit::Count, "vmem_tier_objects", "Objects with a copy, or with space, in a tier."),
    incidents("vmem_tier_refusals_total", "Requests that got no space in a tier."),
    incidents("vmem_tier_faults_total", "Operations of a tier that failed, or read other bytes."),
    incidents("vmem_tier_fallbacks_total", "Reads that the tier below served instead."),
    bytes("vmem_held_bytes", "Footprint in host memory that readers hold."),
    bytes("vmem_pinned_bytes", "Footprint in host memory that pins hold."),
    bytes("vmem_dirty_bytes", "Payload in host memory without an equal copy below."),
    bytes("vmem_vram_dirty_bytes", "Payload in device memory that no other tier has."),
    bytes("vmem_staging_bytes", "Host memory set apart for staging."),
    bytes("vmem_stream_bytes", "Memory that streams may hold now."),
    bytes("vmem_registered_bytes", "Object space that devices reach directly."),
    bytes("vmem_metadata_bytes", "Memory of objects and names beside their payload."),
    number("vmem_objects", "Objects in memory."),
    number("vmem_names_in_memory", "Names whose objects are in memory."),
    number("vmem_waiters", "Requests that wait for space."),
    number("vmem_migrations_in_flight", "Migrations that have started and not ended."),
    count("vmem_misses_total", "Reads that host memory did not serve."),
    count("vmem_evictions_total", "Copies that left a tier to make space."),
    count("vmem_promotions_total", "Copies that a promotion made."),
    count("vmem_clean_drops_total", "Evictions that had nothing to write."),
    metric(
        Kind::Counter,
        Unit::Bytes,
        "vmem_relocated_bytes_total",
        &[],
        "Footprint that was moved within host memory.",
    ),
    count("vmem_named_changes_total", "Changes of named objects that were made durable."),
    count("vmem_commits_total", "Commits of these changes."),
    count("vmem_errors_total", "Operations of a backend that failed."),
    number("vmem_commits_stopped", "1 if a sync failed: no name is made durable any more."),
    count("vmem_spans_left_out_total", "Spans that `spans_per_second` did not allow."),
];

/// Describes all metrics to the recorder of the process, for the help that it shows.
pub fn describe() {
    for &Metric { name, kind, unit, help, .. } in ALL {
        match kind {
            Kind::Counter => metrics::describe_counter!(name, unit, help),
            Kind::Gauge => metrics::describe_gauge!(name, unit, help),
            Kind::Histogram => metrics::describe_histogram!(name, unit, help),
        }
    }
}

/// The word for a tier, as a label.
pub(crate) fn label(tier: MemoryTier) -> String {
    tier.to_string()
}

pub(crate) fn set(name: &'static str, value: u64) {
    gauge!(name).set(value as f64);
}

pub(crate) fn set_total(name: &'static str, value: u64) {
    counter!(name).absolute(value);
}

/// A histogram of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Timed {
    Read(ReadOp, MemoryTier),
    Stage(ReadStage),
    Migration(MemoryTier, MemoryTier, MigrationCause),
}

/// What the recorder has been given of each histogram.
#[derive(Debug, Default)]
pub(crate) struct Published(HashMap<Timed, LatencySnapshot>);

impl Published {
    /// Gives the recorder what this histogram has got since it was given the last.
    pub(crate) fn publish(&mut self, what: Timed, now: LatencySnapshot, to: &Histogram) {
        let before = self.0.get(&what);
        let new = before.map_or_else(|| now.clone(), |before| now.since(before));
        for (time, times) in new.times() {
            to.record_many(time, usize::try_from(times).unwrap_or(usize::MAX));
        }
        self.0.insert(what, now);
    }
}
