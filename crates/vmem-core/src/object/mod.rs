//! One object: its identity, the places of its bytes, and how recently it was used.
//!
//! Invariant: at every moment the current version of an object is in exactly these places: its host
//! copy if it has one; else, chunk by chunk, the extents of its disk map; and zeros where there is
//! neither. Device memory may have all of it besides (`on_devices.rs`), or alone
//! (`dirty_on_device.rs`). Everything but the access
//! marks and the reader counts is changed by the holder of the gate only (`gate.rs`).
//!
//! Handles hold objects; the table, the actor and the migrations borrow them.

mod changed_on_device;
mod dirty_on_device;
mod extent_map;
mod flight;
mod gate;
mod holds;
mod leave;
mod named;
mod on_devices;
mod on_storage;
mod rare;
mod shared;
mod successors;
mod versions;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::locks::{self, Lock};
use bytes::Bytes;
use once_cell::race::OnceBox;

pub(crate) use dirty_on_device::Mark;
pub(crate) use extent_map::{ExtentMap, MapIdentity, Replaced};
pub(crate) use gate::GatePass;
pub(crate) use leave::Leave;
pub(crate) use named::{Claim, Named};
pub use shared::{Backends, Remote};
pub(crate) use shared::{FREE_BYTES, Limits, Shared};
pub(crate) use successors::{Next, Successor, Successors};
pub(crate) use versions::Arrival;

use crate::copy::CopyCell;
use crate::device::DeviceRange;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::parcel::{Parcel, WeakParcel};
use crate::policy::Probe;

/// The object was freed; set once, in `life`.
const DEAD: u32 = 1 << 31;
/// No token: the policy does not know the object.
const NO_TOKEN: u32 = u32::MAX;

/// A read from a slower tier that others may join. It ends with the bytes, or with one failure
/// for all.
pub(crate) type Flight = Parcel<Result<Bytes, VirtualMemoryError>>;
/// A reference to a flight that does not wait for it: it is gone once there is no waiter.
pub(crate) type WeakFlight = WeakParcel<Result<Bytes, VirtualMemoryError>>;

/// One version of an object as it is outside of host memory: its owner can read all of it, whatever
/// happens to the object.
#[derive(Debug)]
pub(crate) struct Version {
    /// The clone keeps the extents alive.
    pub(crate) extents: ExtentMap,
    /// The whole of it, in the memory of this device.
    pub(crate) device: Option<(usize, DeviceRange)>,
    /// Set if only devices have it: then there are no extents.
    pub(crate) only_there: Option<Arc<Mark>>,
}

impl Version {
    /// A version that is on disk, or in a tier below it.
    pub(crate) fn of_extents(extents: ExtentMap) -> Self {
        Version { extents, device: None, only_there: None }
    }

    /// Whether it is zeros that were never written.
    pub(crate) fn is_unwritten(&self) -> bool {
        self.only_there.is_none() && self.extents.is_unwritten()
    }

    /// What tells it from other versions, and keeps nothing of it.
    pub(crate) fn identity(&self) -> MapIdentity {
        match &self.only_there {
            Some(mark) if !crate::planted!("dirty-unmarked") => {
                MapIdentity::OnDevice(Arc::downgrade(mark))
            }
            _ => self.extents.identity(),
        }
    }

    /// The tier that a read of it comes from.
    pub(crate) fn tier(&self) -> MemoryTier {
        match &self.device {
            Some((device, _)) => MemoryTier::of_device(*device as u8),
            None => MemoryTier::of_level(self.extents.slowest_level()),
        }
    }
}

/// The number that stands for an object that does not exist yet: none has it.
pub(crate) const NO_OBJECT: u64 = 0;

/// What an object and its entry in the table take, in bytes, with the counts of its share and the
/// part of the table that stands empty.
pub(crate) const OBJECT_BYTES: u64 =
    (size_of::<Object>() + 2 * size_of::<usize>() + (size_of::<Arc<Object>>() + 1) * 3 / 2) as u64;

/// What an object takes besides while it is in device memory, in bytes.
pub(crate) const RARE_BYTES: u64 = size_of::<rare::Fields>() as u64;

/// Where an object stands, as the gauges count it.
#[derive(Clone, Copy, Debug)]
struct Standing {
    in_host: bool,
    /// The tiers below host memory that have something of it, one bit each.
    levels: u8,
    dirty: bool,
    /// Only devices have its bytes.
    dirty_on_device: bool,
    /// What saying where it is on disk takes in memory, in bytes.
    map_bytes: u64,
}

