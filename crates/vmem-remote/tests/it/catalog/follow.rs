//! Which names others have changed, and what it costs to ask.
//!
//! Excluded: a change that is not reported within one look; a report of what this instance has
//! made, or of what is as it was; and a request more than is said.

use std::sync::Arc;
use std::time::Duration;

use vmem_core::VirtualMemoryError;
use vmem_core::backend::Catalog;
use vmem_remote::BucketCatalog;

use super::super::faulty::{Fault, Op};
use super::{World, object, options, put, remove, rename, version};

/// What is reported of these names and versions, in the order of the names.
async fn reported(catalog: &BucketCatalog, names: &[(&str, u64)]) -> Vec<(String, Option<u64>)> {
    let names = names.iter().map(|&(name, version)| (name.into(), version)).collect();
    let changed = catalog.changed(names).await.unwrap();
    let mut reported: Vec<_> = changed
        .into_iter()
        .map(|error| match error {
            VirtualMemoryError::VersionChanged { name, current, .. } => {
                (name.to_string(), Some(current))
            }
            VirtualMemoryError::NameNotFound { name } => (name.to_string(), None),
            other => panic!("{other:?}"),
        })
        .collect();
    reported.sort();
    reported
}

#[tokio::test(start_paused = true)]
async fn names_that_others_changed_are_reported_until_shown() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    for (id, name) in (1..).zip(["a", "b", "c", "d"]) {
        writer.commit(put(name, &object(id, id * 10, 1))).await.unwrap();
        assert_eq!(version(&reader, name).await, Some(id * 10));
    }
    let all = [("a", 10), ("b", 20), ("c", 30), ("d", 40)];
    assert_eq!(reported(&reader, &all).await, []);
    writer.commit(put("a", &object(1, 11, 1))).await.unwrap();
    writer.commit(put("a", &object(1, 12, 1))).await.unwrap();
    writer.commit(remove("b")).await.unwrap();
    writer.commit(rename("c", "e")).await.unwrap();
    let expected = [("a".to_owned(), Some(12)), ("b".to_owned(), None), ("c".to_owned(), None)];
    for _ in 0..2 {
        assert_eq!(reported(&reader, &all).await, expected);
    }
    // What the writer has made it knows.
    assert_eq!(reported(&writer, &[("a", 12), ("d", 40)]).await, []);
    assert_eq!(version(&reader, "a").await, Some(12));
    assert_eq!(reported(&reader, &[("a", 12), ("d", 40)]).await, []);
    assert_eq!(reported(&reader, &[("a", 10)]).await, [("a".to_owned(), Some(12))]);
}

/// The answer to a commit is lost, and the name is unknown.
#[tokio::test(start_paused = true)]
async fn own_commits_of_unknown_outcome_are_not_reported() {
    let world = World::new();
    let catalog = world.open().await;
    catalog.commit(put("n", &object(1, 10, 1))).await.unwrap();
    world.store.fail(|op| match op {
        Op::Put => Some(Fault::Lost),
        _ => Some(Fault::Refused),
    });
    catalog.commit(put("n", &object(1, 11, 1))).await.unwrap_err();
    world.store.heal();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(reported(&catalog, &[("n", 10)]).await, []);
    assert_eq!(version(&catalog, "n").await, Some(11), "it was made");
}

#[tokio::test(start_paused = true)]
async fn name_is_asked_for_by_one_get() {
    let world = World::new();
    let catalog = world.open().await;
    let names: Vec<String> = (0..10).map(|n| format!("name {n}")).collect();
    for name in &names {
        catalog.commit(put(name, &object(1, 10, 1))).await.unwrap();
    }
    let asked: Vec<_> = names.iter().map(|name| (name.as_str(), 10)).collect();
    // Each look keeps what is known fresh, so that no listing is needed however long it goes on.
    for _ in 0..20 {
        world.requests();
        assert_eq!(reported(&catalog, &asked).await, []);
        assert_eq!(world.requests(), [Op::Get; 10]);
        tokio::time::sleep(options().grace / 3).await;
    }
    tokio::time::sleep(options().grace).await;
    world.requests();
    assert_eq!(reported(&catalog, &asked[..1]).await, []);
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get], "it is a look-up then");
}

#[tokio::test(start_paused = true)]
async fn many_names_are_listed_together() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    let names: Vec<Arc<str>> = (0..100).map(|n| format!("name {n}").into()).collect();
    for name in &names {
        writer.commit(put(name, &object(1, 10, 1))).await.unwrap();
        assert_eq!(version(&reader, name).await, Some(10));
    }
    let asked: Vec<_> = names.iter().map(|name| (&**name, 10)).collect();
    world.requests();
    assert_eq!(reported(&reader, &asked).await, []);
    assert_eq!(world.requests(), [Op::List]);
    writer.commit(put("name 7", &object(1, 11, 1))).await.unwrap();
    world.requests();
    assert_eq!(reported(&reader, &asked).await, [("name 7".to_owned(), Some(11))]);
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get]);
    world.requests();
    assert_eq!(reported(&reader, &asked).await, [("name 7".to_owned(), Some(11))]);
    assert_eq!(world.requests(), [Op::List], "it is known by now");
}

#[tokio::test(start_paused = true)]
async fn one_name_that_cannot_be_read_hides_no_other() {
    let world = World::new();
    let writer = world.open().await;
    let reader = world.open().await;
    for name in ["a", "b"] {
        writer.commit(put(name, &object(1, 10, 1))).await.unwrap();
        assert_eq!(version(&reader, name).await, Some(10));
        writer.commit(put(name, &object(1, 11, 1))).await.unwrap();
    }
    let mut is_first = true;
    world
        .store
        .fail(move |op| (op == Op::Get && std::mem::take(&mut is_first)).then_some(Fault::Denied));
    assert_eq!(reported(&reader, &[("a", 10), ("b", 10)]).await.len(), 1);
    world.store.fail(|_| Some(Fault::Denied));
    reader.changed(vec![("a".into(), 10)]).await.unwrap_err();
}
