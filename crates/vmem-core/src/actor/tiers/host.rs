//! Host memory as its evictor sees it.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Cleaning, Evicting};
use crate::actor::Took;
use crate::actor::plan::Victim;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::host::HostArena;
use crate::migrate::{CopyFate, Leaving, demote_unwritten, relocate, write_back};
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::stats::add;
use crate::storage::TierError;
use crate::tier::{HostSpace, Neighbours, TierState, Wanted, Watermarks};

/// An object that was used within this time never makes way for a prefetch, in nanoseconds.
const HOT_NS: u64 = 1_000_000_000;

/// Object space in host memory.
pub(crate) struct InHost;

impl Evicting for InHost {
    type Space = HostSpace;
    type Leaving = Leaving;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<HostSpace> {
        &shared.host
    }

    fn cleans_early(&self, shared: &Shared) -> Option<Cleaning> {
        let Watermarks { low_bytes, high_bytes } = shared.host.marks;
        let cold_bytes = high_bytes - low_bytes;
        Some(Cleaning { above_bytes: low_bytes, cold_bytes, after_evictions: false })
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
    fn neighbours(&self, shared: &Shared, _wanted: &Wanted) -> Neighbours {
        let arena = &shared.host.space().arena;
        let Some(span) = arena.sparsest_span(&|id| !is_movable(shared, id)) else {
            return Neighbours::default();
        };
        let lies_there = |&id: &u64| {
            let pass = shared.find(id).and_then(|object| object.try_gate_quietly());
            pass.is_some_and(|pass| pass.object().lies_in(&pass, |slot| span.holds(slot)))
        };
        let is_whole = span.owners.iter().all(lies_there);
        Neighbours { objects: if is_whole { span.owners } else { Vec::new() }, window: None }
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
