//! One object: who it is, where its bytes are, and how recently it was used.
//!
//! Invariant: at every moment the current version of an object is in exactly these places: its
//! host copy if it has one; else, chunk by chunk, the extents of its disk map; and zeros where
//! there is neither. Device memory may have all of it besides (`on_devices.rs`). Everything but the access marks and the reader counts is changed by the
//! holder of the gate only (`gate.rs`).
//!
//! Handles hold objects; the table, the actor and the migrations borrow them.

mod disk_map;
mod gate;
mod leave;
mod on_devices;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use parking_lot::Mutex;

pub(crate) use disk_map::{
    DiskMap, MapIdentity, Replaced, chunk_count, chunk_len, chunk_lens, chunks_of, range_of,
};
pub(crate) use gate::GatePass;
pub(crate) use leave::Leave;

use crate::copy::{CopyCell, Found, OwnedCopy};
use crate::device::DeviceRange;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::names::Named;
use crate::parcel::{Parcel, WeakParcel};
use crate::policy::{Entry, Probe, Token};
use crate::shared::Shared;
use crate::stats;
use crate::tier::Hold;

/// The object was freed; set once, in `life`.
const DEAD: u32 = 1 << 31;
/// No token: the policy does not know the object.
const NO_TOKEN: u32 = u32::MAX;

/// A read from a slower tier that others may join. It ends with the bytes, or with one failure
/// for all.
pub(crate) type Flight = Parcel<Result<Bytes, VirtualMemoryError>>;
/// A flight as those see it who do not wait for it: it is gone when nobody does.
pub(crate) type WeakFlight = WeakParcel<Result<Bytes, VirtualMemoryError>>;

/// One version of an object as it is outside of host memory: whoever has it can read all of it, whatever
/// becomes of the object.
#[derive(Debug)]
pub(crate) struct Version {
    /// The clone keeps the extents alive.
    pub(crate) disk: DiskMap,
    /// The whole of it, in the memory of this device.
    pub(crate) device: Option<(usize, DeviceRange)>,
}

impl Version {
    /// The tier that a read of it comes from.
    pub(crate) fn tier(&self) -> MemoryTier {
        match &self.device {
            Some((device, _)) => MemoryTier::of_device(*device as u8),
            None => MemoryTier::Disk,
        }
    }
}

/// What an object and its entry in the table take, in bytes, with the counts of its share and the
/// part of the table that stands empty.
pub(crate) const OBJECT_BYTES: u64 = (size_of::<Object>()
    + 2 * size_of::<usize>()
    + (size_of::<(u64, Arc<Object>)>() + 1) * 3 / 2) as u64;

/// Where an object stands, as the gauges count it.
#[derive(Clone, Copy, Debug)]
struct Standing {
    in_host: bool,
    on_disk: bool,
    dirty: bool,
    /// What saying where it is on disk takes in memory, in bytes.
    map_bytes: u64,
}

/// See the module's documentation. What a hit touches comes first, close together.
#[repr(C)]
pub(crate) struct Object {
    /// The current host copy.
    pub(crate) copy: CopyCell,
    /// The last access, in nanoseconds of the store's clock; never goes back.
    stamp: AtomicU64,
    pub(crate) shared: Arc<Shared>,
    pub(crate) len: usize,
    pub(crate) id: u64,
    /// `DEAD`, and how many handles there are.
    life: AtomicU32,
    /// Accesses, counted up to what fits.
    touches: AtomicU32,
    /// Those that the policy of the host tier has seen.
    seen: AtomicU32,
    /// Pins in host memory.
    pins: AtomicU32,
    /// What the policy of the host tier calls this object; written under the policy's lock.
    token: AtomicU32,
    pub(crate) home: MemoryTier,
    inner: Mutex<Inner>,
    /// What it knows of its name, if it ever had one.
    pub(crate) named: OnceLock<Box<Named>>,
}

/// What changes rarely; the lock is held for a few instructions and never across an await.
#[derive(Default)]
struct Inner {
    gate_taken: bool,
    line: Option<Box<gate::Line>>,
    /// Chunks that reads moved for it since it last left host memory.
    chunks_moved: u32,
    /// Host memory that was taken for an object that nobody has written yet.
    spare: Option<OwnedCopy>,
    disk: DiskMap,
    devices: Option<Box<on_devices::OnDevices>>,
    /// A kernel on this device has written a new version, which is on its way: whoever reads waits for it.
    pending: Option<usize>,
    /// The read in flight that a reader who comes now may join.
    flight: Option<WeakFlight>,
    /// The damage that was found, until the next write of the whole object.
    corrupt: Option<Box<VirtualMemoryError>>,
}