/// See the module's documentation. What a hit touches comes first, close together.
#[repr(C)]
pub(crate) struct Object {
    /// The current host copy.
    pub(crate) copy: CopyCell,
    /// The last access, by the store's `Recency`; goes back only where two threads meet.
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
    /// Chunks that reads moved for it since it last left host memory.
    chunks_moved: AtomicU32,
    pub(crate) home: MemoryTier,
    /// Whether the gate is shut: a `GatePass` exists, or the object was given back. Written under
    /// the lock of `inner`.
    gate_taken: AtomicBool,
    inner: Lock<Inner, { locks::OBJECT }>,
    /// What it knows of its name, if it ever had one.
    pub(crate) named: OnceBox<Named>,
}

/// What changes rarely; the lock is held for a few instructions and never across an await.
#[derive(Default)]
struct Inner {
    extents: ExtentMap,
    /// The read in flight that a new reader may join.
    flight: Option<WeakFlight>,
    rare: rare::Rare,
}

// A store has as many of these as it has objects: with the counts of its `Arc` it is what
// allocators give for 136 bytes.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Object>() <= 120, "an object takes more memory than it did");

impl Object {
    /// An object of zeros that owns nothing yet, with one handle.
    pub(crate) fn new(shared: &Arc<Shared>, id: u64, len: usize, home: MemoryTier) -> Arc<Self> {
        Arc::new(Object {
            copy: CopyCell::empty(),
            stamp: AtomicU64::new(shared.recency.fresh_stamp()),
            life: AtomicU32::new(1),
            touches: AtomicU32::new(0),
            len,
            shared: shared.clone(),
            id,
            pins: AtomicU32::new(0),
            seen: AtomicU32::new(0),
            home,
            token: AtomicU32::new(NO_TOKEN),
            chunks_moved: AtomicU32::new(0),
            gate_taken: AtomicBool::new(false),
            inner: Lock::default(),
            named: OnceBox::new(),
        })
    }

    // ---- Accesses -------------------------------------------------------------------------

    /// Marks an access.
    pub(crate) fn touch(&self) {
        self.mark_now();
        self.count_touch();
    }

    /// Marks a hit, mostly without a look at the clock.
    pub(crate) fn touch_by_hit(&self) {
        self.mark(self.shared.recency.stamp_of_hit());
        self.count_touch();
    }

    fn count_touch(&self) {
        // A count that is lost to another thread makes the object no colder: no need for more than
        // this.
        let touches = self.touches.load(Ordering::Relaxed);
        self.touches.store(touches.wrapping_add(1), Ordering::Relaxed);
    }

    /// Stamps the object, after a look at the clock.
    fn mark_now(&self) -> u64 {
        let stamp = self.shared.recency.fresh_stamp();
        self.mark(stamp);
        stamp
    }

    /// A stamp that is lost where two threads meet here is as good as the other.
    fn mark(&self, stamp: u64) {
        if stamp > self.stamp() {
            self.stamp.store(stamp, Ordering::Relaxed);
        }
    }

    pub(crate) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }

    fn touches(&self) -> u32 {
        self.touches.load(Ordering::Relaxed)
    }

    /// How it stands in host memory, for the policy. What was used at `spared_since` or later is
    /// not to go.
    pub(crate) fn probe_in_host(&self, spared_since: u64) -> Probe {
        let stamp = self.stamp();
        if self.pins() > 0 {
            Probe::Pinned
        } else if self.copy.readers() > 0 || self.is_changing() {
            // In use counts as an access: the policy and the object agree on the last one.
            Probe::Busy { stamp: self.mark_now() }
        } else if stamp >= spared_since {
            Probe::Unfit
        } else {
            let now = self.touches();
            let touches = now.wrapping_sub(self.seen.swap(now, Ordering::Relaxed));
            Probe::Evictable { stamp, touches }
        }
    }

    // ---- The name ---------------------------------------------------------------------------

    /// Its name, or its number where it has none: for people, not for the hot path.
    pub(crate) fn title(&self) -> String {
        match self.named.get().and_then(Named::first) {
            Some(name) => name.to_owned(),
            None => format!("#{}", self.id),
        }
    }

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
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |life| {
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

    /// Frees the object: from now on it is not found. What it owns is given back at once, or by the
    /// holder of its gate. False if it had been freed before.
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
            let left = inner.take_devices();
            let spare = inner.rare.change(|rare| {
                rare.corrupt = None;
                (rare.spare.take(), rare.dirty.take())
            });
            let owned = (spare, std::mem::take(&mut inner.extents), inner.flight.take());
            (owned, left)
        };
        self.left_devices(left);
        self.copy.detach(&self.shared.copies);
        self.count_change(before);
        drop(owned);
        self.shared.space_was_freed();
    }

    /// Whether the object is being changed; a hint.
    pub(crate) fn is_changing(&self) -> bool {
        self.gate_taken.load(Ordering::SeqCst)
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
