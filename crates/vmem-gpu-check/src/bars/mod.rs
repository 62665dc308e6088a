//! The figures of the VRAM tier, each beside what it is compared with, in one run.
//!
//! Invariant: what is timed is compared byte for byte, outside of the timed part, and a figure is
//! taken on a card only. Called by `parts`.
//!
//! # Layout
//!
//! - `g1` to `g6`: the bars. G1: the link. G2: disk to device. G3: the end of work on the device.
//!   G4: a model larger than device memory. G5: random access. G6: many pieces.
//! - `pages`: device memory as pages against one block, and what it costs to map them.
//! - `step`: what leases cost the thread that launches. `crossover`: from which lengths and counts
//!   on which call copies quickest. `write_back`: what it costs to copy down what kernels wrote.
//! - `timing`: contenders in turn, medians, spreads.
//! - `report`: what a bar found, and whether it holds.
//! - `raw`: what a user writes by hand on the driver; all unsafe code of the bars.
//! - `pump`: copies by hand, a fixed number in flight.

mod crossover;
mod g1;
mod g2;
mod g3;
mod g4;
mod g5;
mod g6;
mod pages;
mod pump;
mod raw;
mod report;
mod step;
mod timing;
mod write_back;

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use tokio::runtime::Runtime;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder};

use crate::parts::{On, Part};
use crate::user::{Env, User};
use raw::Reader;
use report::Report;

const VRAM: MemoryTier = MemoryTier::Vram;
const HOST: MemoryTier = MemoryTier::Host;
const DISK: MemoryTier = MemoryTier::Disk;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// Tasks among which a user divides concurrent work.
const TASKS: usize = 4;
/// The bytes of one object begin this far behind those of another, in what is random.
const SHIFT: usize = 64;

pub(crate) fn parts() -> Vec<Part> {
    let part = |name, run, about| Part { name, about, on: On::Both, run };
    vec![
        part("bar-g1", g1::run, "host to device and back, against copies by hand"),
        part("bar-g2", g2::run, "disk to device, against the disk and the link by hand"),
        part("bar-g3", g3::run, "the end of work on the device to the task that waits for it"),
        part("bar-g4", g4::run, "a model larger than device memory, its layers prefetched"),
        part("bar-g5", g5::run, "random access by kernels, against a cache by hand"),
        part(
            "bar-g6",
            g6::run,
            "many pieces into one buffer, against batches, kernels and packing",
        ),
        part("bar-pages", pages::run, "device memory as pages, against a block"),
        Part {
            on: On::Within,
            ..part("opened-tier", pages::opened_tier, "how long a tier takes to open")
        },
        part("cost-step", step::run, "what leases cost the thread that launches kernels"),
        part("cost-crossover", crossover::run, "small copies by a kernel, a batch, one by one"),
        part("cost-write-back", write_back::run, "copies of what kernels wrote to host memory"),
    ]
}

/// A store, on a runtime of its own that stays while others take their turns.
struct Bench {
    vmem: VirtualMemory,
    runtime: Runtime,
}

impl Bench {
    fn open(
        env: &Env,
        vram: usize,
        host: usize,
        set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
    ) -> Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(TASKS).enable_all().build().context("a runtime")?;
        let vmem = runtime.block_on(env.store(vram, host, set))?;
        Ok(Bench { vmem, runtime })
    }

    fn run<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(work)
    }

    /// Compares all bytes of each object, those first that are in device memory: they are what was
    /// timed.
    fn compare_whole(
        &self,
        user: &User,
        handles: &[VMemHandle],
        data: &Data,
        report: &mut Report,
    ) -> Result<()> {
        let longest = handles.iter().map(VMemHandle::len).max().unwrap_or(0);
        let mut reader = Reader::new(user, longest)?;
        let mut first = Vec::new();
        let mut rest = Vec::new();
        for (object, handle) in handles.iter().enumerate() {
            let there = self.vmem.residency(handle)?.vram;
            if there { first.push(object) } else { rest.push(object) }
        }
        ensure!(!first.is_empty(), "nothing that was timed is in device memory");
        self.run(async {
            for object in first.into_iter().chain(rest) {
                let handle = &handles[object];
                let found = reader.leased(&self.vmem, handle).await?;
                report.same("an object in device memory", found, data.of(object, handle.len()))?;
            }
            Ok(())
        })
    }

    fn close(self) -> Result<()> {
        self.runtime.block_on(self.vmem.close()).context("closing")?;
        self.runtime.shutdown_timeout(Duration::from_secs(20));
        Ok(())
    }
}

/// Does something with each of these, `at_once` at a time, on a few tasks.
async fn each<T, F, Done>(items: Vec<T>, at_once: usize, work: F) -> Result<()>
where
    T: Send + 'static,
    F: Fn(T) -> Done + Clone + Send + 'static,
    Done: Future<Output = Result<()>> + Send + 'static,
{
    let count = TASKS.min(at_once);
    let mut shares: Vec<Vec<T>> = (0..count).map(|_| Vec::new()).collect();
    for (at, item) in items.into_iter().enumerate() {
        shares[at % count].push(item);
    }
    let mut tasks = Vec::new();
    for share in shares {
        let work = work.clone();
        tasks.push(tokio::spawn(async move {
            let works = futures::stream::iter(share).map(work);
            let mut works = works.buffer_unordered(at_once / count);
            while let Some(done) = works.next().await {
                done?;
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await.context("a task panicked")??;
    }
    Ok(())
}

/// Random bytes, of which each object has some that begin elsewhere: no generator is timed, and
/// none is mistaken for another.
struct Data(Vec<u8>);

impl Data {
    /// For this many objects, of at most `len` bytes.
    fn new(env: &Env, objects: usize, len: usize) -> Self {
        let mut bytes = vec![0; objects * SHIFT + len];
        rand::RngCore::fill_bytes(&mut env.rng(), &mut bytes);
        Data(bytes)
    }

    fn of(&self, object: usize, len: usize) -> &[u8] {
        &self.0[object * SHIFT..][..len]
    }
}

/// In an order that says nothing.
fn shuffle<T>(env: &Env, items: &mut [T]) {
    rand::seq::SliceRandom::shuffle(items, &mut env.rng());
}
