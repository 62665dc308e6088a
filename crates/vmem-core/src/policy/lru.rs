//! Least recently used, with an order that follows the accesses lazily.
//!
//! Invariant: an entry is filed at a stamp that is at most its real one, so an entry at the
//! cold end whose filed stamp is its real stamp is the least recently used of all. One that
//! was used since it was filed is filed anew when a look comes upon it. After [`STEPS_MAX`] of those
//! the oldest that the look has seen has to do (*hurried*): that happens only when very much was
//! used again since the last look, and [`Policy::settle`] catches up in slices.

use std::collections::BTreeSet;

use super::{Pick, Policy, Probe, STEPS_MAX, Token};

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Lru {
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    /// Filed stamp and position of every entry that is not parked.
    order: BTreeSet<(u64, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    filed: u64,
    parked: bool,
}

impl Lru {
    fn file(&mut self, at: u32, stamp: u64) {
        let entry = &mut self.entries[at as usize];
        self.order.remove(&(entry.filed, at));
        entry.filed = entry.filed.max(stamp);
        entry.parked = false;
        self.order.insert((entry.filed, at));
    }

    fn park(&mut self, at: u32) {
        let entry = &mut self.entries[at as usize];
        self.order.remove(&(entry.filed, at));
        entry.parked = true;
    }
}

impl Policy for Lru {
    fn insert(&mut self, id: u64, stamp: u64, _footprint: u64) -> Token {
        let entry = Entry { id, filed: stamp, parked: false };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.order.insert((stamp, at));
        Token(at)
    }

    fn remove(&mut self, token: Token) {
        let entry = self.entries[token.0 as usize];
        if !entry.parked {
            let filed = self.order.remove(&(entry.filed, token.0));
            assert!(filed, "an entry that is not parked is in the order");
        }
        self.vacant.push(token.0);
    }

    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick {
        let mut oldest: Option<(u64, u64)> = None;
        for _ in 0..STEPS_MAX {
            let Some(&(filed, at)) = self.order.first() else { return Pick::Empty };
            let id = self.entries[at as usize].id;
            match probe(id) {
                Probe::Evictable { stamp, .. } if stamp <= filed => {
                    return Pick::Victim { id, hurried: false };
                }
                Probe::Evictable { stamp, .. } => {
                    oldest = Some(oldest.map_or((stamp, id), |old| old.min((stamp, id))));
                    self.file(at, stamp);
                }
                // One step further than filed, at least: the look must not meet it at once again.
                Probe::Busy { stamp } => self.file(at, stamp.max(filed + 1)),
                Probe::Pinned | Probe::Gone => self.park(at),
            }
        }
        oldest.map_or(Pick::Retry, |(_, id)| Pick::Victim { id, hurried: true })
    }

    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool {
        for _ in 0..steps {
            let Some(&(filed, at)) = self.order.first() else { return false };
            match probe(self.entries[at as usize].id) {
                Probe::Evictable { stamp, .. } | Probe::Busy { stamp } if stamp > filed => {
                    self.file(at, stamp);
                }
                Probe::Evictable { .. } | Probe::Busy { .. } => return false,
                Probe::Pinned | Probe::Gone => self.park(at),
            }
        }
        true
    }

    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64)) {
        self.order.iter().take(limit).for_each(|&(_, at)| visit(self.entries[at as usize].id));
    }

    fn unpark(&mut self, token: Token) {
        if self.entries[token.0 as usize].parked {
            self.file(token.0, 0);
        }
    }

    fn len(&self) -> usize {
        self.entries.len() - self.vacant.len()
    }
}
