//! Brings the current bytes of an object to the tier that a catalog can lead to.
//!
//! Invariant: the host copy stays, and the gate is held for the write alone: space is awaited
//! without it. Called before an object gets a name, and to make it durable.

use std::sync::Arc;

use super::between::{promote_between, settle_below};
use super::to_disk::{CopyFate, Leaving, write_batch};
use super::{Job, write_back_from_device};
use crate::chunk::chunk_lens;
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::object::{ExtentMap, GatePass, Object};

/// Writes the current bytes of one object to the tier that names lead to, keeps its other copies
/// and returns the map of that tier. A chunk without an extent is zeros.
///
/// # Errors
///
/// What the tier says.
pub(crate) async fn settle(
    object: &Arc<Object>,
    deadline: &Deadline,
) -> Result<ExtentMap, VirtualMemoryError> {
    let level = if crate::planted!("names-above") { 0 } else { object.shared.durable_level() };
    let mut may_make_space = object.shared.evicts_from(level);
    loop {
        let pass = object.gate(deadline).await?;
        let map = if object.copy.is_some() {
            match settle_copy(pass, level, deadline).await {
                Err(VirtualMemoryError::TierFull { .. }) if may_make_space => {
                    // What the tier can do without leaves it first, once.
                    may_make_space = false;
                    make_space(object, level, deadline).await?;
                    continue;
                }
                outcome => Some(outcome.map_err(|error| object.shared.refused(error))?),
            }
        } else if object.is_dirty_on_device() && !crate::planted!("dirty-unflushed") {
            write_back_from_device(&pass, MigrationCause::Flush, deadline).await?;
            drop(pass);
            None
        } else if !object.extents().missing_in(level).is_empty() {
            let settled = settle_below(pass, level, deadline).await;
            Some(settled.map_err(|error| object.shared.refused(error))?)
        } else {
            let map = object.extents();
            drop(pass);
            Some(map)
        };
        if let Some(settled) = map.as_ref().and_then(|map| map.in_level(level)) {
            return Ok(settled);
        }
        if deadline.is_past() {
            return Err(deadline.error("making an object durable"));
        }
        if map.is_some() {
            drop(map);
            let job = Job::new(object.clone(), MigrationCause::Flush, *deadline);
            promote_between(&job, level).await?;
        }
    }
}

/// Writes what the tier `level` lacks of an object that has a host copy, and returns its map. A
/// refusal is for the caller to count.
///
/// # Errors
///
/// What the tier says.
pub(crate) async fn settle_copy(
    pass: GatePass,
    level: usize,
    deadline: &Deadline,
) -> Result<ExtentMap, VirtualMemoryError> {
    let object = pass.object().clone();
    let public = |error| object.shared.attempt_error(object.id, error);
    let victim = Leaving::prepare(pass, level).map_err(|(_pass, error)| public(error))?;
    let mut batch = vec![victim];
    let written = write_batch(&mut batch, CopyFate::Keep, MigrationCause::Flush, deadline).await;
    let map = written.map_err(public)?.pop();
    Ok(map.expect("invariant: one was written"))
}

/// Has the tiers below host memory make space for what only host memory has of an object, as far as
/// that goes.
async fn make_space(
    object: &Arc<Object>,
    level: usize,
    deadline: &Deadline,
) -> Result<(), VirtualMemoryError> {
    let absent = object.extents().absent_from(object.len, level);
    let lens = chunk_lens(object.len, absent);
    let made = object.shared.make_space_below(level, &lens, deadline).await;
    made.map(drop).map_err(|error| object.shared.tier_error(object.id, error))
}
