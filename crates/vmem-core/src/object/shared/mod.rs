//! What the handles, the actor and the migrations of one store have in common.
//!
//! Invariant: object space, staging, disk and the order of eviction each keep their own ledger
//! behind their own lock, and locks are taken in the order of `locks.rs`. Made by
//! `VirtualMemory::with_backends`.

mod figures;
mod held;
mod space;
mod table;
mod tasks;
mod tiers;

pub(crate) use held::FREE_BYTES;
use table::Table;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::capabilities::Capabilities;
use crate::catalog::Catalog;
use crate::config::{self, GPUS_MAX, Promotion, VirtualMemoryConfig, WriteBack};
use crate::copy::Copies;
use crate::deadline::{Deadline, Timing};
use crate::device::DeviceBackend;
use crate::error::VirtualMemoryError;
use crate::events::Events;
use crate::host::{HostArena, StagingPool};
use crate::latency::Latencies;
use crate::memory_tier::MemoryTier;
use crate::storage::{Durable, Tier};
use crate::totals::Totals;

use crate::object::Object;
use crate::parcel::Unclaimed;
use crate::plans::Plans;
use crate::recency::Recency;
use crate::requests::Requests;
use crate::span_rate::SpanRate;
use crate::stats::Counters;
use crate::tier::{Device, Holds, HostSpace, Queue, Space, Storage, TierState, Watermarks};
use crate::wake::Wake;
use crate::windows::Windows;

/// Reads past the actor that are under way at once.
const READS_MAX: usize = 1024;

/// The parts of a store.
#[derive(Debug)]
pub struct Backends {
    /// Host memory that the store may use, staging included, in bytes.
    pub host_capacity_bytes: u64,
    /// The tier below it.
    pub disk: Arc<dyn Durable>,
    /// The tier below the disk, `MemoryTier::Remote`, if there is one.
    pub remote: Option<Remote>,
    /// Where names are stored; without one there are no named objects.
    pub catalog: Option<Arc<dyn Catalog>>,
    /// The tiers above it, in the order of their numbers: `MemoryTier::Vram` is the first.
    pub devices: Vec<Arc<dyn DeviceBackend>>,
    /// What was found when they were opened.
    pub capabilities: Capabilities,
}

/// The tier below the disk, and what it is for.
#[derive(Clone, Debug)]
pub enum Remote {
    /// It takes what has no name and finds no space on disk. Names lead to the disk.
    Unnamed(Arc<dyn Tier>),
    /// Names lead there: an object is durable once it is in this tier, and the disk has copies. The
    /// catalog is of the same place.
    Named(Arc<dyn Durable>),
}

/// Copies that timers make at once.
const TIMER_TURNS: usize = 16;

/// Called when the last handle of a named object but that of the table of names has gone.
type ClosedHook = Box<dyn Fn(&Arc<Object>) + Send + Sync>;

/// What the configuration comes to on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) host_capacity: u64,
    pub(crate) staging_capacity: u64,
    pub(crate) stream_capacity: u64,
    /// Of object space.
    pub(crate) marks: Watermarks,
    /// What readers may hold of object space, where that is bound.
    pub(crate) max_held_bytes: Option<u64>,
    pub(crate) promotion: Promotion,
    pub(crate) gather_promotion: Promotion,
    pub(crate) write_back: WriteBack,
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
            return Err(VirtualMemoryError::invalid_config("staging_capacity", reason));
        }
        let space = (host_capacity - staging) as f64;
        let (low, high) = config.watermarks();
        assert!(0.0 < low && low < high && high <= 1.0, "watermarks {low} and {high}");
        Ok(Limits {
            host_capacity,
            staging_capacity: staging,
            stream_capacity: config
                .stream_capacity()
                .unwrap_or(config::default_streams(host_capacity)),
            marks: Watermarks {
                low_bytes: (space * low) as u64,
                high_bytes: (space * high) as u64,
            },
            max_held_bytes: (config.max_held() < 1.0).then_some((space * config.max_held()) as u64),
            promotion: config.promotion(),
            gather_promotion: config.gather_promotion(),
            write_back: config.write_back(),
            wait_timeout: config.wait_timeout(),
        })
    }
}

