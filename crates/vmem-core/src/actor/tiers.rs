//! The tiers as their evictors see them: how an object stands there, what its leaving costs, and
//! how it leaves.
//!
//! Invariant: nothing here waits, and nothing decides: that is for `plan.rs`. An object leaves by
//! its gate, so never one that is held, read, in flight or being written. Called by the evictor of
//! the tier.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Victim;
use crate::host::HostArena;
use crate::migrate::relocate;
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::stats::add;
use crate::tier::{DeviceSpace, HostSpace, Space, TierState, Wanted};

/// An object that was used within this time never makes way for a prefetch in host memory, in
/// nanoseconds.
const HOT_NS: u64 = 1_000_000_000;
/// Copies around which it is looked for neighbours.
const SEEDS_MAX: usize = 32;

/// A tier that evicts.
pub(super) trait Evicting {
    type Space: Space;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<Self::Space>;

    /// How an object stands here, for the policy; what was used at `spared_since` or later is not
    /// to go.
    fn probe(&self, object: &Object, spared_since: u64) -> Probe;

    /// Since when what is used is spared by a prefetch, in nanoseconds of the store's clock.
    fn spared_since(&self, shared: &Shared, wanted: &Wanted) -> u64;

    /// In how long what was used at `stamp` makes way for a prefetch; none if it never does.
    fn cools_in(&self, shared: &Shared, stamp: u64) -> Option<Duration>;

    /// Whether the holder of its gate can take an object out now.
    fn may_leave(&self, object: &Object) -> bool;

    /// Whether an object cannot leave without new space below.
    fn needs_space_below(&self, object: &Object) -> bool;

    /// What its leaving costs and frees.
    fn victim(&self, object: &Object) -> Victim;

    /// Takes an object out that needs nothing written. False if it is held, read or being changed.
    fn drop_clean(&self, pass: &GatePass) -> bool;

    /// Objects whose leaving makes one piece of free space of what the first request needs.
    fn neighbours(&self, shared: &Shared, wanted: &Wanted) -> Vec<u64>;

    /// Moves objects within the tier, so that free bytes become usable bytes. True if that freed
    /// some.
    fn compact(&self, shared: &Shared) -> bool;
}

/// Object space in host memory.
pub(super) struct InHost;

impl Evicting for InHost {
    type Space = HostSpace;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<HostSpace> {
        &shared.host
    }

    fn probe(&self, object: &Object, spared_since: u64) -> Probe {
        object.probe_in_host(spared_since)
    }

    fn may_leave(&self, object: &Object) -> bool {
        object.pins() == 0 && object.copy.readers() == 0 && object.has_host_space()
    }

    fn spared_since(&self, shared: &Shared, _wanted: &Wanted) -> u64 {
        shared.recency.now().saturating_sub(HOT_NS)
    }

    fn cools_in(&self, shared: &Shared, stamp: u64) -> Option<Duration> {
        Some(Duration::from_nanos((stamp + HOT_NS).saturating_sub(shared.recency.now())))
    }

    fn needs_space_below(&self, object: &Object) -> bool {
        object.is_dirty() || object.has_spare()
    }

    fn victim(&self, object: &Object) -> Victim {
        let payload = object.is_dirty().then_some(object.len as u64);
        Victim { id: object.id, footprint: HostArena::footprint(object.len), payload }
    }

    fn drop_clean(&self, pass: &GatePass) -> bool {
        pass.object().drop_clean_copy(pass).is_some()
    }

    /// The owners of a span whose pages it needs.
    fn neighbours(&self, shared: &Shared, _wanted: &Wanted) -> Vec<u64> {
        let arena = &shared.host.space().arena;
        let Some(span) = arena.sparsest_span(&|id| !is_movable(shared, id)) else {
            return Vec::new();
        };
        let lies_there = |&id: &u64| {
            let pass = shared.find(id).and_then(|object| object.try_gate_quietly());
            pass.is_some_and(|pass| pass.object().lies_in(&pass, |slot| span.holds(slot)))
        };
        if span.owners.iter().all(lies_there) { span.owners } else { Vec::new() }
    }

    fn compact(&self, shared: &Shared) -> bool {
        let Some(evacuation) = shared.host.space().arena.evacuation(&|id| !is_movable(shared, id))
        else {
            return false;
        };
        let moved = evacuation
            .owners()
            .iter()
            .all(|&id| shared.find(id).is_none_or(|object| relocate(&object, &evacuation)));
        if moved {
            add(&shared.counters.relocated_bytes, evacuation.live_bytes());
        }
        moved
    }
}

fn is_movable(shared: &Shared, id: u64) -> bool {
    let is_idle = |object: &Object| object.copy.readers() == 0 && !object.is_changing();
    shared
        .find(id)
        .is_some_and(|object| object.pins() == 0 && is_idle(&object) && object.has_host_space())
}

/// The memory of the device with this number.
pub(super) struct OnDevice(pub(super) usize);

impl Evicting for OnDevice {
    type Space = DeviceSpace;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<DeviceSpace> {
        &shared.devices()[self.0].state
    }

    fn probe(&self, object: &Object, spared_since: u64) -> Probe {
        object.probe_on(self.0, spared_since)
    }

    fn may_leave(&self, object: &Object) -> bool {
        object.has_space_on(self.0)
    }

    /// A prefetch makes nothing leave that was used after it was asked for.
    fn spared_since(&self, shared: &Shared, wanted: &Wanted) -> u64 {
        let ago = |asked: Instant| asked.elapsed().as_nanos() as u64;
        shared.recency.now().saturating_sub(wanted.prefetch_asked.map_or(0, ago))
    }

    fn cools_in(&self, _shared: &Shared, _stamp: u64) -> Option<Duration> {
        None
    }

    /// Whatever is here has its bytes below.
    fn needs_space_below(&self, _object: &Object) -> bool {
        false
    }

    fn victim(&self, object: &Object) -> Victim {
        let footprint = object.shared.devices()[self.0].backend.footprint(object.len);
        Victim { id: object.id, footprint, payload: None }
    }

    fn drop_clean(&self, pass: &GatePass) -> bool {
        pass.object().leave_device(pass, self.0)
    }

    /// The coldest copies that lie beside each other, with what is free between them.
    fn neighbours(&self, shared: &Shared, wanted: &Wanted) -> Vec<u64> {
        let state = self.state(shared);
        let mut seeds = Vec::new();
        state.order.lock().coldest(SEEDS_MAX, &mut |id| seeds.push(id));
        let addresses: Vec<_> =
            seeds.into_iter().filter_map(|id| shared.find(id)?.address_on(self.0)).collect();
        let stamp = |id: u64| {
            let object = shared.find(id)?;
            let is_evictable =
                object.is_evictable_on(self.0) && !crate::planted!("evict-neighbours");
            is_evictable.then(|| object.stamp())
        };
        state.space().coldest_window(&addresses, wanted.first(), &stamp)
    }

    fn compact(&self, _shared: &Shared) -> bool {
        false
    }
}
