//! S3-FIFO: what is new waits in a small queue; only what is used there comes into the main one.
//!
//! Invariant: an entry is in the small queue, in the main one, or parked; the bytes of each queue
//! are the sum over its entries. What was evicted from the small queue is remembered, until as
//! many have followed as there are entries nine times in ten (`ghosts.rs`); one that comes back
//! before that goes to the main queue at once.
//!
//! The algorithm is that of Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for
//! cache eviction" (SOSP 2023): the small queue has a tenth of the bytes; more than one use brings
//! an entry from it to the main queue and clears its count; the count goes up to three; a turn in
//! the main queue costs one. The share is one of the bytes that are in the queues, since a store
//! evicts at a watermark and knows no size of a cache. Where the queues would turn more than
//! [`PATIENCE_STEPS`](super::PATIENCE_STEPS) entries for one victim, the least used among the last
//! of those has to do (*hurried*).

use std::fmt;

use super::ghosts::Ghosts;
use super::list::{Node, Queue};
use super::look::{Least, Look};
use super::table::{NIL, Slot, Table};
use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// The small queue has one byte in so many.
const SMALL_PART: u128 = 10;
/// Uses of an entry count up to here.
const USES_MAX: u32 = 3;
/// An entry that is used more often than that in the small queue comes to the main one.
const USES_IN_SMALL: u8 = 1;

/// A small queue in front of a large one, and a memory of what left the small one (SOSP 2023).
///
/// What is used once goes soon, and what comes back soon stays; 32 bytes an entry, and as much
/// again for what is remembered; all in O(1).
#[derive(Default)]
pub struct S3Fifo {
    table: Table<Node<Value>>,
    /// The small and the main one.
    lanes: [Lane; 2],
    ghosts: Ghosts,
    look: Look,
}

/// A queue, and the sum of the footprints in it.
#[derive(Debug, Default)]
struct Lane {
    queue: Queue,
    bytes: u128,
}

#[derive(Debug)]
struct Value {
    footprint: u64,
    lane: Which,
    uses: u8,
    parked: bool,
    /// It was named as a victim: if it leaves the small queue by being removed, that is an
    /// eviction.
    named: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Small,
    Main,
}

const _: () = assert!(size_of::<Slot<Node<Value>>>() <= 32, "bytes of an entry");

impl S3Fifo {
    /// Appends an entry that is in no queue to the lane of its value.
    fn link(&mut self, at: u32) {
        let value = &self.table[at].value;
        let lane = &mut self.lanes[value.lane as usize];
        lane.bytes += u128::from(value.footprint);
        lane.queue.push_newest(&mut self.table, at);
    }

    fn unlink(&mut self, at: u32) {
        let value = &self.table[at].value;
        let lane = &mut self.lanes[value.lane as usize];
        lane.bytes -= u128::from(value.footprint);
        lane.queue.unlink(&mut self.table, at);
    }

    /// Puts an entry at the newest end of a lane.
    fn turn(&mut self, at: u32, which: Which) {
        self.unlink(at);
        self.table[at].value.lane = which;
        self.link(at);
    }

    /// Entries that are not parked.
    fn in_queues(&self) -> usize {
        self.lanes.iter().map(|lane| lane.queue.len).sum()
    }

    /// The oldest entry of the lane whose turn it is to give one.
    fn candidate(&self) -> u32 {
        let [small, main] = &self.lanes;
        let is_large = small.bytes * SMALL_PART >= small.bytes + main.bytes;
        let is_turn = small.queue.len > 0 && (is_large || main.queue.len == 0);
        if is_turn { small.queue.oldest } else { main.queue.oldest }
    }

    /// A look at an entry that could go. True if it is the victim.
    fn judge(&mut self, at: u32, uses: u8) -> bool {
        let value = &mut self.table[at].value;
        value.uses = match value.lane {
            Which::Small if uses > USES_IN_SMALL => 0,
            Which::Main if uses > 0 => uses - 1,
            _ => {
                (value.uses, value.named) = (uses, true);
                return true;
            }
        };
        self.turn(at, Which::Main);
        false
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, id: u64, _stamp: u64, footprint: u64) -> Token {
        self.look.entry_came();
        let lane = if self.ghosts.forget(id) { Which::Main } else { Which::Small };
        let value = Value { footprint, lane, uses: 0, parked: false, named: false };
        let at = self.table.add(Node::new(id, value));
        self.link(at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        if !self.table[token.0].value.parked {
            self.unlink(token.0);
        }
        let node = self.table.take(token.0);
        if node.value.named && node.value.lane == Which::Small {
            let entries = self.table.len() + 1;
            self.ghosts.remember(node.id, entries - entries / SMALL_PART as usize);
        }
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let mut least = Least::new();
        for _ in 0..STEPS_MAX {
            let at = self.candidate();
            if at == NIL {
                return Pick::Empty;
            }
            let Node { id, value: Value { uses, lane, .. }, .. } = self.table[at];
            let answer = probe(id);
            self.look.answered(answer);
            match answer {
                Probe::Evictable { touches, stamp } => {
                    let uses = u32::from(uses).saturating_add(touches).min(USES_MAX) as u8;
                    if self.judge(at, uses) {
                        self.look.is_over();
                        return Pick::Victim { id, hurried: false };
                    }
                    least.offer((uses, stamp), id);
                }
                Probe::Busy { .. } => self.turn(at, lane),
                Probe::Pinned | Probe::Gone => {
                    self.unlink(at);
                    self.table[at].value.parked = true;
                }
            }
            if self.look.is_all_busy(self.in_queues()) {
                return Pick::Empty;
            }
        }
        match least.id() {
            Some(id) if self.look.is_long() => {
                self.look.is_over();
                Pick::Victim { id, hurried: true }
            }
            _ => Pick::Retry,
        }
    }

    /// The queues never wait for anything.
    fn settle(&mut self, _steps: usize, _probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        false
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        let of = |lane: &Lane| lane.queue.ids_from(&self.table, lane.queue.oldest);
        let [small, main] = &self.lanes;
        of(small).chain(of(main)).take(limit).for_each(visit);
    }

    fn unpark(&mut self, token: Token) {
        let value = &mut self.table[token.0].value;
        if std::mem::replace(&mut value.parked, false) {
            self.look.entry_came();
            self.link(token.0);
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    fn memory_bytes(&self) -> usize {
        self.table.memory_bytes() + self.ghosts.memory_bytes()
    }
}

impl fmt::Debug for S3Fifo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Fifo")
            .field("lanes", &self.lanes)
            .field("parked", &(self.len() - self.in_queues()))
            .field("ghosts", &self.ghosts.len())
            .finish_non_exhaustive()
    }
}
