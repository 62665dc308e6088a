//! P3: reads of disk-resident objects, through the whole of `VirtualMemory::read`, over each disk
//! driver, beside a bare ring on the same kind of file.
//!
//! All sides have data of the same size and age, direct I/O where it is to be had, and check the
//! first and the last word of each object; their rounds alternate in a random order.
//! `VMEM_BENCH_DIR` names the directory of the files. Promotion is off: no read is served from
//! memory.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tokio::runtime::{Builder, Runtime};
use vmem::{IoDriver, MemoryTier, Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::raw::Raw;
use crate::report::{Bar, Report, Rounds, process_cpu_ns};

const DEPTHS: [usize; 3] = [1, 16, 64];

/// Objects that begin and end with their own number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data {
    pub(crate) len: usize,
    pub(crate) count: usize,
}

impl Data {
    pub(crate) fn bytes(&self, n: usize) -> Vec<u8> {
        let mut bytes = vec![n as u8; self.len];
        bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
        bytes[self.len - 8..].copy_from_slice(&(n as u64).to_le_bytes());
        bytes
    }
}

/// Whether these are the bytes of object `n`, by its first and last word.
pub(crate) fn is_right(bytes: &[u8], n: usize) -> bool {
    let word = (n as u64).to_le_bytes();
    bytes.starts_with(&word) && bytes.ends_with(&word)
}

/// What one round came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    reads_per_s: f64,
    p50_ns: f64,
    p99_ns: f64,
    cpu_ns: f64,
}

impl Round {
    pub(crate) fn of(mut latencies: Vec<f64>, took: Duration, cpu_ns: f64) -> Self {
        latencies.sort_by(f64::total_cmp);
        let at = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
        Round {
            reads_per_s: latencies.len() as f64 / took.as_secs_f64(),
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            cpu_ns: cpu_ns / latencies.len() as f64,
        }
    }
}

/// A store whose objects are on disk.
struct Store {
    runtime: Runtime,
    vmem: VirtualMemory,
    handles: Arc<Vec<VMemHandle>>,
    len: usize,
}

impl Store {
    /// `None` if the driver is unavailable.
    fn with(driver: IoDriver, data: Data, directory: &Path) -> anyhow::Result<Option<Self>> {
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        let config = VirtualMemoryConfig::builder()
            .disk_path(directory.join(driver.to_string()))
            .io_driver(driver)
            .host_capacity(192 << 20)
            .disk_capacity(2 << 30)
            .promotion(Promotion::Never)
            .build()?;
        let vmem = match runtime.block_on(vmem::open(config)) {
            Ok(vmem) => vmem,
            Err(error) => {
                println!("SKIPPED P3 over {driver}: {error}");
                return Ok(None);
            }
        };
        println!("P3 {}", vmem.capabilities().disk);
        let writers = (0..32).map(|first| {
            let vmem = vmem.clone();
            runtime.spawn(async move {
                let mut handles = Vec::new();
                for n in (first..data.count).step_by(32) {
                    handles.push((n, vmem.put(data.bytes(n), MemoryTier::Disk).await?));
                }
                anyhow::Ok(handles)
            })
        });
        let mut handles = Vec::new();
        for writer in writers.collect::<Vec<_>>() {
            handles.extend(runtime.block_on(writer)??);
        }
        handles.sort_by_key(|(n, _)| *n);
        let handles = Arc::new(handles.into_iter().map(|(_, handle)| handle).collect());
        Ok(Some(Store { runtime, vmem, handles, len: data.len }))
    }

    fn round(&self, depth: usize, long: Duration, seed: u64) -> anyhow::Result<Round> {
        let began = Instant::now();
        let cpu = process_cpu_ns();
        let tasks = (0..depth).map(|task| {
            let vmem = self.vmem.clone();
            let handles = self.handles.clone();
            let len = self.len;
            let mut rng = SmallRng::seed_from_u64(seed * 64 + task as u64);
            self.runtime.spawn(async move {
                let mut latencies = Vec::new();
                while began.elapsed() < long {
                    let n = rng.random_range(0..handles.len());
                    let since = Instant::now();
                    let bytes = vmem.read(&handles[n]).await?;
                    latencies.push(since.elapsed().as_nanos() as f64);
                    anyhow::ensure!(bytes.len() == len && is_right(&bytes, n), "object {n}");
                }
                anyhow::Ok(latencies)
            })
        });
        let mut latencies = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            latencies.extend(self.runtime.block_on(task)??);
        }
        Ok(Round::of(latencies, began.elapsed(), process_cpu_ns() - cpu))
    }
}

enum Side {
    Raw(Box<Raw>),
    Ours(IoDriver, Store),
}

