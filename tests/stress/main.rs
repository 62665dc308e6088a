//! Every operation at random, from many tasks, over the real disk driver and the CUDA tier on an
//! emulated one, with a fifth of the futures dropped at random moments: no wrong byte, never above
//! the budget, nothing left at the end.
//!
//! `VMEM_STRESS_SECONDS` sets how long (20 by default), `VMEM_SEED` which choices.

#![allow(missing_docs, clippy::unwrap_used)]

mod object;

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{
    MemoryTier, ReadClass, ReadOptions, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_cuda_emulator::Emulator;
use vmem_testkit::Seed;

use object::Object;

const TASKS: u64 = 16;
const OBJECTS_PER_TASK: usize = 12;
const HOST_CAPACITY: u64 = 12 << 20;

fn random_len(rng: &mut SmallRng) -> usize {
    match rng.random_range(0..20) {
        0..=7 => rng.random_range(1..=4096),
        8..=13 => rng.random_range(1..=65_536),
        14..=18 => rng.random_range(65_537..=300_000),
        _ => rng.random_range(300_000..=2 << 20),
    }
}

fn random_range(rng: &mut SmallRng, len: usize) -> Range<usize> {
    let start = rng.random_range(0..=len);
    start..rng.random_range(start..=len)
}

/// Errors that pressure explains; anything else is a failure.
fn pressure(error: &VirtualMemoryError) -> bool {
    use VirtualMemoryError::{AllPinned, ExceedsCapacity, Pinned, TierFull, TimedOut};
    matches!(
        error,
        TierFull { .. }
            | AllPinned { .. }
            | TimedOut { .. }
            | Pinned { .. }
            | ExceedsCapacity { .. }
    )
}

/// Awaits, or, one time in five, drops the future at a random moment.
async fn maybe_dropped<F: Future>(drop_after: Option<Duration>, future: F) -> Option<F::Output> {
    match drop_after {
        None => Some(future.await),
        Some(Duration::ZERO) => {
            // Polled once, then dropped.
            futures::future::poll_immediate(future).await
        }
        Some(after) => tokio::time::timeout(after, future).await.ok(),
    }
}

struct Worker {
    vmem: VirtualMemory,
    rng: SmallRng,
    mine: Vec<Arc<Object>>,
    everybody: Arc<parking_lot::Mutex<Vec<Arc<Object>>>>,
    operations: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
}

impl Worker {
    fn drop_after(&mut self) -> Option<Duration> {
        self.rng.random_bool(0.2).then(|| {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            if self.rng.random_bool(0.3) {
                Duration::ZERO
            } else {
                Duration::from_micros(self.rng.random_range(1..3000))
            }
        })
    }

    fn expect<T>(what: &str, outcome: Option<Result<T, VirtualMemoryError>>) -> Option<T> {
        match outcome? {
            Ok(value) => Some(value),
            Err(error) if pressure(&error) => None,
            Err(error) => panic!("{what}: {error:?}"),
        }
    }

    /// Host memory, or device memory.
    fn memory(&mut self) -> MemoryTier {
        if self.rng.random_bool(0.3) { MemoryTier::Vram } else { MemoryTier::Host }
    }

    fn any(&mut self) -> Arc<Object> {
        if self.rng.random_bool(0.3) {
            let everybody = self.everybody.lock();
            let at = self.rng.random_range(0..everybody.len());
            return everybody[at].clone();
        }
        let at = self.rng.random_range(0..self.mine.len());
        self.mine[at].clone()
    }

    async fn step(&mut self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match self.rng.random_range(0..100) {
            0..=4 => self.replace().await,
            5..=29 => self.write().await,
            30..=69 => self.read().await,
            70..=74 => self.read_many().await,
            75..=94 => self.place().await,
            _ => self.pin().await,
        }
    }

    /// Frees an object of mine and puts another in its place.
    async fn replace(&mut self) {
        let at = self.rng.random_range(0..self.mine.len());
        let old = self.mine[at].clone();
        let home = if self.rng.random_bool(0.7) { self.memory() } else { MemoryTier::Disk };
        let len = random_len(&mut self.rng);
        let drop_after = self.drop_after();
        let allocated = maybe_dropped(drop_after, self.vmem.allocate(len, home)).await;
        let Some(handle) = Self::expect("allocate", allocated) else { return };
        let new = Object::new(handle, self.rng.random());
        self.mine[at] = new.clone();
        let mut everybody = self.everybody.lock();
        for other in everybody.iter_mut() {
            if Arc::ptr_eq(other, &old) {
                *other = new.clone();
            }
        }
    }

    async fn write(&mut self) {
        let at = self.rng.random_range(0..self.mine.len());
        let object = self.mine[at].clone();
        let version = object.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let bytes = object.bytes(version);
        let drop_after = self.drop_after();
        let written = match self.rng.random_range(0..3) {
            0 => maybe_dropped(drop_after, self.vmem.write(&object.handle, &bytes)).await,
            1 => maybe_dropped(drop_after, self.vmem.write_at(&object.handle, 0, &bytes)).await,
            _ => {
                let fill = |buf: &mut [u8]| {
                    assert!(buf.iter().all(|&byte| byte == 0), "starts as zeros");
                    buf.copy_from_slice(&bytes);
                };
                maybe_dropped(drop_after, self.vmem.write_with(&object.handle, fill)).await
            }
        };
        if Self::expect("write", written).is_some() {
            object.completed.store(version, Ordering::SeqCst);
        }
    }

    async fn read(&mut self) {
        let object = self.any();
        let from = object.completed.load(Ordering::SeqCst);
        let range = random_range(&mut self.rng, object.handle.len());
        let drop_after = self.drop_after();
        let handle = &object.handle;
        let whole = 0..handle.len();
        match self.rng.random_range(0..4) {
            0 => {
                let read = maybe_dropped(drop_after, self.vmem.read(handle)).await;
                if let Some(read) = Self::expect("read", read) {
                    object.check(from, whole.clone(), &read);
                    if self.rng.random_bool(0.2) {
                        // Held for a while: it must not change.
                        let before = read.to_vec();
                        tokio::time::sleep(Duration::from_micros(500)).await;
                        assert!(before == read, "a snapshot changed");
                    }
                }
            }
            1 => {
                let read =
                    maybe_dropped(drop_after, self.vmem.read_at(handle, range.clone())).await;
                if let Some(read) = Self::expect("read_at", read) {
                    object.check(from, range, &read);
                }
            }
            2 => {
                let mut buf = vec![0xEE; range.len()];
                let read = self.vmem.read_into(handle, range.clone(), &mut buf);
                let read = maybe_dropped(drop_after, read).await;
                if Self::expect("read_into", read).is_some() {
                    object.check(from, range, &buf);
                }
            }
            _ => {
                let options = ReadOptions::new()
                    .class(ReadClass::Background)
                    .promote(self.rng.random_bool(0.5))
                    .timeout(Duration::from_millis(50));
                let read = maybe_dropped(drop_after, self.vmem.read_with(handle, options)).await;
                if let Some(read) = Self::expect("read_with", read) {
                    object.check(from, whole, &read);
                }
            }
        }
    }

    async fn read_many(&mut self) {
        let objects: Vec<_> = (0..3).map(|_| self.any()).collect();
        let from: Vec<_> = objects.iter().map(|o| o.completed.load(Ordering::SeqCst)).collect();
        let handles: Vec<_> = objects.iter().map(|object| object.handle.clone()).collect();
        let drop_after = self.drop_after();
        let read = maybe_dropped(drop_after, self.vmem.read_many(&handles)).await;
        for ((object, from), bytes) in
            objects.iter().zip(from).zip(Self::expect("read_many", read).into_iter().flatten())
        {
            object.check(from, 0..bytes.len(), &bytes);
        }
    }

    async fn place(&mut self) {
        let object = self.any();
        let handle = &object.handle;
        let drop_after = self.drop_after();
        let memory = self.memory();
        let below = if memory == MemoryTier::Vram { MemoryTier::Host } else { MemoryTier::Disk };
        match self.rng.random_range(0..6) {
            0 => {
                let moved = self.vmem.promote(handle, memory);
                Self::expect("promote", maybe_dropped(drop_after, moved).await);
            }
            1 | 2 => {
                let moved = self.vmem.demote(handle, below);
                Self::expect("demote", maybe_dropped(drop_after, moved).await);
            }
            3 => self.vmem.prefetch(handle, memory).detach(),
            4 => {
                let fetched = self.vmem.prefetch(handle, memory);
                let after = Some(drop_after.unwrap_or(Duration::from_millis(20)));
                Self::expect("prefetch", maybe_dropped(after, fetched).await);
            }
            _ => {
                Self::expect("flush", maybe_dropped(drop_after, self.vmem.flush(handle)).await);
                let residency = self.vmem.residency(handle).expect("alive");
                assert!(!residency.dirty || residency.host);
            }
        }
    }

    async fn pin(&mut self) {
        let object = self.any();
        if object.handle.len() > 200_000 {
            return;
        }
        let drop_after = self.drop_after();
        let memory = self.memory();
        let pinned = maybe_dropped(drop_after, self.vmem.pin(&object.handle, memory)).await;
        if let Some(guard) = Self::expect("pin", pinned) {
            let residency = self.vmem.residency(&object.handle).expect("alive");
            // What is written while it is pinned in VRAM is promoted again behind the write.
            let there = residency.host || memory == MemoryTier::Vram;
            assert!(there && residency.pins > 0, "{residency:?}");
            let from = object.completed.load(Ordering::SeqCst);
            let read = self.vmem.read(&object.handle).await.expect("pinned, so resident");
            object.check(from, 0..read.len(), &read);
            drop(guard);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_at_random() {
    let seconds: u64 =
        std::env::var("VMEM_STRESS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let seed = Seed::from_env_or(|| 7).value();
    println!("VMEM_SEED={seed} VMEM_STRESS_SECONDS={seconds}");
    let emulator = Emulator::load().expect("the emulated driver");
    let config = VirtualMemoryConfig::builder()
        .vram_capacity(6 << 20)
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(HOST_CAPACITY)
        .disk_capacity(512 << 20)
        .wait_timeout(Duration::from_secs(5))
        .build()
        .expect("valid");
    let vmem = vmem::open(config).await.expect("opens");
    assert!(vmem.capabilities().vram.is_some());
    let everybody = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let operations = Arc::new(AtomicU64::new(0));
    let dropped = Arc::new(AtomicU64::new(0));
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
        workers.push(Worker { vmem: vmem.clone(), rng, mine, everybody, operations, dropped });
    }
    let stop = Arc::new(AtomicBool::new(false));
    let until = Instant::now() + Duration::from_secs(seconds);
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
            assert!(stats.vram.used_bytes <= stats.vram.capacity_bytes, "{stats:?}");
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
        "{} operations, {} dropped, peak {peak} of {}, {:?}",
        operations.load(Ordering::Relaxed),
        dropped.load(Ordering::Relaxed),
        vmem.stats().host.capacity_bytes,
        vmem.stats()
    );
    everybody.lock().clear();
    let gone = |stats: &vmem::VirtualMemoryStats| {
        let used = [stats.host.used_bytes, stats.disk.used_bytes, stats.vram.used_bytes];
        used == [0; 3] && stats.objects == 0
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
    assert_eq!(stats.migrations_in_flight, 0);
    assert!(stats.vram.hits > 0 && stats.host_to_vram_bytes > 0, "{stats:#?}");
    vmem.close().await.expect("closes");
    assert_eq!(emulator.violations(), [""; 0]);
    assert_eq!(emulator.counter("device_bytes"), 0);
}
