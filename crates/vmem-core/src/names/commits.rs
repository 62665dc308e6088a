//! The one task that commits: all that waits at a time, with one sync of the data before it, in
//! one commit; or, where the catalog has it so, each change by itself, beside the others.
//!
//! Invariant: bytes are on stable storage before the catalog leads to them. After a sync that
//! failed, of the data or of the catalog, nothing more is committed: the kernel takes pages for
//! clean that it could not write, so a later success would prove nothing. A commit that failed
//! otherwise, for want of space above all, was not made, and the next one may succeed. Started with
//! the store, ends with the last of its owners.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use crate::catalog::{Catalog, CatalogChange};
use crate::error::VirtualMemoryError;
use crate::stats::{add, get};
use crate::storage::{Durable, TierError};
use crate::task::spawn_named;

/// The most callers whose changes go into one commit, and the most that wait.
const BATCH_MAX: usize = 1024;

/// Where changes wait for the commit that they share.
#[derive(Debug)]
pub(crate) struct Commits {
    queue: mpsc::Sender<Commit>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    changes: AtomicU64,
    commits: AtomicU64,
    /// Batches with their syncs, or single commits, that have begun, and that have ended.
    begun: AtomicU64,
    ended: AtomicU64,
    /// What the catalog leads to is not known: the last commit may have been made.
    unknown: AtomicBool,
    stopped: AtomicBool,
}

#[derive(Debug)]
struct Commit {
    changes: Vec<CatalogChange>,
    /// Whether they lead to bytes that may not have been synced.
    new_data: bool,
    reply: oneshot::Sender<Result<(), NotCommitted>>,
}

/// Why changes are not known to be durable.
#[derive(Clone, Debug)]
pub(crate) struct NotCommitted {
    pub(crate) error: VirtualMemoryError,
    /// Whether they may be durable nevertheless.
    pub(crate) perhaps: bool,
    /// Whether the outcome of later changes would be unknown too.
    poison: bool,
}

impl NotCommitted {
    /// They are certainly not durable.
    pub(super) fn not(error: VirtualMemoryError) -> Self {
        NotCommitted { error, perhaps: false, poison: false }
    }

    /// Unknown, and not to be known before the next start.
    fn perhaps(error: VirtualMemoryError) -> Self {
        NotCommitted { error, perhaps: true, poison: true }
    }
}

impl Counts {
    /// How many have ended, if one is under way.
    fn under_way(&self) -> Option<u64> {
        let ended = get(&self.ended);
        (get(&self.begun) > ended).then_some(ended)
    }
}

impl Commits {
    /// `stops` gets the error after which nothing is committed any more.
    pub(super) fn start(
        catalog: Arc<dyn Catalog>,
        durable: Arc<dyn Durable>,
        stops: impl Fn(&VirtualMemoryError) + Send + 'static,
    ) -> Self {
        let (queue, inbox) = mpsc::channel(BATCH_MAX);
        let runtime = tokio::runtime::Handle::current();
        let counts = Arc::new(Counts::default());
        let committing = Committing { catalog, durable, counts: counts.clone() };
        let task = async move {
            match committing.catalog.shares_commits() || crate::planted!("commits-shared") {
                true => committing.in_turn(inbox, stops).await,
                false => committing.beside_each_other(inbox, stops).await,
            }
        };
        drop(spawn_named(&runtime, "vmem-commit", task));
        Commits { queue, counts }
    }

    /// Changes that were made durable, and the commits that did it.
    pub(super) fn committed(&self) -> (u64, u64) {
        (get(&self.counts.changes), get(&self.counts.commits))
    }

    /// What tells the batch that is being committed from others; none between two. Where commits
    /// are made beside each other it changes as one ends.
    pub(super) fn under_way(&self) -> Option<u64> {
        self.counts.under_way()
    }

    /// Whether a sync failed, after which nothing is committed.
    pub(super) fn have_stopped(&self) -> bool {
        self.counts.stopped.load(Ordering::Acquire)
    }

    /// Whether the last commit that failed may have been made, and none succeeded since.
    pub(super) fn is_unknown(&self) -> bool {
        self.counts.unknown.load(Ordering::Acquire)
    }

    /// Commits these changes, all or none.
    pub(super) async fn commit(
        &self,
        changes: Vec<CatalogChange>,
        new_data: bool,
    ) -> Result<(), NotCommitted> {
        let (reply, answer) = oneshot::channel();
        let commit = Commit { changes, new_data, reply };
        // Neither end is dropped but with the runtime.
        let gone = || NotCommitted::perhaps(VirtualMemoryError::Closed);
        self.queue.send(commit).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}

/// What the task needs for a commit.
struct Committing {
    catalog: Arc<dyn Catalog>,
    durable: Arc<dyn Durable>,
    counts: Arc<Counts>,
}

type Outcome = Result<(), NotCommitted>;

/// A change whose commit has ended.
struct Committed {
    commit: Commit,
    outcome: Outcome,
}

impl Committing {
    /// Commits what waits, batch by batch.
    async fn in_turn(self, mut inbox: mpsc::Receiver<Commit>, stops: impl Fn(&VirtualMemoryError)) {
        let mut poisoned: Option<NotCommitted> = None;
        let mut batch = Vec::new();
        while inbox.recv_many(&mut batch, BATCH_MAX).await > 0 {
            add(&self.counts.begun, 1);
            let outcomes = match &poisoned {
                Some(why) => vec![Err(why.clone()); batch.len()],
                None => self.all(&batch).await,
            };
            add(&self.counts.ended, 1);
            assert!(outcomes.len() == batch.len(), "each change has its outcome");
            for (commit, outcome) in batch.drain(..).zip(outcomes) {
                self.poison(&mut poisoned, &outcome, &stops);
                let _ = commit.reply.send(outcome);
            }
        }
    }

