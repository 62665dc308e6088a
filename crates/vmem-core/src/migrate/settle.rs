//! Brings the current bytes of an object to disk, where a catalog can lead to them.
//!
//! Invariant: the host copy stays, and the gate is held for the write alone: space is awaited
//! without it. Called before an object gets a name, and to make it durable.

use std::sync::Arc;

use super::between::promote_between;
use super::to_disk::{CopyFate, Leaving, write_batch};
use super::{Job, write_back_from_device};
use crate::chunk::chunk_lens;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::object::{ExtentMap, GatePass, Object};

/// Writes the current bytes of one object to disk, keeps its host copy and returns the disk map. A
/// chunk without an extent is zeros.
///
/// # Errors
///
/// What the disk says.
pub(crate) async fn settle(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<ExtentMap, VirtualMemoryError> {
    let mut may_make_space = object.shared.evicts_from(0);
    loop {
        let pass = object.gate(deadline).await?;
        let map = if object.copy.is_some() {
            match settle_copy(pass, deadline).await {
                Err(VirtualMemoryError::TierFull { .. }) if may_make_space => {
                    // What the disk can do without leaves it first, once.
                    may_make_space = false;
                    make_space(object, deadline).await?;
                    continue;
                }
                outcome => outcome.map_err(|error| object.shared.refused(error))?,
            }
        } else if object.is_dirty_on_device() && !crate::planted!("dirty-unflushed") {
            write_back_from_device(&pass, MigrationCause::Flush, deadline).await?;
            drop(pass);
            if deadline.is_past() {
                return Err(deadline.error("writing to disk"));
            }
            continue;
        } else {
            let map = object.extents();
            drop(pass);
            map
        };
        if !object.shared.evicts_from(0) || map.slowest_level() == 0 {
            return Ok(map);
        }
        if deadline.is_past() {
            return Err(deadline.error("writing to disk"));
        }
        drop(map);
        let job = Job::new(object.clone(), MigrationCause::Flush, *deadline);
        promote_between(&job, 0).await?;
    }
}

/// As [`settle`], of an object that has a host copy. A refusal is for the caller to count.
///
/// # Errors
///
/// As there.
pub(crate) async fn settle_copy(
    pass: GatePass,
    deadline: &Deadline,
) -> Result<ExtentMap, VirtualMemoryError> {
    let object = pass.object().clone();
    let public = |error| object.shared.attempt_error(object.id, error);
    let victim = Leaving::prepare(pass, 0).map_err(|(_pass, error)| public(error))?;
    let mut batch = vec![victim];
    let written = write_batch(&mut batch, CopyFate::Keep, MigrationCause::Flush, deadline).await;
    let map = written.map_err(public)?.pop();
    Ok(map.expect("invariant: one was written"))
}

/// Has the tiers below host memory make space for what only host memory has of an object, as far as
/// that goes.
async fn make_space(object: &Arc<Object>, deadline: &Deadline) -> Result<(), VirtualMemoryError> {
    let absent = object.extents().absent_from(object.len, 0);
    let made = object.shared.make_space_below(0, &chunk_lens(object.len, absent), deadline).await;
    made.map(drop).map_err(|error| object.shared.tier_error(object.id, error))
}
