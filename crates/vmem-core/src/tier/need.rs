//! What is asked of a tier, and what it answers.
//!
//! Invariant: a request for several objects is one request. Made by migrations and public calls;
//! answered by the queue of the tier.

use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::waiters::{BLOCK_MAX, Waiter};
use crate::error::VirtualMemoryError;

/// Why there is no space now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoSpace {
    /// By its footprint it would fit: the space lies in pieces, or in spans of other objects. Or
    /// only what lies together makes space for it.
    pub(crate) scattered: bool,
    /// There will be space without an eviction.
    pub(crate) coming: bool,
}

impl NoSpace {
    pub(crate) fn scattered(scattered: bool) -> Self {
        NoSpace { scattered, coming: false }
    }
}

/// Memory within a budget.
pub(crate) trait Space: Send + Sync + 'static {
    /// Space for one object, exclusively; dropping it gives it back.
    type Slot: Send + 'static;

    /// What an object of `len` bytes takes, rounding included, in bytes.
    fn footprint(&self, len: usize) -> u64;

    /// The footprint of all slots, in bytes.
    fn used_bytes(&self) -> u64;

    /// The budget, in bytes.
    fn capacity_bytes(&self) -> u64;

    /// The same, or what it is about to be if that is more.
    fn most_bytes(&self) -> u64 {
        self.capacity_bytes()
    }

    /// Bytes in use that are no object's current copy: readers or kernels keep them, and no
    /// eviction frees them.
    fn held_bytes(&self) -> u64;

    /// What is free and nobody's, for it is on its way to where it is needed.
    fn coming_bytes(&self) -> u64 {
        0
    }

    /// Whether only what lies together makes space for an object of this footprint.
    fn needs_together(&self, _footprint: u64) -> bool {
        false
    }

    /// Space for `len` bytes of the object `owner`, at once or not at all.
    fn try_take(&self, len: usize, owner: u64) -> Result<Self::Slot, NoSpace>;

    /// Gives back what was taken on trial, without waking waiters.
    fn put_back(&self, slot: Self::Slot);
}

/// Space for the objects of one request, in its order.
pub(crate) type Grant<S> = SmallVec<[<S as Space>::Slot; 1]>;
pub(super) type Answer<S> = Result<Grant<S>, Refused>;

/// The class of a request, which decides its turn and what may be evicted for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A caller waits for it now.
    Demand,
    /// No caller waits for it yet: nothing in use is evicted for it.
    Prefetch,
}

/// A request for space.
#[derive(Clone, Debug)]
pub(crate) struct Need {
    /// Length and number of each object, all of which get space at once.
    pub(super) objects: SmallVec<[(usize, u64); 1]>,
    pub(crate) class: Class,
    /// The caller goes to disk rather than wait for what is held or pinned.
    pub(crate) may_spill: bool,
    /// The caller does without rather than wait, or take the space of what was used at this stamp
    /// or later, or of what was prefetched and not used yet.
    pub(crate) spares_since: Option<u64>,
}

impl Need {
    /// Space for one object of `len` bytes.
    pub(crate) fn one(len: usize, owner: u64, class: Class) -> Self {
        let objects = SmallVec::from_buf([(len, owner)]);
        Need { objects, class, may_spill: false, spares_since: None }
    }

    /// Space for several objects, for a caller that waits.
    pub(crate) fn set(objects: impl IntoIterator<Item = (usize, u64)>) -> Self {
        let objects = objects.into_iter().collect();
        Need { objects, class: Class::Demand, may_spill: false, spares_since: None }
    }

    /// As a prefetch, but behind all of them, and only in place of what was not used since.
    pub(crate) fn sparing(mut self, since: u64) -> Self {
        self.class = Class::Prefetch;
        self.spares_since = Some(since);
        self
    }

    /// The caller has another way where waiting for eviction does not help.
    pub(crate) fn or_spill(mut self) -> Self {
        self.may_spill = true;
        self
    }
}

