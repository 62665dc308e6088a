//! Doubly linked queues over one table of entries.
//!
//! Invariant: an entry is in one queue or in none; positions stay the same for as long as an entry
//! lives. Pure; called by the queue-based policies.

/// No entry.
pub(super) const NIL: u32 = u32::MAX;

/// One entry, with what the policy keeps of it.
#[derive(Debug)]
pub(super) struct Node<T> {
    pub(super) id: u64,
    pub(super) value: T,
    /// Towards the newest.
    pub(super) newer: u32,
    /// Towards the oldest.
    pub(super) older: u32,
}

/// The table.
#[derive(Debug)]
pub(super) struct Table<T> {
    nodes: Vec<Node<T>>,
    vacant: Vec<u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { nodes: Vec::new(), vacant: Vec::new() }
    }
}

impl<T> Table<T> {
    pub(super) fn add(&mut self, id: u64, value: T) -> u32 {
        let node = Node { id, value, newer: NIL, older: NIL };
        match self.vacant.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        }
    }

    pub(super) fn free(&mut self, at: u32) {
        self.vacant.push(at);
    }

    pub(super) fn get(&self, at: u32) -> &Node<T> {
        &self.nodes[at as usize]
    }

    pub(super) fn get_mut(&mut self, at: u32) -> &mut Node<T> {
        &mut self.nodes[at as usize]
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }
}

/// The ends of one queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) newest: u32,
    pub(super) oldest: u32,
    pub(super) len: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { newest: NIL, oldest: NIL, len: 0 }
    }
}

impl Queue {
    pub(super) fn push_newest<T>(&mut self, table: &mut Table<T>, at: u32) {
        let before = self.newest;
        let node = table.get_mut(at);
        (node.newer, node.older) = (NIL, before);
        match before {
            NIL => self.oldest = at,
            before => table.get_mut(before).newer = at,
        }
        self.newest = at;
        self.len += 1;
    }

    pub(super) fn unlink<T>(&mut self, table: &mut Table<T>, at: u32) {
        let (newer, older) = (table.get(at).newer, table.get(at).older);
        match newer {
            NIL => self.newest = older,
            newer => table.get_mut(newer).older = older,
        }
        match older {
            NIL => self.oldest = newer,
            older => table.get_mut(older).newer = newer,
        }
        self.len -= 1;
    }

    /// Visits ids from `from` towards the newest.
    pub(super) fn visit<T>(
        &self,
        table: &Table<T>,
        from: u32,
        limit: usize,
        visit: &mut dyn FnMut(u64),
    ) {
        let mut at = from;
        for _ in 0..limit {
            if at == NIL {
                return;
            }
            visit(table.get(at).id);
            at = table.get(at).newer;
        }
    }
}
