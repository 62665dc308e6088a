//! Tasks of the runtime, and what they set aside for callers.
//!
//! Invariant: a task never waits for a caller, and what a caller does not claim is taken back.
//! Called by the public methods and the migrations.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;

use super::{READS_MAX, Shared};
use crate::asker;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::latency;
use crate::parcel::{Delivery, Parcel, SetAside, Unclaimed, Unkept};
use crate::requests::Request;
use crate::task::spawn_named;

impl Shared {
    /// Runs `work` as a task of the runtime, which `close` waits for. It never waits for a caller.
    #[track_caller]
    pub(crate) fn spawn<F>(self: &Arc<Self>, name: &'static str, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = self.clone();
        let guarded = self.tasks.track_future(async move {
            // A migration never panics; if one does, the store is not to be trusted with more.
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                tracing::error!(target: "vmem::actor", name, "a task ended in a panic");
                shared.set_closed();
            }
        });
        drop(spawn_named(&self.runtime, name, guarded));
    }

    /// Whether a read may start its own task, past the actor.
    pub(crate) fn takes_reads(&self) -> bool {
        self.tasks.len() < READS_MAX && !self.requests.is_closed()
    }

    /// Has the actor start a migration. Where its channel is full a task waits there, and the
    /// caller does not.
    pub(crate) fn request(self: &Arc<Self>, request: Request) {
        if let Some((channel, request)) = self.requests.try_send(request) {
            self.spawn("vmem-request", async move {
                // Dropped unsent, the request drops its reply, and its waiter learns that no answer
                // will come.
                drop(channel.send(request).await);
            });
        }
    }

    /// Runs `work` as a task, which is dropped once its caller is, and sets its value aside for the
    /// caller.
    #[track_caller]
    pub(crate) fn spawn_for_caller<T, F>(
        self: &Arc<Self>,
        name: &'static str,
        work: F,
    ) -> Parcel<Result<T, VirtualMemoryError>>
    where
        T: SetAside + Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        let (delivery, parcel) = crate::parcel::parcel();
        let unclaimed = self.unclaimed.clone();
        let work = asker::awaited(latency::inherit(work));
        self.spawn(
            name,
            async move { serve_caller(work, delivery, &unclaimed, T::is_shared).await },
        );
        parcel
    }

    /// As `spawn_for_caller`, for a value that keeps others from an object: the task itself takes
    /// it back.
    #[track_caller]
    pub(crate) fn spawn_for_caller_briefly<T, F>(
        self: &Arc<Self>,
        name: &'static str,
        work: F,
    ) -> Parcel<Result<T, VirtualMemoryError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        let (delivery, parcel) = crate::parcel::parcel();
        let unclaimed = Arc::new(Unclaimed::default());
        let work = asker::awaited(work);
        self.spawn(name, async move {
            serve_caller(work, delivery, &unclaimed, |_| true).await;
            while let Some(due) = unclaimed.recall() {
                tokio::time::sleep_until(due).await;
            }
        });
        parcel
    }

    /// The answer of a task; none if it was taken back, and is to be asked for again.
    ///
    /// # Errors
    ///
    /// That of the task; `TimedOut` if it does not answer, `Closed` if it has gone.
    pub(crate) async fn answer<T>(
        &self,
        parcel: &Parcel<Result<T, VirtualMemoryError>>,
        deadline: &Deadline,
        operation: &'static str,
    ) -> Result<Option<T>, VirtualMemoryError> {
        match deadline.bound_answer(parcel.claim()).await {
            Ok(Ok(outcome)) => outcome.map(Some),
            Ok(Err(Unkept::Recalled)) if deadline.is_past() => Err(deadline.error(operation)),
            Ok(Err(Unkept::Recalled)) => Ok(None),
            Ok(Err(Unkept::Abandoned)) => Err(VirtualMemoryError::Closed),
            Err(Late) => Err(deadline.error(operation)),
        }
    }
}

/// Runs `work` until its caller has gone, and sets its value aside: to be taken back if it
/// `is_shared`.
async fn serve_caller<T: Send + 'static>(
    work: impl Future<Output = Result<T, VirtualMemoryError>>,
    delivery: Delivery<Result<T, VirtualMemoryError>>,
    unclaimed: &Arc<Unclaimed>,
    is_shared: impl FnOnce(&T) -> bool,
) {
    let outcome = tokio::select! {
        biased;
        outcome = work => outcome,
        () = delivery.unwanted() => return,
    };
    let counted = outcome.as_ref().is_ok_and(is_shared).then_some(unclaimed);
    drop(delivery.deliver(outcome, counted));
}
