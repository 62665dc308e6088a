//! What is known of the writes to one object.
//!
//! Invariant: `writes` holds every write that a read could still return, in whole or in part, and
//! together they cover the object. Times are ticks of the object's own counter, one for each event,
//! so that two events are never at the same time. Called by the model, under the object's lock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Pattern;

/// Not yet.
pub(super) const NEVER: u64 = u64::MAX;

/// How many superseded versions are remembered, to name them when a read returns one.
const REMEMBERED: usize = 1024;

/// When a write whose future was dropped is decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Settles {
    /// At the drop: it was applied by then or never will be.
    AtDrop,
    /// It may be applied after the drop, but never over a write that started after the drop: the
    /// runtime keeps the writes to one object in order, or gives up the abandoned one when the next
    /// starts. A caller that times out and writes again relies on this.
    #[default]
    BeforeNextWrite,
    /// At any later time, once, even over later writes.
    Whenever,
}

#[derive(Debug)]
pub(super) struct Write {
    pub(super) version: u64,
    pub(super) range: Range<usize>,
    /// `None` are zeros: the object as allocated.
    pub(super) pattern: Option<Pattern>,
    /// When it was called.
    pub(super) called: u64,
    /// If it is applied, then after this.
    pub(super) from: u64,
    /// If it is applied, then before this.
    pub(super) by: u64,
    /// Whether it was applied, or is sure to be before `by`.
    pub(super) certain: bool,
    /// If it is applied, then before every write that is called after this.
    pub(super) dropped: u64,
    /// Versions that reads have shown to be before this one.
    pub(super) older: BTreeSet<u64>,
}

impl Write {
    fn new(version: u64, range: Range<usize>, pattern: Option<Pattern>, called: u64) -> Self {
        Write {
            version,
            range,
            pattern,
            called,
            from: called,
            by: NEVER,
            certain: false,
            dropped: NEVER,
            older: BTreeSet::new(),
        }
    }

    fn seal(&mut self, by: u64) {
        self.by = self.by.min(by);
        self.certain = true;
    }

    /// Whether it was applied before this time, for certain.
    pub(super) fn applied_before(&self, time: u64) -> bool {
        self.certain && self.by < time
    }

    /// Whether, if both are applied, this one comes first.
    pub(super) fn precedes(&self, other: &Write) -> bool {
        self.by < other.from || self.dropped < other.called || other.older.contains(&self.version)
    }

    pub(super) fn covers(&self, range: &Range<usize>) -> bool {
        self.range.start <= range.start && range.end <= self.range.end
    }

    /// Whether `bytes`, from `offset` of the object, are this version's.
    pub(super) fn matches(&self, offset: usize, bytes: &[u8]) -> bool {
        match self.pattern {
            Some(pattern) => pattern.mismatch(offset as u64, bytes).is_none(),
            None => bytes.iter().all(|byte| *byte == 0),
        }
    }
}

#[derive(Debug)]
pub(super) struct History {
    pub(super) len: usize,
    pub(super) writes: Vec<Write>,
    /// Versions that no read may return any more.
    pub(super) superseded: Vec<(u64, Range<usize>, Option<Pattern>)>,
    pub(super) removed_at: u64,
    active_reads: BTreeMap<u64, ()>,
    settles: Settles,
    clock: u64,
}

impl History {
    pub(super) fn new(len: usize, settles: Settles) -> Self {
        let mut zeros = Write::new(0, 0..len, None, 0);
        zeros.seal(0);
        History {
            len,
            writes: vec![zeros],
            superseded: Vec::new(),
            removed_at: NEVER,
            active_reads: BTreeMap::new(),
            settles,
            clock: 0,
        }
    }

    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub(super) fn begin_write(&mut self, version: u64, range: Range<usize>, pattern: Pattern) {
        let called = self.tick();
        self.writes.push(Write::new(version, range, Some(pattern), called));
    }

    /// The write returned `Ok`.
    pub(super) fn commit(&mut self, version: u64) {
        let now = self.tick();
        if let Some(write) = self.find(version) {
            write.seal(now);
            self.prune(Some(version));
        }
    }

    /// The write returned an error: it must not have been applied. False if a read saw it.
    #[must_use]
    pub(super) fn fail(&mut self, version: u64) -> bool {
        self.tick();
        match self.find(version) {
            Some(write) if write.certain => false,
            Some(_) => {
                self.drop_write(version);
                true
            }
            // Superseded by now, which needs that it was applied.
            None => false,
        }
    }

