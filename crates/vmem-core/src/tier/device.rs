//! The memory of one device, and the objects in it.
//!
//! Invariant: the bytes in device memory are in host memory or on disk too, or their object has
//! space for them there, so that space can always be made. Each range reports to the tier every
//! share that is dropped, so no waiter for memory, or for the last user of a range, misses it.
//! Asked by the migrations to and from the device; served by the actor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::gathers::Gathers;
use super::{Class, NoSpace, Queue, Space, TierState, Watermarks};
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
        backend.set_freed_hook(Box::new(move || freed()));
        // Dropping copies is cheap, and what kernels wrote may be written again: nothing is evicted
        // early.
        let all = backend.usage().capacity_bytes;
        let marks = Watermarks { low_bytes: all, high_bytes: all };
        let residents = Lock::default();
        let space = DeviceSpace { backend: backend.clone(), watcher, residents };
        let tier = MemoryTier::of_device(number);
        let queue = Queue::new(tier, space, all, wake.clone(), unclaimed.clone());
        let state = TierState::new(tier, queue, order, max_held, marks);
        Device { backend, state, hits: AtomicU64::new(0), gathers: Gathers::default(), released }
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
        let space = self.state.space();
        let resident = Resident { footprint: range.footprint(), object: entry.id };
        space.residents.lock().insert(range.address(), resident);
        self.state.enter(entry)
    }

    /// The range is no copy any more; its users keep it.
    pub(crate) fn leave(&self, token: Token, range: &DeviceRange) {
        self.state.space().residents.lock().remove(range.address());
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

/// A copy in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resident {
    pub(crate) footprint: u64,
    pub(crate) object: u64,
}

/// The copies by their address, for the search for neighbours.
#[derive(Debug, Default)]
struct Residents {
    by_address: BTreeMap<u64, Resident>,
    bytes: u64,
}

impl Residents {
    fn insert(&mut self, address: u64, resident: Resident) {
        self.bytes += resident.footprint;
        let before = self.by_address.insert(address, resident);
        assert!(before.is_none(), "two copies lie at one address of the device");
    }

    /// The copies within `need` bytes of `seed`, on both sides.
    fn around(&self, seed: u64, need: u64) -> BTreeMap<u64, Resident> {
        let from = seed.saturating_sub(need);
        // One more on the low side: it may reach into the stretch.
        let first =
            self.by_address.range(..=from).next_back().map_or(from, |(&address, _)| address);
        let near = self.by_address.range(first..seed.saturating_add(need));
        near.map(|(&address, &resident)| (address, resident)).collect()
    }

    fn remove(&mut self, address: u64) {
        let resident =
            self.by_address.remove(&address).expect("invariant: a copy that leaves had entered");
        assert!(self.bytes >= resident.footprint, "copies take what they took");
        self.bytes -= resident.footprint;
        assert!(self.bytes == 0 || !self.by_address.is_empty(), "bytes that are no copy's");
    }
}

/// A stretch of copies that lie beside each other.
#[derive(Debug, Default, PartialEq, Eq)]
struct Window {
    objects: Vec<u64>,
    /// The last access of any of them.
    newest: u64,
    /// What they take.
    bytes: u64,
}

/// The copies from the one at `seed` upwards, then downwards, until they and what is free between
/// them come to `need` bytes. None if something that cannot go is in the way.
fn window(
    around: &BTreeMap<u64, Resident>,
    seed: u64,
    need: u64,
    free_from: &dyn Fn(u64) -> u64,
    stamp: &dyn Fn(u64) -> Option<u64>,
) -> Option<Window> {
    let mut window = Window::default();
    let mut add = |resident: &Resident| {
        let stamp = stamp(resident.object)?;
        window.objects.push(resident.object);
        window.newest = window.newest.max(stamp);
        window.bytes += resident.footprint;
        Some(())
    };
    let mut start = seed;
    let mut end = seed;
    while end - start < need {
        match around.get(&end) {
            Some(resident) => match add(resident) {
                Some(()) => end += resident.footprint,
                None => break,
            },
            None => match free_from(end) {
                0 => break,
                free => end += free,
            },
        }
    }
    while end - start < need {
        let missing = need - (end - start);
        if start >= missing && free_from(start - missing) >= missing {
            break;
        }
        let (&address, resident) = around.range(..start).next_back()?;
        let gap = start.checked_sub(address + resident.footprint)?;
        if gap > 0 && free_from(address + resident.footprint) < gap {
            return None;
        }
        add(resident)?;
        start = address;
    }
    Some(window)
}

/// The memory of one device as space that is granted.
pub(crate) struct DeviceSpace {
    backend: Arc<dyn DeviceBackend>,
    watcher: ShareWatcher,
    residents: Lock<Residents, { locks::RESIDENTS }>,
}

impl DeviceSpace {
    /// Neighbours that leave one free piece of `need` bytes when they go: around one of these
    /// addresses, the ones that were used longest ago. `stamp` tells the last access of an object
    /// that can go. Empty if there are none.
    pub(crate) fn coldest_window(
        &self,
        seeds: &[u64],
        need: u64,
        stamp: &dyn Fn(u64) -> Option<u64>,
    ) -> Vec<u64> {
        let windows = seeds.iter().filter_map(|&seed| {
            // Copied first: no object is asked anything under this lock.
            let around = self.residents.lock().around(seed, need);
            let free_from = |address| self.backend.free_from(address);
            window(&around, seed, need, &free_from, stamp)
        });
        windows
            .min_by_key(|window| (window.newest, window.bytes))
            .map_or_else(Vec::new, |w| w.objects)
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

    /// Ranges of versions that have passed, which kernels or copies still use.
    fn held_bytes(&self) -> u64 {
        let resident_bytes = self.residents.lock().bytes;
        self.used_bytes().saturating_sub(resident_bytes)
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
                Err(NoSpace { scattered: self.backend.footprint(len) <= free })
            }
        }
    }

    fn put_back(&self, slot: DeviceRange) {
        slot.put_back();
    }
}
