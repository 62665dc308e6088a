//! The ids that left not long ago.
//!
//! Invariant: an id is remembered once, and the queue and the index hold the same ids: forgetting
//! one leaves nothing behind. Pure; called by `s3fifo`.

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::FixedState;

#[derive(Debug, Default)]
pub(super) struct Ghosts {
    /// Ids by when they left.
    queue: BTreeMap<u64, u64>,
    /// The ids are the store's own numbers: its users cannot make them collide.
    index: HashMap<u64, u64, FixedState>,
    left: u64,
}

impl Ghosts {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Remembers `id` as the last that left, and no more than `most` ids in all.
    pub(super) fn remember(&mut self, id: u64, most: usize) {
        self.forget(id);
        self.left += 1;
        self.queue.insert(self.left, id);
        self.index.insert(id, self.left);
        while self.len() > most
            && let Some((_, oldest)) = self.queue.pop_first()
        {
            self.index.remove(&oldest);
        }
    }

    /// True if `id` was remembered.
    pub(super) fn forget(&mut self, id: u64) -> bool {
        let left = self.index.remove(&id);
        left.is_some_and(|left| self.queue.remove(&left).is_some())
    }

    /// Memory in bytes, that of the queue at most.
    pub(super) fn memory_bytes(&self) -> usize {
        self.len() * 44 + self.index.capacity() * size_of::<(u64, u64, u8)>()
    }
}