impl Side {
    fn name(&self) -> String {
        match self {
            Side::Raw(_) => "raw ring".to_owned(),
            Side::Ours(driver, _) => driver.to_string(),
        }
    }

    fn round(&mut self, depth: usize, long: Duration, seed: u64) -> anyhow::Result<Round> {
        match self {
            Side::Raw(raw) => raw.round(depth, long, seed),
            Side::Ours(_, store) => store.round(depth, long, seed),
        }
    }
}

/// P3: reads from disk.
pub(crate) fn p3(report: &mut Report, quick: bool) -> anyhow::Result<()> {
    let place = std::env::var_os("VMEM_BENCH_DIR").map(PathBuf::from);
    let place = place.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
    let (total, rounds, long) = match quick {
        true => (128 << 20, 3, Duration::from_millis(300)),
        false => (512 << 20, 7, Duration::from_millis(1000)),
    };
    let mut table = String::new();
    for len in [4096, 65_536, 1 << 20] {
        let directory = tempfile::tempdir_in(&place)?;
        let data = Data { len, count: total / len };
        let mut sides = Vec::new();
        match Raw::with(data, directory.path()) {
            Ok(raw) => sides.push(Side::Raw(Box::new(raw))),
            Err(error) => println!("SKIPPED P3 over a raw ring: {error:#}"),
        }
        for driver in [IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking] {
            let store = Store::with(driver, data, directory.path())?;
            sides.extend(store.map(|store| Side::Ours(driver, store)));
        }
        for depth in DEPTHS {
            let results = alternate(&mut sides, depth, rounds, long)?;
            lines(report, &mut table, (len, depth), &sides, &results);
        }
    }
    println!("\n| size | depth | | reads/s | of raw | p50 us | of raw | p99 us | CPU us/read |");
    println!("|---|---|---|---|---|---|---|---|---|\n{table}");
    Ok(())
}

/// Rounds of all sides, in a new order each time; the first one warms up.
fn alternate(
    sides: &mut [Side],
    depth: usize,
    rounds: usize,
    long: Duration,
) -> anyhow::Result<Vec<Vec<Round>>> {
    let mut rng = SmallRng::seed_from_u64(depth as u64);
    let mut results = vec![Vec::new(); sides.len()];
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..sides.len()).collect();
        order.shuffle(&mut rng);
        for side in order {
            let outcome = sides[side].round(depth, long, (round * 8 + side) as u64)?;
            if round > 0 {
                results[side].push(outcome);
            }
        }
    }
    Ok(results)
}

fn lines(
    report: &mut Report,
    table: &mut String,
    (len, depth): (usize, usize),
    sides: &[Side],
    results: &[Vec<Round>],
) {
    let of =
        |rounds: &[Round], figure: fn(&Round) -> f64| Rounds(rounds.iter().map(figure).collect());
    let raw = sides.iter().position(|side| matches!(side, Side::Raw(_)));
    for (side, rounds) in sides.iter().zip(results) {
        let rate = of(rounds, |r| r.reads_per_s);
        let p50 = of(rounds, |r| r.p50_ns);
        let relative = |ours: &Rounds, figure: fn(&Round) -> f64| match raw {
            Some(raw) => {
                let theirs = of(&results[raw], figure);
                let ratios = ours.0.iter().zip(&theirs.0).map(|(ours, theirs)| ours / theirs);
                format!("{:.2}", Rounds(ratios.collect()).median())
            }
            None => "-".to_owned(),
        };
        let _infallible = writeln!(
            table,
            "| {} KiB | {depth} | {} | {:.0} | {} | {:.0} | {} | {:.0} | {:.1} |",
            len / 1024,
            side.name(),
            rate.median(),
            relative(&rate, |r| r.reads_per_s),
            p50.median() / 1e3,
            relative(&p50, |r| r.p50_ns),
            of(rounds, |r| r.p99_ns).median() / 1e3,
            of(rounds, |r| r.cpu_ns).median() / 1e3,
        );
        let (Side::Ours(driver, _), Some(raw)) = (side, raw) else { continue };
        // Rates as time for each read, so that less is better here as everywhere.
        let (what, figure, bar): (_, fn(&Round) -> f64, f64) = match depth {
            1 => ("p50 alone", |r| r.p50_ns / 1e3, 1.3),
            _ => ("time of a read, many at once", |r| 1e6 / r.reads_per_s, 1.0 / 0.9),
        };
        report.add(&Bar {
            id: "P3",
            what: format!("{driver}, {} KiB, {depth} deep: {what}", len / 1024),
            unit: "us",
            ours: &of(rounds, figure),
            peer: "raw-ring",
            theirs: &of(&results[raw], figure),
            bar: (*driver == IoDriver::Reactor).then_some(bar),
        });
    }
}
