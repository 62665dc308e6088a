//! Calls and tiers that end early.

use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use vmem_core::backend::{IoBuf, ReadChunk, Tier, TierError};
use vmem_remote::{RemoteOptions, RemoteTier};
use vmem_testkit::{exhaust, poll_then_drop};

use super::faulty::{Fault, Op};
use super::{bytes, emptied, open, read, reserve, small, stored, write};

#[tokio::test(start_paused = true)]
async fn calls_dropped_at_each_point_leave_nothing() {
    let (tier, store) = open(small()).await;
    store.fail(|_| Some(Fault::Slow(Duration::from_millis(3))));
    let payloads = vec![bytes(1, 30_000); 4];
    let polls = exhaust(|_| tier.write(reserve(&*tier, &payloads))).await;
    assert!(polls > 1, "{polls}");
    emptied(&*store).await;
    assert_eq!(tier.usage().used_bytes, 0);
    let kept = write(&*tier, &payloads).await.unwrap();
    let chunks = || ReadChunk::in_sequence(kept.clone());
    let polls = exhaust(|_| tier.read(chunks(), IoBuf::from_vec(vec![0; 120_000]))).await;
    assert!(polls > 1, "{polls}");
    assert!(read(&*tier, &kept).await.unwrap() == payloads.concat());
    drop(kept);
    emptied(&*store).await;
}

#[tokio::test(start_paused = true)]
async fn call_that_nobody_awaits_is_not_put() {
    let (tier, store) = open(small()).await;
    store.fail(|_| Some(Fault::Slow(Duration::from_secs(1))));
    store.take_seen();
    let first = tokio::spawn(tier.write(reserve(&*tier, &[bytes(1, 100)])));
    drop(poll_then_drop(tier.write(reserve(&*tier, &[bytes(2, 100)])), 1).await);
    first.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(store.take_seen().iter().filter(|(op, _)| *op == Op::Put).count(), 1);
    assert_eq!(tier.usage().extents, 0);
}

#[tokio::test(start_paused = true)]
async fn close_waits_for_what_is_in_flight_and_deletes_all() {
    let (tier, store) = open(small()).await;
    let kept = write(&*tier, &vec![bytes(1, 1000); 3]).await.unwrap();
    store.fail(|_| Some(Fault::Slow(Duration::from_secs(2))));
    let reading = tokio::spawn({
        let tier = tier.clone();
        let kept = kept.clone();
        async move { read(&*tier, &kept).await }
    });
    let writing = tokio::spawn(tier.write(reserve(&*tier, &[bytes(2, 1000)])));
    let queued = tokio::spawn(tier.write(reserve(&*tier, &[bytes(3, 1000)])));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // A close that was begun ends, whatever becomes of its future.
    drop(poll_then_drop(tier.close(), 1).await);
    let late = tier.write(Vec::new()).await;
    assert!(matches!(late, Err(TierError::Closed)), "{late:?}");
    assert!(matches!(queued.await.unwrap(), Err(TierError::Closed)), "nothing is put any more");
    assert!(!writing.is_finished() && !reading.is_finished());
    tier.close().await.unwrap();
    assert!(writing.await.unwrap().is_ok(), "it was in flight");
    assert!(reading.await.unwrap().unwrap() == vec![bytes(1, 1000); 3].concat());
    assert_eq!(stored(&*store).await, (0, 0));
    drop(kept);
    assert_eq!(tier.usage().extents, 0);
    tier.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn close_without_an_answer_is_a_typed_error() {
    let (tier, store) = open(small()).await;
    let kept = write(&*tier, &[bytes(1, 1000)]).await.unwrap();
    store.fail(|_| Some(Fault::Refused));
    let closed = tier.close().await;
    assert!(matches!(closed, Err(TierError::Io { operation: "delete", .. })), "{closed:?}");
    assert_eq!(stored(&*store).await.0, 1, "it says that something is left");
    drop(kept);
}

#[test]
fn tier_whose_runtime_has_gone_answers_with_errors() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let first = runtime();
    let (tier, kept) = first.block_on(async {
        let tier = RemoteTier::open(Arc::new(InMemory::new()), RemoteOptions::default());
        let tier = tier.await.unwrap();
        let kept = write(&*tier, &vec![bytes(1, 1000); 2]).await.unwrap();
        (tier, kept)
    });
    drop(first);
    runtime().block_on(async {
        let refused = read(&*tier, &kept).await;
        assert!(matches!(refused, Err(TierError::Io { operation: "read", .. })), "{refused:?}");
        for _ in 0..3 {
            let refused = write(&*tier, &[bytes(2, 1000)]).await;
            assert!(
                matches!(refused, Err(TierError::Io { operation: "write", .. })),
                "{refused:?}"
            );
        }
        assert_eq!(tier.usage().used_bytes, 2000, "what was refused went back");
        drop(kept);
        let closed = tier.close().await;
        assert!(matches!(closed, Err(TierError::Io { operation: "close", .. })), "{closed:?}");
    });
    assert_eq!(tier.usage().extents, 0);
}

#[tokio::test(start_paused = true)]
async fn extents_and_buffers_of_bad_calls_are_refused() {
    let (tier, store) = open(small()).await;
    let (other, _) = open(small()).await;
    drop(write(&*other, &vec![bytes(1, 1000); 5]).await.unwrap());
    let foreign = write(&*other, &[bytes(1, 1000)]).await.unwrap();
    store.take_seen();
    let refused = read(&*tier, &foreign).await;
    assert!(matches!(refused, Err(TierError::Io { .. })), "{refused:?}");
    let refused = tier.write(reserve(&*other, &[bytes(1, 1000)])).await;
    assert!(matches!(refused, Err(TierError::Io { .. })), "{refused:?}");
    let mut pieces = reserve(&*tier, &[bytes(1, 1000)]);
    pieces[0].1.truncate(999);
    let refused = tier.write(pieces).await;
    assert!(matches!(refused, Err(TierError::Io { .. })), "{refused:?}");
    assert!(matches!(tier.reserve(&[65_537]), Err(TierError::Io { .. })));
    assert_eq!((tier.usage().extents, store.take_seen()), (0, vec![]));
}
