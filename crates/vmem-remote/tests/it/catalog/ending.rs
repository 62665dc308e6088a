//! Closes, and runtimes that end.

use std::time::Duration;

use vmem_core::VirtualMemoryError;
use vmem_core::backend::Catalog;
use vmem_testkit::exhaust;

use super::super::faulty::{Fault, Op};
use super::{World, object, put, version};

#[tokio::test(start_paused = true)]
async fn close_waits_for_the_commit_in_flight() {
    let world = World::new();
    let catalog = world.open().await;
    assert_eq!(version(&catalog, "n").await, None);
    world.store.fail(|_| Some(Fault::Slow(Duration::from_secs(2))));
    let commit = catalog.commit(put("n", &object(1, 10, 1)));
    let began = tokio::time::Instant::now();
    catalog.close().await.unwrap();
    assert_eq!(began.elapsed(), Duration::from_secs(2));
    commit.await.unwrap();
    world.requests();
    let refused = catalog.collect().await;
    assert!(matches!(refused, Err(VirtualMemoryError::Closed)), "{refused:?}");
    assert_eq!(world.requests(), []);
    catalog.close().await.unwrap();
    assert_eq!(catalog.next_id(), catalog.next_id());
}

#[tokio::test(start_paused = true)]
async fn calls_dropped_at_each_point_leave_nothing_unknown() {
    let world = World::new();
    let catalog = world.open().await;
    world.store.fail(|_| Some(Fault::Slow(Duration::from_millis(3))));
    let polls = exhaust(|_| catalog.find("n".into())).await;
    assert!(polls > 0, "{polls}");
    let mut number = 10;
    let polls = exhaust(|_| {
        number += 1;
        catalog.commit(put(&format!("n{number}"), &object(number, number, 1)))
    })
    .await;
    assert!(polls > 0, "{polls}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!catalog.is_shut());
    for number in 11..=number {
        assert_eq!(version(&catalog, &format!("n{number}")).await, Some(number), "it went on");
    }
}

#[test]
fn commit_whose_runtime_has_gone_is_unknown() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    };
    let world = World::new();
    let first = runtime();
    let catalog = first.block_on(async {
        let catalog = world.open().await;
        assert_eq!(version(&catalog, "n").await, None);
        world.store.fail(|op| (op == Op::Put).then_some(Fault::Silent));
        let commit = catalog.commit(put("n", &object(1, 10, 1)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(commit);
        catalog
    });
    assert!(!catalog.is_shut());
    drop(first);
    assert!(catalog.is_shut(), "its task was dropped with the put under way");
    runtime().block_on(async {
        let refused = catalog.find("n".into()).await;
        assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
        catalog.close().await.unwrap();
    });
}
