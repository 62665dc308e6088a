//! SIEVE: a queue, and a hand that moves from the oldest to the newest.
//!
//! Invariant: the hand passes what was used since it last came by, and takes what was not. Nothing
//! moves on an access. A pass that has passed something over for its own reasons leaves the hand
//! before that; what it spares from there on stays marked as used until the hand comes by.
//!
//! The algorithm is that of Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU"
//! (NSDI 2024). Its *visited* bit is the object's touch counter: a probe that clears it is the
//! hand that clears the bit. Where the paper's hand would pass more than
//! [`VICTIM_STEPS_MAX`](super::VICTIM_STEPS_MAX) entries for one victim, the oldest access among
//! the last of those has to do (*hurried*).

use std::fmt;

use super::least::Least;
use super::order::{Key, Order};
use super::table::Table;
use super::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token, VICTIM_STEPS_MAX};

/// A queue with a hand that spares what was used since it last came by (NSDI 2024).
///
/// What is used once goes soon, however much of it comes; at most 55 bytes an entry; all in
/// O(log n).
#[derive(Default)]
pub struct Sieve {
    table: Table<Queued>,
    /// Those that are not parked, by when they came.
    queue: Order,
    /// How many came so far.
    came: u64,
    /// The hand is before the first entry that came then or later; where there is none, before the
    /// oldest.
    hand: u64,
}

#[derive(Debug)]
struct Queued {
    id: u64,
    came: u64,
    parked: bool,
    /// A pass saw a use of it before the hand did.
    used: bool,
}

/// What a pass remembers: a lap from `start` to the newest, and from the oldest to `start`.
#[derive(Clone, Copy, Debug, Default)]
struct Lap {
    begun: bool,
    start: u64,
    /// The next to ask, and where this half of the lap ends.
    at: u64,
    last: u64,
    wrapped: bool,
    /// The first that this lap has spared.
    spared: Option<u64>,
    /// Whether this lap has named a victim.
    found: bool,
    /// Nothing was named in the lap before, so that a use no longer spares.
    hurried: bool,
    /// Something was passed over: the hand stays before it.
    off_hand: bool,
    /// Entries asked since the last victim.
    steps: usize,
}

impl Lap {
    fn begin(&mut self, start: u64, newest: u64) {
        let hurried = self.begun && !self.found;
        *self = Lap {
            begun: true,
            start,
            at: start,
            last: newest,
            hurried,
            off_hand: self.off_hand,
            steps: self.steps,
            ..Lap::default()
        };
    }

    /// The next entry of the lap.
    fn next(&mut self, queue: &Order) -> Option<Key> {
        let mut key = queue.next_from(self.at, self.last);
        if key.is_none() && !std::mem::replace(&mut self.wrapped, true) && self.start > 0 {
            (self.at, self.last) = (0, self.start - 1);
            key = queue.next_from(self.at, self.last);
        }
        self.at = key?.rank() + 1;
        key
    }
}

impl Sieve {
    fn link(&mut self, at: u32) {
        if self.queue.last_rank().is_none_or(|last| last < self.hand) {
            self.hand = 0;
        }
        self.came += 1;
        self.table[at].came = self.came;
        self.queue.file(self.came, at);
    }
}

impl Policy for Sieve {
    fn insert(&mut self, entry: Entry) -> Token {
        let at = self.table.add(Queued { id: entry.id, came: 0, parked: false, used: false });
        self.link(at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        let entry = self.table.take(token.0);
        if !entry.parked {
            self.queue.remove(entry.came, token.0);
        }
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let lap: &mut Lap = pass.state();
        if !lap.begun {
            lap.begin(self.hand, self.came);
        }
        let mut oldest = Least::new();
        for _ in 0..STEPS_MAX {
            let Some(key) = lap.next(&self.queue) else {
                let Some(spared) = lap.spared else { return Pick::Empty };
                lap.begin(spared, self.came);
                continue;
            };
            let entry = &mut self.table[key.entry];
            lap.steps += 1;
            let hand = match probe(entry.id) {
                Probe::Evictable { touches, .. }
                    if lap.hurried || (touches == 0 && !entry.used) =>
                {
                    if !lap.off_hand {
                        (self.hand, entry.used) = (key.rank(), false);
                    }
                    (lap.found, lap.steps) = (true, 0);
                    return Pick::Victim { id: entry.id, hurried: false };
                }
                Probe::Evictable { stamp, .. } => {
                    oldest.offer(stamp, entry.id);
                    lap.spared.get_or_insert(key.rank());
                    entry.used = lap.off_hand;
                    key.rank() + 1
                }
                Probe::Busy { .. } => key.rank() + 1,
                Probe::Unfit => {
                    lap.off_hand = true;
                    continue;
                }
                Probe::Pinned | Probe::Gone => {
                    entry.parked = true;
                    self.queue.remove(key.rank(), key.entry);
                    continue;
                }
            };
            if !lap.off_hand {
                self.hand = hand;
            }
        }
        match oldest.id() {
            Some(id) if lap.steps >= VICTIM_STEPS_MAX => {
                (lap.found, lap.steps) = (true, 0);
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
        let before = self.queue.entries_from(self.hand);
        let behind = self.queue.entries_from(0).take_while(|&at| self.table[at].came < self.hand);
        before.chain(behind).take(limit).for_each(|at| visit(self.table[at].id));
    }

    fn unpark(&mut self, token: Token) {
        if std::mem::replace(&mut self.table[token.0].parked, false) {
            self.link(token.0);
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    fn memory_bytes(&self) -> usize {
        self.table.memory_bytes() + self.queue.memory_bytes()
    }
}

impl fmt::Debug for Sieve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sieve")
            .field("len", &self.len())
            .field("parked", &(self.len() - self.queue.len()))
            .field("hand", &self.hand)
            .finish_non_exhaustive()
    }
}
