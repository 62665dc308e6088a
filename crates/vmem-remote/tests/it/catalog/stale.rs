//! Listings that show the past.

use std::ops::Bound;

use vmem_core::backend::Catalog;

use super::super::faulty::{Fault, Op};
use super::{World, exists, object, put, remove, version};

#[tokio::test(start_paused = true)]
async fn stale_listing_hides_no_generation() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    world.store.remember().await;
    world.store.fail(|op| (op == Op::List).then_some(Fault::Stale));
    writer.commit(put("n", &object(1, 10, 1))).await.unwrap();
    assert_eq!(version(&reader, "n").await, Some(10), "nothing is listed");
    world.store.remember().await;
    for number in 11..16 {
        writer.commit(put("n", &object(1, number, 1))).await.unwrap();
    }
    assert_eq!(version(&reader, "n").await, Some(15), "the first is listed");
    writer.commit(remove("n")).await.unwrap();
    assert_eq!(version(&reader, "n").await, None);
    assert!(world.store.hit() > 3);
}

#[tokio::test(start_paused = true)]
async fn listing_that_breaks_off_is_made_again() {
    for fault in [Fault::Refused, Fault::Lost, Fault::Silent, Fault::Stuck] {
        let world = World::new();
        let writer = world.open().await;
        for number in 10..13 {
            writer.commit(put("n", &object(1, number, 1))).await.unwrap();
            writer.commit(put("m", &object(2, number + 10, 1))).await.unwrap();
        }
        for what in ["find", "names", "collect"] {
            let mut is_first = true;
            world
                .store
                .fail(move |op| (op == Op::List && std::mem::take(&mut is_first)).then_some(fault));
            let reader = world.open().await;
            let hit = world.store.hit();
            match what {
                "find" => assert_eq!(version(&reader, "n").await, Some(12), "{fault:?}"),
                "names" => {
                    let page = reader.names("".into(), Bound::Unbounded, 9).await.unwrap();
                    let expected = [(2, 22), (1, 12)].map(|(id, it)| object(id, it, 1).record);
                    let found: Vec<_> = page.into_iter().map(|(_, record)| record).collect();
                    assert_eq!(found, expected, "{fault:?}");
                }
                _ => assert_eq!(reader.collect().await.unwrap(), 0, "{fault:?}"),
            }
            assert_eq!(world.store.hit(), hit + 1, "{what} {fault:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn reader_starts_from_what_it_knows() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    world.store.remember().await;
    for number in 10..20 {
        writer.commit(put("n", &object(1, number, 1))).await.unwrap();
    }
    assert_eq!(version(&reader, "n").await, Some(19));
    world.store.fail(|op| (op == Op::List).then_some(Fault::Stale));
    world.requests();
    assert_eq!(version(&reader, "n").await, Some(19));
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get], "not from the first on");
    let page = reader.names("".into(), Bound::Unbounded, 5).await.unwrap();
    assert!(page.is_empty(), "a page is what the listing shows");
}

#[tokio::test(start_paused = true)]
async fn page_shows_no_older_version_than_was_found() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    writer.commit(put("n", &object(1, 10, 1))).await.unwrap();
    world.store.remember().await;
    writer.commit(put("n", &object(1, 11, 1))).await.unwrap();
    assert_eq!(version(&reader, "n").await, Some(11));
    world.store.fail(|op| (op == Op::List).then_some(Fault::Stale));
    let page = reader.names("".into(), Bound::Unbounded, 5).await.unwrap();
    assert_eq!(page, [("n".into(), object(1, 11, 1).record)]);
}

#[tokio::test(start_paused = true)]
async fn writer_with_a_stale_listing_wins_nothing() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    world.store.remember().await;
    one.commit(put("n", &object(1, 10, 1))).await.unwrap();
    world.store.fail(|op| (op == Op::List).then_some(Fault::Stale));
    // It was not looked up before, so the commit looks, and goes on from what it finds.
    other.commit(put("n", &object(1, 11, 1))).await.unwrap();
    assert_eq!(version(&one, "n").await, Some(11));
    assert_eq!(version(&other, "m").await, None);
    one.commit(put("m", &object(2, 20, 1))).await.unwrap();
    let lost = other.commit(put("m", &object(3, 30, 1))).await;
    assert!(exists(&lost, "m"), "{lost:?}");
}
