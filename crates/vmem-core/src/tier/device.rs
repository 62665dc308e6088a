//! The memory of one device, and the objects in it.
//!
//! Invariant: the bytes in device memory are in host memory or on disk too, or their object has
//! space for them there, so that space can always be made. Each range reports to the tier every
//! share that is dropped, so no waiter for memory, or for the last user of a range, misses it.
//! Asked by the migrations to and from the device; served by the actor.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::gathers::Gathers;
use super::neighbours::{Neighbours, Resident, Residents, Surroundings};
use super::{Class, Holds, NoSpace, Queue, Space, TierState, Watermarks};
use crate::device::{
    DeviceAnswer, DeviceBackend, DeviceError, DeviceRange, DeviceUsage, ShareWatcher,
};
use crate::error::VirtualMemoryError;
use crate::locks::{self, Lock};
use crate::memory_tier::MemoryTier;
use crate::parcel::Unclaimed;
use crate::policy::{Entry, Policy, Token};
use crate::stats::{TierStats, get};
use crate::wake::Wake;

/// One device of the store.
pub(crate) struct Device {
    pub(crate) backend: Arc<dyn DeviceBackend>,
    pub(crate) state: TierState<DeviceSpace>,
    /// Reads that a copy there served. Host memory counts its own on the hot path, apart for each
    /// few threads.
    pub(crate) hits: AtomicU64,
    /// What gathers copied of objects that it does not have.
    pub(crate) gathers: Gathers,
    /// Rung when a share of a range was dropped, or the store has ended.
    released: Arc<Notify>,
    /// Rung when the budget was changed, or is to change.
    pub(crate) resized: Notify,
}

impl Device {
    pub(crate) fn new(
        number: u8,
        backend: Arc<dyn DeviceBackend>,
        order: Box<dyn Policy>,
        max_held: f64,
        wake: &Arc<Wake>,
        unclaimed: &Arc<Unclaimed>,
    ) -> Self {
        let released = Arc::new(Notify::new());
        let ring = released.clone();
        let bell = wake.clone();
        let watcher: ShareWatcher = Arc::new(move || {
            ring.notify_waiters();
            bell.if_waiting();
        });
        let freed = watcher.clone();
        // Dropping copies is cheap, and what kernels wrote may be written again: nothing is evicted
        // before the budget is used, whatever it is by then.
        let marks = Watermarks { low_bytes: u64::MAX, high_bytes: u64::MAX };
        let residents = Lock::default();
        let moving_bytes = Arc::default();
        let space = DeviceSpace { backend: backend.clone(), watcher, residents, moving_bytes };
        let tier = MemoryTier::of_device(number);
        let queue = Queue::new(tier, space, u64::MAX, wake.clone(), unclaimed.clone());
        let budget = backend.clone();
        let max = move || (budget.usage().capacity_bytes as f64 * max_held) as u64;
        let state = TierState::new(tier, queue, order, Holds::new(max), marks);
        let gone = state.holds.bell();
        // A budget that has grown has space for more holds, too.
        backend.set_freed_hook(Box::new(move || {
            freed();
            gone.notify_waiters();
        }));
        let hits = AtomicU64::new(0);
        let gathers = Gathers::default();
        Device { backend, state, hits, gathers, released, resized: Notify::new() }
    }

    /// Copies bytes up: behind all that callers wait for, if none waits for these.
    pub(crate) fn upload(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
        class: Class,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        match class {
            Class::Demand => self.backend.upload(to, offset, bytes),
            Class::Prefetch => self.backend.upload_behind(to, offset, bytes),
        }
    }

    /// Tells operators that an operation failed, unless the store ends. The error for its caller.
    pub(crate) fn fault(&self, error: DeviceError) -> VirtualMemoryError {
        self.note(&error);
        error.public()
    }

    /// As [`fault`](Self::fault).
    pub(crate) fn note(&self, error: &DeviceError) {
        if !matches!(error, DeviceError::Closed) {
            self.state.notices().fault(error);
        }
    }

    pub(crate) fn tier(&self) -> MemoryTier {
        self.state.tier
    }

    /// Something may have become idle.
    pub(crate) fn ring(&self) {
        self.released.notify_waiters();
    }

    /// Ends when a share of a range is dropped from now on, or the store has ended.
    pub(crate) fn released(&self) -> Notified<'_> {
        self.released.notified()
    }

    /// The range is that of a copy from now on.
    pub(crate) fn enter(&self, entry: Entry, range: &DeviceRange) -> Token {
        self.enter_again(entry.id, range);
        self.state.enter(entry)
    }

    /// A copy that has a range is to have this one instead: until then it counts for both.
    pub(crate) fn enter_again(&self, id: u64, range: &DeviceRange) {
        let resident = Resident { footprint: range.footprint(), object: id };
        self.state.space().residents.lock().insert(range.address(), resident);
    }

    /// One of the two ranges of a copy is that no more.
    pub(crate) fn forget(&self, range: &DeviceRange) {
        self.state.space().residents.lock().remove(range.address());
    }

    /// The range is no copy any more; its users keep it.
    pub(crate) fn leave(&self, token: Token, range: &DeviceRange) {
        self.forget(range);
        self.state.leave(token);
    }

    /// Its figures, now.
    pub(crate) fn stats(&self) -> TierStats {
        let usage = self.backend.usage();
        self.state.notices().counted(TierStats {
            used_bytes: usage.used_bytes,
            capacity_bytes: usage.capacity_bytes,
            peak_bytes: usage.peak_bytes,
            objects: get(&self.state.objects),
            hits: get(&self.hits),
            largest_free_bytes: usage.largest_free_bytes,
            ..TierStats::default()
        })
    }

    /// The error for the waiters of a device that is lost.
    pub(crate) fn lost(&self) -> Option<VirtualMemoryError> {
        let reason = self.backend.lost()?;
        Some(VirtualMemoryError::tier_not_available(self.tier(), reason))
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("backend", &self.backend).finish_non_exhaustive()
    }
}

