//! Futures that are polled a given number of times and then left alone.
//!
//! Invariant: a future is polled again only after it was woken, so the k-th poll is the k-th step
//! of its work; a kept one is owned by the test alone and sees no poll until it is finished. Called
//! by the tests of scenario 35.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tokio::task::coop::unconstrained;

/// How long a pending future may go without being woken before it is left at the poll that it has.
const WAKE_WAIT: Duration = Duration::from_millis(250);

/// A future at some poll.
pub(crate) struct Kept<T> {
    state: State<T>,
    began: Instant,
}

enum State<T> {
    Pending(Pin<Box<dyn Future<Output = T> + Send>>),
    Ended(T),
}

impl<T: Send + 'static> Kept<T> {
    /// Polls `future` once.
    pub(crate) async fn once(future: impl Future<Output = T> + Send + 'static) -> Self {
        Kept::polled(future, 1).await
    }

    /// Polls `future` up to `polls` times, each time after a wake.
    pub(crate) async fn polled(
        future: impl Future<Output = T> + Send + 'static,
        polls: usize,
    ) -> Self {
        let began = Instant::now();
        // The budget for cooperation belongs to the task of the test, which polls very many.
        let mut future: Pin<Box<dyn Future<Output = T> + Send>> = Box::pin(unconstrained(future));
        for poll in 1..=polls {
            let bell = Arc::new(Bell::default());
            let waker = Waker::from(bell.clone());
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Kept { state: State::Ended(output), began };
            }
            if poll < polls && !bell.rings().await {
                break;
            }
        }
        Kept { state: State::Pending(future), began }
    }

    pub(crate) fn is_pending(&self) -> bool {
        matches!(self.state, State::Pending(_))
    }

    /// Since its first poll.
    pub(crate) fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Polls it to its end.
    pub(crate) async fn finish(self) -> T {
        match self.state {
            State::Ended(output) => output,
            State::Pending(mut future) => poll_fn(|context| future.as_mut().poll(context)).await,
        }
    }
}

/// Remembers a wake.
#[derive(Default)]
struct Bell(AtomicBool);

impl Bell {
    async fn rings(&self) -> bool {
        let began = Instant::now();
        while !self.0.load(Ordering::Acquire) {
            if began.elapsed() > WAKE_WAIT {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        true
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}
