//! Scenario 4 at random: calls of many tasks, each dropped at some point or not.
//!
//! Invariant: what an object holds is one of the versions that may be there, and what was taken is
//! given back. Run in `it`.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{
    MemoryTier, ReadClass, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError,
    VirtualMemoryStats,
};

use crate::chain;
use crate::support::{
    self, DISK, DropAt, HOST, MIB, MemDriver, assert_empty, bytes, dropped_at, is_pressure, seed,
    settle,
};

const DROPS: u64 = 10_000;
const TASKS: u64 = 6;
const LENS: [usize; 6] = [100, 3000, 20_000, 70_000, 150_000, 270_000];

struct Worker {
    vmem: VirtualMemory,
    rng: SmallRng,
    task: u64,
    /// The tiers to which objects are promoted, and demoted.
    above: &'static [MemoryTier],
    below: &'static [MemoryTier],
    objects: Vec<Object>,
    drops: Arc<AtomicU64>,
}

/// One object, whose only writer is its worker.
struct Object {
    handle: VMemHandle,
    key: u64,
    /// The newest version that is certain: its write has completed, or it was seen.
    certain: u64,
    /// The newest version whose write has begun.
    begun: u64,
}

impl Object {
    /// The content is one of the versions that may be there; never an older one again.
    fn check(&mut self, read: &[u8]) {
        let len = self.handle.len();
        let seen = (self.certain..=self.begun).rev().find(|&v| bytes(self.key, v, len) == read);
        let Some(seen) = seen else {
            panic!("{len} bytes: none of versions {}..={}", self.certain, self.begun);
        };
        self.certain = seen;
    }
}