/// The memory of one device as space that is granted.
pub(crate) struct DeviceSpace {
    backend: Arc<dyn DeviceBackend>,
    watcher: ShareWatcher,
    residents: Lock<Residents, { locks::RESIDENTS }>,
    moving_bytes: Arc<AtomicU64>,
}

/// Memory to which an object is to move: nobody holds it, though it is no copy yet.
#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) range: DeviceRange,
    pub(crate) moving: Moving,
}

/// Bytes of a move that has not ended.
#[derive(Debug)]
pub(crate) struct Moving {
    footprint: u64,
    all: Arc<AtomicU64>,
}

impl Moving {
    fn new(footprint: u64, all: &Arc<AtomicU64>) -> Self {
        all.fetch_add(footprint, Ordering::SeqCst);
        Moving { footprint, all: all.clone() }
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.all.fetch_sub(self.footprint, Ordering::SeqCst);
    }
}

impl DeviceSpace {
    /// Objects that leave space for one object of `need` bytes when they go: near one of these
    /// addresses, those that were used longest ago. `stamp` tells the last access of an object
    /// that can go; a caller that goes on takes `parts` of what is needed too. Empty if there are
    /// none.
    pub(crate) fn coldest_neighbours(
        &self,
        seeds: &[u64],
        need: u64,
        parts: bool,
        stamp: &dyn Fn(u64) -> Option<u64>,
    ) -> Neighbours {
        let free_from = |address| self.backend.free_from(address);
        // A copy at a time: no object is asked anything under this lock.
        let from = |address| self.residents.lock().from(address);
        let below = |address| self.residents.lock().below(address);
        let space = Surroundings { from: &from, below: &below, free_from: &free_from, stamp };
        let missing = self.backend.missing_pages(need);
        let missing = missing.filter(|_| !crate::planted!("pages-as-windows"));
        space.coldest(seeds, need, missing, parts)
    }

    /// Memory that does not lie at these addresses.
    pub(crate) fn try_take_outside(&self, len: usize, window: &Range<u64>) -> Option<Destination> {
        let range = self.backend.reserve_outside(len, window)?;
        range.watch(self.watcher.clone());
        let moving = Moving::new(range.footprint(), &self.moving_bytes);
        Some(Destination { range, moving })
    }

    pub(crate) fn usage(&self) -> DeviceUsage {
        self.backend.usage()
    }
}

impl Space for DeviceSpace {
    type Slot = DeviceRange;

    fn footprint(&self, len: usize) -> u64 {
        self.backend.footprint(len)
    }

    fn used_bytes(&self) -> u64 {
        self.usage().used_bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.usage().capacity_bytes
    }

    fn most_bytes(&self) -> u64 {
        self.capacity_bytes().max(self.backend.budget())
    }

    /// Ranges of versions that have passed, which kernels or copies still use.
    fn held_bytes(&self) -> u64 {
        // What moves is a copy before it moves no more.
        let used_bytes = self.used_bytes();
        let moving = self.moving_bytes.load(Ordering::SeqCst);
        let moving_bytes = if crate::planted!("moves-held") { 0 } else { moving };
        let resident_bytes = self.residents.lock().bytes();
        used_bytes.saturating_sub(resident_bytes + moving_bytes)
    }

    fn coming_bytes(&self) -> u64 {
        self.backend.coming_bytes()
    }

    fn needs_together(&self, footprint: u64) -> bool {
        self.backend.missing_pages(footprint).is_some()
    }

    fn try_take(&self, len: usize, _owner: u64) -> Result<DeviceRange, NoSpace> {
        match self.backend.reserve(len) {
            Some(range) => {
                let footprint = self.backend.footprint(len);
                assert!(range.footprint() == footprint, "{len} bytes took {}", range.footprint());
                range.watch(self.watcher.clone());
                Ok(range)
            }
            None => {
                let usage = self.usage();
                let free = usage.capacity_bytes.saturating_sub(usage.used_bytes);
                let footprint = self.backend.footprint(len);
                Err(match self.backend.missing_pages(footprint) {
                    None => NoSpace::scattered(footprint <= free),
                    // What is on pages goes from the first: what else goes would go for nothing.
                    Some(missing) => {
                        NoSpace { scattered: missing.count > 0, coming: missing.count == 0 }
                    }
                })
            }
        }
    }

    fn put_back(&self, slot: DeviceRange) {
        slot.put_back();
    }
}
