//! P13 and P14: a table of a million embeddings, ten times as large as its budget, read in sets.
//!
//! 64 tasks read sets of 32, chosen by Zipf's law: by `read_many`, by reads that are joined, and
//! from the peers. Each side is a process of its own; rounds are in turns, with the same choices
//! and three rounds of warm-up each. Every object is checked. The peers have as much memory as ours
//! takes in all.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use futures::future::join_all;
use tokio::runtime::{Builder, Runtime};
use vmem::{MemoryTier, PolicyKind, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::group::Group;
use crate::metadata::resident_bytes;
use crate::report::{Bar, Report, Rounds};
use crate::side::{self, Cost, LEN, Reader, SET, Side, TASKS, bytes_of, check};

/// Sets of a round of warm-up, and before resident memory is looked at.
const SETS: usize = 6_400;
/// Sets of a round that is measured.
const MEASURED: usize = 12_800;
/// Rounds of warm-up.
const WARM: u64 = 3;

/// What one handle takes in the caller's own vector.
const HANDLE: usize = size_of::<VMemHandle>();
/// What a handle may take in the store.
const METADATA: f64 = 160.0;
/// Everything that does not grow with the load: the program, its threads, the catalog's cache,
/// buffers of the drivers.
const CONSTANT: f64 = 48.0 * (1 << 20) as f64;

/// What objects take in host memory, at most: a tenth of them.
fn budget_bytes(count: usize) -> u64 {
    (count * LEN / 10) as u64
}

#[derive(Clone)]
struct Table {
    vmem: VirtualMemory,
    handles: Arc<Vec<VMemHandle>>,
    joined: bool,
}

impl Table {
    async fn with(
        count: usize,
        directory: &Path,
        joined: bool,
        policy: PolicyKind,
    ) -> anyhow::Result<Self> {
        let config = VirtualMemoryConfig::builder()
            .disk_path(directory)
            .host_capacity(budget_bytes(count))
            .policy(policy)
            .disk_capacity((count * 2 * LEN) as u64 + (64 << 20))
            .build()?;
        let vmem = vmem::open(config).await?;
        let mut handles = Vec::with_capacity(count);
        for key in 0..count {
            handles.push(vmem.put(bytes_of(key), MemoryTier::Host).await?);
        }
        Ok(Table { vmem, handles: Arc::new(handles), joined })
    }
}

impl Reader for Table {
    async fn read(&self, keys: Vec<usize>) -> anyhow::Result<()> {
        let set = keys.iter().map(|&key| &self.handles[key]);
        let read = if self.joined {
            let reads = join_all(set.map(|handle| self.vmem.read(handle))).await;
            reads.into_iter().collect::<Result<Vec<_>, _>>()?
        } else {
            self.vmem.read_many(set).await?
        };
        keys.iter().zip(&read).try_for_each(|(&key, bytes)| check(key, bytes))
    }

    fn hit_ratio(&self) -> anyhow::Result<f64> {
        Ok(self.vmem.stats().hit_ratio())
    }
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// A side and what its rounds cost.
struct Contender {
    name: String,
    side: Side,
    /// On the clock, and of CPU.
    rounds: [Rounds; 2],
}

impl Contender {
    fn start(
        name: &str,
        role: &str,
        count: usize,
        options: &str,
        group: Option<Group>,
    ) -> anyhow::Result<Self> {
        let mut side = Side::start(role, count, options, group)?;
        for seed in 0..WARM {
            side.round(SETS, seed)?;
        }
        Ok(Contender { name: name.into(), side, rounds: Default::default() })
    }

    fn round(&mut self, seed: u64) -> anyhow::Result<Cost> {
        let cost = self.side.round(MEASURED, WARM + seed)?;
        self.rounds[0].0.push(cost.0);
        self.rounds[1].0.push(cost.1);
        Ok(cost)
    }

    /// Says what it takes and how often memory serves it, with its last round.
    fn describe(&self) -> anyhow::Result<()> {
        let memory = self.side.memory_bytes()?;
        let hits = self.side.hit_ratio;
        let last = |nth: usize| self.rounds[nth].0.last().copied().unwrap_or(f64::NAN);
        println!(
            "P13 {}: {memory:.0} bytes in all, hit ratio {hits:.3}, {:.0} ns a set, {:.0} ns CPU",
            self.name,
            last(0),
            last(1)
        );
        Ok(())
    }
}

pub(crate) fn p13(report: &mut Report, count: usize, rounds: usize) -> anyhow::Result<()> {
    // A group without a limit counts all that ours takes, the kernel's part too.
    let counted = Group::new(None);
    let skipped = counted.as_ref().err().cloned();
    let mut many = Contender::start("read-many", "many", count, "lru", counted.ok())?;
    let allowed = many.side.memory_bytes()?;
    println!(
        "P13 memory of ours in all: {allowed:.0} bytes, of which are resident {:.0}",
        many.side.resident_bytes
    );
    let mut peers: Vec<(Contender, Option<f64>)> = vec![
        (Contender::start("reads-joined", "joined", count, "lru", None)?, Some(1.0 / 1.2)),
        (Contender::start("read-many-s3-fifo", "many", count, "s3-fifo", None)?, None),
    ];
    #[cfg(feature = "peers")]
    {
        peers.push((cached(count, allowed)?, Some(1.0 / 1.8)));
        if skipped.is_none() {
            peers.push((mapped(count, allowed)?, Some(1.0 / 1.3)));
        }
    }
    #[cfg(not(feature = "peers"))]
    let skipped = skipped.or(Some("built without the feature `peers`".into()));
    let sides = peers.len() + 1;
    for round in 0..rounds {
        for turn in 0..sides {
            let nth = (turn + round) % sides;
            let peer = nth.checked_sub(1).map(|nth| &mut peers[nth].0);
            peer.unwrap_or(&mut many).round(round as u64)?;
        }
    }
    many.describe()?;
    for (peer, bar) in &peers {
        peer.describe()?;
        for (nth, unit) in ["ns", "ns CPU"].into_iter().enumerate() {
            let what =
                format!("sets of {SET} of {count} objects of {LEN} bytes, zipf 1.0, {TASKS} tasks");
            let ours = &many.rounds[nth];
            let theirs = &peer.rounds[nth];
            let bar = bar.filter(|_| nth == 0);
            report.add(&Bar { id: "P13", what, unit, ours, peer: &peer.name, theirs, bar });
        }
    }
    if let Some(why) = skipped {
        report.skipped("P13", "a mapped file, read by `spawn_blocking`", &why);
    }
    Ok(())
}

/// The best of foyer's configurations, with as much memory for objects as makes this much in all.
#[cfg(feature = "peers")]
fn cached(count: usize, allowed: f64) -> anyhow::Result<Contender> {
    let start = |configuration: &str, capacity: f64| {
        let name = format!("foyer-{configuration}");
        Contender::start(&name, "foyer", count, &format!("{capacity:.0} {configuration}"), None)
    };
    let first = budget_bytes(count) as f64;
    // Each has the same chance: the first one is nearer to what is allowed already.
    let mut capacity = fitting(first, &start(crate::cached::CONFIGURATIONS[0], first)?, allowed);
    let mut took = Vec::new();
    for configuration in crate::cached::CONFIGURATIONS {
        let mut contender = start(configuration, capacity)?;
        let (wall, _) = contender.round(0)?;
        contender.describe()?;
        took.push((wall, configuration));
        // The next one, and the best in the end, begin nearer to what is allowed.
        capacity = fitting(capacity, &contender, allowed);
    }
    let least = took.iter().min_by(|a, b| a.0.total_cmp(&b.0)).context("a configuration")?;
    let mut contender = start(least.1, capacity)?;
    for _ in 0..3 {
        if (contender.side.resident_bytes / allowed - 1.0).abs() < 0.02 {
            break;
        }
        capacity = fitting(capacity, &contender, allowed);
        drop(contender);
        contender = start(least.1, capacity)?;
    }
    println!("P13 foyer: {capacity:.0} bytes for objects make {allowed:.0} in all, about");
    Ok(contender)
}

/// How much memory for objects would make `allowed` bytes in all, where this much makes what the
/// contender takes: every object has some bytes beside its own.
#[cfg(feature = "peers")]
fn fitting(capacity: f64, contender: &Contender, allowed: f64) -> f64 {
    (capacity + (allowed - contender.side.resident_bytes) / 1.2).max(allowed / 20.0)
}

/// A mapped file in a group of this much memory in all.
#[cfg(feature = "peers")]
fn mapped(count: usize, allowed: f64) -> anyhow::Result<Contender> {
    let group = Group::new(Some(allowed as u64)).map_err(anyhow::Error::msg)?;
    Contender::start("mapped-file", "mapped", count, "", Some(group))
}

/// How many objects a child process is to load.
const CHILD: &str = "VMEM_BENCH_P14_CHILD";

pub(crate) fn p14(report: &mut Report, count: usize) -> anyhow::Result<()> {
    let child = std::process::Command::new(std::env::current_exe()?)
        .env(CHILD, count.to_string())
        .output()?;
    anyhow::ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    let printed = String::from_utf8(child.stdout)?;
    let mut figures = printed.split_whitespace().map(str::parse);
    let mut figure = || figures.next().unwrap_or(Ok(f64::NAN));
    let resident = figure()?;
    let allowed = figure()?;
    let ours = Rounds(vec![resident]);
    let theirs = Rounds(vec![allowed]);
    let what = format!("resident memory with {count} objects of {LEN} bytes after {SETS} sets");
    let id = "P14";
    let unit = "bytes";
    let peer = "budget-160-B-an-object-48-MiB";
    let bar = Some(1.05);
    report.add(&Bar { id, what, unit, ours: &ours, peer, theirs: &theirs, bar });
    Ok(())
}

/// Loads a table and tells what is resident, or plays a side of P13, if this is the child process.
/// True if it was.
pub(crate) fn child() -> anyhow::Result<bool> {
    if let Some(role) = side::role()? {
        let argument = |nth: usize| role.get(nth).map(String::as_str).context("an argument");
        let count = argument(1)?.parse()?;
        let directory = Path::new(argument(2)?);
        runtime()?.block_on(async {
            match argument(0)? {
                #[cfg(feature = "peers")]
                "foyer" => {
                    let capacity = argument(3)?.parse()?;
                    let configuration = argument(4)?;
                    let cached =
                        crate::cached::Cached::with(count, directory, capacity, configuration);
                    side::serve(cached.await?, count).await
                }
                #[cfg(feature = "peers")]
                "mapped" => {
                    let mapped = crate::mapped::Mapped::with(count, directory)?;
                    side::serve(mapped, count).await
                }
                name => {
                    let policy = argument(3)?.parse()?;
                    let table = Table::with(count, directory, name == "joined", policy);
                    side::serve(table.await?, count).await
                }
            }
        })?;
        return Ok(true);
    }
    let Ok(count) = std::env::var(CHILD) else { return Ok(false) };
    let count: usize = count.parse()?;
    let place = tempfile::tempdir()?;
    runtime()?.block_on(async {
        let table = Table::with(count, place.path(), false, PolicyKind::default()).await?;
        side::round(&table, count, SETS, 1).await?;
        let each = METADATA + HANDLE as f64;
        let allowed = budget_bytes(count) as f64 + each * count as f64 + CONSTANT;
        println!("{} {allowed}", resident_bytes()?);
        Ok(true)
    })
}
