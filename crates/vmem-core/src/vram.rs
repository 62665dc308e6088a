//! The VRAM tier as core sees it: who is in it, who leaves it, and who waits for it.
//!
//! Invariant: what is in device memory has its bytes in host memory or on disk too. So making room costs
//! nothing but the room: a copy is dropped, by its gate, and never written; and it needs no
//! working ahead: whoever wants room makes it. Called by the migrations to and from VRAM.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::device::{DeviceBackend, DeviceRange, DeviceUsage};
use crate::error::VirtualMemoryError;
use crate::host_queue::Class;
use crate::object::{GatePass, VramUse};
use crate::pins::PinBudget;
use crate::policy::{Entry, Pass, Pick, Policy, Probe, Token};
use crate::shared::Shared;
use crate::stats::add;
use crate::tier::MemoryTier;

/// Looks at the policy for one victim.
const LOOKS_MAX: usize = 4096;

/// The device, and the order in which objects leave it.
pub(crate) struct Vram {
    pub(crate) backend: Arc<dyn DeviceBackend>,
    pub(crate) pins: PinBudget,
    policy: Mutex<Box<dyn Policy>>,
    bell: Arc<Bell>,
    /// Those who wait for room, first come first served.
    turn: tokio::sync::Mutex<()>,
}

/// Rung when something may have become free.
#[derive(Debug, Default)]
struct Bell {
    waiting: AtomicUsize,
    freed: Notify,
}

impl Bell {
    fn ring(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_waiters();
        }
    }
}

/// Counts one who waits.
struct Waiting<'a>(&'a Bell);

impl<'a> Waiting<'a> {
    fn on(bell: &'a Bell) -> Self {
        bell.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(bell)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request for device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) len: usize,
    pub(crate) class: Class,
    pub(crate) asked: Instant,
    pub(crate) deadline: Instant,
}

impl Vram {
    pub(crate) fn new(
        backend: Arc<dyn DeviceBackend>,
        policy: Box<dyn Policy>,
        max_pinned: f64,
    ) -> Self {
        let bell = Arc::new(Bell::default());
        let freed = bell.clone();
        backend.set_freed_hook(Box::new(move || freed.ring()));
        let pins = PinBudget::new((backend.usage().capacity_bytes as f64 * max_pinned) as u64);
        let (policy, turn) = (Mutex::new(policy), tokio::sync::Mutex::const_new(()));
        Vram { backend, pins, policy, bell, turn }
    }

    pub(crate) fn usage(&self) -> DeviceUsage {
        self.backend.usage()
    }

    /// Those who wait for room.
    pub(crate) fn waiters(&self) -> usize {
        self.bell.waiting.load(Ordering::SeqCst)
    }

    /// Something may have become free.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Device memory for an object, as soon as there is some.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` at once; `AllPinned` or `TimedOut` at the deadline; `TierNotAvailable` if the device
    /// is lost, `Closed`.
    pub(crate) async fn room(
        &self,
        shared: &Shared,
        wanted: Wanted,
    ) -> Result<DeviceRange, VirtualMemoryError> {
        let footprint = self.backend.footprint(wanted.len);
        let capacity_bytes = self.usage().capacity_bytes;
        if footprint > capacity_bytes {
            let (tier, requested_bytes) = (MemoryTier::Vram, footprint);
            return Err(VirtualMemoryError::ExceedsCapacity {
                tier,
                requested_bytes,
                capacity_bytes,
            });
        }
        // What is ahead of need stands behind whoever waits.
        let _turn = match wanted.class {
            Class::Demand => {
                match tokio::time::timeout_at(wanted.deadline, self.turn.lock()).await {
                    Ok(turn) => Some(turn),
                    Err(_) => return Err(self.late(footprint, wanted.asked)),
                }
            }
            Class::Prefetch => None,
        };
        let _waiting = Waiting::on(&self.bell);
        // What was used after a prefetch was asked for does not make way for it.
        let colder_than = match wanted.class {
            Class::Demand => u64::MAX,
            Class::Prefetch => {
                shared.now().saturating_sub(wanted.asked.elapsed().as_nanos() as u64)
            }
        };
        loop {
            let freed = self.bell.freed.notified();
            tokio::pin!(freed);
            // Before the look, so that what is freed in between is not missed.
            freed.as_mut().enable();
            if shared.is_closed() {
                return Err(VirtualMemoryError::Closed);
            }
            if let Some(reason) = self.backend.lost() {
                return Err(VirtualMemoryError::TierNotAvailable {
                    tier: MemoryTier::Vram,
                    reason,
                });
            }
            let first = wanted.class == Class::Demand || self.turn.try_lock().is_ok();
            if first && let Some(range) = self.try_room(shared, wanted.len, colder_than) {
                return Ok(range);
            }
            if tokio::time::timeout_at(wanted.deadline, freed).await.is_err() {
                return Err(self.late(footprint, wanted.asked));
            }
        }
    }

