//! What keeps a tier from being evicted: pins and leases, each object counted once.
//!
//! Invariant: nothing is charged beyond the most that the configuration allows of the budget; a
//! budget that shrinks leaves what was charged before. An object is
//! charged by its first hold in the tier, whatever kind that is, and uncharged with its last, so no
//! object is counted twice; and it is in the list of what is held from its first hold to its last.
//! Charged by the pins and leases of `vmem`; read by the evictor, by errors that say why there is
//! no space, and by `held_objects`.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::sync::Arc;

use crate::locks::{self, Lock};
use crate::memory_tier::MemoryTier;
use foldhash::fast::FixedState;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// How many holds an object has in one tier.
#[derive(Debug)]
pub(crate) struct HoldCount {
    count: u32,
    /// What the first of them was charged as.
    charged_as: HoldKind,
}

impl HoldCount {
    pub(crate) const NONE: HoldCount = HoldCount { count: 0, charged_as: HoldKind::Pin };

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn any(&self) -> bool {
        self.count > 0
    }

    /// One more, charged as this if it is the first; true if it is.
    pub(crate) fn add(&mut self, charged_as: HoldKind) -> bool {
        let is_first = !self.try_add();
        if is_first {
            (self.count, self.charged_as) = (1, charged_as);
        }
        is_first
    }

    /// One more, unless it were the first.
    pub(crate) fn try_add(&mut self) -> bool {
        let is_held = self.any();
        self.count += u32::from(is_held);
        is_held
    }

    /// One less. Returns what to uncharge if it was the last.
    pub(crate) fn remove(&mut self) -> Option<HoldKind> {
        self.count = self.count.checked_sub(1).expect("invariant: a hold is counted until it goes");
        (!self.any()).then_some(self.charged_as)
    }
}

/// Why an object stays where it is. See [`HeldObject`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HoldKind {
    /// A pin.
    Pin,
    /// A lease, for a kernel.
    Lease,
}

impl fmt::Display for HoldKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HoldKind::Pin => "pin",
            HoldKind::Lease => "lease",
        })
    }
}

/// An object that pins or leases keep in a tier. See
/// [`VirtualMemory::held_objects`](crate::VirtualMemory::held_objects).
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct HeldObject {
    /// The object.
    pub handle: u64,
    /// The name that it has, if it has one.
    pub name: Option<Arc<str>>,
    /// The tier that it is kept in.
    pub tier: MemoryTier,
    /// What its first hold is.
    pub kind: HoldKind,
    /// Its footprint there, in bytes.
    pub bytes: u64,
}

/// The holds of one tier, in bytes of footprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeldBytes {
    pub(crate) pinned: u64,
    pub(crate) leased: u64,
}

impl HeldBytes {
    pub(crate) fn total(self) -> u64 {
        self.pinned + self.leased
    }

    fn of(&mut self, hold: HoldKind) -> &mut u64 {
        match hold {
            HoldKind::Pin => &mut self.pinned,
            HoldKind::Lease => &mut self.leased,
        }
    }
}

/// An object that is held.
#[derive(Debug)]
struct Listed {
    hold: HoldKind,
    footprint: u64,
    /// First holds whose last one has not left the list yet.
    times: u32,
}

/// See the module's documentation.
pub(crate) struct Holds {
    bytes: Lock<HeldBytes, { locks::HOLDS }>,
    /// Each object that is held, by its number.
    objects: Lock<HashMap<u64, Listed, FixedState>, { locks::HOLDS }>,
    /// The most that the configuration allows, now.
    max: Box<dyn Fn() -> u64 + Send + Sync>,
    gone: Arc<Notify>,
}

impl Holds {
    pub(crate) fn new(max: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let objects = Lock::new(HashMap::default());
        Holds { bytes: Lock::default(), objects, max: Box::new(max), gone: Arc::default() }
    }

    /// Of a tier whose budget stays as it is.
    pub(crate) fn of(capacity_bytes: u64, max_held: f64) -> Self {
        let max = (capacity_bytes as f64 * max_held) as u64;
        Holds::new(move || max)
    }

    /// This object has its first hold, and was charged. Its last one before may be about to be
    /// taken out of the list.
    pub(crate) fn add(&self, object: u64, hold: HoldKind, footprint: u64) {
        let mut objects = self.objects.lock();
        let held = objects.entry(object).or_insert(Listed { hold, footprint, times: 0 });
        (held.hold, held.times) = (hold, held.times + 1);
    }

    /// The last hold of this object has gone; before it is uncharged.
    pub(crate) fn remove(&self, object: u64) {
        let mut objects = self.objects.lock();
        let Entry::Occupied(mut held) = objects.entry(object) else {
            panic!("an object is in the list for as long as it is charged");
        };
        held.get_mut().times -= 1;
        if held.get().times == 0 {
            held.remove();
        }
    }

    /// The largest objects that are held, at most this many, without their names.
    pub(crate) fn largest(&self, tier: MemoryTier, most: usize) -> Vec<HeldObject> {
        let objects = self.objects.lock();
        // The smallest of them on top. Pins wait for this lock: nothing else is copied under it.
        let mut largest = BinaryHeap::with_capacity(most.min(objects.len()) + 1);
        for (&handle, &Listed { footprint, .. }) in objects.iter() {
            largest.push(Reverse((footprint, handle)));
            if largest.len() > most {
                largest.pop();
            }
        }
        let one = |Reverse((bytes, handle))| {
            let kind = objects[&handle].hold;
            HeldObject { handle, name: None, tier, kind, bytes }
        };
        largest.into_iter().map(one).collect()
    }

    pub(crate) fn bytes(&self) -> HeldBytes {
        *self.bytes.lock()
    }

    pub(crate) fn max(&self) -> u64 {
        (self.max)()
    }

    /// Rung when a hold goes, or the store, or more may be held.
    pub(crate) fn bell(&self) -> Arc<Notify> {
        self.gone.clone()
    }

    /// Charges one object, if the budget allows it.
    pub(crate) fn try_charge(&self, hold: HoldKind, footprint: u64) -> bool {
        let max = self.max();
        let mut bytes = self.bytes.lock();
        let fits = bytes.total().checked_add(footprint).is_some_and(|sum| sum <= max);
        if fits {
            *bytes.of(hold) += footprint;
        }
        fits
    }

    pub(crate) fn uncharge(&self, hold: HoldKind, footprint: u64) {
        let mut bytes = self.bytes.lock();
        let of_kind = bytes.of(hold);
        assert!(*of_kind >= footprint, "held bytes never fall below zero");
        *of_kind -= footprint;
        drop(bytes);
        self.ring();
    }

    /// Ends when a hold goes, or the store.
    pub(crate) fn gone(&self) -> Notified<'_> {
        self.gone.notified()
    }

    pub(crate) fn ring(&self) {
        self.gone.notify_waiters();
    }
}

impl fmt::Debug for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holds").field("bytes", &self.bytes()).field("max", &self.max()).finish()
    }
}
