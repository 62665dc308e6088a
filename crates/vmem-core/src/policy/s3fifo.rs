//! S3-FIFO: what is new waits in a small queue; only what is used there comes into the main one.
//!
//! Invariant: an entry is in the small queue, in the main one, or parked; the bytes of each queue
//! are the sum over its entries. What was evicted from the small queue is remembered, until as
//! many have followed as there are entries nine times in ten (`ghosts.rs`); one that comes back
//! before that goes to the main queue at once. What a pass passes over for its own reasons keeps
//! its place and its uses.
//!
//! The algorithm is that of Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for
//! cache eviction" (SOSP 2023): the small queue has a tenth of the bytes; more than one use brings
//! an entry from it to the main queue and clears its count; the count ends at three; a turn in
//! the main queue costs one. The share is one of the bytes that are in the queues, since a store
//! evicts at a watermark and knows no size of a cache. Where the queues would turn more than
//! [`VICTIM_STEPS_MAX`](super::VICTIM_STEPS_MAX) entries for one victim, the least used among the
//! last of those has to do (*hurried*).

use std::fmt;

use super::ghosts::Ghosts;
use super::least::Least;
use super::order::{KEY_BYTES_MAX, Key, Order};
use super::table::{Slot, Table};
use super::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token, VICTIM_STEPS_MAX};

/// The small queue has one byte in this many.
const SMALL_PART: u128 = 10;
/// Uses of an entry count up to here.
const USES_MAX: u32 = 3;
/// An entry that is used more often than that in the small queue comes to the main one.
const USES_IN_SMALL: u8 = 1;

/// A small queue in front of a large one, and a memory of what left the small one (SOSP 2023).
///
/// What is used once goes soon, and what comes back soon stays; at most 63 bytes an entry, and as
/// much again for what is remembered; all in O(log n).
#[derive(Default)]
pub struct S3Fifo {
    table: Table<Queued>,
    /// The small and the main one.
    lanes: [Lane; 2],
    ghosts: Ghosts,
    /// How often an entry was put at the newest end of a lane.
    turns: u64,
}

/// A queue by turns, and the sum of the footprints in it.
#[derive(Debug, Default)]
struct Lane {
    queue: Order,
    bytes: u128,
}

#[derive(Debug)]
struct Queued {
    id: u64,
    footprint: u64,
    /// Where it is filed, or was when it was parked.
    turn: u64,
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

const _: () = assert!(size_of::<Slot<Queued>>() + KEY_BYTES_MAX <= 64, "bytes of an entry");

/// What a pass remembers: how far it is in each lane, and where the lane ends for it.
#[derive(Clone, Copy, Debug, Default)]
struct Begun {
    begun: bool,
    at: [Option<Key>; 2],
    last: [u64; 2],
    /// Some were put behind the end of the main lane: they are asked once more.
    spared: bool,
    /// Entries asked, and how often the main lane was followed further, since the last victim.
    steps: usize,
    laps: u32,
}

impl Begun {
    fn found(&mut self) {
        (self.steps, self.laps) = (0, 0);
    }

    /// By now each entry was spared as often as its uses say.
    fn is_hurried(&self) -> bool {
        self.laps > USES_MAX + 1
    }
}

impl S3Fifo {
    /// Appends an entry that is in no queue to the lane of its value.
    fn link(&mut self, at: u32) {
        self.turns += 1;
        let entry = &mut self.table[at];
        entry.turn = self.turns;
        let lane = &mut self.lanes[entry.lane as usize];
        lane.bytes += u128::from(entry.footprint);
        lane.queue.file(self.turns, at);
    }

    fn unlink(&mut self, at: u32) {
        let entry = &self.table[at];
        let lane = &mut self.lanes[entry.lane as usize];
        lane.bytes -= u128::from(entry.footprint);
        lane.queue.remove(entry.turn, at);
    }

    /// Puts an entry at the newest end of a lane.
    fn turn(&mut self, at: u32, which: Which) {
        self.unlink(at);
        self.table[at].lane = which;
        self.link(at);
    }

    /// Entries that are not parked.
    fn in_queues(&self) -> usize {
        self.lanes.iter().map(|lane| lane.queue.len()).sum()
    }

    /// The next entry of the lane whose turn it is to give one.
    fn candidate(&self, pass: &mut Begun) -> Option<u32> {
        let [small, main] = &self.lanes;
        let next_small = small.queue.next(pass.at[0], pass.last[0]);
        let mut next_main = main.queue.next(pass.at[1], pass.last[1]);
        if next_main.is_none() && std::mem::take(&mut pass.spared) {
            pass.last[1] = self.turns;
            pass.laps += 1;
            next_main = main.queue.next(pass.at[1], pass.last[1]);
        }
        let is_large = small.bytes * SMALL_PART >= small.bytes + main.bytes;
        let is_turn = next_small.is_some() && (is_large || next_main.is_none());
        let key = if is_turn { next_small } else { next_main }?;
        pass.at[usize::from(!is_turn)] = Some(key);
        Some(key.entry)
    }

    /// A look at an entry that could go. True if it is the victim.
    fn judge(&mut self, at: u32, uses: u8, is_hurried: bool) -> bool {
        let entry = &mut self.table[at];
        entry.uses = match entry.lane {
            Which::Small if uses > USES_IN_SMALL => 0,
            Which::Main if uses > 0 && !is_hurried => uses - 1,
            _ => {
                (entry.uses, entry.named) = (uses, true);
                return true;
            }
        };
        self.turn(at, Which::Main);
        false
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, entry: Entry) -> Token {
        let Entry { id, footprint, .. } = entry;
        let lane = if self.ghosts.forget(id) { Which::Main } else { Which::Small };
        let queued = Queued { id, footprint, turn: 0, lane, uses: 0, parked: false, named: false };
        let at = self.table.add(queued);
        self.link(at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        if !self.table[token.0].parked {
            self.unlink(token.0);
        }
        let entry = self.table.take(token.0);
        if entry.named && entry.lane == Which::Small {
            let entries = self.table.len() + 1;
            self.ghosts.remember(entry.id, entries - entries / SMALL_PART as usize);
        }
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let pass: &mut Begun = pass.state();
        if !std::mem::replace(&mut pass.begun, true) {
            pass.last = [self.turns; 2];
        }
        let mut least = Least::new();
        for _ in 0..STEPS_MAX {
            let Some(at) = self.candidate(pass) else { return Pick::Empty };
            let Queued { id, uses, lane, .. } = self.table[at];
            pass.steps += 1;
            match probe(id) {
                Probe::Evictable { touches, stamp } => {
                    let uses = u32::from(uses).saturating_add(touches).min(USES_MAX) as u8;
                    if self.judge(at, uses, pass.is_hurried()) {
                        pass.found();
                        return Pick::Victim { id, hurried: false };
                    }
                    pass.spared = true;
                    least.offer((uses, stamp), id);
                }
                Probe::Busy { .. } => self.turn(at, lane),
                Probe::Unfit => {}
                Probe::Pinned | Probe::Gone => {
                    self.unlink(at);
                    self.table[at].parked = true;
                }
            }
        }
        match least.id() {
            Some(id) if pass.steps >= VICTIM_STEPS_MAX => {
                pass.found();
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
        let entries = self.lanes.iter().flat_map(|lane| lane.queue.entries_from(0));
        entries.take(limit).for_each(|at| visit(self.table[at].id));
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
        self.table.memory_bytes()
            + self.lanes.iter().map(|lane| lane.queue.memory_bytes()).sum::<usize>()
            + self.ghosts.memory_bytes()
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
