//! How many requests calls make.

use std::time::Duration;

use futures::future::join_all;
use vmem_core::backend::Tier;
use vmem_remote::RemoteOptions;

use super::faulty::{Fault, Op};
use super::{KIB, MIB, bytes, open, read, reserve, small, write};

fn count(seen: &[(Op, Option<std::ops::Range<u64>>)], op: Op) -> usize {
    seen.iter().filter(|(it, _)| *it == op).count()
}

#[tokio::test(start_paused = true)]
async fn million_bytes_in_small_chunks_is_one_put_and_one_get() {
    let (tier, store) = open(RemoteOptions::default()).await;
    store.take_seen();
    let payloads: Vec<_> = (0..200).map(|name| bytes(name, 5000)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    assert!(read(&*tier, &extents).await.unwrap() == payloads.concat());
    let seen = store.take_seen();
    assert_eq!(seen, [(Op::Put, None), (Op::Get, Some(0..1_000_000))]);
    assert_eq!((tier.stats().segments, tier.stats().stored_bytes), (1, 1_000_000));
}

#[tokio::test(start_paused = true)]
async fn calls_behind_a_put_share_one() {
    let (tier, store) = open(RemoteOptions::default()).await;
    store.take_seen();
    let payloads: Vec<_> = (0..200).map(|name| bytes(name, 5000)).collect();
    let calls = payloads.chunks(1).map(|payload| write(&*tier, payload));
    let extents: Vec<_> = join_all(calls).await.into_iter().flat_map(Result::unwrap).collect();
    let seen = store.take_seen();
    assert_eq!(seen, [(Op::Put, None), (Op::Put, None)], "the first at once, the others together");
    assert!(read(&*tier, &extents).await.unwrap() == payloads.concat());
    let seen = store.take_seen();
    assert_eq!(seen, [(Op::Get, Some(0..5000)), (Op::Get, Some(0..995_000))]);
}

#[tokio::test(start_paused = true)]
async fn call_beyond_a_segment_is_one_upload_in_parts() {
    let (tier, store) = open(small()).await;
    store.take_seen();
    let payloads: Vec<_> = (0..21).map(|name| bytes(name, 50_000)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    let seen = store.take_seen();
    assert_eq!(count(&seen, Op::Part), 1_050_000_usize.div_ceil(64 * KIB));
    assert_eq!((count(&seen, Op::Complete), count(&seen, Op::Put)), (1, 0));
    assert!(read(&*tier, &extents).await.unwrap() == payloads.concat());
    let longest = store.take_seen().into_iter().filter_map(|(_, range)| range);
    let longest = longest.map(|range| range.end - range.start).max();
    assert_eq!(longest, Some(100_000), "two chunks, of at most {} bytes", 128 * KIB);
}

#[tokio::test(start_paused = true)]
async fn gaps_are_read_only_where_they_are_small() {
    let options = RemoteOptions { gap_bytes: 1000, ..RemoteOptions::default() };
    let (tier, store) = open(options).await;
    let lens = [1000, 1000, 1000, 1001, 1000, 999, 1000];
    let payloads: Vec<_> = (0..).zip(lens).map(|(name, len)| bytes(name, len)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    store.take_seen();
    let wanted = [6, 0, 4, 2].map(|at: usize| extents[at].clone());
    let expected = [6, 0, 4, 2].map(|at: usize| payloads[at].clone()).concat();
    assert!(read(&*tier, &wanted).await.unwrap() == expected);
    let seen = store.take_seen();
    assert_eq!(seen, [(Op::Get, Some(0..3000)), (Op::Get, Some(4001..7000))]);
}

#[tokio::test(start_paused = true)]
async fn unwritten_and_empty_chunks_need_no_request() {
    let (tier, store) = open(small()).await;
    store.take_seen();
    let empty = write(&*tier, &[bytes(1, 0), bytes(2, 0)]).await.unwrap();
    assert!(empty.iter().all(|extent| extent.sum() == Some(0)));
    let unwritten = tier.reserve(&[3000, 0, 500]).unwrap();
    let unwritten = unwritten.into_iter().map(std::sync::Arc::new).chain(empty);
    assert_eq!(read(&*tier, &unwritten.collect::<Vec<_>>()).await.unwrap(), [0; 3500]);
    assert_eq!(store.take_seen(), []);
}

/// Excluded: all writes stand behind one that gets no answer.
#[tokio::test(start_paused = true)]
async fn put_that_gets_no_answer_delays_others_by_one_try() {
    let (tier, store) = open(small()).await;
    let mut puts = 0;
    store.fail(move |op| {
        puts += usize::from(op == Op::Put);
        (op == Op::Put && puts == 1).then_some(Fault::Silent)
    });
    let first = tokio::spawn(tier.write(reserve(&*tier, &[bytes(1, 100)])));
    let began = tokio::time::Instant::now();
    let other = write(&*tier, &[bytes(2, 100)]).await.unwrap();
    assert_eq!(began.elapsed(), small().request_timeout);
    assert!(!first.is_finished(), "it is in its backoff");
    assert_eq!(read(&*tier, &other).await.unwrap(), bytes(2, 100));
    first.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn full_segments_are_put_beside_each_other() {
    let (tier, store) = open(RemoteOptions { segment_bytes: 256 << 10, ..small() }).await;
    store.fail(|_| Some(Fault::Slow(Duration::from_secs(1))));
    let began = tokio::time::Instant::now();
    let chunk = bytes(1, 64 * KIB);
    let calls = (0..16).map(|_| write(&*tier, std::slice::from_ref(&chunk)));
    let written = join_all(calls).await;
    assert!(written.iter().all(Result::is_ok));
    // A put of one chunk, and uploads of four, three at a time beside it: two of them take as long
    // as one put, since their parts and their completion come one after the other.
    assert!(began.elapsed() <= Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(tier.stats().stored_bytes == MIB as u64);
}
