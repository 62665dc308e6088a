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
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::buffer::IoBuf;
use crate::capabilities::Capabilities;
use crate::catalog::Catalog;
use crate::config::{self, Promotion, VirtualMemoryConfig};
use crate::copy::{Copies, OwnedCopy};
use crate::deadline::{Deadline, Late, Timing};
use crate::device::DeviceBackend;
use crate::disk::{DiskBackend, DiskError, Extent};
use crate::error::VirtualMemoryError;
use crate::events::Events;
use crate::host::{HostArena, StagingPool};
use crate::memory_tier::MemoryTier;

use crate::names::Names;
use crate::object::{OBJECT_BYTES, Object};
use crate::parcel::{Delivery, GRACE, Parcel, SetAside, Unclaimed, Unkept};
use crate::requests::{Request, Requests};
use crate::stats::{Counters, TierStats, VirtualMemoryStats, get};
use crate::task::spawn_named;
use crate::tier::{
    Device, Hold, Holds, HostSpace, Link, Need, Queue, Refused, TierState, Watermarks,
};
use crate::wake::Wake;

/// Reads past the actor that are under way at once.
const READS_MAX: usize = 1024;

/// The parts of a store.
#[derive(Debug)]
pub struct Backends {
    /// Host memory that the store may use, staging included, in bytes.
    pub host_capacity_bytes: u64,
    /// The tier below it.
    pub disk: Arc<dyn DiskBackend>,
    /// Where names are stored; without one there are no named objects.
    pub catalog: Option<Arc<dyn Catalog>>,
    /// The tiers above it, in the order of their numbers: `MemoryTier::Vram` is the first.
    pub devices: Vec<Arc<dyn DeviceBackend>>,
    /// What was found when they were opened.
    pub capabilities: Capabilities,
}

