//! Object stores that misbehave: no wrong byte, typed errors, recovery.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::seq::IndexedRandom;
use vmem_core::backend::{Extent, Tier, TierError};
use vmem_remote::{RemoteOptions, RequestError};

use super::faulty::{Fault, Op};
use super::{bytes, emptied, open, read, seed, small, stored, write};

/// What the tier says of a request that failed.
fn cause(error: &TierError) -> &RequestError {
    let TierError::Io { source, .. } = error else { panic!("{error:?}") };
    let cause = source.get_ref().and_then(|cause| cause.downcast_ref());
    cause.unwrap_or_else(|| panic!("{error:?}"))
}

/// One request of this kind meets the fault.
fn once(op: Op, fault: Fault) -> impl FnMut(Op) -> Option<Fault> + Send {
    let mut is_due = true;
    move |it| (it == op && std::mem::take(&mut is_due)).then_some(fault)
}

#[tokio::test(start_paused = true)]
async fn fault_of_one_request_is_not_seen() {
    use Fault::{Cut, Flipped, Lost, Refused, Shifted, Silent, Stuck};
    let (tier, store) = open(small()).await;
    let payloads = [bytes(1, 60_000), bytes(2, 3)];
    for fault in [Refused, Lost, Silent, Cut, Stuck, Flipped, Shifted] {
        let extents = write(&*tier, &payloads).await.unwrap();
        store.fail(once(Op::Get, fault));
        assert!(read(&*tier, &extents).await.unwrap() == payloads.concat(), "{fault:?}");
    }
    for fault in [Refused, Lost, Silent] {
        for op in [Op::Put, Op::Part, Op::Complete] {
            let payloads = vec![bytes(1, 60_000); if op == Op::Put { 1 } else { 5 }];
            let hit = store.hit();
            store.fail(once(op, fault));
            let extents = write(&*tier, &payloads).await.unwrap();
            assert_eq!(store.hit(), hit + 1, "{op:?}");
            assert!(read(&*tier, &extents).await.unwrap() == payloads.concat(), "{op:?} {fault:?}");
        }
    }
    tier.close().await.unwrap();
    emptied(&*store).await;
}

/// Excluded: wrong bytes on the way that count as damage, since another request failed before.
#[tokio::test(start_paused = true)]
async fn wrong_bytes_after_another_fault_are_read_again() {
    let (tier, store) = open(small()).await;
    let extents = write(&*tier, &[bytes(1, 1000)]).await.unwrap();
    let mut faults = [Fault::Refused, Fault::Flipped, Fault::Cut].into_iter();
    store.fail(move |_| faults.next());
    assert_eq!(read(&*tier, &extents).await.unwrap(), bytes(1, 1000));
    assert_eq!(store.hit(), 3);
}

/// Excluded: a request that stood behind another has no time left when its turn comes.
#[tokio::test(start_paused = true)]
async fn wait_for_a_turn_takes_no_time_of_a_request() {
    let options = RemoteOptions {
        requests: 1,
        tries: 1,
        request_timeout: Duration::from_secs(4),
        total_timeout: Duration::from_secs(5),
        ..small()
    };
    let (tier, store) = open(options).await;
    let first = write(&*tier, &[bytes(0, 1000)]).await.unwrap();
    let extents = write(&*tier, &[bytes(1, 1000)]).await.unwrap();
    let mut faults = [Fault::Silent, Fault::Slow(Duration::from_secs(2))].into_iter();
    store.fail(move |_| faults.next());
    let (silent, served) = futures::join!(read(&*tier, &first), read(&*tier, &extents));
    assert!(matches!(cause(&silent.unwrap_err()), RequestError::TimedOut { .. }));
    assert_eq!(served.unwrap(), bytes(1, 1000));
}

