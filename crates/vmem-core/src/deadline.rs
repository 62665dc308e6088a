//! Deadlines, in the time that the store's I/O takes.
//!
//! Invariant: a deadline over real I/O passes in real time, also where a test has paused the clock
//! of its runtime; over simulated I/O it passes in the runtime's time. The waiter itself keeps its
//! deadline, so it holds even where no other task runs. Made by the public calls, carried by every
//! job.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::future::{Either, select};
use futures_timer::Delay;
use tokio::runtime::{self, Handle};
use tokio::time::Instant;

use crate::error::VirtualMemoryError;

/// The longest that a wait can be asked to last.
const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// A task that keeps the same deadline explains it better than its caller: it gets so long to
/// answer.
const ANSWER: Duration = Duration::from_millis(20);

/// The time in which the I/O of a store happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// That of the machine.
    Real,
    /// That of the tokio runtime, which a test may pause and advance.
    Runtime,
}

/// What the deadlines of one store are measured by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) clock: Clock,
    /// The runtime of the store, whose timer serves the waiters that run on it; none where that is
    /// to be left alone, since a paused clock goes on for each timer.
    pub(crate) runtime: Option<runtime::Id>,
}

/// When a request was made, and when it gives up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    asked: Instant,
    asked_real: std::time::Instant,
    wait: Duration,
    timing: Timing,
}

/// The deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Late;

impl Deadline {
    /// A deadline `wait` from now.
    pub(crate) fn after(wait: Duration, timing: Timing) -> Self {
        Deadline {
            asked: Instant::now(),
            asked_real: std::time::Instant::now(),
            wait: wait.min(CENTURY),
            timing,
        }
    }

    /// An earlier deadline: the wait that is left, divided by `parts`, and no longer than
    /// `at_most`.
    pub(crate) fn share(&self, parts: u32, at_most: Duration) -> Self {
        let left = self.wait.saturating_sub(self.waited());
        Deadline::after((left / parts).min(at_most), self.timing)
    }

    /// The deadline of the next wait of a request that has made progress: as long, from now.
    pub(crate) fn renewed(&self) -> Self {
        Deadline::after(self.wait, self.timing)
    }

    /// The same in the time of the machine, for what is no simulated I/O.
    pub(crate) fn in_real_time(&self) -> Self {
        let is_real = self.timing.clock == Clock::Real;
        let runtime = self.timing.runtime.filter(|_| is_real);
        Deadline { timing: Timing { clock: Clock::Real, runtime }, ..*self }
    }

    /// When the request was made, in the runtime's time.
    pub(crate) fn asked(&self) -> Instant {
        self.asked
    }

    /// How long the request has waited.
    pub(crate) fn waited(&self) -> Duration {
        match self.timing.clock {
            Clock::Real => self.asked_real.elapsed(),
            Clock::Runtime => self.asked.elapsed(),
        }
    }

    /// Whether the deadline has passed.
    pub(crate) fn is_past(&self) -> bool {
        self.waited() >= self.wait
    }

    /// Whether half of the wait has passed.
    pub(crate) fn is_half_past(&self) -> bool {
        self.waited() >= self.wait / 2
    }

    /// The error of a wait that outlasted the deadline.
    pub(crate) fn error(&self, operation: &'static str) -> VirtualMemoryError {
        VirtualMemoryError::TimedOut { operation, waited: self.waited() }
    }

    /// Awaits `future` until the deadline.
    pub(crate) async fn bound<F: Future>(&self, future: F) -> Result<F::Output, Late> {
        bound(future, self.timing, || self.wait.saturating_sub(self.waited())).await
    }

    /// Awaits the answer of a task that keeps the same deadline.
    pub(crate) async fn bound_answer<F: Future>(&self, future: F) -> Result<F::Output, Late> {
        let wait = self.wait + ANSWER;
        bound(future, self.timing, || wait.saturating_sub(self.waited())).await
    }
}

/// Awaits `future` until nothing is `left`.
async fn bound<F: Future>(
    future: F,
    timing: Timing,
    left: impl Fn() -> Duration,
) -> Result<F::Output, Late> {
    let mut future = pin!(future);
    let at_home = Handle::try_current().is_ok_and(|handle| Some(handle.id()) == timing.runtime);
    if at_home {
        if let Ok(output) = tokio::time::timeout(left(), &mut future).await {
            return Ok(output);
        }
        if left().is_zero() {
            return Err(Late);
        }
        // The clock is paused, and passed before the I/O could end.
    }
    loop {
        match select(&mut future, Delay::new(left())).await {
            Either::Left((output, _)) => return Ok(output),
            Either::Right(_) if left().is_zero() => return Err(Late),
            Either::Right(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(clock: Clock) -> Timing {
        Timing { clock, runtime: Some(Handle::current().id()) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_does_not_shorten_a_wait_for_real_io() {
        let deadline = Deadline::after(Duration::from_millis(200), timing(Clock::Real));
        let (sender, answer) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            sender.send(7).expect("the receiver waits");
        });
        assert_eq!(deadline.bound(answer).await, Ok(Ok(7)));
        let never = std::future::pending::<()>();
        assert_eq!(deadline.bound(never).await, Err(Late));
        assert!(deadline.waited() >= Duration::from_millis(200));
    }

    #[tokio::test(start_paused = true)]
    async fn simulated_io_is_bound_by_the_runtime_clock() {
        let deadline = Deadline::after(Duration::from_secs(3600), timing(Clock::Runtime));
        let began = std::time::Instant::now();
        assert_eq!(deadline.bound(std::future::pending::<()>()).await, Err(Late));
        assert!(began.elapsed() < Duration::from_secs(60));
        assert!(deadline.is_past());
    }

    #[tokio::test(start_paused = true)]
    async fn real_time_over_simulated_io_leaves_the_clock_of_the_runtime_alone() {
        let deadline = Deadline::after(Duration::from_millis(30), timing(Clock::Runtime));
        let before = Instant::now();
        let real = deadline.in_real_time();
        assert_eq!(real.bound(std::future::pending::<()>()).await, Err(Late));
        assert!(real.waited() >= Duration::from_millis(30));
        assert!(before.elapsed().is_zero(), "{:?}", before.elapsed());
    }

    #[tokio::test]
    async fn an_endless_wait_is_no_overflow() {
        let deadline = Deadline::after(Duration::MAX, timing(Clock::Real));
        assert!(!deadline.is_past());
        assert_eq!(deadline.bound(std::future::ready(1)).await, Ok(1));
        assert_eq!(deadline.bound(tokio::task::yield_now()).await, Ok(()));
    }

    #[test]
    fn a_wait_without_a_runtime_has_a_deadline() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("a runtime starts");
        let timing = Timing { clock: Clock::Real, runtime: Some(runtime.handle().id()) };
        let deadline = Deadline::after(Duration::from_millis(30), timing);
        let waited = futures::executor::block_on(deadline.bound(std::future::pending::<()>()));
        assert_eq!(waited, Err(Late));
    }
}
