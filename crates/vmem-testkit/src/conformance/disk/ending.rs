//! Checks of operations that end otherwise than by being awaited.
//!
//! Invariant: whatever happens to a future or to the tier, the space comes back. Called by the
//! suite.

use std::slice;

use futures::future::join_all;
use rand::Rng;
use vmem_core::backend::{CHUNK_BYTES, Extent, IoBuf, Tier, TierError};

use super::tools::{empty, fetch, in_sequence, reserve, store, verify, write};
use crate::conformance::{POISON, assert_ok, assert_same, settle, within};
use crate::{Pattern, Seed, poll_then_drop};

/// Futures dropped after any number of polls: the tier stays usable, all space comes back, and no
/// late write damages the next owner of the space.
pub async fn dropped_futures(seed: Seed, disk: &dyn Tier) {
    let mut rng = seed.fork("dropped futures").rng();
    let kept = store(disk, &[Pattern::new(seed.value(), 0).bytes(0, CHUNK_BYTES)]).await;
    let used = disk.usage().used_bytes;
    for n in 1..256 {
        let polls = rng.random_range(0..5);
        let count = rng.random_range(1..8);
        let lens: Vec<u32> = (0..count).map(|_| rng.random_range(0..=CHUNK_BYTES as u32)).collect();
        let lost = Pattern::new(seed.value(), 1_000_000 + n);
        let pieces = reserve_in_time(disk, &lens).await.into_iter();
        let pieces = pieces.map(|extent| {
            let data = lost.bytes(0, extent.len() as usize);
            (extent, data)
        });
        let writing = disk.write(pieces.collect());
        drop(poll_then_drop(writing, polls).await);
        let size = rng.random_range(1..=CHUNK_BYTES);
        let data = Pattern::new(seed.value(), n).bytes(0, size);
        let extents = reserve_in_time(disk, &[size as u32]).await;
        let next = write(disk, extents, &[data]).await;
        drop(disk.read(in_sequence(&next), IoBuf::from_vec(vec![POISON; size])));
        let reading = disk.read(in_sequence(&next), IoBuf::from_vec(vec![POISON; size]));
        drop(poll_then_drop(reading, polls).await);
        verify(seed, disk, &next, &[(n, size)]).await;
        drop(next);
        verify(seed, disk, &kept, &[(0, CHUNK_BYTES)]).await;
    }
    settle(SPACE_COMES_BACK, async || disk.usage().used_bytes == used).await;
    drop(kept);
    empty(disk, "dropped futures").await;
}

const SPACE_COMES_BACK: &str = "the space of dropped futures comes back";

/// What dropped futures left in flight may fill the tier for a while.
async fn reserve_in_time(disk: &dyn Tier, lens: &[u32]) -> Vec<Extent> {
    let mut extents = Vec::new();
    settle(SPACE_COMES_BACK, async || match disk.reserve(lens) {
        Ok(reserved) => {
            extents = reserved;
            true
        }
        Err(TierError::Full { .. }) => false,
        Err(error) => panic!("chunks of {lens:?} bytes: {error:?}"),
    })
    .await;
    extents
}

/// After `close` everything is `Closed`, and extents may still be dropped.
pub async fn closes(seed: Seed, disk: &dyn Tier) {
    let data = Pattern::new(seed.value(), 0).bytes(0, 5000);
    let written = store(disk, slice::from_ref(&data)).await;
    let reserved = reserve(disk, &[5000]);
    assert_ok("close", within("close", disk.close()).await);
    let late = disk.reserve(&[1]);
    assert!(matches!(late, Err(TierError::Closed)), "reserve after close: {late:?}");
    let pieces = reserved.into_iter().map(|extent| (extent, data.clone())).collect();
    let late = within("a write after close", disk.write(pieces)).await;
    assert!(matches!(late, Err(TierError::Closed)), "write after close: {late:?}");
    let (buf, late) = fetch(disk, &written, 5000).await;
    assert!(matches!(late, Err(TierError::Closed)), "read after close: {late:?}");
    assert_eq!(buf.len(), 5001, "another buffer came back");
    let _ok_or_closed = within("a second close", disk.close()).await;
    drop(written);
    empty(disk, "a closed tier").await;
}

/// `close` with operations in flight: each ends, well or as `Closed`, and gives its space back.
pub async fn closes_in_flight(seed: Seed, disk: &dyn Tier) {
    let data = Pattern::new(seed.value(), 0).bytes(0, CHUNK_BYTES);
    let written = store(disk, slice::from_ref(&data)).await;
    let lens = vec![CHUNK_BYTES as u32; 4];
    let writes: Vec<_> = (0..8)
        .map(|_| {
            let pieces = reserve(disk, &lens).into_iter();
            disk.write(pieces.map(|extent| (extent, data.clone())).collect())
        })
        .collect();
    let read = disk.read(in_sequence(&written), IoBuf::from_vec(vec![POISON; CHUNK_BYTES]));
    let closing = disk.close();
    let (writes, (buf, read), closed) = within("a close with calls in flight", async {
        futures::join!(join_all(writes), read, closing)
    })
    .await;
    assert_ok("close", closed);
    for result in writes {
        let ends = matches!(result, Ok(_) | Err(TierError::Closed));
        assert!(ends, "a write during close: {result:?}");
    }
    match read {
        Ok(()) => assert_same("a read during close", &buf, &data),
        Err(error) => assert!(matches!(error, TierError::Closed), "a read: {error:?}"),
    }
    drop(written);
    empty(disk, "a tier closed in flight").await;
}
