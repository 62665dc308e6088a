//! What the handles, the actor and the migrations of one store have in common.
//!
//! Invariant: object space, staging, disk and the order of eviction each keep their own ledger
//! behind their own lock, and no lock is taken while another one is held, but for those of
//! the allocators inside of them. Made by `VirtualMemory::with_backends`.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use foldhash::fast::FixedState;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::actor::{Requests, spawn_named};
use crate::backend::Backends;
use crate::buffer::IoBuf;
use crate::config::{self, Promotion, VirtualMemoryConfig};
use crate::copy::{Copies, OwnedCopy};
use crate::deadline::{Deadline, Late, Timing};
use crate::disk::{DiskBackend, DiskError};
use crate::error::VirtualMemoryError;
use crate::events::Events;
use crate::host::{HostArena, StagingPool};
use crate::memory_tier::MemoryTier;
use crate::migrate::Link;
use crate::names::Names;
use crate::object::{OBJECT_BYTES, Object};
use crate::parcel::{Delivery, GRACE, Parcel, Unclaimed, Unkept};
use crate::pins::PinBudget;
use crate::policy::Policy;
use crate::stats::{Counters, TierStats, VirtualMemoryStats, get};
use crate::tier::{Need, Queue, Refused};
use crate::vram::Vram;
use crate::wake::Wake;

/// What the configuration comes to on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) host_capacity: u64,
    pub(crate) staging_capacity: u64,
    /// Eviction ends here and starts there, in bytes of object space.
    pub(crate) low_bytes: u64,
    pub(crate) high_bytes: u64,
    pub(crate) promotion: Promotion,
    pub(crate) wait_timeout: Duration,
}

impl Limits {
    /// # Errors
    ///
    /// `InvalidConfig` if what was left open does not fit what was given.
    pub(crate) fn of(
        config: &VirtualMemoryConfig,
        host_capacity: u64,
    ) -> Result<Self, VirtualMemoryError> {
        let staging = config.staging_capacity().unwrap_or(config::default_staging(host_capacity));
        if staging >= host_capacity {
            let reason = format!("{staging} leaves nothing of host_capacity {host_capacity}");
            let field = "staging_capacity";
            return Err(VirtualMemoryError::InvalidConfig { field, reason: reason.into() });
        }
        let space = (host_capacity - staging) as f64;
        let (low, high) = config.watermarks();
        Ok(Limits {
            host_capacity,
            staging_capacity: staging,
            low_bytes: (space * low) as u64,
            high_bytes: (space * high) as u64,
            promotion: config.promotion(),
            wait_timeout: config.wait_timeout(),
        })
    }
}

/// See the module's documentation.
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    table: DashMap<u64, Arc<Object>, FixedState>,
    next_id: AtomicU64,
    opened: Instant,
    pub(crate) timing: Timing,
    pub(crate) host: Queue<Arc<HostArena>>,
    pub(crate) copies: Copies,
    pub(crate) staging: Arc<StagingPool>,
    pub(crate) disk: Arc<dyn DiskBackend>,
    pub(crate) disk_link: Link,
    pub(crate) names: Names,
    pub(crate) policy: Mutex<Box<dyn Policy>>,
    pub(crate) requests: Requests,
    /// Where the actor runs.
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) wake: Arc<Wake>,
    pub(crate) events: Events,
    pub(crate) counters: Counters,
    /// The tier above host memory, if there is one; and if not, why.
    vram: Option<Vram>,
    vram_reason: Arc<str>,
    /// The pins in host memory.
    host_pins: PinBudget,
    /// The evictor found nothing that it could take but what is pinned, leased or held.
    pub(crate) blocked_by_holds: AtomicBool,
    /// What the runtime has set aside for callers.
    pub(crate) unclaimed: Arc<Unclaimed>,
    /// The tasks that serve callers past the actor.
    pub(crate) tasks: TaskTracker,
    /// Closed once a store that ends waits for kernels no longer; it never has a permit.
    pub(crate) patience: Semaphore,
    closed: AtomicBool,
}