    /// Device memory if there is some now, or what nobody uses, and nobody has used since, can make way for it.
    pub(crate) fn try_room(
        &self,
        shared: &Shared,
        len: usize,
        colder_than: u64,
    ) -> Option<DeviceRange> {
        loop {
            if let Some(range) = self.backend.reserve(len) {
                return Some(range);
            }
            if !self.evict(shared, colder_than) {
                return None;
            }
        }
    }

    /// The object's device memory, once nobody else uses it: its holder may write to it.
    ///
    /// # Errors
    ///
    /// `AllPinned` or `TimedOut` at the deadline, `Closed`.
    pub(crate) async fn until_idle(
        &self,
        pass: &GatePass,
        asked: Instant,
        deadline: Instant,
    ) -> Result<VramUse, VirtualMemoryError> {
        let object = pass.object();
        let _waiting = Waiting::on(&self.bell);
        loop {
            let freed = self.bell.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if object.shared.is_closed() {
                return Err(VirtualMemoryError::Closed);
            }
            if let Some(range) = object.claim_vram(pass) {
                return Ok(range);
            }
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                return Err(self.late(self.backend.footprint(object.len), asked));
            }
        }
    }

    fn late(&self, requested_bytes: u64, asked: Instant) -> VirtualMemoryError {
        let (usage, pinned_bytes) = (self.usage(), self.pins.bytes());
        let waited = asked.elapsed();
        if pinned_bytes == 0 {
            return VirtualMemoryError::TimedOut { operation: "making room in vram", waited };
        }
        VirtualMemoryError::AllPinned {
            tier: MemoryTier::Vram,
            requested_bytes,
            pinned_bytes,
            leased_bytes: 0,
            held_bytes: 0,
            capacity_bytes: usage.capacity_bytes,
            waited,
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

    /// Drops the copy that is needed least, if it was not used since. False if none can go.
    fn evict(&self, shared: &Shared, colder_than: u64) -> bool {
        let mut pass = Pass::default();
        for _ in 0..LOOKS_MAX {
            let pick = self.policy.lock().victim(&mut pass, &mut |id| probe(shared, id));
            let id = match pick {
                Pick::Victim { id, .. } => id,
                Pick::Retry => continue,
                Pick::Empty => return false,
            };
            let Some(object) = shared.find(id) else { continue };
            if object.stamp() >= colder_than {
                // So was the rest.
                return false;
            }
            if object.try_gate().is_some_and(|pass| object.leave_vram(&pass)) {
                add(&shared.counters.evictions, 1);
                add(&shared.counters.clean_drops, 1);
                return true;
            }
        }
        false
    }
}

/// How an object stands in VRAM, for the policy.
fn probe(shared: &Shared, id: u64) -> Probe {
    let Some(object) = shared.find(id) else { return Probe::Gone };
    if object.vram_pins() > 0 {
        Probe::Pinned
    } else if object.is_used_in_vram() || object.is_changing() {
        Probe::Busy { stamp: shared.now() }
    } else {
        Probe::Evictable { stamp: object.stamp(), touches: object.take_touches() }
    }
}

impl std::fmt::Debug for Vram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vram").field("backend", &self.backend).finish_non_exhaustive()
    }
}
