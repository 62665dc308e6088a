//! Checks of the ledger: what is taken, what is free, and what is said of it.
//!
//! Invariant: every number of `usage` follows from the extents that exist. Called by the suite.

use rand::Rng;
use vmem_core::backend::{CHUNK_BYTES, Extent, Tier, TierError};

use super::tools::{assert_disjoint, assert_full, empty, reserve, store, verify};
use crate::conformance::ODD_SIZES;
use crate::{Pattern, Seed};

/// Rounding: at least the payload, never less for more, and what is taken is what was said.
pub fn footprints(disk: &dyn Tier) {
    let mut sizes: Vec<u32> = ODD_SIZES.map(|size| size as u32).to_vec();
    sizes.sort_unstable();
    let mut last = 0;
    for len in sizes {
        let said = disk.footprint(len);
        assert!(said >= u64::from(len), "footprint({len}) = {said} is less than the payload");
        assert!(said >= last, "footprint({len}) = {said} is less than that of a smaller chunk");
        last = said;
        let before = disk.usage();
        let extents = reserve(disk, &[len]);
        let extent = &extents[0];
        let after = disk.usage();
        assert_eq!(u64::from(extent.footprint()), said, "footprint of an extent of {len}");
        assert_eq!(extent.len(), len, "length of an extent of {len}");
        assert_eq!(extent.sum(), None, "an extent has a checksum before it was written");
        assert_eq!(after.used_bytes - before.used_bytes, said, "used by an extent of {len}");
        assert_eq!(after.extents - before.extents, 1, "extents counted for one");
        drop(extents);
        assert_eq!(disk.usage().used_bytes, before.used_bytes, "used after the drop of {len}");
    }
    assert!(reserve(disk, &[]).is_empty(), "no lengths give no extents");
    let usage = disk.usage();
    assert_eq!((usage.used_bytes, usage.extents), (0, 0), "usage at the end");
    assert!(usage.peak_bytes >= last, "the peak was at least {last}");
}

/// More than there is: `Full` with the numbers, and nothing has changed; exactly what there is:
/// fits.
pub async fn full(seed: Seed, disk: &dyn Tier) {
    let chunk = CHUNK_BYTES as u32;
    let footprint = disk.footprint(chunk);
    let fits = (disk.usage().capacity_bytes / footprint) as usize;
    let data = Pattern::new(seed.value(), 0).bytes(0, CHUNK_BYTES);
    let held = store(disk, &[data]).await;
    let before = disk.usage();
    assert_full(disk, &vec![chunk; fits]);
    let after = disk.usage();
    assert_eq!((after.used_bytes, after.extents), (before.used_bytes, before.extents));
    let rest = reserve(disk, &vec![chunk; fits - 1]);
    assert!(disk.usage().used_bytes <= before.capacity_bytes, "above the capacity");
    assert_full(disk, &[chunk]);
    verify(seed, disk, &held, &[(0, CHUNK_BYTES)]).await;
    drop(rest);
    assert_eq!(disk.usage().used_bytes, before.used_bytes, "used after the rest was dropped");
    drop(reserve(disk, &vec![chunk; fits - 1]));
    drop(held);
    empty(disk, "a full tier").await;
}

/// With the free space in pieces: what the largest of them holds fits.
pub fn fragmented(seed: Seed, disk: &dyn Tier) {
    let mut rng = seed.fork("fragmented").rng();
    let mut held: Vec<Extent> = Vec::new();
    loop {
        let len = rng.random_range(1..=16_384);
        match disk.reserve(&[len]) {
            Ok(extents) => held.extend(extents),
            Err(TierError::Full { .. }) => break,
            Err(error) => panic!("a chunk of {len} bytes: {error:?}"),
        }
    }
    let mut sum = held.iter().map(|extent| u64::from(extent.footprint())).sum::<u64>();
    assert_eq!(disk.usage().used_bytes, sum, "used by {} extents", held.len());
    assert_disjoint(&held);
    while let Some(index) = (held.len() > 20).then(|| rng.random_range(0..held.len())) {
        sum -= u64::from(held.swap_remove(index).footprint());
        let usage = disk.usage();
        assert_eq!(usage.used_bytes, sum, "used by {} extents", held.len());
        let free = usage.capacity_bytes - usage.used_bytes;
        assert!(usage.largest_free_bytes <= free, "{usage:?}");
        let len = rng.random_range(1..=CHUNK_BYTES as u32);
        let should_fit = disk.footprint(len) <= usage.largest_free_bytes;
        let fits = disk.reserve(&[len]).is_ok();
        // A disk may do better, and take the chunk apart.
        assert!(fits || !should_fit, "{len} bytes do not fit, with {usage:?}");
    }
}
