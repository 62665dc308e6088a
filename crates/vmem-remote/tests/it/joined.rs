//! Reads of different calls that share requests.
//!
//! Excluded: a call that ends for what concerns another one, be it damage, or a caller that goes;
//! and a request that goes on although no caller waits for it any more.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use vmem_core::backend::{IoBuf, ReadChunk, Tier, TierError};
use vmem_remote::RemoteOptions;

use super::faulty::{Fault, Op};
use super::{KIB, bytes, open, read, small, stored, write};

#[tokio::test(start_paused = true)]
async fn calls_that_come_together_share_a_get() {
    let (tier, store) = open(RemoteOptions::default()).await;
    let payloads: Vec<_> = (0..64).map(|name| bytes(name, 4096)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    store.take_seen();
    let together = join_all(extents.chunks(1).map(|one| read(&*tier, one))).await;
    for (read, payload) in together.into_iter().zip(&payloads) {
        assert!(read.unwrap() == *payload);
    }
    assert_eq!(store.take_seen(), [(Op::Get, Some(0..64 * 4096))]);
    for one in extents.chunks(1) {
        read(&*tier, one).await.unwrap();
    }
    assert_eq!(store.take_seen().len(), 64, "none waits for the next");
}

#[tokio::test(start_paused = true)]
async fn large_calls_have_requests_of_their_own() {
    let (tier, store) = open(small()).await;
    let payloads: Vec<_> = (0..4).map(|name| bytes(name, 10 * KIB)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    store.take_seen();
    let together = join_all(extents.chunks(1).map(|one| read(&*tier, one))).await;
    assert!(together.iter().all(Result::is_ok));
    assert_eq!(store.take_seen().len(), 4, "more than a sixteenth of 128 KiB");
}

#[tokio::test(start_paused = true)]
async fn damage_is_an_error_of_its_call_alone() {
    let (tier, store) = open(RemoteOptions::default()).await;
    let payloads: Vec<_> = (0..8).map(|name| bytes(name, 1000)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    let bucket: &dyn ObjectStore = &*store;
    let listed: Vec<_> = futures::TryStreamExt::try_collect(bucket.list(None)).await.unwrap();
    let is_segment = |meta: &&object_store::ObjectMeta| meta.size == 8000;
    let path = listed.iter().find(is_segment).unwrap().location.clone();
    let mut segment = bucket.get(&path).await.unwrap().bytes().await.unwrap().to_vec();
    segment[5500] ^= 1;
    bucket.put(&path, PutPayload::from(segment)).await.unwrap();
    store.take_seen();
    // Two chunks a call: those of the third are 4 and 5.
    let together = join_all(extents.chunks(2).map(|two| read(&*tier, two))).await;
    for (nth, read) in together.into_iter().enumerate() {
        if nth == 2 {
            let error = read.unwrap_err();
            assert!(matches!(error, TierError::Corrupt { chunk: 1, .. }), "{error:?}");
        } else {
            assert!(read.unwrap() == payloads[2 * nth..2 * nth + 2].concat());
        }
    }
    assert_eq!(store.take_seen().len(), 2, "all together, and once more");
}

#[tokio::test(start_paused = true)]
async fn callers_that_go_delay_nobody_and_end_what_is_for_them_alone() {
    let (tier, store) = open(RemoteOptions::default()).await;
    let payloads: Vec<_> = (0..4).map(|name| bytes(name, 1000)).collect();
    let extents = write(&*tier, &payloads).await.unwrap();
    store.fail(|op| (op == Op::Get).then_some(Fault::Slow(Duration::from_secs(2))));
    let call = |nth: usize| {
        let chunks = ReadChunk::in_sequence([Arc::clone(&extents[nth])].to_vec());
        tier.read(chunks, IoBuf::from_vec(vec![0; 1000]))
    };
    let mut calls: Vec<_> = (0..4).map(|nth| call(nth).boxed()).collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(calls.drain(..3));
    let (buf, result) = calls.remove(0).await;
    result.unwrap();
    assert!(buf[..] == payloads[3][..]);
    // All go: the segment is free at once, though the request would take another second.
    let all: Vec<_> = (0..4).map(call).collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(all);
    drop(extents);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(stored(&*store).await.0, 0);
    tier.close().await.unwrap();
}
