//! What lies in parcels unclaimed, and that others could use.
//!
//! Invariant: an entry is there from before its value is until that has left its parcel, so nothing
//! that others could use is forgotten. A value is taken back once it is older than the grace.
//! Entered by deliveries and loans; called by the actor, and by waiters for staging.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use tokio::time::Instant;

use super::GRACE;
use crate::locks::{self, Lock};
use crate::wake::Wake;

/// A value that can be taken back from its caller.
pub(super) trait Recall: Send + Sync {
    /// Takes it back, if it was not claimed. False if it is still to be delivered.
    fn recall(&self) -> bool;
}

/// The values that lie in parcels and that others could use, oldest first.
#[derive(Default)]
pub(crate) struct Unclaimed {
    pub(super) entries: Lock<Entries, { locks::UNCLAIMED }>,
    /// Wakes the actor, which takes back what others wait for.
    wake: Option<Arc<Wake>>,
}

#[derive(Default)]
pub(super) struct Entries {
    next: u64,
    pub(super) by_age: BTreeMap<u64, (Instant, Weak<dyn Recall>)>,
}

/// A place in [`Unclaimed`], until it is dropped.
pub(super) struct Ticket(Arc<Unclaimed>, u64);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.entries.lock().by_age.remove(&self.1);
    }
}

impl Unclaimed {
    /// Values for which `wake` is called while there is a waiter.
    pub(crate) fn new(wake: Arc<Wake>) -> Self {
        Unclaimed { entries: Lock::default(), wake: Some(wake) }
    }

    pub(super) fn enter(self: &Arc<Self>, value: Weak<dyn Recall>) -> Ticket {
        let mut entries = self.entries.lock();
        let number = entries.next;
        entries.next += 1;
        let before = entries.by_age.insert(number, (Instant::now(), value));
        assert!(before.is_none(), "a ticket has its number alone");
        drop(entries);
        if let Some(wake) = &self.wake {
            wake.if_waiting();
        }
        Ticket(self.clone(), number)
    }

    /// Takes back every value older than the grace. Returns when the oldest of the others will be.
    pub(crate) fn recall(&self) -> Option<Instant> {
        let now = Instant::now();
        loop {
            let mut entries = self.entries.lock();
            let first = entries.by_age.first_entry()?;
            let due = first.get().0 + GRACE;
            if due > now || crate::planted!("unclaimed-kept") {
                return Some(due);
            }
            let (number, (_, value)) = first.remove_entry();
            drop(entries);
            let is_awaited = value.upgrade().is_some_and(|value| !value.recall());
            if is_awaited && !crate::planted!("unclaimed-forgotten") {
                // The thread that delivers it has stood still between the two steps.
                self.entries.lock().by_age.insert(number, (now, value));
            }
        }
    }
}

impl fmt::Debug for Unclaimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unclaimed").field("len", &self.entries.lock().by_age.len()).finish()
    }
}
