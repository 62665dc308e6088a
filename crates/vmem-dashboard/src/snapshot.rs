//! What a page is sent, as JSON.
//!
//! Invariant: it has figures, names and errors of the store, and no bytes of objects; times are in
//! microseconds, sizes in bytes, and totals count from the store's start, so that a page makes
//! rates of two snapshots. Made by the feed.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmem_core::{
    HeldObject, Incident, LatencySnapshot, MemoryTier, MigrationCause, MigrationStats, ReadOp,
    ReadOutcome, ReadStage, SlowRead, TierStats, VirtualMemory, VirtualMemoryStats,
};

/// Of the slowest reads, the first few: the others look like them.
const SLOW_SHOWN: usize = 10;
/// Of the objects that are held, the largest few.
const HELD_SHOWN: usize = 10;
/// Of the incidents, the last few.
const INCIDENTS_SHOWN: usize = 12;

/// The store at one moment.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    /// Since 1970, in milliseconds.
    at_ms: u64,
    tiers: Vec<Tier>,
    links: Vec<Link>,
    /// Since the last snapshot; empty for the first one, and without a listener.
    migrations: Vec<Moved>,
    reads: Reads,
    latencies: Vec<Latency>,
    slowest: Vec<Slow>,
    memory: Memory,
    /// What keeps objects where they are, the largest first.
    holders: Vec<Holder>,
    counts: Counts,
    /// The newest first.
    incidents: Vec<Shown>,
    machine: Machine,
    slow_read_threshold_us: u64,
}

#[derive(Debug, Serialize)]
struct Tier {
    tier: String,
    used: u64,
    capacity: u64,
    peak: u64,
    largest_free: u64,
    objects: u64,
    hits: u64,
    refusals: u64,
    faults: u64,
    fallbacks: u64,
}

#[derive(Debug, Serialize)]
struct Link {
    from: &'static str,
    to: &'static str,
    bytes: u64,
}

