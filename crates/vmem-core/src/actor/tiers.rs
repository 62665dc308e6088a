//! The tiers as their evictors see them: how an object stands there, what its leaving costs, and
//! how it leaves.
//!
//! Invariant: nothing here waits, and nothing decides: that is for `plan.rs`. An object leaves by
//! its gate, so never one that is held, read, in flight or being written. Called by the evictor of
//! the tier.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::Took;
use super::look::Spares;
use super::plan::Victim;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::host::HostArena;
use crate::migrate::{
    CopyFate, Demotion, Leaving, LeavingDevice, demote_between, demote_unwritten, host_space,
    relocate, write_back, write_back_from_devices,
};
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::stats::add;
use crate::storage::TierError;
use crate::tier::{DeviceSpace, HostSpace, Space, StorageSpace, TierState, Wanted};

/// An object that was used within this time never makes way for a prefetch in host memory, in
/// nanoseconds.
const HOT_NS: u64 = 1_000_000_000;
/// Copies around which it is looked for neighbours.
const SEEDS_MAX: usize = 32;

/// A tier that evicts.
pub(super) trait Evicting {
    type Space: Space;

    /// An object that is to be written before it can leave, with its gate.
    type Leaving: Send + 'static;

    /// Whether what is dirty at the cold end is written before its space is needed.
    const CLEANS_EARLY: bool;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<Self::Space>;

    /// How an object stands here, for the policy; what was used at `spared_since` or later is not
    /// to go.
    fn probe(&self, object: &Object, spared_since: u64) -> Probe;

    /// Since when what is used is spared by a prefetch, in nanoseconds of the store's clock: since
    /// the prefetch was asked for.
    fn spared_since(&self, shared: &Shared, wanted: &Wanted) -> u64 {
        let ago = |asked: Instant| asked.elapsed().as_nanos() as u64;
        shared.recency.now().saturating_sub(wanted.prefetch_asked.map_or(0, ago))
    }

    /// Whether an object is spared that was used before.
    fn is_spared(&self, _object: &Object, _spares: Spares) -> bool {
        false
    }

    /// In how long what was used at `stamp` makes way for a prefetch; none if it never does.
    fn cools_in(&self, _shared: &Shared, _stamp: u64) -> Option<Duration> {
        None
    }

    /// Whether the holder of its gate can take an object out now.
    fn may_leave(&self, object: &Object) -> bool;

    /// Whether an object cannot leave without new space below.
    fn needs_space_below(&self, object: &Object) -> bool;

    /// Whether it has to be written before it leaves, into such space or into space that it has.
    fn is_written_first(&self, object: &Object) -> bool {
        self.needs_space_below(object)
    }

    /// What its leaving costs and frees.
    fn victim(&self, object: &Object) -> Victim;

    /// Takes an object out that needs nothing written. False if it is held, read or being changed.
    fn drop_clean(&self, pass: &GatePass) -> bool;

    /// Takes space below for an object; none if it needs nothing written, and has left already.
    ///
    /// # Errors
    ///
    /// What the tier below says.
    fn prepare(&self, pass: GatePass) -> Result<Option<Self::Leaving>, TierError>;

    /// What is to be written of an object, in bytes.
    fn payload(leaving: &Self::Leaving) -> u64;

    /// Writes a batch, and lets its objects leave unless the copies here are kept.
    fn write(
        batch: Vec<Self::Leaving>,
        fate: CopyFate,
        cause: MigrationCause,
        deadline: Deadline,
    ) -> BoxFuture<'static, Took>;

    /// Objects whose leaving makes one piece of free space of what the first request needs.
    fn neighbours(&self, _shared: &Shared, _wanted: &Wanted) -> Vec<u64> {
        Vec::new()
    }

    /// Moves objects within the tier, so that free bytes become usable bytes. True if that freed
    /// some.
    fn compact(&self, _shared: &Shared) -> bool {
        false
    }
}

/// Object space in host memory.
pub(super) struct InHost;

impl Evicting for InHost {
    type Space = HostSpace;
    type Leaving = Leaving;

