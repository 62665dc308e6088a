//! What is where: the budget, the place of each chunk, and what is alive of each segment.
//!
//! Invariant: `used` is the sum of all extents that exist; a segment's `live` is the sum of the
//! chunks whose place it is. A segment is entered in `dead`, once, when nothing of it is alive and
//! nobody reads it; its number is never given again. No I/O happens here. Called by the tier under
//! one lock.

mod named;

use std::collections::{BTreeSet, HashMap, HashSet};

use vmem_core::backend::{TierError, TierUsage};

use named::Named;

/// Where a chunk is, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) segment: u64,
    /// Where in the segment it begins, in bytes.
    pub(crate) at: u64,
    pub(crate) len: u32,
    /// CRC-32C.
    pub(crate) sum: u32,
}

impl Placed {
    pub(crate) fn end(&self) -> u64 {
        self.at + u64::from(self.len)
    }
}

/// One object in the bucket.
#[derive(Debug)]
struct Segment {
    bytes: u64,
    live: u64,
    readers: u32,
    /// The extents that were put into it, by their offsets.
    chunks: Vec<u64>,
    /// It is being copied, or cannot be.
    stays: bool,
}

/// Chunks to be copied into a new segment.
#[derive(Debug)]
pub(crate) struct Compaction {
    /// The segments that they are in: each has a reader more until it is unpinned.
    pub(crate) segments: Vec<u64>,
    /// The offset of each extent, and its place, in the order of the places.
    pub(crate) chunks: Vec<(u64, Placed)>,
}

/// What there is to do in the background.
#[derive(Debug)]
pub(crate) enum Chore {
    /// Segments to delete.
    Delete(Vec<u64>),
    Compact(Compaction),
}

/// The most segments that one request deletes.
const DELETES: usize = 1000;

/// The state of a tier.
#[derive(Debug)]
pub(crate) struct Ledger {
    usage: TierUsage,
    /// The offset of the next extent.
    next: u64,
    next_segment: u64,
    placed: HashMap<u64, Placed>,
    segments: HashMap<u64, Segment>,
    /// Those that are being put.
    begun: HashSet<u64>,
    stored_bytes: u64,
    /// To be deleted.
    dead: Vec<u64>,
    /// Segments of which little is alive.
    sparse: BTreeSet<u64>,
    /// What is not alive of those, in bytes.
    sparse_garbage: u64,
    compact_below: f64,
    segment_bytes: u64,
    named: Named,
}

impl Ledger {
    pub(crate) fn new(capacity_bytes: u64, segment_bytes: u64, compact_below: f64) -> Self {
        Ledger {
            usage: TierUsage { capacity_bytes, ..TierUsage::default() },
            next: 0,
            next_segment: 0,
            placed: HashMap::new(),
            segments: HashMap::new(),
            begun: HashSet::new(),
            stored_bytes: 0,
            dead: Vec::new(),
            sparse: BTreeSet::new(),
            sparse_garbage: 0,
            compact_below,
            segment_bytes,
            named: Named::default(),
        }
    }

    pub(crate) fn usage(&self) -> TierUsage {
        let largest_free_bytes = self.usage.capacity_bytes - self.usage.used_bytes;
        TierUsage { largest_free_bytes, ..self.usage }
    }

    /// Segments of this instance that are in use, and their bytes.
    pub(crate) fn stored(&self) -> (u64, u64) {
        ((self.segments.len() - self.named.foreign()) as u64, self.stored_bytes)
    }

