//! Scenario 35, as users write it: buffered streams whose loop body awaits the store, `select!` by
//! reference, joined sets that are polled now and then, futures that change their task.
//!
//! Excluded: a loop that waits for itself, since what its body needs is held by a future that is
//! polled only when the body has ended. Noticed by a step that is not done well before the wait
//! timeout, by wrong bytes, and by other tasks that are delayed meanwhile.

use std::time::{Duration, Instant};

use futures::future::{FutureExt, join_all, poll_immediate, select_all};
use futures::stream::{self, FuturesUnordered, StreamExt};

use crate::calls::{Call, LEN, Outcome, Subject};
use crate::harness::{BOUND, CLOSE_BOUND, Threads, assert_none, run, run_cases, succeeds, within};
use crate::kept_world::{beside, run_others};
use crate::stores::{MIB, Place, Sizes, Store, cold, open};

/// What sixteen of the widest streams bring fits twice.
const SIZES: Sizes = Sizes { space: 10 * MIB, disk: 128 * MIB };
const OBJECTS: usize = 40;
/// The objects of streams are those before, those of bodies the others.
const BODIES: usize = 28;

const PLACES: [(Place, Threads); 3] = [
    (Place::Simulated, Threads::One),
    (Place::Simulated, Threads::Two),
    (Place::Real, Threads::Two),
];

/// What a stream does, what its loop body does, and how many of the first are under way at once.
const LOOPS: [(Call, Call, usize); 14] = [
    (Call::ReadAt, Call::ReadAt, 16),
    (Call::ReadAt, Call::ReadInto, 8),
    (Call::ReadAt, Call::PutOnDisk, 3),
    (Call::ReadAt, Call::ReadMany, 16),
    (Call::Read, Call::ReadAt, 16),
    (Call::Read, Call::Write, 8),
    (Call::ReadInto, Call::ReadInto, 24),
    (Call::ReadInto, Call::WriteAt, 4),
    (Call::ReadMany, Call::ReadMany, 5),
    (Call::ReadMany, Call::ReadAt, 2),
    (Call::Write, Call::ReadAt, 16),
    (Call::WriteAt, Call::PutOnDisk, 12),
    (Call::PutOnDisk, Call::PutOnDisk, 16),
    (Call::Promote, Call::Pin, 16),
];

async fn subject(place: Place) -> (Store, Subject) {
    let store = open(place, SIZES, |builder| builder).await;
    store.slow(Duration::from_micros(300), 8);
    let objects = cold(&store.vmem, 0, OBJECTS, LEN).await;
    let subject = Subject { vmem: store.vmem.clone(), objects, dir: store.dir.path().to_owned() };
    (store, subject)
}

/// What was brought, unless it is wrong, late or an error.
async fn step(
    what: &str,
    subject: &Subject,
    step: impl Future<Output = Outcome>,
) -> Result<(), String> {
    let got = succeeds(what, BOUND, step).await?;
    got.check(subject.objects.len())
}

/// Runs the test in each place and with each kind of runtime.
fn everywhere<F, T>(test: T)
where
    T: Fn(Place) -> F + Copy + Send + Sync + 'static,
    F: Future<Output = Result<(), String>>,
{
    assert_none(&run_cases(&PLACES, |(place, threads)| run(threads, move || test(place))));
}

/// How a loop ended.
type Ended = Result<(), String>;

async fn buffered(subject: Subject, (call, body, width): (Call, Call, usize)) -> Ended {
    let started = |n| call.start(&subject, n);
    let mut results = stream::iter(0..BODIES - 4).map(started).buffered(width);
    let mut n = 0;
    while let Some(got) = within("the stream", BOUND, results.next()).await? {
        got.map_err(|error| format!("the stream: {error}"))?.check(OBJECTS)?;
        let at = BODIES + n % 8;
        step("the body", &subject, body.start(&subject, at)).await?;
        n += 1;
    }
    match n {
        n if n == BODIES - 4 => Ok(()),
        n => Err(format!("{n} results")),
    }
}

/// Each loop in a store of its own.
async fn loops<F: Future<Output = Ended>>(
    place: Place,
    one: impl Fn(Subject, (Call, Call, usize)) -> F,
) -> Result<(), String> {
    let mut complaints = Vec::new();
    for way in LOOPS {
        let (store, subject) = subject(place).await;
        let ended = match one(subject, way).await {
            Ok(()) => succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await,
            Err(why) => Err(why),
        };
        complaints.extend(ended.err().map(|why| format!("{way:?}: {why}")));
    }
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n  ")) }
}

#[test]
fn loop_over_a_buffered_stream_ends_when_its_body_awaits_the_store() {
    everywhere(|place| loops(place, buffered));
}

#[test]
fn loop_over_an_unordered_stream_ends_when_its_body_awaits_the_store() {
    everywhere(|place| {
        loops(place, async |subject: Subject, (call, body, width)| {
            let started = |n| call.start(&subject, n);
            let mut results = stream::iter(0..BODIES - 4).map(started).buffer_unordered(width);
            let mut n = 0;
            while let Some(got) = within("the stream", BOUND, results.next()).await? {
                got.map_err(|error| format!("the stream: {error}"))?.check(OBJECTS)?;
                step("the body", &subject, body.start(&subject, BODIES + n % 8)).await?;
                n += 1;
            }
            Ok(())
        })
    });
}

