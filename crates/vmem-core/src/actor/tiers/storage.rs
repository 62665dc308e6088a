//! A tier below host memory as its evictor sees it.

use futures::FutureExt;
use futures::future::BoxFuture;

use super::Evicting;
use crate::actor::Took;
use crate::actor::plan::Victim;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::migrate::{CopyFate, Demotion, demote_between};
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::storage::TierError;
use crate::tier::{Space, StorageSpace, TierState};

/// The tier at this place below host memory, if there is a slower one.
pub(crate) struct InStorage(pub(crate) usize);

impl Evicting for InStorage {
    type Space = StorageSpace;
    type Leaving = Demotion;

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
