//! Pins: objects that do not leave their tier downwards.
//!
//! Invariant: the first pin of an object is charged against the tier's budget for pins, for as long as there is
//! any; a pin is counted under the object's gate, so that no eviction is half way when it is granted. A task charges and
//! counts, the caller gets the guard. Called by `place.rs` and the leases.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Result;
use super::place::ask;
use crate::actor::Move;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::migrate::{Job, fetch_into};
use crate::object::{GatePass, Object};
use crate::shared::Shared;
use crate::tier::{Class, Need};

/// Keeps an object in its tier; dropping it unpins. It holds a handle, so a pinned object is
/// alive unless it is freed.
#[must_use = "dropping the guard unpins"]
#[derive(Debug)]
pub struct PinGuard {
    object: Option<Arc<Object>>,
    tier: MemoryTier,
    _handle: VMemHandle,
}

impl PinGuard {
    /// A guard that keeps nothing, since there is nothing to keep it from.
    pub(super) fn of_nothing(handle: &VMemHandle, tier: MemoryTier) -> Self {
        PinGuard { object: None, tier, _handle: handle.clone() }
    }

    fn counted(handle: &VMemHandle, tier: MemoryTier) -> Self {
        PinGuard { object: Some(handle.object().clone()), tier, _handle: handle.clone() }
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if object.remove_pin(self.tier) {
            object.shared.uncharge_pin(self.tier, object.len);
        }
    }
}

/// A pin of an object that is where it is to be kept, if nothing has to be waited for.
pub(super) fn pin_now(handle: &VMemHandle, tier: MemoryTier) -> Result<Option<PinGuard>> {
    let object = handle.object();
    let Some(pass) = object.gate_if_open()? else { return Ok(None) };
    let resident = match tier {
        MemoryTier::Vram => object.in_vram(),
        MemoryTier::Host | MemoryTier::Disk => object.copy.is_some(),
    };
    if object.len > 0 && !resident {
        return Ok(None);
    }
    let Some(mut charge) = charge_first(&pass, tier)? else { return Ok(None) };
    Ok(count_pin(&pass, tier, &mut charge).then(|| PinGuard::counted(handle, tier)))
}

/// Promotes an object and pins it; for a task.
///
/// # Errors
///
/// Those of promoting it; `AllPinned`, `ExceedsCapacity`.
pub(super) async fn pin(
    handle: VMemHandle,
    tier: MemoryTier,
    deadline: Deadline,
) -> Result<PinGuard> {
    match tier {
        MemoryTier::Vram => pin_in_vram(&handle, &deadline).await?,
        MemoryTier::Host | MemoryTier::Disk => pin_in_host(&handle, &deadline).await?,
    }
    Ok(PinGuard::counted(&handle, tier))
}

async fn pin_in_host(handle: &VMemHandle, deadline: &Deadline) -> Result<()> {
    let (object, tier) = (handle.object(), MemoryTier::Host);
    let job = Job::new(object.clone(), MigrationCause::Promote, *deadline);
    loop {
        // Before the gate, and without a charge: whoever waits for space holds none.
        let mut room = None;
        if object.len > 0 && !object.has_host_room() {
            let need = Need::one(object.len, object.id, Class::Demand);
            room = Some(object.shared.host_room_or_error(&need, deadline).await?);
        }
        let pass = object.gate(deadline).await?;
        if object.len > 0 && room.is_none() && !object.has_host_room() {
            continue;
        }
        let Some(mut charge) = charge_first(&pass, tier)? else {
            drop((room, pass));
            until_unpinned(object, tier, deadline).await?;
            continue;
        };
        if object.len > 0 {
            drop(fetch_into(&job, &pass, room).await?);
        }
        if count_pin(&pass, tier, &mut charge) {
            return Ok(());
        }
    }
}

