//! The eviction actor: one task, fed by bounded channels, that starts every migration.
//!
//! Invariant: the actor itself never waits for I/O or for space; it decides, and each migration
//! that it decides on is a task of its own. When there is nothing to decide it sleeps. What wakes
//! it is a request, a release while a waiter waits for one, the end of a migration, or a
//! timer: while a prefetch waits for objects in use to cool, a queue for its turn to block, or
//! callers for what they have not taken.
//!
//! ```text
//!   readers, promote, demote ---> demand ----+
//!   prefetch ------------------> background -+--> actor --> tasks (fetch, write back) --+
//!   allocations, releases -----> wake -------+       ^------------ their ends ---------+
//! ```
//!
//! A read that leaves the object where it is moves nothing between tiers and needs no decision: its
//! task starts at once, past the actor. Requests for space do not come through the channels: they
//! stand in the queue of their tier (`tier/queue.rs`), where the actor sees them whole. Started by
//! `VirtualMemory::with_backends`.

mod evict;
mod look;
mod plan;
mod tiers;

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use evict::Evictor;
use tiers::{InHost, InStorage, OnDevice};

use crate::console;
use crate::device::DeviceError;
use crate::error::VirtualMemoryError;
use crate::memory_tier::{MemoryTier, Position};
use crate::names::{self, Names};
use crate::object::Shared;
use crate::requests::{Inbox, Line, Request};
use crate::task::{spawn_into, spawn_named};

/// Migrations of demand that are started at once; those that copy are bounded by the link.
const DEMAND_MAX: usize = 1024;
/// Prefetch requests that are started at once.
const BACKGROUND_MAX: usize = 64;

/// Whether the tier below took a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Took {
    All,
    /// It has no space for it.
    NoSpace,
    /// It failed otherwise.
    Failed,
}

/// What kind of task has ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ended {
    Demand,
    Background,
    /// One that waits for a kernel of a user.
    Kernel,
    /// A batch that was written: the tier that it leaves, the bytes that it was to free there, and
    /// whether the tier below took it.
    Evicted {
        tier: MemoryTier,
        leaves_bytes: u64,
        took: Took,
    },
}

/// The result of closing, for the callers of `close`.
pub(crate) type Outcome = Option<Result<(), VirtualMemoryError>>;

/// Starts the actor on the current runtime. The receiver gets the outcome of its end.
pub(crate) fn start(names: Arc<Names>, inbox: Inbox) -> watch::Receiver<Outcome> {
    let (done, outcome) = watch::channel(None);
    let shared = names.shared.clone();
    let devices =
        (0..shared.devices().len()).map(|device| Evictor::new(OnDevice(device))).collect();
    let levels = (0..shared.storage().len()).filter(|&level| shared.evicts_from(level));
    let storage = levels.map(|level| Evictor::new(InStorage(level))).collect();
    let actor = Actor {
        shared,
        names,
        inbox,
        tasks: JoinSet::new(),
        kernels: JoinSet::new(),
        demand: 0,
        background: 0,
        batch_ended: false,
        host: Evictor::new(InHost),
        devices,
        storage,
    };
    let runtime = actor.shared.runtime.clone();
    let watched = Arc::downgrade(&actor.shared);
    console::show(&runtime, &actor.shared.latencies.row, move || Some(watched.upgrade()?.now()));
    drop(spawn_named(&runtime, "vmem-actor", actor.run(done)));
    outcome
}

struct Actor {
    shared: Arc<Shared>,
    names: Arc<Names>,
    inbox: Inbox,
    tasks: JoinSet<Ended>,
    /// Migrations that wait for kernels of users, for an unknown time: they count against no class.
    kernels: JoinSet<Ended>,
    demand: usize,
    background: usize,
    /// Since the last turn.
    batch_ended: bool,
    host: Evictor<InHost>,
    devices: Vec<Evictor<OnDevice>>,
    /// Of the tiers below host memory, but for the last.
    storage: Vec<Evictor<InStorage>>,
}

/// However the actor ends, with its runtime too, no caller is left waiting for what only the actor
/// can do.
impl Drop for Actor {
    fn drop(&mut self) {
        self.shared.set_closed();
        self.shared.close_queues();
        self.names.clear();
    }
}

impl Actor {
    async fn run(mut self, done: watch::Sender<Outcome>) {
        let mut woken = true;
        while !self.shared.is_closed() {
            woken = self.step(woken).await;
        }
        let outcome = self.end().await;
        done.send_replace(Some(outcome));
    }

