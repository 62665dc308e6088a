//! The devices above host memory, the tiers below it, and what holds objects in the tiers.
//!
//! Invariant: a device that is lost is a tier only for what still holds memory of it. Called by
//! everything that names a tier.

use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use crate::error::{VirtualMemoryError, check_capacity};
use crate::host::HostArena;
use crate::memory_tier::MemoryTier;
use crate::storage::Durable;
use crate::tier::{Device, HoldKind, Holds, Space, Storage};

impl Shared {
    /// All devices, in use or lost.
    pub(crate) fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// A device that serves.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn device(&self, number: usize) -> Result<&Device, VirtualMemoryError> {
        match self.devices.get(number) {
            Some(device) => device.lost().map_or(Ok(device), Err),
            None => {
                let reason = match self.devices.len() {
                    0 => self.no_device.clone(),
                    count => format!("the store has {count} devices").into(),
                };
                let tier = MemoryTier::of_device(u8::try_from(number).unwrap_or(u8::MAX));
                Err(VirtualMemoryError::tier_not_available(tier, reason))
            }
        }
    }

    /// The device of a tier that is the memory of one, in use or lost.
    pub(crate) fn device_of(&self, tier: MemoryTier) -> Option<&Device> {
        self.devices.get(tier.device()?)
    }

    /// The tiers below host memory, the disk first.
    pub(crate) fn storage(&self) -> &[Storage] {
        &self.storage
    }

    /// The tier below host memory that names lead to.
    pub(crate) fn durable(&self) -> &Arc<dyn Durable> {
        &self.durable
    }

    /// Which of them that is.
    pub(crate) fn durable_level(&self) -> usize {
        self.durable_level
    }

    /// Whether objects leave this one of the tiers below host memory, for the next.
    pub(crate) fn evicts_from(&self, level: usize) -> bool {
        level + 1 < self.storage.len()
    }

    /// The tier of this name that is below host memory.
    pub(crate) fn storage_of(&self, tier: MemoryTier) -> Option<&Storage> {
        self.storage.get(tier.level()?)
    }

    /// Whether the store has this tier.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn check_tier(&self, tier: MemoryTier) -> Result<(), VirtualMemoryError> {
        if let Some(device) = tier.device() {
            return self.device(device).map(drop);
        }
        if tier.level().is_some_and(|level| level >= self.storage.len()) {
            let reason = "the store has no tier below the disk".into();
            return Err(VirtualMemoryError::TierNotAvailable { tier, reason });
        }
        Ok(())
    }

    // ---- Holds -------------------------------------------------------------------------------

    /// What holds a tier that can be held.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn holds(&self, tier: MemoryTier) -> Result<&Holds, VirtualMemoryError> {
        if let Some(storage) = self.storage_of(tier) {
            return Ok(&storage.state.holds);
        }
        match tier.device() {
            Some(device) => Ok(&self.device(device)?.state.holds),
            None => Ok(&self.host.holds),
        }
    }

    /// Whether holds could ever keep this many bytes of footprint in this tier.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity`; `TierNotAvailable`.
    pub(crate) fn check_fits_holds(
        &self,
        tier: MemoryTier,
        requested_bytes: u64,
    ) -> Result<(), VirtualMemoryError> {
        check_capacity(tier, requested_bytes, self.holds(tier)?.max())
    }

    /// Charges holds, if the budget has a place for this many bytes of footprint now.
    ///
    /// # Errors
    ///
    /// Those of [`check_fits_holds`](Self::check_fits_holds).
    pub(crate) fn try_charge(
        &self,
        tier: MemoryTier,
        hold: HoldKind,
        footprint: u64,
    ) -> Result<bool, VirtualMemoryError> {
        self.check_fits_holds(tier, footprint)?;
        Ok(self.holds(tier)?.try_charge(hold, footprint))
    }

    /// What an object of `len` bytes takes of this tier, in bytes.
    pub(crate) fn footprint_in(&self, tier: MemoryTier, len: usize) -> u64 {
        if len == 0 {
            // It has no memory anywhere.
            return 0;
        }
        if let Some(storage) = self.storage_of(tier) {
            return storage.state.space().footprint(len);
        }
        let footprint = match self.device_of(tier) {
            Some(device) => device.backend.footprint(len),
            None => HostArena::footprint(len),
        };
        assert!(footprint >= len as u64, "{len} bytes take {footprint} in {tier}");
        footprint
    }

    /// Gives back what was charged for holds, in bytes of footprint.
    pub(crate) fn uncharge(&self, tier: MemoryTier, hold: HoldKind, footprint: u64) {
        self.holds_of(tier).uncharge(hold, footprint);
        self.space_was_freed();
    }

    /// What is held in this tier, which the store has, lost or not.
    pub(crate) fn holds_of(&self, tier: MemoryTier) -> &Holds {
        let above = || self.device_of(tier).map_or(&self.host.holds, |device| &device.state.holds);
        self.storage_of(tier).map_or_else(above, |storage| &storage.state.holds)
    }

    /// Why an object cannot be held in this tier, at the deadline of its caller.
    pub(crate) fn all_held(
        &self,
        tier: MemoryTier,
        requested_bytes: u64,
        waited: Duration,
    ) -> VirtualMemoryError {
        let error = if let Some(Storage { state, .. }) = self.storage_of(tier) {
            state.all_held(requested_bytes, waited)
        } else if let Some(Device { state, .. }) = self.device_of(tier) {
            state.all_held(requested_bytes, waited)
        } else {
            self.host.all_held(requested_bytes, waited)
        };
        self.notices(tier).refusal(&error);
        error
    }
}
