//! Least recently used, with an order that follows the accesses lazily.
//!
//! Invariant: an entry is filed at a stamp that is at most its real one, unless it was busy when
//! it was filed. So an entry at the cold end that was not used since it was filed is the least
//! recently used of all. One that was used since is filed anew when a look comes upon it.
//!
//! The approximation: after [`STEPS_MAX`] entries that were all used since, the look ends with the
//! oldest of those (*hurried*). Right after everything was used again this is the least recently
//! used of a sample of 64, not of all; every step of such a look is work that the next one
//! finds done, and [`Policy::settle`] does the rest in slices. With at most 64 entries, or when
//! settled, the victim is exact. Equal stamps go in an order of their own, always the same.

use std::fmt;

use super::heap::{Heap, Key};
use super::look::{Least, Look};
use super::table::{Slot, Table};
use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// The least recently used goes first.
///
/// The order of eviction of the oldest of all caches; the lazy order is described in
/// [the module](super). 40 bytes an entry; entering at the warm end O(1), else O(log n).
#[derive(Default)]
pub struct Lru {
    table: Table<Entry>,
    /// Those that are not parked.
    order: Heap,
    /// The latest stamp of any filing: the warm end.
    newest: u64,
    look: Look,
    /// Steps of `settle` since it last said that nothing is left.
    settled: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// At this place of the heap.
    Filed(u32),
    /// Out of the order; it was filed at this stamp.
    Parked(u64),
}

const _: () = assert!(size_of::<Slot<Entry>>() + size_of::<Key>() <= 48, "bytes of an entry");

/// What reports a move of the heap to the table.
macro_rules! moved {
    ($table:expr) => {
        &mut |entry, place| $table[entry].place = Place::Filed(place)
    };
}

impl Lru {
    /// Files the entry at the cold end at `stamp`.
    fn file_first(&mut self, stamp: u64) {
        self.newest = self.newest.max(stamp);
        self.order.file(0, stamp, moved!(self.table));
    }

    /// Behind all others too, or a look would meet it again before it met them.
    fn file_first_as_newest(&mut self, stamp: u64) {
        self.file_first(stamp.max(self.newest.saturating_add(1)));
    }

    fn park_first(&mut self, first: Key) {
        self.order.remove(0, moved!(self.table));
        self.table[first.entry].place = Place::Parked(first.stamp);
    }
}

impl Policy for Lru {
    fn insert(&mut self, id: u64, stamp: u64, _footprint: u64) -> Token {
        self.look.entry_came();
        self.newest = self.newest.max(stamp);
        let entry = self.table.add(Entry { id, place: Place::Parked(stamp) });
        self.order.push(Key { stamp, entry }, moved!(self.table));
        Token(entry)
    }

    fn remove(&mut self, token: Token) {
        if let Place::Filed(place) = self.table[token.0].place {
            self.order.remove(place, moved!(self.table));
        }
        self.table.take(token.0);
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let mut oldest = Least::new();
        for _ in 0..STEPS_MAX {
            let Some(first) = self.order.first() else { return Pick::Empty };
            let id = self.table[first.entry].id;
            let answer = probe(id);
            self.look.answered(answer);
            match answer {
                Probe::Evictable { stamp, .. } if stamp <= first.stamp => {
                    return Pick::Victim { id, hurried: false };
                }
                Probe::Evictable { stamp, .. } => {
                    oldest.offer(stamp, id);
                    self.file_first(stamp);
                }
                Probe::Busy { stamp } => self.file_first_as_newest(stamp),
                Probe::Pinned | Probe::Gone => self.park_first(first),
            }
            if self.look.is_all_busy(self.order.len()) {
                return Pick::Empty;
            }
        }
        let Some(id) = oldest.id() else { return Pick::Retry };
        self.settled = 0;
        Pick::Victim { id, hurried: true }
    }

    /// One run files each entry anew at most once, however much is used or busy meanwhile:
    /// under a load that never rests, a run that wanted to be right would never end.
    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        for _ in 0..steps {
            let Some(first) = self.order.first() else { break };
            match probe(self.table[first.entry].id) {
                Probe::Pinned | Probe::Gone => self.park_first(first),
                Probe::Evictable { stamp, .. } if stamp <= first.stamp => {
                    self.settled = 0;
                    return false;
                }
                Probe::Evictable { stamp, .. } => {
                    self.file_first(stamp);
                    self.settled += 1;
                }
                Probe::Busy { stamp } => {
                    self.file_first_as_newest(stamp);
                    self.settled += 1;
                }
            }
            if self.settled >= self.order.len() {
                break;
            }
        }
        let more = self.settled < self.order.len();
        if !more {
            self.settled = 0;
        }
        more
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.order.visit_smallest(limit, &mut |entry| visit(self.table[entry].id));
    }

    fn unpark(&mut self, token: Token) {
        if let Place::Parked(stamp) = self.table[token.0].place {
            self.look.entry_came();
            self.order.push(Key { stamp, entry: token.0 }, moved!(self.table));
        }
    }

    fn len(&self) -> usize {
        self.table.len()
    }

    fn memory_bytes(&self) -> usize {
        self.table.memory_bytes() + self.order.memory_bytes()
    }
}

impl fmt::Debug for Lru {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lru")
            .field("len", &self.len())
            .field("parked", &(self.len() - self.order.len()))
            .field("coldest", &self.order.first())
            .finish_non_exhaustive()
    }
}