    /// Takes budget for chunks of these lengths: their offsets, one behind the other.
    pub(crate) fn reserve(&mut self, lens: &[u32]) -> Result<Vec<u64>, TierError> {
        let requested_bytes: u64 = lens.iter().map(|&len| u64::from(len)).sum();
        let free_bytes = self.usage.capacity_bytes - self.usage.used_bytes;
        if requested_bytes > free_bytes {
            return Err(TierError::Full { requested_bytes, free_bytes, source: None });
        }
        self.usage.used_bytes += requested_bytes;
        self.usage.peak_bytes = self.usage.peak_bytes.max(self.usage.used_bytes);
        self.usage.extents += lens.len() as u64;
        let place = |len: &u32| {
            let offset = self.next;
            self.next += u64::from(*len);
            offset
        };
        Ok(lens.iter().map(place).collect())
    }

    /// Whether an extent with this end can be one of this tier.
    pub(crate) fn has_given(&self, end: u64) -> bool {
        end <= self.next
    }

    /// An extent is no more.
    pub(crate) fn release(&mut self, offset: u64, footprint: u32) {
        // An empty chunk has no place, and the offset of the one behind it.
        let placed = self.placed.get(&offset).filter(|_| footprint > 0);
        if !placed.is_some_and(|placed| self.named.has(placed)) {
            self.uncharge(footprint);
        } else if !self.named.is_last(offset) {
            return;
        }
        if footprint > 0
            && let Some(placed) = self.placed.remove(&offset)
        {
            self.named.forget(&placed);
            self.bury(placed);
        }
    }

    /// An extent takes nothing of the budget any more.
    fn uncharge(&mut self, footprint: u32) {
        let used = self.usage.used_bytes.checked_sub(u64::from(footprint));
        self.usage.used_bytes = used.expect("no more is released than was reserved");
        self.usage.extents -= 1;
    }

    /// The chunk that was here is no longer alive.
    fn bury(&mut self, placed: Placed) {
        let len = u64::from(placed.len);
        let segment = self.segments.get_mut(&placed.segment);
        let segment = segment.expect("a chunk is in a segment that exists");
        segment.live = segment.live.checked_sub(len).expect("no more dies than was alive");
        if self.sparse.contains(&placed.segment) {
            self.sparse_garbage += len;
        }
        self.classify(placed.segment);
    }

    /// Enters a segment where it belongs after a change.
    fn classify(&mut self, id: u64) {
        let Some(segment) = self.segments.get(&id) else { return };
        let garbage = segment.bytes - segment.live;
        let is_sparse = segment.live > 0
            && !segment.stays
            && (segment.live as f64) < segment.bytes as f64 * self.compact_below;
        if is_sparse && self.sparse.insert(id) {
            self.sparse_garbage += garbage;
        } else if !is_sparse && self.sparse.remove(&id) {
            self.sparse_garbage -= garbage;
        }
        if segment.live == 0 && segment.readers == 0 {
            if !self.named.is_foreign(id) {
                self.stored_bytes -= segment.bytes;
            }
            self.segments.remove(&id);
            match self.named.keeps(id) {
                true => self.named.forget_segment(id),
                false => self.dead.push(id),
            }
        }
    }

    /// The number of a new segment.
    pub(crate) fn begin_segment(&mut self) -> u64 {
        let id = self.next_number();
        self.begun.insert(id);
        id
    }

    fn next_number(&mut self) -> u64 {
        self.next_segment += 1;
        self.next_segment
    }

    /// A segment that was begun was not put; it may be there nevertheless if that was `tried`, and
    /// nothing leads to it.
    pub(crate) fn abandon_segment(&mut self, id: u64, tried: bool) {
        self.begun.remove(&id);
        self.dead.extend(tried.then_some(id));
    }

    /// A segment was put, with these chunks of extents that exist.
    pub(crate) fn publish(&mut self, id: u64, chunks: &[(u64, Placed)]) {
        self.enter(id, chunks);
        for &(offset, placed) in chunks {
            // An extent that was written before has another place now.
            if let Some(outdated) = self.placed.insert(offset, placed) {
                self.bury(outdated);
            }
        }
        self.unpin(id);
    }

