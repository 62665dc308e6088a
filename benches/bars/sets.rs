//! Sets: `read_many` beside as many reads that are joined.
//!
//! Both sides read the same sets of the same store, in turns; promotion is off, so what is on disk
//! stays there. The wall time of a set is quoted, and the CPU time of the process.

use std::time::Instant;

use futures::future::join_all;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tokio::runtime::Builder;
use vmem::{MemoryTier, Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds, process_cpu_ns};

/// Objects of one set.
const SET: usize = 32;

/// Where the objects of a set are.
#[derive(Clone, Copy, Debug)]
enum Where {
    /// All in host memory.
    Host,
    /// One of them on disk.
    OneOnDisk,
    /// All on disk.
    Disk,
}

struct Store {
    vmem: VirtualMemory,
    host: Vec<VMemHandle>,
    disk: Vec<VMemHandle>,
}

/// What one side took for its sets: nanoseconds of a set on the clock, and of CPU.
type Cost = (f64, f64);

impl Store {
    fn set(&self, place: Where, rng: &mut SmallRng) -> Vec<VMemHandle> {
        let on_disk = match place {
            Where::Host => 0,
            Where::OneOnDisk => 1,
            Where::Disk => SET,
        };
        let some = |from: &[VMemHandle], count: usize, rng: &mut SmallRng| {
            let at = rng.random_range(0..from.len() - SET);
            from[at..at + count].to_vec()
        };
        let mut set = some(&self.disk, on_disk, rng);
        set.extend(some(&self.host, SET - on_disk, rng));
        set.shuffle(rng);
        set
    }

    async fn round(&self, sets: &[Vec<VMemHandle>], joined: bool) -> anyhow::Result<Cost> {
        let began = Instant::now();
        let cpu = process_cpu_ns();
        for set in sets {
            let read = if joined {
                let reads = join_all(set.iter().map(|handle| self.vmem.read(handle))).await;
                reads.into_iter().collect::<Result<Vec<_>, _>>()?
            } else {
                self.vmem.read_many(set).await?
            };
            anyhow::ensure!(read.len() == SET, "{} objects of a set", read.len());
        }
        let count = sets.len() as f64;
        Ok((began.elapsed().as_nanos() as f64 / count, (process_cpu_ns() - cpu) / count))
    }
}

/// Sets of objects of some lengths, in each place, on one thread and on two.
pub(crate) fn sets(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    for threads in [1, 2] {
        for len in [4096, 65_536] {
            let mut builder = match threads {
                1 => Builder::new_current_thread(),
                _ => Builder::new_multi_thread(),
            };
            let runtime = builder.enable_all().build()?;
            runtime.block_on(of_length(report, rounds, threads, len))?;
        }
    }
    Ok(())
}

async fn of_length(
    report: &mut Report,
    rounds: usize,
    threads: usize,
    len: usize,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory.path())
        .host_capacity(128 << 20)
        .disk_capacity(1 << 30)
        .promotion(Promotion::Never)
        .build()?;
    let vmem = vmem::open(config).await?;
    let mut host = Vec::new();
    let mut disk = Vec::new();
    for n in 0..256 {
        host.push(vmem.put(vec![n as u8; len], MemoryTier::Host).await?);
    }
    for n in 0..1024 {
        disk.push(vmem.put(vec![n as u8; len], MemoryTier::Disk).await?);
    }
    let store = Store { vmem, host, disk };
    for (place, count) in [(Where::Host, 4_000), (Where::OneOnDisk, 400), (Where::Disk, 200)] {
        let mut sides = [[Rounds::default(), Rounds::default()], Default::default()];
        for round in 0..=rounds {
            let mut rng = SmallRng::seed_from_u64(round as u64);
            let sets: Vec<_> = (0..count).map(|_| store.set(place, &mut rng)).collect();
            for side in [round % 2, 1 - round % 2] {
                let (took, cpu) = store.round(&sets, side == 1).await?;
                // The first round warms up.
                if round > 0 {
                    sides[side][0].0.push(took);
                    sides[side][1].0.push(cpu);
                }
            }
        }
        let [many, joined] = &sides;
        for (nth, unit) in ["ns", "ns CPU"].into_iter().enumerate() {
            let what = format!("{SET} of {len} bytes, {place:?}, {threads} threads");
            let ours = &many[nth];
            let theirs = &joined[nth];
            report.add(&Bar {
                id: "sets",
                what,
                unit,
                ours,
                peer: "reads-joined",
                theirs,
                bar: Some(1.0),
            });
        }
    }
    store.vmem.close().await?;
    Ok(())
}
