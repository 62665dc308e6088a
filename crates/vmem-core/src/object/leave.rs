//! Leaving memory: drops the record of a named object that only the catalog needs.
//!
//! Invariant: an object leaves only if the table of names has its last handle, its current version
//! is the durable one and nowhere but in the tier that names lead to, and nothing else has a share
//! of its extents. Then opening the name again makes an object of the same bytes, and freeing those
//! extents later takes them from no reader of this one.
//!
//! Called by `names/closed.rs`; a gate that opens offers its object.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{DEAD, ExtentMap, GatePass, Object};
use crate::chunk::chunk_count;
use crate::parcel::WeakParcel;

/// The outcome of an attempt to let an object leave memory.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It is dead: the holder of the gate takes it out of the tables.
    Left,
    /// It is open, resident in a faster tier, or not durable; a change of that offers it again.
    Stays,
    /// Something in flight uses it; nothing offers it again.
    InUse,
}

impl Object {
    /// Offers the object to those that may leave memory, if the table of names has its only handle.
    pub(crate) fn offer_if_closed(self: &Arc<Self>) {
        if self.named.get().is_none() {
            return;
        }
        // One has dropped a handle and looks at the copy, the other has dropped the copy and looks
        // at the handles: one of the two sees both.
        fence(Ordering::SeqCst);
        if self.is_closed() && !self.copy.is_some() {
            self.shared.tell_closed(self);
        }
    }

    /// Whether one handle is left, which is that of the table of names if the object has a name.
    pub(super) fn is_closed(&self) -> bool {
        self.life.load(Ordering::SeqCst) == 1
    }

    /// Ends the object if it may leave memory. `durable` is the map of the durable version.
    ///
    /// The caller holds the lock of the name's entry, so that no call gets a handle from the table,
    /// and the one lock under which `durable` can be cloned.
    pub(crate) fn try_leave(&self, _pass: &GatePass, durable: &ExtentMap) -> Leave {
        if !self.is_closed() {
            return Leave::Stays;
        }
        let inner = self.inner.lock();
        let resident = self.copy.is_some()
            || inner.rare.spare.is_some()
            || !inner.rare.devices.is_empty()
            || inner.rare.pending.is_some()
            || inner.rare.dirty.is_some()
            || self.pins() > 0;
        if resident || !inner.extents.is_stored_as(durable, self.len) {
            return Leave::Stays;
        }
        let flight = inner.flight.as_ref().and_then(WeakParcel::upgrade);
        if flight.is_some() || !inner.extents.is_shared_only_with(durable) {
            return Leave::InUse;
        }
        // Under the object's lock: no reader takes a share of the version between the look and
        // this.
        let ended = self.life.compare_exchange(1, DEAD | 1, Ordering::SeqCst, Ordering::SeqCst);
        if ended.is_ok() { Leave::Left } else { Leave::Stays }
    }

    /// Whether its bytes are those of the durable version, of which this is the map, and no write
    /// is under way.
    pub(crate) fn is_as_durable(self: &Arc<Self>, durable: &ExtentMap) -> bool {
        let Some(_pass) = self.try_gate() else { return false };
        if self.is_dirty() || self.is_dirty_on_device() {
            return false;
        }
        let current = self.extents().in_level(self.shared.durable_level());
        current.is_some_and(|current| current.is_stored_as(durable, self.len))
    }
}

impl ExtentMap {
    /// Whether both have the same extents, all of them written.
    fn is_stored_as(&self, other: &ExtentMap, len: usize) -> bool {
        (0..chunk_count(len)).all(|index| match (self.chunk(index), other.chunk(index)) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) && one.sum().is_some(),
            _ => false,
        })
    }

    /// Whether the two maps, which have the same extents, have all shares of them.
    fn is_shared_only_with(&self, other: &ExtentMap) -> bool {
        match (self, other) {
            (ExtentMap::One(extent), ExtentMap::One(_)) => Arc::strong_count(extent) == 2,
            (ExtentMap::Many(one), ExtentMap::Many(other)) => {
                let same = Arc::ptr_eq(one, other);
                let (maps, shares) = if same { (2, 1) } else { (1, 2) };
                let mine = |extents: &Arc<Vec<_>>| Arc::strong_count(extents) == maps;
                let mut extents = one.iter().flatten();
                mine(one) && mine(other) && extents.all(|one| Arc::strong_count(one) == shares)
            }
            // There is no extent to share.
            (one, other) => one.is_empty() && other.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Extent, ExtentOwner, SharedOwner};

    #[derive(Debug)]
    struct Nobody;

    impl ExtentOwner for Nobody {
        fn release(&self, _offset: u64, _footprint: u32) {}
    }

    fn extent(len: u32) -> Extent {
        let mut extent = Extent::new(0, len, 512, SharedOwner::new(Nobody));
        extent.seal(7);
        extent
    }

    #[test]
    fn shares_of_others_are_seen_in_maps_of_every_form() {
        let len = 300;
        let one = ExtentMap::of(vec![extent(len)]);
        let same = one.clone();
        assert!(one.is_stored_as(&same, len as usize) && one.is_shared_only_with(&same));
        let version = one.clone();
        assert!(!one.is_shared_only_with(&same), "a reader has the map");
        drop(version);
        let read = one.chunk(0).cloned();
        assert!(!one.is_shared_only_with(&same), "a read has the extent");
        drop(read);
        assert!(one.is_shared_only_with(&same));

        let len = 2 * crate::chunk::CHUNK_BYTES + 300;
        let extents = || vec![Some(extent(300)), None, Some(extent(300))];
        let many = ExtentMap::of_some(extents());
        let same = many.clone();
        assert!(many.is_stored_as(&same, len) && many.is_shared_only_with(&same));
        let version = many.clone();
        assert!(!many.is_shared_only_with(&same), "a reader has the map");
        drop(version);
        let read = many.chunk(2).cloned();
        assert!(!many.is_shared_only_with(&same), "a read has an extent");
        drop((read, same));
        // Another map of the same extents, as after a write to what was put back.
        let other = match &many {
            ExtentMap::Many(extents) => ExtentMap::Many(Arc::new(extents.to_vec())),
            ExtentMap::Empty | ExtentMap::One(_) => unreachable!("it has three chunks"),
        };
        assert!(many.is_stored_as(&other, len) && many.is_shared_only_with(&other));
        let read = many.chunk(0).cloned();
        assert!(!many.is_shared_only_with(&other), "a read has an extent");
        drop(read);
        assert!(!many.is_stored_as(&ExtentMap::of_some(extents()), len), "other extents");
        assert!(ExtentMap::Empty.is_shared_only_with(&ExtentMap::Empty));
    }

    #[test]
    fn space_that_was_taken_and_never_written_is_not_stored() {
        let reserved = Extent::new(0, 300, 512, SharedOwner::new(Nobody));
        let map = ExtentMap::of(vec![reserved]);
        assert!(!map.is_stored_as(&map.clone(), 300), "a restart would not find the space");
    }
}
