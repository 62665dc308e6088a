//! How much memory there is: pages that go back to the device, and pages that are new.
//!
//! Invariant: none leaves that is part of the budget, and none is kept that is beyond it when it
//! comes. Part of the ledger; called by `memory`.

use super::{Page, PageLedger, PageMove, PagePlan};

/// A page of memory that goes back to the device. Nobody else has it, or its addresses, until that
/// was [settled](PageLedger::settle_leaving).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PageLeaving {
    /// Which memory.
    pub(crate) memory: u32,
    /// The page of addresses before which it is, if before any.
    pub(crate) from: Option<u64>,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    Gone,
    /// It is behind no address any more, but is ours still.
    Unmapped,
    /// Nothing has changed.
    Stays,
}

impl PageLedger {
    /// What the capacity is to become, in bytes.
    pub(crate) fn set_budget(&mut self, bytes: u64) {
        self.budget_bytes = bytes;
    }

    /// What was set last.
    pub(crate) fn budget(&self) -> u64 {
        self.budget_bytes
    }

    /// How many pages the budget lacks.
    pub(crate) fn lacking(&self) -> u64 {
        self.budget_bytes.saturating_sub(self.capacity_bytes + self.joining_bytes) / self.page_bytes
    }

    /// From now on pages that are beyond the budget leave as soon as nothing of them is used, but
    /// no more than these bytes, until [`end_leaving`](Self::end_leaving).
    pub(crate) fn begin_leaving(&mut self, bytes: u64) {
        let beyond = self.capacity_bytes.saturating_sub(self.budget_bytes);
        self.owed = bytes.min(beyond) / self.page_bytes;
        self.let_leave();
    }

    /// No more leave; those that have.
    pub(crate) fn end_leaving(&mut self) -> Vec<PageLeaving> {
        self.owed = 0;
        std::mem::take(&mut self.leaving)
    }

    pub(super) fn let_leave(&mut self) {
        while self.owed > 0 {
            // What is idle and not ready is where others are to come to.
            let is_ready =
                |&number: &u64| self.ready.run_from(number * self.page_bytes) >= self.page_bytes;
            let page = match (self.spare.pop(), self.idle.iter().rev().copied().find(is_ready)) {
                (Some(memory), _) => PageLeaving { memory, from: None },
                (None, Some(number)) => {
                    PageLeaving { memory: self.take_idle(number), from: Some(number) }
                }
                (None, None) => return,
            };
            self.leaving.push(page);
            self.capacity_bytes -= self.page_bytes;
            self.owed -= 1;
        }
    }

    /// A page has left, or has not.
    pub(crate) fn settle_leaving(&mut self, page: PageLeaving, left: Left) {
        let PageLeaving { memory, from } = page;
        if let Some(number) = from {
            self.free.add(self.page(number));
        }
        match (left, from) {
            (Left::Gone, _) => return,
            (Left::Stays, Some(number)) => {
                self.pages.insert(number, Page { memory, used_bytes: 0 });
                self.idle.insert(number);
                self.ready.add(self.page(number));
            }
            (Left::Unmapped, _) | (Left::Stays, None) => self.spare.push(memory),
        }
        self.capacity_bytes += self.page_bytes;
    }

    /// Where new memory goes: behind the last free addresses, and what finds none there is spare.
    /// What the budget does not lack any more leaves.
    pub(crate) fn plan_new(&mut self, mut memory: Vec<u32>) -> (PagePlan, Vec<PageLeaving>) {
        let surplus = memory.split_off(memory.len().min(self.lacking() as usize));
        let leaving = |memory| PageLeaving { memory, from: None };
        let surplus: Vec<_> = surplus.into_iter().map(leaving).collect();
        let longest = self.free.longest().unwrap_or(0..0);
        let end = longest.end / self.page_bytes;
        let first = longest.start.div_ceil(self.page_bytes);
        let is_bare = |number: &u64| !self.pages.contains_key(number);
        let end = (first..end).rev().find(is_bare).map_or(end, |last| last + 1);
        let below = (first..end).rev().take_while(is_bare);
        let start = below.take(memory.len()).last().unwrap_or(end);
        let range = start * self.page_bytes..end * self.page_bytes;
        assert!(self.free.take_exact(&range), "the addresses are free");
        let mut memory = memory.into_iter();
        let to_move = |to| memory.next().map(|memory| PageMove { memory, from: None, to });
        let moves: Vec<_> = (start..end).filter_map(to_move).collect();
        self.joining_bytes += moves.len() as u64 * self.page_bytes;
        self.capacity_bytes += memory.len() as u64 * self.page_bytes;
        self.spare.extend(memory);
        (PagePlan { range, moves }, surplus)
    }

    /// As [`settle`](Self::settle), for memory that is new.
    pub(crate) fn settle_new(&mut self, plan: PagePlan, done: bool) {
        let joined = plan.moves.len() as u64 * self.page_bytes;
        self.joining_bytes -= joined;
        self.capacity_bytes += joined;
        self.settle(plan, done);
    }
}