/// What the configuration comes to on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) host_capacity: u64,
    pub(crate) staging_capacity: u64,
    /// Of object space.
    pub(crate) marks: Watermarks,
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
            marks: Watermarks {
                low_bytes: (space * low) as u64,
                high_bytes: (space * high) as u64,
            },
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
    pub(crate) host: TierState<HostSpace>,
    /// The tiers above host memory.
    devices: Vec<Device>,
    /// Why there are none.
    no_device: Arc<str>,
    pub(crate) copies: Copies,
    pub(crate) staging: Arc<StagingPool>,
    pub(crate) disk: Arc<dyn DiskBackend>,
    pub(crate) disk_link: Link,
    pub(crate) names: Names,
    requests: Requests,
    /// Where the actor runs.
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) wake: Arc<Wake>,
    pub(crate) events: Events,
    pub(crate) counters: Counters,
    /// What the runtime has set aside for callers.
    pub(crate) unclaimed: Arc<Unclaimed>,
    /// Writes to disk, which lie aside for their callers with the extents that they have taken so
    /// far. Taken back for space on disk alone: such a write begins again.
    pub(crate) unfinished: Arc<Unclaimed>,
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
        no_device: Arc<str>,
    ) -> Result<Arc<Self>, VirtualMemoryError> {
        let Backends { disk, catalog, devices, .. } = backends;
        let reserve = |e| VirtualMemoryError::io("reserving host memory", e);
        let arena =
            HostArena::new(limits.host_capacity - limits.staging_capacity).map_err(reserve)?;
        let staging = StagingPool::new(limits.staging_capacity).map_err(reserve)?;
        let wake = Arc::new(Wake::default());
        let bell = wake.clone();
        arena.set_freed_hook(Box::new(move || bell.if_waiting()));
        let unclaimed = Arc::new(Unclaimed::new(wake.clone()));
        let runtime = tokio::runtime::Handle::current();
        let copies = Copies::new(wake.clone());
        let order = |capacity_bytes| config.policy().build(capacity_bytes);
        let host = {
            let order = order(arena.capacity_bytes());
            let space = HostSpace::new(arena, copies.clone());
            let high_bytes = limits.marks.high_bytes;
            let queue = Queue::new(space, high_bytes, wake.clone(), unclaimed.clone());
            TierState::new(MemoryTier::Host, queue, order, config.max_pinned(), limits.marks)
        };
        let device = |(number, backend): (u8, Arc<dyn DeviceBackend>)| {
            let order = order(backend.usage().capacity_bytes);
            Device::new(number, backend, order, config.max_pinned(), &wake, &unclaimed)
        };
        let devices = (0..).zip(devices).map(device).collect();
        Ok(Arc::new(Shared {
            table: DashMap::with_hasher(FixedState::default()),
            next_id: AtomicU64::new(1),
            opened: Instant::now(),
            timing: Timing { clock: disk.clock(), runtime: runtime.id() },
            host,
            devices,
            no_device,
            copies,
            staging,
            names: Names::start(catalog, &disk),
            disk,
            disk_link: Link::default(),
            requests,
            runtime,
            wake,
            events: Events::new(),
            counters: Counters::default(),
            unclaimed,
            unfinished: Arc::default(),
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
        self.host.holds.ring();
        for device in &self.devices {
            device.state.holds.ring();
            device.ring();
        }
        first
    }

    /// Nobody makes space any more.
    pub(crate) fn close_queues(&self) {
        self.host.queue.close();
        self.devices.iter().for_each(|device| device.state.queue.close());
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

    /// Whether a read may start its own task, past the actor.
    pub(crate) fn takes_reads(&self) -> bool {
        self.tasks.len() < READS_MAX && !self.requests.is_closed()
    }

    /// Has the actor start a migration. Where its channel is full a task waits there, and the caller does not.
    pub(crate) fn request(self: &Arc<Self>, request: Request) {
        if let Some((channel, request)) = self.requests.try_send(request) {
            self.spawn("vmem-request", async move {
                // Dropped unsent it is refused: whoever waits for its reply finds that nobody will.
                drop(channel.send(request).await);
            });
        }
    }

    /// Runs `work` as a task, which is dropped once its caller is, and sets its value aside for the caller.
    pub(crate) fn spawn_for_caller<T, F>(
        self: &Arc<Self>,
        name: &'static str,
        work: F,
    ) -> Parcel<Result<T, VirtualMemoryError>>
    where
        T: SetAside + Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        let (delivery, parcel) = crate::parcel::parcel();
        let unclaimed = self.unclaimed.clone();
        self.spawn(
            name,
            async move { serve_caller(work, delivery, &unclaimed, T::is_shared).await },
        );
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
            serve_caller(work, delivery, &unclaimed, |_| true).await;
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
        self.host.space().arena.capacity_bytes()
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

    /// Space in host memory for one object, if there is some now.
    pub(crate) fn try_host_room(&self, need: &Need) -> Option<OwnedCopy> {
        self.try_host_rooms(need)?.pop()
    }

    /// Space in host memory for each object of the request, if there is some for all now.
    pub(crate) fn try_host_rooms(&self, need: &Need) -> Option<Vec<OwnedCopy>> {
        let grant = self.host.queue.try_take(need)?;
        self.check_high_mark();
        Some(grant.into_iter().map(|slot| OwnedCopy::new(&self.copies, slot)).collect())
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
        let grant = self.host.queue.take(need, deadline).await?;
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
        self.host.refusal(need, refused)
    }

    fn check_high_mark(&self) {
        if self.host.space().arena.used_bytes() > self.limits.marks.high_bytes {
            self.wake.now();
        }
    }

    /// Tells those who wait that something went.
    pub(crate) fn room_was_freed(&self) {
        self.wake.if_waiting();
        self.devices.iter().for_each(Device::ring);
    }

    // ---- Space on disk -----------------------------------------------------------------------

    /// Space on disk, at once or not at all. If there is none, what lies there for callers who do
    /// not come goes back first.
    pub(crate) fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, DiskError> {
        match self.disk.reserve(lens) {
            Err(DiskError::Full { .. }) => {
                self.recall_extents();
                self.disk.reserve(lens)
            }
            outcome => outcome,
        }
    }

    /// As `reserve`, for whoever would be refused: if something may come back within the grace it
    /// waits for that.
    pub(crate) async fn reserve_soon(&self, lens: &[u32]) -> Result<Vec<Extent>, DiskError> {
        match self.reserve(lens) {
            Err(DiskError::Full { .. }) if self.extents_come_back().await => self.reserve(lens),
            outcome => outcome,
        }
    }

    /// Takes back what has lain for the grace with extents on disk, or with versions that keep
    /// some. Returns whether something lies there for less.
    fn recall_extents(&self) -> bool {
        self.unclaimed.recall().is_some() | self.unfinished.recall().is_some()
    }

    /// Waits until what lies aside now has lain there for the grace, and takes it back. False at
    /// once if nothing does.
    pub(crate) async fn extents_come_back(&self) -> bool {
        if !self.recall_extents() {
            return false;
        }
        let grace = self.deadline_in(GRACE);
        let Err(Late) = grace.bound(std::future::pending::<std::convert::Infallible>()).await;
        self.recall_extents();
        true
    }

    // ---- Devices -----------------------------------------------------------------------------

    /// All devices, in use or lost.
    pub(crate) fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// A device that serves.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn device(&self, number: usize) -> Result<&Device, VirtualMemoryError> {
        match self.devices.get(number) {
            Some(device) => device.lost().map_or(Ok(device), Err),
            None => {
                let reason = match self.devices.len() {
                    0 => self.no_device.clone(),
                    count => format!("the store has {count} devices").into(),
                };
                let tier = MemoryTier::of_device(u8::try_from(number).unwrap_or(u8::MAX));
                Err(VirtualMemoryError::TierNotAvailable { tier, reason })
            }
        }
    }

    /// Whether the tier is there.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn check_tier(&self, tier: MemoryTier) -> Result<(), VirtualMemoryError> {
        tier.device().map_or(Ok(()), |device| self.device(device).map(drop))
    }

    // ---- Holds -------------------------------------------------------------------------------

    /// What holds a tier that can be held.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn holds(&self, tier: MemoryTier) -> Result<&Holds, VirtualMemoryError> {
        match tier.device() {
            Some(device) => Ok(&self.device(device)?.state.holds),
            None => Ok(&self.host.holds),
        }
    }

    /// What an object of `len` bytes takes of this tier, in bytes.
    pub(crate) fn footprint_in(&self, tier: MemoryTier, len: usize) -> u64 {
        match tier.device().and_then(|device| self.devices.get(device)) {
            Some(device) => device.backend.footprint(len),
            None => HostArena::footprint(len),
        }
    }

    /// Gives back what was charged for holds, in bytes of footprint.
    pub(crate) fn uncharge(&self, tier: MemoryTier, hold: Hold, footprint: u64) {
        let device = tier.device().and_then(|device| self.devices.get(device));
        device.map_or(&self.host.holds, |device| &device.state.holds).uncharge(hold, footprint);
        self.room_was_freed();
    }

    /// Why an object cannot be held in this tier.
    pub(crate) fn all_held(
        &self,
        tier: MemoryTier,
        requested_bytes: u64,
        waited: Duration,
    ) -> VirtualMemoryError {
        match tier.device().and_then(|device| self.devices.get(device)) {
            Some(device) => device.state.all_held(requested_bytes, waited),
            None => self.host.all_held(requested_bytes, waited),
        }
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

    /// One tier, now.
    pub(crate) fn tier_stats(&self, tier: MemoryTier) -> TierStats {
        let (arena, disk) = (&self.host.space().arena, self.disk.usage());
        match tier {
            MemoryTier::Host => TierStats {
                used_bytes: arena.used_bytes(),
                capacity_bytes: arena.capacity_bytes(),
                peak_bytes: arena.peak_bytes(),
                objects: get(&self.host.objects),
                hits: self.copies.hits(),
                largest_free_bytes: arena.largest_free_bytes(),
            },
            MemoryTier::Disk => TierStats {
                used_bytes: disk.used_bytes,
                capacity_bytes: disk.capacity_bytes,
                peak_bytes: disk.peak_bytes,
                objects: get(&self.counters.disk_objects),
                hits: get(&self.counters.disk_hits),
                largest_free_bytes: disk.largest_free_bytes,
            },
            MemoryTier::Vram | MemoryTier::OtherVram(_) => {
                let device = tier.device().and_then(|device| self.devices.get(device));
                device.map_or_else(TierStats::default, Device::stats)
            }
        }
    }

    pub(crate) fn stats(&self) -> VirtualMemoryStats {
        let counters = &self.counters;
        let waiting = |device: &Device| device.state.queue.len() as u64;
        let objects = self.table.len() as u64;
        VirtualMemoryStats {
            vram: self.tier_stats(MemoryTier::Vram),
            host: self.tier_stats(MemoryTier::Host),
            disk: self.tier_stats(MemoryTier::Disk),
            objects,
            metadata_bytes: objects * OBJECT_BYTES
                + get(&counters.map_bytes)
                + self.names.memory_bytes(),
            names_in_memory: self.names.in_memory(),
            staging_bytes: self.limits.staging_capacity,
            registered_bytes: self.host.space().arena.registered_bytes(),
            held_bytes: self.copies.held_bytes(),
            pinned_bytes: self.host.holds.bytes().total(),
            dirty_bytes: get(&counters.dirty_bytes),
            waiters: self.host.queue.len() as u64 + self.devices.iter().map(waiting).sum::<u64>(),
            migrations_in_flight: get(&counters.in_flight),
            misses: get(&counters.misses),
            evictions: get(&counters.evictions),
            promotions: get(&counters.promotions),
            clean_drops: get(&counters.clean_drops),
            relocated_bytes: get(&counters.relocated_bytes),
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

/// Runs `work` for as long as its caller is there, and sets its value aside: to be taken back if it
/// `is_shared`.
async fn serve_caller<T: Send + 'static>(
    work: impl Future<Output = Result<T, VirtualMemoryError>>,
    delivery: Delivery<Result<T, VirtualMemoryError>>,
    unclaimed: &Arc<Unclaimed>,
    is_shared: impl FnOnce(&T) -> bool,
) {
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = delivery.unwanted() => return,
    };
    let counted = outcome.as_ref().is_ok_and(is_shared).then_some(unclaimed);
    drop(delivery.deliver(outcome, counted));
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}
