//! The memory of a device as its evictor sees it.

use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Cleaning, Evicting, Window};
use crate::actor::Took;
use crate::actor::look::Spares;
use crate::actor::plan::Victim;
use crate::config::WriteBack;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::migrate::{CopyFate, LeavingDevice, host_space, write_back_from_devices};
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::storage::TierError;
use crate::tier::{DeviceSpace, Neighbours, Space, TierState, Wanted};

/// Objects of one window that move: each has its gate until its turn to be copied.
const MOVES_MAX: usize = 512;
/// Copies around which it is looked for neighbours.
const SEEDS_MAX: usize = 32;
/// The part of a device that is its cold end: once no more than that is free, it is kept written.
const COLD_PARTS: u64 = 16;

/// The memory of the device with this number.
pub(crate) struct OnDevice(pub(crate) usize);

impl Evicting for OnDevice {
    type Space = DeviceSpace;
    type Leaving = LeavingDevice;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<DeviceSpace> {
        &shared.devices()[self.0].state
    }

    /// Where versions are to be written back after a while anyhow, those at the cold end are a
    /// little earlier.
    fn cleans_early(&self, shared: &Shared) -> Option<Cleaning> {
        let WriteBack::After(_) = shared.limits.write_back else { return None };
        let cold_bytes = self.state(shared).space().capacity_bytes() / COLD_PARTS;
        let above_bytes = (COLD_PARTS - 1) * cold_bytes;
        let cleaning = Cleaning { above_bytes, cold_bytes, after_evictions: true };
        (!crate::planted!("device-uncleaned")).then_some(cleaning)
    }

    /// What is pinned to the device does not leave it.
    fn may_clean(&self, object: &Object) -> bool {
        object.may_leave_device(self.0)
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
        Ok(Some(LeavingDevice { pass, device: self.0, to: None }))
    }

    fn move_out(&self, pass: GatePass, window: &mut Window) -> Result<LeavingDevice, GatePass> {
        let Some(addresses) = &window.addresses else { return Err(pass) };
        let object = pass.object();
        let space = self.state(&object.shared).space();
        let footprint = space.footprint(object.len);
        let lies_there = |at: u64| at < addresses.end && at + footprint > addresses.start;
        let may_move = object.address_on(self.0).is_some_and(lies_there)
            && object.may_leave_device(self.0)
            && window.moves < MOVES_MAX
            && window.refused_bytes.is_none_or(|refused| footprint < refused)
            && !crate::planted!("window-stays");
        let to = if may_move { space.try_take_outside(object.len, addresses) } else { None };
        match to {
            Some(_) => {
                window.moves += 1;
                Ok(LeavingDevice { pass, device: self.0, to })
            }
            None => {
                if may_move {
                    window.refused_bytes = Some(footprint);
                }
                Err(pass)
            }
        }
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
    fn neighbours(&self, shared: &Shared, wanted: &Wanted) -> Neighbours {
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
