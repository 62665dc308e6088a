//! What waits for a lane, in two classes.
//!
//! Invariant: an operation that a caller waits for passes those that none waits for, and stands
//! behind at most [`BEHIND_MAX`] batches of these, each of at most [`BEHIND_BYTES`]. Within a
//! class the order is that of arrival, and one batch in [`TURNS`] is of the lower class however
//! much there is of the other. What of the lower class nobody awaits any more is not begun. Filled
//! and emptied by the lane.

use std::collections::VecDeque;

use bytes::Bytes;
use vmem_core::backend::DeviceError;

use crate::copy::Work;

/// Copies that are handed to the driver at a time: fewer than its launch queue holds.
pub(crate) const BATCH_MAX: usize = 256;
/// Batches in flight that no caller waits for: while one is copied the next one is at hand.
const BEHIND_MAX: usize = 2;
/// The most bytes of such a batch: a third of a millisecond on a link of 25 GB/s.
const BEHIND_BYTES: usize = 8 << 20;
/// The most bytes of any batch, unless one copy alone has more.
const AWAITED_BYTES: usize = 32 << 20;
/// After this many batches but one that callers wait for comes one of the others.
const TURNS: usize = 8;

/// Whether a caller waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    Awaited,
    /// It may come behind all that are.
    Behind,
}

/// The operations that the driver has not been given yet.
#[derive(Default)]
pub(crate) struct Backlog {
    awaited: VecDeque<Work>,
    behind: VecDeque<Work>,
    /// Batches of the first kind since the last of the second.
    turns: usize,
}

impl Backlog {
    pub(crate) fn push(&mut self, work: Work, urgency: Urgency) {
        match urgency {
            Urgency::Behind if !vmem_core::planted!("lane-classes") => self.behind.push_back(work),
            _ => self.awaited.push_back(work),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.awaited.len() + self.behind.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next batch; none if nothing may go now. `behind_in_flight` counts batches.
    pub(crate) fn take(&mut self, behind_in_flight: usize) -> Option<(Vec<Work>, Urgency)> {
        while self.behind.front().is_some_and(Work::is_abandoned)
            && let Some(work) = self.behind.pop_front()
        {
            // It was not begun, and nobody can use it any more.
            work.end(Err(DeviceError::Closed));
        }
        let may_behind = !self.behind.is_empty() && behind_in_flight < BEHIND_MAX;
        let is_turn = self.awaited.is_empty() || self.turns + 1 >= TURNS;
        if may_behind && is_turn {
            self.turns = 0;
            return Some((front(&mut self.behind, BEHIND_BYTES), Urgency::Behind));
        }
        if self.awaited.is_empty() {
            return None;
        }
        self.turns += 1;
        Some((front(&mut self.awaited, AWAITED_BYTES), Urgency::Awaited))
    }
}

/// The parts of a copy that comes behind others, each with its place; one at least.
pub(crate) fn parts(bytes: &Bytes) -> impl Iterator<Item = (usize, Bytes)> {
    let ends = |at: usize| bytes.len().min(at + BEHIND_BYTES);
    (0..bytes.len().max(1)).step_by(BEHIND_BYTES).map(move |at| (at, bytes.slice(at..ends(at))))
}

/// As many as go together, one at least.
fn front(works: &mut VecDeque<Work>, bytes_max: usize) -> Vec<Work> {
    let mut copies = 0;
    let mut bytes = 0_usize;
    let fits = |work: &&Work| {
        copies += work.copies();
        bytes = bytes.saturating_add(work.uploaded());
        copies <= BATCH_MAX && bytes <= bytes_max
    };
    let count = works.iter().take_while(fits).count().max(1);
    works.drain(..count.min(works.len())).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::channel::oneshot;
    use vmem_core::backend::{DeviceRange, RangeOwner};

    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl RangeOwner for Nobody {
        fn release(&self, _: u64, _: u64) {}
    }

    type Answer = oneshot::Receiver<Result<(), DeviceError>>;

    fn upload(range: &Arc<DeviceRange>, bytes: Bytes) -> (Work, Answer) {
        let (reply, answer) = oneshot::channel();
        (Work::Upload { to: range.clone(), offset: 0, bytes, reply }, answer)
    }

    #[test]
    fn copies_that_none_waits_for_go_in_small_batches_and_have_their_turn() {
        let range = Arc::new(DeviceRange::new(0, 1, 1, Arc::new(Nobody)));
        let quarter = Bytes::from(vec![0; BEHIND_BYTES / 4]);
        let mut backlog = Backlog::default();
        let mut answers = Vec::new();
        for _ in 0..10 {
            let (work, answer) = upload(&range, quarter.clone());
            backlog.push(work, Urgency::Behind);
            answers.push(answer);
        }
        for _ in 0..4 * TURNS * BATCH_MAX {
            backlog.push(upload(&range, Bytes::new()).0, Urgency::Awaited);
        }
        let order: Vec<_> = (0..2 * TURNS)
            .map(|_| backlog.take(0).map(|(works, urgency)| (works.len(), urgency)).unwrap())
            .collect();
        for (nth, taken) in order.into_iter().enumerate() {
            let is_turn = nth % TURNS == TURNS - 1;
            let expected =
                if is_turn { (4, Urgency::Behind) } else { (BATCH_MAX, Urgency::Awaited) };
            assert_eq!(taken, expected, "batch {nth}");
        }
        // With two of them in flight none follows, awaited or not.
        while let Some((_, urgency)) = backlog.take(BEHIND_MAX) {
            assert_eq!(urgency, Urgency::Awaited);
        }
        assert_eq!(backlog.len(), 2);
        let last = backlog.take(BEHIND_MAX - 1).map(|(works, urgency)| (works.len(), urgency));
        assert_eq!(last, Some((2, Urgency::Behind)));
        assert!(backlog.is_empty());
        // Nobody awaits these any more: they give their bytes back, and go nowhere.
        drop(answers);
        backlog.push(upload(&range, quarter.clone()).0, Urgency::Behind);
        assert!(backlog.take(0).is_none() && backlog.is_empty());
    }

    #[test]
    fn parts_are_the_whole_in_order() {
        for len in [0, 1, BEHIND_BYTES - 1, BEHIND_BYTES, BEHIND_BYTES + 1, 3 * BEHIND_BYTES] {
            let bytes: Bytes = (0..len).map(|at| (at >> 8) as u8).collect::<Vec<_>>().into();
            let mut whole = Vec::new();
            for (at, part) in parts(&bytes) {
                assert!(at == whole.len() && part.len() <= BEHIND_BYTES, "{len}: {at}");
                whole.extend_from_slice(&part);
            }
            assert!(whole == bytes, "{len}");
        }
    }
}
