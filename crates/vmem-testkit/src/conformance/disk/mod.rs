//! What every [`Tier`] has to pass.
//!
//! Invariant: at the end of each check the ledger is where it was, because every extent was
//! dropped; what is compared is `usage`, the contents and the checksums. Called by the tests of
//! each disk tier, with new and empty tiers.

mod ending;
mod space;
mod tools;

use std::slice;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use rand::Rng;
use rand::seq::SliceRandom;
use vmem_core::backend::{CHUNK_BYTES, Extent, IoBuf, ReadChunk, Tier, TierError};

use super::{IntoDisk, ODD_SIZES, POISON, assert_ok, assert_same, within};
use crate::{Pattern, Seed};
use tools::{Space, empty, fetch, in_sequence, reserve, store, verify, write};

pub use ending::{closes, closes_in_flight, dropped_futures};
pub use space::{footprints, fragmented, full};

/// The least capacity, in bytes, that the tiers under test should have.
pub const LEAST_CAPACITY: u64 = 4 * 1024 * 1024;

/// Runs every check of this module, each on a tier of `make`, which is empty and has
/// [`LEAST_CAPACITY`] or somewhat more (the checks fill it).
///
/// # Panics
///
/// With the check and what was wrong.
pub async fn all<D: IntoDisk>(seed: Seed, make: impl AsyncFn() -> D) {
    let make = async || make().await.into_disk();
    footprints(&*make().await);
    round_trips(seed, &*make().await).await;
    many_chunks(seed, &*make().await).await;
    places(seed, &*make().await).await;
    unwritten_is_zero(seed, &*make().await).await;
    full(seed, &*make().await).await;
    fragmented(seed, &*make().await);
    short_buffer(seed, &*make().await).await;
    dropped_futures(seed, &*make().await).await;
    concurrent(seed, make().await).await;
    closes(seed, &*make().await).await;
    closes_in_flight(seed, &*make().await).await;
}

/// Chunks of every awkward length, one by one.
pub async fn round_trips(seed: Seed, disk: &dyn Tier) {
    for (n, size) in ODD_SIZES.into_iter().enumerate() {
        let data = Pattern::new(seed.value(), n as u64).bytes(0, size);
        let extents = store(disk, &[data]).await;
        verify(seed, disk, &extents, &[(n as u64, size)]).await;
    }
    empty(disk, "round trips").await;
}

/// Many chunks in one call: adjacent ones, then scattered ones, read in another order.
pub async fn many_chunks(seed: Seed, disk: &dyn Tier) {
    let key = seed.value();
    let sizes: Vec<usize> = ODD_SIZES.into_iter().cycle().take(60).collect();
    let data: Vec<Bytes> = sizes
        .iter()
        .enumerate()
        .map(|(n, size)| Pattern::new(key, n as u64).bytes(0, *size))
        .collect();
    let mut extents = store(disk, &data).await;
    let taking: Vec<_> = extents.iter().filter(|extent| extent.footprint() > 0).collect();
    for pair in taking.windows(2) {
        let end = pair[0].offset() + u64::from(pair[0].footprint());
        assert_eq!(pair[1].offset(), end, "chunks in an empty tier are not contiguous");
    }
    let mut names: Vec<(u64, usize)> = (0..).zip(sizes).collect();
    verify(seed, disk, &extents, &names).await;
    extents.reverse();
    names.reverse();
    verify(seed, disk, &extents, &names).await;
    // Every third chunk goes; what comes next has to use the gaps and the rest.
    let gone = |n: usize| n.is_multiple_of(3);
    let kept = extents.into_iter().zip(names).enumerate().filter(|(n, _)| !gone(*n));
    let (mut extents, mut names): (Vec<_>, Vec<_>) = kept.map(|(_, pair)| pair).unzip();
    let more: Vec<(u64, usize)> = ODD_SIZES.map(|size| (1000 + size as u64, size)).to_vec();
    let data: Vec<Bytes> =
        more.iter().map(|(name, size)| Pattern::new(key, *name).bytes(0, *size)).collect();
    extents.extend(store(disk, &data).await);
    names.extend(more);
    verify(seed, disk, &extents, &names).await;
    drop(extents);
    empty(disk, "many chunks").await;
}

/// Chunks go to the places that the call names, in any order, and nothing between is touched.
pub async fn places(seed: Seed, disk: &dyn Tier) {
    const GAP: usize = 37;
    let mut rng = seed.fork("places").rng();
    let pattern = |n: usize| Pattern::new(seed.value(), n as u64);
    let data: Vec<Bytes> =
        (0..).zip(ODD_SIZES).map(|(n, size)| pattern(n).bytes(0, size)).collect();
    let extents = store(disk, &data).await;
    let mut order: Vec<usize> = (0..extents.len()).collect();
    order.shuffle(&mut rng);
    let mut len = GAP;
    let mut chunks = Vec::new();
    for n in &order {
        chunks.push(ReadChunk { extent: extents[*n].clone(), at: len });
        len += data[*n].len() + GAP;
    }
    chunks.shuffle(&mut rng);
    let buf = IoBuf::from_vec(vec![POISON; len]);
    let (buf, result) = within("scattered chunks", disk.read(chunks, buf)).await;
    assert_ok("a read of scattered chunks", result);
    let mut at = 0;
    for n in order {
        assert_same("the gap between chunks", &buf[at..at + GAP], &[POISON; GAP]);
        at += GAP;
        let what = format!("a scattered chunk of {} bytes", data[n].len());
        assert_same(&what, &buf[at..at + data[n].len()], &data[n]);
        at += data[n].len();
    }
    assert_same("the end of the buffer", &buf[at..], &[POISON; GAP]);
}

