//! Moves an object to another slot of host memory, so that a span is emptied and its pages serve
//! others.
//!
//! Ownership: the new slot is an [`OwnedCopy`] until it is published; the old one is freed with its
//! last reader. The version does not change, and a read meanwhile gets the one slot or the other.
//! Called by the evictor of host memory.

use std::sync::Arc;

use crate::copy::OwnedCopy;
use crate::host::Evacuation;
use crate::object::Object;

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
