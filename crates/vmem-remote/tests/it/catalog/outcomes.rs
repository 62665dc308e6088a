//! Commits whose answers are lost: made, not made, and unknown until somebody looks.

use std::time::Duration;

use vmem_core::backend::Catalog;
use vmem_remote::{RemoteOptions, RequestError};

use super::super::faulty::{Fault, Op};
use super::{World, cause, changed, exists, object, options, put, remove, version};

/// One put meets this fault, and all others after it.
fn puts_after(first: Fault, then: Option<Fault>) -> impl FnMut(Op) -> Option<Fault> + Send {
    let mut is_first = true;
    move |op| match op {
        Op::Put if std::mem::take(&mut is_first) => Some(first),
        Op::Put => then,
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn put_whose_answer_was_lost_is_recognised_when_tried_again() {
    for fault in [Fault::Lost, Fault::Refused, Fault::Silent] {
        let world = World::new();
        let catalog = world.open().await;
        catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
        world.store.fail(puts_after(fault, None));
        catalog.commit(put("n", &object(1, 11, 2))).await.unwrap();
        assert!(!catalog.is_shut());
        world.store.heal();
        assert_eq!(version(&catalog, "n").await, Some(11));
        world.requests();
        catalog.commit(put("n", &object(1, 12, 2))).await.unwrap();
        assert_eq!(world.requests(), [Op::Put], "{fault:?}: nothing is unknown");
    }
}

#[tokio::test(start_paused = true)]
async fn silent_put_leaves_the_name_unknown_until_it_is_looked_up() {
    for is_made in [false, true] {
        let world = World::new();
        let catalog = world.open().await;
        catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
        let first = if is_made { Fault::Lost } else { Fault::Silent };
        world.store.fail(puts_after(first, Some(Fault::Silent)));
        let began = tokio::time::Instant::now();
        let unknown = catalog.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
        assert!(began.elapsed() <= options().total_timeout, "{:?}", began.elapsed());
        assert!(matches!(cause(&unknown), RequestError::TimedOut { .. }), "{unknown:?}");
        assert!(catalog.is_shut() && !catalog.is_poisoned());
        // Another name is none the worse, and tells nothing.
        world.store.heal();
        assert_eq!(version(&catalog, "m").await, None);
        assert!(catalog.is_shut());
        let expected = if is_made { 11 } else { 10 };
        assert_eq!(version(&catalog, "n").await, Some(expected));
        assert!(!catalog.is_shut());
        catalog.commit(put("n", &object(1, 12, 2))).await.unwrap();
        assert_eq!(version(&world.open().await, "n").await, Some(12));
    }
}

#[tokio::test(start_paused = true)]
async fn commit_goes_on_from_what_an_unknown_one_has_made() {
    for is_made in [false, true] {
        let world = World::new();
        let catalog = world.open().await;
        catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
        let first = if is_made { Fault::Lost } else { Fault::Silent };
        world.store.fail(puts_after(first, Some(Fault::Silent)));
        catalog.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
        world.store.heal();
        world.requests();
        catalog.commit(put("n", &object(1, 12, 2))).await.unwrap();
        assert_eq!(world.requests(), [Op::List, Op::Get, Op::Get, Op::Put], "a look and a put");
        assert!(!catalog.is_shut());
        assert_eq!(version(&world.open().await, "n").await, Some(12));
    }
}

#[tokio::test(start_paused = true)]
async fn unknown_name_that_another_has_changed_is_refused() {
    let world = World::new();
    let catalog = world.open().await;
    let other = world.open().await;
    catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
    world.store.fail(puts_after(Fault::Lost, Some(Fault::Silent)));
    catalog.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
    world.store.heal();
    assert_eq!(version(&other, "n").await, Some(11));
    other.commit(put("n", &object(1, 20, 2))).await.unwrap();
    let lost = catalog.commit(put("n", &object(1, 12, 2))).await;
    assert!(changed(&lost, 10, 20), "{lost:?}");
    assert!(!catalog.is_shut(), "it is known now");
}

#[tokio::test(start_paused = true)]
async fn new_name_that_may_have_been_made_is_found_out() {
    let world = World::new();
    let catalog = world.open().await;
    let other = world.open().await;
    assert_eq!(version(&other, "n").await, None);
    world.store.fail(puts_after(Fault::Lost, Some(Fault::Silent)));
    catalog.commit(put("n", &object(1, 10, 2))).await.unwrap_err();
    world.store.heal();
    let lost = other.commit(put("n", &object(2, 20, 2))).await;
    assert!(exists(&lost, "n"), "it was made: {lost:?}");
    assert!(catalog.record("n".into()).await.unwrap().is_some());
    catalog.commit(remove("n")).await.unwrap();
    assert_eq!(version(&other, "n").await, None);
}

#[tokio::test(start_paused = true)]
async fn failure_before_anything_was_sent_leaves_nothing_unknown() {
    let world = World::new();
    let options = RemoteOptions { circuit_failures: 1, tries: 1, ..options() };
    let catalog = world.open_with(options.clone()).await;
    catalog.commit(put("n", &object(1, 10, 2))).await.unwrap();
    assert_eq!(version(&catalog, "m").await, None);
    // A read opens the circuit.
    world.store.fail(|_| Some(Fault::Refused));
    catalog.find("m".into()).await.unwrap_err();
    world.requests();
    let refused = catalog.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
    assert!(matches!(cause(&refused), RequestError::CircuitOpen { .. }), "{refused:?}");
    assert_eq!(world.requests(), []);
    assert!(!catalog.is_shut(), "nothing was sent");
    world.store.heal();
    tokio::time::advance(options.circuit_pause).await;
    // Refused credentials are an answer too.
    world.store.fail(|op| (op == Op::Put).then_some(Fault::Denied));
    let refused = catalog.commit(put("n", &object(1, 11, 2))).await.unwrap_err();
    assert!(matches!(cause(&refused), RequestError::Denied { .. }), "{refused:?}");
    assert!(!format!("{refused:?}").contains("SECRET"), "{refused:?}");
    assert!(!catalog.is_shut(), "the object store has answered");
}

#[tokio::test(start_paused = true)]
async fn creates_that_find_an_object_do_not_open_the_circuit() {
    let world = World::new();
    let options = RemoteOptions { circuit_failures: 2, ..options() };
    let one = world.open().await;
    let other = world.open_with(options).await;
    for n in 1..20 {
        let name = format!("n{n}");
        assert_eq!(version(&other, &name).await, None);
        one.commit(put(&name, &object(n, n, 1))).await.unwrap();
        let lost = other.commit(put(&name, &object(100 + n, 100 + n, 1))).await;
        assert!(exists(&lost, &name), "{lost:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn commit_that_waits_for_an_answer_is_counted_and_dropped_safely() {
    let world = World::new();
    let catalog = world.open().await;
    assert_eq!(version(&catalog, "n").await, None);
    world.store.fail(|_| Some(Fault::Slow(Duration::from_secs(3))));
    let attempts = catalog.attempts();
    let commit = catalog.commit(put("n", &object(1, 10, 1)));
    assert_eq!(catalog.attempts(), attempts + 1);
    drop(commit);
    tokio::time::sleep(Duration::from_secs(4)).await;
    world.store.heal();
    assert_eq!(version(&world.open().await, "n").await, Some(10), "it went on");
    world.requests();
    catalog.commit(put("n", &object(1, 11, 1))).await.unwrap();
    assert_eq!(world.requests(), [Op::Put], "and it is known");
}
