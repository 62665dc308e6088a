//! One task of the stress test: what it does to its own objects and to those of others.
//!
//! Invariant: only the task whose object it is writes to it, one write at a time; each byte that is
//! read is checked against the versions that the object may have. Called by the test.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use vmem::gpu::cudarc::driver::CudaStream;
use vmem::{MemoryTier, ReadClass, ReadOptions, VirtualMemory, VirtualMemoryError};

use crate::object::Object;
use crate::{DEVICES, random_len};

pub(crate) fn random_range(rng: &mut SmallRng, len: usize) -> Range<usize> {
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
pub(crate) async fn maybe_dropped<F: Future>(
    drop_after: Option<Duration>,
    future: F,
) -> Option<F::Output> {
    match drop_after {
        None => Some(future.await),
        Some(Duration::ZERO) => {
            // Polled once, then dropped.
            futures::future::poll_immediate(future).await
        }
        Some(after) => tokio::time::timeout(after, future).await.ok(),
    }
}

/// One task, its objects, and what it shares with the others.
pub(crate) struct Worker {
    pub(crate) vmem: VirtualMemory,
    pub(crate) tiers: [MemoryTier; DEVICES],
    /// One on each device.
    pub(crate) streams: [Arc<CudaStream>; DEVICES],
    pub(crate) rng: SmallRng,
    pub(crate) mine: Vec<Arc<Object>>,
    pub(crate) everybody: Arc<parking_lot::Mutex<Vec<Arc<Object>>>>,
    pub(crate) operations: Arc<AtomicU64>,
    pub(crate) dropped: Arc<AtomicU64>,
    /// What was leased for reading on each device.
    pub(crate) leases: Arc<[AtomicU64; DEVICES]>,
    /// Pieces that were gathered, and scattered.
    pub(crate) pieces: Arc<[AtomicU64; 2]>,
}

impl Worker {
    pub(crate) fn drop_after(&mut self) -> Option<Duration> {
        self.rng.random_bool(0.2).then(|| {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            if self.rng.random_bool(0.3) {
                Duration::ZERO
            } else {
                Duration::from_micros(self.rng.random_range(1..3000))
            }
        })
    }

    pub(crate) fn expect<T>(
        what: &str,
        outcome: Option<Result<T, VirtualMemoryError>>,
    ) -> Option<T> {
        match outcome? {
            Ok(value) => Some(value),
            Err(error) if pressure(&error) => None,
            Err(error) => panic!("{what}: {error:?}"),
        }
    }

    /// Host memory, or that of a device.
    fn memory(&mut self) -> MemoryTier {
        let device = self.rng.random_range(0..DEVICES);
        if self.rng.random_bool(0.4) { self.tiers[device] } else { MemoryTier::Host }
    }

    pub(crate) fn any(&mut self) -> Arc<Object> {
        if self.rng.random_bool(0.3) {
            let everybody = self.everybody.lock();
            let at = self.rng.random_range(0..everybody.len());
            return everybody[at].clone();
        }
        let at = self.rng.random_range(0..self.mine.len());
        self.mine[at].clone()
    }

    pub(crate) async fn step(&mut self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match self.rng.random_range(0..100) {
            0..=4 => self.replace().await,
            5..=24 => self.write().await,
            25..=59 => self.read().await,
            60..=64 => self.read_many().await,
            65..=84 => self.place().await,
            85..=90 => self.lease().await,
            91..=92 => self.gather().await,
            93..=94 => self.scatter().await,
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
        let below = if memory == MemoryTier::Host { MemoryTier::Disk } else { MemoryTier::Host };
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
                let settled = object.settled();
                let residency = self.vmem.residency(handle).expect("alive");
                // A lease that goes on may have the only copy.
                if settled.is_some() && settled == object.settled() {
                    let memory = [MemoryTier::Host, self.tiers[0], self.tiers[1]];
                    let is_in_memory = memory.iter().any(|&tier| residency.is_in(tier));
                    assert!(!residency.dirty || is_in_memory, "{residency:?}");
                }
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
        let settled = object.settled();
        let pinned = maybe_dropped(drop_after, self.vmem.pin(&object.handle, memory)).await;
        if let Some(guard) = Self::expect("pin", pinned) {
            let residency = self.vmem.residency(&object.handle).expect("alive");
            // What is written while it is pinned on a device is promoted again behind the write.
            let is_there = residency.is_in(memory);
            let is_settled = settled.is_some() && settled == object.settled();
            let pins = residency.pins;
            assert!(pins > 0 && (is_there || !is_settled), "{memory}: {residency:?}");
            let from = object.completed.load(Ordering::SeqCst);
            let read = self.vmem.read(&object.handle).await;
            if let Some(read) = Self::expect("read of what is pinned", Some(read)) {
                object.check(from, 0..read.len(), &read);
            }
            drop(guard);
        }
    }
}