#[tokio::test(start_paused = true)]
async fn lasting_faults_are_typed_errors_within_the_total_time() {
    use RequestError as E;
    type Check = fn(&TierError) -> bool;
    let faults: [(Fault, Check); 7] = [
        (
            Fault::Refused,
            |e| matches!(cause(e), E::Failed { kind, .. } if *kind == ErrorKind::ConnectionReset),
        ),
        (
            Fault::Denied,
            |e| matches!(cause(e), E::Denied { code: Some(code) } if code == "ExpiredToken"),
        ),
        (Fault::Silent, |e| matches!(cause(e), E::TimedOut { .. })),
        (Fault::Stuck, |e| matches!(cause(e), E::TimedOut { .. })),
        (Fault::Cut, |e| matches!(cause(e), E::Length { expected_bytes: 60_003, .. })),
        (Fault::Shifted, |e| matches!(cause(e), E::Length { actual_bytes: 60_002, .. })),
        (Fault::Flipped, |e| matches!(e, TierError::Corrupt { chunk: 0, .. })),
    ];
    for (fault, is_expected) in faults {
        let (tier, store) = open(small()).await;
        let payloads = [bytes(1, 60_000), bytes(2, 3)];
        let extents = write(&*tier, &payloads).await.unwrap();
        store.fail(move |op| (op == Op::Get).then_some(fault));
        let began = tokio::time::Instant::now();
        let error = read(&*tier, &extents).await.unwrap_err();
        assert!(is_expected(&error), "{fault:?}: {error:?}");
        assert!(began.elapsed() <= small().total_timeout, "{fault:?}: {:?}", began.elapsed());
        assert!(!format!("{error:?}").contains("SECRET"), "{error:?}");
        store.heal();
        assert!(read(&*tier, &extents).await.unwrap() == payloads.concat(), "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn failed_writes_give_all_space_back_and_leave_nothing() {
    for fault in [Fault::Refused, Fault::Lost, Fault::Silent, Fault::Denied] {
        let (tier, store) = open(RemoteOptions { circuit_failures: 100, ..small() }).await;
        store.fail(move |op| (op != Op::Delete).then_some(fault));
        for count in [1, 5] {
            let error = write(&*tier, &vec![bytes(1, 60_000); count]).await.unwrap_err();
            assert!(matches!(error, TierError::Io { operation: "write", .. }), "{error:?}");
            assert_eq!((tier.usage().used_bytes, tier.usage().extents), (0, 0));
        }
        // What was put although it was reported as failed is deleted without a close.
        emptied(&*store).await;
    }
}

#[tokio::test(start_paused = true)]
async fn circuit_refuses_at_once_and_closes_by_itself() {
    let options = RemoteOptions { tries: 1, circuit_failures: 3, ..small() };
    let (tier, store) = open(options.clone()).await;
    let payloads = [bytes(1, 1000)];
    let extents = write(&*tier, &payloads).await.unwrap();
    store.fail(|op| (op == Op::Get).then_some(Fault::Silent));
    for _ in 0..3 {
        assert!(!tier.stats().is_circuit_open);
        read(&*tier, &extents).await.unwrap_err();
    }
    assert!(tier.stats().is_circuit_open);
    store.take_seen();
    let began = tokio::time::Instant::now();
    for _ in 0..10 {
        let error = read(&*tier, &extents).await.unwrap_err();
        assert!(matches!(cause(&error), RequestError::CircuitOpen { .. }), "{error:?}");
        let error = write(&*tier, &payloads).await.unwrap_err();
        assert!(matches!(cause(&error), RequestError::CircuitOpen { .. }), "{error:?}");
    }
    assert_eq!((began.elapsed(), store.take_seen()), (Duration::ZERO, vec![]));
    // One is let through after the pause, and fails; the next after twice as long, and succeeds.
    tokio::time::advance(options.circuit_pause).await;
    let error = read(&*tier, &extents).await.unwrap_err();
    assert!(matches!(cause(&error), RequestError::TimedOut { .. }), "{error:?}");
    store.heal();
    tokio::time::advance(options.circuit_pause).await;
    let error = read(&*tier, &extents).await.unwrap_err();
    assert!(matches!(cause(&error), RequestError::CircuitOpen { .. }), "{error:?}");
    tokio::time::advance(options.circuit_pause).await;
    assert_eq!(read(&*tier, &extents).await.unwrap(), payloads[0]);
    assert!(!tier.stats().is_circuit_open);
}

/// Random faults under random calls: what is read is what was written, or there is a typed error;
/// when the faults end everything is as before, and nothing is left.
#[tokio::test(start_paused = true)]
async fn random_faults_spoil_no_byte() {
    let seed = seed();
    for round in 0..8 {
        let seed = seed.fork_nth("round", round);
        let capacity = 8 << 20;
        let options = RemoteOptions {
            capacity: Some(capacity),
            segment_bytes: 256 << 10,
            circuit_failures: 20,
            total_timeout: Duration::from_secs(12),
            ..small()
        };
        let (tier, store) = open(options).await;
        let mut dice = seed.fork("faults").rng();
        let share = [0.05, 0.3][round as usize % 2];
        store.fail(move |op| {
            use Fault::{Cut, Flipped, Lost, Refused, Shifted, Silent, Slow, Stuck};
            let slow = Slow(Duration::from_millis(dice.random_range(1..3000)));
            let of_get = [Refused, Lost, Silent, slow, Cut, Flipped, Shifted, Stuck];
            let kinds = if op == Op::Get { &of_get[..] } else { &of_get[..4] };
            dice.random_bool(share).then(|| *kinds.choose(&mut dice).unwrap())
        });
        let tasks =
            (0..6).map(|task| tokio::spawn(chaos(tier.clone(), seed.fork_nth("task", task))));
        let mut kept = Vec::new();
        let mut errors = 0;
        for task in futures::future::join_all(tasks).await {
            let (of_task, failed) = task.unwrap();
            kept.extend(of_task);
            errors += failed;
        }
        assert!(store.hit() > 20, "{} faults", store.hit());
        println!("round {round}: {} faults, {errors} errors, {} kept", store.hit(), kept.len());
        store.heal();
        while tier.stats().is_circuit_open {
            tokio::time::sleep(Duration::from_secs(20)).await;
            let _ =
                read(&*tier, &kept[..1].iter().map(|(e, _)| e.clone()).collect::<Vec<_>>()).await;
        }
        for (extent, expected) in &kept {
            assert!(read(&*tier, std::slice::from_ref(extent)).await.unwrap() == *expected);
        }
        let live: u64 = kept.iter().map(|(extent, _)| u64::from(extent.len())).sum();
        assert_eq!(tier.usage().used_bytes, live, "all else went back");
        drop(kept);
        emptied(&*store).await;
        tier.close().await.unwrap();
    }
}

/// A task of calls. What it has at the end, with the bytes, and how many calls failed.
async fn chaos(
    tier: Arc<vmem_remote::RemoteTier>,
    seed: vmem_testkit::Seed,
) -> (Vec<(Arc<Extent>, bytes::Bytes)>, usize) {
    let mut rng = seed.rng();
    let mut held: Vec<(Arc<Extent>, bytes::Bytes)> = Vec::new();
    let mut errors = 0;
    for n in 0..150 {
        match rng.random_range(0..3) {
            0 => {
                let count = rng.random_range(1..12);
                let payloads: Vec<_> = (0..count)
                    .map(|k| bytes(seed.value() ^ (n * 64 + k), rng.random_range(1..40_000)))
                    .collect();
                match write(&*tier, &payloads).await {
                    Ok(extents) => held.extend(extents.into_iter().zip(payloads)),
                    Err(TierError::Io { .. }) => errors += 1,
                    Err(error) => panic!("a write: {error:?}"),
                }
            }
            1 => {
                let some: Vec<_> = held.choose_multiple(&mut rng, 6).cloned().collect();
                let extents: Vec<_> = some.iter().map(|(extent, _)| extent.clone()).collect();
                match read(&*tier, &extents).await {
                    Ok(read) => {
                        let expected: Vec<_> = some.iter().flat_map(|(_, it)| it.clone()).collect();
                        assert!(read == expected, "wrong bytes in call {n}");
                    }
                    Err(TierError::Io { .. } | TierError::Corrupt { .. }) => errors += 1,
                    Err(error) => panic!("a read: {error:?}"),
                }
            }
            _ => {
                while held.len() > 20 {
                    held.swap_remove(rng.random_range(0..held.len()));
                }
            }
        }
    }
    (held, errors)
}

#[tokio::test(start_paused = true)]
async fn bucket_emptied_by_another_is_a_typed_error() {
    let (tier, store) = open(small()).await;
    let extents = write(&*tier, &[bytes(1, 1000)]).await.unwrap();
    let other: &dyn object_store::ObjectStore = &*store;
    let all =
        futures::StreamExt::boxed(futures::TryStreamExt::map_ok(other.list(None), |m| m.location));
    let gone: Vec<_> = futures::TryStreamExt::try_collect(other.delete_stream(all)).await.unwrap();
    assert_eq!((gone.len(), stored(other).await.0), (2, 0), "with the lease");
    store.take_seen();
    let error = read(&*tier, &extents).await.unwrap_err();
    assert!(matches!(cause(&error), RequestError::NotFound { .. }), "{error:?}");
    assert_eq!(store.take_seen().len(), 1, "it is not asked for again");
    drop(extents);
    tier.close().await.unwrap();
}
