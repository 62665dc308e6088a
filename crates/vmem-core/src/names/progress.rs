//! How commits go on, so that a caller knows one that does not end.
//!
//! Invariant: a commit counts as begun when it is taken up, and not while it waits for others.
//! Counted by the task that commits; read by callers, of all commits where they are made in turn,
//! and of those of their own change where each is made by itself.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::stats::{add, get};

tokio::task_local! {
    static OF_CHANGE: Arc<Progress>;
}

/// Commits that have begun, and that have ended.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Progress {
    pub(super) fn begin(&self) {
        add(&self.begun, 1);
    }

    pub(super) fn end(&self) {
        add(&self.ended, 1);
    }

    /// How many have ended, if one is under way.
    pub(super) fn under_way(&self) -> Option<u64> {
        let ended = get(&self.ended);
        (get(&self.begun) > ended).then_some(ended)
    }

    /// Runs a change whose commits are counted here.
    pub(crate) async fn of<F: Future>(self: Arc<Self>, change: F) -> F::Output {
        OF_CHANGE.scope(self, change).await
    }

    /// That of the change that runs, if one does.
    pub(super) fn current() -> Option<Arc<Self>> {
        OF_CHANGE.try_with(Arc::clone).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_under_way_have_numbers_of_their_own() {
        let progress = Progress::default();
        assert_eq!(progress.under_way(), None);
        let mut seen = Vec::new();
        for _ in 0..3 {
            progress.begin();
            let number = progress.under_way().unwrap();
            assert_eq!(progress.under_way(), Some(number), "it has not ended");
            assert!(!seen.contains(&number), "it is another one");
            seen.push(number);
            progress.end();
            assert_eq!(progress.under_way(), None);
        }
    }
}
