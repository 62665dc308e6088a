//! One task: draws operations, drops a part of their futures, and tells the model.
//!
//! Invariant: what is drawn depends on the task's own generator and on what its calls returned, so
//! that one seed gives one sequence. Called by the test.

use std::future::Future;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::timeout;
use vmem::{MemoryTier, PinGuard, ReadClass, ReadOptions, VMemHandle, VirtualMemoryError};
use vmem_testkit::model::WriteToken;
use vmem_testkit::{poll_then_drop, poll_wake_then_drop};

use super::Trouble;
use super::world::{Call, World, digest};

/// Objects that there are at most.
const OBJECTS_MAX: usize = 24;
/// What a task holds at once, of `Bytes` and of pins each.
const HELD_MAX: usize = 2;

/// How the future of a call ends.
#[derive(Clone, Copy)]
enum Ending {
    Awaited,
    Dropped { polls: usize },
    DroppedWoken { polls: usize },
    TimedOut(Duration),
}

impl Ending {
    async fn of<F: Future>(self, call: F) -> Option<F::Output> {
        match self {
            Ending::Awaited => Some(call.await),
            Ending::Dropped { polls } => poll_then_drop(call, polls).await,
            Ending::DroppedWoken { polls } => poll_wake_then_drop(call, polls).await,
            Ending::TimedOut(after) => timeout(after, call).await.ok(),
        }
    }
}

pub(crate) struct Task {
    world: Arc<World>,
    number: u64,
    rng: SmallRng,
    held: Vec<(Bytes, u64)>,
    pins: Vec<PinGuard>,
}

type Outcome<T> = Option<Result<T, VirtualMemoryError>>;

impl Task {
    pub(crate) fn new(world: Arc<World>, number: u64, rng: SmallRng) -> Self {
        Task { world, number, rng, held: Vec::new(), pins: Vec::new() }
    }

