//! What the runtime brings to a caller, who may not come for it.
//!
//! Invariant: nothing that is shared and counted is held by a future that nobody polls. The work
//! that gathers it goes on in a task, and never waits for the caller; what it came to lies ready
//! for a short grace, is given back then, and gathered anew when the caller comes. A caller that
//! drops its future ends the work. Called by leases, sets, gathers and scatters.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use vmem_core::VirtualMemoryError;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// How long something lies ready for its caller.
const GRACE: Duration = Duration::from_millis(200);

/// What a task and its caller share.
enum Slot<T> {
    /// The task is at work; whom to wake.
    Working(Option<Waker>),
    /// It lies ready.
    Ready(Result<T>),
    /// Nobody came for it.
    TakenBack,
    /// The task has ended without a result: its runtime is gone.
    Dead,
    /// The caller has it, or has gone.
    Over,
}

/// Runs `work` where it does not wait for the caller, and collects what it comes to. What is at
/// hand comes at once, without a task. `work` is begun anew if the caller comes late.
///
/// # Errors
///
/// Those of the work; `Closed` if the runtime has ended.
pub(crate) async fn collect<T, F>(runtime: Option<Handle>, work: impl Fn() -> F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    deliver(runtime, work, Some(GRACE)).await
}

/// As [`collect`], for work that comes to nothing that anybody could lack: its outcome lies ready
/// for as long as the caller likes.
///
/// # Errors
///
/// As [`collect`].
pub(crate) async fn run<F>(runtime: Option<Handle>, work: impl Fn() -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    deliver(runtime, work, None).await
}

async fn deliver<T, F>(
    runtime: Option<Handle>,
    work: impl Fn() -> F,
    grace: Option<Duration>,
) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    loop {
        let mut attempt = Box::pin(work());
        let first = poll_fn(|context| Poll::Ready(attempt.as_mut().poll(context))).await;
        if let Poll::Ready(outcome) = first {
            return outcome;
        }
        let Some(runtime) = &runtime else { return attempt.await };
        if let Some(outcome) = Delivery::start(runtime, attempt, grace).await {
            return outcome;
        }
    }
}

/// The caller's end. Dropped, it ends the task, and gives back what lies ready.
struct Delivery<T> {
    slot: Arc<Mutex<Slot<T>>>,
    task: AbortHandle,
}

impl<T: Send + 'static> Delivery<T> {
    fn start(
        runtime: &Handle,
        work: Pin<Box<impl Future<Output = Result<T>> + Send + 'static>>,
        grace: Option<Duration>,
    ) -> Self {
        let slot = Arc::new(Mutex::new(Slot::Working(None)));
        let end = TaskEnd(slot.clone());
        let task = runtime.spawn(async move {
            let end = end;
            let outcome = work.await;
            set(&end.0, Slot::Ready(outcome));
            let Some(grace) = grace else { return };
            tokio::time::sleep(grace).await;
            let mut slot = end.0.lock();
            if let Slot::Ready(_) = *slot {
                let late = std::mem::replace(&mut *slot, Slot::TakenBack);
                // What is given back may call back.
                drop(slot);
                drop(late);
            }
        });
        Delivery { slot, task: task.abort_handle() }
    }
}

impl<T> Future for Delivery<T> {
    /// None if it came and was taken back.
    type Output = Option<Result<T>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.slot.lock();
        match std::mem::replace(&mut *slot, Slot::Over) {
            Slot::Working(_) => {
                *slot = Slot::Working(Some(context.waker().clone()));
                Poll::Pending
            }
            Slot::Ready(outcome) => Poll::Ready(Some(outcome)),
            Slot::TakenBack => Poll::Ready(None),
            Slot::Dead | Slot::Over => Poll::Ready(Some(Err(VirtualMemoryError::Closed))),
        }
    }
}

impl<T> Drop for Delivery<T> {
    fn drop(&mut self) {
        self.task.abort();
        let left = std::mem::replace(&mut *self.slot.lock(), Slot::Over);
        drop(left);
    }
}

/// The task's end, which tells the caller however it comes.
struct TaskEnd<T>(Arc<Mutex<Slot<T>>>);

impl<T> Drop for TaskEnd<T> {
    fn drop(&mut self) {
        set(&self.0, Slot::Dead);
    }
}

/// Tells the caller, if it still waits.
fn set<T>(slot: &Mutex<Slot<T>>, to: Slot<T>) {
    let mut slot = slot.lock();
    let Slot::Working(waker) = &mut *slot else {
        drop(slot);
        return drop(to);
    };
    let waker = waker.take();
    *slot = to;
    drop(slot);
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt;

    use super::*;

    /// Counts those that live.
    struct Counted(Arc<AtomicUsize>);

    impl Counted {
        fn new(alive: &Arc<AtomicUsize>) -> Self {
            alive.fetch_add(1, Ordering::SeqCst);
            Counted(alive.clone())
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    async fn slow(alive: Arc<AtomicUsize>) -> Result<Counted> {
        let counted = Counted::new(&alive);
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok(counted)
    }

    #[tokio::test]
    async fn a_caller_that_does_not_come_holds_nothing() {
        let alive = Arc::new(AtomicUsize::new(0));
        let theirs = alive.clone();
        let collecting = collect(Handle::try_current().ok(), move || slow(theirs.clone()));
        let mut collecting = Box::pin(collecting);
        assert!((&mut collecting).now_or_never().is_none());
        assert_eq!(alive.load(Ordering::SeqCst), 1, "it is being gathered");
        tokio::time::sleep(GRACE * 3).await;
        assert_eq!(alive.load(Ordering::SeqCst), 0, "it was given back");
        let collected = collecting.await.unwrap();
        assert_eq!(alive.load(Ordering::SeqCst), 1, "and gathered anew");
        drop(collected);
    }

    #[tokio::test]
    async fn a_caller_that_goes_ends_the_work() {
        let alive = Arc::new(AtomicUsize::new(0));
        let theirs = alive.clone();
        let collecting = collect(Handle::try_current().ok(), move || slow(theirs.clone()));
        drop(Box::pin(collecting).now_or_never());
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_runtime_that_ends_is_told() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let alive = Arc::new(AtomicUsize::new(0));
        let theirs = alive.clone();
        let mut collecting = Box::pin(collect(Some(handle), move || slow(theirs.clone())));
        {
            let _context = runtime.enter();
            assert!((&mut collecting).now_or_never().is_none());
        }
        drop(runtime);
        let collected = futures::executor::block_on(collecting);
        assert!(matches!(collected, Err(VirtualMemoryError::Closed)));
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }
}
