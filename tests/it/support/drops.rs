//! Futures that are dropped at a given step.
//!
//! Invariant: on a current-thread runtime a future is polled again only after it was woken, so its
//! k-th poll is the k-th step of its work. Called by the tests of cancellation.

use std::future::{Future, poll_fn};
use std::task::Poll;

/// Where a future is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DropAt {
    /// Right after this many polls.
    Polled(usize),
    /// After this many polls, when it was woken for the next one: what it waited for has come
    /// and was not taken.
    Woken(usize),
}

/// Polls `future` until it ends, or is dropped. `None` if it was dropped.
pub(crate) async fn dropped_at<F: Future>(at: DropAt, future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let (mut left, woken) = match at {
        DropAt::Polled(polls) => (polls, false),
        DropAt::Woken(polls) => (polls, true),
    };
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 && !woken => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
