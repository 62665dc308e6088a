//! What keeps a tier from being evicted: pins and leases, each object counted once.
//!
//! Invariant: what is charged never exceeds the most that the configuration allows. An object is
//! charged by its first hold in the tier, whatever kind that is, and uncharged with its last, so no
//! object is counted twice. Charged by the pins and leases of `vmem`; read by the evictor, and by
//! errors that say why there is no space.

use crate::locks::{self, Lock};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// What keeps an object where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    Pin,
    /// A kernel reads or writes it.
    Lease,
}

/// How many holds an object has in one tier.
#[derive(Debug)]
pub(crate) struct HoldCount {
    count: u32,
    /// What the first of them was charged as.
    charged_as: Hold,
}

impl HoldCount {
    pub(crate) const NONE: HoldCount = HoldCount { count: 0, charged_as: Hold::Pin };

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn any(&self) -> bool {
        self.count > 0
    }

    /// One more, charged as this if it is the first; true if it is.
    pub(crate) fn add(&mut self, charged_as: Hold) -> bool {
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
    pub(crate) fn remove(&mut self) -> Option<Hold> {
        self.count = self.count.checked_sub(1).expect("invariant: a hold is counted until it goes");
        (!self.any()).then_some(self.charged_as)
    }
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

    fn of(&mut self, hold: Hold) -> &mut u64 {
        match hold {
            Hold::Pin => &mut self.pinned,
            Hold::Lease => &mut self.leased,
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Holds {
    bytes: Lock<HeldBytes, { locks::HOLDS }>,
    max: u64,
    gone: Notify,
}

impl Holds {
    pub(crate) fn new(max: u64) -> Self {
        Holds { bytes: Lock::default(), max, gone: Notify::new() }
    }

    pub(crate) fn bytes(&self) -> HeldBytes {
        *self.bytes.lock()
    }

    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// Charges one object, if the budget allows it.
    pub(crate) fn try_charge(&self, hold: Hold, footprint: u64) -> bool {
        let mut bytes = self.bytes.lock();
        let fits = bytes.total().checked_add(footprint).is_some_and(|sum| sum <= self.max);
        if fits {
            *bytes.of(hold) += footprint;
        }
        assert!(bytes.total() <= self.max, "{bytes:?} are held of {}", self.max);
        fits
    }

    pub(crate) fn uncharge(&self, hold: Hold, footprint: u64) {
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
