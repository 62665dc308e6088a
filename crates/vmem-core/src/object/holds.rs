//! What keeps an object in a tier, and its place in the order of eviction of host memory.
//!
//! Invariant: the first hold in a tier is charged there and the last one uncharged; an object is in
//! the order once, for as long as it has host memory. Called by the pins, the leases and whatever
//! publishes or drops a host copy.

use std::sync::atomic::Ordering;

use super::{GatePass, NO_TOKEN, Object};
use crate::memory_tier::{MemoryTier, Position};
use crate::policy::{Entry, Token};
use crate::tier::HoldKind;

impl Object {
    pub(crate) fn pins(&self) -> u32 {
        self.pins.load(Ordering::SeqCst)
    }

    /// How many pins and leases hold it in this tier.
    pub(crate) fn holds_in(&self, tier: MemoryTier) -> u32 {
        match tier.position() {
            Position::Device(device) => self.holds_on(device),
            Position::Host => self.pins(),
            Position::Below(level) => self.holds_in_storage(level),
        }
    }

    /// One more hold, charged to the tier as this kind; true if it is the first.
    pub(crate) fn add_hold(
        &self,
        tier: MemoryTier,
        charged_as: HoldKind,
        _pass: &GatePass,
    ) -> bool {
        let is_first = match tier.position() {
            Position::Device(device) => self.add_hold_on(device, charged_as),
            Position::Host => self.pins.fetch_add(1, Ordering::SeqCst) == 0,
            Position::Below(level) => self.add_hold_in_storage(level, charged_as),
        };
        if is_first {
            let footprint = self.shared.footprint_in(tier, self.len);
            self.shared.holds_of(tier).add(self.id, charged_as, footprint);
        }
        is_first
    }

    /// One more hold, unless it were the first: holds go without the gate.
    pub(crate) fn try_add_hold(&self, tier: MemoryTier, _pass: &GatePass) -> bool {
        let more = |pins: u32| (pins > 0).then(|| pins + 1);
        match tier.position() {
            Position::Device(device) => self.try_add_hold_on(device),
            Position::Host => {
                self.pins.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
            }
            Position::Below(level) => self.try_add_hold_in_storage(level),
        }
    }

    /// One hold less; after the last one the policy asks about the object again, and the tier is
    /// uncharged.
    pub(crate) fn remove_hold(&self, tier: MemoryTier) {
        let last = match tier.position() {
            Position::Device(device) => self.remove_hold_on(device),
            Position::Host => {
                let before = self.pins.fetch_sub(1, Ordering::SeqCst);
                assert!(before > 0, "unpinned more often than pinned");
                (before == 1).then_some(HoldKind::Pin)
            }
            Position::Below(level) => self.remove_hold_in_storage(level),
        };
        let Some(charged_as) = last else { return };
        if tier.position() == Position::Host {
            self.unpark();
        }
        self.shared.holds_of(tier).remove(self.id);
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

    /// Takes the object out of the order of eviction, if it is in it.
    pub(crate) fn leave_order(&self) {
        if self.token.load(Ordering::Relaxed) == NO_TOKEN {
            return;
        }
        let mut order = self.shared.host.order.lock();
        let token = self.token.swap(NO_TOKEN, Ordering::Relaxed);
        order.remove(Token(token));
    }

    /// Is asked about again by the policy, after the last pin went.
    pub(super) fn unpark(&self) {
        self.shared.host.unpark(|| {
            let token = self.token.load(Ordering::Relaxed);
            (token != NO_TOKEN).then_some(Token(token))
        });
    }
}
