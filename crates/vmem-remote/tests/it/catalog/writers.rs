//! Two instances over one bucket: one winner, and losers that know it.

use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Catalog, CatalogChange, SEGMENT_CHUNKS};

use super::{World, changed, exists, object, put, remove, rename, version};

#[tokio::test(start_paused = true)]
async fn new_name_has_one_winner() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    assert_eq!((version(&one, "n").await, version(&other, "n").await), (None, None));
    one.commit(put("n", &object(1, 10, 2))).await.unwrap();
    let lost = other.commit(put("n", &object(2, 20, 3))).await;
    assert!(exists(&lost, "n"), "{lost:?}");
    assert!(!other.is_shut() && !other.is_poisoned(), "it is known that it was not made");
    for catalog in [&one, &other, &world.open().await] {
        let found = catalog.find("n".into()).await.unwrap();
        assert_eq!(found, Some(object(1, 10, 2)));
    }
}

#[tokio::test(start_paused = true)]
async fn next_version_has_one_winner_at_the_same_moment() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    one.commit(put("n", &object(1, 10, 2))).await.unwrap();
    assert_eq!(version(&other, "n").await, Some(10));
    world.store.fail(|_| Some(super::super::faulty::Fault::Slow(super::Duration::from_secs(1))));
    let (first, second) = futures::join!(
        one.commit(put("n", &object(1, 11, 2))),
        other.commit(put("n", &object(1, 12, 2))),
    );
    let winner = if first.is_ok() { 11 } else { 12 };
    let lost = if first.is_ok() { &second } else { &first };
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    assert!(changed(lost, 10, winner), "{lost:?}");
    assert_eq!(version(&world.open().await, "n").await, Some(winner));
}

#[tokio::test(start_paused = true)]
async fn loser_goes_on_after_a_look_and_not_before() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    one.commit(put("n", &object(1, 10, 2))).await.unwrap();
    other.record("n".into()).await.unwrap().unwrap();
    one.commit(put("n", &object(1, 11, 2))).await.unwrap();
    for _ in 0..3 {
        let lost = other.commit(put("n", &object(1, 12, 2))).await;
        assert!(changed(&lost, 10, 11), "{lost:?}");
    }
    assert_eq!(version(&other, "n").await, Some(11));
    other.commit(put("n", &object(1, 12, 2))).await.unwrap();
    assert_eq!(version(&one, "n").await, Some(12));
}

#[tokio::test(start_paused = true)]
async fn removed_name_is_made_again_by_another() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    one.commit(put("n", &object(1, 10, 2))).await.unwrap();
    assert_eq!(version(&other, "n").await, Some(10));
    one.commit(remove("n")).await.unwrap();
    let lost = other.commit(put("n", &object(1, 12, 2))).await;
    assert!(matches!(lost, Err(VirtualMemoryError::NameNotFound { .. })), "{lost:?}");
    assert_eq!(version(&other, "n").await, None);
    other.commit(put("n", &object(2, 20, 1))).await.unwrap();
    let lost = one.commit(put("n", &object(3, 30, 1))).await;
    assert!(exists(&lost, "n"), "{lost:?}");
    assert_eq!(one.find("n".into()).await.unwrap(), Some(object(2, 20, 1)));
    let gone = one.commit(remove("missing")).await;
    assert!(matches!(gone, Err(VirtualMemoryError::Damaged { .. })), "{gone:?}");
}

#[tokio::test(start_paused = true)]
async fn segments_that_are_kept_are_those_that_the_writer_knew() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    let first = object(1, 10, SEGMENT_CHUNKS + 2);
    one.commit(put("n", &first)).await.unwrap();
    assert_eq!(version(&other, "n").await, Some(10));
    let mut second = object(1, 11, SEGMENT_CHUNKS + 2);
    second.chunks[..SEGMENT_CHUNKS].clone_from_slice(&first.chunks[..SEGMENT_CHUNKS]);
    let is_new =
        |change: &CatalogChange| !matches!(change, CatalogChange::Segment { segment: 0, .. });
    let changes = || put("n", &second).into_iter().filter(is_new).collect::<Vec<_>>();
    one.commit(changes()).await.unwrap();
    assert_eq!(other.find("n".into()).await.unwrap(), Some(second.clone()));
    one.commit(put("n", &object(1, 12, SEGMENT_CHUNKS + 2))).await.unwrap();
    let lost = other.commit(changes()).await;
    assert!(changed(&lost, 11, 12), "no mixture of two versions: {lost:?}");
}

#[tokio::test(start_paused = true)]
async fn lost_name_of_a_commit_leaves_the_others_unknown() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    for name in ["a", "b"] {
        assert_eq!((version(&one, name).await, version(&other, name).await), (None, None));
    }
    one.commit(put("b", &object(1, 10, 1))).await.unwrap();
    let changes = [put("a", &object(2, 20, 1)), put("b", &object(3, 30, 1))].concat();
    let lost = other.commit(changes).await;
    assert!(exists(&lost, "b"), "{lost:?}");
    assert!(other.is_shut(), "a was put, although the commit failed");
    assert_eq!(version(&other, "a").await, Some(20));
    assert!(!other.is_shut());
    assert_eq!(version(&one, "b").await, Some(10));
}

#[tokio::test(start_paused = true)]
async fn rename_loses_to_another_writer_of_either_name() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    one.commit(put("from", &object(1, 10, 2))).await.unwrap();
    assert_eq!((version(&other, "from").await, version(&other, "to").await), (Some(10), None));
    one.commit(put("to", &object(2, 20, 1))).await.unwrap();
    let lost = other.commit(rename("from", "to")).await;
    assert!(exists(&lost, "to"), "{lost:?}");
    assert_eq!(version(&one, "from").await, Some(10));
    one.commit(put("from", &object(1, 11, 2))).await.unwrap();
    assert_eq!(version(&other, "to").await, Some(20));
    let lost = other.commit(rename("from", "to")).await;
    assert!(changed(&lost, 10, 11), "{lost:?}");
    // Its other half was put, and the catalog says so.
    assert!(other.is_shut());
    assert_eq!((version(&other, "to").await, other.is_shut()), (Some(10), false));
}
