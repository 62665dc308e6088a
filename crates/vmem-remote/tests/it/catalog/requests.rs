//! Requests counted: what a commit, a look-up and a page cost.

use std::ops::Bound;

use vmem_core::backend::{Catalog, CatalogChange, SEGMENT_CHUNKS};

use super::super::faulty::Op;
use super::{World, object, put, remove, rename, version};

#[tokio::test(start_paused = true)]
async fn commit_of_a_known_name_is_one_put() {
    let world = World::new();
    let catalog = world.open().await;
    assert_eq!(version(&catalog, "n").await, None);
    world.requests();
    catalog.commit(put("n", &object(1, 10, SEGMENT_CHUNKS + 1))).await.unwrap();
    assert_eq!(world.requests(), [Op::Put]);
    catalog.commit(put("n", &object(1, 11, 1))).await.unwrap();
    assert_eq!(world.requests(), [Op::Put]);
    catalog.commit(remove("n")).await.unwrap();
    assert_eq!(world.requests(), [Op::Put]);
    // What the new state keeps of the old one is read.
    catalog.commit(put("n", &object(2, 20, 1))).await.unwrap();
    let record = object(2, 21, 1).record;
    world.requests();
    catalog.commit(vec![CatalogChange::Put { name: "n".into(), record }]).await.unwrap();
    assert_eq!(world.requests(), [Op::Get, Op::Put]);
    assert_eq!(version(&catalog, "m").await, None);
    world.requests();
    catalog.commit(rename("n", "m")).await.unwrap();
    assert_eq!(world.requests(), [Op::Get, Op::Put, Op::Put]);
}

#[tokio::test(start_paused = true)]
async fn commit_of_an_unknown_name_looks_first() {
    let world = World::new();
    let catalog = world.open().await;
    world.requests();
    catalog.commit(put("n", &object(1, 10, 1))).await.unwrap();
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Put], "the get finds nothing");
}

#[tokio::test(start_paused = true)]
async fn look_up_is_one_list_one_get_and_one_probe() {
    let world = World::new();
    let catalog = world.open().await;
    catalog.commit(put("n", &object(1, 10, 1))).await.unwrap();
    world.requests();
    assert_eq!(version(&catalog, "n").await, Some(10));
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get]);
    assert!(catalog.record("n".into()).await.unwrap().is_some());
    assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get]);
    assert_eq!(version(&catalog, "missing").await, None);
    assert_eq!(world.requests(), [Op::List, Op::Get]);
}

#[tokio::test(start_paused = true)]
async fn lost_commit_is_one_put_and_one_get() {
    let world = World::new();
    let one = world.open().await;
    let other = world.open().await;
    assert_eq!(version(&other, "n").await, None);
    one.commit(put("n", &object(1, 10, 1))).await.unwrap();
    world.requests();
    other.commit(put("n", &object(2, 20, 1))).await.unwrap_err();
    assert_eq!(world.requests(), [Op::Put, Op::Get]);
    other.commit(put("n", &object(2, 20, 1))).await.unwrap_err();
    assert_eq!(world.requests(), [], "it is still not shown");
}

#[tokio::test(start_paused = true)]
async fn names_of_a_commit_are_put_beside_each_other() {
    let world = World::new();
    let catalog = world.open().await;
    let names: Vec<_> = (0..32).map(|n| format!("name {n}")).collect();
    for name in &names {
        assert_eq!(version(&catalog, name).await, None);
    }
    let second = std::time::Duration::from_secs(1);
    world.store.fail(move |_| Some(super::super::faulty::Fault::Slow(second)));
    let changes = (1..).zip(&names).flat_map(|(n, name)| put(name, &object(n, n, 1))).collect();
    let began = tokio::time::Instant::now();
    catalog.commit(changes).await.unwrap();
    assert_eq!(began.elapsed(), second);
}

#[tokio::test(start_paused = true)]
async fn page_is_one_list_and_a_get_for_each_name() {
    let world = World::new();
    let catalog = world.open().await;
    for n in 0..600 {
        let name = format!("n{n:04}");
        catalog.commit(put(&name, &object(n + 1, n + 1, 1))).await.unwrap();
        if n < 500 {
            catalog.commit(remove(&name)).await.unwrap();
        }
    }
    world.requests();
    let page = catalog.names("n05".into(), Bound::Unbounded, 10).await.unwrap();
    let names: Vec<_> = page.iter().map(|(name, _)| &**name).collect();
    assert_eq!((names.len(), names[0], names[9]), (10, "n0500", "n0509"));
    let requests = world.requests();
    assert_eq!(requests.iter().filter(|op| **op == Op::List).count(), 1);
    // Reads run in groups, of which the last may go on behind the limit.
    assert!((10..=20).contains(&(requests.len() - 1)), "{} gets", requests.len() - 1);
    // Removed names take further listings, and no more memory.
    let page = catalog.names("".into(), Bound::Unbounded, 10).await.unwrap();
    assert_eq!((page.len(), &*page[0].0), (10, "n0500"));
    let lists = world.requests().iter().filter(|op| **op == Op::List).count();
    assert_eq!(lists, 2, "500 names that are removed, 266 a listing");
}
