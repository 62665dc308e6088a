//! Entries in the order of a rank, which a look can walk and be interrupted anywhere.
//!
//! Invariant: an entry is filed once. A look remembers the key that it was at, and goes on behind
//! it, whatever was filed, moved or removed meanwhile. Every operation costs O(log entries). Pure;
//! called by the policies.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Included};

/// A rank and the entry that is filed there: 12 bytes. Equal ranks go by position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    high: u32,
    low: u32,
    pub(super) entry: u32,
}

impl Key {
    pub(super) fn new(rank: u64, entry: u32) -> Self {
        Key { high: (rank >> 32) as u32, low: rank as u32, entry }
    }

    pub(super) fn rank(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

/// Keys in a leaf and in an inner node of the standard library's tree, at most and at least.
const NODE_KEYS: (usize, usize) = (11, 5);
/// Bytes of a leaf, and of an inner node.
const NODE_BYTES: (usize, usize) =
    (NODE_KEYS.0 * size_of::<Key>() + 12, NODE_KEYS.0 * size_of::<Key>() + 12 + 12 * 8);
/// The most bytes of a key: each leaf has one key above it.
pub(super) const KEY_BYTES_MAX: usize = NODE_BYTES.0.div_ceil(NODE_KEYS.1 + 1)
    + NODE_BYTES.1.div_ceil((NODE_KEYS.1 + 1) * (NODE_KEYS.1 + 1));

#[derive(Debug, Default)]
pub(super) struct Order(BTreeSet<Key>);

impl Order {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn file(&mut self, rank: u64, entry: u32) {
        let is_new = self.0.insert(Key::new(rank, entry));
        assert!(is_new, "an entry is filed once");
    }

    pub(super) fn remove(&mut self, rank: u64, entry: u32) {
        let was_there = self.0.remove(&Key::new(rank, entry));
        assert!(was_there, "an entry is where it was filed");
    }

    /// The first key behind `after` with a rank of at most `last`.
    pub(super) fn next(&self, after: Option<Key>, last: u64) -> Option<Key> {
        let from = after.map_or(Included(Key::default()), Excluded);
        self.0
            .range((from, Included(Key::new(u64::MAX, u32::MAX))))
            .next()
            .copied()
            .filter(|key| key.rank() <= last)
    }

    /// The first key with a rank of at least `from` and at most `last`.
    pub(super) fn next_from(&self, from: u64, last: u64) -> Option<Key> {
        let key = self.0.range(Key::new(from, 0)..).next().copied();
        key.filter(|key| key.rank() <= last)
    }

    /// The last key with a rank below `before`.
    pub(super) fn last_before(&self, before: u64) -> Option<Key> {
        self.0.range(..Key::new(before, 0)).next_back().copied()
    }

    /// The last rank.
    pub(super) fn last_rank(&self) -> Option<u64> {
        self.0.last().map(|key| key.rank())
    }

    /// Entries with a rank of at least `from`, in order.
    pub(super) fn entries_from(&self, from: u64) -> impl Iterator<Item = u32> + '_ {
        self.0.range(Key::new(from, 0)..).map(|key| key.entry)
    }

    /// Memory of the order, in bytes, at most.
    pub(super) fn memory_bytes(&self) -> usize {
        self.len() * KEY_BYTES_MAX
    }
}
