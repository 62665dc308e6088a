//! How the rest of the runtime wakes the actor, at no cost without waiters.
//!
//! Invariant: a waiter that is about to sleep until something is released first declares it
//! (`waiting`), then looks once more; a releaser first releases, then asks whether there is a
//! waiter. Both sides are `SeqCst`, so one of them sees the other. Called by the allocator's hook,
//! by readers that release a copy, by their waiters, and by the actor.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// The bell of the actor.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    waiting: AtomicUsize,
    bell: Notify,
    /// For waiters that are not the actor.
    released: Notify,
}

/// One waiter, until it is dropped.
#[derive(Debug)]
pub(crate) struct Waits<'a>(&'a Wake);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.remove_waiting();
    }
}

impl Wake {
    /// Wakes the actor; one that is not asleep looks around once more before it sleeps.
    pub(crate) fn now(&self) {
        self.bell.notify_one();
    }

    /// Wakes the actor and all other waiters, if there are any for what was just released.
    pub(crate) fn if_waiting(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.bell.notify_one();
            self.released.notify_waiters();
        }
    }

    /// Declares one more waiter, for as long as the value lives.
    pub(crate) fn waiting(&self) -> Waits<'_> {
        self.add_waiting();
        Waits(self)
    }

    /// Completes when something was released while there was a waiter.
    pub(crate) fn released(&self) -> Notified<'_> {
        self.released.notified()
    }

    /// Declares one more waiter, until `remove_waiting`.
    pub(crate) fn add_waiting(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn remove_waiting(&self) {
        let before = self.waiting.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "fewer wait than declared");
    }

    /// Sleeps until woken.
    pub(crate) async fn asleep(&self) {
        self.bell.notified().await;
    }
}