    /// One turn, and then sleep if there is nothing to do; whether something has happened since.
    /// Dropped at any point it loses nothing.
    async fn step(&mut self, mut woken: bool) -> bool {
        let recall_at = self.recall_unclaimed();
        // A batch that failed, or whose objects stay, has freed nothing and notifies nothing, so
        // the evictors look again: also where its end was taken up between two slices of a turn.
        woken |= std::mem::take(&mut self.batch_ended);
        if self.turn(woken) {
            // In slices: others have their turn in between.
            tokio::task::yield_now().await;
            self.drain_ready();
            return false;
        }
        let of_devices = self.devices.iter().filter_map(Evictor::wakes_at);
        let of_storage = self.storage.iter().filter_map(Evictor::wakes_at);
        let wakes_at = of_devices.chain(of_storage).chain(self.host.wakes_at());
        let wakes_at = wakes_at.chain(recall_at).min();
        tokio::select! {
            biased;
            () = self.shared.wake.asleep() => {}
            () = sleep_until(wakes_at), if wakes_at.is_some() => {}
            Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                self.account(ended);
            }
            Some(ended) = self.kernels.join_next(), if !self.kernels.is_empty() => {
                self.account(ended);
            }
            Some(request) = self.inbox.kernels.recv() => self.start(request),
            Some(request) = self.inbox.demand.recv(), if self.demand < DEMAND_MAX => {
                self.start(request);
            }
            Some(request) = self.inbox.background.recv(), if self.background < BACKGROUND_MAX => {
                self.start(request);
            }
        }
        self.drain_ready();
        true
    }

    /// A turn of each evictor, or, on closing, of those with waiters. True if there is more to do.
    fn turn(&mut self, woken: bool) -> bool {
        let Actor { shared, tasks, host, devices, storage, .. } = self;
        if shared.is_closed() {
            let mut levels = storage.iter_mut().zip(shared.storage());
            let mut turn = |evictor: &mut Evictor<_>| evictor.turn(shared, tasks, woken);
            return levels.any(|(evictor, level)| level.state.queue.len() > 0 && turn(evictor));
        }
        let mut more = host.turn(shared, tasks, woken);
        for (device, evictor) in shared.devices().iter().zip(devices) {
            match device.lost() {
                None => more |= evictor.turn(shared, tasks, woken),
                Some(error) => evictor.refuse_all(shared, &error),
            }
        }
        for evictor in storage {
            more |= evictor.turn(shared, tasks, woken);
        }
        more
    }

    /// While a waiter waits for space, takes back granted space that its callers have not claimed.
    /// Returns when there may be more of that.
    fn recall_unclaimed(&self) -> Option<Instant> {
        let shared = &self.shared;
        let on_devices = shared.devices().iter().map(|device| device.state.queue.len());
        let below: usize = shared.storage().iter().map(|storage| storage.state.queue.len()).sum();
        if shared.host.queue.len() + on_devices.sum::<usize>() + below == 0 {
            return None;
        }
        let unclaimed = shared.unclaimed.recall();
        // Writes that are not finished have space below host memory.
        let unfinished = (below > 0).then(|| shared.unfinished.recall()).flatten();
        unclaimed.into_iter().chain(unfinished).min()
    }

    /// Takes everything that is ready, without sleeping.
    fn drain_ready(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            self.account(ended);
        }
        while let Some(ended) = self.kernels.try_join_next() {
            self.account(ended);
        }
        while let Ok(request) = self.inbox.kernels.try_recv() {
            self.start(request);
        }
        while self.demand < DEMAND_MAX
            && let Ok(request) = self.inbox.demand.try_recv()
        {
            self.start(request);
        }
        while self.background < BACKGROUND_MAX
            && let Ok(request) = self.inbox.background.try_recv()
        {
            self.start(request);
        }
    }

    fn start(&mut self, request: Request) {
        let Request { name, line, work } = request;
        let (tasks, ended) = match line {
            Line::Demand => (&mut self.tasks, Ended::Demand),
            Line::Background => (&mut self.tasks, Ended::Background),
            Line::Kernel => (&mut self.kernels, Ended::Kernel),
        };
        match line {
            Line::Demand => self.demand += 1,
            Line::Background => self.background += 1,
            Line::Kernel => {}
        }
        spawn_into(tasks, name, async move {
            work.await;
            ended
        });
    }

    fn account(&mut self, ended: Result<Ended, tokio::task::JoinError>) {
        match ended {
            Ok(Ended::Demand) => self.demand -= 1,
            Ok(Ended::Background) => self.background -= 1,
            Ok(Ended::Kernel) => {}
            Ok(Ended::Evicted { tier, leaves_bytes, took }) => {
                self.batch_ended = true;
                match tier.position() {
                    Position::Host => self.host.ended(leaves_bytes, took),
                    Position::Device(device) => self.devices[device].ended(leaves_bytes, took),
                    Position::Below(level) => self.storage[level].ended(leaves_bytes, took),
                }
            }
            Err(error) if error.is_cancelled() => {}
            Err(error) => {
                // A migration never panics; if one does, the store is not to be trusted with more.
                tracing::error!(target: "vmem::actor", %error, "a migration ended in a panic");
                self.shared.set_closed();
            }
        }
    }

    /// Refuses what waits, lets what runs end, makes the named objects durable, and
    /// closes the disk and the device.
    async fn end(&mut self) -> Result<(), VirtualMemoryError> {
        self.inbox.demand.close();
        self.inbox.background.close();
        // Dropped they are refused.
        while self.inbox.demand.recv().await.is_some() {}
        while self.inbox.background.recv().await.is_some() {}
        self.shared.close_queues();
        while let Some(ended) = self.tasks.join_next().await {
            self.account(ended);
        }
        self.end_kernels().await;
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        let flushed = self.flush_names().await;
        self.names.clear();
        self.shared.events.end();
        // The catalog first: the disk gives the directory back.
        let unnamed = match self.names.catalog() {
            Ok(catalog) => catalog.close().await,
            Err(_) => Ok(()),
        };
        let mut closed = Ok(());
        // The disk last: with it goes the lock of the directory.
        for one in self.shared.storage().iter().rev() {
            let error = |error| self.shared.tier_error(0, error);
            closed = one.backend.close().await.map_err(error).and(closed);
        }
        let mut device = Ok(());
        for one in self.shared.devices() {
            device = device.and(one.backend.close().await.map_err(DeviceError::public));
        }
        flushed.and(unnamed).and(closed).and(device)
    }

    /// Makes the named objects durable. Their bytes come to the tier that names lead to for that,
    /// also from below it, which takes space: the evictors go on until then.
    async fn flush_names(&mut self) -> Result<(), VirtualMemoryError> {
        let names = self.names.clone();
        let flush = names::flush_all(&names);
        if self.storage.is_empty() || crate::planted!("below-unflushed") {
            return flush.await;
        }
        tokio::pin!(flush);
        self.shared.storage().iter().for_each(|storage| storage.state.queue.open_again());
        let mut woken = true;
        let flushed = loop {
            tokio::select! {
                biased;
                flushed = &mut flush => break flushed,
                after = self.step(woken) => woken = after,
            }
        };
        self.shared.close_queues();
        while let Some(ended) = self.tasks.join_next().await {
            self.account(ended);
        }
        flushed
    }

    /// Waits for kernels as long as any request may wait, and as long again for copies to the host
    /// that are in flight then. If a kernel does not end, the version before it stays the current
    /// one; its device memory is kept by the backend that waits for its event.
    async fn end_kernels(&mut self) {
        self.wait_for_kernels().await;
        // Leases that are still held can publish nothing any more.
        self.inbox.kernels.close();
        while self.inbox.kernels.try_recv().is_ok() {}
        if self.kernels.is_empty() {
            return;
        }
        let kernels = self.kernels.len();
        tracing::error!(target: "vmem::actor", kernels, "kernels have not ended");
        self.shared.kernels_abandoned.close();
        self.wait_for_kernels().await;
        self.kernels.shutdown().await;
    }

    /// Takes up the ends of kernels, until all have ended or the time that a request may wait is
    /// over.
    async fn wait_for_kernels(&mut self) {
        let late = sleep(self.shared.limits.wait_timeout);
        tokio::pin!(late);
        loop {
            // What a kernel has written is not to be lost.
            while let Ok(request) = self.inbox.kernels.try_recv() {
                self.start(request);
            }
            tokio::select! {
                biased;
                ended = self.kernels.join_next() => match ended {
                    Some(ended) => self.account(ended),
                    None => return,
                },
                () = &mut late => return,
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