/// See the module's documentation.
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    table: Table,
    next_id: AtomicU64,
    pub(crate) recency: Recency,
    pub(crate) timing: Timing,
    pub(crate) host: TierState<HostSpace>,
    /// The tiers above host memory.
    devices: Vec<Device>,
    /// Why there are none.
    no_device: Arc<str>,
    pub(crate) copies: Copies,
    /// What reads are going to hold, in bytes: see `held.rs`.
    promised_bytes: AtomicU64,
    pub(crate) staging: Arc<StagingPool>,
    pub(crate) windows: Arc<Windows>,
    /// The tiers below host memory, the disk first.
    storage: SmallVec<[Storage; 2]>,
    /// Which of them names lead to.
    durable_level: usize,
    durable: Arc<dyn Durable>,
    /// Called with named objects that no handle leads to any more.
    closed_hook: OnceLock<ClosedHook>,
    requests: Requests,
    /// Where the actor runs.
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) wake: Arc<Wake>,
    pub(crate) events: Events,
    pub(crate) counters: Counters,
    pub(crate) latencies: Arc<Latencies>,
    /// Of reads.
    pub(crate) read_spans: SpanRate,
    /// Of migrations and prefetches that run for no read.
    pub(crate) migration_spans: SpanRate,
    pub(crate) totals: Arc<Totals>,
    /// What the recorder of the process has been given.
    #[cfg(feature = "metrics")]
    pub(crate) published: parking_lot::Mutex<crate::metrics::Published>,
    /// What the runtime has set aside for callers.
    pub(crate) unclaimed: Arc<Unclaimed>,
    /// Writes to disk, which lie aside for their callers with the extents that they have taken so
    /// far. Taken back for space on disk alone: such a write begins again.
    pub(crate) unfinished: Arc<Unclaimed>,
    /// The tasks that serve callers past the actor.
    pub(crate) tasks: TaskTracker,
    /// Closed once a store that ends waits for kernels no longer; it never has a permit.
    pub(crate) kernels_abandoned: Semaphore,
    /// For the copies that timers make.
    pub(crate) timer_turns: Semaphore,
    pub(crate) plans: Plans,
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
        let Backends { disk, remote, devices, .. } = backends;
        if devices.len() > GPUS_MAX {
            let reason = format!("at most {GPUS_MAX}, not {}", devices.len());
            return Err(VirtualMemoryError::invalid_config("gpus", reason));
        }
        let reserve = |e| VirtualMemoryError::io("reserving host memory", e);
        let arena =
            HostArena::new(limits.host_capacity - limits.staging_capacity).map_err(reserve)?;
        let shares = devices.len() + usize::from(remote.is_some());
        let staging = StagingPool::new(limits.staging_capacity, shares).map_err(reserve)?;
        let wake = Arc::new(Wake::default());
        let bell = wake.clone();
        arena.set_freed_hook(Box::new(move || bell.if_waiting()));
        let unclaimed = Arc::new(Unclaimed::new(wake.clone()));
        let unfinished = Arc::new(Unclaimed::new(wake.clone()));
        let runtime = tokio::runtime::Handle::current();
        let copies = Copies::new(wake.clone());
        let order = |capacity_bytes| config.policy().build(capacity_bytes);
        let host = {
            let order = order(arena.capacity_bytes());
            let space = HostSpace::new(arena, copies.clone());
            let high_bytes = limits.marks.high_bytes;
            let tier = MemoryTier::Host;
            let queue = Queue::new(tier, space, high_bytes, wake.clone(), unclaimed.clone());
            let holds = Holds::of(queue.space().capacity_bytes(), config.max_pinned());
            TierState::new(tier, queue, order, holds, limits.marks)
        };
        let device = |(number, backend): (u8, Arc<dyn DeviceBackend>)| {
            let policy = config.vram_policy_of(usize::from(number));
            let order = policy.build(backend.usage().capacity_bytes);
            Device::new(number, backend, order, config.max_pinned(), &wake, &unclaimed)
        };
        let devices = (0..).zip(devices).map(device).collect();
        let clock = disk.clock();
        let first: Arc<dyn Tier> = disk.clone();
        let mut below: SmallVec<[_; 2]> = SmallVec::from_iter([first]);
        let mut durable = disk;
        let mut durable_level = 0;
        match remote {
            None => {}
            Some(Remote::Unnamed(remote)) => below.push(remote),
            Some(Remote::Named(remote)) => {
                below.push(remote.clone());
                durable = remote;
                durable_level = 1;
            }
        }
        let last = below.len() - 1;
        let storage = |(level, backend): (usize, Arc<dyn Tier>)| {
            let order = order(backend.usage().capacity_bytes);
            let place = (level, level == last);
            let marks = config.watermarks();
            Storage::new(place, backend, order, config.max_pinned(), marks, &wake, &unclaimed)
        };
        let storage = below.into_iter().enumerate().map(storage).collect();
        Ok(Arc::new(Shared {
            table: Table::new(),
            next_id: AtomicU64::new(1),
            recency: Recency::new(),
            timing: Timing { clock, runtime: Some(runtime.id()) },
            host,
            devices,
            no_device,
            copies,
            promised_bytes: AtomicU64::new(0),
            staging,
            windows: Windows::new(limits.stream_capacity),
            closed_hook: OnceLock::new(),
            storage,
            durable_level,
            durable,
            requests,
            runtime,
            wake,
            events: Events::new(),
            counters: Counters::default(),
            latencies: Latencies::new(config.slow_read_threshold()),
            read_spans: SpanRate::of_reads(config.spans_per_second()),
            migration_spans: SpanRate::of_migrations(config.spans_per_second()),
            totals: Arc::default(),
            #[cfg(feature = "metrics")]
            published: parking_lot::Mutex::default(),
            unclaimed,
            unfinished,
            tasks: TaskTracker::new(),
            kernels_abandoned: Semaphore::const_new(0),
            timer_turns: Semaphore::const_new(TIMER_TURNS),
            plans: Plans::default(),
            closed: AtomicBool::new(false),
            limits,
        }))
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

    /// A new object with one handle, which is not found before `announce`.
    pub(crate) fn create(self: &Arc<Self>, len: usize, home: MemoryTier) -> Arc<Object> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Object::new(self, id, len, home)
    }

    /// Puts a new object, which has its space, into the table.
    pub(crate) fn announce(&self, object: &Arc<Object>) {
        assert!(!object.is_dead(), "what nobody has found cannot be freed");
        self.table.insert(object.clone());
    }

    pub(crate) fn find(&self, id: u64) -> Option<Arc<Object>> {
        self.table.get(id)
    }

    /// Every object that is alive now.
    pub(crate) fn all(&self) -> Vec<Arc<Object>> {
        self.table.all()
    }

    pub(crate) fn forget(&self, id: u64) {
        self.table.remove(id);
    }

    /// Sets the hook for objects that are closed. Once.
    pub(crate) fn set_closed_hook(&self, hook: ClosedHook) {
        let is_first = self.closed_hook.set(hook).is_ok();
        assert!(is_first, "one table of names sets the hook");
    }

    /// No handle but that of the table of names leads to this object any more.
    pub(crate) fn tell_closed(&self, object: &Arc<Object>) {
        if let Some(hook) = self.closed_hook.get() {
            hook(object);
        }
    }

    // ---- The end -----------------------------------------------------------------------------

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// From now on every new call gets `Closed`. True for the first caller.
    pub(crate) fn set_closed(&self) -> bool {
        let first = !self.closed.swap(true, Ordering::SeqCst);
        self.plans.end_all();
        self.wake.now();
        self.wake.if_waiting();
        self.host.holds.ring();
        self.storage.iter().for_each(|storage| storage.state.holds.ring());
        for device in &self.devices {
            device.state.holds.ring();
            device.ring();
        }
        first
    }

    /// Closes the queues: no space is made any more.
    pub(crate) fn close_queues(&self) {
        assert!(self.is_closed(), "the queues close after the store");
        self.host.queue.close();
        self.storage.iter().for_each(|storage| storage.state.queue.close());
        self.devices.iter().for_each(|device| device.state.queue.close());
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}
