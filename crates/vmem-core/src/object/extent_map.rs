//! Which chunks of an object are on disk, or in a tier below it, and where.
//!
//! Invariant: an entry is the extent of a chunk whose bytes equal the object's current version, or
//! that was reserved for a chunk of zeros and never written; no entry means that the current bytes
//! of the chunk are in host memory alone, or, without a host copy, that they are zeros, unless the
//! object is dirty on a device, when there is no entry at all. The entry
//! is the chunk in the fastest of the tiers below host memory that have it; that extent leads to
//! the next slower one, if there is one. Changed only by the holder of the object's gate; readers
//! work on a clone, which keeps the extents alive.

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::Mark;
use crate::chunk::chunk_count;
use crate::storage::Extent;

/// The chunks of one object.
#[derive(Clone, Debug, Default)]
pub(crate) enum ExtentMap {
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
    /// No map: only devices have the version.
    OnDevice(Weak<Mark>),
}

impl MapIdentity {
    pub(crate) fn is_same(&self, other: &MapIdentity) -> bool {
        match (self, other) {
            (MapIdentity::Empty, MapIdentity::Empty) => true,
            (MapIdentity::One(a), MapIdentity::One(b)) => Weak::ptr_eq(a, b),
            (MapIdentity::Many(a), MapIdentity::Many(b)) => Weak::ptr_eq(a, b),
            (MapIdentity::OnDevice(a), MapIdentity::OnDevice(b)) => Weak::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Extents that a change replaced, to be dropped where no lock is held: that frees their space.
pub(crate) type Replaced = Vec<Arc<Extent>>;

/// An extent and those of the same chunk in slower tiers.
fn chain(extent: &Arc<Extent>) -> impl Iterator<Item = &Arc<Extent>> {
    std::iter::successors(Some(extent), |extent| extent.below())
}

/// The extent of the same chunk in the tier `level`.
fn in_chain(extent: &Arc<Extent>, level: usize) -> Option<&Arc<Extent>> {
    chain(extent).find(|extent| extent.level() == level)
}

impl ExtentMap {
    /// A map of all chunks, in order.
    pub(crate) fn of(extents: Vec<Extent>) -> Self {
        let mut extents: Vec<_> =
            extents.into_iter().map(|extent| Some(Arc::new(extent))).collect();
        match extents.len() {
            0 => ExtentMap::Empty,
            1 => extents.pop().flatten().map_or(ExtentMap::Empty, ExtentMap::One),
            _ => ExtentMap::Many(Arc::new(extents)),
        }
    }

    /// A map of an object whose other chunks are zeros.
    pub(crate) fn of_some(extents: Vec<Option<Extent>>) -> Self {
        let mut extents: Vec<_> = extents.into_iter().map(|extent| extent.map(Arc::new)).collect();
        match extents.len() {
            0 | 1 => extents.pop().flatten().map_or(ExtentMap::Empty, ExtentMap::One),
            _ => ExtentMap::Many(Arc::new(extents)),
        }
    }

    /// The extent of chunk `index`.
    pub(crate) fn chunk(&self, index: usize) -> Option<&Arc<Extent>> {
        match self {
            ExtentMap::Empty => None,
            ExtentMap::One(extent) => (index == 0).then_some(extent),
            ExtentMap::Many(extents) => extents.get(index)?.as_ref(),
        }
    }

    /// Whether this is a clone of the same map.
    pub(crate) fn is_same(&self, other: &ExtentMap) -> bool {
        match (self, other) {
            (ExtentMap::One(a), ExtentMap::One(b)) => Arc::ptr_eq(a, b),
            (ExtentMap::Many(a), ExtentMap::Many(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// What tells this map from every other one, and keeps nothing of it.
    pub(crate) fn identity(&self) -> MapIdentity {
        match self {
            ExtentMap::Empty => MapIdentity::Empty,
            ExtentMap::One(extent) => MapIdentity::One(Arc::downgrade(extent)),
            ExtentMap::Many(extents) => MapIdentity::Many(Arc::downgrade(extents)),
        }
    }

    /// Whether no chunk has an extent.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            ExtentMap::Empty => true,
            ExtentMap::One(_) => false,
            ExtentMap::Many(extents) => extents.iter().all(Option::is_none),
        }
    }

    /// Whether nothing was ever written to what extents there are.
    pub(crate) fn is_unwritten(&self) -> bool {
        let unwritten = |extent: &Arc<Extent>| extent.sum().is_none();
        match self {
            ExtentMap::Empty => true,
            ExtentMap::One(extent) => unwritten(extent),
            ExtentMap::Many(extents) => extents.iter().flatten().all(unwritten),
        }
    }

    /// The chunks of an object of `len` bytes that have no extent.
    pub(crate) fn missing(&self, len: usize) -> Vec<usize> {
        (0..chunk_count(len)).filter(|&index| self.chunk(index).is_none()).collect()
    }

    /// The chunks of an object of `len` bytes that neither the tier `level` nor a slower one has.
    pub(crate) fn absent_from(&self, len: usize, level: usize) -> Vec<usize> {
        let has = |extent: &Arc<Extent>| chain(extent).any(|extent| extent.level() >= level);
        (0..chunk_count(len)).filter(|&index| !self.chunk(index).is_some_and(has)).collect()
    }

    /// What it takes in memory, in bytes; each chunk of several counts as if it had an extent.
    pub(super) fn memory_bytes(&self) -> u64 {
        const EXTENT: usize = size_of::<Extent>() + 2 * size_of::<usize>();
        let bytes = match self {
            ExtentMap::Empty => 0,
            ExtentMap::One(_) => EXTENT,
            ExtentMap::Many(extents) => extents.len() * (EXTENT + size_of::<usize>()),
        };
        bytes as u64
    }

    /// Whether every chunk of an object of `len` bytes has an extent.
    pub(crate) fn is_whole(&self, len: usize) -> bool {
        match self {
            ExtentMap::Empty => len == 0,
            ExtentMap::One(_) => true,
            ExtentMap::Many(extents) => extents.iter().all(Option::is_some),
        }
    }

    /// Puts extents at these chunks of an object of `len` bytes. What they replace goes to `old`.
    pub(crate) fn put(
        &mut self,
        len: usize,
        extents: impl IntoIterator<Item = (usize, Extent)>,
        old: &mut Replaced,
    ) {
        let shared = extents.into_iter().map(|(index, extent)| (index, Arc::new(extent)));
        self.put_shared(len, shared, old);
    }

    /// As [`put`](Self::put), of extents that others know already.
    pub(crate) fn put_shared(
        &mut self,
        len: usize,
        extents: impl IntoIterator<Item = (usize, Arc<Extent>)>,
        old: &mut Replaced,
    ) {
        for (index, extent) in extents {
            old.extend(self.slot(len, index).replace(extent));
        }
        self.settle(len);
    }

    // ---- The tiers below host memory ---------------------------------------------------------

    /// As [`put`](Self::put), of extents in a slower tier than any that has the chunk now: those
    /// stay.
    pub(crate) fn put_below(
        &mut self,
        len: usize,
        extents: impl IntoIterator<Item = (usize, Extent)>,
    ) {
        for (index, extent) in extents {
            let extent = Arc::new(extent);
            match self.chunk(index).and_then(|fastest| chain(fastest).last()) {
                Some(slowest) => slowest.set_below(extent),
                None => *self.slot(len, index) = Some(extent),
            }
        }
        self.settle(len);
    }

    /// What the tier `level` has of it, in a map of that alone. None if it lacks a chunk that
    /// another tier has.
    pub(crate) fn in_level(&self, level: usize) -> Option<ExtentMap> {
        if self.entries().all(|extent| extent.level() == level) {
            return Some(self.clone());
        }
        let extent = |extent: &Arc<Extent>| in_chain(extent, level).cloned();
        match self {
            ExtentMap::Empty => Some(ExtentMap::Empty),
            ExtentMap::One(one) => extent(one).map(ExtentMap::One),
            ExtentMap::Many(all) => {
                let all = all.iter().map(|one| match one {
                    Some(one) => extent(one).map(Some),
                    None => Some(None),
                });
                all.collect::<Option<Vec<_>>>().map(|all| ExtentMap::Many(Arc::new(all)))
            }
        }
    }

    fn entries(&self) -> impl Iterator<Item = &Arc<Extent>> {
        let (one, many) = match self {
            ExtentMap::Empty => (None, &[][..]),
            ExtentMap::One(extent) => (Some(extent), &[][..]),
            ExtentMap::Many(extents) => (None, &extents[..]),
        };
        one.into_iter().chain(many.iter().flatten())
    }

    /// The tiers that have any of it, one bit each.
    pub(crate) fn levels(&self) -> u8 {
        self.entries().flat_map(chain).fold(0, |levels, extent| levels | 1 << extent.level())
    }

    /// The chunks that only tiers slower than `level` have.
    pub(crate) fn slower_than(&self, level: usize) -> Vec<usize> {
        let is_slower = |index: &usize| self.chunk(*index).is_some_and(|at| at.level() > level);
        (0..self.entry_count()).filter(is_slower).collect()
    }

    fn entry_count(&self) -> usize {
        match self {
            ExtentMap::Empty => 0,
            ExtentMap::One(_) => 1,
            ExtentMap::Many(extents) => extents.len(),
        }
    }

    /// The slowest tier that a read of all of it needs.
    pub(crate) fn slowest_level(&self) -> usize {
        self.entries().map(|extent| extent.level()).max().unwrap_or(0)
    }

    /// Whether the tier `level` has every chunk of an object of `len` bytes.
    pub(crate) fn is_whole_in(&self, len: usize, level: usize) -> bool {
        self.is_whole(len) && self.entries().all(|extent| in_chain(extent, level).is_some())
    }

    /// Whether the tier `level` has chunks that no slower one has.
    pub(crate) fn is_dirty_in(&self, level: usize) -> bool {
        let is_dirty = |extent: &Arc<Extent>| extent.level() == level && extent.below().is_none();
        self.entries().any(|extent| chain(extent).any(is_dirty))
    }

    /// The chunks that neither the tier `level` nor a slower one has, and the slowest extent of
    /// each.
    pub(crate) fn missing_in(&self, level: usize) -> Vec<(usize, Arc<Extent>)> {
        let slowest = |index| {
            let extent = chain(self.chunk(index)?).last()?;
            (extent.level() < level).then(|| (index, extent.clone()))
        };
        (0..self.entry_count()).filter_map(slowest).collect()
    }

    /// Whether a reader has the map.
    pub(crate) fn is_shared(&self) -> bool {
        match self {
            ExtentMap::Empty => false,
            ExtentMap::One(extent) => Arc::strong_count(extent) > 1,
            ExtentMap::Many(extents) => Arc::strong_count(extents) > 1,
        }
    }

    /// Takes the extents of an object of `len` bytes out of the tier `level`, where a slower one
    /// has the chunk too. True if there were any.
    pub(crate) fn drop_from(&mut self, len: usize, level: usize, old: &mut Replaced) -> bool {
        let leaves = |index| {
            let extent = self.chunk(index)?;
            let below = extent.below().filter(|_| extent.level() == level)?;
            Some((index, below.clone()))
        };
        let stays: Vec<_> = (0..chunk_count(len)).filter_map(leaves).collect();
        let any = !stays.is_empty();
        self.put_shared(len, stays, old);
        any
    }

    /// Forgets these chunks of an object of `len` bytes: their bytes changed in host memory.
    pub(crate) fn forget(&mut self, len: usize, chunks: Range<usize>, old: &mut Replaced) {
        if chunks.len() >= chunk_count(len) {
            return self.clear(old);
        }
        if matches!(self, ExtentMap::Empty) {
            return;
        }
        for index in chunks {
            old.extend(self.slot(len, index).take());
        }
    }

    /// Forgets every chunk.
    pub(crate) fn clear(&mut self, old: &mut Replaced) {
        match std::mem::take(self) {
            ExtentMap::Empty => {}
            ExtentMap::One(extent) => old.push(extent),
            ExtentMap::Many(extents) => match Arc::try_unwrap(extents) {
                Ok(extents) => old.extend(extents.into_iter().flatten()),
                // A reader has the map, and drops it.
                Err(_shared) => {}
            },
        }
    }

    /// The entry of chunk `index`, in the form of several.
    fn slot(&mut self, len: usize, index: usize) -> &mut Option<Arc<Extent>> {
        let extents = match std::mem::take(self) {
            ExtentMap::Empty => Arc::new(vec![None; chunk_count(len)]),
            ExtentMap::One(extent) => Arc::new(vec![Some(extent)]),
            ExtentMap::Many(extents) => extents,
        };
        *self = ExtentMap::Many(extents);
        match self {
            ExtentMap::Many(extents) => &mut Arc::make_mut(extents)[index],
            ExtentMap::Empty | ExtentMap::One(_) => unreachable!("made of several just above"),
        }
    }

    /// Goes back to the small form where there is one chunk.
    fn settle(&mut self, len: usize) {
        if chunk_count(len) == 1
            && let Some(extent) = self.chunk(0).cloned()
        {
            *self = ExtentMap::One(extent);
        }
    }

    /// Takes the extents that were reserved and never written, for the first write of a whole
    /// object: all of them, or none. A reader that has the map keeps them where they are; one that
    /// only knows which map it was ([`MapIdentity`]) does not.
    pub(crate) fn take_reserved(&mut self, len: usize) -> Option<Vec<Extent>> {
        let unwritten =
            |extent: &Arc<Extent>| extent.sum().is_none() && Arc::strong_count(extent) == 1;
        let mine = match &*self {
            ExtentMap::Empty => false,
            ExtentMap::One(extent) => unwritten(extent),
            ExtentMap::Many(extents) => {
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
            ExtentMap::Empty => Vec::new(),
            ExtentMap::One(extent) => vec![Some(extent)],
            ExtentMap::Many(extents) => Arc::try_unwrap(extents).unwrap_or_default(),
        };
        // No reader had any of them just now, and a reader gets them only through the map.
        let unwrap = |extent: Option<Arc<Extent>>| Arc::try_unwrap(extent?).ok();
        extents.into_iter().map(|extent| unwrap(extent).map(Extent::into_unwritten)).collect()
    }
}

#[cfg(test)]
mod tests;
