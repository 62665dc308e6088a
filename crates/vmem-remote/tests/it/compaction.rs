//! Segments of which little is in use.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::seq::SliceRandom;
use vmem_core::backend::{Extent, Tier, TierError};
use vmem_remote::{RemoteOptions, RemoteTier};

use super::faulty::{Fault, Faulty, Op};
use super::{KIB, bytes, emptied, open, read, seed, small, stored, write};

/// A segment of 16 chunks of 16 KiB; the last three of them.
async fn mostly_dead(tier: &RemoteTier) -> (Vec<Arc<Extent>>, Vec<u8>) {
    let payloads: Vec<_> = (0..16).map(|name| bytes(name, 16 * KIB)).collect();
    let mut extents = write(tier, &payloads).await.unwrap();
    drop(extents.drain(..13));
    (extents, payloads[13..].concat())
}

/// Waits until the bucket has at most this many bytes.
async fn shrunk(store: &Faulty, bytes: u64) {
    for _ in 0..20_000 {
        if stored(store).await.1 <= bytes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?} in the bucket, not {bytes}", stored(store).await);
}

#[tokio::test(start_paused = true)]
async fn chunks_of_a_mostly_dead_segment_move_to_a_new_one() {
    let (tier, store) = open(small()).await;
    let (extents, expected) = mostly_dead(&tier).await;
    shrunk(&store, 3 * 16 * KIB as u64).await;
    assert_eq!(stored(&*store).await.0, 1);
    assert_eq!((tier.stats().segments, tier.stats().stored_bytes), (1, 3 * 16 * KIB as u64));
    assert!(read(&*tier, &extents).await.unwrap() == expected);
    drop(extents);
    emptied(&*store).await;
}

#[tokio::test(start_paused = true)]
async fn reader_keeps_the_segment_that_it_reads() {
    let (tier, store) = open(small()).await;
    // A reader of a chunk that is going to move, and whose body comes in ten seconds' time.
    let payloads: Vec<_> = (0..16).map(|name| bytes(name, 16 * KIB)).collect();
    let mut extents = write(&*tier, &payloads).await.unwrap();
    let mut is_first = true;
    store.fail(move |op| {
        let is_slow = op == Op::Get && std::mem::take(&mut is_first);
        is_slow.then_some(Fault::Slow(Duration::from_secs(9)))
    });
    let reading = tokio::spawn({
        let tier = tier.clone();
        let last = extents[15].clone();
        async move { read(&*tier, &[last]).await }
    });
    while store.hit() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(extents.drain(..13));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(stored(&*store).await.0, 2, "it was copied, and is there");
    assert!(read(&*tier, &extents).await.unwrap() == payloads[13..].concat(), "from the copy");
    assert!(!reading.is_finished());
    assert_eq!(reading.await.unwrap().unwrap(), payloads[15]);
    shrunk(&store, 3 * 16 * KIB as u64).await;
}

#[tokio::test(start_paused = true)]
async fn damaged_chunks_are_not_copied() {
    let (tier, store) = open(small()).await;
    store.fail(|op| (op == Op::Get).then_some(Fault::Flipped));
    let (extents, expected) = mostly_dead(&tier).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(stored(&*store).await, (1, 16 * 16 * KIB as u64), "it stays as it is");
    let refused = read(&*tier, &extents).await;
    assert!(matches!(refused, Err(TierError::Corrupt { .. })), "{refused:?}");
    store.heal();
    assert!(read(&*tier, &extents).await.unwrap() == expected);
    drop(extents);
    emptied(&*store).await;
}

#[tokio::test(start_paused = true)]
async fn compaction_that_failed_is_made_again() {
    let (tier, store) = open(small()).await;
    let payloads: Vec<_> = (0..16).map(|name| bytes(name, 16 * KIB)).collect();
    let mut extents = write(&*tier, &payloads).await.unwrap();
    store.fail(|op| (op != Op::Delete).then_some(Fault::Lost));
    drop(extents.drain(..13));
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(tier.stats().failed > 0);
    store.heal();
    shrunk(&store, 3 * 16 * KIB as u64).await;
    assert!(read(&*tier, &extents).await.unwrap() == payloads[13..].concat());
}

/// Readers, writers and ends of extents at random, on threads, over segments that are compacted all
/// the while: each read gives what was written, and the bucket keeps to its bound.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn compaction_under_readers_spoils_nothing() {
    let seed = seed();
    let options = RemoteOptions { segment_bytes: 128 << 10, ..small() };
    let (tier, store) = open(options).await;
    let tasks = (0..6).map(|task| {
        let tier = tier.clone();
        tokio::spawn(async move {
            let mut rng = seed.fork_nth("task", task).rng();
            let mut held: Vec<(Arc<Extent>, bytes::Bytes)> = Vec::new();
            for n in 0..150 {
                let payloads: Vec<_> = (0..rng.random_range(1..20))
                    .map(|k| bytes(task << 32 | n << 8 | k, rng.random_range(1..9000)))
                    .collect();
                held.extend(write(&*tier, &payloads).await.unwrap().into_iter().zip(payloads));
                held.shuffle(&mut rng);
                let some = held.len().min(10);
                let extents: Vec<_> = held[..some].iter().map(|(it, _)| it.clone()).collect();
                let expected: Vec<_> = held[..some].iter().flat_map(|(_, it)| it.clone()).collect();
                assert!(read(&*tier, &extents).await.unwrap() == expected, "{task} {n}");
                held.truncate(rng.random_range(10..60));
            }
            held
        })
    });
    let held: Vec<_> = futures::future::join_all(tasks).await;
    let held: Vec<_> = held.into_iter().flat_map(Result::unwrap).collect();
    let live: u64 = held.iter().map(|(extent, _)| u64::from(extent.len())).sum();
    // Half of each segment, and half a segment of those that are not worth a copy yet.
    shrunk(&store, 2 * live + (64 << 10)).await;
    for (extent, expected) in &held {
        assert!(read(&*tier, std::slice::from_ref(extent)).await.unwrap() == *expected);
    }
    drop(held);
    emptied(&*store).await;
    assert_eq!(tier.usage().used_bytes, 0);
}
