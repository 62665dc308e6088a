//! Uploads in parts: visible when they are complete, gone when they are not.
//!
//! Invariant: an upload that ended in any way leaves no object but the one that it made.

use futures::future;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{Attribute, Attributes, ObjectStore, ObjectStoreExt, PutPayload};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vmem_object_store::{RequestError, Store};

use crate::{bytes_of, open, reason, until};

const HOST: u64 = 8 << 20;
const PART: usize = 1 << 20;

/// Objects of the store, and the bytes that they take on disk.
fn taken(store: &Store) -> (u64, u64) {
    let disk = store.vmem().stats().disk;
    (disk.objects, disk.used_bytes)
}

fn is_missing<T: std::fmt::Debug>(outcome: object_store::Result<T>, at: usize) -> bool {
    let error = outcome.unwrap_err();
    matches!(reason(&error), Some(RequestError::PartMissing { part }) if *part == at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_and_aborted_uploads_leave_nothing() {
    let store = open(HOST).await;
    let path = Path::from("never");
    store.put(&Path::from("other"), "x".into()).await.unwrap();
    let before = taken(&store);
    for abort in [false, true] {
        let mut upload = store.put_multipart(&path).await.unwrap();
        let parts = (0..5).map(|n| upload.put_part(bytes_of(n, PART).into()));
        let mut parts: Vec<_> = parts.collect();
        let unpolled = parts.pop();
        let mut left_alone = parts.pop().unwrap();
        future::try_join_all(parts).await.unwrap();
        // Begun, and then neither polled nor dropped while the upload ends.
        assert!(futures::poll!(&mut left_alone).is_pending());
        assert!(taken(&store).1 >= before.1 + 2 * PART as u64);
        if abort {
            upload.abort().await.unwrap();
            upload.abort().await.unwrap();
            let error = upload.complete().await.unwrap_err();
            assert!(matches!(reason(&error), Some(RequestError::NoUpload)), "{error}");
        }
        drop(upload);
        let late = left_alone.await.unwrap_err();
        assert!(matches!(reason(&late), Some(RequestError::NoUpload)), "{late}");
        drop(unpolled);
        until("the parts are gone", || taken(&store) == before).await;
        store.head(&path).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upload_without_all_its_parts_is_not_completed_and_goes_on() {
    let store = open(HOST).await;
    let path = Path::from("in/parts");
    let before = taken(&store);
    let mut upload = store.put_multipart(&path).await.unwrap();
    let first = upload.put_part(bytes_of(1, PART).into());
    upload.put_part(bytes_of(2, PART).into()).await.unwrap();
    assert!(is_missing(upload.complete().await, 0));
    store.head(&path).await.unwrap_err();

    first.await.unwrap();
    upload.complete().await.unwrap();
    let expected = [bytes_of(1, PART), bytes_of(2, PART)].concat();
    assert!(store.get(&path).await.unwrap().bytes().await.unwrap() == expected);
    let again = upload.complete().await.unwrap_err();
    assert!(matches!(reason(&again), Some(RequestError::NoUpload)), "{again}");
    drop(upload);
    store.delete(&path).await.unwrap();
    until("the object and its parts are gone", || taken(&store) == before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completed_upload_replaces_what_was_there_at_once() {
    let store = open(HOST).await;
    let path = Path::from("replaced");
    store.put(&path, "before".into()).await.unwrap();
    let attributes = Attributes::from_iter([(Attribute::ContentType, "text/plain")]);
    let mut upload =
        store.store.put_multipart_opts(&path, attributes.clone().into()).await.unwrap();
    // Pieces of odd sizes, some empty.
    let bytes = bytes_of(7, 3 * PART + 17);
    let pieces = bytes.chunks(4099).map(bytes::Bytes::copy_from_slice);
    upload.put_part(PutPayload::from_iter(pieces)).await.unwrap();
    upload.put_part(PutPayload::default()).await.unwrap();
    upload.put_part("end".into()).await.unwrap();
    assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "before");

    let put = upload.complete().await.unwrap();
    let got = store.get(&path).await.unwrap();
    assert_eq!((&got.meta.e_tag, &got.attributes), (&put.e_tag, &attributes));
    assert!(got.bytes().await.unwrap() == [&bytes[..], b"end"].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_with_numbers_arrive_in_any_order_and_twice() {
    let store = open(HOST).await;
    let path = Path::from("numbered");
    let before = taken(&store);
    let id = store.create_multipart(&path).await.unwrap();
    let put =
        |part: usize, seed: u64| store.put_part(&path, &id, part, bytes_of(seed, PART).into());
    let (third, first) = future::try_join(put(2, 3), put(0, 1)).await.unwrap();
    let stale = put(1, 99).await.unwrap();
    let second = put(1, 2).await.unwrap();

    let complete = |parts: [&PartId; 3]| {
        store.complete_multipart(&path, &id, parts.into_iter().cloned().collect())
    };
    assert!(is_missing(complete([&first, &stale, &third]).await, 1));
    assert!(is_missing(complete([&first, &third, &second]).await, 1));
    complete([&first, &second, &third]).await.unwrap();
    let expected = [bytes_of(1, PART), bytes_of(2, PART), bytes_of(3, PART)].concat();
    assert!(store.get(&path).await.unwrap().bytes().await.unwrap() == expected);

    let ended = put(0, 1).await.unwrap_err();
    assert!(matches!(reason(&ended), Some(RequestError::NoUpload)), "{ended}");
    store.delete(&path).await.unwrap();
    until("the object and its parts are gone", || taken(&store) == before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upload_with_an_id_is_of_its_path_and_goes_when_aborted() {
    let store = open(HOST).await;
    let path = Path::from("mine");
    let other = Path::from("yours");
    let before = taken(&store);
    let id = store.create_multipart(&path).await.unwrap();
    store.put_part(&path, &id, 0, bytes_of(1, PART).into()).await.unwrap();
    let clone = store.store.clone().with_prefix("elsewhere");
    for outcome in [
        store.put_part(&other, &id, 0, "x".into()).await.map(drop),
        store.complete_multipart(&other, &id, Vec::new()).await.map(drop),
        store.abort_multipart(&other, &id).await,
        clone.abort_multipart(&path, &id).await,
        store.abort_multipart(&path, &"no id".to_owned()).await,
    ] {
        let error = outcome.unwrap_err();
        assert!(matches!(reason(&error), Some(RequestError::NoUpload)), "{error}");
    }
    store.abort_multipart(&path, &id).await.unwrap();
    until("the part is gone", || taken(&store) == before).await;
    store.head(&path).await.unwrap_err();
}

/// What a part takes on disk twice shows in the peak.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_one_after_the_other_are_written_once() {
    const PARTS: u64 = 16;
    let store = open(HOST).await;
    let path = Path::from("in/order");
    let mut upload = store.put_multipart(&path).await.unwrap();
    for n in 0..PARTS {
        upload.put_part(bytes_of(n, PART).into()).await.unwrap();
    }
    upload.complete().await.unwrap();
    let disk = store.vmem().stats().disk;
    let total = PARTS * PART as u64;
    assert_eq!(disk.used_bytes, total);
    assert!(disk.peak_bytes < total + total / 8, "{disk:?}");
    let got = store.get(&path).await.unwrap().bytes().await.unwrap();
    for (n, part) in (0..).zip(got.chunks(PART)) {
        assert!(part == bytes_of(n, PART), "part {n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_any_size_in_any_order_make_the_object_that_was_announced() {
    let seed = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(11);
    let mut rng = SmallRng::seed_from_u64(seed);
    let store = open(HOST).await;
    let path = Path::from("any/order");
    let before = taken(&store);
    for round in 0..20 {
        let parts: Vec<Vec<u8>> = (0..rng.random_range(0..12))
            .map(|n| bytes_of(round * 100 + n, rng.random_range(0..400_000)))
            .collect();
        let mut upload = store.put_multipart(&path).await.unwrap();
        let announced = parts.iter().map(|part| upload.put_part(part.clone().into()));
        let mut waiting: Vec<_> = announced.collect();
        waiting.shuffle(&mut rng);
        while !waiting.is_empty() {
            let at_once = rng.random_range(1..=4).min(waiting.len());
            future::try_join_all(waiting.drain(..at_once)).await.unwrap();
        }
        upload.complete().await.unwrap();
        let got = store.get(&path).await.unwrap().bytes().await.unwrap();
        assert!(got == parts.concat(), "seed {seed}, round {round}");
        drop(upload);
        store.delete(&path).await.unwrap();
        until("nothing is left", || taken(&store) == before).await;
    }
}

/// A part that is given up half written takes with it what it was written behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upload_whose_part_was_dropped_half_way_is_never_completed() {
    let store = open(HOST).await;
    let path = Path::from("half");
    let before = taken(&store);
    for polls in [0, 1, 3, 10] {
        let mut upload = store.put_multipart(&path).await.unwrap();
        upload.put_part(bytes_of(1, PART).into()).await.unwrap();
        let mut half = upload.put_part(bytes_of(2, 4 * PART).into());
        let mut ready = false;
        for _ in 0..polls {
            ready |= futures::poll!(&mut half).is_ready();
        }
        drop(half);
        if ready {
            // A disk that fast has no half way.
            continue;
        }
        upload.put_part(bytes_of(3, PART).into()).await.unwrap();
        for _ in 0..2 {
            assert!(is_missing(upload.complete().await, 1));
        }
        store.head(&path).await.unwrap_err();
        drop(upload);
        until("nothing is left", || taken(&store) == before).await;
    }
}
