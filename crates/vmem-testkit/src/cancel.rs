//! Futures dropped at every point at which they can be.
//!
//! Invariant: a future is polled again only after it asked to be (its waker was called), so that
//! the k-th poll is the k-th step of its work and not idle repetition. Called by the tests of
//! cancellation.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// How long, on tokio's clock, a pending future may go without waking before it counts as hung.
pub const STALL_LIMIT: Duration = Duration::from_secs(600);

/// Polls `future` at most `polls` times and drops it. `Some` if it ended by then.
///
/// Before each poll but the first it waits until the future was woken, and yields, so that what
/// works in the background makes progress. With `polls` 0 the future is dropped without being
/// started.
///
/// # Panics
///
/// When a pending future is not woken within [`STALL_LIMIT`].
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// use vmem_testkit::poll_then_drop;
///
/// assert_eq!(poll_then_drop(async { 1 }, 0).await, None);
/// assert_eq!(poll_then_drop(async { 1 }, 1).await, Some(1));
/// assert_eq!(poll_then_drop(tokio::task::yield_now(), 1).await, None);
/// # });
/// ```
pub async fn poll_then_drop<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    drive(future, polls, false).await.map(|(output, _)| output)
}

/// As [`poll_then_drop`], but the drop comes when the future was woken once more: what it waited
/// for has happened, and is not taken.
///
/// # Panics
///
/// When a pending future is not woken within [`STALL_LIMIT`].
pub async fn poll_wake_then_drop<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    drive(future, polls, true).await.map(|(output, _)| output)
}

/// Drops a future of `make` after 0, 1, 2, ... polls, at each count both right after the poll and
/// after the next wake, until one ends; returns how many polls that took.
///
/// `make` gets the number of polls that its future will have, and is called twice for each.
pub async fn exhaust<F: Future>(make: impl FnMut(usize) -> F) -> usize {
    exhaust_with(make, async |_| {}).await
}

/// As [`exhaust`]; after each drop, and at the end, `check` runs with the number of polls.
pub async fn exhaust_with<F: Future>(
    mut make: impl FnMut(usize) -> F,
    mut check: impl AsyncFnMut(usize),
) -> usize {
    for polls in 0.. {
        for after_wake in [false, true] {
            let ended = drive(make(polls), polls, after_wake && polls > 0).await;
            check(polls).await;
            if let Some((_, took)) = ended {
                return took;
            }
        }
    }
    unreachable!("the range of polls has no end");
}

/// Runs the future; on its end gives the output and the number of polls that it had.
async fn drive<F: Future>(future: F, polls: usize, after_wake: bool) -> Option<(F::Output, usize)> {
    let mut future = pin!(future);
    let bell = Arc::new(Bell::default());
    for poll in 1..=polls {
        let before = bell.rings.load(Ordering::Acquire);
        if let Poll::Ready(output) = poll_once(future.as_mut(), &bell) {
            return Some((output, poll));
        }
        if poll < polls || after_wake {
            bell.wait_beyond(before, poll).await;
        }
    }
    None
}

fn poll_once<F: Future>(future: Pin<&mut F>, bell: &Arc<Bell>) -> Poll<F::Output> {
    let waker = Waker::from(bell.clone());
    future.poll(&mut Context::from_waker(&waker))
}

/// A waker that counts.
#[derive(Default)]
struct Bell {
    rings: AtomicU64,
    rung: Notify,
}

impl Bell {
    async fn wait_beyond(&self, rings: u64, poll: usize) {
        let woken = async {
            while self.rings.load(Ordering::Acquire) == rings {
                self.rung.notified().await;
            }
        };
        if timeout(STALL_LIMIT, woken).await.is_err() {
            panic!("a future was pending after poll {poll} and not woken for {STALL_LIMIT:?}");
        }
        tokio::task::yield_now().await;
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rings.fetch_add(1, Ordering::Release);
        self.rung.notify_one();
    }
}