impl Shared {
    pub(crate) fn new(
        config: &VirtualMemoryConfig,
        limits: Limits,
        backends: Backends,
        requests: Requests,
        vram_reason: Arc<str>,
    ) -> Result<Arc<Self>, VirtualMemoryError> {
        let Backends { disk, catalog, device, .. } = backends;
        let pinned_max =
            (limits.host_capacity - limits.staging_capacity) as f64 * config.max_pinned();
        let reserve = |e| VirtualMemoryError::io("reserving host memory", e);
        let arena =
            HostArena::new(limits.host_capacity - limits.staging_capacity).map_err(reserve)?;
        let staging = StagingPool::new(limits.staging_capacity).map_err(reserve)?;
        let wake = Arc::new(Wake::default());
        let bell = wake.clone();
        arena.set_freed_hook(Box::new(move || bell.if_waiting()));
        let unclaimed = Arc::new(Unclaimed::new(wake.clone()));
        let runtime = tokio::runtime::Handle::current();
        let policy = config.policy().build(arena.capacity_bytes());
        let vram = device.map(|device| {
            let policy = config.policy().build(device.usage().capacity_bytes);
            Vram::new(device, policy, config.max_pinned(), &wake, &unclaimed)
        });
        Ok(Arc::new(Shared {
            table: DashMap::with_hasher(FixedState::default()),
            next_id: AtomicU64::new(1),
            opened: Instant::now(),
            timing: Timing { clock: disk.clock(), runtime: runtime.id() },
            host: Queue::new(arena, limits.high_bytes, wake.clone(), unclaimed.clone()),
            copies: Copies::new(wake.clone()),
            staging,
            names: Names::start(catalog, &disk),
            disk,
            disk_link: Link::default(),
            policy: Mutex::new(policy),
            requests,
            runtime,
            wake,
            events: Events::new(),
            counters: Counters::default(),
            vram,
            vram_reason,
            host_pins: PinBudget::new(pinned_max as u64),
            blocked_by_holds: AtomicBool::new(false),
            unclaimed,
            tasks: TaskTracker::new(),
            patience: Semaphore::const_new(0),
            closed: AtomicBool::new(false),
            limits,
        }))
    }

    /// Nanoseconds since the store was opened.
    pub(crate) fn now(&self) -> u64 {
        self.opened.elapsed().as_nanos() as u64
    }

