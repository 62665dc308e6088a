//! Which chunks of an object are on disk, and where.
//!
//! Invariant: an entry is the extent of a chunk whose bytes equal the object's current version, or
//! that was reserved for a chunk of zeros and never written; no entry means that the current bytes
//! of the chunk are in host memory alone, or, without a host copy, that they are zeros. Changed
//! only by the holder of the object's gate; readers work on a clone, which keeps the extents
//! alive.

use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::chunk::CHUNK_BYTES;
use crate::disk::Extent;

/// The chunks of one object.
#[derive(Clone, Debug, Default)]
pub(crate) enum DiskMap {
    /// No chunk is on disk.
    #[default]
    Empty,
    /// The one chunk of a small object.
    One(Arc<Extent>),
    /// One entry for each chunk of a larger object.
    Many(Arc<Vec<Option<Arc<Extent>>>>),
}

/// Tells one map from another, also from one that comes to lie where it was.
#[derive(Clone, Debug)]
pub(crate) enum MapIdentity {
    /// No chunk is on disk. One such map of an object that is in no other tier is like another:
    /// zeros.
    Empty,
    One(Weak<Extent>),
    Many(Weak<Vec<Option<Arc<Extent>>>>),
}

impl MapIdentity {
    pub(crate) fn is_same(&self, other: &MapIdentity) -> bool {
        match (self, other) {
            (MapIdentity::Empty, MapIdentity::Empty) => true,
            (MapIdentity::One(a), MapIdentity::One(b)) => Weak::ptr_eq(a, b),
            (MapIdentity::Many(a), MapIdentity::Many(b)) => Weak::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Extents that a change replaced, to be dropped where no lock is held: that frees their space.
pub(crate) type Replaced = Vec<Arc<Extent>>;

/// How many chunks an object of `len` bytes has.
pub(crate) fn chunk_count(len: usize) -> usize {
    len.div_ceil(CHUNK_BYTES)
}

/// The length of chunk `index` of an object of `len` bytes.
pub(crate) fn chunk_len(len: usize, index: usize) -> u32 {
    (len - index * CHUNK_BYTES).min(CHUNK_BYTES) as u32
}

/// The bytes of chunk `index` of an object of `len` bytes.
pub(crate) fn range_of(len: usize, index: usize) -> Range<usize> {
    let start = index * CHUNK_BYTES;
    start..start + chunk_len(len, index) as usize
}

/// The lengths of these chunks of an object of `len` bytes.
pub(crate) fn chunk_lens(len: usize, chunks: impl IntoIterator<Item = usize>) -> Vec<u32> {
    chunks.into_iter().map(|index| chunk_len(len, index)).collect()
}

/// The chunks that a range of bytes touches.
pub(crate) fn chunks_of(range: &Range<usize>) -> Range<usize> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES)
}

impl DiskMap {
    /// A map of all chunks, in order.
    pub(crate) fn of(extents: Vec<Extent>) -> Self {
        let mut extents: Vec<_> =
            extents.into_iter().map(|extent| Some(Arc::new(extent))).collect();
        match extents.len() {
            0 => DiskMap::Empty,
            1 => extents.pop().flatten().map_or(DiskMap::Empty, DiskMap::One),
            _ => DiskMap::Many(Arc::new(extents)),
        }
    }

    /// A map of an object whose other chunks are zeros.
    pub(crate) fn of_some(extents: Vec<Option<Extent>>) -> Self {
        let mut extents: Vec<_> = extents.into_iter().map(|extent| extent.map(Arc::new)).collect();
        match extents.len() {
            0 | 1 => extents.pop().flatten().map_or(DiskMap::Empty, DiskMap::One),
            _ => DiskMap::Many(Arc::new(extents)),
        }
    }

    /// The extent of chunk `index`.
    pub(crate) fn chunk(&self, index: usize) -> Option<&Arc<Extent>> {
        match self {
            DiskMap::Empty => None,
            DiskMap::One(extent) => (index == 0).then_some(extent),
            DiskMap::Many(extents) => extents.get(index)?.as_ref(),
        }
    }

