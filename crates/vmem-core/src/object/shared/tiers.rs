//! The devices above host memory, and what holds objects in the tiers.
//!
//! Invariant: a device that is lost is a tier only for what still holds memory of it. Called by
//! everything that names a tier.

use std::time::Duration;

use super::Shared;
use crate::error::VirtualMemoryError;
use crate::host::HostArena;
use crate::memory_tier::MemoryTier;
use crate::tier::{Device, Hold, Holds};

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
                Err(VirtualMemoryError::TierNotAvailable { tier, reason })
            }
        }
    }

    /// The device of a tier that is the memory of one, in use or lost.
    pub(super) fn device_of(&self, tier: MemoryTier) -> Option<&Device> {
        self.devices.get(tier.device()?)
    }

    /// Whether the store has this tier.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn check_tier(&self, tier: MemoryTier) -> Result<(), VirtualMemoryError> {
        tier.device().map_or(Ok(()), |device| self.device(device).map(drop))
    }

    // ---- Holds -------------------------------------------------------------------------------

    /// What holds a tier that can be held.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` with the reason.
    pub(crate) fn holds(&self, tier: MemoryTier) -> Result<&Holds, VirtualMemoryError> {
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
        let capacity_bytes = self.holds(tier)?.max();
        if requested_bytes <= capacity_bytes {
            return Ok(());
        }
        Err(VirtualMemoryError::ExceedsCapacity { tier, requested_bytes, capacity_bytes })
    }

    /// Charges holds, if the budget has a place for this many bytes of footprint now.
    ///
    /// # Errors
    ///
    /// Those of [`check_fits_holds`](Self::check_fits_holds).
    pub(crate) fn try_charge(
        &self,
        tier: MemoryTier,
        hold: Hold,
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
        match self.device_of(tier) {
            Some(device) => device.backend.footprint(len),
            None => HostArena::footprint(len),
        }
    }

    /// Gives back what was charged for holds, in bytes of footprint.
    pub(crate) fn uncharge(&self, tier: MemoryTier, hold: Hold, footprint: u64) {
        self.device_of(tier)
            .map_or(&self.host.holds, |device| &device.state.holds)
            .uncharge(hold, footprint);
        self.space_was_freed();
    }

    /// Why an object cannot be held in this tier.
    pub(crate) fn all_held(
        &self,
        tier: MemoryTier,
        requested_bytes: u64,
        waited: Duration,
    ) -> VirtualMemoryError {
        match self.device_of(tier) {
            Some(device) => device.state.all_held(requested_bytes, waited),
            None => self.host.all_held(requested_bytes, waited),
        }
    }
}
