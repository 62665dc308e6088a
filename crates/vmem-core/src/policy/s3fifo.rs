//! S3-FIFO: what is new waits in a small queue; only what is used there comes into the main one.
//!
//! Invariant: an entry is in the small queue, in the main one, or parked; what was evicted from
//! the small queue is remembered by its number until as many have followed as there are entries.
//! One that comes back while it is remembered goes to the main queue at once.

use std::collections::{HashMap, VecDeque};

use super::list::{NIL, Queue, Table};
use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// The small queue holds one entry in so many.
const SMALL_PART: usize = 10;
/// Uses of an entry count up to here.
const USES_MAX: u32 = 3;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct S3Fifo {
    table: Table<Value>,
    small: Queue,
    main: Queue,
    /// What is remembered, with the number of its place in `ghost_order`.
    ghosts: HashMap<u64, u64>,
    ghost_order: VecDeque<(u64, u64)>,
    ghost_number: u64,
}

#[derive(Debug)]
struct Value {
    place: Place,
    uses: u32,
    /// It was named as a victim: when it is removed, that is an eviction.
    named: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Small,
    Main,
    Parked(ParkedFrom),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParkedFrom {
    Small,
    Main,
}

impl S3Fifo {
    fn put(&mut self, at: u32, place: Place) {
        self.table.get_mut(at).value.place = place;
        match place {
            Place::Small => self.small.push_newest(&mut self.table, at),
            Place::Main => self.main.push_newest(&mut self.table, at),
            Place::Parked(_) => {}
        }
    }

    fn unlink(&mut self, at: u32) {
        match self.table.get(at).value.place {
            Place::Small => self.small.unlink(&mut self.table, at),
            Place::Main => self.main.unlink(&mut self.table, at),
            Place::Parked(_) => {}
        }
    }

    fn park(&mut self, at: u32) {
        self.unlink(at);
        let from = match self.table.get(at).value.place {
            Place::Small | Place::Parked(ParkedFrom::Small) => ParkedFrom::Small,
            Place::Main | Place::Parked(ParkedFrom::Main) => ParkedFrom::Main,
        };
        self.put(at, Place::Parked(from));
    }

    /// The oldest of the queue whose turn it is.
    fn candidate(&self) -> u32 {
        let in_queues = self.small.len + self.main.len;
        let small_turn = self.small.len * SMALL_PART > in_queues || self.main.len == 0;
        if small_turn && self.small.len > 0 { self.small.oldest } else { self.main.oldest }
    }

    /// Remembers what left the small queue.
    fn remember(&mut self, id: u64) {
        self.ghost_number += 1;
        self.ghosts.insert(id, self.ghost_number);
        self.ghost_order.push_back((id, self.ghost_number));
        while self.ghost_order.len() > self.table.len().max(1) {
            if let Some((forgotten, number)) = self.ghost_order.pop_front()
                && self.ghosts.get(&forgotten) == Some(&number)
            {
                self.ghosts.remove(&forgotten);
            }
        }
    }

    /// A look at an entry that could go. True if it is the victim.
    fn judge(&mut self, at: u32, touches: u32) -> bool {
        let value = &mut self.table.get_mut(at).value;
        value.uses = (value.uses + touches).min(USES_MAX);
        match value.place {
            Place::Small if value.uses > 1 => {
                value.uses = 0;
                self.unlink(at);
                self.put(at, Place::Main);
                false
            }
            Place::Main if value.uses > 0 => {
                value.uses -= 1;
                self.unlink(at);
                self.put(at, Place::Main);
                false
            }
            _ => {
                value.named = true;
                true
            }
        }
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, id: u64, _stamp: u64, _footprint: u64) -> Token {
        let back = self.ghosts.remove(&id).is_some();
        let place = if back { Place::Main } else { Place::Small };
        let at = self.table.add(id, Value { place, uses: 0, named: false });
        self.put(at, place);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        let at = token.0;
        self.unlink(at);
        let node = self.table.get(at);
        let (id, evicted) = (node.id, node.value.named && node.value.place == Place::Small);
        self.table.free(at);
        if evicted {
            self.remember(id);
        }
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        for _ in 0..STEPS_MAX {
            let at = self.candidate();
            if at == NIL {
                return Pick::Empty;
            }
            let id = self.table.get(at).id;
            match probe(id) {
                Probe::Evictable { touches, .. } => {
                    if self.judge(at, touches) {
                        return Pick::Victim { id, hurried: false };
                    }
                }
                Probe::Busy { .. } => {
                    let place = self.table.get(at).value.place;
                    self.unlink(at);
                    self.put(at, place);
                }
                Probe::Pinned | Probe::Gone => self.park(at),
            }
        }
        Pick::Retry
    }

    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        let from_small = limit.min(self.small.len);
        self.small.visit(&self.table, self.small.oldest, from_small, visit);
        self.main.visit(&self.table, self.main.oldest, limit - from_small, visit);
    }

    fn unpark(&mut self, token: Token) {
        match self.table.get(token.0).value.place {
            Place::Parked(ParkedFrom::Small) => self.put(token.0, Place::Small),
            Place::Parked(ParkedFrom::Main) => self.put(token.0, Place::Main),
            Place::Small | Place::Main => {}
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }
}