impl Worker {
    async fn dropped<F: Future>(&mut self, call: F) -> Option<F::Output> {
        let polls = self.rng.random_range(0..8);
        let outcome = match self.rng.random_range(0..3) {
            0 => dropped_at(DropAt::Polled(polls), call).await,
            1 => dropped_at(DropAt::Woken(polls), call).await,
            _ => {
                let after = Duration::from_micros(self.rng.random_range(0..6000));
                tokio::time::timeout(after, call).await.ok()
            }
        };
        if outcome.is_none() {
            self.drops.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    fn expect<T>(outcome: Option<Result<T, VirtualMemoryError>>) -> Option<T> {
        match outcome? {
            Ok(value) => Some(value),
            Err(error) if is_pressure(&error) => None,
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn step(&mut self) {
        let at = self.rng.random_range(0..self.objects.len());
        let vmem = self.vmem.clone();
        let handle = self.objects[at].handle.clone();
        let len = handle.len();
        let above = self.above[self.rng.random_range(0..self.above.len())];
        let below = self.below[self.rng.random_range(0..self.below.len())];
        match self.rng.random_range(0..14) {
            0..=2 => {
                self.objects[at].begun += 1;
                let object = &self.objects[at];
                let version = object.begun;
                let data = bytes(object.key, object.begun, len);
                let written = match self.rng.random_range(0..3) {
                    0 => self.dropped(vmem.write(&handle, &data)).await,
                    1 => self.dropped(vmem.write_at(&handle, 0, &data)).await,
                    _ => {
                        let fill = |buf: &mut [u8]| buf.copy_from_slice(&data);
                        self.dropped(vmem.write_with(&handle, fill)).await
                    }
                };
                if Self::expect(written).is_some() {
                    self.objects[at].certain = version;
                }
            }
            3 | 4 => {
                let read = self.dropped(vmem.read(&handle)).await;
                if let Some(read) = Self::expect(read) {
                    self.objects[at].check(&read);
                }
            }
            5 => {
                let class =
                    if self.rng.random() { ReadClass::Demand } else { ReadClass::Background };
                let options = ReadOptions::new().class(class).promote(self.rng.random());
                let read = self.dropped(vmem.read_with(&handle, options)).await;
                if let Some(read) = Self::expect(read) {
                    self.objects[at].check(&read);
                }
            }
            6 => {
                let mut buf = vec![0xEE; len];
                let read = self.dropped(vmem.read_into(&handle, 0..len, &mut buf)).await;
                if Self::expect(read).is_some() {
                    self.objects[at].check(&buf);
                }
            }
            7 => {
                let other = self.rng.random_range(0..self.objects.len());
                let set = [handle.clone(), self.objects[other].handle.clone()];
                let read = self.dropped(vmem.read_many(&set)).await;
                for (at, read) in
                    [at, other].into_iter().zip(Self::expect(read).unwrap_or_default())
                {
                    self.objects[at].check(&read);
                }
            }
            8 => drop(Self::expect(self.dropped(vmem.promote(&handle, above)).await)),
            9 | 10 => drop(Self::expect(self.dropped(vmem.demote(&handle, below)).await)),
            11 => drop(Self::expect(self.dropped(vmem.prefetch(&handle, above)).await)),
            12 => drop(Self::expect(self.dropped(vmem.pin(&handle, above)).await)),
            _ => self.replace(at).await,
        }
    }

    /// Another object in its place, its allocation dropped half way or not.
    async fn replace(&mut self, at: usize) {
        let vmem = self.vmem.clone();
        let len = LENS[self.rng.random_range(0..LENS.len())];
        let homes = if self.rng.random() { self.above } else { self.below };
        let home = homes[self.rng.random_range(0..homes.len())];
        let key = self.rng.random();
        let put = self.rng.random::<bool>();
        let first = bytes(key, 1, len);
        let made = if put {
            self.dropped(vmem.put(&first, home)).await
        } else {
            self.dropped(vmem.allocate(len, home)).await
        };
        if let Some(handle) = Self::expect(made) {
            let version = u64::from(put);
            self.objects[at] = Object { handle, key, certain: version, begun: version };
        }
    }
}

/// Excluded: what `cancel.rs` names, in mixtures that no other test makes; noticed likewise.
#[tokio::test(start_paused = true)]
async fn scenario_04_ten_thousand_random_drops() {
    let (vmem, driver) =
        support::open(2 * MIB, 64 * MIB, |b| b.wait_timeout(Duration::from_secs(5)));
    let stats = random_drops(&vmem, std::slice::from_ref(&driver), (&[HOST], &[DISK]), DROPS).await;
    assert!(stats.evictions > 100 && driver.reads() > 100, "there was pressure");
    vmem.close().await.unwrap();
}

/// The same where the disk is small and lies above another tier.
#[tokio::test(start_paused = true)]
async fn random_drops_over_a_chain_leave_nothing_behind() {
    let chain = chain::open((2 * MIB, 2 * MIB, 64 * MIB), |builder| {
        builder.wait_timeout(Duration::from_secs(5))
    });
    let drivers = [chain.disk.clone(), chain.remote.clone()];
    let tiers: Tiers = (&[HOST, DISK], &[DISK, MemoryTier::Remote]);
    let stats = random_drops(&chain.vmem, &drivers, tiers, DROPS / 2).await;
    assert!(stats.remote.peak_bytes > 0 && stats.remote_to_host_bytes > 0, "{stats:#?}");
    assert_eq!((stats.remote.used_bytes, stats.remote.objects), (0, 0), "{stats:#?}");
    chain.vmem.close().await.unwrap();
}

/// To which objects are promoted, and demoted.
type Tiers = (&'static [MemoryTier], &'static [MemoryTier]);

/// Many tasks, each with objects of its own, until `drops_max` of their calls were dropped.
async fn random_drops(
    vmem: &VirtualMemory,
    drivers: &[Arc<MemDriver>],
    (above, below): Tiers,
    drops_max: u64,
) -> VirtualMemoryStats {
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    for (nth, driver) in (1..).zip(drivers) {
        let mut delays = SmallRng::seed_from_u64(seed ^ nth);
        driver.delay(move |_| Duration::from_micros(delays.random_range(0..3000)));
    }
    let drops = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for task in 0..TASKS {
        let mut objects = Vec::new();
        for len in LENS {
            let handle = vmem.allocate(len, HOST).await.unwrap();
            objects.push(Object { handle, key: rng.random(), certain: 0, begun: 0 });
        }
        let rng = SmallRng::seed_from_u64(rng.random());
        let vmem = vmem.clone();
        let drops = drops.clone();
        let mut worker = Worker { vmem, rng, task, above, below, objects, drops };
        tasks.push(tokio::spawn(async move {
            let mut steps = 0;
            while worker.drops.load(Ordering::Relaxed) < drops_max {
                worker.step().await;
                steps += 1;
                let stats = worker.vmem.stats();
                for tier in [stats.host, stats.disk, stats.remote] {
                    assert!(tier.used_bytes <= tier.capacity_bytes, "{stats:#?}");
                }
            }
            for object in &mut worker.objects {
                let mut buf = vec![0xEE; object.handle.len()];
                worker.vmem.read_into(&object.handle, 0..buf.len(), &mut buf).await.unwrap();
                object.check(&buf);
            }
            println!("task {}: {steps} calls", worker.task);
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let mut stats = vmem.stats();
    for driver in drivers {
        stats = settle(vmem, driver).await;
    }
    println!("{} drops, {stats:?}", drops.load(Ordering::Relaxed));
    assert_empty(&stats, "random drops");
    drivers.iter().for_each(|driver| driver.assert_untouched());
    stats
}
