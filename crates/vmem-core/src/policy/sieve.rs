//! SIEVE: a queue, and a hand that moves from the oldest to the newest.
//!
//! Invariant: the hand is on an entry of the queue, or before its oldest. It passes what was used
//! since it last came by, and takes what was not. Nothing moves on an access.
//!
//! The algorithm is that of Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU"
//! (NSDI 2024). Its *visited* bit is the object's touch counter: a probe that clears it is the
//! hand that clears the bit. Where the paper's hand would pass more than
//! [`PATIENCE_STEPS`](super::PATIENCE_STEPS) entries for one victim, the oldest access among the
//! last of those has to do (*hurried*).

use std::fmt;

use super::list::{Node, Queue};
use super::look::{Least, Look};
use super::table::{NIL, Table};
use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// A queue with a hand that spares what was used since it last came by (NSDI 2024).
///
/// What is used once goes soon, however much of it comes; 24 bytes an entry; all in O(1).
pub struct Sieve {
    table: Table<Node<Parked>>,
    queue: Queue,
    /// The next entry to look at; `NIL` is the oldest.
    hand: u32,
    look: Look,
}

/// Whether an entry is out of the queue.
type Parked = bool;

impl Default for Sieve {
    fn default() -> Self {
        Sieve { table: Table::default(), queue: Queue::default(), hand: NIL, look: Look::default() }
    }
}

impl Sieve {
    fn at_hand(&self) -> u32 {
        if self.hand == NIL { self.queue.oldest } else { self.hand }
    }

    fn unlink(&mut self, at: u32) {
        if self.hand == at {
            self.hand = self.table[at].newer;
        }
        self.queue.unlink(&mut self.table, at);
    }
}

impl Policy for Sieve {
    fn insert(&mut self, id: u64, _stamp: u64, _footprint: u64) -> Token {
        self.look.entry_came();
        let at = self.table.add(Node::new(id, false));
        self.queue.push_newest(&mut self.table, at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        if !self.table[token.0].value {
            self.unlink(token.0);
        }
        self.table.take(token.0);
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let mut oldest = Least::new();
        for _ in 0..STEPS_MAX {
            let at = self.at_hand();
            if at == NIL {
                return Pick::Empty;
            }
            let id = self.table[at].id;
            let answer = probe(id);
            self.look.answered(answer);
            match answer {
                Probe::Evictable { touches: 0, .. } => {
                    self.hand = at;
                    self.look.is_over();
                    return Pick::Victim { id, hurried: false };
                }
                Probe::Evictable { stamp, .. } => {
                    oldest.offer(stamp, id);
                    self.hand = self.table[at].newer;
                }
                Probe::Busy { .. } => self.hand = self.table[at].newer,
                Probe::Pinned | Probe::Gone => {
                    self.unlink(at);
                    self.table[at].value = true;
                }
            }
            if self.look.is_all_busy(self.queue.len) {
                return Pick::Empty;
            }
        }
        match oldest.id() {
            Some(id) if self.look.is_long() => {
                self.look.is_over();
                Pick::Victim { id, hurried: true }
            }
            _ => Pick::Retry,
        }
    }

    /// The queue never waits for anything.
    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.queue.ids_from(&self.table, self.at_hand()).take(limit).for_each(visit);
    }

    fn unpark(&mut self, token: Token) {
        let node = &mut self.table[token.0];
        if std::mem::replace(&mut node.value, false) {
            self.look.entry_came();
            self.queue.push_newest(&mut self.table, token.0);
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    fn memory_bytes(&self) -> usize {
        self.table.memory_bytes()
    }
}

impl fmt::Debug for Sieve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sieve")
            .field("len", &self.len())
            .field("parked", &(self.len() - self.queue.len))
            .field("hand", &self.hand)
            .finish_non_exhaustive()
    }
}
