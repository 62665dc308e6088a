//! The requests that stand in a queue for space.
//!
//! Invariant: a request that does not fit is passed `PASSES_MAX` times at most, and then lets no
//! other pass for `BLOCK_MAX` at a time. Called by the queue.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::deadline::Deadline;
use crate::parcel::Delivery;
use crate::tier::need::Answer;
use crate::tier::{Class, Need, Refused, Space};

/// How often smaller requests may pass the first one that does not fit.
pub(super) const PASSES_MAX: u32 = 64;

/// How long a request that was passed so often keeps smaller ones from space that it cannot use.
pub(super) const BLOCK_MAX: Duration = Duration::from_millis(100);

pub(super) struct Waiter<S: Space> {
    pub(super) ticket: u64,
    pub(super) need: Need,
    pub(super) footprint: u64,
    pub(super) passed: u32,
    /// Since when nothing passes it.
    pub(super) blocks_since: Option<Instant>,
    pub(super) deadline: Deadline,
    pub(super) reply: Delivery<Answer<S>>,
}

impl<S: Space> Waiter<S> {
    /// Whether a smaller request may pass it now; one that does is counted with `pass`.
    pub(super) fn may_be_passed(&mut self) -> bool {
        if self.blocks_since.is_some_and(|since| since.elapsed() >= BLOCK_MAX) {
            self.passed = 0;
            self.blocks_since = None;
        }
        self.passed < PASSES_MAX
    }

    /// Why it is not served any more, where eviction can free `reach` bytes of these.
    pub(super) fn refusal(&self, reach: u64, capacity_bytes: u64) -> Option<Refused> {
        if self.footprint > capacity_bytes && !self.need.may_spill {
            // The budget has shrunk since it was asked for.
            return Some(Refused::TooLarge { capacity_bytes });
        }
        if self.deadline.is_past() {
            return Some(Refused::Deadline(self.deadline.waited()));
        }
        let does_without = self.need.spares_since.is_some() && self.footprint > reach;
        does_without.then_some(Refused::Spill)
    }

    pub(super) fn pass(&mut self) {
        self.passed += 1;
        if self.passed == PASSES_MAX {
            self.blocks_since = Some(Instant::now());
        }
        let blocks = self.blocks_since.is_some();
        assert!(blocks == (self.passed >= PASSES_MAX), "it blocks once it was passed often enough");
    }
}

/// Which requests come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Demand,
    Prefetch,
    /// Requests that spare more than a prefetch does, and do without while others wait.
    Sparing,
}

impl Turn {
    pub(super) const ALL: [Turn; 3] = [Turn::Demand, Turn::Prefetch, Turn::Sparing];

    pub(super) fn of(need: &Need) -> Self {
        match (need.class, need.spares_since) {
            (Class::Demand, _) => Turn::Demand,
            (Class::Prefetch, None) => Turn::Prefetch,
            (Class::Prefetch, Some(_)) => Turn::Sparing,
        }
    }
}

pub(super) struct Waiters<S: Space> {
    pub(super) next_ticket: u64,
    pub(super) demand: VecDeque<Waiter<S>>,
    pub(super) prefetch: VecDeque<Waiter<S>>,
    pub(super) sparing: VecDeque<Waiter<S>>,
    /// Whether no space is made any more.
    pub(super) closed: bool,
}

impl<S: Space> Waiters<S> {
    pub(super) fn new() -> Self {
        Waiters {
            next_ticket: 0,
            demand: VecDeque::new(),
            prefetch: VecDeque::new(),
            sparing: VecDeque::new(),
            closed: false,
        }
    }

    pub(super) fn of(&mut self, turn: Turn) -> &mut VecDeque<Waiter<S>> {
        match turn {
            Turn::Demand => &mut self.demand,
            Turn::Prefetch => &mut self.prefetch,
            Turn::Sparing => &mut self.sparing,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.demand.len() + self.prefetch.len() + self.sparing.len()
    }
}
