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
use crate::tier::{Class, Need, Space};

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

    pub(super) fn pass(&mut self) {
        self.passed += 1;
        if self.passed == PASSES_MAX {
            self.blocks_since = Some(Instant::now());
        }
        let blocks = self.blocks_since.is_some();
        assert!(blocks == (self.passed >= PASSES_MAX), "it blocks once it was passed often enough");
    }
}

pub(super) struct Waiters<S: Space> {
    pub(super) next_ticket: u64,
    pub(super) demand: VecDeque<Waiter<S>>,
    pub(super) prefetch: VecDeque<Waiter<S>>,
    /// Whether no space is made any more.
    pub(super) closed: bool,
}

impl<S: Space> Waiters<S> {
    pub(super) fn of(&mut self, class: Class) -> &mut VecDeque<Waiter<S>> {
        match class {
            Class::Demand => &mut self.demand,
            Class::Prefetch => &mut self.prefetch,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.demand.len() + self.prefetch.len()
    }
}
