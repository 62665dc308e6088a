//! The work of a call, apart from its caller, with which it ends.
//!
//! Invariant: when the caller has dropped the call its work is gone, and no thread is within it: so
//! what the caller does next comes after all that the work did. Called by gathers and scatters.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::spawn_named;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Runs `work` where it does not wait for the caller; dropped, it ends. What is at hand comes at
/// once, without a task.
pub(crate) async fn run_apart(
    runtime: Option<Handle>,
    work: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<()> {
    let mut work: BoxFuture<'static, Result<()>> = Box::pin(work);
    if let Poll::Ready(outcome) = futures::poll!(&mut work) {
        return outcome;
    }
    match runtime.filter(|_| !vmem_core::planted!("gpu-neglect")) {
        Some(runtime) => {
            let slot = Slot(Arc::new(Mutex::new(Some(work))));
            let theirs = slot.0.clone();
            let polled = poll_fn(move |context| match &mut *theirs.lock() {
                Some(work) => work.as_mut().poll(context),
                None => Poll::Ready(Err(VirtualMemoryError::Closed)),
            });
            let task = AbortOnDropHandle::new(spawn_named(&runtime, "vmem-gpu-gather", polled));
            let outcome = task.await.unwrap_or(Err(VirtualMemoryError::Closed));
            drop(slot);
            outcome
        }
        None => work.await,
    }
}

/// The work, which the task borrows for each poll. A task that is aborted ends only when the
/// runtime comes to it.
struct Slot(Arc<Mutex<Option<BoxFuture<'static, Result<()>>>>>);

impl Drop for Slot {
    fn drop(&mut self) {
        if !vmem_core::planted!("gpu-apart") {
            // Waits for one poll at most.
            let work = self.0.lock().take();
            drop(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    struct Gone(Arc<AtomicBool>);

    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// Mechanism: the task was aborted, which it learns after its poll. Effect: a scatter that was
    /// dropped wrote to an object over a later write, which had completed.
    #[test]
    fn work_is_gone_when_the_drop_of_its_call_returns() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build();
        let runtime = runtime.unwrap();
        let (enter, entered) = mpsc::channel();
        let (leave, left) = mpsc::channel::<()>();
        let is_gone = Arc::new(AtomicBool::new(false));
        let gone = Gone(is_gone.clone());
        let mut polls = 0;
        let left = Mutex::new(left);
        let work = poll_fn(move |context| {
            let _kept = &gone;
            polls += 1;
            if polls == 2 {
                enter.send(()).unwrap();
                left.lock().recv().unwrap();
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        let mut call = run_apart(Some(runtime.handle().clone()), work).boxed();
        assert!((&mut call).now_or_never().is_none());
        entered.recv().unwrap();
        let dropping = std::thread::spawn(move || drop(call));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!dropping.is_finished(), "a thread is within the work");
        assert!(!is_gone.load(Ordering::SeqCst));
        leave.send(()).unwrap();
        dropping.join().unwrap();
        assert!(is_gone.load(Ordering::SeqCst), "nothing polls it again");
    }
}
