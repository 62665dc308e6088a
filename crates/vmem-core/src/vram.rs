//! The VRAM tier as core sees it: who is in it, who leaves it, and who waits for it.
//!
//! Invariant: what is in device memory has its bytes in host memory or on disk too. So making space costs
//! nothing but the space: a copy is dropped, by its gate, and never written; and it needs no
//! working ahead. Asked by the migrations to and from VRAM; served by the actor.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::deadline::{Deadline, Late};
use crate::device::{DeviceBackend, DeviceRange, DeviceUsage, ShareWatcher};
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
use crate::object::GatePass;
use crate::parcel::Unclaimed;
use crate::pins::PinBudget;
use crate::policy::{Entry, Policy, Token};
use crate::tier::{Class, DeviceSpace, Need, Queue, Refused};
use crate::wake::Wake;

/// The device, and the order in which objects leave it.
pub(crate) struct Vram {
    pub(crate) backend: Arc<dyn DeviceBackend>,
    pub(crate) pins: PinBudget,
    pub(crate) queue: Queue<DeviceSpace>,
    pub(crate) policy: Mutex<Box<dyn Policy>>,
    /// Rung when a share of a range was dropped, or the store has ended.
    released: Arc<Notify>,
}

impl Vram {
    pub(crate) fn new(
        backend: Arc<dyn DeviceBackend>,
        policy: Box<dyn Policy>,
        max_pinned: f64,
        wake: &Arc<Wake>,
        unclaimed: &Arc<Unclaimed>,
    ) -> Self {
        let released = Arc::new(Notify::new());
        let (ring, bell) = (released.clone(), wake.clone());
        let watcher: ShareWatcher = Arc::new(move || {
            ring.notify_waiters();
            bell.if_waiting();
        });
        let freed = watcher.clone();
        backend.set_freed_hook(Box::new(move || freed()));
        let capacity_bytes = backend.usage().capacity_bytes;
        let pins = PinBudget::new((capacity_bytes as f64 * max_pinned) as u64);
        let space = DeviceSpace::new(backend.clone(), watcher);
        let queue = Queue::new(space, capacity_bytes, wake.clone(), unclaimed.clone());
        Vram { backend, pins, queue, policy: Mutex::new(policy), released }
    }

    pub(crate) fn usage(&self) -> DeviceUsage {
        self.backend.usage()
    }

    /// Something may have become idle.
    pub(crate) fn ring(&self) {
        self.released.notify_waiters();
    }

    /// Device memory for an object, as soon as there is some.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` at once; `AllPinned` or `TimedOut` at the deadline; `TierNotAvailable` if the device
    /// is lost, `Closed`.
    pub(crate) async fn room(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<DeviceRange, VirtualMemoryError> {
        let requested_bytes = self.queue.footprint(need);
        let capacity_bytes = self.usage().capacity_bytes;
        if requested_bytes > capacity_bytes {
            let tier = MemoryTier::Vram;
            return Err(VirtualMemoryError::ExceedsCapacity {
                tier,
                requested_bytes,
                capacity_bytes,
            });
        }
        match self.queue.take(need, deadline).await {
            Ok(mut grant) => Ok(grant.pop().expect("invariant: a grant has space for each object")),
            Err(Refused::Error(error)) => Err(error),
            Err(Refused::Spill | Refused::Deadline(_)) => Err(self.late(requested_bytes, deadline)),
        }
    }

    /// Device memory for an object if there is some, or what nobody uses can make way for it now.
    pub(crate) async fn room_now(
        &self,
        object: (usize, u64),
        deadline: &Deadline,
    ) -> Option<DeviceRange> {
        let need = Need::one(object.0, object.1, Class::Demand).or_spill();
        if self.queue.footprint(&need) > self.usage().capacity_bytes {
            return None;
        }
        self.queue.take(&need, deadline).await.ok()?.pop()
    }

    /// The object's device memory, once nobody else uses it: its holder may write to it.
    ///
    /// # Errors
    ///
    /// `AllPinned` or `TimedOut` at the deadline, `Closed`.
    pub(crate) async fn until_idle(
        &self,
        pass: &GatePass,
        deadline: &Deadline,
    ) -> Result<DeviceRange, VirtualMemoryError> {
        let object = pass.object();
        loop {
            // Before the look, so that no drop in between is missed.
            let released = self.released.notified();
            if object.shared.is_closed() {
                return Err(VirtualMemoryError::Closed);
            }
            if let Some(range) = object.claim_vram(pass) {
                return Ok(range);
            }
            if let Err(Late) = deadline.bound(released).await {
                return Err(self.late(self.backend.footprint(object.len), deadline));
            }
        }
    }

    fn late(&self, requested_bytes: u64, deadline: &Deadline) -> VirtualMemoryError {
        let (usage, pinned_bytes) = (self.usage(), self.pins.bytes());
        if pinned_bytes == 0 {
            return deadline.error("making room in vram");
        }
        VirtualMemoryError::AllPinned {
            tier: MemoryTier::Vram,
            requested_bytes,
            pinned_bytes,
            leased_bytes: 0,
            held_bytes: 0,
            capacity_bytes: usage.capacity_bytes,
            waited: deadline.waited(),
        }
    }

    // ---- The order of eviction ---------------------------------------------------------------

    pub(crate) fn enter(&self, id: u64, stamp: u64, footprint: u64) -> Token {
        self.policy.lock().insert(Entry::new(id, stamp, footprint))
    }

    pub(crate) fn leave(&self, token: Token) {
        self.policy.lock().remove(token);
    }

    /// The policy asks about this object again; `token` is called under its lock.
    pub(crate) fn unpark(&self, token: impl FnOnce() -> Option<Token>) {
        let mut policy = self.policy.lock();
        if let Some(token) = token() {
            policy.unpark(token);
        }
    }

    /// What those who wait get from a device that is lost.
    pub(crate) fn lost(&self) -> Option<VirtualMemoryError> {
        let reason = self.backend.lost()?;
        Some(VirtualMemoryError::TierNotAvailable { tier: MemoryTier::Vram, reason })
    }
}

impl std::fmt::Debug for Vram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vram").field("backend", &self.backend).finish_non_exhaustive()
    }
}
