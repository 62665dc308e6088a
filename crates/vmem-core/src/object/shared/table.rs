//! The objects of a store, by their numbers.
//!
//! Invariant: an entry is one pointer, to an object whose number is its key. So a shard that grows
//! looks at each of its objects, and there are many shards, to keep that short. Nothing else is
//! locked under a shard's lock. Owned by `Shared`.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use dashmap::DashMap;
use foldhash::fast::FixedState;

use crate::object::Object;

const SHARDS: usize = 128;

/// See the module's documentation.
pub(super) struct Table(DashMap<ByNumber, (), FixedState>);

struct ByNumber(Arc<Object>);

impl Borrow<u64> for ByNumber {
    fn borrow(&self) -> &u64 {
        &self.0.id
    }
}

impl Hash for ByNumber {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id.hash(state);
    }
}

impl PartialEq for ByNumber {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ByNumber {}

impl Table {
    pub(super) fn new() -> Self {
        Table(DashMap::with_hasher_and_shard_amount(FixedState::default(), SHARDS))
    }

    pub(super) fn insert(&self, object: Arc<Object>) {
        let before = self.0.insert(ByNumber(object), ());
        assert!(before.is_none(), "no two objects have one number");
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Object>> {
        let found = self.0.get(&id).map(|entry| entry.key().0.clone());
        debug_assert!(found.as_ref().is_none_or(|object| object.id == id), "a key is a number");
        found
    }

    pub(super) fn remove(&self, id: u64) {
        // What it returns is dropped here, where no shard is locked.
        drop(self.0.remove(&id));
    }

    pub(super) fn all(&self) -> Vec<Arc<Object>> {
        self.0.iter().map(|entry| entry.key().0.clone()).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
