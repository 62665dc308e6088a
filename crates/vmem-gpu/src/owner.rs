//! What keeps device memory that a caller has handed over.
//!
//! Invariant: it is dropped once, after its target and after the last copy that uses the memory: in
//! place where the target goes last, else on a thread for that alone. For what it runs then is
//! foreign, and may wait for long, for a lock of an interpreter say: no copy, no lease and no
//! waiter stands behind it. Called by targets, and by the calls over them.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use crate::watch::Keep;

/// Kept for the copies of a call.
pub(crate) struct Held(Mutex<Option<Keep>>);

/// The share of the target.
#[derive(Debug)]
pub(crate) struct Owner(Option<Arc<Held>>);

impl Owner {
    #[cfg(feature = "dlpack")]
    pub(crate) fn new(keep: Keep) -> Self {
        Owner(Some(Arc::new(Held(Mutex::new(Some(keep))))))
    }

    /// For a call.
    pub(crate) fn share(&self) -> Option<Arc<Held>> {
        self.0.clone().filter(|_| !vmem_core::planted!("tensor-early"))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(mut held) = self.0.take().and_then(Arc::into_inner) {
            let keep = held.0.get_mut().take();
            drop(keep);
        }
    }
}

impl Drop for Held {
    /// The last copy has ended, on a thread of ours.
    fn drop(&mut self) {
        if let Some(keep) = self.0.get_mut().take() {
            drop_elsewhere(keep);
        }
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}

/// What waits for the thread, of which there is one while anything waits.
struct Ends {
    waiting: VecDeque<Keep>,
    has_thread: bool,
}

static ENDS: Mutex<Ends> = Mutex::new(Ends { waiting: VecDeque::new(), has_thread: false });

fn drop_elsewhere(keep: Keep) {
    if vmem_core::planted!("owner-waits") {
        return drop(keep);
    }
    let mut ends = ENDS.lock();
    ends.waiting.push_back(keep);
    if ends.has_thread {
        return;
    }
    ends.has_thread = true;
    drop(ends);
    if thread::Builder::new().name("vmem-gpu-owner".to_owned()).spawn(drop_all).is_err() {
        drop_all();
    }
}

fn drop_all() {
    loop {
        let mut ends = ENDS.lock();
        let Some(keep) = ends.waiting.pop_front() else {
            ends.has_thread = false;
            return;
        };
        drop(ends);
        // A panic is that of its owner, and ends no other.
        drop(catch_unwind(AssertUnwindSafe(|| drop(keep))));
    }
}