    /// Whether this is a clone of the same map.
    pub(crate) fn is_same(&self, other: &DiskMap) -> bool {
        match (self, other) {
            (DiskMap::One(a), DiskMap::One(b)) => Arc::ptr_eq(a, b),
            (DiskMap::Many(a), DiskMap::Many(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// What tells this map from every other one, and keeps nothing of it.
    pub(crate) fn identity(&self) -> MapIdentity {
        match self {
            DiskMap::Empty => MapIdentity::Empty,
            DiskMap::One(extent) => MapIdentity::One(Arc::downgrade(extent)),
            DiskMap::Many(extents) => MapIdentity::Many(Arc::downgrade(extents)),
        }
    }

    /// Whether no chunk has an extent.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            DiskMap::Empty => true,
            DiskMap::One(_) => false,
            DiskMap::Many(extents) => extents.iter().all(Option::is_none),
        }
    }

    /// Whether nothing was ever written to what extents there are.
    pub(crate) fn is_unwritten(&self) -> bool {
        let unwritten = |extent: &Arc<Extent>| extent.sum().is_none();
        match self {
            DiskMap::Empty => true,
            DiskMap::One(extent) => unwritten(extent),
            DiskMap::Many(extents) => extents.iter().flatten().all(unwritten),
        }
    }

    /// The chunks of an object of `len` bytes that have no extent.
    pub(crate) fn missing(&self, len: usize) -> Vec<usize> {
        (0..chunk_count(len)).filter(|&index| self.chunk(index).is_none()).collect()
    }

    /// What it takes in memory, in bytes; each chunk of several counts as if it had an extent.
    pub(super) fn memory_bytes(&self) -> u64 {
        const EXTENT: usize = size_of::<Extent>() + 2 * size_of::<usize>();
        let bytes = match self {
            DiskMap::Empty => 0,
            DiskMap::One(_) => EXTENT,
            DiskMap::Many(extents) => extents.len() * (EXTENT + size_of::<usize>()),
        };
        bytes as u64
    }

    /// Whether every chunk of an object of `len` bytes has an extent.
    pub(crate) fn is_whole(&self, len: usize) -> bool {
        match self {
            DiskMap::Empty => len == 0,
            DiskMap::One(_) => true,
            DiskMap::Many(extents) => extents.iter().all(Option::is_some),
        }
    }

    /// Puts extents at these chunks of an object of `len` bytes. What they replace goes to `old`.
    pub(crate) fn put(
        &mut self,
        len: usize,
        extents: impl IntoIterator<Item = (usize, Extent)>,
        old: &mut Replaced,
    ) {
        for (index, extent) in extents {
            old.extend(self.slot(len, index).replace(Arc::new(extent)));
        }
        self.settle(len);
    }

    /// Forgets these chunks of an object of `len` bytes: their bytes changed in host memory.
    pub(crate) fn forget(&mut self, len: usize, chunks: Range<usize>, old: &mut Replaced) {
        if chunks.len() >= chunk_count(len) {
            return self.clear(old);
        }
        if matches!(self, DiskMap::Empty) {
            return;
        }
        for index in chunks {
            old.extend(self.slot(len, index).take());
        }
    }

    /// Forgets every chunk.
    pub(crate) fn clear(&mut self, old: &mut Replaced) {
        match std::mem::take(self) {
            DiskMap::Empty => {}
            DiskMap::One(extent) => old.push(extent),
            DiskMap::Many(extents) => match Arc::try_unwrap(extents) {
                Ok(extents) => old.extend(extents.into_iter().flatten()),
                // A reader has the map, and drops it.
                Err(_shared) => {}
            },
        }
    }

    /// The entry of chunk `index`, in the form of several.
    fn slot(&mut self, len: usize, index: usize) -> &mut Option<Arc<Extent>> {
        let extents = match std::mem::take(self) {
            DiskMap::Empty => Arc::new(vec![None; chunk_count(len)]),
            DiskMap::One(extent) => Arc::new(vec![Some(extent)]),
            DiskMap::Many(extents) => extents,
        };
        *self = DiskMap::Many(extents);
        match self {
            DiskMap::Many(extents) => &mut Arc::make_mut(extents)[index],
            DiskMap::Empty | DiskMap::One(_) => unreachable!("made of several just above"),
        }
    }

    /// Goes back to the small form where there is one chunk.
    fn settle(&mut self, len: usize) {
        if chunk_count(len) == 1
            && let Some(extent) = self.chunk(0).cloned()
        {
            *self = DiskMap::One(extent);
        }
    }

    /// Takes the extents that were reserved and never written, for the first write of a whole
    /// object: all of them, or none. A reader that has the map keeps them where they are; one that
    /// only knows which map it was ([`MapIdentity`]) does not.
    pub(crate) fn take_reserved(&mut self, len: usize) -> Option<Vec<Extent>> {
        let unwritten =
            |extent: &Arc<Extent>| extent.sum().is_none() && Arc::strong_count(extent) == 1;
        let mine = match &*self {
            DiskMap::Empty => false,
            DiskMap::One(extent) => unwritten(extent),
            DiskMap::Many(extents) => {
                let unwritten =
                    |extent: &Option<Arc<Extent>>| extent.as_ref().is_some_and(unwritten);
                let whole = extents.len() == chunk_count(len);
                whole && Arc::strong_count(extents) == 1 && extents.iter().all(unwritten)
            }
        };
        if !mine {
            return None;
        }
        let extents = match std::mem::take(self) {
            DiskMap::Empty => Vec::new(),
            DiskMap::One(extent) => vec![Some(extent)],
            DiskMap::Many(extents) => Arc::try_unwrap(extents).unwrap_or_default(),
        };
        // No reader had any of them just now, and a reader gets them only through the map.
        extents.into_iter().map(|extent| Arc::try_unwrap(extent?).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{ExtentOwner, SharedOwner};

    #[derive(Debug)]
    struct Disk;

    impl ExtentOwner for Disk {
        fn release(&self, _offset: u64, _footprint: u32) {}
    }

    #[test]
    fn reserved_extents_are_taken_from_a_map_that_others_only_know() {
        let len = CHUNK_BYTES + 7;
        let extent = |index| {
            let len = chunk_len(len, index);
            let owner = SharedOwner::new(Disk);
            Extent::new((index * CHUNK_BYTES) as u64, len, CHUNK_BYTES as u32, owner)
        };
        let mut map = DiskMap::of(vec![extent(0), extent(1)]);
        let identity = map.identity();
        let clone = map.clone();
        assert!(map.take_reserved(len).is_none(), "a reader has it");
        drop(clone);
        let taken = map.take_reserved(len).map(|extents| extents.len());
        assert_eq!(taken, Some(2));
        assert!(!map.identity().is_same(&identity));
    }

    #[test]
    fn empty_maps_are_the_same_version_and_no_other_map_is() {
        let one = DiskMap::Empty.identity();
        let other = DiskMap::Empty.identity();
        assert!(one.is_same(&other));
        let chunks = DiskMap::of_some(vec![None, None]);
        assert!(!one.is_same(&chunks.identity()));
        assert!(chunks.identity().is_same(&chunks.clone().identity()));
        assert!(!chunks.identity().is_same(&DiskMap::of_some(vec![None, None]).identity()));
    }
}
