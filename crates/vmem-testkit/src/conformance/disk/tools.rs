//! Steps that the checks of the disk tier share; each verifies what the trait promises of it.
//!
//! Invariant: extents that a step hands out were checked to be disjoint and of the lengths asked
//! for. Called by the suite.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use vmem_core::backend::{Extent, IoBuf, ReadChunk, Tier, TierError};

use crate::conformance::{POISON, assert_ok, assert_same, settle, within};
use crate::{Pattern, Seed};

/// Extents of all tasks, to see that none overlap.
#[derive(Debug, Default)]
pub(super) struct Space(Mutex<BTreeMap<u64, u64>>);

impl Space {
    pub(super) fn enter(&self, extent: &Extent) {
        let mut taken = self.0.lock();
        for (start, end) in bounds(extent).filter(|(start, end)| start < end) {
            if let Some((other, until)) = taken.range(..end).next_back() {
                assert!(*until <= start, "extents {start}..{end} and {other}..{until} overlap");
            }
            taken.insert(start, end);
        }
    }

    /// To be called before the extent is dropped.
    pub(super) fn leave(&self, extent: &Extent) {
        let mut taken = self.0.lock();
        for (start, _) in bounds(extent).filter(|(start, end)| start < end) {
            taken.remove(&start);
        }
    }
}

/// Where its runs start and end.
pub(super) fn bounds(extent: &Extent) -> impl Iterator<Item = (u64, u64)> + '_ {
    extent.runs().map(|run| (run.offset, run.offset + u64::from(run.footprint)))
}

pub(super) fn assert_disjoint(extents: &[Extent]) {
    let space = Space::default();
    extents.iter().for_each(|extent| space.enter(extent));
}

pub(super) fn reserve(disk: &dyn Tier, lens: &[u32]) -> Vec<Extent> {
    let extents = assert_ok(&format!("{} chunks", lens.len()), disk.reserve(lens));
    let actual: Vec<u32> = extents.iter().map(Extent::len).collect();
    assert_eq!(actual, lens, "lengths of the extents");
    assert_disjoint(&extents);
    extents
}

pub(super) fn assert_full(disk: &dyn Tier, lens: &[u32]) {
    let usage = disk.usage();
    let requested: u64 = lens.iter().map(|len| disk.footprint(*len)).sum();
    match disk.reserve(lens) {
        Err(TierError::Full { requested_bytes, free_bytes, .. }) => {
            assert_eq!(requested_bytes, requested, "requested_bytes of Full");
            assert_eq!(free_bytes, usage.capacity_bytes - usage.used_bytes, "free_bytes of Full");
        }
        other => panic!("{requested} bytes with {usage:?}: {:?}", other.map(|some| some.len())),
    }
}

pub(super) async fn store(disk: &dyn Tier, data: &[Bytes]) -> Vec<Arc<Extent>> {
    let lens: Vec<u32> = data.iter().map(|chunk| chunk.len() as u32).collect();
    write(disk, reserve(disk, &lens), data).await
}

pub(super) async fn write(
    disk: &dyn Tier,
    extents: Vec<Extent>,
    data: &[Bytes],
) -> Vec<Arc<Extent>> {
    let places: Vec<(u64, u64)> = extents.iter().flat_map(bounds).collect();
    let pieces = extents.into_iter().zip(data.iter().cloned()).collect();
    let extents = assert_ok("a write", within("a write", disk.write(pieces)).await);
    assert_eq!(extents.iter().flat_map(bounds).collect::<Vec<_>>(), places, "the extents written");
    for (extent, chunk) in extents.iter().zip(data) {
        let sum = crc32c::crc32c(chunk);
        assert_eq!(extent.sum(), Some(sum), "checksum of a chunk of {} bytes", chunk.len());
    }
    extents.into_iter().map(Arc::new).collect()
}

/// The chunks one after the other, from the front of a buffer.
pub(super) fn in_sequence(extents: &[Arc<Extent>]) -> Vec<ReadChunk> {
    ReadChunk::in_sequence(extents.iter().cloned())
}

/// Reads into a buffer that is one byte longer than the chunks.
pub(super) async fn fetch(
    disk: &dyn Tier,
    extents: &[Arc<Extent>],
    len: usize,
) -> (IoBuf, Result<(), TierError>) {
    let buf = IoBuf::from_vec(vec![POISON; len + 1]);
    within("a read", disk.read(in_sequence(extents), buf)).await
}

/// The chunks are those of these names: (number of the pattern, length).
pub(super) async fn verify(
    seed: Seed,
    disk: &dyn Tier,
    extents: &[Arc<Extent>],
    names: &[(u64, usize)],
) {
    let len = names.iter().map(|(_, size)| size).sum();
    let (buf, result) = fetch(disk, extents, len).await;
    assert_ok("a read", result);
    let mut at = 0;
    for (name, size) in names {
        let expected = Pattern::new(seed.value(), *name).bytes(0, *size);
        assert_same(&format!("chunk {name} of {size} bytes"), &buf[at..at + size], &expected);
        at += size;
    }
    assert_eq!(buf[len], POISON, "the byte behind the chunks was changed");
}

pub(super) async fn empty(disk: &dyn Tier, what: &str) {
    let what = format!("the tier is empty after: {what}");
    settle(&what, async || {
        let usage = disk.usage();
        assert!(usage.peak_bytes <= usage.capacity_bytes, "a peak above the capacity: {usage:?}");
        (usage.used_bytes, usage.extents) == (0, 0)
    })
    .await;
}
