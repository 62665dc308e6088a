//! Maps that change, over extents of no disk.
//!
//! Invariant: nothing here reads or writes a byte. Run as the tests of the map.

use super::*;
use crate::chunk::{CHUNK_BYTES, chunk_len};
use crate::storage::{ExtentOwner, SharedOwner};

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
    let mut map = ExtentMap::of(vec![extent(0), extent(1)]);
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
    let one = ExtentMap::Empty.identity();
    let other = ExtentMap::Empty.identity();
    assert!(one.is_same(&other));
    let chunks = ExtentMap::of_some(vec![None, None]);
    assert!(!one.is_same(&chunks.identity()));
    assert!(chunks.identity().is_same(&chunks.clone().identity()));
    assert!(!chunks.identity().is_same(&ExtentMap::of_some(vec![None, None]).identity()));
}

fn extent_in(level: usize, sealed: bool) -> Arc<Extent> {
    let mut extent = Extent::new(0, 7, 512, SharedOwner::new(Disk));
    extent.set_level(level);
    if sealed {
        extent.seal(3);
    }
    Arc::new(extent)
}

#[test]
fn chunk_leaves_a_tier_where_a_slower_one_has_it() {
    let len = 3 * CHUNK_BYTES;
    let mut old = Replaced::new();
    let mut map = ExtentMap::default();
    let both = extent_in(0, true);
    both.set_below(extent_in(1, true));
    map.put_shared(len, [(0, both), (1, extent_in(0, true)), (2, extent_in(1, true))], &mut old);
    assert_eq!((map.levels(), map.slowest_level()), (0b11, 1));
    assert!(map.is_whole(len) && !map.is_whole_in(len, 0) && !map.is_whole_in(len, 1));
    assert!(map.is_dirty_in(0), "chunk 1 is on disk alone");
    let missing: Vec<_> = map.missing_in(1).into_iter().map(|(index, _)| index).collect();
    assert_eq!(missing, [1]);
    assert!(map.drop_from(len, 0, &mut old));
    let levels: Vec<_> = (0..3).map(|index| map.chunk(index).unwrap().level()).collect();
    assert_eq!(levels, [1, 0, 1], "what only one tier has stays");
    assert!(!map.drop_from(len, 0, &mut old));
    map.chunk(1).unwrap().set_below(extent_in(1, true));
    assert!(map.is_whole_in(len, 1) && !map.is_dirty_in(0));
    assert!(map.drop_from(len, 0, &mut old) && map.levels() == 0b10);
}

#[test]
fn extent_that_is_taken_for_a_first_write_leads_nowhere() {
    let reserved = extent_in(0, false);
    reserved.set_below(extent_in(1, false));
    let mut map = ExtentMap::One(reserved);
    let taken = map.take_reserved(7).unwrap();
    assert!(taken.iter().all(|extent| extent.below().is_none()));
    assert_eq!(taken[0].runs().count(), 1);
}
