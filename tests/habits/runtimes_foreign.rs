//! Scenario 42: a store that is used from elsewhere than the runtime in which it was opened.
//!
//! Excluded: a panic for want of a timer, an I/O driver or a runtime at the place of the call; a
//! hang; a deadline that is kept only where the store's own runtime runs. Noticed by each call from
//! each of these places, in a thread of its own with a bound.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::runtime::{Builder, Runtime};
use vmem::{IoDriver, VMemHandle, VirtualMemoryError};

use crate::calls::{Call, LEN, Outcome, Subject, name};
use crate::harness::{BOUND, CLOSE_BOUND, Threads, assert_none, attempt, block_on, is_deadline};
use crate::stores::{HOST, MIB, Place, Sizes, Store, cold, open};

const SIZES: Sizes = Sizes { space: 3 * MIB, disk: 64 * MIB };
const OBJECTS: usize = 24;
/// The wait timeout where nothing will come.
const SHORT_WAIT: Duration = Duration::from_millis(500);

const CALLS: [Call; 29] = [
    Call::Read,
    Call::ReadAt,
    Call::ReadAtSmall,
    Call::ReadInto,
    Call::ReadWith,
    Call::ReadBackground,
    Call::ReadToStay,
    Call::ReadMany,
    Call::Write,
    Call::WriteAt,
    Call::WriteWith,
    Call::Allocate,
    Call::AllocateOnDisk,
    Call::Put,
    Call::PutOnDisk,
    Call::Promote,
    Call::Demote,
    Call::Pin,
    Call::Prefetch,
    Call::PrefetchMany,
    Call::Flush,
    Call::FlushAll,
    Call::AllocateNamed,
    Call::PutNamed,
    Call::OpenNamed,
    Call::RenameNamed,
    Call::SetMetadata,
    Call::Names,
    Call::RemoveNamed,
];

/// Where a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// Another current-thread runtime.
    One,
    /// Another multi-thread runtime.
    Two,
    /// A runtime without a timer and without I/O.
    Bare,
    /// A runtime without I/O.
    NoIo,
    /// A runtime without a timer.
    NoTime,
    /// A thread without a runtime.
    Nowhere,
    /// A blocking section of a task of another runtime.
    BlockInPlace,
}

const FROM: [From; 7] =
    [From::One, From::Two, From::Bare, From::NoIo, From::NoTime, From::Nowhere, From::BlockInPlace];

impl From {
    /// Runs a call there, to its end or to a bound.
    fn run(self, what: &str, call: BoxFuture<'static, Outcome>) -> Result<Outcome, String> {
        let with = |set: fn(&mut Builder) -> &mut Builder| {
            set(&mut Builder::new_current_thread()).build().unwrap()
        };
        attempt(what, BOUND, move || match self {
            From::Nowhere => block_on(call),
            From::One => Threads::One.runtime().block_on(call),
            From::Two => {
                let runtime = Threads::Two.runtime();
                let output = runtime.block_on(async { runtime.spawn(call).await.unwrap() });
                runtime.shutdown_background();
                output
            }
            From::Bare => with(|builder| builder).block_on(call),
            From::NoIo => with(|builder| builder.enable_time()).block_on(call),
            From::NoTime => with(|builder| builder.enable_io()).block_on(call),
            From::BlockInPlace => {
                let runtime = Threads::Two.runtime();
                let handle = runtime.handle().clone();
                let output = runtime.block_on(async move {
                    let task = tokio::spawn(async move {
                        tokio::task::block_in_place(|| handle.block_on(call))
                    });
                    task.await.unwrap()
                });
                runtime.shutdown_background();
                output
            }
        })
    }
}

/// A store on this runtime, with cold objects that have names beside them.
fn subject(runtime: &Runtime, place: Place, driver: IoDriver, wait: Duration) -> (Store, Subject) {
    runtime.block_on(async {
        let store =
            open(place, SIZES, |builder| builder.io_driver(driver).wait_timeout(wait)).await;
        let objects: Vec<VMemHandle> = cold(&store.vmem, 0, OBJECTS, LEN).await;
        for n in 0..OBJECTS {
            drop(store.vmem.put_named(&name(n), b"named", HOST).await.unwrap());
        }
        let vmem = store.vmem.clone();
        let dir = store.dir.path().to_owned();
        (store, Subject { vmem, objects, dir })
    })
}

