//! The call that changes how much memory of a device a store has, while it serves.
//!
//! Invariant: what a step of it gives back was free while nobody waited, or was granted like the
//! space of any object, so nothing that is pinned, leased or in flight loses its memory; and each
//! step stands for itself, so a call that is dropped leaves a budget between the old one and the
//! new one. Called by users.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::futures::Notified;

use super::{Result, VirtualMemory};
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError, DeviceRange};
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::tier::{Class, Device, Need, Refused, Space};

/// What is given back or taken in one step, in bytes: other requests come between two.
const STEP_BYTES: u64 = 32 << 20;
/// A budget has this many pieces at least.
const PIECES_MIN: u64 = 2;
/// Before it is tried again to evict what could not be.
const PAUSE: Duration = Duration::from_millis(20);
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
    /// without mapped memory, `VMEM_GPU_ALLOCATIONS`. `AllPinned` or `TimedOut` if what is held,
    /// or a driver that waits, leaves no memory to give back within `wait_timeout`; each step waits
    /// by itself. `Device` if the driver refuses. What was given back by then has been.
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
        device.resized.notify_waiters();
        let step_bytes = STEP_BYTES.max(piece_bytes);
        let resize = Resize { device, piece_bytes, step_bytes, wanted };
        loop {
            self.check_open()?;
            let device = self.shared.device(number)?;
            // Before the look, so that no later call is missed.
            let changed = device.resized.notified();
            // Behind what is under way, and whatever that came to.
            let grown = resize.grow(&self.shared.deadline()).await?;
            let capacity = device.backend.usage().capacity_bytes;
            if !resize.is_last() || capacity == wanted {
                return Ok(capacity);
            }
            if capacity < wanted {
                if grown < step_bytes {
                    // There is no more.
                    return Ok(capacity);
                }
                continue;
            }
            resize.shrink(&self.shared.deadline(), capacity - wanted, changed).await?;
        }
    }
}

/// One call.
struct Resize<'a> {
    device: &'a Device,
    piece_bytes: u64,
    step_bytes: u64,
    wanted: u64,
}

impl Resize<'_> {
    /// Whether no call came after this one.
    fn is_last(&self) -> bool {
        self.device.backend.budget() == self.wanted
    }

    /// Whether nothing is left to do for it: others may have done it.
    fn is_done(&self) -> bool {
        let capacity_bytes = self.device.backend.usage().capacity_bytes;
        capacity_bytes <= self.wanted || !self.is_last()
    }

    /// Takes some more, if there is any.
    async fn grow(&self, deadline: &Deadline) -> Result<u64> {
        self.ended(deadline, self.device.backend.grow(self.step_bytes)).await
    }

    /// Gives back some of what is free, or of what is free once something was evicted, unless the
    /// budget is `changed`.
    async fn shrink(&self, deadline: &Deadline, bytes: u64, changed: Notified<'_>) -> Result<()> {
        let mut changed = pin!(changed);
        let mut step = self.step_bytes.min(bytes);
        loop {
            // What is free may be what others wait for.
            let is_wanted = self.device.state.queue.len() > 0;
            if !is_wanted && self.give_back(deadline, step, None).await? > 0 || self.is_done() {
                return Ok(());
            }
            let taken = tokio::select! {
                biased;
                taken = self.evict(step, is_wanted, deadline) => taken?,
                () = &mut changed => return Ok(()),
            };
            match taken {
                Some(range) => {
                    self.give_back(deadline, step, Some(range)).await?;
                    return Ok(());
                }
                None if step > self.piece_bytes => {
                    step = (step / 2 / self.piece_bytes).max(1) * self.piece_bytes;
                }
                None if deadline.is_past() && !self.is_done() => {
                    return Err(self.device.state.all_held(step, deadline.waited()));
                }
                None => drop(deadline.share(1, PAUSE).bound(&mut changed).await),
            }
        }
    }

    /// Memory of all of as many pages, for which what was used longest ago has left. None if there
    /// is none now: it takes the turn of no other request, and nothing leaves for less than all.
    /// Where others wait all the time, it comes to have its turn among these.
    ///
    /// # Errors
    ///
    /// `Closed`; `TierNotAvailable` if the device is lost.
    async fn evict(
        &self,
        step: u64,
        is_wanted: bool,
        deadline: &Deadline,
    ) -> Result<Option<DeviceRange>> {
        let state = &self.device.state;
        // Wherever it begins, it has all of these pages; but no more than could be evicted.
        let reach = state.space().capacity_bytes().saturating_sub(state.unevictable_bytes());
        let len = (step + self.piece_bytes - 1).min(reach.max(self.piece_bytes));
        let need = Need::one(len as usize, 0, Class::Demand);
        let has_a_turn = is_wanted && deadline.is_half_past() || crate::planted!("shrink-evicts");
        let need = if has_a_turn { need } else { need.sparing(u64::MAX) };
        match state.queue.take(&need, deadline).await {
            Ok(taken) => Ok(taken.into_iter().next()),
            Err(Refused::Error(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }

    async fn give_back(
        &self,
        deadline: &Deadline,
        bytes: u64,
        range: Option<DeviceRange>,
    ) -> Result<u64> {
        let given = self.ended(deadline, self.device.backend.shrink(bytes, range)).await;
        if given.as_ref().is_ok_and(|&given| given > 0) {
            // Others may have nothing left to wait for.
            self.device.resized.notify_waiters();
        }
        given
    }

    async fn ended(
        &self,
        deadline: &Deadline,
        answer: DeviceAnswer<std::result::Result<u64, DeviceError>>,
    ) -> Result<u64> {
        match deadline.bound(answer).await {
            Ok(ended) => ended.map_err(|error| self.device.fault(error)),
            Err(_late) => Err(deadline.error("changing the memory of a device")),
        }
    }
}