#[test]
fn ticker_that_uses_the_store_gets_on_beside_futures_selected_by_reference() {
    everywhere(|place| {
        loops(place, async |subject: Subject, (call, body, width)| {
            let mut under_way: Vec<_> = (0..width).map(|n| call.start(&subject, n)).collect();
            let mut ticks = 0;
            let mut ended = Instant::now();
            while !under_way.is_empty() {
                let selected = tokio::select! {
                    biased;
                    (got, at, _) = select_all(under_way.iter_mut()) => Some((got, at)),
                    () = tokio::time::sleep(Duration::from_micros(500)) => None,
                };
                if let Some((got, at)) = selected {
                    got.map_err(|error| format!("selected: {error}"))?.check(OBJECTS)?;
                    drop(under_way.swap_remove(at));
                    ended = Instant::now();
                }
                let at = BODIES + ticks % 8;
                step("the ticker", &subject, body.start(&subject, at)).await?;
                ticks += 1;
                if ended.elapsed() > BOUND {
                    return Err(format!("{} of {width} are left after {BOUND:?}", under_way.len()));
                }
            }
            Ok(())
        })
    });
}

#[test]
fn future_selected_by_reference_ends_when_the_other_branch_awaits_the_store() {
    everywhere(|place| {
        loops(place, async |subject: Subject, (call, body, _)| {
            let mut main = call.start(&subject, 0);
            let mut beside: FuturesUnordered<_> = (1..6).map(|n| call.start(&subject, n)).collect();
            let mut ticks = tokio::time::interval(Duration::from_micros(200));
            for n in 0.. {
                tokio::select! {
                    biased;
                    _ = ticks.tick(), if n < 6 => {
                        step("the branch", &subject, body.start(&subject, BODIES + n)).await?;
                        // Polled once, and again only in a later turn.
                        let _some = poll_immediate(beside.next()).await;
                    }
                    got = &mut main => {
                        got.map_err(|error| error.to_string())?.check(OBJECTS)?;
                        break;
                    }
                    () = tokio::time::sleep(BOUND) => return Err("the future: not done".into()),
                }
            }
            while let Some(got) = within("those beside", BOUND, beside.next()).await? {
                got.map_err(|error| error.to_string())?.check(OBJECTS)?;
            }
            Ok(())
        })
    });
}

#[test]
fn other_tasks_are_not_delayed_by_a_stream_whose_client_is_slow() {
    everywhere(async |place| {
        for call in [Call::ReadAt, Call::ReadInto, Call::Read, Call::ReadMany, Call::Write] {
            let (store, subject) = subject(place).await;
            let width = if call == Call::ReadMany { 4 } else { 16 };
            let beside = beside(&subject.vmem).await;
            let started = |n| call.start(&subject, n);
            let mut results = stream::iter(0..24).map(started).buffered(width);
            let first = within("the first", BOUND, results.next()).await?;
            first.unwrap().map_err(|error| error.to_string())?.check(OBJECTS)?;
            // The client is slow from here on: the stream is not polled.
            tokio::time::sleep(Duration::from_millis(20)).await;
            run_others(&subject, call, &beside).await.map_err(|why| format!("{call:?}: {why}"))?;
            while let Some(got) = within("the stream", BOUND, results.next()).await? {
                got.map_err(|error| format!("{call:?}, the stream: {error}"))?;
            }
            drop(results);
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await?;
        }
        Ok(())
    });
}

#[test]
fn set_that_was_polled_once_delays_no_other_set() {
    everywhere(async |place| {
        for kept in [1, 2, 6, 12] {
            let (store, subject) = subject(place).await;
            let vmem = &store.vmem;
            let mut sets: Vec<_> = (0..kept)
                .map(|n| vmem.read_many(&subject.objects[2 * n..2 * n + 3]).boxed())
                .collect();
            for set in &mut sets {
                assert!(poll_immediate(set).await.is_none(), "cold objects are not there at once");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            let others = (0..4).map(|n| {
                let set = &subject.objects[BODIES + n..BODIES + 2 * n + 2];
                succeeds("another set", BOUND, vmem.read_many(set))
            });
            for other in join_all(others).await {
                other.map_err(|why| format!("beside {kept}: {why}"))?;
            }
            for (n, set) in sets.into_iter().enumerate() {
                let set = succeeds("the kept one", BOUND, set).await?;
                crate::stores::check(2 * n, &[1], 0, &set[0])?;
            }
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await?;
        }
        Ok(())
    });
}

#[test]
fn future_that_changes_its_task_brings_its_bytes() {
    everywhere(async |place| {
        let calls = [Call::Read, Call::ReadAt, Call::ReadInto, Call::ReadMany, Call::Write];
        let more = [Call::WriteAt, Call::Put, Call::Promote, Call::Pin, Call::PutNamed];
        for call in calls.into_iter().chain(more) {
            let (store, subject) = subject(place).await;
            let mut moved = Vec::new();
            for n in 0..12 {
                let mut future = call.start(&subject, n);
                // The first task polls it and ends, and its waker with it.
                let polled = tokio::spawn(async move {
                    let output = poll_immediate(&mut future).await;
                    (output, future)
                });
                moved.push(polled.await.unwrap());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            let finished = moved.into_iter().map(|(output, future)| async {
                let future = async { if let Some(got) = output { got } else { future.await } };
                step("in its second task", &subject, future).await
            });
            for finished in join_all(finished).await {
                finished.map_err(|why| format!("{call:?}: {why}"))?;
            }
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await?;
        }
        Ok(())
    });
}
