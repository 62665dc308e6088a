//! P4: reads of data that is ten times as large as host memory, some of it far hotter than the
//! rest.
//!
//! 16 tasks read objects chosen by Zipf's law with exponent 0.99, from 2 GiB of which a tenth fits
//! into host memory; quick, from 256 MiB. Each value is checked by its first and last word. The
//! load is ours alone so far: it has no peer beside it. Called by `watched` too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Zipf};
use tokio::runtime::{Builder, Runtime};
use vmem::{
    MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryConfigBuilder,
};

use crate::cold::{Data, is_right};
use crate::report::{Bar, Report, Rounds, process_cpu_ns};
use crate::side::key_of;

const TASKS: u64 = 16;
const EXPONENT: f64 = 0.99;
/// Choices that a task makes before its round, and goes through again and again.
const CHOICES: usize = 1 << 16;

/// What a round cost: nanoseconds a read on the clock, with all tasks, and of CPU.
pub(crate) type Cost = (f64, f64);

/// A store under this load.
pub(crate) struct Mixed {
    pub(crate) runtime: Runtime,
    pub(crate) vmem: VirtualMemory,
    handles: Arc<Vec<VMemHandle>>,
    data: Data,
    /// Removed when the store has ended.
    _directory: tempfile::TempDir,
}

impl Mixed {
    /// A store with objects of this length, configured further.
    pub(crate) fn with(
        len: usize,
        quick: bool,
        configure: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
    ) -> anyhow::Result<Self> {
        let bytes: usize = if quick { 256 << 20 } else { 2 << 30 };
        let data = Data { len, count: bytes / len };
        let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
        std::fs::create_dir_all(place)?;
        let directory = tempfile::tempdir_in(place)?;
        let config = VirtualMemoryConfig::builder()
            .disk_path(directory.path().join("store"))
            .host_capacity(bytes as u64 / 10)
            .disk_capacity(bytes as u64 * 2);
        let config = configure(config).build()?;
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let vmem = runtime.block_on(vmem::open(config))?;
        let writers: Vec<_> = (0..TASKS as usize)
            .map(|first| {
                let vmem = vmem.clone();
                runtime.spawn(async move {
                    let mut handles = Vec::new();
                    for n in (first..data.count).step_by(TASKS as usize) {
                        handles.push((n, vmem.put(data.bytes(n), MemoryTier::Disk).await?));
                    }
                    anyhow::Ok(handles)
                })
            })
            .collect();
        let mut handles = Vec::with_capacity(data.count);
        for writer in writers {
            handles.extend(runtime.block_on(writer)??);
        }
        handles.sort_by_key(|(n, _)| *n);
        let handles = Arc::new(handles.into_iter().map(|(_, handle)| handle).collect());
        Ok(Mixed { runtime, vmem, handles, data, _directory: directory })
    }

    pub(crate) fn what(&self) -> String {
        let Data { len, count } = self.data;
        format!("{count} objects of {len} bytes, zipf {EXPONENT}, a tenth in host, {TASKS} tasks")
    }

    /// All tasks read for this long. The same seed makes the same choices.
    pub(crate) fn round(&self, long: Duration, seed: u64) -> anyhow::Result<Cost> {
        let count = self.data.count;
        let zipf = Zipf::new(count as f64, EXPONENT)?;
        let choices: Vec<Vec<usize>> = (0..TASKS)
            .map(|task| {
                let mut rng = SmallRng::seed_from_u64(seed << 8 | task);
                let rank = |_| zipf.sample(&mut rng) as usize - 1;
                (0..CHOICES).map(rank).map(|rank| key_of(rank, count)).collect()
            })
            .collect();
        let began = Instant::now();
        let cpu = process_cpu_ns();
        let readers: Vec<_> = choices
            .into_iter()
            .map(|choices| {
                let vmem = self.vmem.clone();
                let handles = self.handles.clone();
                let len = self.data.len;
                self.runtime.spawn(async move {
                    let mut reads = 0_u64;
                    for &n in choices.iter().cycle() {
                        // The clock is not read at each hit.
                        if reads.is_multiple_of(16) && began.elapsed() >= long {
                            break;
                        }
                        let bytes = vmem.read(&handles[n]).await?;
                        anyhow::ensure!(bytes.len() == len && is_right(&bytes, n), "object {n}");
                        reads += 1;
                    }
                    anyhow::Ok(reads)
                })
            })
            .collect();
        let mut reads = 0;
        for reader in readers {
            reads += self.runtime.block_on(reader)??;
        }
        let reads = reads as f64;
        Ok((began.elapsed().as_nanos() as f64 / reads, (process_cpu_ns() - cpu) / reads))
    }

    pub(crate) fn close(self) -> anyhow::Result<()> {
        drop(self.handles);
        Ok(self.runtime.block_on(self.vmem.close())?)
    }
}

/// How long a round is.
fn long(quick: bool) -> Duration {
    Duration::from_secs(if quick { 2 } else { 4 })
}

pub(crate) fn p4(report: &mut Report, quick: bool, rounds: usize) -> anyhow::Result<()> {
    for len in [4096, 65_536, 1 << 20] {
        let mixed = Mixed::with(len, quick, |config| config)?;
        let mut times = [Rounds::default(), Rounds::default()];
        for round in 0..=rounds {
            let (wall, cpu) = mixed.round(long(quick), round as u64)?;
            // The first round warms up.
            if round > 0 {
                times[0].0.push(wall);
                times[1].0.push(cpu);
            }
        }
        let rate = 1e9 / times[0].median();
        let hits = mixed.vmem.stats().hit_ratio();
        println!("P4 {}: {rate:.0} reads/s, hit ratio {hits:.3}", mixed.what());
        for (nth, unit) in ["ns", "ns CPU"].into_iter().enumerate() {
            let ours = &times[nth];
            let what = mixed.what();
            let peer = "itself";
            report.add(&Bar { id: "P4", what, unit, ours, peer, theirs: ours, bar: None });
        }
        mixed.close()?;
    }
    Ok(())
}