    /// The future of the write was dropped.
    pub(super) fn abandon(&mut self, version: u64) {
        let now = self.tick();
        let settles = self.settles;
        if let Some(write) = self.find(version) {
            match settles {
                Settles::AtDrop => write.by = write.by.min(now),
                Settles::BeforeNextWrite => write.dropped = now,
                Settles::Whenever => {}
            }
        }
        self.prune(None);
    }

    pub(super) fn begin_read(&mut self) -> u64 {
        let start = self.tick();
        self.active_reads.insert(start, ());
        start
    }

    pub(super) fn end_read(&mut self, start: u64) {
        self.active_reads.remove(&start);
        self.prune(None);
    }

    /// Takes over what a read has shown.
    pub(super) fn learn(&mut self, learned: Learned, read_start: u64, read_end: u64) {
        for (older, newer) in learned.order {
            if let Some(write) = self.find(newer) {
                write.older.insert(older);
            }
        }
        for version in learned.seen {
            if let Some(write) = self.find(version) {
                write.seal(read_end);
            }
        }
        for version in learned.unseen {
            if let Some(write) = self.find(version) {
                write.from = write.from.max(read_start);
                if write.from > write.by && !write.certain {
                    self.supersede(version);
                }
            }
        }
    }

    fn find(&mut self, version: u64) -> Option<&mut Write> {
        self.writes.iter_mut().find(|write| write.version == version)
    }

    /// Supersedes what no read may return any more: what is covered by writes that come after it
    /// and were applied before every read that is still going on. With `by`, looks only at what
    /// that one covers in part.
    fn prune(&mut self, by: Option<u64>) {
        let oldest_read = self.active_reads.first_key_value().map_or(NEVER, |(start, ())| *start);
        let by = self.writes.iter().find(|write| Some(write.version) == by);
        let touched =
            |old: &Write| by.is_none_or(|by| old.precedes(by) && meets(&old.range, &by.range));
        let dead: Vec<u64> = self
            .writes
            .iter()
            .filter(|old| touched(old))
            .filter(|old| self.is_covered(old, oldest_read))
            .map(|write| write.version)
            .collect();
        dead.into_iter().for_each(|version| self.supersede(version));
    }

    fn is_covered(&self, old: &Write, oldest_read: u64) -> bool {
        let newer = self.writes.iter().filter(|new| {
            new.version != old.version && new.applied_before(oldest_read) && old.precedes(new)
        });
        let mut ranges: Vec<Range<usize>> = newer.map(|new| new.range.clone()).collect();
        ranges.sort_by_key(|range| range.start);
        let mut open_from = old.range.start;
        for range in &ranges {
            if range.start <= open_from {
                open_from = open_from.max(range.end);
            }
        }
        !ranges.is_empty() && open_from >= old.range.end
    }

    fn supersede(&mut self, version: u64) {
        let Some(write) = self.drop_write(version) else {
            return;
        };
        if self.superseded.len() == REMEMBERED {
            self.superseded.remove(0);
        }
        self.superseded.push((version, write.range.clone(), write.pattern));
        if !write.certain {
            return;
        }
        // What was before it stays before what was after it.
        let before = self.writes.iter().filter(|other| other.precedes(&write));
        let before: Vec<u64> = before.map(|other| other.version).collect();
        for after in self.writes.iter_mut().filter(|other| write.precedes(other)) {
            let others = before.iter().filter(|other| **other != after.version);
            after.older.extend(others);
            after.older.remove(&version);
        }
    }

    fn drop_write(&mut self, version: u64) -> Option<Write> {
        let index = self.writes.iter().position(|write| write.version == version)?;
        Some(self.writes.remove(index))
    }
}

/// Whether the ranges overlap or touch.
fn meets(left: &Range<usize>, right: &Range<usize>) -> bool {
    left.start <= right.end && right.start <= left.end
}

/// What an explained read tells about the writes.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Pairs of versions: the first was applied before the second.
    pub(super) order: Vec<(u64, u64)>,
    /// These were applied before the read ended.
    pub(super) seen: BTreeSet<u64>,
    /// These were not applied before the read started.
    pub(super) unseen: BTreeSet<u64>,
}