impl Object {
    /// An object of zeros that owns nothing yet, with one handle.
    pub(crate) fn new(shared: &Arc<Shared>, id: u64, len: usize, home: MemoryTier) -> Arc<Self> {
        Arc::new(Object {
            copy: CopyCell::empty(),
            stamp: AtomicU64::new(shared.now()),
            life: AtomicU32::new(1),
            touches: AtomicU32::new(0),
            len,
            shared: shared.clone(),
            id,
            pins: AtomicU32::new(0),
            seen: AtomicU32::new(0),
            home,
            token: AtomicU32::new(NO_TOKEN),
            inner: Mutex::default(),
            named: OnceLock::new(),
        })
    }

    // ---- Accesses -------------------------------------------------------------------------

    /// Marks an access.
    pub(crate) fn touch(&self) {
        self.stamp.fetch_max(self.shared.now(), Ordering::Relaxed);
        // A count that is lost to another thread makes the object no colder: no need for more than this.
        let touches = self.touches.load(Ordering::Relaxed);
        self.touches.store(touches.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }

    fn touches(&self) -> u32 {
        self.touches.load(Ordering::Relaxed)
    }

    /// How it stands in host memory, for the policy. What was used at `spared_since` or later is not to go.
    pub(crate) fn probe_in_host(&self, spared_since: u64) -> Probe {
        let stamp = self.stamp();
        if self.pins() > 0 {
            Probe::Pinned
        } else if self.copy.readers() > 0 || self.is_changing() {
            Probe::Busy { stamp: self.shared.now() }
        } else if stamp >= spared_since {
            Probe::Unfit
        } else {
            let now = self.touches();
            let touches = now.wrapping_sub(self.seen.swap(now, Ordering::Relaxed));
            Probe::Evictable { stamp, touches }
        }
    }

    // ---- The name ---------------------------------------------------------------------------

    /// What it knows of its name, from now on if it had none.
    pub(crate) fn named(&self) -> &Named {
        self.named.get_or_init(Box::default)
    }

    /// Whether it has a name now.
    pub(crate) fn has_name(&self) -> bool {
        self.named.get().is_some_and(|named| named.current().is_some())
    }

    // ---- Life -----------------------------------------------------------------------------

    pub(crate) fn is_dead(&self) -> bool {
        self.life.load(Ordering::SeqCst) & DEAD != 0
    }

    pub(crate) fn not_found(&self) -> VirtualMemoryError {
        VirtualMemoryError::HandleNotFound { handle: self.id }
    }

    /// One more handle.
    pub(crate) fn add_handle(&self) {
        let before = self.life.fetch_add(1, Ordering::Relaxed);
        assert!(before & !DEAD < DEAD - 1, "more handles of one object than can be counted");
    }

    /// One more handle, unless the last one has gone already.
    pub(crate) fn try_add_handle(&self) -> bool {
        self.life
            .try_update(Ordering::SeqCst, Ordering::SeqCst, |life| {
                (life & DEAD == 0 && life > 0).then_some(life + 1)
            })
            .is_ok()
    }

    /// One handle less; the last one frees the object, the last but that of the table of names lets
    /// it leave memory.
    pub(crate) fn remove_handle(self: &Arc<Self>) {
        match self.life.fetch_sub(1, Ordering::SeqCst) & !DEAD {
            1 => {
                self.free();
            }
            2 => self.offer_if_closed(),
            _ => {}
        }
    }

    /// Frees the object: from now on nobody finds it. What it owns is given back at once, or
    /// by whoever is changing it right now. False if it had been freed before.
    pub(crate) fn free(self: &Arc<Self>) -> bool {
        if self.life.fetch_or(DEAD, Ordering::SeqCst) & DEAD != 0 {
            return false;
        }
        self.shared.forget(self.id);
        drop(self.try_gate_dead_or_alive());
        true
    }

    /// Gives back everything that a dead object owns; by its last gate holder.
    fn reclaim(&self) {
        self.leave_order();
        let before = self.standing();
        let (owned, left) = {
            let mut inner = self.inner.lock();
            inner.corrupt = None;
            let owned = (inner.spare.take(), std::mem::take(&mut inner.disk), inner.flight.take());
            (owned, inner.take_devices())
        };
        self.left_devices(left);
        self.copy.detach(&self.shared.copies);
        self.count_change(before);
        drop(owned);
        self.shared.room_was_freed();
    }

    /// Whether somebody is changing the object; a hint.
    pub(crate) fn is_changing(&self) -> bool {
        self.inner.lock().gate_taken
    }

    // ---- Residency; the setters are for the holder of the gate -----------------------------

    /// A clone of the disk map: it keeps the extents alive.
    pub(crate) fn disk(&self) -> DiskMap {
        self.inner.lock().disk.clone()
    }

    /// The current version without its host copy; for the holder of the gate, or whoever knows that host
    /// memory has none.
    pub(crate) fn version(&self) -> Version {
        let inner = self.inner.lock();
        let device = inner.device_share(self.shared.devices());
        Version { disk: inner.disk.clone(), device }
    }

    /// The current version, if host memory holds no copy of it and no room for it. None
    /// of a dead object either: its map may have been given back, and an empty one reads as zeros.
    pub(crate) fn cold_version(&self) -> Option<Version> {
        let inner = self.inner.lock();
        let held = self.copy.is_some() || inner.spare.is_some() || inner.pending.is_some();
        let cold = !held && !self.is_dead();
        cold.then(|| {
            let device = inner.device_share(self.shared.devices());
            Version { disk: inner.disk.clone(), device }
        })
    }

    /// Whether host memory holds the only current bytes of some chunk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.standing().dirty
    }

