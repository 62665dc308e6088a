//! Scenario 13: what the process really takes, under random work. In a child, since the
//! memory that is measured is that of the whole process.
//!
//! Excluded: budgets that hold in the ledger only, while freed pages stay, fragments add up, or
//! buffers outside of the budget hold the data. Noticed by the resident memory of the process.
//! `VMEM_BUDGET_SECONDS` sets how long (3 by default), `VMEM_SEED` which choices.

#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Builder;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::support::process::alone;
use crate::support::{DISK, HOST, KIB, MIB, is_pressure, seed};

const HOST_CAPACITY: usize = 96 * MIB;
/// Objects that exist at once are about this many bytes: several times the host budget.
const WORKING_SET: usize = 384 * MIB;
const TASKS: u64 = 8;
/// What is neither a budget nor per object: threads, their stacks, the heap's slack, the test's own
/// buffers, and what the disk driver has in flight.
const CONSTANT: usize = 24 * MIB;
/// Metadata of one handle, with much to spare.
const PER_HANDLE: usize = 2 * KIB;

pub(super) fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    // Linux on x86-64, and on aarch64 as it is usually built.
    pages * 4 * KIB
}

struct Worker {
    vmem: VirtualMemory,
    rng: SmallRng,
    objects: Vec<VMemHandle>,
    bytes: usize,
    scratch: Vec<u8>,
}

impl Worker {
    /// Sizes change from phase to phase, so that the space of one kind has to serve another.
    fn len(&mut self, phase: u64) -> usize {
        match phase % 3 {
            0 => self.rng.random_range(1..8 * KIB),
            1 => self.rng.random_range(64 * KIB..MIB),
            _ => self.rng.random_range(8 * KIB..64 * KIB),
        }
    }

    async fn step(&mut self, phase: u64) {
        let at = self.rng.random_range(0..self.objects.len().max(1));
        let kind = self.rng.random_range(0..10);
        if kind < 4 || self.objects.is_empty() {
            while self.bytes > WORKING_SET / TASKS as usize {
                let at = self.rng.random_range(0..self.objects.len());
                self.bytes -= self.objects.swap_remove(at).len();
            }
            let len = self.len(phase);
            self.scratch[..len].fill(phase as u8);
            match self.vmem.put(&self.scratch[..len], HOST).await {
                Ok(handle) => self.objects.push(handle),
                Err(error) => return assert!(is_pressure(&error), "{error}"),
            }
            self.bytes += len;
            return;
        }
        let handle = &self.objects[at];
        let outcome = match kind {
            4..=6 => self.vmem.read(handle).await.map(drop),
            7 => {
                let buf = &mut self.scratch[..handle.len()];
                self.vmem.read_into(handle, 0..handle.len(), buf).await
            }
            8 => self.vmem.write(handle, &self.scratch[..handle.len()]).await,
            _ => self.vmem.demote(handle, DISK).await,
        };
        assert!(outcome.as_ref().is_ok() || is_pressure(outcome.as_ref().unwrap_err()));
    }
}

/// Many small ones, most of which go, and then large ones, which do not fit into the holes: the
/// pages of the holes have to go back.
async fn one_kind_after_the_other(vmem: &VirtualMemory, taken: impl Fn() -> usize) {
    const SMALL: usize = 40 * KIB;
    let mut small = Vec::new();
    let data = vec![1; SMALL];
    for _ in 0..70 * MIB / SMALL {
        small.push(vmem.put(&data, HOST).await.unwrap());
    }
    let mut nth = 0;
    small.retain(|_| {
        nth += 1;
        nth % 4 == 0
    });
    let mut large = Vec::new();
    let data = vec![2; MIB];
    for _ in 0..60 {
        large.push(vmem.put(&data, HOST).await.unwrap());
    }
    let taken = taken();
    let allowed = HOST_CAPACITY + HOST_CAPACITY / 20 + CONSTANT;
    println!("{taken} bytes resident with large ones after small ones, {allowed} allowed");
    assert!(taken <= allowed, "{taken} bytes resident, {allowed} allowed: {:?}", vmem.stats());
}

#[test]
fn scenario_13_resident_memory_within_the_budgets() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let test = "scenario_13_resident_memory_within_the_budgets";
    alone(module_path!(), test, || runtime.block_on(work_at_random()));
}

async fn work_at_random() {
    let seconds = std::env::var("VMEM_BUDGET_SECONDS").ok().and_then(|s| s.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(3));
    let mut rng = SmallRng::seed_from_u64(seed());
    let config = VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(HOST_CAPACITY as u64)
        .disk_capacity(2 * WORKING_SET as u64)
        .wait_timeout(Duration::from_secs(10))
        .build()
        .unwrap();
    let vmem = vmem::open(config).await.unwrap();
    if vmem.capabilities().disk_is_tmpfs {
        // Its pages are not mapped here, so they do not count as resident memory of the process.
        println!("the disk tier is in memory");
    }
    let before = resident_bytes();
    let taken = || resident_bytes().saturating_sub(before);
    one_kind_after_the_other(&vmem, taken).await;
    let stop = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let rng = SmallRng::seed_from_u64(rng.random());
            let objects = Vec::new();
            let scratch = vec![0; MIB];
            let mut worker = Worker { vmem: vmem.clone(), rng, objects, bytes: 0, scratch };
            let stop = stop.clone();
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let phase = began.elapsed().as_millis() as u64 / 400;
                    worker.step(phase).await;
                }
            })
        })
        .collect();
    let mut most = 0;
    let mut peak_objects = 0;
    while Instant::now() < until {
        let stats = vmem.stats();
        assert!(stats.host.used_bytes <= stats.host.capacity_bytes, "{stats:?}");
        let budget = HOST_CAPACITY + HOST_CAPACITY / 20;
        peak_objects = peak_objects.max(stats.objects as usize);
        let allowed = budget + peak_objects * PER_HANDLE + CONSTANT;
        let taken = taken();
        assert!(taken <= allowed, "{taken} bytes resident, {allowed} allowed: {stats:?}");
        most = most.max(taken);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let stats = vmem.stats();
    println!("{most} bytes resident at most, host budget {HOST_CAPACITY}, {stats:?}");
    assert!(stats.host.peak_bytes <= stats.host.capacity_bytes);
    assert!(stats.host.peak_bytes * 10 > stats.host.capacity_bytes * 8, "there was pressure");
    assert!(stats.evictions > 1000, "{stats:?}");
    vmem.close().await.unwrap();
}
