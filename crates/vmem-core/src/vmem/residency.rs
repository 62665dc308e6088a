//! Where an object is.
//!
//! Invariant: a snapshot, taken without waiting; it may be out of date when it is read. Called by
//! users and tests.

use super::{Result, VirtualMemory};
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;

/// Where an object is, at one moment.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Device memory has a valid copy.
    pub vram: bool,
    /// Host memory has a valid copy.
    pub host: bool,
    /// The disk has a valid copy.
    pub disk: bool,
    /// Host memory has bytes that the disk does not have.
    pub dirty: bool,
    /// Pins that hold it.
    pub pins: u32,
    /// Whether a caller holds its current bytes.
    pub held: bool,
}

impl Residency {
    /// The fastest tier with a valid copy; none for an object that nobody has written yet and that
    /// has no copy anywhere.
    pub fn current_tier(&self) -> Option<MemoryTier> {
        [
            (self.vram, MemoryTier::Vram),
            (self.host, MemoryTier::Host),
            (self.disk, MemoryTier::Disk),
        ]
        .into_iter()
        .find_map(|(there, tier)| there.then_some(tier))
    }
}

impl VirtualMemory {
    /// Where the object is now. An object that nobody has written yet counts as being where
    /// room was taken for it.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`.
    pub fn residency(&self, handle: &VMemHandle) -> Result<Residency> {
        let object = self.check(handle)?;
        Ok(Residency {
            vram: object.in_vram(),
            host: object.has_host_room(),
            disk: object.len > 0 && object.disk().is_whole(object.len),
            dirty: object.is_dirty(),
            pins: object.pins() + object.vram_pins(),
            held: object.copy.readers() > 0,
        })
    }
}
