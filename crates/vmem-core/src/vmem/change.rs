//! How a change of names is run: as a task of its own, for which the caller waits.
//!
//! Invariant: the caller's future owns nothing, and a change whose caller went away may have
//! happened, or happens still, whole. The caller waits as long as it takes, since a change may be
//! of any size; unless one commit has not ended for a whole `wait_timeout`. Called by `named.rs`,
//! `entries.rs` and `place.rs`.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use super::{Result, VirtualMemory};
use crate::asker;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::names::Names;
use crate::parcel::parcel;

impl VirtualMemory {
    /// Runs a change as a task of its own, and waits for its answer. The task waits for its place
    /// among others.
    ///
    /// # Errors
    ///
    /// What the change says. `TimedOut` if a commit does not end: then it may be made later.
    pub(super) async fn change<T, F>(
        &self,
        make: impl FnOnce(Arc<Names>, Deadline) -> F + Send,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let names = self.names.clone();
        let deadline = self.shared.deadline();
        let change = asker::awaited(make(names.clone(), deadline));
        let (delivery, answer) = parcel();
        let (begun, begins) = parcel();
        self.shared.spawn("vmem-name", async move {
            let _ = begun.deliver((), None);
            let permit = deadline.bound(names.task()).await;
            let outcome = match permit {
                Ok(Ok(_permit)) if !names.shared.is_closed() => change.await,
                Ok(Ok(_)) => Err(VirtualMemoryError::Closed),
                Ok(Err(error)) => Err(error),
                Err(Late) => Err(deadline.error("other changes of names")),
            };
            drop(delivery.deliver(outcome, None));
        });
        if let Err(Late) = deadline.bound(begins.claim()).await {
            return Err(deadline.error("the runtime of the store"));
        }
        let mut answer = pin!(answer.claim());
        // What the change itself waits for ends with the deadline, and its error is better. A
        // catalog works in real time, whatever the tiers do.
        let all = deadline.in_real_time();
        let mut wait = all;
        let mut before = self.names.commit_under_way();
        loop {
            if let Ok(answered) = wait.bound_answer(&mut answer).await {
                // Without an answer the runtime has gone.
                return answered.unwrap_or(Err(VirtualMemoryError::Closed));
            }
            let now = self.names.commit_under_way();
            if now.is_some() && now == before && !crate::planted!("change-endless") {
                return Err(all.error("a change of names, which may still be made,"));
            }
            before = now;
            wait = wait.renewed();
        }
    }
}