async fn pin_in_vram(handle: &VMemHandle, deadline: &Deadline) -> Result<()> {
    let (object, tier) = (handle.object(), MemoryTier::Vram);
    object.shared.vram()?;
    loop {
        if object.len > 0 && !object.in_vram() {
            ask(&object.shared, object, Move::ToDevice, deadline).await?;
        }
        let pass = object.gate(deadline).await?;
        if object.len > 0 && !object.in_vram() {
            // It left again at once, or was written.
            drop(pass);
            if deadline.is_past() {
                return Err(deadline.error("pinning in vram"));
            }
            continue;
        }
        match charge_first(&pass, tier)? {
            Some(mut charge) => {
                if count_pin(&pass, tier, &mut charge) {
                    return Ok(());
                }
            }
            None => {
                drop(pass);
                until_unpinned(object, tier, deadline).await?;
            }
        }
    }
}

/// The charge of the first pin, if this is the first (else an empty one); none if the budget has no place for it now.
fn charge_first(pass: &GatePass, tier: MemoryTier) -> Result<Option<Option<Charge>>> {
    let object = pass.object();
    if object.pins_in(tier).load(Ordering::SeqCst) > 0 {
        return Ok(Some(None));
    }
    Ok(try_charge(object, tier)?.map(Some))
}

/// Counts one more pin under the gate. False if it needs a charge: the last pin went meanwhile, and its
/// charge with it.
fn count_pin(pass: &GatePass, tier: MemoryTier, charge: &mut Option<Charge>) -> bool {
    let object = pass.object();
    match charge.take() {
        Some(charge) if object.add_pin(tier, pass) => {
            charge.keep();
            true
        }
        Some(_) => true,
        None => object.try_add_pin(tier, pass),
    }
}

/// A charge against `max_pinned`, until it is kept.
pub(super) struct Charge {
    object: Option<Arc<Object>>,
    tier: MemoryTier,
}

impl Charge {
    /// The pins of the object have it now; the last one gives it back.
    fn keep(mut self) {
        self.object = None;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            object.shared.uncharge_pin(self.tier, object.len);
        }
    }
}

/// Charges one pin, if `max_pinned` allows it now.
///
/// # Errors
///
/// `ExceedsCapacity` if it never could; `TierNotAvailable`.
fn try_charge(object: &Arc<Object>, tier: MemoryTier) -> Result<Option<Charge>> {
    let requested_bytes = object.shared.footprint_in(tier, object.len);
    let pins = object.shared.pins(tier)?;
    if requested_bytes > pins.max() {
        let capacity_bytes = pins.max();
        return Err(VirtualMemoryError::ExceedsCapacity { tier, requested_bytes, capacity_bytes });
    }
    let charged = pins.try_charge(requested_bytes);
    Ok(charged.then(|| Charge { object: Some(object.clone()), tier }))
}

/// Charges one pin, as soon as `max_pinned` allows it.
pub(super) async fn charge_pin(
    object: &Arc<Object>,
    tier: MemoryTier,
    deadline: &Deadline,
) -> Result<Charge> {
    loop {
        if let Some(charge) = try_charge(object, tier)? {
            return Ok(charge);
        }
        until_unpinned(object, tier, deadline).await?;
    }
}

/// Waits until the budget for pins has a place for the object.
async fn until_unpinned(object: &Arc<Object>, tier: MemoryTier, deadline: &Deadline) -> Result<()> {
    let shared = &object.shared;
    // Before the look, so that a pin that goes in between is not missed.
    let unpinned = shared.pins(tier)?.gone();
    if shared.is_closed() {
        return Err(VirtualMemoryError::Closed);
    }
    if try_charge(object, tier)?.is_some() {
        return Ok(());
    }
    let late = |Late| all_pinned(shared, object, tier, deadline);
    deadline.bound(unpinned).await.map_err(late)
}

fn all_pinned(
    shared: &Shared,
    object: &Object,
    tier: MemoryTier,
    deadline: &Deadline,
) -> VirtualMemoryError {
    let (pinned_bytes, held_bytes, capacity_bytes) = match (tier, shared.vram_if_any()) {
        (MemoryTier::Vram, Some(vram)) => (vram.pins.bytes(), 0, vram.usage().capacity_bytes),
        _ => (shared.host_pinned(), shared.copies.held_bytes(), shared.host_space()),
    };
    VirtualMemoryError::AllPinned {
        tier,
        requested_bytes: shared.footprint_in(tier, object.len),
        pinned_bytes,
        leased_bytes: 0,
        held_bytes,
        capacity_bytes,
        waited: deadline.waited(),
    }
}
