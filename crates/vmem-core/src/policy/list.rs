//! Doubly linked queues over one table of entries.
//!
//! Invariant: an entry is in one queue or in none; positions stay the same for as long as an entry
//! lives. Pure; called by the queue-based policies.

use super::table::{NIL, Table};

/// One entry, with what the policy keeps of it.
#[derive(Debug)]
pub(super) struct Node<T> {
    pub(super) id: u64,
    pub(super) value: T,
    /// Towards the newest.
    pub(super) newer: u32,
    /// Towards the oldest.
    older: u32,
}

impl<T> Node<T> {
    /// In no queue yet.
    pub(super) fn new(id: u64, value: T) -> Self {
        Node { id, value, newer: NIL, older: NIL }
    }
}

/// The ends of one queue.
#[derive(Debug)]
pub(super) struct Queue {
    newest: u32,
    pub(super) oldest: u32,
    pub(super) len: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { newest: NIL, oldest: NIL, len: 0 }
    }
}

impl Queue {
    pub(super) fn push_newest<T>(&mut self, table: &mut Table<Node<T>>, at: u32) {
        let before = self.newest;
        let node = &mut table[at];
        (node.newer, node.older) = (NIL, before);
        match before {
            NIL => self.oldest = at,
            before => table[before].newer = at,
        }
        self.newest = at;
        self.len += 1;
    }

    pub(super) fn unlink<T>(&mut self, table: &mut Table<Node<T>>, at: u32) {
        let (newer, older) = (table[at].newer, table[at].older);
        match newer {
            NIL => self.newest = older,
            newer => table[newer].older = older,
        }
        match older {
            NIL => self.oldest = newer,
            older => table[older].newer = newer,
        }
        self.len -= 1;
    }

    /// Ids from the entry `from` towards the newest.
    pub(super) fn ids_from<'a, T>(
        &self,
        table: &'a Table<Node<T>>,
        from: u32,
    ) -> impl Iterator<Item = u64> + use<'a, T> {
        let known = |at: u32| (at != NIL).then_some(at);
        std::iter::successors(known(from), move |&at| known(table[at].newer)).map(|at| table[at].id)
    }
}