/// A reserved extent reads as zeros, also where another chunk was before.
pub async fn unwritten_is_zero(seed: Seed, disk: &dyn Tier) {
    let capacity = disk.usage().capacity_bytes;
    for round in 0..2 {
        let len = 8 * CHUNK_BYTES;
        let extents = reserve(disk, &[CHUNK_BYTES as u32; 8]);
        let extents: Vec<_> = extents.into_iter().map(Arc::new).collect();
        let (buf, result) = fetch(disk, &extents, len).await;
        assert_ok("a read of what was only reserved", result);
        assert_same(&format!("a reserved chunk, round {round}"), &buf[..len], &vec![0; len]);
        drop(extents);
        let count = (capacity / disk.footprint(CHUNK_BYTES as u32)).min(64);
        let data = Pattern::new(seed.value(), round).bytes(0, CHUNK_BYTES);
        drop(store(disk, &vec![data; count as usize]).await);
        empty(disk, "chunks between the rounds").await;
    }
}

/// A buffer that cannot hold the chunks is an error.
pub async fn short_buffer(seed: Seed, disk: &dyn Tier) {
    let data = Pattern::new(seed.value(), 0).bytes(0, 5000);
    let extents = store(disk, &[data]).await;
    let buf = IoBuf::from_vec(vec![POISON; 4999]);
    let (buf, result) = within("a short buffer", disk.read(in_sequence(&extents), buf)).await;
    assert!(result.is_err(), "5000 bytes were read into a buffer of 4999");
    assert_eq!(buf.len(), 4999, "another buffer came back");
    verify(seed, disk, &extents, &[(0, 5000)]).await;
}

/// 64 tasks at once: contents are right, extents disjoint, and usage is below the capacity.
pub async fn concurrent(seed: Seed, disk: Arc<dyn Tier>) {
    let space = Arc::new(Space::default());
    let tasks = (0..64).map(|n| mixture(seed.fork_nth("task", n), disk.clone(), space.clone()));
    let tasks: Vec<_> = tasks.map(tokio::spawn).collect();
    for task in within("64 tasks", join_all(tasks)).await {
        if let Err(error) = task {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    empty(&*disk, "64 tasks").await;
}

async fn mixture(seed: Seed, disk: Arc<dyn Tier>, space: Arc<Space>) {
    let mut rng = seed.rng();
    let mut held: Vec<(Arc<Extent>, (u64, usize))> = Vec::new();
    for n in 0..30 {
        let usage = disk.usage();
        assert!(usage.used_bytes <= usage.capacity_bytes, "above the capacity: {usage:?}");
        if rng.random_bool(0.4) && !held.is_empty() {
            let (extent, name) = held.swap_remove(rng.random_range(0..held.len()));
            verify(seed, &*disk, slice::from_ref(&extent), &[name]).await;
            space.leave(&extent);
            continue;
        }
        let size = ODD_SIZES[rng.random_range(0..ODD_SIZES.len())];
        let extents = match disk.reserve(&[size as u32]) {
            Ok(extents) => extents,
            Err(TierError::Full { .. }) => {
                tokio::task::yield_now().await;
                continue;
            }
            Err(error) => panic!("a chunk of {size} bytes: {error:?}"),
        };
        space.enter(&extents[0]);
        let data = Pattern::new(seed.value(), n).bytes(0, size);
        let extents = write(&*disk, extents, &[data]).await;
        held.extend(extents.into_iter().map(|extent| (extent, (n, size))));
    }
    let (extents, names): (Vec<_>, Vec<_>) = held.into_iter().unzip();
    verify(seed, &*disk, &extents, &names).await;
    extents.iter().for_each(|extent| space.leave(extent));
}

/// Every bit of a chunk, flipped by `flip(byte of the chunk's extent on the medium, bit)`, is
/// reported as `Corrupt` in that chunk, and only while it is flipped. Not part of [`all`], since it
/// needs a way past the tier.
pub async fn sees_every_flip(seed: Seed, disk: &dyn Tier, flip: impl Fn(u64, u8)) {
    let sizes = [700, 64];
    let data = [0, 1].map(|n| Pattern::new(seed.value(), n).bytes(0, sizes[n as usize]));
    let names = [(0, sizes[0]), (1, sizes[1])];
    let extents = store(disk, &data).await;
    for bit in 0..sizes[1] * 8 {
        let byte = extents[1].offset() + bit as u64 / 8;
        let bit = (bit % 8) as u8;
        flip(byte, bit);
        let (_, result) = fetch(disk, &extents, sizes[0] + sizes[1]).await;
        match result {
            Err(TierError::Corrupt { chunk: 1, expected, actual }) => {
                assert_eq!(Some(expected), extents[1].sum(), "the expected checksum");
                assert_ne!(expected, actual, "the checksums that should differ");
            }
            other => panic!("bit {bit} of byte {byte} was flipped, and the read: {other:?}"),
        }
        verify(seed, disk, &extents[..1], &names[..1]).await;
        flip(byte, bit);
    }
    verify(seed, disk, &extents, &names).await;
}
