//! What an object has to do with the evictors of the tiers below host memory: its place in their
//! order, and its holds.
//!
//! Invariant: an object is in the order of such a tier once, for as long as the tier has any of it,
//! if objects leave that tier for a slower one. One that has, or had, a name stays in the
//! one that the catalog leads to. Changed by the holder of the gate; holds go without it.

use smallvec::SmallVec;

use super::{Inner, Object};
use crate::policy::{Entry, Probe, Token};
use crate::tier::{HoldCount, HoldKind, Space};

/// What an object has to do with one such tier.
#[derive(Debug)]
pub(super) struct OnStorage {
    level: usize,
    /// What the policy of the tier calls it.
    token: Option<Token>,
    /// The accesses that the policy has seen.
    seen: u32,
    holds: HoldCount,
}

/// One for each tier that the object has to do with.
pub(super) type OnStorages = SmallVec<[OnStorage; 1]>;

impl Inner {
    fn storage(&self, level: usize) -> Option<&OnStorage> {
        self.rare.storage.iter().find(|one| one.level == level)
    }

    fn change_storage<T>(&mut self, level: usize, change: impl FnOnce(&mut OnStorage) -> T) -> T {
        self.rare.change(|rare| {
            let all = &mut rare.storage;
            let at = all.iter().position(|one| one.level == level).unwrap_or_else(|| {
                all.push(OnStorage { level, token: None, seen: 0, holds: HoldCount::NONE });
                all.len() - 1
            });
            let result = change(&mut all[at]);
            all.retain(|one| one.token.is_some() || one.holds.any());
            result
        })
    }
}

impl Object {
    /// Whether it has a name, or had one.
    fn was_named(&self) -> bool {
        self.named.get().is_some()
    }

    /// Whether it stays in this tier below host memory: the catalog leads there.
    pub(crate) fn stays_in(&self, level: usize) -> bool {
        self.was_named() && level == self.shared.durable_level()
    }

    /// The tier at `level` below host memory, or that which it stays in, if that is faster.
    pub(crate) fn level_at_most(&self, level: usize) -> usize {
        if self.was_named() { level.min(self.shared.durable_level()) } else { level }
    }

    /// The tier below host memory that new bytes of it go to.
    pub(crate) fn home_level(&self) -> usize {
        self.level_at_most(self.home.level().unwrap_or(0))
    }

    /// The tier below host memory that is to have all of it once it was flushed.
    pub(crate) fn flush_level(&self) -> usize {
        if self.was_named() { self.shared.durable_level() } else { self.home_level() }
    }

    /// Whether this tier below host memory has all of it.
    pub(crate) fn is_stored_in(&self, level: usize) -> bool {
        let inner = self.inner.lock();
        match self.shared.evicts_from(0) {
            true => inner.extents.is_whole_in(self.len, level),
            false => inner.extents.is_whole(self.len),
        }
    }

    /// Whether any of it is only in a tier below host memory that is slower than this one.
    pub(crate) fn is_below(&self, level: usize) -> bool {
        self.shared.evicts_from(level) && self.inner.lock().extents.slowest_level() > level
    }

    /// The tier below host memory to which a change of the object is to come again, since it is
    /// held there.
    pub(crate) fn level_to_refresh(&self) -> Option<usize> {
        if !self.shared.evicts_from(0) {
            return None;
        }
        let inner = self.inner.lock();
        let held = inner.rare.storage.iter().filter(|one| one.holds.any()).map(|one| one.level);
        held.min().filter(|&level| inner.extents.slowest_level() > level)
    }

    // ---- The order of eviction ---------------------------------------------------------------

    /// Enters the order of a tier that has some of it now.
    pub(super) fn enter_order_in(&self, level: usize) {
        if !self.shared.evicts_from(level) || self.stays_in(level) {
            return;
        }
        let state = &self.shared.storage()[level].state;
        let footprint = state.space().footprint(self.len);
        let entry = Entry { id: self.id, stamp: self.stamp(), footprint, prefetched: false };
        let token = state.enter(entry);
        let seen = self.touches();
        self.inner.lock().change_storage(level, |one| {
            assert!(one.token.is_none(), "an object is in the order of a tier once");
            (one.token, one.seen) = (Some(token), seen);
        });
    }

    /// Leaves the order of a tier that has nothing of it any more.
    pub(super) fn leave_order_in(&self, level: usize) {
        if !self.shared.evicts_from(level) {
            return;
        }
        let token = self.inner.lock().change_storage(level, |one| one.token.take());
        // One that came into memory with its name was never in it.
        if let Some(token) = token {
            self.shared.storage()[level].state.leave(token);
        }
    }

    /// Whether the holder of its gate can take it out of this tier.
    pub(crate) fn may_leave_storage(&self, level: usize) -> bool {
        let inner = self.inner.lock();
        let is_held = inner.storage(level).is_some_and(|one| one.holds.any());
        let is_there = inner.extents.levels() >> level & 1 == 1;
        is_there && !is_held && !self.stays_in(level) && inner.rare.corrupt.is_none()
    }

    /// How it stands in this tier, for the policy. What was used at `spared_since` or later is not
    /// to go.
    pub(crate) fn probe_in_storage(&self, level: usize, spared_since: u64) -> Probe {
        if self.stays_in(level) {
            return Probe::Pinned;
        }
        if self.is_changing() {
            return Probe::Busy { stamp: self.mark_now() };
        }
        let mut inner = self.inner.lock();
        let is_shared = inner.extents.is_shared();
        let is_damaged = inner.rare.corrupt.is_some();
        let all = inner.rare.get_mut().map(|rare| &mut rare.storage);
        let found = all.and_then(|all| all.iter_mut().find(|one| one.level == level));
        let Some(one) = found.filter(|one| one.token.is_some()) else { return Probe::Gone };
        let stamp = self.stamp();
        if one.holds.any() {
            Probe::Pinned
        } else if is_shared {
            // A reader keeps its extents, which would not be free.
            Probe::Busy { stamp: self.mark_now() }
        } else if is_damaged || stamp >= spared_since {
            Probe::Unfit
        } else {
            let now = self.touches();
            let touches = now.wrapping_sub(std::mem::replace(&mut one.seen, now));
            Probe::Evictable { stamp, touches }
        }
    }

    /// Whether a slower tier lacks something that this one has.
    pub(crate) fn is_dirty_in(&self, level: usize) -> bool {
        self.inner.lock().extents.is_dirty_in(level)
    }

    // ---- Holds -----------------------------------------------------------------------------

    pub(super) fn holds_in_storage(&self, level: usize) -> u32 {
        self.inner.lock().storage(level).map_or(0, |one| one.holds.count())
    }

    pub(super) fn add_hold_in_storage(&self, level: usize, charged_as: HoldKind) -> bool {
        self.inner.lock().change_storage(level, |one| one.holds.add(charged_as))
    }

    /// One more hold, unless it were the first.
    pub(super) fn try_add_hold_in_storage(&self, level: usize) -> bool {
        self.inner.lock().change_storage(level, |one| one.holds.try_add())
    }

    /// One hold less. Returns what to uncharge if it was the last.
    pub(super) fn remove_hold_in_storage(&self, level: usize) -> Option<HoldKind> {
        let last = self.inner.lock().change_storage(level, |one| one.holds.remove());
        if last.is_some() {
            let token = || self.inner.lock().storage(level).and_then(|one| one.token);
            self.shared.storage()[level].state.unpark(token);
        }
        last
    }
}
