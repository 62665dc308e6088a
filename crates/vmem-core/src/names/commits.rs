//! The one task that commits: all that waits at a time, with one sync of the data before it.
//!
//! Invariant: bytes are on stable storage before the catalog leads to them. After a sync or a commit that
//! failed nothing more is committed: the kernel takes pages for clean that it could not write, so a later
//! success would prove nothing, and what the catalog has is only known when it is opened again.
//! Started with the store, ends with the last of its owners.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::{mpsc, oneshot};

use crate::actor::spawn_named;
use crate::catalog::{Catalog, CatalogChange};
use crate::disk::{DiskBackend, DiskError};
use crate::error::VirtualMemoryError;
use crate::stats::{add, get};

/// Changes of so many callers go into one commit at most, and wait at most.
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
}

#[derive(Debug)]
struct Commit {
    changes: Vec<CatalogChange>,
    /// Whether they lead to bytes that may not have been synced.
    new_data: bool,
    reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
}

impl Commits {
    pub(super) fn start(catalog: Arc<dyn Catalog>, disk: Arc<dyn DiskBackend>) -> Self {
        let (queue, inbox) = mpsc::channel(BATCH_MAX);
        let runtime = tokio::runtime::Handle::current();
        let counts = Arc::new(Counts::default());
        let task = commit_in_turn(inbox, catalog, disk, counts.clone());
        spawn_named(&runtime, "vmem-commit", task);
        Commits { queue, counts }
    }

    /// Changes that were made durable, and the commits that did it.
    pub(super) fn committed(&self) -> (u64, u64) {
        (get(&self.counts.changes), get(&self.counts.commits))
    }

    /// Commits these changes, all or none.
    pub(super) async fn commit(
        &self,
        changes: Vec<CatalogChange>,
        new_data: bool,
    ) -> Result<(), VirtualMemoryError> {
        let (reply, answer) = oneshot::channel();
        let commit = Commit { changes, new_data, reply };
        // Neither end is dropped but with the runtime.
        self.queue.send(commit).await.map_err(|_| VirtualMemoryError::Closed)?;
        answer.await.unwrap_or(Err(VirtualMemoryError::Closed))
    }
}

async fn commit_in_turn(
    mut inbox: mpsc::Receiver<Commit>,
    catalog: Arc<dyn Catalog>,
    disk: Arc<dyn DiskBackend>,
    counts: Arc<Counts>,
) {
    let mut poisoned = None;
    let mut batch = Vec::new();
    while inbox.recv_many(&mut batch, BATCH_MAX).await > 0 {
        let outcome = match &poisoned {
            Some(why) => Err(VirtualMemoryError::clone(why)),
            None => commit_batch(&mut batch, &*catalog, &*disk).await,
        };
        if let (Err(error), None) = (&outcome, &poisoned) {
            tracing::error!(target: "vmem::names", %error, "no more commits until the store is opened again");
            poisoned = Some(after(error));
        }
        if outcome.is_ok() {
            add(&counts.changes, batch.len() as u64);
            add(&counts.commits, 1);
        }
        for commit in batch.drain(..) {
            let _ = commit.reply.send(outcome.clone());
        }
    }
}

async fn commit_batch(
    batch: &mut [Commit],
    catalog: &dyn Catalog,
    disk: &dyn DiskBackend,
) -> Result<(), VirtualMemoryError> {
    if batch.iter().any(|commit| commit.new_data) {
        disk.sync().await.map_err(|error| match error {
            DiskError::Closed => VirtualMemoryError::Closed,
            DiskError::Io { operation, source } => VirtualMemoryError::Io { operation, source },
            other => VirtualMemoryError::io("sync", std::io::Error::other(format!("{other:?}"))),
        })?;
    }
    let changes = batch.iter_mut().flat_map(|commit| std::mem::take(&mut commit.changes));
    catalog.commit(changes.collect()).await
}

/// What those get who come after a failure.
fn after(error: &VirtualMemoryError) -> VirtualMemoryError {
    match error {
        VirtualMemoryError::Io { source, .. } => VirtualMemoryError::Io {
            operation: "a commit before this one, and with it all until the store is opened again,",
            source: source.clone(),
        },
        other => other.clone(),
    }
}