    /// Whether a host copy exists or room for one is set apart.
    pub(crate) fn has_host_room(&self) -> bool {
        self.copy.is_some() || self.has_spare()
    }

    /// Whether host memory is set apart for an object of zeros.
    pub(crate) fn has_spare(&self) -> bool {
        self.inner.lock().spare.is_some()
    }

    /// Sets host memory apart for the first write.
    pub(crate) fn set_spare(self: &Arc<Self>, _pass: &GatePass, spare: OwnedCopy) {
        let before = self.standing();
        let unwritten = !before.in_host && !before.on_disk;
        assert!(unwritten, "room is set apart for an object that has bytes nowhere");
        self.inner.lock().spare = Some(spare);
        self.count_change(before);
        self.enter_order(false);
    }

    /// Sets space apart again that was taken for a first write, unless the object has bytes by now.
    pub(crate) fn return_spare(self: &Arc<Self>, pass: &GatePass, spare: OwnedCopy) {
        let standing = self.standing();
        if !standing.in_host && !standing.on_disk && !self.is_dead() {
            self.set_spare(pass, spare);
        }
    }

    /// The room that was set apart.
    pub(crate) fn take_spare(&self, _pass: &GatePass) -> Option<OwnedCopy> {
        let before = self.standing();
        let spare = self.inner.lock().spare.take()?;
        self.leave_order();
        self.count_change(before);
        Some(spare)
    }

    /// Changes the disk map; what it replaces goes into the vector.
    pub(crate) fn with_disk<T>(
        &self,
        _pass: &GatePass,
        change: impl FnOnce(&mut DiskMap, &mut Replaced) -> T,
    ) -> T {
        let before = self.standing();
        let mut old = Replaced::new();
        let result = change(&mut self.inner.lock().disk, &mut old);
        self.count_change(before);
        result
    }

    /// A new version: `copy` if it is in host memory, and a changed disk map. Whoever reads the
    /// version before keeps it; nobody joins a read of it any more.
    pub(crate) fn publish(
        self: &Arc<Self>,
        _pass: &GatePass,
        copy: Option<OwnedCopy>,
        change: impl FnOnce(&mut DiskMap, &mut Replaced),
    ) {
        let before = self.standing();
        let mut old = Replaced::new();
        let left;
        let leftover = {
            let mut inner = self.inner.lock();
            // Together under the lock: a reader that finds no copy sees the map of this version.
            change(&mut inner.disk, &mut old);
            inner.corrupt = None;
            left = inner.outdate_devices(self.home);
            match copy {
                Some(copy) => self.copy.publish(copy, &self.shared.copies),
                None => self.copy.detach(&self.shared.copies),
            }
            (inner.flight.take(), inner.spare.take())
        };
        drop((old, leftover));
        self.left_devices(left);
        self.leave_order();
        self.count_change(before);
        if self.copy.is_some() {
            self.enter_order(false);
        }
    }

    /// The same version, now in host memory too.
    pub(crate) fn publish_fetched(
        self: &Arc<Self>,
        _pass: &GatePass,
        copy: OwnedCopy,
        prefetched: bool,
    ) {
        let before = self.standing();
        let spare = {
            let mut inner = self.inner.lock();
            inner.chunks_moved = 0;
            self.copy.publish(copy, &self.shared.copies);
            inner.spare.take()
        };
        drop(spare);
        self.leave_order();
        self.count_change(before);
        // Whoever asked for it has not used it yet: it is not to be the next that leaves.
        self.stamp.fetch_max(self.shared.now(), Ordering::Relaxed);
        self.enter_order(prefetched);
    }

