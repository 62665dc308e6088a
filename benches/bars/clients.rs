//! `clients`: others beside 400 clients that do not read what they asked for.
//!
//! The others are 16 tasks that read objects of 32 KiB, of which a quarter fits into host memory,
//! as fast as they are served. The same tasks without the clients are the peer, in turns. The
//! clients have readers of objects of 1 MiB, of which they have taken the first bytes, or whole
//! objects, which they keep: as bytes lie in the buffer of a connection whose peer is slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::io::AsyncReadExt;
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, JoinSet};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds};

const CLIENTS: usize = 400;
const LARGE: usize = 1 << 20;
const LARGE_COUNT: usize = 128;
const SMALL: usize = 32 * 1024;
const SMALL_COUNT: usize = 8192;
const OTHERS: u64 = 16;
const HOST: u64 = 64 << 20;

/// What the clients do.
#[derive(Clone, Copy, Debug)]
enum Habit {
    Stream,
    Whole,
}

struct World {
    vmem: VirtualMemory,
    small: Arc<[VMemHandle]>,
    large: Vec<VMemHandle>,
}

pub(crate) fn clients(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let world = runtime.block_on(world(&place.path().join("store")))?;
    for habit in [Habit::Stream, Habit::Whole] {
        let [mut median, mut tail]: [[Rounds; 2]; 2] = Default::default();
        // The first round warms up.
        for round in 0..=rounds {
            for (side, with) in [true, false].into_iter().enumerate() {
                let clients = if with { CLIENTS } else { 0 };
                let mut times = runtime.block_on(world.round(habit, clients))?;
                times.sort_unstable();
                if round > 0 {
                    let part = |of: usize| times[times.len() * of / 100].as_nanos() as f64;
                    median[side].0.push(part(50));
                    tail[side].0.push(part(99));
                }
            }
        }
        let what = match habit {
            Habit::Stream => "with a reader each",
            Habit::Whole => "with 1 MiB each, or waiting for it",
        };
        for (unit, [ours, theirs], bar) in [("ns p50", median, None), ("ns p99", tail, Some(2.0))] {
            let what = format!("reads of 32 KiB beside {CLIENTS} idle clients {what}");
            report.add(&Bar {
                id: "clients",
                what,
                unit,
                ours: &ours,
                peer: "without",
                theirs: &theirs,
                bar,
            });
        }
    }
    runtime.block_on(async move {
        let World { vmem, small, large } = world;
        drop((small, large));
        vmem.close().await
    })?;
    Ok(())
}

async fn world(path: &std::path::Path) -> anyhow::Result<World> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(path)
        .host_capacity(HOST)
        .disk_capacity(1 << 30)
        .max_held(0.8)
        .build()?;
    let vmem = vmem::open(config).await?;
    let mut small = Vec::new();
    for nth in 0..SMALL_COUNT {
        small.push(vmem.put(vec![nth as u8; SMALL], MemoryTier::Disk).await?);
    }
    let mut large = Vec::new();
    for nth in 0..LARGE_COUNT {
        large.push(vmem.put(vec![nth as u8; LARGE], MemoryTier::Disk).await?);
    }
    Ok(World { vmem, small: small.into(), large })
}

impl World {
    /// What each read of the others took.
    async fn round(&self, habit: Habit, clients: usize) -> anyhow::Result<Vec<Duration>> {
        let idle: Vec<JoinHandle<()>> = (0..clients)
            .map(|nth| self.client(habit, self.large[nth % LARGE_COUNT].clone()))
            .collect();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let ended = Arc::new(AtomicBool::new(false));
        let mut others = JoinSet::new();
        for nth in 0..OTHERS {
            others.spawn(other(self.vmem.clone(), self.small.clone(), nth, ended.clone()));
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        ended.store(true, Ordering::Relaxed);
        let mut times = Vec::new();
        while let Some(of_one) = others.join_next().await {
            times.extend(of_one??);
        }
        for client in idle {
            client.abort();
            drop(client.await);
        }
        anyhow::ensure!(times.len() > 1000, "only {} reads", times.len());
        Ok(times)
    }

    fn client(&self, habit: Habit, handle: VMemHandle) -> JoinHandle<()> {
        let vmem = self.vmem.clone();
        tokio::spawn(async move {
            match habit {
                Habit::Stream => {
                    let mut reader = vmem.reader(&handle, ..);
                    let mut first = [0; 100];
                    reader.read_exact(&mut first).await.expect("the first byte is there");
                    std::future::pending::<()>().await;
                    drop(reader);
                }
                Habit::Whole => {
                    // One that finds no space until its deadline asks again, as clients do.
                    let mut kept = vmem.read(&handle).await;
                    while kept.is_err() {
                        kept = vmem.read(&handle).await;
                    }
                    std::future::pending::<()>().await;
                    drop(kept);
                }
            }
        })
    }
}

/// Reads until the round has ended, and checks what it read.
async fn other(
    vmem: VirtualMemory,
    small: Arc<[VMemHandle]>,
    seed: u64,
    ended: Arc<AtomicBool>,
) -> anyhow::Result<Vec<Duration>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut times = Vec::new();
    while !ended.load(Ordering::Relaxed) {
        let nth = rng.random_range(0..small.len());
        let began = Instant::now();
        let bytes = vmem.read(&small[nth]).await?;
        times.push(began.elapsed());
        anyhow::ensure!(bytes[SMALL / 2] == nth as u8, "object {nth} has other bytes");
    }
    Ok(times)
}
