//! Where an object is.
//!
//! Invariant: a snapshot, taken without waiting; it may be out of date when it is read. Called by
//! users and tests.

use super::{Result, VirtualMemory};
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::tier::Storage;

/// Where an object is, at one moment.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Memory of the first device has a valid copy; see [`is_in`](Self::is_in) for the others.
    pub vram: bool,
    /// Host memory has a valid copy.
    pub host: bool,
    /// The disk has a valid copy.
    pub disk: bool,
    /// The tier below the disk has a valid copy.
    pub remote: bool,
    /// Host memory has bytes that no tier below it has, or a device bytes that no other tier has.
    pub dirty: bool,
    /// Pins and leases that hold it, in all tiers.
    pub pins: u32,
    /// Whether a caller holds its current bytes.
    pub held: bool,
    /// The devices that have a valid copy, one bit each.
    devices: u32,
}

impl Residency {
    /// The fastest tier with a valid copy; `None` for an object that was never written and has no
    /// copy anywhere, and for one of which each tier has a part only.
    pub fn current_tier(&self) -> Option<MemoryTier> {
        if self.devices != 0 {
            return Some(MemoryTier::of_device(self.devices.trailing_zeros() as u8));
        }
        let tiers = [MemoryTier::Host, MemoryTier::Disk, MemoryTier::Remote];
        tiers.into_iter().find(|&tier| self.is_in(tier))
    }

    /// Whether this tier has a valid copy.
    pub fn is_in(&self, tier: MemoryTier) -> bool {
        match tier {
            MemoryTier::Vram => self.vram,
            MemoryTier::OtherVram(device) => self.devices & (1 << (device.get() % 32)) != 0,
            MemoryTier::Host => self.host,
            MemoryTier::Disk => self.disk,
            MemoryTier::Remote => self.remote,
        }
    }
}

impl VirtualMemory {
    /// Where the object is now. An object that was never written counts as being where space was
    /// taken for it.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`.
    pub fn residency(&self, handle: &VMemHandle) -> Result<Residency> {
        let object = self.check(handle)?;
        let shared = &self.shared;
        let below = |tier: &Storage| object.holds_in(tier.tier());
        let mut devices = 0;
        let mut holds = object.pins() + shared.storage().iter().map(below).sum::<u32>();
        for (number, device) in self.shared.devices().iter().enumerate() {
            devices |= u32::from(object.is_on(number)) << number;
            holds += object.holds_in(device.tier());
        }
        Ok(Residency {
            vram: devices & 1 != 0,
            devices,
            host: object.copy.is_some() || object.has_spare(),
            disk: object.len > 0 && object.is_stored_in(0),
            remote: object.len > 0 && shared.evicts_from(0) && object.is_stored_in(1),
            dirty: object.is_dirty() || object.is_dirty_on_device(),
            pins: holds,
            held: object.copy.readers() > 0,
        })
    }
}
