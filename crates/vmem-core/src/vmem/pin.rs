//! Pins and leases, which keep objects from being demoted.
//!
//! Invariant: the first hold of an object in a tier is charged against the tier's budget for holds,
//! for as long as there is any; a hold is counted under the object's gate, so that no eviction is
//! half way when it is granted. A request that waits, for space or for the budget, holds nothing. A
//! task charges and counts, the caller gets the guard. Called by `place.rs` and the leases.

use std::sync::Arc;

use super::Result;
use super::place::ask;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::memory_tier::{MemoryTier, Position};
use crate::migrate::{Job, Move, fetch_into};
use crate::object::{GatePass, Object, Shared};
use crate::tier::{Class, HoldKind, Need};

/// Keeps an object in its tier; dropping it unpins. It holds a handle, so a pinned object is
/// alive unless it is freed.
#[must_use = "dropping the guard unpins"]
#[derive(Debug)]
pub struct PinGuard {
    /// None where there is nothing to keep the object from.
    _held: Option<HoldGuard>,
    _handle: VMemHandle,
}

impl PinGuard {
    /// A guard that keeps nothing, since there is nothing to keep it from.
    pub(super) fn of_nothing(handle: &VMemHandle) -> Self {
        PinGuard { _held: None, _handle: handle.clone() }
    }

    pub(super) fn of(handle: &VMemHandle, held: HoldGuard) -> Self {
        PinGuard { _held: Some(held), _handle: handle.clone() }
    }
}

/// One hold of an object in a tier, counted until this is dropped.
#[derive(Debug)]
pub(super) struct HoldGuard {
    object: Arc<Object>,
    tier: MemoryTier,
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        self.object.remove_hold(self.tier);
    }
}

impl HoldGuard {
    /// Counts one more hold under the gate; none if the budget has no place for it now.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` if it never could; `TierNotAvailable`.
    pub(super) fn try_count(
        pass: &GatePass,
        tier: MemoryTier,
        hold: HoldKind,
    ) -> Result<Option<Self>> {
        let object = pass.object();
        if !object.try_add_hold(tier, pass) {
            let footprint = object.shared.footprint_in(tier, object.len);
            if !object.shared.try_charge(tier, hold, footprint)? {
                return Ok(None);
            }
            HoldGuard::count_first(pass, tier, hold);
        }
        Ok(Some(HoldGuard { object: object.clone(), tier }))
    }

    /// Counts the hold that was charged. Holds are added under the gate alone, so it is the first
    /// still.
    fn count_first(pass: &GatePass, tier: MemoryTier, hold: HoldKind) {
        let is_first = pass.object().add_hold(tier, hold, pass);
        assert!(is_first, "a hold was added without the gate");
    }

    /// As [`try_count`](Self::try_count), paid for by what was charged before.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn count_prepaid(pass: &GatePass, prepaid: &mut Prepaid) -> Result<Option<Self>> {
        let tier = prepaid.tier;
        let hold = prepaid.hold;
        let object = pass.object();
        if object.try_add_hold(tier, pass) {
            return Ok(Some(HoldGuard { object: object.clone(), tier }));
        }
        let footprint = object.shared.footprint_in(tier, object.len);
        if prepaid.bytes < footprint {
            // It had a hold when the charge was computed.
            return HoldGuard::try_count(pass, tier, hold);
        }
        prepaid.bytes -= footprint;
        HoldGuard::count_first(pass, tier, hold);
        Ok(Some(HoldGuard { object: object.clone(), tier }))
    }

    /// One more hold of an object that has one there, which was counted already.
    pub(super) fn counted(object: &Arc<Object>, tier: MemoryTier) -> Self {
        HoldGuard { object: object.clone(), tier }
    }

    /// A hold of an object that is where it is to be kept, if nothing has to be waited for.
    pub(super) fn now(
        handle: &VMemHandle,
        tier: MemoryTier,
        hold: HoldKind,
    ) -> Result<Option<Self>> {
        let object = handle.object();
        let Some(pass) = object.gate_if_open()? else { return Ok(None) };
        if !is_in(object, tier) {
            return Ok(None);
        }
        HoldGuard::try_count(&pass, tier, hold)
    }

    /// Promotes an object and holds it; for a task.
    ///
    /// # Errors
    ///
    /// Those of promoting it; `AllPinned`, `ExceedsCapacity`.
    pub(super) async fn take(
        object: &Arc<Object>,
        tier: MemoryTier,
        hold: HoldKind,
        deadline: &Deadline,
    ) -> Result<Self> {
        match tier.position() {
            Position::Device(device) => {
                object.shared.device(device)?;
                hold_by(object, tier, Move::ToDevice(device), hold, deadline).await
            }
            Position::Host => pin_in_host(object, deadline).await,
            Position::Below(level) => {
                hold_by(object, tier, Move::PromoteTo(level), hold, deadline).await
            }
        }
    }
}

