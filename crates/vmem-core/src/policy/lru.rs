//! Least recently used, with an order that follows the accesses lazily.
//!
//! Invariant: an entry is filed at a stamp that is at most its real one, unless it was busy when
//! it was filed, or entered while a pass was under way. So an entry at the cold end that was not
//! used since it was filed is the least recently used of all. One that was used since is filed anew
//! when a look comes upon it.
//!
//! The approximation: after [`STEPS_MAX`] entries of which some were used since and none can go as
//! it stands, the look ends with the oldest of those (*hurried*). Right after everything was used
//! again this is the least recently used of a sample of 64, not of all; every step of such a look
//! is work that the next one finds done, and [`Policy::settle`] does the rest in slices. With at
//! most 64 entries, or when settled, the victim is exact. Equal stamps go in an order of their own,
//! always the same.

use std::fmt;
use std::sync::Arc;

use super::least::Least;
use super::order::{KEY_BYTES_MAX, Key, Order};
use super::table::{Slot, Table};
use super::{Entry, Pass, Pick, Policy, Probe, STEPS_MAX, Token};

/// The least recently used goes first.
///
/// The order of eviction of the oldest of all caches; the lazy order is described in
/// [the module](super). At most 55 bytes an entry; all in O(log n).
#[derive(Default)]
pub struct Lru {
    table: Table<Filed>,
    /// Those that are not parked, by stamp.
    order: Order,
    /// The latest stamp of any filing: the warm end.
    newest: u64,
    /// The run of `settle` that is under way.
    settling: Option<Walk>,
    /// Shared by the passes that are under way.
    passes: Arc<()>,
}

#[derive(Clone, Copy, Debug)]
struct Filed {
    id: u64,
    /// Where it is filed, or was when it was parked.
    stamp: u64,
    parked: bool,
}

/// A walk from the cold end up to what was the warm end when it began.
#[derive(Clone, Copy, Debug)]
struct Walk {
    after: Option<Key>,
    last: u64,
}

/// What a pass remembers.
#[derive(Default)]
struct Begun {
    walk: Option<Walk>,
    /// Some were used since they were filed, and stand behind the end of the walk now.
    spared: bool,
    _passes: Arc<()>,
}

const _: () = assert!(size_of::<Slot<Filed>>() + KEY_BYTES_MAX <= 56, "bytes of an entry");

impl Lru {
    fn walk(&self) -> Walk {
        Walk { after: None, last: self.newest }
    }

    fn file(&mut self, at: u32, stamp: u64) {
        let entry = &mut self.table[at];
        self.order.remove(entry.stamp, at);
        entry.stamp = stamp;
        self.order.file(stamp, at);
        self.newest = self.newest.max(stamp);
    }

    /// Behind all others, or the look would meet it again before it met them.
    fn file_as_newest(&mut self, at: u32, stamp: u64) {
        self.file(at, stamp.max(self.newest.saturating_add(1)));
    }

    /// Files an entry that is not in the order: behind the passes that are under way.
    fn enter(&mut self, at: u32) {
        let entry = &mut self.table[at];
        if Arc::strong_count(&self.passes) > 1 {
            entry.stamp = entry.stamp.max(self.newest.saturating_add(1));
        }
        self.order.file(entry.stamp, at);
        self.newest = self.newest.max(entry.stamp);
    }

    fn park(&mut self, at: u32) {
        let entry = &mut self.table[at];
        entry.parked = true;
        self.order.remove(entry.stamp, at);
    }
}

impl Policy for Lru {
    fn insert(&mut self, entry: Entry) -> Token {
        let Entry { id, stamp, .. } = entry;
        let at = self.table.add(Filed { id, stamp, parked: false });
        self.enter(at);
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        let entry = self.table.take(token.0);
        if !entry.parked {
            self.order.remove(entry.stamp, token.0);
        }
    }

    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let last = pass.limit().map_or(u64::MAX, |limit| limit.saturating_sub(1));
        let begun: &mut Begun = pass.state();
        let mut walk = *begun.walk.get_or_insert_with(|| {
            begun._passes = self.passes.clone();
            self.walk()
        });
        let mut oldest = Least::new();
        let mut pick = Pick::Retry;
        for _ in 0..STEPS_MAX {
            let Some(key) = self.order.next(walk.after, walk.last.min(last)) else {
                if !std::mem::take(&mut begun.spared) {
                    pick = Pick::Empty;
                    break;
                }
                walk.last = self.newest;
                continue;
            };
            walk.after = Some(key);
            let id = self.table[key.entry].id;
            match probe(id) {
                Probe::Evictable { stamp, .. } if stamp <= key.rank() => {
                    begun.walk = Some(walk);
                    return Pick::Victim { id, hurried: false };
                }
                Probe::Evictable { stamp, .. } => {
                    oldest.offer(stamp, id);
                    begun.spared = true;
                    self.file(key.entry, stamp);
                }
                Probe::Busy { stamp } => self.file_as_newest(key.entry, stamp),
                Probe::Unfit => {}
                Probe::Pinned | Probe::Gone => self.park(key.entry),
            }
        }
        begun.walk = Some(walk);
        let Some(id) = oldest.id() else { return pick };
        self.settling = None;
        Pick::Victim { id, hurried: true }
    }

    /// One run asks each entry at most once, however much is used or busy meanwhile: under a load
    /// that never rests, a run that wanted to be right would never end.
    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        let mut walk = self.settling.take().unwrap_or_else(|| self.walk());
        for _ in 0..steps {
            let Some(key) = self.order.next(walk.after, walk.last) else { return false };
            walk.after = Some(key);
            match probe(self.table[key.entry].id) {
                Probe::Evictable { stamp, .. } if stamp <= key.rank() => return false,
                Probe::Evictable { stamp, .. } => self.file(key.entry, stamp),
                Probe::Busy { stamp } => self.file_as_newest(key.entry, stamp),
                Probe::Unfit => {}
                Probe::Pinned | Probe::Gone => self.park(key.entry),
            }
        }
        self.settling = Some(walk);
        self.order.next(walk.after, walk.last).is_some()
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        let entries = self.order.entries_from(0).take(limit);
        entries.for_each(|at| visit(self.table[at].id));
    }

    fn unpark(&mut self, token: Token) {
        if std::mem::replace(&mut self.table[token.0].parked, false) {
            self.enter(token.0);
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
            .field("newest", &self.newest)
            .finish_non_exhaustive()
    }
}
