//! The call that changes how much memory of a device a store has, while it serves.
//!
//! Invariant: what a step of it gives back was granted like the space of any object, so nothing
//! that is pinned, leased or in flight loses its memory; and each step stands for itself, so a call
//! that is dropped leaves a budget between the old one and the new one. Called by users.

use super::{Result, VirtualMemory};
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::tier::{Class, Device, Need, Space};

/// What is evicted for one step, in bytes: other requests come between two.
const STEP_BYTES: u64 = 32 << 20;
/// A budget has this many pieces at least.
const PIECES_MIN: u64 = 2;
const FIELD: &str = "vram_capacity";

impl VirtualMemory {
    /// Changes how much memory of a device this store uses, in bytes, rounded down to the pages of
    /// the device (2 MiB mostly), in favour of others that use the device, or at their cost.
    /// Returns what the budget is then.
    ///
    /// A budget that shrinks gives memory back to the device, first what is free, then that of
    /// objects that were used longest ago, which are evicted as for a promotion, some at a time. A
    /// budget that grows takes what the device has: that may be less than was asked for. Pins and
    /// leases may hold the same part of it as before ([`max_pinned`]).
    ///
    /// The last of several calls counts, and the others return what the budget is when they notice.
    /// One that is dropped stops between two steps.
    ///
    /// ```no_run
    /// # use vmem::{MemoryTier, VirtualMemory, VirtualMemoryError};
    /// # async fn example(vmem: VirtualMemory) -> Result<(), VirtualMemoryError> {
    /// // A training job needs the device for a while.
    /// let before = vmem.stats().vram.capacity_bytes;
    /// vmem.set_vram_capacity(MemoryTier::Vram, 8 << 30).await?;
    /// // ... and has ended.
    /// let now = vmem.set_vram_capacity(MemoryTier::Vram, before).await?;
    /// assert!(now <= before);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` if the tier is no device of this store; `InvalidConfig` for less than two
    /// pages, and where the memory of the device is one block: a budget below 32 MiB, a driver
    /// without mapped memory, `VMEM_GPU_ALLOCATIONS`. `AllPinned` or `TimedOut` if what is held
    /// leaves no memory to give back within `wait_timeout`, and `Device` if the driver refuses:
    /// what was given back by then has been.
    ///
    /// [`max_pinned`]: crate::VirtualMemoryConfigBuilder::max_pinned
    pub async fn set_vram_capacity(&self, tier: MemoryTier, bytes: u64) -> Result<u64> {
        self.check_open()?;
        let number = tier.device().ok_or_else(|| {
            VirtualMemoryError::tier_not_available(tier, "it is no memory of a device")
        })?;
        let device = self.shared.device(number)?;
        let Some(piece_bytes) = device.backend.resizes_by() else {
            let reason = "the memory of this device is one block, which stays as it is";
            return Err(VirtualMemoryError::invalid_config(FIELD, reason));
        };
        let wanted = bytes / piece_bytes * piece_bytes;
        if wanted < PIECES_MIN * piece_bytes {
            let least = PIECES_MIN * piece_bytes;
            let reason = format!("at least {least} bytes, not {bytes}");
            return Err(VirtualMemoryError::invalid_config(FIELD, reason));
        }
        device.backend.set_budget(wanted);
        let resize = Resize { device, piece_bytes };
        loop {
            self.check_open()?;
            let device = self.shared.device(number)?;
            let capacity = device.backend.usage().capacity_bytes;
            let is_last = || device.backend.budget() == wanted;
            if capacity == wanted || !is_last() {
                return Ok(capacity);
            }
            let deadline = self.shared.deadline();
            let step = match capacity < wanted {
                true => resize.grow(&deadline).await,
                false => resize.shrink(&deadline, capacity - wanted).await,
            };
            match step {
                // A later call may have made it so small that this step could not be.
                Err(error) if is_last() => return Err(error),
                // There is no more.
                Ok(bytes) if bytes < wanted.saturating_sub(capacity).max(1) => {
                    return Ok(device.backend.usage().capacity_bytes);
                }
                _ => {}
            }
        }
    }
}

/// One call.
struct Resize<'a> {
    device: &'a Device,
    piece_bytes: u64,
}

impl Resize<'_> {
    async fn grow(&self, deadline: &Deadline) -> Result<u64> {
        self.ended(deadline, self.device.backend.grow()).await
    }

    /// Gives back what is free, or what is free once something was evicted.
    async fn shrink(&self, deadline: &Deadline, bytes: u64) -> Result<u64> {
        let given = self.give_back(deadline, bytes, None).await?;
        if given > 0 {
            return Ok(given);
        }
        let step = self.step_bytes().min(bytes);
        // Wherever it begins, it has all of as many pieces.
        let len = step + self.piece_bytes - 1;
        let need = Need::one(len as usize, 0, Class::Demand);
        let range = self.device.state.take(&need, deadline).await?.into_iter().next();
        self.give_back(deadline, step, range).await
    }

    /// How much is evicted at once: no more than half of what could be.
    fn step_bytes(&self) -> u64 {
        let state = &self.device.state;
        let reach = state.space().capacity_bytes().saturating_sub(state.unevictable_bytes());
        let pieces = STEP_BYTES.min(reach / 2) / self.piece_bytes;
        pieces.max(1) * self.piece_bytes
    }

    async fn give_back(
        &self,
        deadline: &Deadline,
        bytes: u64,
        range: Option<DeviceRange>,
    ) -> Result<u64> {
        self.ended(deadline, self.device.backend.shrink(bytes, range)).await
    }

    async fn ended(
        &self,
        deadline: &Deadline,
        answer: DeviceAnswer<std::result::Result<u64, DeviceError>>,
    ) -> Result<u64> {
        let ended = deadline.bound(answer).await;
        self.device.resized();
        match ended {
            Ok(ended) => ended.map_err(|error| self.device.fault(error)),
            Err(_late) => Err(deadline.error("changing the memory of a device")),
        }
    }
}