    /// Commits each change by itself: none waits for another, however long that takes.
    async fn beside_each_other(
        self,
        mut inbox: mpsc::Receiver<Commit>,
        stops: impl Fn(&VirtualMemoryError),
    ) {
        let mut poisoned: Option<NotCommitted> = None;
        let mut commits = FuturesUnordered::new();
        let mut is_open = true;
        while is_open || !commits.is_empty() {
            tokio::select! {
                Some(Committed { commit, outcome }) = commits.next() => {
                    add(&self.counts.ended, 1);
                    self.poison(&mut poisoned, &outcome, &stops);
                    let _ = commit.reply.send(outcome);
                }
                commit = inbox.recv(), if is_open && commits.len() < BATCH_MAX => {
                    let Some(commit) = commit else {
                        is_open = false;
                        continue;
                    };
                    add(&self.counts.begun, 1);
                    let poisoned = poisoned.clone();
                    let this = &self;
                    commits.push(async move {
                        let outcome = match poisoned {
                            Some(why) => Err(why),
                            None => this.alone(&commit).await,
                        };
                        Committed { commit, outcome }
                    });
                }
            }
        }
    }

    /// After a failure that says so, nothing more is committed.
    fn poison(
        &self,
        poisoned: &mut Option<NotCommitted>,
        outcome: &Outcome,
        stops: impl Fn(&VirtualMemoryError),
    ) {
        let failed = outcome.as_ref().err().filter(|failed| failed.poison);
        let (None, Some(NotCommitted { error, .. })) = (&poisoned, failed) else { return };
        tracing::error!(
            target: "vmem::names", %error, "no more commits until the store is opened again"
        );
        stops(error);
        *poisoned = Some(NotCommitted::not(after(error)));
        self.counts.stopped.store(true, Ordering::Release);
    }

    /// Commits all of these at once; returns the outcome of each.
    async fn all(&self, batch: &[Commit]) -> Vec<Outcome> {
        if batch.iter().any(|commit| commit.new_data)
            && let Err(error) = self.sync().await
        {
            return vec![Err(error); batch.len()];
        }
        let together = self.commit(batch).await;
        let of_one = |failed: &NotCommitted| {
            matches!(failed.error, VirtualMemoryError::Damaged { .. }) && !failed.perhaps
        };
        if batch.len() < 2 || !together.as_ref().is_err_and(of_one) {
            return vec![together; batch.len()];
        }
        // A damaged row concerns the change that needs it, and no other.
        let mut outcomes = Vec::with_capacity(batch.len());
        for one in batch.chunks(1) {
            outcomes.push(self.commit(one).await);
        }
        outcomes
    }

    async fn alone(&self, commit: &Commit) -> Outcome {
        if commit.new_data {
            self.sync().await?;
        }
        self.commit(std::slice::from_ref(commit)).await
    }

    async fn sync(&self) -> Outcome {
        let error = match self.durable.sync().await {
            Ok(()) => return Ok(()),
            Err(TierError::Closed) => VirtualMemoryError::Closed,
            Err(TierError::Io { operation, source }) => {
                VirtualMemoryError::Io { operation, source }
            }
            Err(other) => {
                VirtualMemoryError::io("sync", std::io::Error::other(format!("{other:?}")))
            }
        };
        Err(NotCommitted::perhaps(error))
    }

    async fn commit(&self, batch: &[Commit]) -> Outcome {
        assert!((1..=BATCH_MAX).contains(&batch.len()), "a commit of {} changes", batch.len());
        let Committing { catalog, counts, .. } = self;
        let changes = batch.iter().flat_map(|commit| commit.changes.iter().cloned()).collect();
        let before = catalog.attempts();
        match catalog.commit(changes).await {
            Ok(()) => {
                add(&counts.changes, batch.len() as u64);
                add(&counts.commits, 1);
                // Another commit may not be known yet, where each is made by itself.
                counts.unknown.store(catalog.is_shut(), Ordering::Release);
                Ok(())
            }
            Err(error) => {
                // In this order, since opening it again poisons it first.
                let shut = catalog.is_shut();
                let poison = catalog.is_poisoned();
                let perhaps = catalog.attempts() != before && (poison || shut);
                counts.unknown.fetch_or(perhaps, Ordering::AcqRel);
                Err(NotCommitted { error, perhaps, poison })
            }
        }
    }
}

/// The error for calls that come after a failure.
fn after(error: &VirtualMemoryError) -> VirtualMemoryError {
    match error {
        VirtualMemoryError::Io { source, .. } => VirtualMemoryError::Io {
            operation: "a commit before this one, and with it all until the store is opened again,",
            source: source.clone(),
        },
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_under_way_have_numbers_of_their_own() {
        let counts = Counts::default();
        assert_eq!(counts.under_way(), None);
        let mut seen = Vec::new();
        for _ in 0..3 {
            add(&counts.begun, 1);
            let number = counts.under_way().unwrap();
            assert_eq!(counts.under_way(), Some(number), "it has not ended");
            assert!(!seen.contains(&number), "it is another one");
            seen.push(number);
            add(&counts.ended, 1);
            assert_eq!(counts.under_way(), None);
        }
    }
}