    /// Chunks were copied into a new segment: those that are still where they were are there now.
    pub(crate) fn switch(&mut self, id: u64, copied: &[(u64, Placed)], from: &Compaction) {
        self.enter(id, copied);
        for (&(offset, copy), (_, original)) in copied.iter().zip(&from.chunks) {
            if self.placed.get(&offset) == Some(original) && !self.named.has(original) {
                self.placed.insert(offset, copy);
                self.bury(*original);
            } else {
                self.bury(copy);
            }
        }
        self.unpin(id);
    }

    /// All of a new segment counts as alive at first; it is pinned until it is complete.
    fn enter(&mut self, id: u64, chunks: &[(u64, Placed)]) {
        let bytes = chunks.iter().map(|(_, placed)| u64::from(placed.len)).sum();
        let offsets = chunks.iter().map(|(offset, _)| *offset).collect();
        let segment = Segment { bytes, live: bytes, readers: 1, chunks: offsets, stays: false };
        self.begun.remove(&id);
        let is_new = self.segments.insert(id, segment).is_none();
        assert!(is_new, "a segment is put once");
        self.stored_bytes += bytes;
    }

    /// Where a written chunk is.
    pub(crate) fn find(&self, offset: u64) -> Option<Placed> {
        self.placed.get(&offset).copied()
    }

    /// Keeps a segment until it is unpinned.
    pub(crate) fn pin(&mut self, id: u64) {
        let segment = self.segments.get_mut(&id).expect("what is read exists");
        segment.readers += 1;
    }

    pub(crate) fn unpin(&mut self, id: u64) {
        let segment = self.segments.get_mut(&id).expect("what is pinned exists");
        segment.readers = segment.readers.checked_sub(1).expect("a pin ends once");
        self.classify(id);
    }

    /// What is to be done next, if anything.
    pub(crate) fn next_chore(&mut self) -> Option<Chore> {
        if !self.dead.is_empty() {
            let at = self.dead.len().saturating_sub(DELETES);
            return Some(Chore::Delete(self.dead.split_off(at)));
        }
        self.next_compaction().map(Chore::Compact)
    }

    /// Segments that were not deleted will be.
    pub(crate) fn not_deleted(&mut self, ids: Vec<u64>) {
        self.dead.extend(ids);
    }

    pub(crate) fn has_chore(&self) -> bool {
        !self.dead.is_empty() || self.is_worthwhile()
    }

    /// Whether a compaction frees enough to pay for its requests.
    fn is_worthwhile(&self) -> bool {
        self.sparse_garbage >= self.segment_bytes / 2 && !self.sparse.is_empty()
    }

    fn next_compaction(&mut self) -> Option<Compaction> {
        if !self.is_worthwhile() {
            return None;
        }
        let mut live = 0;
        let mut segments = Vec::new();
        for &id in &self.sparse {
            let segment = &self.segments[&id];
            if !segments.is_empty() && live + segment.live > self.segment_bytes {
                break;
            }
            live += segment.live;
            segments.push(id);
        }
        let mut chunks = Vec::new();
        for &id in &segments {
            let segment = self.segments.get_mut(&id).expect("what is sparse exists");
            segment.readers += 1;
            segment.stays = true;
            let alive = segment.chunks.iter().filter_map(|&offset| {
                let placed = self.placed.get(&offset)?;
                (placed.segment == id).then_some((offset, *placed))
            });
            let from = chunks.len();
            chunks.extend(alive);
            chunks[from..].sort_unstable_by_key(|(_, placed)| placed.at);
            self.classify(id);
        }
        Some(Compaction { segments, chunks })
    }

    /// The compaction of a segment has ended. What is left may be copied later if it `may_repeat`.
    pub(crate) fn end_compaction(&mut self, id: u64, may_repeat: bool) {
        let segment = self.segments.get_mut(&id).expect("what is pinned exists");
        segment.stays = !may_repeat || self.named.keeps(id);
        self.unpin(id);
    }
}

#[cfg(test)]
mod tests;
