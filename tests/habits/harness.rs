//! Runs a test on a runtime and a thread of its own, with a bound for everything.
//!
//! Invariant: a test that hangs, or whose runtime is blocked, fails at its bound and leaves the
//! other tests alone; time here is that of the machine, never tokio's. Called by every module.

use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use vmem::VirtualMemoryError;

/// The wait timeout of the stores under test.
pub(crate) const WAIT: Duration = Duration::from_secs(5);
/// How long a call may take that needs no space of others: well within the wait timeout, so that a
/// call that ends by a deadline is late.
pub(crate) const BOUND: Duration = Duration::from_secs(3);
/// What `close` may take: the wait timeout and the I/O that it does.
pub(crate) const CLOSE_BOUND: Duration = Duration::from_secs(8);
/// What a whole test may take before it counts as hung.
const HANG: Duration = Duration::from_secs(150);
/// Cases of one test that run at once.
const AT_ONCE: usize = 6;

/// The threads of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// A current-thread runtime.
    One,
    /// A multi-thread runtime with two workers.
    Two,
}

pub(crate) const THREADS: [Threads; 2] = [Threads::One, Threads::Two];

impl Threads {
    pub(crate) fn runtime(self) -> Runtime {
        let mut builder = match self {
            Threads::One => Builder::new_current_thread(),
            Threads::Two => Builder::new_multi_thread(),
        };
        if self == Threads::Two {
            builder.worker_threads(2);
        }
        builder.enable_all().build().unwrap()
    }
}

/// Runs `test` on such a runtime, in a thread of its own.
pub(crate) fn run<F: Future>(
    threads: Threads,
    test: impl FnOnce() -> F + Send + 'static,
) -> F::Output
where
    F::Output: Send + 'static,
{
    watched("the test", HANG, move || {
        let runtime = threads.runtime();
        let output = runtime.block_on(test());
        runtime.shutdown_background();
        output
    })
}

/// Runs `work` in a thread of its own and panics where it does not end within `bound`.
fn watched<T: Send + 'static>(
    what: &str,
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, ended) = channel();
    let thread = std::thread::spawn(move || {
        let output = work();
        let _nobody_waits_any_more = sender.send(output);
    });
    match ended.recv_timeout(bound) {
        Ok(output) => output,
        Err(RecvTimeoutError::Timeout) => panic!("{what} did not end within {bound:?}"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => unreachable!("{what} sends its output before it ends"),
        },
    }
}

/// As [`watched`], with a complaint for a hang and for a panic.
pub(crate) fn attempt<T: Send + 'static>(
    what: &str,
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let watch = AssertUnwindSafe(|| watched(what, bound, work));
    catch_unwind(watch).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("it panicked, or hung: {}", text.unwrap_or_default())
    })
}

/// Polls a future to its end on a thread that has no runtime.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// The output of `future`, or a complaint that it took longer than `bound`.
pub(crate) async fn within<T>(
    what: &str,
    bound: Duration,
    future: impl Future<Output = T>,
) -> Result<T, String> {
    let late = |_| format!("{what}: not done after {bound:?}");
    tokio::time::timeout(bound, future).await.map_err(late)
}

/// As [`within`], for a call of the store; its error is a complaint too.
pub(crate) async fn succeeds<T>(
    what: &str,
    bound: Duration,
    call: impl Future<Output = Result<T, VirtualMemoryError>>,
) -> Result<T, String> {
    within(what, bound, call).await?.map_err(|error| format!("{what}: {error}"))
}

/// Whether a request that waited ends so at its deadline.
pub(crate) fn is_deadline(error: &VirtualMemoryError) -> bool {
    matches!(error, VirtualMemoryError::TimedOut { .. } | VirtualMemoryError::AllPinned { .. })
}

/// Runs the cases, some of them at once since they wait more than they work; returns a complaint
/// for each that fails.
pub(crate) fn run_cases<C: fmt::Debug + Copy + Send + Sync>(
    cases: &[C],
    case: impl Fn(C) -> Result<(), String> + Sync,
) -> Vec<String> {
    let mut complaints = Vec::new();
    for some in cases.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let case = &case;
            let threads: Vec<_> = some.iter().map(|&c| scope.spawn(move || case(c))).collect();
            for (of, thread) in some.iter().zip(threads) {
                let ended = thread.join().unwrap_or_else(|_| Err("it panicked, or hung".into()));
                complaints.extend(ended.err().map(|why| format!("{of:?}: {why}")));
            }
        });
    }
    complaints
}

/// Panics with all complaints, if there are any.
pub(crate) fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Waits until a condition holds; an error if it does not.
pub(crate) async fn eventually(what: &str, mut check: impl FnMut() -> bool) -> Result<(), String> {
    for _ in 0..BOUND.as_millis() / 2 {
        if check() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Err(format!("never: {what}"))
}
