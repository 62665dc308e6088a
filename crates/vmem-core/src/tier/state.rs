//! One tier with a budget: its space and the queue for it, the order of eviction, and the holds.
//!
//! Invariant: every tier that evicts is one value of this type, so what is true of waiting, of
//! holds and of the order of eviction is true of all of them. Asked by objects and migrations;
//! served by the actor.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::locks::{self, Lock};

use super::{Class, Grant, Holds, Need, Queue, Refused, Space};
use crate::deadline::Deadline;
use crate::error::{VirtualMemoryError, check_capacity};
use crate::memory_tier::MemoryTier;
use crate::notice::Notices;
use crate::policy::{Entry, Policy, Token};

/// Between which bytes of use the evictor works early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Watermarks {
    /// Early eviction ends here.
    pub(crate) low_bytes: u64,
    /// It starts there; a prefetch gets no space beyond it.
    pub(crate) high_bytes: u64,
}

impl Watermarks {
    /// Neither beyond this budget.
    pub(crate) fn within(self, capacity_bytes: u64) -> Self {
        let low_bytes = self.low_bytes.min(capacity_bytes);
        Watermarks { low_bytes, high_bytes: self.high_bytes.min(capacity_bytes) }
    }
}

/// See the module's documentation.
pub(crate) struct TierState<S: Space> {
    pub(crate) tier: MemoryTier,
    pub(crate) queue: Queue<S>,
    pub(crate) order: Lock<Box<dyn Policy>, { locks::ORDER }>,
    pub(crate) holds: Holds,
    pub(crate) marks: Watermarks,
    /// Objects with a copy, or with space set apart, in this tier.
    pub(crate) objects: AtomicU64,
    /// The evictor found nothing that it could take but what is held.
    blocked_by_holds: AtomicBool,
}

impl<S: Space> TierState<S> {
    pub(crate) fn new(
        tier: MemoryTier,
        queue: Queue<S>,
        order: Box<dyn Policy>,
        holds: Holds,
        marks: Watermarks,
    ) -> Self {
        assert!(marks.low_bytes <= marks.high_bytes, "{marks:?}");
        TierState {
            tier,
            order: Lock::new(order),
            holds,
            marks,
            objects: AtomicU64::new(0),
            blocked_by_holds: AtomicBool::new(false),
            queue,
        }
    }

    pub(crate) fn space(&self) -> &S {
        self.queue.space()
    }

    // ---- Space -------------------------------------------------------------------------------

    /// Space for each object of the request, as soon as there is some for all; for callers without
    /// an alternative.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` and `TierFull` at once; `AllPinned` or `TimedOut` at the deadline;
    /// `Closed`.
    pub(crate) async fn take(
        &self,
        need: &Need,
        deadline: &Deadline,
    ) -> Result<Grant<S>, VirtualMemoryError> {
        self.check_fits(self.queue.footprint(need))?;
        self.queue.take(need, deadline).await.map_err(|refused| {
            let error = self.refusal(need, refused);
            // The others do without: a prefetch, and what is read through staging instead.
            if need.class == Class::Demand && !need.may_spill {
                self.notices().refusal(&error);
            }
            error
        })
    }

    /// What operators learn of this tier.
    pub(crate) fn notices(&self) -> &Notices {
        self.queue.notices()
    }

    /// Whether this many bytes of footprint could ever fit.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity`.
    pub(crate) fn check_fits(&self, requested_bytes: u64) -> Result<(), VirtualMemoryError> {
        check_capacity(self.tier, requested_bytes, self.space().capacity_bytes())
    }

    /// The public form of a refusal.
    fn refusal(&self, need: &Need, refused: Refused) -> VirtualMemoryError {
        let requested_bytes = self.queue.footprint(need);
        match refused {
            Refused::Error(error) => error,
            Refused::TooLarge { capacity_bytes } => VirtualMemoryError::ExceedsCapacity {
                tier: self.tier,
                requested_bytes,
                capacity_bytes,
            },
            Refused::Deadline(waited) => self.why_no_space(requested_bytes, waited),
            Refused::Spill => self.full(requested_bytes),
        }
    }

    /// What kept a request from being served until its deadline.
    fn why_no_space(&self, requested_bytes: u64, waited: Duration) -> VirtualMemoryError {
        let reach = self.space().capacity_bytes().saturating_sub(self.unevictable_bytes());
        let is_blocked = self.blocked_by_holds.load(Ordering::SeqCst) || requested_bytes > reach;
        if is_blocked && self.unevictable_bytes() == 0 && self.tier.level().is_some() {
            // Nothing that is there leaves by itself: it has names.
            return self.full(requested_bytes);
        }
        if self.unevictable_bytes() == 0 || !is_blocked {
            let operation = match self.tier {
                MemoryTier::Host => "making space in host",
                MemoryTier::Disk | MemoryTier::Remote => "making space on disk",
                MemoryTier::Vram | MemoryTier::OtherVram(_) => "making space in vram",
            };
            return VirtualMemoryError::TimedOut { operation, waited };
        }
        self.all_held(requested_bytes, waited)
    }

    /// What holds the tier.
    pub(crate) fn all_held(&self, requested_bytes: u64, waited: Duration) -> VirtualMemoryError {
        let held = self.holds.bytes();
        VirtualMemoryError::AllPinned {
            tier: self.tier,
            requested_bytes,
            pinned_bytes: held.pinned,
            leased_bytes: held.leased,
            held_bytes: self.space().held_bytes(),
            capacity_bytes: self.space().capacity_bytes(),
            waited,
        }
    }

    /// The tier is full and nothing can leave it.
    pub(crate) fn full(&self, requested_bytes: u64) -> VirtualMemoryError {
        let used = self.space().used_bytes();
        let capacity_bytes = self.space().capacity_bytes();
        VirtualMemoryError::TierFull {
            tier: self.tier,
            requested_bytes,
            free_bytes: capacity_bytes.saturating_sub(used),
            capacity_bytes,
        }
    }

    /// What no eviction frees now, in bytes of footprint: at least so much, since what is pinned
    /// may be read too.
    pub(crate) fn unevictable_bytes(&self) -> u64 {
        let bytes = self.holds.bytes().total().max(self.space().held_bytes());
        if crate::planted!("vram-pins") { 0 } else { bytes }
    }

    /// Whether the last look for victims met nothing but what is held.
    pub(crate) fn set_blocked_by_holds(&self, is_blocked: bool) {
        self.blocked_by_holds.store(is_blocked, Ordering::SeqCst);
    }

    // ---- The order of eviction ---------------------------------------------------------------

    pub(crate) fn enter(&self, entry: Entry) -> Token {
        self.order.lock().insert(entry)
    }

    pub(crate) fn leave(&self, token: Token) {
        self.order.lock().remove(token);
    }

    /// The policy asks about an object again; `token` is called under its lock.
    pub(crate) fn unpark(&self, token: impl FnOnce() -> Option<Token>) {
        let mut order = self.order.lock();
        if let Some(token) = token() {
            order.unpark(token);
        }
    }
}

impl<S: Space> std::fmt::Debug for TierState<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TierState").field("tier", &self.tier).finish_non_exhaustive()
    }
}
