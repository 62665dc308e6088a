//! Deletion of superseded generations, and writers that slept meanwhile.

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::Catalog;
use vmem_remote::BucketCatalog;

use super::bucket::{Bucket, Desk, Weather};
use super::{Table, changed, exists, object, open_over, options, put, remove, version};

const MINUTE: Duration = Duration::from_secs(60);
/// A little more than four times the grace.
const GRACES: Duration = Duration::from_secs(60 * 60 + 1);

struct Place {
    bucket: Arc<Bucket>,
    table: Arc<Table>,
}

impl Place {
    fn new() -> Self {
        Place { bucket: Bucket::new(), table: Arc::default() }
    }

    fn desk(&self) -> Arc<Desk> {
        self.bucket.desk(SmallRng::seed_from_u64(1), Weather::default())
    }

    async fn open(&self) -> Arc<BucketCatalog> {
        open_over(self.desk(), options(), &self.table).await
    }
}

#[tokio::test(start_paused = true)]
async fn newest_generations_and_those_of_the_grace_stay() {
    let place = Place::new();
    let catalog = place.open().await;
    for number in 10..15 {
        catalog.commit(put("n", &object(1, number, 1))).await.unwrap();
        tokio::time::advance(20 * MINUTE).await;
    }
    catalog.commit(put("gone", &object(2, 20, 1))).await.unwrap();
    catalog.commit(remove("gone")).await.unwrap();
    // Generations 1 to 5 were put 100, 80, 60, 40 and 20 minutes ago.
    assert_eq!(catalog.collect().await.unwrap(), 1, "the second came 80 minutes ago");
    assert_eq!(place.bucket.generations("n"), [2, 3, 4, 5]);
    tokio::time::advance(MINUTE).await;
    assert_eq!(catalog.collect().await.unwrap(), 1);
    assert_eq!(place.bucket.generations("n"), [3, 4, 5]);
    assert_eq!(place.bucket.generations("gone"), [1, 2]);
    tokio::time::advance(100 * GRACES).await;
    assert_eq!(catalog.collect().await.unwrap(), 3);
    assert_eq!(place.bucket.generations("n"), [5]);
    assert_eq!(place.bucket.generations("gone"), [2], "the tombstone stays");
    assert_eq!(catalog.collect().await.unwrap(), 0);
    assert_eq!((version(&catalog, "n").await, version(&catalog, "gone").await), (Some(14), None));
}

/// The generation behind the known one was deleted: only a look-up finds the newest.
#[tokio::test(start_paused = true)]
async fn change_is_reported_behind_deleted_generations() {
    let place = Place::new();
    let writer = place.open().await;
    let reader = place.open().await;
    writer.commit(put("n", &object(1, 10, 1))).await.unwrap();
    assert_eq!(version(&reader, "n").await, Some(10));
    for number in 11..15 {
        writer.commit(put("n", &object(1, number, 1))).await.unwrap();
    }
    tokio::time::advance(GRACES).await;
    assert_eq!(writer.collect().await.unwrap(), 4);
    let reported = reader.changed(vec![("n".into(), 10)]).await.unwrap().remove(0);
    assert!(changed(&Err(reported), 10, 14));
}

#[tokio::test(start_paused = true)]
async fn collections_at_once_delete_what_one_would() {
    let place = Place::new();
    let one = place.open().await;
    let other = place.open().await;
    for number in 10..50 {
        one.commit(put("n", &object(1, number, 1))).await.unwrap();
    }
    tokio::time::advance(GRACES).await;
    let (first, second) = futures::join!(one.collect(), other.collect());
    assert!(first.unwrap().max(second.unwrap()) == 39);
    assert_eq!(place.bucket.generations("n"), [40]);
    assert_eq!(version(&other, "n").await, Some(49));
}

/// Excluded: a create on old knowledge succeeds where a generation was deleted.
#[tokio::test(start_paused = true)]
async fn writer_with_old_knowledge_looks_again_and_loses() {
    for is_new in [false, true] {
        let place = Place::new();
        let sleeper = place.open().await;
        let other = place.open().await;
        if !is_new {
            sleeper.commit(put("n", &object(1, 10, 1))).await.unwrap();
        }
        let known = version(&sleeper, "n").await;
        version(&other, "n").await;
        for number in 11..14 {
            other.commit(put("n", &object(1, number, 1))).await.unwrap();
        }
        tokio::time::advance(GRACES).await;
        other.collect().await.unwrap();
        let left = place.bucket.generations("n");
        assert_eq!(left.len(), 1, "{left:?}: where the sleeper would create there is nothing");
        let lost = sleeper.commit(put("n", &object(1, 20, 1))).await;
        match known {
            Some(known) => assert!(changed(&lost, known, 13), "{lost:?}"),
            None => assert!(exists(&lost, "n"), "{lost:?}"),
        }
        assert_eq!(place.bucket.generations("n"), left);
        assert_eq!(version(&sleeper, "n").await, Some(13));
        sleeper.commit(put("n", &object(1, 21, 1))).await.unwrap();
        assert_eq!(version(&other, "n").await, Some(21));
    }
}

#[tokio::test(start_paused = true)]
async fn writer_whose_version_was_deleted_gets_a_typed_error() {
    let place = Place::new();
    let sleeper = place.open().await;
    let other = place.open().await;
    sleeper.commit(put("n", &object(1, 10, 1))).await.unwrap();
    assert_eq!(version(&other, "n").await, Some(10));
    other.commit(remove("n")).await.unwrap();
    tokio::time::advance(GRACES).await;
    other.collect().await.unwrap();
    let record = object(1, 11, 1).record;
    let name = "n".into();
    let lost = sleeper.commit(vec![vmem_core::backend::CatalogChange::Put { name, record }]).await;
    assert!(matches!(lost, Err(VirtualMemoryError::NameNotFound { .. })), "{lost:?}");
}

#[tokio::test(start_paused = true)]
async fn knowledge_is_confirmed_only_once_it_is_old() {
    let place = Place::new();
    let store = super::super::faulty::Faulty::new(place.desk());
    let catalog = open_over(store.clone(), options(), &place.table).await;
    catalog.commit(put("n", &object(1, 10, 1))).await.unwrap();
    for (pause, expected) in [(7, 1), (7, 1), (8, 4), (7, 1)] {
        tokio::time::advance(pause * MINUTE).await;
        store.take_seen();
        catalog.commit(put("n", &object(1, 10 + u64::from(pause), 1))).await.unwrap();
        assert_eq!(store.take_seen().len(), expected, "after {pause} minutes");
    }
}
