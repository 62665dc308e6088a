//! The order of the least recently used: a heap that knows where each entry is.
//!
//! Invariant: no key is greater than its children, and after each call every key that moved was
//! reported with its new position. Entries are removed from the middle too, so nothing stale is
//! ever in it. Four children a node: half the depth of a binary heap, and a node's children lie
//! side by side. Pure; called by `lru`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::table::Chunked;

const ARITY: usize = 4;

/// A stamp, and the entry that is filed there. Equal stamps are ordered by position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) stamp: u64,
    pub(super) entry: u32,
}

/// Told that an entry (first) is at a place (second) from now on.
pub(super) trait Moved: FnMut(u32, u32) {}
impl<F: FnMut(u32, u32)> Moved for F {}

#[derive(Debug, Default)]
pub(super) struct Heap {
    keys: Chunked<Key>,
}

impl Heap {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The smallest key.
    pub(super) fn first(&self) -> Option<Key> {
        (self.keys.len() > 0).then(|| self.keys[0])
    }

    pub(super) fn push(&mut self, key: Key, moved: &mut impl Moved) {
        self.keys.push(key);
        self.rise(self.keys.len() - 1, key, moved);
    }

    /// Takes the key at `place` out.
    pub(super) fn remove(&mut self, place: u32, moved: &mut impl Moved) {
        let place = place as usize;
        let last = self.keys.pop().expect("a heap that knows a place is not empty");
        if place < self.keys.len() {
            self.put(place, last, moved);
        }
    }

    /// Files the entry at `place` under another stamp.
    pub(super) fn file(&mut self, place: u32, stamp: u64, moved: &mut impl Moved) {
        let place = place as usize;
        let key = Key { stamp, ..self.keys[place] };
        self.put(place, key, moved);
    }

    /// Shows up to `limit` entries, the smallest key first, in O(limit log limit).
    pub(super) fn visit_smallest(&self, limit: usize, visit: &mut dyn FnMut(u32)) {
        let mut frontier = BinaryHeap::new();
        frontier.extend(self.first().map(|key| Reverse((key, 0))));
        for _ in 0..limit {
            let Some(Reverse((key, place))) = frontier.pop() else { return };
            visit(key.entry);
            let children = self.children(place);
            frontier.extend(children.map(|child| Reverse((self.keys[child], child))));
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.keys.memory_bytes()
    }

    fn children(&self, place: usize) -> std::ops::Range<usize> {
        let len = self.keys.len();
        (place * ARITY + 1).min(len)..(place * ARITY + 1 + ARITY).min(len)
    }

    /// Puts `key` where the key at `place` was, and from there where it belongs.
    fn put(&mut self, place: usize, key: Key, moved: &mut impl Moved) {
        if place > 0 && key < self.keys[(place - 1) / ARITY] {
            self.rise(place, key, moved);
        } else {
            self.sink(place, key, moved);
        }
    }

    fn rise(&mut self, mut place: usize, key: Key, moved: &mut impl Moved) {
        while place > 0 {
            let parent = (place - 1) / ARITY;
            let above = self.keys[parent];
            if above <= key {
                break;
            }
            self.set(place, above, moved);
            place = parent;
        }
        self.set(place, key, moved);
    }

    fn sink(&mut self, mut place: usize, key: Key, moved: &mut impl Moved) {
        while let Some(child) = self.children(place).min_by_key(|&child| self.keys[child]) {
            let below = self.keys[child];
            if key <= below {
                break;
            }
            self.set(place, below, moved);
            place = child;
        }
        self.set(place, key, moved);
    }

    fn set(&mut self, place: usize, key: Key, moved: &mut impl Moved) {
        self.keys[place] = key;
        moved(key.entry, place as u32);
    }
}