/// What several holds will be charged, charged at once: so that no two sets have half of the budget
/// each.
pub(super) struct Prepaid {
    shared: Arc<Shared>,
    tier: MemoryTier,
    hold: HoldKind,
    /// What no hold has taken yet.
    bytes: u64,
}

impl Prepaid {
    /// For those of these objects that nothing holds yet; how much is missing if the budget has no
    /// place for that now.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` if it never could; `TierNotAvailable`.
    pub(super) fn try_charge(
        shared: &Arc<Shared>,
        tier: MemoryTier,
        hold: HoldKind,
        objects: &[Arc<Object>],
    ) -> Result<std::result::Result<Self, u64>> {
        let unheld = objects.iter().filter(|object| object.holds_in(tier) == 0);
        let bytes = unheld.map(|object| shared.footprint_in(tier, object.len)).sum();
        if !shared.try_charge(tier, hold, bytes)? {
            return Ok(Err(bytes));
        }
        Ok(Ok(Prepaid { shared: shared.clone(), tier, hold, bytes }))
    }
}

impl Drop for Prepaid {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.shared.uncharge(self.tier, self.hold, self.bytes);
        }
    }
}

/// Promotes an object and pins it; for a task.
pub(super) async fn pin(
    handle: VMemHandle,
    tier: MemoryTier,
    deadline: Deadline,
) -> Result<PinGuard> {
    let held = HoldGuard::take(handle.object(), tier, HoldKind::Pin, &deadline).await?;
    Ok(PinGuard::of(&handle, held))
}

async fn pin_in_host(object: &Arc<Object>, deadline: &Deadline) -> Result<HoldGuard> {
    let tier = MemoryTier::Host;
    let job = Job::new(object.clone(), MigrationCause::Promote, *deadline);
    loop {
        // Before the gate, and without a charge: a request that waits for space holds none.
        let mut space = None;
        if object.len > 0 && !object.has_host_space() {
            let need = Need::one(object.len, object.id, Class::Demand);
            space = Some(object.shared.host_space_or_error(&need, deadline).await?);
        }
        let pass = object.gate(deadline).await?;
        if object.len > 0 && space.is_none() && !object.has_host_space() {
            continue;
        }
        let one = std::slice::from_ref(object);
        let mut prepaid = match Prepaid::try_charge(&object.shared, tier, HoldKind::Pin, one)? {
            Ok(prepaid) => prepaid,
            Err(footprint) => {
                drop((space, pass));
                until_unheld(&object.shared, tier, footprint, deadline).await?;
                continue;
            }
        };
        if object.len > 0 {
            drop(fetch_into(&job, &pass, space).await?);
        }
        // Counted last, so that a pinned object is resident.
        if let Some(held) = HoldGuard::count_prepaid(&pass, &mut prepaid)? {
            return Ok(held);
        }
    }
}

/// Whether an object is where a hold in this tier keeps it.
fn is_in(object: &Object, tier: MemoryTier) -> bool {
    object.len == 0
        || match tier.position() {
            Position::Device(device) => object.is_on(device),
            Position::Host => object.copy.is_some(),
            // Or in a faster one.
            Position::Below(level) => !object.is_below(level),
        }
}

/// Moves an object to the tier by this request, and holds it there.
async fn hold_by(
    object: &Arc<Object>,
    tier: MemoryTier,
    promote: Move,
    hold: HoldKind,
    deadline: &Deadline,
) -> Result<HoldGuard> {
    loop {
        if !is_in(object, tier) {
            ask(&object.shared, object, promote, deadline).await?;
        }
        let pass = object.gate(deadline).await?;
        if !is_in(object, tier) {
            // It left again at once, or was written.
            drop(pass);
            if deadline.is_past() {
                return Err(deadline.error("holding an object"));
            }
            continue;
        }
        match HoldGuard::try_count(&pass, tier, hold)? {
            Some(held) => return Ok(held),
            None => {
                drop(pass);
                let footprint = object.shared.footprint_in(tier, object.len);
                until_unheld(&object.shared, tier, footprint, deadline).await?;
            }
        }
    }
}

/// Waits until the budget for holds has a place for this many bytes of footprint.
pub(super) async fn until_unheld(
    shared: &Shared,
    tier: MemoryTier,
    footprint: u64,
    deadline: &Deadline,
) -> Result<()> {
    let holds = shared.holds(tier)?;
    // Before the look, so that a hold that goes in between is not missed.
    let gone = holds.gone();
    if shared.is_closed() {
        return Err(VirtualMemoryError::Closed);
    }
    if holds.bytes().total() + footprint <= holds.max() {
        return Ok(());
    }
    let late = |Late| shared.all_held(tier, footprint, deadline.waited());
    deadline.bound(gone).await.map_err(late)
}