    /// Moves what it has in host memory to another slot. False if somebody reads it there.
    pub(crate) fn relocate(&self, _pass: &GatePass, mut to: OwnedCopy) -> bool {
        let old = match self.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => guard.into_bytes(),
            Found::Locked => return false,
            Found::Nothing => {
                // Space that nobody has written to yet.
                let before = self.inner.lock().spare.replace(to);
                drop(before);
                return true;
            }
        };
        to.as_mut_slice().copy_from_slice(&old);
        let inner = self.inner.lock();
        self.copy.publish(to, &self.shared.copies);
        drop(inner);
        drop(old);
        true
    }

    /// Changes the bytes of the host copy where they are, if nobody reads them; the chunks of
    /// `range` are then in host memory alone.
    pub(crate) fn write_in_place(
        &self,
        _pass: &GatePass,
        range: std::ops::Range<usize>,
        data: &[u8],
    ) -> bool {
        let before = self.standing();
        let mut old = Replaced::new();
        let mut flight = None;
        let mut left = on_devices::Left::default();
        let written = self.copy.write_in_place(|bytes| {
            // Under the copy's own lock: nobody sees new bytes with an old map.
            let mut inner = self.inner.lock();
            inner.disk.forget(self.len, chunks_of(&range), &mut old);
            left = inner.outdate_devices(self.home);
            flight = inner.flight.take();
            drop(inner);
            bytes[range].copy_from_slice(data);
        });
        drop((old, flight));
        self.left_devices(left);
        if written {
            self.count_change(before);
        }
        written
    }

    /// Takes the host copy away if nobody reads it and the disk has it all.
    pub(crate) fn drop_clean_copy(&self, _pass: &GatePass) -> Option<OwnedCopy> {
        let before = self.standing();
        assert!(!before.dirty, "the only copy of some bytes is never dropped");
        let copy = self.copy.take_idle(&self.shared.copies)?;
        self.leave_order();
        self.count_change(before);
        Some(copy)
    }

    /// Takes the host copy away whoever reads it; the disk has it all.
    pub(crate) fn detach_clean_copy(&self, _pass: &GatePass) {
        let before = self.standing();
        assert!(!before.dirty, "the only copy of some bytes is never dropped");
        self.copy.detach(&self.shared.copies);
        self.leave_order();
        self.count_change(before);
    }

    /// Where the object stands, for the gauges.
    fn standing(&self) -> Standing {
        let in_copy = self.copy.is_some();
        let inner = self.inner.lock();
        Standing {
            in_host: in_copy || inner.spare.is_some(),
            on_disk: !inner.disk.is_empty(),
            dirty: in_copy && !inner.disk.is_whole(self.len),
            map_bytes: inner.disk.memory_bytes(),
        }
    }

    /// Keeps the gauges of the store equal to the sum over its objects.
    fn count_change(&self, before: Standing) {
        let (after, counters) = (self.standing(), &self.shared.counters);
        let gauge =
            |gauge: &AtomicU64, before: bool, after: bool, weight: u64| match (before, after) {
                (false, true) => stats::add(gauge, weight),
                (true, false) => stats::sub(gauge, weight),
                _ => {}
            };
        gauge(&self.shared.host.objects, before.in_host, after.in_host, 1);
        gauge(&counters.disk_objects, before.on_disk, after.on_disk, 1);
        gauge(&counters.dirty_bytes, before.dirty, after.dirty, self.len as u64);
        stats::shift(&counters.map_bytes, before.map_bytes, after.map_bytes);
    }

    // ---- Reads in flight, damage -----------------------------------------------------------

    /// Joins the read in flight, or registers `start` as the one. True if it was registered.
    pub(crate) fn join_or_start(&self, start: impl FnOnce() -> Flight) -> (Flight, bool) {
        let mut inner = self.inner.lock();
        if let Some(flight) = inner.flight.as_ref().and_then(WeakParcel::upgrade) {
            return (flight, false);
        }
        let flight = start();
        inner.flight = Some(flight.downgrade());
        (flight, true)
    }

    /// Ends the read in flight, if it is still the one that readers join.
    pub(crate) fn end_flight(&self, flight: &WeakFlight) {
        let mut inner = self.inner.lock();
        if inner.flight.as_ref().is_some_and(|current| current.is_same(flight)) {
            inner.flight = None;
        }
    }

    /// Whether somebody waits for a read from a slower tier.
    pub(crate) fn has_flight(&self) -> bool {
        let flight = self.inner.lock().flight.as_ref().and_then(WeakParcel::upgrade);
        flight.is_some()
    }

    /// Counts a read of so many chunks that host memory did not serve. Returns what reads had moved before.
    pub(crate) fn count_moved(&self, chunks: usize) -> u32 {
        let chunks = u32::try_from(chunks).unwrap_or(u32::MAX);
        let mut inner = self.inner.lock();
        let before = inner.chunks_moved;
        inner.chunks_moved = before.saturating_add(chunks);
        before
    }

    /// The damage that was found before, if any.
    pub(crate) fn damage(&self) -> Option<VirtualMemoryError> {
        self.inner.lock().corrupt.as_deref().cloned()
    }

    /// Remembers that this map leads to damage, if it is still the current one.
    pub(crate) fn set_damage(&self, disk: &DiskMap, error: VirtualMemoryError) {
        let mut inner = self.inner.lock();
        if inner.disk.is_same(disk) {
            inner.corrupt = Some(Box::new(error));
        }
    }

    // ---- Pins ------------------------------------------------------------------------------

    pub(crate) fn pins(&self) -> u32 {
        self.pins.load(Ordering::SeqCst)
    }

    /// How many pins and leases hold it in this tier; below disk there is nothing, so that nothing is held there.
    pub(crate) fn holds_in(&self, tier: MemoryTier) -> u32 {
        match tier.device() {
            Some(device) => self.holds_on(device),
            None => self.pins(),
        }
    }

    /// One more hold, charged to the tier as this kind; true if it is the first.
    pub(crate) fn add_hold(&self, tier: MemoryTier, charged_as: Hold, _pass: &GatePass) -> bool {
        match tier.device() {
            Some(device) => self.add_hold_on(device, charged_as),
            None => self.pins.fetch_add(1, Ordering::SeqCst) == 0,
        }
    }

    /// One more hold, unless it were the first: holds go without the gate.
    pub(crate) fn try_add_hold(&self, tier: MemoryTier, _pass: &GatePass) -> bool {
        let more = |pins: u32| (pins > 0).then(|| pins + 1);
        match tier.device() {
            Some(device) => self.try_add_hold_on(device),
            None => self.pins.try_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok(),
        }
    }

    /// One hold less; after the last one the policy asks about the object again, and the tier is uncharged.
    pub(crate) fn remove_hold(&self, tier: MemoryTier) {
        let last = match tier.device() {
            Some(device) => self.remove_hold_on(device),
            None => {
                let before = self.pins.fetch_sub(1, Ordering::SeqCst);
                assert!(before > 0, "unpinned more often than pinned");
                (before == 1).then_some(Hold::Pin)
            }
        };
        let Some(charged_as) = last else { return };
        if tier.device().is_none() {
            self.unpark();
        }
        let footprint = self.shared.footprint_in(tier, self.len);
        self.shared.uncharge(tier, charged_as, footprint);
    }

    // ---- The order of eviction ---------------------------------------------------------------

    /// Enters the order of eviction of the host tier.
    pub(crate) fn enter_order(&self, prefetched: bool) {
        let footprint = crate::host::HostArena::footprint(self.len);
        let entry = Entry { id: self.id, stamp: self.stamp(), footprint, prefetched };
        let mut order = self.shared.host.order.lock();
        assert!(self.token.load(Ordering::Relaxed) == NO_TOKEN, "an object is in the order once");
        self.seen.store(self.touches(), Ordering::Relaxed);
        self.token.store(order.insert(entry).0, Ordering::Relaxed);
    }

    /// Leaves the order of eviction, if it is there.
    pub(crate) fn leave_order(&self) {
        if self.token.load(Ordering::Relaxed) == NO_TOKEN {
            return;
        }
        let mut order = self.shared.host.order.lock();
        let token = self.token.swap(NO_TOKEN, Ordering::Relaxed);
        order.remove(Token(token));
    }

    /// Is asked about again by the policy, after the last pin went.
    fn unpark(&self) {
        self.shared.host.unpark(|| {
            let token = self.token.load(Ordering::Relaxed);
            (token != NO_TOKEN).then_some(Token(token))
        });
    }
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object")
            .field("id", &self.id)
            .field("len", &self.len)
            .field("home", &self.home)
            .field("in_host", &self.copy.is_some())
            .finish_non_exhaustive()
    }
}