/// Migrations by one link, for one cause.
#[derive(Debug, Serialize)]
pub(crate) struct Moved {
    from: String,
    to: String,
    cause: String,
    count: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Reads {
    hits: u64,
    misses: u64,
    failed: u64,
    cancelled: u64,
    /// Reads under way, by stage.
    now: BTreeMap<&'static str, u64>,
    /// Requests that wait for space, writes and pins among them.
    waiters: u64,
}

/// Reads that one tier served and that were no hits.
#[derive(Debug, Serialize)]
struct Latency {
    tier: String,
    all: Quantiles,
    recent: Quantiles,
}

#[derive(Debug, Serialize)]
struct Quantiles {
    count: u64,
    p50: Option<u64>,
    p90: Option<u64>,
    p99: Option<u64>,
    max: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Slow {
    handle: u64,
    name: Option<String>,
    objects: usize,
    op: &'static str,
    tier: String,
    bytes: usize,
    outcome: &'static str,
    error: Option<String>,
    cause: &'static str,
    joined: bool,
    ended_ms: u64,
    total: u64,
    stages: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
struct Memory {
    held: u64,
    pinned: u64,
    dirty: u64,
    vram_dirty: u64,
    staging: u64,
    streams: u64,
    metadata: u64,
}

#[derive(Debug, Serialize)]
struct Counts {
    objects: u64,
    names_in_memory: u64,
    migrations_in_flight: u64,
    evictions: u64,
    clean_drops: u64,
    promotions: u64,
    errors: u64,
    commits: u64,
}

/// An incident.
#[derive(Debug, Serialize)]
struct Shown {
    tier: String,
    kind: &'static str,
    handle: Option<u64>,
    error: String,
    left_out: u64,
    at_ms: u64,
}

/// An object that is held.
#[derive(Debug, Serialize)]
struct Holder {
    handle: u64,
    name: Option<String>,
    tier: String,
    kind: String,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Machine {
    disk: String,
    notes: Vec<String>,
    direct: bool,
    staging_registered: bool,
    tmpfs: bool,
    devices: Vec<String>,
    no_vram: String,
}

type Route = (MemoryTier, MemoryTier, MigrationCause);

/// What migrations had moved at the last snapshot.
#[derive(Debug)]
pub(crate) struct Moves(HashMap<Route, MigrationStats>);

impl Moves {
    pub(crate) fn of(stats: &VirtualMemoryStats) -> Self {
        let all = stats.migrations().into_iter();
        Moves(all.map(|one| ((one.from, one.to, one.cause), one)).collect())
    }

    /// What they have moved since then, up to now.
    pub(crate) fn since(&mut self, stats: &VirtualMemoryStats) -> Vec<Moved> {
        let before = std::mem::replace(self, Moves::of(stats));
        let moved = self.0.iter().map(|(route, now)| {
            let (count, bytes) =
                before.0.get(route).map_or((0, 0), |before| (before.migrations, before.bytes));
            Moved {
                from: now.from.to_string(),
                to: now.to.to_string(),
                cause: now.cause.to_string(),
                count: now.migrations - count,
                bytes: now.bytes - bytes,
            }
        });
        moved.filter(|moved| moved.count > 0).collect()
    }
}

/// The histograms of all tiers, each of all kinds of reads together.
pub(crate) type Histograms = Vec<(MemoryTier, LatencySnapshot)>;

/// The tiers of the store, from fast to slow.
fn tiers(vmem: &VirtualMemory) -> impl Iterator<Item = MemoryTier> {
    let devices = vmem.capabilities().devices.len();
    let devices = (0..u8::try_from(devices).unwrap_or(u8::MAX)).map(MemoryTier::of_device);
    let remote = vmem.capabilities().remote.as_ref().map(|_| MemoryTier::Remote);
    devices.chain([MemoryTier::Host, MemoryTier::Disk]).chain(remote)
}

pub(crate) fn histograms(vmem: &VirtualMemory, stats: &VirtualMemoryStats) -> Histograms {
    let merged = |tier| {
        let each = ReadOp::ALL.into_iter().map(|op| stats.latency(op, tier));
        each.fold(LatencySnapshot::default(), |all, one| all.merged(&one))
    };
    tiers(vmem).map(|tier| (tier, merged(tier))).collect()
}

impl Snapshot {
    /// The store now; `earlier` is where the recent reads begin.
    pub(crate) fn of(
        vmem: &VirtualMemory,
        stats: &VirtualMemoryStats,
        now: &Histograms,
        earlier: Option<&Histograms>,
        migrations: Vec<Moved>,
    ) -> Self {
        let recent = |tier: MemoryTier, all: &LatencySnapshot| {
            let before = earlier.and_then(|all| all.iter().find(|(one, _)| *one == tier));
            before.map_or_else(|| all.clone(), |(_, before)| all.since(before))
        };
        let latencies = now.iter().filter(|(_, all)| all.count() > 0).map(|(tier, all)| Latency {
            tier: tier.to_string(),
            all: quantiles(all),
            recent: quantiles(&recent(*tier, all)),
        });
        Snapshot {
            at_ms: millis(SystemTime::now()),
            tiers: tiers(vmem).map(|tier| tier_of(tier, &vmem.tier_stats(tier))).collect(),
            links: links(stats),
            migrations,
            reads: reads(stats),
            latencies: latencies.collect(),
            slowest: stats.slow_reads().iter().take(SLOW_SHOWN).map(slow).collect(),
            memory: Memory {
                held: stats.held_bytes,
                pinned: stats.pinned_bytes,
                dirty: stats.dirty_bytes,
                vram_dirty: stats.vram_dirty_bytes,
                staging: stats.staging_bytes,
                streams: stats.stream_bytes,
                metadata: stats.metadata_bytes,
            },
            holders: vmem.held_objects(HELD_SHOWN).iter().map(holder).collect(),
            counts: Counts {
                objects: stats.objects,
                names_in_memory: stats.names_in_memory,
                migrations_in_flight: stats.migrations_in_flight,
                evictions: stats.evictions,
                clean_drops: stats.clean_drops,
                promotions: stats.promotions,
                errors: stats.errors,
                commits: stats.commits,
            },
            incidents: vmem.incidents().iter().take(INCIDENTS_SHOWN).map(incident).collect(),
            machine: machine(vmem),
            slow_read_threshold_us: micros(vmem.config().slow_read_threshold()),
        }
    }
}

fn tier_of(tier: MemoryTier, stats: &TierStats) -> Tier {
    Tier {
        tier: tier.to_string(),
        used: stats.used_bytes,
        capacity: stats.capacity_bytes,
        peak: stats.peak_bytes,
        largest_free: stats.largest_free_bytes,
        objects: stats.objects,
        hits: stats.hits,
        refusals: stats.refusals,
        faults: stats.faults,
        fallbacks: stats.fallbacks,
    }
}

fn incident(incident: &Incident) -> Shown {
    Shown {
        tier: incident.tier.to_string(),
        kind: incident.kind.as_str(),
        handle: incident.handle,
        error: incident.error.clone(),
        left_out: incident.left_out,
        at_ms: millis(incident.at),
    }
}

fn holder(held: &HeldObject) -> Holder {
    Holder {
        handle: held.handle,
        name: held.name.as_deref().map(str::to_owned),
        tier: held.tier.to_string(),
        kind: held.kind.to_string(),
        bytes: held.bytes,
    }
}

fn links(stats: &VirtualMemoryStats) -> Vec<Link> {
    vec![
        Link { from: "vram", to: "host", bytes: stats.vram_to_host_bytes },
        Link { from: "host", to: "vram", bytes: stats.host_to_vram_bytes },
        Link { from: "disk", to: "host", bytes: stats.disk_to_host_bytes },
        Link { from: "host", to: "disk", bytes: stats.host_to_disk_bytes },
        Link { from: "remote", to: "host", bytes: stats.remote_to_host_bytes },
        Link { from: "host", to: "remote", bytes: stats.host_to_remote_bytes },
    ]
}

fn reads(stats: &VirtualMemoryStats) -> Reads {
    let now = ReadStage::ALL.into_iter().map(|stage| (stage.as_str(), stats.reads_in(stage)));
    Reads {
        hits: stats.host.hits,
        misses: stats.misses,
        failed: stats.reads_failed,
        cancelled: stats.reads_cancelled,
        now: now.collect(),
        waiters: stats.waiters,
    }
}

fn quantiles(histogram: &LatencySnapshot) -> Quantiles {
    let at = |fraction| histogram.quantile(fraction).map(micros);
    let count = histogram.count();
    Quantiles { count, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
}

fn slow(read: &SlowRead) -> Slow {
    let error = match &read.outcome {
        ReadOutcome::Failed(error) => Some(error.to_string()),
        _ => None,
    };
    let stages = ReadStage::ALL.into_iter();
    Slow {
        handle: read.handle,
        name: read.name.as_deref().map(str::to_owned),
        objects: read.objects,
        op: read.op.as_str(),
        tier: read.tier.to_string(),
        bytes: read.bytes,
        outcome: read.outcome.as_str(),
        error,
        cause: read.cause().as_str(),
        joined: read.joined,
        ended_ms: millis(read.ended),
        total: micros(read.times.total()),
        stages: stages.map(|stage| (stage.as_str(), micros(read.times.of(stage)))).collect(),
    }
}

fn machine(vmem: &VirtualMemory) -> Machine {
    let found = vmem.capabilities();
    Machine {
        disk: found.disk.to_string(),
        notes: found.disk_notes.iter().map(ToString::to_string).collect(),
        direct: found.disk_direct,
        staging_registered: found.staging_registered,
        tmpfs: found.disk_is_tmpfs,
        devices: found.devices.iter().map(ToString::to_string).collect(),
        no_vram: found.vram_reason.to_string(),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
