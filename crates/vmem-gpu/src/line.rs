//! What waits for one stream, in order.
//!
//! Invariant: what ends was behind an event of this very stream that has passed, or the context is
//! proven dead. Called by the watch, on its thread.
//!
//! # Cost
//!
//! The front of a line is queried: at once if it is the first, then when its notice has come. Where
//! several have passed, one further back is queried, since a stream that has come so far has passed
//! all that was recorded before. A line has one notice at a time, which is kept until it has come
//! or its front has ended. So the driver calls are at most linear in what is handed in, however
//! much of it waits.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use vmem_core::backend::DeviceError;

use crate::card::{Card, told};
use crate::event::{Event, Span, Unmarked};
use crate::notices::{Notice, Notices};
use crate::watch::Watched;

/// What waits for one stream, in order.
#[derive(Default)]
pub(crate) struct Line {
    groups: VecDeque<Group>,
    /// Of the end of the front.
    notice: Option<Notice>,
}

/// What ends with one event.
struct Group {
    /// None where the driver has given none yet.
    event: Option<Arc<Event>>,
    members: Vec<Watched>,
}

/// Whether the last of these events was recorded behind all others. They come in the order in
/// which they were handed in, which is another one where threads end leases of a stream at once.
fn is_last_last(spans: impl Iterator<Item = Span> + Clone) -> bool {
    let last = spans.clone().last();
    last.is_none_or(|last| spans.filter(|&span| span != last).all(|span| span.is_before(last)))
}

impl Line {
    /// Puts one at the end.
    pub(crate) fn push(&mut self, event: Option<Arc<Event>>, watched: Watched) {
        match (event, self.groups.back_mut()) {
            (None, Some(group)) if group.event.is_none() => group.members.push(watched),
            (event, _) => self.groups.push_back(Group { event, members: vec![watched] }),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Ends what has passed, if there may be something: its notice has come, or `all` are looked
    /// at.
    pub(crate) fn look(&mut self, card: &Card, notices: &mut Notices, all: bool) {
        let has_come = self.notice.as_ref().is_some_and(Notice::has_come);
        if has_come || all && vmem_core::planted!("gpu-notices") {
            self.end_notice(notices);
        }
        if vmem_core::planted!("gpu-lines") {
            self.end_notice(notices);
        }
        if self.notice.is_none() || all {
            self.advance(card, notices, all);
        }
    }

    /// Whether its front has no event.
    pub(crate) fn is_refused(&self) -> bool {
        self.groups.front().is_some_and(|group| group.event.is_none())
    }

    /// Ends what has passed, and sees to it that there is a notice of the next.
    fn advance(&mut self, card: &Card, notices: &mut Notices, again: bool) {
        let mut passed = 0;
        let mut step = 1;
        while let Some(outcome) =
            self.groups.front_mut().and_then(|front| front.has_passed(card, again))
        {
            let count = self.passed_of(step);
            step = if count < step { step / 2 } else { step * 2 }.max(1);
            passed += count;
            for group in self.groups.drain(..count) {
                group.members.into_iter().for_each(|one| one.end(outcome.clone()));
            }
        }
        if passed > 0 || self.is_refused() {
            self.end_notice(notices);
        }
        if self.notice.is_none() {
            let front = self.groups.front().and_then(|group| group.event.as_ref());
            self.notice = front.and_then(|event| notices.ask(event));
        }
    }

    /// How many at the front have passed, of this many: all, by one query, or one. The front has
    /// passed.
    fn passed_of(&self, limit: usize) -> usize {
        let stream = self.groups.front().and_then(Group::stream);
        // A handle that another stream had before says nothing about that one.
        let is_same = |group: &&Group| {
            group.event.is_some()
                && Option::zip(stream, group.stream()).is_some_and(|(a, b)| Arc::ptr_eq(a, b))
        };
        let count = self.groups.iter().take(limit).take_while(is_same).count();
        let window = || self.groups.iter().take(count).filter_map(|group| group.event.as_deref());
        let has_passed = |event: &Event| {
            matches!(event.has_passed(), Ok(true)) || vmem_core::planted!("gpu-early-end")
        };
        // The front has passed anyway.
        let all = count < 2
            || is_last_last(window().skip(1).map(Event::span))
                && window().next_back().is_some_and(has_passed);
        if all { count.max(1) } else { 1 }
    }

    fn end_notice(&mut self, notices: &mut Notices) {
        if let Some(notice) = self.notice.take() {
            notices.end(notice);
        }
    }
}

impl Group {
    /// What its members wait for.
    fn stream(&self) -> Option<&Arc<CudaStream>> {
        self.members.first().map(|one| &one.stream)
    }

    /// How it ended, if it has. Without an event it gets one, if it is `again` its turn to ask.
    fn has_passed(&mut self, card: &Card, again: bool) -> Option<Result<(), DeviceError>> {
        if self.event.is_none() && !again {
            return None;
        }
        let error = match self.query(card) {
            Ok(passed) => return passed.then_some(Ok(())),
            Err(error) => error,
        };
        // It may have been recorded in a capture that began meanwhile.
        if let Some(event) = self.event.take() {
            event.discard();
        }
        if let Unmarked::Refused(error) = error {
            if card.context().is_dead() {
                return Some(Err(DeviceError::Lost(card.context().lost()?)));
            }
            let error = told("the end of a lease", error);
            tracing::debug!(target: "vmem::gpu", %error, "it is tried again");
        }
        vmem_core::planted!("gpu-unmarked").then_some(Ok(()))
    }

    /// Queries the event. Where there is none, asks for one behind what the stream has now, which
    /// covers all members.
    fn query(&mut self, card: &Card) -> Result<bool, Unmarked> {
        if self.event.is_none()
            && let Some(first) = self.members.first_mut()
        {
            let stream = first.stream.clone();
            let lent = self.members.iter_mut().flat_map(|one| one.lent.drain(..));
            let mut lent = lent.collect();
            let marked = card.mark(&stream, &mut lent);
            if let Some(first) = self.members.first_mut() {
                first.lent = lent;
            }
            self.event = Some(Arc::new(marked?));
        }
        match &self.event {
            Some(event) => event.has_passed().map_err(Unmarked::Refused),
            None => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_ordered(spans: &[(u64, u64)]) -> bool {
        is_last_last(spans.iter().map(|&(began, ended)| Span { began, ended }))
    }

    #[test]
    fn last_of_a_line_covers_what_was_recorded_before_it_alone() {
        assert!(is_ordered(&[]));
        assert!(is_ordered(&[(8, 9)]));
        assert!(is_ordered(&[(0, 1), (4, 7), (5, 6), (8, 9)]), "in whichever order the others are");
        assert!(!is_ordered(&[(0, 1), (4, 5), (2, 3)]), "handed in after a later one");
        assert!(!is_ordered(&[(0, 1), (2, 5), (4, 7)]), "recorded at once");
        assert!(!is_ordered(&[(0, 9), (4, 7)]), "recorded within another");
    }
}
