//! SIEVE: a queue, and a hand that moves from the oldest to the newest.
//!
//! Invariant: the hand is on an entry of the queue, or before its oldest. It passes what was used
//! since it last came by, and takes what was not. Nothing moves on an access.

use super::list::{NIL, Queue, Table};
use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// See the module's documentation.
#[derive(Debug)]
pub struct Sieve {
    /// Whether an entry is parked.
    table: Table<bool>,
    queue: Queue,
    /// The next entry to look at; `NIL` is the oldest.
    hand: u32,
}

impl Default for Sieve {
    fn default() -> Self {
        Sieve { table: Table::default(), queue: Queue::default(), hand: NIL }
    }
}

impl Sieve {
    fn at_hand(&self) -> u32 {
        if self.hand == NIL { self.queue.oldest } else { self.hand }
    }

    fn unlink(&mut self, at: u32) {
        if self.hand == at {
            self.hand = self.table.get(at).newer;
        }
        self.queue.unlink(&mut self.table, at);
    }
}

impl Policy for Sieve {
    fn insert(&mut self, id: u64, _stamp: u64, _footprint: u64) -> Token {
        let at = self.table.add(id, false);
        self.queue.push_newest(&mut self.table, at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        if !self.table.get(token.0).value {
            self.unlink(token.0);
        }
        self.table.free(token.0);
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        for _ in 0..STEPS_MAX {
            let at = self.at_hand();
            if at == NIL {
                return Pick::Empty;
            }
            let id = self.table.get(at).id;
            match probe(id) {
                Probe::Evictable { touches: 0, .. } => {
                    self.hand = at;
                    return Pick::Victim { id, hurried: false };
                }
                Probe::Evictable { .. } | Probe::Busy { .. } => {
                    self.hand = self.table.get(at).newer;
                }
                Probe::Pinned | Probe::Gone => {
                    self.unlink(at);
                    self.table.get_mut(at).value = true;
                }
            }
        }
        Pick::Retry
    }

    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.queue.visit(&self.table, self.at_hand(), limit, visit);
    }

    fn unpark(&mut self, token: Token) {
        let node = self.table.get_mut(token.0);
        if std::mem::replace(&mut node.value, false) {
            self.queue.push_newest(&mut self.table, token.0);
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }
}