    const CLEANS_EARLY: bool = true;

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
        object.is_dirty() || object.has_spare() || object.has_floor_in_host()
    }

    fn victim(&self, object: &Object) -> Victim {
        let payload = object.is_dirty().then_some(object.len as u64);
        Victim { id: object.id, footprint: HostArena::footprint(object.len), payload }
    }

    fn drop_clean(&self, pass: &GatePass) -> bool {
        pass.object().drop_clean_copy(pass).is_some()
    }

    fn prepare(&self, pass: GatePass) -> Result<Option<Leaving>, TierError> {
        if pass.object().has_spare() {
            return demote_unwritten(&pass, 0).map(|()| None);
        }
        if pass.object().has_floor_in_host() {
            return pass.object().lower_floor(&pass).map(|()| None);
        }
        Leaving::prepare(pass, 0).map(Some).map_err(|(_pass, error)| error)
    }

    fn payload(leaving: &Leaving) -> u64 {
        leaving.payload()
    }

    fn write(
        batch: Vec<Leaving>,
        fate: CopyFate,
        cause: MigrationCause,
        deadline: Deadline,
    ) -> BoxFuture<'static, Took> {
        let written = async move {
            let Some(shared) = batch.first().map(Leaving::shared) else { return Took::All };
            let Err(error) = write_back(batch, fate, cause, &deadline).await else {
                return Took::All;
            };
            match shared.tier_error(0, error) {
                VirtualMemoryError::TierFull { .. } => Took::NoSpace,
                _ => Took::Failed,
            }
        };
        written.boxed()
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
    type Leaving = LeavingDevice;

    /// What a kernel wrote may be written again before its memory is needed.
    const CLEANS_EARLY: bool = false;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<DeviceSpace> {
        &shared.devices()[self.0].state
    }

    fn probe(&self, object: &Object, spared_since: u64) -> Probe {
        object.probe_on(self.0, spared_since)
    }

    fn is_spared(&self, object: &Object, spares: Spares) -> bool {
        spares.unused && object.is_unused_on(self.0)
    }

    fn may_leave(&self, object: &Object) -> bool {
        object.has_space_on(self.0)
    }

    /// What a kernel wrote may be here alone, but has its floor mostly.
    fn needs_space_below(&self, object: &Object) -> bool {
        self.is_written_first(object) && !object.has_floor()
    }

    fn is_written_first(&self, object: &Object) -> bool {
        object.is_alone_on(self.0) && !crate::planted!("dirty-dropped")
    }

    fn victim(&self, object: &Object) -> Victim {
        let footprint = object.shared.devices()[self.0].backend.footprint(object.len);
        let payload = object.is_alone_on(self.0).then_some(object.len as u64);
        Victim { id: object.id, footprint, payload }
    }

    fn drop_clean(&self, pass: &GatePass) -> bool {
        pass.object().leave_device(pass, self.0)
    }

    fn prepare(&self, pass: GatePass) -> Result<Option<LeavingDevice>, TierError> {
        let object = pass.object();
        if !object.has_floor()
            && let Err(error) = object.lower_floor(&pass)
        {
            object.return_floor(&pass, host_space(object));
            if !object.has_floor() {
                return Err(error);
            }
        }
        Ok(Some(LeavingDevice { pass, device: self.0 }))
    }

    fn payload(leaving: &LeavingDevice) -> u64 {
        leaving.pass.object().len as u64
    }

    fn write(
        batch: Vec<LeavingDevice>,
        fate: CopyFate,
        cause: MigrationCause,
        deadline: Deadline,
    ) -> BoxFuture<'static, Took> {
        let written = async move {
            match write_back_from_devices(batch, fate, cause, &deadline).await {
                Ok(()) => Took::All,
                Err(VirtualMemoryError::TierFull { .. }) => Took::NoSpace,
                Err(_) => Took::Failed,
            }
        };
        written.boxed()
    }

    /// The coldest copies that make space together.
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
        // Others do without rather than have some of it.
        let parts = wanted.demand_bytes > 0;
        state.space().coldest_neighbours(&addresses, wanted.first(), parts, &stamp)
    }
}

/// The tier at this place below host memory, if there is a slower one.
pub(super) struct InStorage(pub(super) usize);

impl Evicting for InStorage {
    type Space = StorageSpace;
    type Leaving = Demotion;

    /// What is written to a slower tier early may change before it has to leave.
    const CLEANS_EARLY: bool = false;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<StorageSpace> {
        &shared.storage()[self.0].state
    }

    fn probe(&self, object: &Object, spared_since: u64) -> Probe {
        object.probe_in_storage(self.0, spared_since)
    }

    fn may_leave(&self, object: &Object) -> bool {
        object.may_leave_storage(self.0)
    }

    fn needs_space_below(&self, object: &Object) -> bool {
        object.is_dirty_in(self.0)
    }

    fn victim(&self, object: &Object) -> Victim {
        let footprint = self.state(&object.shared).space().footprint(object.len);
        let payload = object.is_dirty_in(self.0).then_some(object.len as u64);
        Victim { id: object.id, footprint, payload }
    }

    fn drop_clean(&self, pass: &GatePass) -> bool {
        let object = pass.object();
        object.with_extents(pass, |map, old| map.drop_from(object.len, self.0, old))
    }

    fn prepare(&self, pass: GatePass) -> Result<Option<Demotion>, TierError> {
        Demotion::prepare(pass, self.0 + 1).map(Some).map_err(|(_pass, error)| error)
    }

    fn payload(leaving: &Demotion) -> u64 {
        leaving.payload()
    }

    fn write(
        batch: Vec<Demotion>,
        fate: CopyFate,
        cause: MigrationCause,
        deadline: Deadline,
    ) -> BoxFuture<'static, Took> {
        let written = async move {
            let Some(shared) = batch.first().map(Demotion::shared) else { return Took::All };
            let Err(error) = demote_between(batch, fate, cause, &deadline).await else {
                return Took::All;
            };
            match shared.refused(error) {
                // Damage is that of an object, which is not asked to leave again.
                VirtualMemoryError::Corrupt { .. } => Took::All,
                VirtualMemoryError::TierFull { .. } => Took::NoSpace,
                _ => Took::Failed,
            }
        };
        written.boxed()
    }
}
