//! Every operation at random, from many tasks, over the real disk driver and the CUDA tier with two
//! emulated devices, with a fifth of the futures dropped at random moments: no wrong byte, never
//! above a budget, no lease or pin on the other device, nothing left at the end.
//!
//! There is a test for each time of writing back what leases wrote. `VMEM_STRESS_SECONDS` sets how
//! long all of them take together (20 by default), `VMEM_SEED` which choices they make.

#![allow(missing_docs, unsafe_code, clippy::unwrap_used, reason = "a test that calls the driver")]

mod leases;
mod object;
mod pieces;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::gpu::cudarc::driver::CudaContext;
use vmem::{GpuSelection, MemoryTier, VirtualMemoryConfig, WriteBack};
use vmem_cuda_emulator::Emulator;
use vmem_testkit::Seed;

use object::Object;
use worker::Worker;

const TASKS: u64 = 16;
const OBJECTS_PER_TASK: usize = 12;
const HOST_CAPACITY: u64 = 12 << 20;
const DEVICES: usize = 2;
/// Of each device, in bytes.
const VRAM_CAPACITY: u64 = 4 << 20;

fn random_len(rng: &mut SmallRng) -> usize {
    match rng.random_range(0..20) {
        0..=7 => rng.random_range(1..=4096),
        8..=13 => rng.random_range(1..=65_536),
        14..=18 => rng.random_range(65_537..=300_000),
        _ => rng.random_range(300_000..=2 << 20),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_at_random_written_back_eagerly() {
    every_operation_at_random(WriteBack::Eager).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_at_random_written_back_soon() {
    every_operation_at_random(WriteBack::After(Duration::from_millis(2))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_at_random_written_back_on_eviction() {
    every_operation_at_random(WriteBack::OnEvict).await;
}

/// A third of the time, since there are three of them.
async fn every_operation_at_random(write_back: WriteBack) {
    let seconds: f64 =
        std::env::var("VMEM_STRESS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20.0);
    let seed = Seed::from_env_or(|| 7).value();
    println!("VMEM_SEED={seed} VMEM_STRESS_SECONDS={seconds}, {write_back:?}");
    let emulator = Emulator::load().expect("the emulated driver");
    emulator.devices(DEVICES as u32);
    let tiers = [0, 1].map(MemoryTier::of_device);
    let config = VirtualMemoryConfig::builder()
        .gpus([GpuSelection::Device(0), GpuSelection::Device(1)])
        .vram_capacity(VRAM_CAPACITY)
        .write_back(write_back)
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(HOST_CAPACITY)
        .disk_capacity(512 << 20)
        .wait_timeout(Duration::from_secs(5))
        .build()
        .expect("valid");
    let vmem = vmem::open(config).await.expect("opens");
    assert_eq!(vmem.capabilities().devices.len(), DEVICES);
    let contexts = [0, 1].map(|gpu| CudaContext::new(gpu).unwrap());
    let everybody = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let operations = Arc::new(AtomicU64::new(0));
    let dropped = Arc::new(AtomicU64::new(0));
    let leases = Arc::new([const { AtomicU64::new(0) }; DEVICES]);
    let pieces = Arc::new([const { AtomicU64::new(0) }; 2]);
    let mut workers = Vec::new();
    for task in 0..TASKS {
        let mut rng = SmallRng::seed_from_u64(seed << 8 | task);
        let mut mine = Vec::new();
        for _ in 0..OBJECTS_PER_TASK {
            let len = random_len(&mut rng);
            let handle = vmem.allocate(len, MemoryTier::Host).await.expect("space");
            mine.push(Object::new(handle, rng.random()));
        }
        everybody.lock().extend(mine.iter().cloned());
        let everybody = everybody.clone();
        let operations = operations.clone();
        let dropped = dropped.clone();
        let streams = contexts.each_ref().map(|context| context.new_stream().unwrap());
        let leases = leases.clone();
        let pieces = pieces.clone();
        let vmem = vmem.clone();
        workers.push(Worker {
            vmem,
            tiers,
            streams,
            rng,
            mine,
            everybody,
            operations,
            dropped,
            leases,
            pieces,
        });
    }
    let stop = Arc::new(AtomicBool::new(false));
    let until = Instant::now() + Duration::from_secs_f64(seconds / 3.0);
    let tasks: Vec<_> = workers
        .into_iter()
        .map(|mut worker| {
            let stop = stop.clone();
            tokio::spawn(async move {
                while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                    worker.step().await;
                }
            })
        })
        .collect();
    let watch = async {
        let mut peak = 0;
        while Instant::now() < until {
            let stats = vmem.stats();
            assert!(stats.host.used_bytes <= stats.host.capacity_bytes, "{stats:?}");
            assert!(stats.disk.used_bytes <= stats.disk.capacity_bytes, "{stats:?}");
            for tier in tiers {
                let stats = vmem.tier_stats(tier);
                assert!(stats.used_bytes <= stats.capacity_bytes, "{tier}: {stats:?}");
            }
            peak = peak.max(stats.host.used_bytes);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        peak
    };
    let peak = watch.await;
    for task in tasks {
        if let Err(panic) = task.await {
            stop.store(true, Ordering::Relaxed);
            std::panic::resume_unwind(panic.into_panic());
        }
    }
    println!(
        "{} operations, {} dropped, {leases:?} leases read, {pieces:?} pieces gathered and \
         scattered, peak {peak} of {}, {:?}",
        operations.load(Ordering::Relaxed),
        dropped.load(Ordering::Relaxed),
        vmem.stats().host.capacity_bytes,
        vmem.stats()
    );
    everybody.lock().clear();
    let gone = |stats: &vmem::VirtualMemoryStats| {
        let devices = tiers.map(|tier| vmem.tier_stats(tier).used_bytes);
        let used = [stats.host.used_bytes, stats.disk.used_bytes];
        (used, devices) == ([0; 2], [0; 2]) && stats.objects == 0
    };
    for _ in 0..200 {
        if gone(&vmem.stats()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let stats = vmem.stats();
    assert!(gone(&stats), "left behind: {stats:#?}");
    assert_eq!((stats.held_bytes, stats.pinned_bytes, stats.dirty_bytes), (0, 0, 0), "{stats:#?}");
    assert_eq!(stats.vram_dirty_bytes, 0, "{stats:#?}");
    assert_eq!(stats.migrations_in_flight, 0);
    assert!(stats.host_to_vram_bytes > 0 && stats.vram_to_host_bytes > 0, "{stats:#?}");
    for (tier, leases) in tiers.into_iter().zip(&*leases) {
        assert!(vmem.tier_stats(tier).hits > 0 && leases.load(Ordering::Relaxed) > 0, "{tier}");
    }
    assert!(pieces.iter().all(|count| count.load(Ordering::Relaxed) > 0), "{pieces:?}");
    vmem.close().await.expect("closes");
    assert_eq!(emulator.violations(), [""; 0]);
    assert_eq!(emulator.counter("device_bytes"), 0);
}
