//! Which objects should exist.
//!
//! Invariant: an object is live from `create` until its removal has returned; in between the start
//! and the end of a removal, and for ever after one that was dropped, it is undecided. Called by
//! the model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::Model;
use super::history::History;

#[derive(Debug, Default)]
pub(super) struct Objects {
    entries: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    history: Arc<Mutex<History>>,
    len: usize,
    state: Existence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existence {
    Live,
    Undecided,
    Removed,
}

/// The objects that a store should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// These must exist.
    pub live: BTreeSet<u64>,
    /// These may exist: their removal has started and has not returned.
    pub undecided: BTreeSet<u64>,
    /// Payload of the live ones, in bytes.
    pub live_bytes: u64,
}

impl Ledger {
    /// Compares with the objects that the store says it has.
    ///
    /// # Errors
    ///
    /// What is missing and what is too much, in words.
    pub fn check(&self, actual: impl IntoIterator<Item = u64>) -> Result<(), String> {
        let actual: BTreeSet<u64> = actual.into_iter().collect();
        let missing: Vec<_> = self.live.difference(&actual).collect();
        let known: BTreeSet<u64> = self.live.union(&self.undecided).copied().collect();
        let leaked: Vec<_> = actual.difference(&known).collect();
        if missing.is_empty() && leaked.is_empty() {
            return Ok(());
        }
        Err(format!("objects lost: {missing:?}, objects leaked: {leaked:?}"))
    }
}

impl Objects {
    pub(super) fn insert(&mut self, object: u64, len: usize, history: History) {
        let entry = Entry { history: Arc::new(Mutex::new(history)), len, state: Existence::Live };
        let before = self.entries.insert(object, entry);
        let alive = before.is_some_and(|before| before.state == Existence::Live);
        assert!(!alive, "the store gave out the id {object} while its object is alive");
    }

    pub(super) fn history(&self, object: u64) -> Option<Arc<Mutex<History>>> {
        self.entries.get(&object).map(|entry| entry.history.clone())
    }

    pub(super) fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for (object, entry) in &self.entries {
            match entry.state {
                Existence::Live => {
                    ledger.live.insert(*object);
                    ledger.live_bytes += entry.len as u64;
                }
                Existence::Undecided => {
                    ledger.undecided.insert(*object);
                }
                Existence::Removed => {}
            }
        }
        ledger
    }

    fn set(&mut self, object: u64, state: Existence) {
        if let Some(entry) = self.entries.get_mut(&object) {
            entry.state = state;
        }
    }
}

/// A removal that has begun. To drop it says that its future was dropped: the object stays
/// undecided.
#[derive(Debug)]
#[must_use = "dropping the token says that the removal was abandoned"]
pub struct RemoveToken {
    model: Model,
    object: u64,
}

impl RemoveToken {
    pub(super) fn new(model: Model, object: u64) -> Self {
        let _known = model.history(object);
        model.shared.ledger.lock().set(object, Existence::Undecided);
        RemoveToken { model, object }
    }

    /// The removal returned `Ok`.
    pub fn commit(self) {
        let history = self.model.history(self.object);
        let mut history = history.lock();
        history.removed_at = history.tick();
        self.model.shared.ledger.lock().set(self.object, Existence::Removed);
    }

    /// The removal returned an error: the object is still there.
    pub fn fail(self) {
        self.model.shared.ledger.lock().set(self.object, Existence::Live);
    }
}