/// Why there is no space.
#[derive(Clone, Debug)]
pub(crate) enum Refused {
    /// Nothing can be evicted now, and the caller said that it has another way.
    Spill,
    /// It could never fit in these bytes.
    TooLarge { capacity_bytes: u64 },
    /// The deadline passed after so long a wait.
    Deadline(Duration),
    /// Something that waiting does not change.
    Error(VirtualMemoryError),
}

/// What waits, as the evictor sees it. Bytes are footprints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of the demand requests for which objects are evicted now.
    pub(crate) demand_bytes: u64,
    /// Of all prefetch requests.
    pub(crate) prefetch_bytes: u64,
    /// Of the first demand request.
    pub(crate) first_demand: u64,
    /// Of the first prefetch request.
    pub(crate) first_prefetch: u64,
    /// Of the smallest prefetch request.
    pub(crate) smallest_prefetch: u64,
    /// When the first prefetch was asked for.
    pub(crate) prefetch_asked: Option<Instant>,
    /// Since when what was used is spared, if the first prefetch request says so.
    pub(crate) spares_since: Option<u64>,
    /// As `scattered`, for the first prefetch request.
    pub(crate) prefetch_scattered: bool,
    /// The first request needs what lies together.
    pub(crate) scattered: bool,
    /// Requests that no eviction can serve, for what is pinned and held.
    pub(crate) out_of_reach: usize,
    /// When the first request lets others pass again.
    pub(crate) unblocks_at: Option<Instant>,
}

impl Wanted {
    /// What the first request takes.
    pub(crate) fn first(&self) -> u64 {
        if self.demand_bytes > 0 { self.first_demand } else { self.first_prefetch }
    }

    /// Whether the first request needs what lies together.
    pub(crate) fn is_scattered(&self) -> bool {
        if self.demand_bytes > 0 { self.scattered } else { self.prefetch_scattered }
    }

    /// Enters the prefetches that wait.
    pub(super) fn add_prefetches(&mut self, served: &Served) {
        self.prefetch_bytes = served.bytes;
        self.first_prefetch = served.first;
        self.prefetch_scattered = served.scattered;
        self.smallest_prefetch = served.smallest;
        self.prefetch_asked = served.asked;
    }

    /// Enters those that spare more than a prefetch does: the first alone, since each spares
    /// something else.
    pub(super) fn add_sparing(&mut self, served: &Served) {
        self.add_prefetches(served);
        self.prefetch_bytes = served.first;
        self.smallest_prefetch = served.first;
        self.spares_since = served.spares_since;
    }

    pub(crate) fn any(&self) -> bool {
        self.demand_bytes + self.prefetch_bytes > 0 || self.out_of_reach > 0
    }
}

/// What was found in one class. The first is the first that eviction can serve, or else the first
/// of all. Bytes are footprints of those that wait on.
#[derive(Default)]
pub(super) struct Served {
    pub(super) bytes: u64,
    pub(super) first: u64,
    pub(super) smallest: u64,
    pub(super) asked: Option<Instant>,
    pub(super) spares_since: Option<u64>,
    pub(super) unblocks_at: Option<Instant>,
    pub(super) scattered: bool,
    /// The first one waits for what is on its way.
    pub(super) coming: bool,
    pub(super) out_of_reach: usize,
}

impl Served {
    /// This one is the first.
    pub(super) fn lead<S: Space>(&mut self, waiter: &Waiter<S>) {
        self.first = waiter.footprint;
        self.asked = Some(waiter.deadline.asked());
        self.spares_since = waiter.need.spares_since;
    }

    /// It found no space, for this reason.
    pub(super) fn wait_for(&mut self, why: NoSpace, footprint: u64) {
        (self.scattered, self.coming) = (why.scattered, why.coming);
        if why.coming {
            // It may never come.
            self.unblocks_at = self.unblocks_at.or(Some(Instant::now() + BLOCK_MAX));
        } else {
            self.bytes += footprint;
        }
    }
}
