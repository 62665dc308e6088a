//! Moves an object to another place of its tier, so that what lies beside it becomes one piece of
//! free memory.
//!
//! Ownership: the new place is the caller's until it is published; the old one is freed with its
//! last user. The version does not change, and a read meanwhile gets the one place or the other. On
//! a device one that is in use when it was copied stays where it was.
//! Called by the evictors of host memory and of devices.

use std::sync::Arc;

use crate::copy::OwnedCopy;
use crate::error::VirtualMemoryError;
use crate::host::Evacuation;
use crate::object::{GatePass, Object};
use crate::stats::add;
use crate::tier::Destination;

/// Moves an object out of the span that is being emptied. False if it cannot move now.
pub(crate) fn relocate(object: &Arc<Object>, evacuation: &Evacuation) -> bool {
    let Some(pass) = object.try_gate_quietly() else { return object.is_dead() };
    if !object.has_host_space() {
        // The object has left host memory already.
        return true;
    }
    let lies_there = object.lies_in(&pass, |slot| evacuation.holds(slot));
    if !lies_there && !crate::planted!("old-version-moves") {
        // The span has an old version, which a reader holds and which cannot move.
        return false;
    }
    let Some(slot) = evacuation.take(object.len, object.id) else { return false };
    object.relocate(&pass, OwnedCopy::new(&object.shared.copies, slot))
}

/// Moves an object to `to`, which is memory of the same device.
///
/// # Errors
///
/// `Device`: it is where it was.
pub(crate) async fn relocate_on_device(
    pass: &GatePass,
    device: usize,
    to: Destination,
) -> Result<(), VirtualMemoryError> {
    let object = pass.object();
    let tier = &object.shared.devices()[device];
    let Destination { range: to, moving: _moving } = to;
    let Some((from, is_valid)) = object.lies_on(pass, device) else { return Ok(()) };
    let address = from.address();
    if is_valid {
        let copied = tier.backend.copy_within(Arc::new(from), Arc::new(to.share())).await;
        copied.map_err(|error| tier.fault(error))?;
    } else {
        drop(from);
    }
    let footprint = to.footprint();
    if object.relocate_on(pass, device, address, to) {
        add(&object.shared.counters.relocated_bytes, footprint);
    }
    Ok(())
}
