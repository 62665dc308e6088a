//! The ids that left not long ago.
//!
//! Invariant: an id is remembered once, and the queue and the index hold the same ids: forgetting
//! one leaves nothing behind. Pure; called by `s3fifo`.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use super::list::{Node, Queue};
use super::table::Table;

#[derive(Debug, Default)]
pub(super) struct Ghosts {
    table: Table<Node<()>>,
    queue: Queue,
    /// The ids are the store's own numbers: nobody outside can make them collide.
    index: HashMap<u64, u32, FixedState>,
}

impl Ghosts {
    pub(super) fn len(&self) -> usize {
        self.queue.len
    }

    /// Remembers `id` as the last that left, and no more than `most` ids in all.
    pub(super) fn remember(&mut self, id: u64, most: usize) {
        self.forget(id);
        let at = self.table.add(Node::new(id, ()));
        self.queue.push_newest(&mut self.table, at);
        self.index.insert(id, at);
        while self.len() > most {
            let oldest = self.table[self.queue.oldest].id;
            self.forget(oldest);
        }
    }

    /// True if `id` was remembered.
    pub(super) fn forget(&mut self, id: u64) -> bool {
        let Some(at) = self.index.remove(&id) else { return false };
        self.queue.unlink(&mut self.table, at);
        self.table.take(at);
        true
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.table.memory_bytes() + self.index.capacity() * size_of::<(u64, u32, u8)>()
    }
}