    pub(crate) async fn step(&mut self) {
        self.let_go();
        let Some(handle) = self.any() else { return self.create().await };
        match self.rng.random_range(0..100) {
            0..8 => self.create().await,
            8..12 => self.remove(handle).await,
            12..36 => self.write(handle).await,
            36..66 => self.read(handle).await,
            66..72 => self.read_many(handle).await,
            72..92 => self.place(handle).await,
            92..96 => self.pin(handle).await,
            96..98 => self.flip(),
            _ => tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..20))).await,
        }
    }

    fn ending(&mut self) -> Ending {
        match self.rng.random_range(0..20) {
            0..2 => Ending::Dropped { polls: self.rng.random_range(0..8) },
            2 => Ending::DroppedWoken { polls: self.rng.random_range(1..8) },
            3 => Ending::TimedOut(Duration::from_micros(self.rng.random_range(0..20_000))),
            _ => Ending::Awaited,
        }
    }

    fn call(&self, name: &'static str, handle: &VMemHandle, details: &dyn std::fmt::Debug) -> Call {
        Call::new(self.number, name, &[handle.id()], details)
    }

    fn any(&mut self) -> Option<VMemHandle> {
        let objects = self.world.objects.lock();
        let at = (!objects.is_empty()).then(|| self.rng.random_range(0..objects.len()))?;
        Some(objects[at].clone())
    }

    fn range(&mut self, len: usize) -> Range<usize> {
        let start = self.rng.random_range(0..=len);
        start..self.rng.random_range(start..=len)
    }

    /// Lets some of what is held go; bytes that were read have not changed.
    fn let_go(&mut self) {
        if self.held.len() > HELD_MAX || (!self.held.is_empty() && self.rng.random_bool(0.3)) {
            let (bytes, before) = self.held.remove(0);
            assert_eq!(digest(&bytes), before, "bytes that were read have changed");
        }
        if self.pins.len() > HELD_MAX || (!self.pins.is_empty() && self.rng.random_bool(0.3)) {
            drop(self.pins.remove(0));
        }
    }

    /// Host memory, or, where there is some, device memory.
    /// The disk, or the tier below it.
    fn below_host(&mut self) -> MemoryTier {
        let remote = self.world.has_remote && self.rng.random_bool(0.4);
        if remote { MemoryTier::Remote } else { MemoryTier::Disk }
    }

    fn memory(&mut self) -> MemoryTier {
        let vram = self.world.has_vram && self.rng.random_bool(0.5);
        if vram { MemoryTier::Vram } else { MemoryTier::Host }
    }

    // ---- Life --------------------------------------------------------------------------------

    async fn create(&mut self) {
        if self.world.objects.lock().len() >= OBJECTS_MAX {
            return;
        }
        let len = match self.rng.random_range(0..20) {
            0 => 0,
            1..9 => self.rng.random_range(1..=4096),
            9..14 => self.rng.random_range(1..=65_536),
            14..19 => self.rng.random_range(65_537..=300_000),
            _ => self.rng.random_range(300_000..=1_600_000),
        };
        let home = if self.rng.random_bool(0.5) { self.below_host() } else { self.memory() };
        let ending = self.ending();
        let world = self.world.clone();
        let call = Call::new(self.number, "create", &[], &(len, home));
        let made = match self.rng.random_bool(0.2) {
            // A new object is zeros for the model, so that is what is put.
            true => ending.of(world.vmem.put(vec![0; len], home)).await,
            false => ending.of(world.vmem.allocate(len, home)).await,
        };
        if let Some(handle) = world.judge(&call, made, VMemHandle::id) {
            world.model.create(handle.id(), len);
            world.objects.lock().push(handle);
        }
    }

    async fn remove(&mut self, handle: VMemHandle) {
        let world = self.world.clone();
        let call = self.call("free", &handle, &"");
        let ending = self.ending();
        let token = world.model.begin_remove(handle.id());
        world.objects.lock().retain(|other| *other != handle);
        let freed = ending.of(world.vmem.free(handle)).await;
        if world.judge(&call, freed, |()| 0).is_some() {
            token.commit();
        }
    }

    // ---- Writes ------------------------------------------------------------------------------

    async fn write(&mut self, handle: VMemHandle) {
        let ending = self.ending();
        let world = self.world.clone();
        let id = handle.id();
        match self.rng.random_range(0..8) {
            0..3 => {
                let token = world.model.begin_write(id);
                let call = self.call("write", &handle, &token.version());
                let bytes = token.bytes();
                let written = ending.of(world.vmem.write(&handle, &bytes)).await;
                self.wrote(&call, token, written);
            }
            3..6 => {
                let range = self.range(handle.len());
                let token = world.model.begin_write_at(id, range.clone());
                let call = self.call("write_at", &handle, &(token.version(), &range));
                let bytes = token.bytes();
                let written = ending.of(world.vmem.write_at(&handle, range.start, &bytes)).await;
                self.wrote(&call, token, written);
            }
            6 => {
                let token = world.model.begin_write(id);
                let call = self.call("write_with", &handle, &token.version());
                let fill = |buf: &mut [u8]| {
                    assert!(buf.iter().all(|&byte| byte == 0), "starts as zeros");
                    token.fill(buf);
                };
                let written = ending.of(world.vmem.write_with(&handle, fill)).await;
                self.wrote(&call, token, written);
            }
            _ => self.write_with_panic(handle, ending).await,
        }
    }

    /// After an error the object is as it was.
    fn wrote(&self, call: &Call, token: WriteToken, written: Outcome<()>) {
        let ended = written.is_some();
        let done = matches!(written, Some(Ok(())));
        self.world.judge(call, written, |()| 0);
        match (ended, done) {
            (true, true) => token.commit(),
            (true, false) => self.world.check(call, token.fail()),
            (false, _) => drop(token),
        }
    }

    /// After a panic too.
    async fn write_with_panic(&mut self, handle: VMemHandle, ending: Ending) {
        let world = self.world.clone();
        let token = world.model.begin_write(handle.id());
        let call = self.call("write_with", &handle, &(token.version(), "panics"));
        let fill = |buf: &mut [u8]| {
            let half = buf.len() / 2;
            buf[..half].fill(0xDD);
            // Nothing is printed of a panic that goes on from another one.
            resume_unwind(Box::new("planted"));
        };
        let writing = AssertUnwindSafe(world.vmem.write_with(&handle, fill)).catch_unwind();
        match ending.of(writing).await {
            Some(Err(_planted)) => world.note(&call, "panicked", ""),
            Some(Ok(Ok(()))) => panic!("{call}: ok, though the filling panicked"),
            Some(Ok(Err(error))) => drop(world.judge(&call, Some(Err::<(), _>(error)), |()| 0)),
            None => drop(world.judge(&call, None::<Result<(), _>>, |()| 0)),
        }
        // In no case were there bytes that could have been written.
        world.check(&call, token.fail());
    }

    // ---- Reads -------------------------------------------------------------------------------

    async fn read(&mut self, handle: VMemHandle) {
        let ending = self.ending();
        let world = self.world.clone();
        let whole = 0..handle.len();
        let range = self.range(handle.len());
        let kind = self.rng.random_range(0..5);
        let range = if kind == 0 { whole } else { range };
        let call = self.call("read", &handle, &(kind, &range));
        let options = ReadOptions::new()
            .range(range.clone())
            .class(ReadClass::Background)
            .promote(self.rng.random_bool(0.5))
            .timeout(Duration::from_millis(self.rng.random_range(1..100)));
        let token = world.model.begin_read(handle.id());
        let read = match kind {
            0 => ending.of(world.vmem.read(&handle)).await,
            1 => ending.of(world.vmem.read_with(&handle, options)).await,
            2 | 3 => ending.of(world.vmem.read_at(&handle, range.clone())).await,
            _ => {
                let mut buf = vec![0xEE; range.len()];
                let read = ending.of(world.vmem.read_into(&handle, range.clone(), &mut buf)).await;
                read.map(|read| read.map(|()| buf.into()))
            }
        };
        // The model looks first: a wrong read is reported as such.
        if let Some(Ok(bytes)) = &read {
            world.check(&call, token.check_at(range, bytes));
        }
        if let Some(bytes) = world.judge(&call, read, |bytes| digest(bytes)) {
            self.hold(bytes);
        }
    }

    fn hold(&mut self, bytes: Bytes) {
        if self.rng.random_bool(0.2) {
            self.held.push((bytes.clone(), digest(&bytes)));
        }
    }

    async fn read_many(&mut self, handle: VMemHandle) {
        let ending = self.ending();
        let world = self.world.clone();
        let mut handles = vec![handle];
        while handles.len() < 3
            && let Some(handle) = self.any()
        {
            handles.push(handle);
        }
        let ids: Vec<u64> = handles.iter().map(VMemHandle::id).collect();
        let call = Call::new(self.number, "read_many", &ids, &"");
        let tokens: Vec<_> = ids.iter().map(|&id| world.model.begin_read(id)).collect();
        let read = ending.of(world.vmem.read_many(&handles)).await;
        if let Some(Ok(all)) = &read {
            assert_eq!(all.len(), tokens.len(), "{call}");
            for ((token, bytes), handle) in tokens.into_iter().zip(all).zip(&handles) {
                world.check(&self.call("read_many", handle, &ids), token.check(bytes));
            }
        }
        world.judge(&call, read, |all| all.iter().map(|bytes| digest(bytes)).fold(0, |a, b| a ^ b));
    }

    // ---- Places ------------------------------------------------------------------------------

    async fn place(&mut self, handle: VMemHandle) {
        let ending = self.ending();
        let world = self.world.clone();
        let vmem = &world.vmem;
        let host = self.memory();
        let below = match host {
            MemoryTier::Vram if self.rng.random_bool(0.3) => MemoryTier::Host,
            _ => self.below_host(),
        };
        let above = match below {
            MemoryTier::Remote => MemoryTier::Disk,
            _ => host,
        };
        let (name, moved) = match self.rng.random_range(0..12) {
            0..2 => ("promote", ending.of(vmem.promote(&handle, above)).await),
            2..7 => ("demote", ending.of(vmem.demote(&handle, below)).await),
            7 => {
                vmem.prefetch(&handle, above).detach();
                ("prefetch", None)
            }
            8 | 9 => ("prefetch", ending.of(vmem.prefetch(&handle, above)).await),
            10 => ("flush", ending.of(vmem.flush(&handle)).await),
            _ => {
                let flushed = ending.of(vmem.flush_all()).await;
                let call = Call::new(self.number, "flush_all", &[], &"");
                world.judge(&call, flushed, |()| 0);
                return;
            }
        };
        world.judge(&self.call(name, &handle, &""), moved, |()| 0);
    }

    async fn pin(&mut self, handle: VMemHandle) {
        let ending = self.ending();
        let world = self.world.clone();
        let call = self.call("pin", &handle, &"");
        let tier = match self.below_host() {
            MemoryTier::Remote => MemoryTier::Disk,
            _ => self.memory(),
        };
        let pinned = ending.of(world.vmem.pin(&handle, tier)).await;
        let Some(guard) = world.judge(&call, pinned, |_| 0) else { return };
        self.pins.push(guard);
        // The first write to it may have the space in its hands for a moment.
        for left in (0..1000).rev() {
            match world.vmem.residency(&handle) {
                Ok(residency) => {
                    // What is written while it is pinned in VRAM is promoted again behind the
                    // write.
                    let there = handle.is_empty() || residency.host || tier != MemoryTier::Host;
                    assert!((there || left > 0) && residency.pins > 0, "{call}: {residency:?}");
                    if there {
                        break;
                    }
                }
                Err(error) => {
                    world.judge(&call, Some(Err::<(), _>(error)), |()| 0);
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Damages the disk itself, where it is known to be one that lies.
    fn flip(&mut self) {
        let Some(sim) = self.world.sim.clone() else { return };
        let len = sim.image().len();
        if len == 0 || !self.world.trouble.has(Trouble::Damage) {
            return;
        }
        let byte = self.rng.random_range(0..len);
        let bit = self.rng.random_range(0..8);
        sim.damage(|image| image.flip_bit(byte, bit));
        let call = Call::new(self.number, "a bit flips on the disk", &[], &(byte, bit));
        self.world.note(&call, "ok", "");
    }
}
