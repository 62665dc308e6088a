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
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::spawn_named;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Runs `work` where it does not wait for the caller; dropped, it ends, as it does when its place
/// is cleared. What is at hand comes at once, without a task.
pub(crate) async fn run_apart(
    runtime: Option<Handle>,
    place: Place,
    work: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<()> {
    let mut work: BoxFuture<'static, Result<()>> = Box::pin(work);
    if let Poll::Ready(outcome) = futures::poll!(&mut work) {
        return outcome;
    }
    match runtime.filter(|_| !vmem_core::planted!("gpu-neglect")) {
        Some(runtime) => {
            place.0.lock().work = Some(work);
            let theirs = place.clone();
            let clears = Clears(place);
            let polled = poll_fn(move |context| match &mut theirs.0.lock().work {
                Some(work) => work.as_mut().poll(context),
                None => Poll::Ready(Err(VirtualMemoryError::Closed)),
            });
            let task = AbortOnDropHandle::new(spawn_named(&runtime, "vmem-gpu-gather", polled));
            clears.0.0.lock().task = Some(task.abort_handle());
            task.await.unwrap_or(Err(VirtualMemoryError::Closed))
        }
        None => work.await,
    }
}

/// Where the work is, which the task borrows for each poll. A task that is aborted ends only when
/// the runtime comes to it, and one whose caller was leaked is not aborted.
#[derive(Clone, Default)]
pub(crate) struct Place(Arc<Mutex<Placed>>);

#[derive(Default)]
struct Placed {
    work: Option<BoxFuture<'static, Result<()>>>,
    /// What polls it.
    task: Option<AbortHandle>,
}

impl Place {
    /// Ends the work, if it is there. Waits for one poll at most.
    pub(crate) fn clear(&self) {
        if !vmem_core::planted!("gpu-apart") {
            let Placed { work, task } = std::mem::take(&mut *self.0.lock());
            drop(work);
            // Nothing wakes it any more.
            task.iter().for_each(AbortHandle::abort);
        }
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").finish_non_exhaustive()
    }
}

/// Ends the work with its caller.
struct Clears(Place);

impl Drop for Clears {
    fn drop(&mut self) {
        self.0.clear();
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
        let mut call = run_apart(Some(runtime.handle().clone()), Place::default(), work).boxed();
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
