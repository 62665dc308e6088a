//! P13 and P14: a table of a million embeddings, ten times as large as its budget, read in sets.
//!
//! 64 tasks read sets of 32, chosen by Zipf's law, by `read_many` and by reads that are joined: one
//! store each, in turns, with the same choices and a warm-up of each. Every object is checked.
//! Resident memory is that of a process of its own, after the load.

use std::sync::Arc;
use std::time::Instant;

use futures::future::join_all;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Zipf};
use tokio::runtime::{Builder, Runtime};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::metadata::resident_bytes;
use crate::report::{Bar, Report, Rounds, process_cpu_ns};

const LEN: usize = 1536;
const SET: usize = 32;
const TASKS: usize = 64;

/// What one handle takes in the caller's own vector.
const HANDLE: usize = size_of::<VMemHandle>();
/// What a handle may take in the store.
const METADATA: f64 = 160.0;
/// Everything that does not grow with the load: the program, its threads, the catalog's cache,
/// buffers of the drivers.
const CONSTANT: f64 = 48.0 * (1 << 20) as f64;

struct Table {
    vmem: VirtualMemory,
    handles: Arc<Vec<VMemHandle>>,
    budget: u64,
}

impl Table {
    async fn with(count: usize) -> anyhow::Result<Self> {
        let budget = (count * LEN / 10) as u64;
        let config = VirtualMemoryConfig::builder()
            .host_capacity(budget)
            .disk_capacity((count * 2 * LEN) as u64 + (64 << 20))
            .build()?;
        let vmem = vmem::open(config).await?;
        let mut handles = Vec::with_capacity(count);
        for n in 0..count {
            let mut bytes = [n as u8; LEN];
            bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
            handles.push(vmem.put(bytes, MemoryTier::Host).await?);
        }
        Ok(Table { vmem, handles: Arc::new(handles), budget })
    }

    /// Nanoseconds of a set: on the clock with all tasks, and of CPU.
    async fn round(&self, sets: usize, seed: u64, joined: bool) -> anyhow::Result<(f64, f64)> {
        let began = Instant::now();
        let cpu = process_cpu_ns();
        let tasks = (0..TASKS).map(|task| {
            let vmem = self.vmem.clone();
            let handles = self.handles.clone();
            let rng = SmallRng::seed_from_u64(seed << 8 | task as u64);
            tokio::spawn(read_sets(vmem, handles, rng, sets / TASKS, joined))
        });
        for task in join_all(tasks).await {
            task??;
        }
        let sets = (sets / TASKS * TASKS) as f64;
        Ok((began.elapsed().as_nanos() as f64 / sets, (process_cpu_ns() - cpu) / sets))
    }
}

async fn read_sets(
    vmem: VirtualMemory,
    handles: Arc<Vec<VMemHandle>>,
    mut rng: SmallRng,
    sets: usize,
    joined: bool,
) -> anyhow::Result<()> {
    let zipf = Zipf::new(handles.len() as f64, 1.0)?;
    for _ in 0..sets {
        let chosen: Vec<usize> = (0..SET).map(|_| zipf.sample(&mut rng) as usize - 1).collect();
        let set = chosen.iter().map(|&n| &handles[n]);
        let read = if joined {
            let reads = join_all(set.map(|handle| vmem.read(handle))).await;
            reads.into_iter().collect::<Result<Vec<_>, _>>()?
        } else {
            vmem.read_many(set).await?
        };
        for (n, bytes) in chosen.iter().zip(&read) {
            anyhow::ensure!(bytes[..8] == (*n as u64).to_le_bytes(), "object {n}");
        }
    }
    Ok(())
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

pub(crate) fn p13(report: &mut Report, count: usize, rounds: usize) -> anyhow::Result<()> {
    const SETS: usize = 6_400;
    runtime()?.block_on(async {
        let tables = [Table::with(count).await?, Table::with(count).await?];
        let mut sides: [[Rounds; 2]; 2] = Default::default();
        for round in 0..=rounds {
            for side in [round % 2, 1 - round % 2] {
                let cost = tables[side].round(SETS, round as u64, side == 1).await?;
                if round > 0 {
                    sides[side][0].0.push(cost.0);
                    sides[side][1].0.push(cost.1);
                }
            }
        }
        let [many, joined] = &sides;
        for (nth, unit) in ["ns", "ns CPU"].into_iter().enumerate() {
            let what =
                format!("sets of {SET} of {count} objects of {LEN} bytes, zipf 1.0, {TASKS} tasks");
            let ours = &many[nth];
            let theirs = &joined[nth];
            let bar = (nth == 0).then_some(1.0 / 1.2);
            report.add(&Bar { id: "P13", what, unit, ours, peer: "reads-joined", theirs, bar });
        }
        for table in &tables {
            println!("P13 hit ratio {:.3}", table.vmem.stats().hit_ratio());
        }
        anyhow::Ok(())
    })
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
    let what = format!("resident memory with {count} objects of {LEN} bytes after 6,400 sets");
    report.add(&Bar {
        id: "P14",
        what,
        unit: "bytes",
        ours: &ours,
        peer: "budget-160-B-an-object-48-MiB",
        theirs: &theirs,
        bar: Some(1.05),
    });
    Ok(())
}

/// Loads a table and tells what is resident, if this is the child process. True if it was.
pub(crate) fn child() -> anyhow::Result<bool> {
    let Ok(count) = std::env::var(CHILD) else { return Ok(false) };
    let count: usize = count.parse()?;
    runtime()?.block_on(async {
        let table = Table::with(count).await?;
        table.round(6_400, 1, false).await?;
        let each = METADATA + HANDLE as f64;
        println!("{} {}", resident_bytes()?, table.budget as f64 + each * count as f64 + CONSTANT);
        Ok(true)
    })
}
