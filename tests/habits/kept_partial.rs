//! Scenario 35, half way: futures left alone after their k-th poll, each poll after a wake.
//!
//! Excluded: bytes, pieces of staging, permits or gates that a future has gathered at its k-th step
//! and keeps. Noticed by calls of other tasks that need all of staging or all of host memory, by
//! figures that are not those of before once the futures are dropped, and by what the rest bring.

use std::time::Duration;

use crate::calls::{Call, LEN, Subject};
use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, eventually, run, run_cases, succeeds, within,
};
use crate::keep::Kept;
use crate::kept_world::{beside, run_others};
use crate::stores::{MIB, Place, Sizes, cold, open};

/// Less than what the kept ones would bring.
const SIZES: Sizes = Sizes { space: 2 * MIB, disk: 64 * MIB };
const KEPT: usize = 16;

/// Keeps sixteen of this call at this poll; others, then half of them dropped, half finished.
async fn case(place: Place, call: Call, polls: usize) -> Result<(), String> {
    let store = open(place, SIZES, |builder| builder).await;
    let vmem = store.vmem.clone();
    let objects = cold(&vmem, 0, KEPT + 4, LEN).await;
    let beside = beside(&vmem).await;
    store.slow(Duration::from_micros(200), 4);
    let subject = Subject { vmem: vmem.clone(), objects, dir: store.dir.path().to_owned() };
    let mut kept = Vec::new();
    for i in 0..KEPT {
        // Some are further than others.
        let polls = polls + i % 2;
        let future = Kept::polled(call.start(&subject, i), polls).await;
        if future.is_pending() {
            kept.push(future);
            continue;
        }
        // What it returned is the caller's, which drops it.
        let got = succeeds("a future that has ended", BOUND, future.finish()).await?;
        got.check(subject.objects.len())?;
    }
    let pending = kept.len();
    run_others(&subject, call, &beside).await.map_err(|why| format!("{pending} kept: {why}"))?;
    for (i, kept) in kept.into_iter().enumerate() {
        if i % 2 == 0 {
            drop(kept);
            continue;
        }
        let what = format!("kept future {i}");
        let got = succeeds(&what, BOUND, kept.finish()).await?;
        got.check(subject.objects.len())?;
    }
    let quiet = || {
        let stats = vmem.stats();
        let held = stats.held_bytes;
        let pinned = stats.pinned_bytes;
        (held, pinned, stats.waiters, stats.migrations_in_flight) == (0, 0, 0, 0)
    };
    eventually("nothing is held, pinned, waited for or in flight", quiet).await?;
    // All of staging is free: more copies at once than it has pieces.
    let mut copies = tokio::task::JoinSet::new();
    for handle in &subject.objects {
        let vmem = vmem.clone();
        let handle = handle.clone();
        copies.spawn(async move { vmem.read_into(&handle, 0..LEN, &mut vec![0; LEN]).await });
    }
    while let Some(copied) = within("a copy", BOUND, copies.join_next()).await? {
        copied.unwrap().map_err(|error| format!("a copy: {error}"))?;
    }
    succeeds("close", CLOSE_BOUND, vmem.close()).await
}

fn at_each_poll(call: Call) {
    let mut cases = Vec::new();
    for polls in [1, 2, 3, 5] {
        cases.extend(THREADS.map(|threads| (polls, Place::Simulated, threads)));
        if polls < 3 {
            cases.push((polls, Place::Real, Threads::Two));
        }
    }
    assert_none(&run_cases(&cases, |(polls, place, threads)| {
        run(threads, move || case(place, call, polls))
    }));
}

macro_rules! at_each_poll {
    ($($name:ident: $call:ident,)*) => {
        $(#[test]
        fn $name() {
            at_each_poll(Call::$call);
        })*
    };
}

at_each_poll! {
    reads_left_at_some_poll_hold_nothing: Read,
    reads_of_parts_left_at_some_poll_hold_nothing: ReadAt,
    copies_left_at_some_poll_hold_nothing: ReadInto,
    sets_left_at_some_poll_hold_nothing: ReadMany,
    writes_left_at_some_poll_hold_nothing: Write,
    partial_writes_left_at_some_poll_hold_nothing: WriteAt,
    writes_in_place_left_at_some_poll_hold_nothing: WriteWith,
    puts_left_at_some_poll_hold_nothing: Put,
    puts_on_disk_left_at_some_poll_hold_nothing: PutOnDisk,
    pins_left_at_some_poll_hold_nothing: Pin,
    promotions_left_at_some_poll_hold_nothing: Promote,
    named_puts_left_at_some_poll_hold_nothing: PutNamed,
}
