//! How the rest of the runtime wakes the actor, for nothing when nobody waits.
//!
//! Invariant: whoever is about to sleep until something is released first declares it
//! (`waiting`), then looks once more; whoever releases something first does it, then asks whether
//! anybody waits. Both sides are `SeqCst`, so one of them sees the other. Called by the
//! allocator's hook, by readers that let go, and by the actor.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The bell of the actor.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    waiting: AtomicUsize,
    bell: Notify,
}

impl Wake {
    /// Wakes the actor; one that is not asleep looks around once more before it sleeps.
    pub(crate) fn now(&self) {
        self.bell.notify_one();
    }

    /// Wakes the actor if anybody waits for what was just released.
    pub(crate) fn if_waiting(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.bell.notify_one();
        }
    }

    /// Declares one more, or one less, who waits.
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