fn works_from_everywhere(place: Place, driver: IoDriver) {
    let mut complaints = Vec::new();
    for from in FROM {
        let runtime = Threads::Two.runtime();
        let (store, subject) = subject(&runtime, place, driver, crate::harness::WAIT);
        for (n, call) in CALLS.into_iter().enumerate() {
            // Each on objects of its own, which are on disk.
            let at = n % OBJECTS;
            let what = format!("{call:?}, from {from:?}");
            let again = block_on(subject.vmem.demote(&subject.objects[at], crate::stores::DISK));
            let ended = match from.run(&what, call.start(&subject, at)) {
                Ok(Ok(got)) => again.map_err(|error| error.to_string()).and_then(|()| match call {
                    // The calls before have changed the objects.
                    Call::Read | Call::ReadAt | Call::ReadInto => got.check(OBJECTS),
                    _ => Ok(()),
                }),
                Ok(Err(error)) => Err(error.to_string()),
                Err(why) => Err(why),
            };
            complaints.extend(ended.err().map(|why| format!("{what}: {why}")));
            if complaints.len() > 12 {
                break;
            }
        }
        // The last handles go where there is no runtime.
        drop(subject);
        let vmem = store.vmem.clone();
        let what = format!("close, from {from:?}");
        let closed = attempt(&what, CLOSE_BOUND, move || match from {
            From::Nowhere => block_on(vmem.close()),
            _ => Threads::One.runtime().block_on(vmem.close()),
        });
        match closed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => complaints.push(format!("{what}: {error}")),
            Err(why) => complaints.push(why),
        }
        runtime.shutdown_background();
    }
    assert_none(&complaints);
}

#[test]
fn store_over_a_simulated_disk_works_from_everywhere() {
    works_from_everywhere(Place::Simulated, IoDriver::Auto);
}

#[test]
fn store_over_the_driver_under_test_works_from_everywhere() {
    works_from_everywhere(Place::Real, vmem_testkit::driver_under_test());
}

#[test]
fn store_over_blocking_calls_works_from_everywhere() {
    works_from_everywhere(Place::Real, IoDriver::Blocking);
}

/// A runtime of one thread that is not driven: calls meanwhile get an answer or an error.
#[test]
fn deadlines_are_kept_where_the_runtime_of_the_store_stands_still() {
    let mut complaints = Vec::new();
    for place in [Place::Simulated, Place::Real] {
        for from in [From::One, From::Two, From::Nowhere] {
            let runtime = Threads::One.runtime();
            let driver = vmem_testkit::driver_under_test();
            let (store, subject) = subject(&runtime, place, driver, SHORT_WAIT);
            for (n, call) in CALLS.into_iter().enumerate() {
                let what = format!("{call:?} of a store over {place:?}, from {from:?}");
                match from.run(&what, call.start(&subject, n % OBJECTS)) {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) if is_deadline(&error) => {}
                    Ok(Err(error)) => complaints.push(format!("{what}: {error}")),
                    Err(why) => complaints.push(why),
                }
                if complaints.len() > 12 {
                    break;
                }
            }
            // It runs on, and everything is as it should be.
            let closed = runtime.block_on(async {
                tokio::time::timeout(CLOSE_BOUND, store.vmem.clone().close()).await
            });
            match closed {
                Ok(Ok(())) => {}
                other => complaints.push(format!("close, {place:?}, {from:?}: {other:?}")),
            }
        }
    }
    assert_none(&complaints);
}

/// The runtime has gone, with the store in it: each call says so.
#[test]
fn calls_end_where_the_runtime_of_the_store_was_dropped() {
    let mut complaints = Vec::new();
    for place in [Place::Simulated, Place::Real] {
        for from in FROM {
            let runtime = Threads::Two.runtime();
            let driver = vmem_testkit::driver_under_test();
            let (_store, subject) = subject(&runtime, place, driver, SHORT_WAIT);
            drop(runtime);
            for (n, call) in CALLS.into_iter().enumerate() {
                let what = format!("{call:?} of a store over {place:?}, from {from:?}");
                match from.run(&what, call.start(&subject, n % OBJECTS)) {
                    Ok(Ok(_) | Err(VirtualMemoryError::Closed)) => {}
                    Ok(Err(error)) if is_deadline(&error) => {}
                    Ok(Err(error)) => complaints.push(format!("{what}: {error}")),
                    Err(why) => complaints.push(why),
                }
                if complaints.len() > 12 {
                    break;
                }
            }
        }
    }
    assert_none(&complaints);
}
