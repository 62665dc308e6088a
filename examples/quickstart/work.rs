//! What the phases have in common: the tasks, the comparison, and what each of them reports.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::task::{JoinSet, spawn_blocking};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::files::{Source, Verdict};
use crate::tally::Tally;

/// What every task needs.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) vmem: VirtualMemory,
    pub(crate) tally: Arc<Tally>,
    pub(crate) tasks: u16,
}

/// A file and its object.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) source: Source,
    pub(crate) handle: VMemHandle,
    seen: AtomicU8,
}

/// What is counted once for each file, however often it is seen.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Once {
    Compared = 1,
    Differs = 2,
    Failed = 4,
    Excused = 8,
}

impl Stored {
    pub(crate) fn new(source: Source, handle: VMemHandle) -> Self {
        Stored { source, handle, seen: AtomicU8::new(0) }
    }

    /// Whether this is seen for the first time.
    pub(crate) fn first(&self, what: Once) -> bool {
        self.seen.fetch_or(what as u8, Ordering::Relaxed) & what as u8 == 0
    }
}

impl Work {
    /// Runs one worker for each task and gathers what they return. Dropping the future ends them.
    pub(crate) async fn in_tasks<F, T>(&self, worker: impl Fn(Work, u16) -> F) -> Vec<T>
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let mut tasks: JoinSet<T> = (0..self.tasks).map(|nth| worker(self.clone(), nth)).collect();
        let mut outcomes = Vec::new();
        while let Some(outcome) = tasks.join_next().await {
            match outcome {
                Ok(outcome) => outcomes.push(outcome),
                Err(error) => self.tally.failed.push(format!("a task ended early: {error}")),
            }
        }
        outcomes
    }

    /// Compares what was read with the file from `offset` on; gives it back if it is the same.
    pub(crate) async fn judge<B>(
        &self,
        stored: &Arc<Stored>,
        offset: usize,
        read: Result<B, VirtualMemoryError>,
    ) -> Option<B>
    where
        B: AsRef<[u8]> + Send + 'static,
    {
        let path = stored.source.path.display();
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) if stored.first(Once::Failed) => {
                self.tally.failed.push(format!("reading {path}: {error}"));
                return None;
            }
            Err(_) => return None,
        };
        let of = stored.clone();
        let compare = blocking(move || Ok((of.source.compare(offset, bytes.as_ref()), bytes)));
        let verdict = match compare.await {
            Ok((Verdict::Same, bytes)) => {
                self.tally.bytes_compared.add(bytes.as_ref().len() as u64);
                return Some(bytes);
            }
            Ok((verdict, _)) => verdict,
            Err(error) => Verdict::Unreadable(error),
        };
        match verdict {
            Verdict::Differs { at } if stored.first(Once::Differs) => {
                self.tally.differ.push(format!("{path}: at byte {at}"));
            }
            Verdict::Changed if stored.first(Once::Excused) => {
                self.tally.changed.push(path.to_string());
            }
            Verdict::Unreadable(error) if stored.first(Once::Excused) => {
                self.tally.unreadable.push(format!("{path}: {error}"));
            }
            _ => {}
        }
        None
    }
}

/// Runs file access on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    access: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(access).await.map_err(io::Error::other)?
}
