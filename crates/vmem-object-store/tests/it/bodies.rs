//! Bodies: streamed, ranged, of one version.
//!
//! Invariant: bodies of objects that are larger than host memory are read in little of it.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, UpdateVersion};

use crate::{bytes_of, open, reason};
use vmem_object_store::RequestError;

const HOST: u64 = 8 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn body_stays_of_one_version_while_its_name_is_replaced() {
    let store = open(HOST).await;
    let path = Path::from("page");
    let old = bytes_of(1, 3 << 20);
    let new = bytes_of(2, 2 << 20);
    let put = store.put(&path, old.clone().into()).await.unwrap();
    let got = store.get(&path).await.unwrap();
    assert_eq!(got.meta.e_tag, put.e_tag);
    let mut stream = got.into_stream();
    let mut read = stream.next().await.unwrap().unwrap().to_vec();
    assert!(read.len() < old.len(), "the whole object came at once");

    store.put(&path, new.clone().into()).await.unwrap();
    read.extend(stream.next().await.unwrap().unwrap());
    store.rename(&path, &Path::from("elsewhere")).await.unwrap();
    store.delete(&Path::from("elsewhere")).await.unwrap();
    while let Some(piece) = stream.next().await {
        read.extend(piece.unwrap());
    }
    assert!(read == old, "the body is not the one that was opened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_beyond_host_memory_stream_in_pieces() {
    let store = open(HOST).await;
    let path = Path::from("large");
    let bytes = bytes_of(3, 24 << 20);
    store.put(&path, bytes.clone().into()).await.unwrap();
    let readers = (0..4).map(|_| async {
        let mut stream = store.get(&path).await.unwrap().into_stream();
        let mut at = 0;
        while let Some(piece) = stream.try_next().await.unwrap() {
            assert!(piece.len() <= 1 << 20, "a piece of {} bytes", piece.len());
            assert!(piece == bytes[at..at + piece.len()], "other bytes at {at}");
            at += piece.len();
        }
        assert_eq!(at, bytes.len());
    });
    future::join_all(readers).await;
    let host = store.vmem().stats().host;
    assert!(host.peak_bytes <= host.capacity_bytes, "{host:?}");
}

/// A consumer that keeps what it has read takes no space of the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_kept_hold_no_space() {
    let store = open(HOST).await;
    let mut kept = Vec::new();
    for n in 0..8 {
        let path = Path::from(format!("kept/{n}"));
        store.put(&path, bytes_of(n, 2 << 20).into()).await.unwrap();
        for _ in 0..3 {
            let pieces: Vec<_> =
                store.get(&path).await.unwrap().into_stream().try_collect().await.unwrap();
            kept.extend(pieces);
        }
        kept.extend(store.get_ranges(&path, &[0..1 << 20, (1 << 20)..(2 << 20)]).await.unwrap());
    }
    assert_eq!(store.vmem().stats().held_bytes, 0);
    let total: usize = kept.iter().map(Bytes::len).sum();
    assert_eq!(total, 8 * 4 * (2 << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_of_every_kind_are_those_bytes() {
    let store = open(HOST).await;
    let path = Path::from("ranged");
    let bytes = bytes_of(4, 1_000_003);
    let len = bytes.len() as u64;
    store.put(&path, bytes.clone().into()).await.unwrap();
    let cases = [
        (GetRange::Bounded(0..1), 0..1),
        (GetRange::Bounded(65_535..65_537), 65_535..65_537),
        (GetRange::Bounded(7..u64::MAX), 7..len),
        (GetRange::Offset(len - 1), len - 1..len),
        (GetRange::Offset(0), 0..len),
        (GetRange::Suffix(1), len - 1..len),
        (GetRange::Suffix(0), len..len),
        (GetRange::Suffix(u64::MAX), 0..len),
    ];
    for (asked, range) in cases {
        let options = GetOptions::new().with_range(Some(asked.clone()));
        let got = store.get_opts(&path, options).await.unwrap();
        assert_eq!((&got.range, got.meta.size), (&range, len), "{asked:?}");
        let expected = &bytes[range.start as usize..range.end as usize];
        assert!(got.bytes().await.unwrap() == expected, "{asked:?}");
    }
    for asked in [
        GetRange::Bounded(5..5),
        GetRange::Bounded(len..len + 1),
        GetRange::Offset(len),
        #[expect(clippy::reversed_empty_ranges, reason = "that is what must be refused")]
        GetRange::Bounded(9..3),
    ] {
        let options = GetOptions::new().with_range(Some(asked.clone()));
        let error = store.get_opts(&path, options).await.unwrap_err();
        assert!(matches!(error, object_store::Error::Generic { .. }), "{asked:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_ranges_at_once_come_in_the_order_asked() {
    let store = open(HOST).await;
    let path = Path::from("columns");
    let bytes = bytes_of(5, 12 << 20);
    store.put(&path, bytes.clone().into()).await.unwrap();
    // Far apart, near, overlapping, twice, backwards, beyond the end.
    let ranges = [
        (11 << 20)..(12 << 20),
        0..10,
        5..70_000,
        100_000..100_001,
        5..70_000,
        (4 << 20)..(9 << 20),
        (12 << 20) - 3..u64::MAX,
    ];
    let got = store.get_ranges(&path, &ranges).await.unwrap();
    assert_eq!(got.len(), ranges.len());
    for (range, got) in ranges.iter().zip(got) {
        let end = (range.end as usize).min(bytes.len());
        assert!(got == bytes[range.start as usize..end], "{range:?}");
    }
    assert!(store.get_ranges(&path, &[]).await.unwrap().is_empty());
    let beyond = 12 << 20..13 << 20;
    store.get_ranges(&path, &[0..1, beyond]).await.unwrap_err();
}

/// A look reads the entry and nothing of the object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_says_everything_and_reads_no_bytes() {
    let store = open(HOST).await;
    let path = Path::from("looked/at");
    store.put(&path, bytes_of(6, 1 << 20).into()).await.unwrap();
    let before = store.vmem().stats();
    let options = GetOptions::new().with_head(true).with_range(Some(5..9));
    let got = store.get_opts(&path, options).await.unwrap();
    assert_eq!((got.range.clone(), got.meta.size), (5..9, 1 << 20));
    let entry = store.vmem().entry("looked/at").await.unwrap();
    assert_eq!(got.meta.e_tag.as_deref(), Some(&*entry.version.to_string()));
    assert_eq!(got.meta.last_modified, chrono::DateTime::<chrono::Utc>::from(entry.modified));
    let pieces: Vec<_> = got.into_stream().try_collect().await.unwrap();
    assert_eq!(pieces, Vec::<Bytes>::new());
    let after = store.vmem().stats();
    assert_eq!((before.misses, before.host.hits), (after.misses, after.host.hits));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_current_version_can_be_asked_for() {
    let store = open(HOST).await;
    let path = Path::from("versions");
    let first = store.put(&path, "one".into()).await.unwrap().e_tag.unwrap();
    let second = store.put(&path, "two".into()).await.unwrap().e_tag.unwrap();
    let of = |version: &str| GetOptions::new().with_version(Some(version));
    let got = store.get_opts(&path, of(&second)).await.unwrap();
    assert_eq!(got.bytes().await.unwrap(), "two");
    let error = store.get_opts(&path, of(&first)).await.unwrap_err();
    assert!(matches!(error, object_store::Error::NotFound { .. }), "{error}");
    assert!(matches!(reason(&error), Some(RequestError::OtherVersion { .. })), "{error}");
}

/// A put whose caller is polled late, when another put has replaced it: the tag that it returns is
/// not that of the other, or an update by it would overwrite bytes that its caller has not seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tag_of_a_put_that_was_replaced_already_is_that_of_nothing() {
    const ATTEMPTS: usize = 100;
    let store = open(HOST).await;
    let mut late = 0;
    for attempt in 0..ATTEMPTS {
        let name = format!("late/{attempt}");
        let path = Path::from(format!("late/{attempt}"));
        let mut first = Box::pin(store.put(&path, "first".into()));
        let mut ready = false;
        while !ready && store.vmem().entry(&name).await.is_err() {
            ready = futures::poll!(&mut first).is_ready();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if ready {
            continue;
        }
        // It is stored, and its caller does not know yet.
        late += 1;
        let second = store.put(&path, "second".into()).await.unwrap().e_tag;
        let first = first.await.unwrap().e_tag;
        assert!(first.is_some() && first != second, "{first:?}, {second:?}");
        let options = GetOptions::new().with_if_match(first.clone());
        let changed = store.get_opts(&path, options).await.unwrap_err();
        assert!(matches!(changed, object_store::Error::Precondition { .. }), "{changed}");
        let mode = PutMode::Update(UpdateVersion { e_tag: first, version: None });
        let refused = store.put_opts(&path, "third".into(), mode.into()).await.unwrap_err();
        assert!(matches!(refused, object_store::Error::Precondition { .. }), "{refused}");
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "second");
        if late == 5 {
            return;
        }
    }
    panic!("{late} of {ATTEMPTS} puts were late enough");
}
