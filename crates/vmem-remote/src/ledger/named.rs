//! Chunks that names lead to, whichever instance put them.
//!
//! Invariant: once a name was to lead to a chunk its segment stays as it is: it is neither deleted
//! nor compacted here, since other instances read it where the name says. A chunk has one offset,
//! however often its name is looked up, and is here until the last of its extents was released, and
//! each look-up has been followed by an extent, or was too long ago for that. It takes nothing of
//! the budget. Called by the tier, on behalf of the catalog.

use std::collections::{HashMap, HashSet};

use tokio::time::Instant;
use uuid::Uuid;

use super::{Ledger, Placed, Segment};

/// The offsets of chunks that came here by a look at their name begin here.
const ENTERED: u64 = 1 << 63;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// The chunks by segment and place in it.
    offsets: HashMap<(u64, u64), u64>,
    /// How often one was looked up while it had an offset: it has as many extents more.
    shared: HashMap<u64, u32>,
    /// Look-ups of a chunk for which there is no extent so far, and when the last one was.
    awaited: HashMap<u64, (u32, Instant)>,
    /// The segments of this instance that have such chunks, or had.
    segments: HashSet<u64>,
    /// The instance that put a segment, and its number there; of those of others.
    origins: HashMap<u64, (Uuid, u64)>,
    /// Their numbers here.
    numbers: HashMap<(Uuid, u64), u64>,
    entered_bytes: u64,
    /// The tier ends: no name leads here any more.
    sealed: bool,
}

impl Named {
    /// Whether a name leads to what is here.
    pub(super) fn has(&self, placed: &Placed) -> bool {
        self.offsets.contains_key(&(placed.segment, placed.at))
    }

    /// One of its extents was released: true unless it has others.
    pub(super) fn is_last(&mut self, offset: u64) -> bool {
        let Some(others) = self.shared.get_mut(&offset) else { return true };
        *others -= 1;
        if *others == 0 {
            self.shared.remove(&offset);
        }
        false
    }

    pub(super) fn forget(&mut self, placed: &Placed) {
        self.offsets.remove(&(placed.segment, placed.at));
    }

    /// Whether it is not this instance's to delete.
    pub(super) fn keeps(&self, segment: u64) -> bool {
        self.segments.contains(&segment) || self.is_foreign(segment)
    }

    pub(super) fn is_foreign(&self, segment: u64) -> bool {
        self.origins.contains_key(&segment)
    }

    /// How many segments of others there are.
    pub(super) fn foreign(&self) -> usize {
        self.origins.len()
    }

    /// Nothing of the segment is in use any more.
    pub(super) fn forget_segment(&mut self, segment: u64) {
        if let Some(origin) = self.origins.remove(&segment) {
            self.numbers.remove(&origin);
        }
    }
}

impl Ledger {
    /// A name is to lead to the chunk at this offset. Where it is; None if it was not written, or
    /// the tier ends.
    pub(crate) fn name(&mut self, offset: u64) -> Option<Placed> {
        let placed = self.find(offset).filter(|_| !self.named.sealed)?;
        let is_first = self.named.offsets.insert((placed.segment, placed.at), offset).is_none();
        if is_first {
            self.uncharge(placed.len);
        }
        if !self.named.is_foreign(placed.segment) && self.named.segments.insert(placed.segment) {
            if let Some(segment) = self.segments.get_mut(&placed.segment) {
                segment.stays = true;
            }
            self.classify(placed.segment);
        }
        Some(placed)
    }

    /// The offset of a chunk to which a name leads.
    pub(crate) fn enter_named(&mut self, placed: Placed, now: Instant) -> u64 {
        let offset = self.enter_place(placed);
        let awaited = self.named.awaited.entry(offset).or_insert((0, now));
        *awaited = (awaited.0 + 1, now);
        offset
    }

    /// There is an extent for one of the look-ups of this chunk.
    pub(crate) fn adopted(&mut self, offset: u64) {
        if let Some((count, _)) = self.named.awaited.get_mut(&offset) {
            *count -= 1;
            if *count == 0 {
                self.named.awaited.remove(&offset);
            }
        }
    }

    /// There will be no extents for look-ups that were before this time.
    pub(crate) fn forget_awaited(&mut self, before: Instant) {
        let is_late = |_: &u64, awaited: &mut (u32, Instant)| awaited.1 < before;
        let late: Vec<_> = self.named.awaited.extract_if(is_late).collect();
        for (offset, (count, _)) in late {
            let len = self.find(offset).map_or(0, |placed| placed.len);
            (0..count).for_each(|_| self.release(offset, len));
        }
    }

    fn enter_place(&mut self, placed: Placed) -> u64 {
        if let Some(&offset) = self.named.offsets.get(&(placed.segment, placed.at)) {
            *self.named.shared.entry(offset).or_default() += 1;
            return offset;
        }
        let len = u64::from(placed.len);
        let offset = ENTERED | self.named.entered_bytes;
        self.named.entered_bytes += len;
        // One of this instance's may have had nothing in use.
        let none = Segment { bytes: 0, live: 0, readers: 0, chunks: Vec::new(), stays: true };
        let segment = self.segments.entry(placed.segment).or_insert(none);
        segment.live += len;
        let more = segment.live.saturating_sub(segment.bytes);
        segment.bytes += more;
        if !self.named.is_foreign(placed.segment) {
            self.stored_bytes += more;
        }
        self.placed.insert(offset, placed);
        self.named.offsets.insert((placed.segment, placed.at), offset);
        offset
    }

    /// The number here of a segment that another instance has put.
    pub(crate) fn number(&mut self, origin: (Uuid, u64)) -> u64 {
        if let Some(&number) = self.named.numbers.get(&origin) {
            return number;
        }
        let number = self.next_number();
        let segment = Segment { bytes: 0, live: 0, readers: 0, chunks: Vec::new(), stays: true };
        self.segments.insert(number, segment);
        self.named.origins.insert(number, origin);
        self.named.numbers.insert(origin, number);
        number
    }

    /// The instance that put a segment, and its number there, if that was another one.
    pub(crate) fn origin(&self, segment: u64) -> Option<(Uuid, u64)> {
        self.named.origins.get(&segment).copied()
    }

    /// Whether anything of a segment is in use here, or on its way there. `me` is this instance.
    pub(crate) fn uses(&self, me: Uuid, (instance, number): (Uuid, u64)) -> bool {
        let number = match instance == me {
            true => Some(number),
            false => self.named.numbers.get(&(instance, number)).copied(),
        };
        number.is_some_and(|it| self.segments.contains_key(&it) || self.begun.contains(&it))
    }

    /// The segments of this instance to which names lead, or led; from now on no name leads to
    /// another.
    pub(crate) fn seal(&mut self) -> Vec<u64> {
        self.named.sealed = true;
        self.named.segments.iter().copied().collect()
    }
}