    /// When a request that starts now gives up.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline_in(self.limits.wait_timeout)
    }

    /// When a request that starts now and waits so long gives up.
    pub(crate) fn deadline_in(&self, wait: Duration) -> Deadline {
        Deadline::after(wait, self.timing)
    }

    // ---- The table ---------------------------------------------------------------------------

    /// A new object with one handle, which nobody finds before `announce`.
    pub(crate) fn create(self: &Arc<Self>, len: usize, home: MemoryTier) -> Arc<Object> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Object::new(self, id, len, home)
    }

    /// Puts a new object, which has its room, into the table.
    pub(crate) fn announce(&self, object: &Arc<Object>) {
        self.table.insert(object.id, object.clone());
    }

    pub(crate) fn find(&self, id: u64) -> Option<Arc<Object>> {
        self.table.get(&id).map(|object| object.clone())
    }

    /// Every object that is alive now.
    pub(crate) fn all(&self) -> Vec<Arc<Object>> {
        self.table.iter().map(|object| object.clone()).collect()
    }

    pub(crate) fn forget(&self, id: u64) {
        self.table.remove(&id);
    }

    // ---- The end -----------------------------------------------------------------------------

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// From now on every new call gets `Closed`. True for the first caller.
    pub(crate) fn set_closed(&self) -> bool {
        let first = !self.closed.swap(true, Ordering::SeqCst);
        self.wake.now();
        self.host_pins.ring();
        if let Some(vram) = &self.vram {
            vram.pins.ring();
            vram.ring();
        }
        first
    }

    /// Nobody makes space any more.
    pub(crate) fn close_queues(&self) {
        self.host.close();
        if let Some(vram) = &self.vram {
            vram.queue.close();
        }
    }

    // ---- Tasks -------------------------------------------------------------------------------

    /// Runs `work` as a task of the runtime, which `close` waits for. It never waits for a caller.
    pub(crate) fn spawn<F>(self: &Arc<Self>, name: &'static str, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = self.clone();
        let guarded = self.tasks.track_future(async move {
            // A migration never panics; if one does, the store is not to be trusted with more.
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                tracing::error!(target: "vmem::actor", name, "a task ended in a panic");
                shared.set_closed();
            }
        });
        spawn_named(&self.runtime, name, guarded);
    }

    /// Runs `work` as a task, which is dropped once its caller is, and sets its value aside for the caller.
    pub(crate) fn spawn_for_caller<T, F>(
        self: &Arc<Self>,
        name: &'static str,
        work: F,
    ) -> Parcel<Result<T, VirtualMemoryError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        let (delivery, parcel) = crate::parcel::parcel();
        let unclaimed = self.unclaimed.clone();
        self.spawn(name, async move { serve_caller(work, delivery, &unclaimed).await });
        parcel
    }

    /// As `spawn_for_caller`, for a value that keeps others from an object: the task takes it back by itself.
    pub(crate) fn spawn_for_caller_briefly<T, F>(
        self: &Arc<Self>,
        name: &'static str,
        work: F,
    ) -> Parcel<Result<T, VirtualMemoryError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        let (delivery, parcel) = crate::parcel::parcel();
        let unclaimed = Arc::new(Unclaimed::default());
        self.spawn(name, async move {
            serve_caller(work, delivery, &unclaimed).await;
            while let Some(due) = unclaimed.recall() {
                tokio::time::sleep_until(due).await;
            }
        });
        parcel
    }

    /// The answer of a task; none if it was taken back, and is to be asked for again.
    ///
    /// # Errors
    ///
    /// That of the task; `TimedOut` if it does not answer, `Closed` if it has gone.
    pub(crate) async fn answer<T>(
        &self,
        parcel: &Parcel<Result<T, VirtualMemoryError>>,
        deadline: &Deadline,
        operation: &'static str,
    ) -> Result<Option<T>, VirtualMemoryError> {
        match deadline.bound_answer(parcel.claim()).await {
            Ok(Ok(outcome)) => outcome.map(Some),
            Ok(Err(Unkept::Recalled)) if deadline.is_past() => Err(deadline.error(operation)),
            Ok(Err(Unkept::Recalled)) => Ok(None),
            Ok(Err(Unkept::Abandoned)) => Err(VirtualMemoryError::Closed),
            Err(Late) => Err(deadline.error(operation)),
        }
    }

    // ---- Space -------------------------------------------------------------------------------

    /// A piece of staging; for a task. What lies there for callers who do not come is taken back.
    ///
    /// # Errors
    ///
    /// `TimedOut` at the deadline.
    pub(crate) async fn staging(&self, deadline: &Deadline) -> Result<IoBuf, VirtualMemoryError> {
        let acquired = async {
            let acquire = self.staging.acquire();
            tokio::pin!(acquire);
            loop {
                tokio::select! {
                    biased;
                    piece = &mut acquire => return IoBuf::from_staging(piece),
                    () = tokio::time::sleep(GRACE) => drop(self.unclaimed.recall()),
                }
            }
        };
        let late = |Late| deadline.error("waiting for staging memory");
        deadline.bound(acquired).await.map_err(late)
    }

    /// The largest object that host memory could ever hold, in bytes of footprint.
    pub(crate) fn host_space(&self) -> u64 {
        self.host.space().capacity_bytes()
    }

    /// Whether an object of this length can be host-resident at all.
    pub(crate) fn fits_host(&self, len: usize) -> bool {
        HostArena::footprint(len) <= self.host_space()
    }

    pub(crate) fn exceeds_host(&self, len: usize) -> VirtualMemoryError {
        VirtualMemoryError::ExceedsCapacity {
            tier: MemoryTier::Host,
            requested_bytes: HostArena::footprint(len),
            capacity_bytes: self.host_space(),
        }
    }

    /// What no eviction frees now, in bytes of host memory: at least so much, since what is pinned may be held
    /// too.
    pub(crate) fn host_holds(&self) -> u64 {
        self.host_pins.bytes().max(self.copies.held_bytes())
    }

    /// Space in host memory for one object, if there is some now.
    pub(crate) fn try_host_room(&self, need: &Need) -> Option<OwnedCopy> {
        let slot = self.host.try_take(need)?.pop()?;
        self.check_high_mark();
        Some(OwnedCopy::new(&self.copies, slot))
    }

    /// Space in host memory for one object, as soon as there is some.
    pub(crate) async fn host_room(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<OwnedCopy, Refused> {
        let mut rooms = self.host_rooms(need, deadline).await?;
        Ok(rooms.pop().expect("invariant: a grant has space for each object"))
    }

    /// Space in host memory for each object of the request, as soon as there is some for all.
    pub(crate) async fn host_rooms(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<Vec<OwnedCopy>, Refused> {
        let grant = self.host.take(need, deadline).await?;
        self.check_high_mark();
        Ok(grant.into_iter().map(|slot| OwnedCopy::new(&self.copies, slot)).collect())
    }

    /// As [`host_room`](Self::host_room), for callers who have no other way.
    pub(crate) async fn host_room_or_error(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<OwnedCopy, VirtualMemoryError> {
        if !self.fits_host(need.len()) {
            return Err(self.exceeds_host(need.len()));
        }
        self.host_room(need, deadline).await.map_err(|refused| self.refusal(need, refused))
    }

    /// The public form of a refusal.
    pub(crate) fn refusal(&self, need: &Need, refused: Refused) -> VirtualMemoryError {
        match refused {
            Refused::Error(error) => error,
            Refused::Deadline(waited) => self.why_no_room(self.host.footprint(need), waited),
            Refused::Spill => self.host_full(self.host.footprint(need)),
        }
    }

    /// What kept a request from being served until its deadline.
    fn why_no_room(&self, requested_bytes: u64, waited: Duration) -> VirtualMemoryError {
        let holds = self.host_pins.bytes() + self.copies.held_bytes();
        let unreachable = requested_bytes > self.host_space().saturating_sub(self.host_holds());
        let blocked = unreachable || self.blocked_by_holds.load(Ordering::SeqCst);
        if holds == 0 || !blocked {
            return VirtualMemoryError::TimedOut { operation: "making room in host", waited };
        }
        VirtualMemoryError::AllPinned {
            tier: MemoryTier::Host,
            requested_bytes,
            pinned_bytes: self.host_pins.bytes(),
            leased_bytes: 0,
            held_bytes: self.copies.held_bytes(),
            capacity_bytes: self.host_space(),
            waited,
        }
    }

    /// Host memory is full and nothing can leave it.
    pub(crate) fn host_full(&self, requested_bytes: u64) -> VirtualMemoryError {
        let arena = self.host.space();
        VirtualMemoryError::TierFull {
            tier: MemoryTier::Host,
            requested_bytes,
            free_bytes: arena.capacity_bytes().saturating_sub(arena.used_bytes()),
            capacity_bytes: arena.capacity_bytes(),
        }
    }

    fn check_high_mark(&self) {
        if self.host.space().used_bytes() > self.limits.high_bytes {
            self.wake.now();
        }
    }

    /// Tells those who wait that something went.
    pub(crate) fn room_was_freed(&self) {
        self.wake.if_waiting();
        self.vram_was_released();
    }

    // ---- VRAM --------------------------------------------------------------------------------

    /// The tier above host memory.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn vram(&self) -> Result<&Vram, VirtualMemoryError> {
        let lost = |reason| VirtualMemoryError::TierNotAvailable { tier: MemoryTier::Vram, reason };
        let vram = self.vram.as_ref().ok_or_else(|| lost(self.vram_reason.clone()))?;
        match vram.backend.lost() {
            None => Ok(vram),
            Some(reason) => Err(lost(reason)),
        }
    }

    /// The tier above host memory, in use or lost.
    pub(crate) fn vram_if_any(&self) -> Option<&Vram> {
        self.vram.as_ref()
    }

    /// Tells those who wait for room in device memory that something may have become free there.
    pub(crate) fn vram_was_released(&self) {
        if let Some(vram) = &self.vram {
            vram.ring();
        }
    }

    /// Footprint that pins keep in host memory, in bytes.
    pub(crate) fn host_pinned(&self) -> u64 {
        self.host_pins.bytes()
    }

    // ---- Pins --------------------------------------------------------------------------------

    /// The pins of a tier that has any.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn pins(&self, tier: MemoryTier) -> Result<&PinBudget, VirtualMemoryError> {
        match tier {
            MemoryTier::Vram => self.vram().map(|vram| &vram.pins),
            MemoryTier::Host | MemoryTier::Disk => Ok(&self.host_pins),
        }
    }

    /// What an object of `len` bytes takes of this tier, in bytes.
    pub(crate) fn footprint_in(&self, tier: MemoryTier, len: usize) -> u64 {
        match (tier, &self.vram) {
            (MemoryTier::Vram, Some(vram)) => vram.backend.footprint(len),
            _ => HostArena::footprint(len),
        }
    }

    /// Gives back what the first pin of an object was charged.
    pub(crate) fn uncharge_pin(&self, tier: MemoryTier, len: usize) {
        let footprint = self.footprint_in(tier, len);
        match (tier, &self.vram) {
            (MemoryTier::Vram, Some(vram)) => vram.pins.uncharge(footprint),
            _ => self.host_pins.uncharge(footprint),
        }
        self.room_was_freed();
    }

    // ---- Errors and figures --------------------------------------------------------------------

    /// The public form of what the disk said of this object.
    pub(crate) fn disk_error(&self, handle: u64, error: DiskError) -> VirtualMemoryError {
        match error {
            DiskError::Full { requested_bytes, free_bytes, .. } => VirtualMemoryError::TierFull {
                tier: MemoryTier::Disk,
                requested_bytes,
                free_bytes,
                capacity_bytes: self.disk.usage().capacity_bytes,
            },
            DiskError::Corrupt { chunk, expected, actual } => {
                VirtualMemoryError::Corrupt { handle, chunk: chunk as u64, expected, actual }
            }
            DiskError::Io { operation, source } => VirtualMemoryError::Io { operation, source },
            DiskError::Closed => VirtualMemoryError::Closed,
        }
    }

    pub(crate) fn stats(&self) -> VirtualMemoryStats {
        let (arena, disk, counters) = (self.host.space(), self.disk.usage(), &self.counters);
        let objects = self.table.len() as u64;
        VirtualMemoryStats {
            vram: self.vram.as_ref().map_or_else(TierStats::default, |vram| {
                let usage = vram.usage();
                TierStats {
                    used_bytes: usage.used_bytes,
                    capacity_bytes: usage.capacity_bytes,
                    peak_bytes: usage.peak_bytes,
                    objects: get(&counters.vram_objects),
                    hits: get(&counters.vram_hits),
                    largest_free_bytes: usage.largest_free_bytes,
                }
            }),
            host: TierStats {
                used_bytes: arena.used_bytes(),
                capacity_bytes: arena.capacity_bytes(),
                peak_bytes: arena.peak_bytes(),
                objects: get(&counters.host_objects),
                hits: self.copies.hits(),
                largest_free_bytes: arena.largest_free_bytes(),
            },
            disk: TierStats {
                used_bytes: disk.used_bytes,
                capacity_bytes: disk.capacity_bytes,
                peak_bytes: disk.peak_bytes,
                objects: get(&counters.disk_objects),
                hits: get(&counters.disk_hits),
                largest_free_bytes: disk.largest_free_bytes,
            },
            objects,
            metadata_bytes: objects * OBJECT_BYTES
                + get(&counters.map_bytes)
                + self.names.memory_bytes(),
            names_in_memory: self.names.in_memory(),
            staging_bytes: self.limits.staging_capacity,
            registered_bytes: arena.registered_bytes(),
            held_bytes: self.copies.held_bytes(),
            pinned_bytes: self.host_pins.bytes(),
            dirty_bytes: get(&counters.dirty_bytes),
            waiters: self.host.len() as u64
                + self.vram.as_ref().map_or(0, |vram| vram.queue.len() as u64),
            migrations_in_flight: get(&counters.in_flight),
            misses: get(&counters.misses),
            evictions: get(&counters.evictions),
            promotions: get(&counters.promotions),
            clean_drops: get(&counters.clean_drops),
            host_to_vram_bytes: get(&counters.host_to_vram_bytes),
            vram_to_host_bytes: get(&counters.vram_to_host_bytes),
            disk_to_host_bytes: get(&counters.disk_to_host_bytes),
            host_to_disk_bytes: get(&counters.host_to_disk_bytes),
            named_changes: self.names.committed().0,
            commits: self.names.committed().1,
            errors: get(&counters.errors),
        }
    }
}

/// Runs `work` for as long as its caller is there, and sets its value aside.
async fn serve_caller<T: Send + 'static>(
    work: impl Future<Output = Result<T, VirtualMemoryError>>,
    delivery: Delivery<Result<T, VirtualMemoryError>>,
    unclaimed: &Arc<Unclaimed>,
) {
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = delivery.unwanted() => return,
    };
    let counted = outcome.is_ok().then_some(unclaimed);
    drop(delivery.deliver(outcome, counted));
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}
