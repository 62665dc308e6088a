//! Scenario 41: a bulk call costs no more than the same work by hand.
//!
//! Excluded: a bulk call that does one thing after the other where the disk would take many at
//! once. Noticed by the ratio between the two, taken in turn on the same objects, over a simulated
//! disk whose latency is nearly all of the cost. The best of some rounds counts on either side.

use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt, TryStreamExt};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{THREADS, Threads, assert_none, eventually, run, within};
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, Store, bytes, check, open};

const SIZES: Sizes = Sizes { space: 64 * MIB, disk: 128 * MIB };
const LEN: usize = 4 * KIB;
const COUNT: usize = 800;
const ROUNDS: usize = 2;
/// The most that a bulk call may take, as a multiple of the best time by hand.
const RATIO: f64 = 3.0;
const HANG: Duration = Duration::from_secs(60);

type Ended = Result<(), VirtualMemoryError>;

/// A disk so slow that the load of this machine does not matter.
async fn slow_store() -> Store {
    let store = open(Place::Simulated, SIZES, |builder| builder).await;
    store.slow(Duration::from_millis(2), 64);
    store
}

async fn objects(vmem: &VirtualMemory, home: MemoryTier) -> Vec<VMemHandle> {
    let puts = (0..COUNT).map(|n| vmem.put(bytes(n, 1, LEN), home));
    stream::iter(puts).buffered(64).try_collect().await.unwrap()
}

/// One call for each object, 128 at once.
async fn by_hand<'a, F: Future<Output = Ended>>(
    objects: &'a [VMemHandle],
    call: impl Fn(&'a VMemHandle) -> F,
) -> Ended {
    let calls = stream::iter(objects).map(call).buffer_unordered(128);
    calls.try_collect::<Vec<()>>().await.map(drop)
}

async fn timed(what: &str, call: impl Future<Output = Ended>) -> Result<Duration, String> {
    let began = Instant::now();
    within(what, HANG, call).await?.map_err(|error| format!("{what}: {error}"))?;
    Ok(began.elapsed())
}

/// The ratio of the best times.
fn compare(what: &str, bulk: &[Duration], hand: &[Duration]) -> Result<(), String> {
    let best = |times: &[Duration]| times.iter().min().unwrap().as_secs_f64();
    let ratio = best(bulk) / best(hand);
    println!("{what}: {ratio:.2} times what it takes by hand; {bulk:?}, {hand:?}");
    match ratio <= RATIO {
        true => Ok(()),
        false => Err(format!("{what}: {ratio:.1} times what it takes by hand")),
    }
}

fn each(test: impl AsyncFn() -> Result<(), String> + Copy + Send + 'static) {
    let mut complaints = Vec::new();
    for threads in THREADS {
        let found = run(threads, move || async move { test().await });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}

/// Changes each object in host memory, so that it is dirty.
async fn change(vmem: &VirtualMemory, objects: &[VMemHandle], round: usize) {
    let part = vec![round as u8 + 1; 64];
    for handle in objects {
        vmem.write_at(handle, 0, &part).await.unwrap();
    }
}

#[test]
fn flush_all_is_as_fast_as_flushes_by_hand() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let objects = objects(vmem, DISK).await;
        let up = by_hand(&objects, async |handle| vmem.promote(handle, HOST).await);
        timed("promote by hand", up).await?;
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for round in 0..ROUNDS {
            change(vmem, &objects, 2 * round).await;
            bulk.push(timed("flush_all", vmem.flush_all()).await?);
            change(vmem, &objects, 2 * round + 1).await;
            let flushes = by_hand(&objects, async |handle| vmem.flush(handle).await);
            hand.push(timed("flush by hand", flushes).await?);
        }
        if vmem.stats().dirty_bytes != 0 {
            return Err("something was not flushed".into());
        }
        compare("flush_all", &bulk, &hand)
    });
}

#[test]
fn flush_all_of_names_is_as_fast_as_flushes_by_hand() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let mut objects = Vec::new();
        for n in 0..COUNT / 2 {
            objects.push(vmem.allocate_named(&format!("n{n}"), LEN, HOST).await.unwrap());
        }
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for round in 0..ROUNDS {
            change(vmem, &objects, 2 * round).await;
            bulk.push(timed("flush_all", vmem.flush_all()).await?);
            change(vmem, &objects, 2 * round + 1).await;
            let flushes = by_hand(&objects, async |handle| vmem.flush(handle).await);
            hand.push(timed("flush by hand", flushes).await?);
        }
        compare("flush_all of names", &bulk, &hand)
    });
}

/// `close` writes back the names that were changed, as fast as a caller flushes them.
#[test]
fn close_with_changed_names_is_as_fast_as_flushes_before_it() {
    each(async || {
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for round in 0..2 * ROUNDS {
            let store = slow_store().await;
            let vmem = &store.vmem;
            let mut objects = Vec::new();
            for n in 0..COUNT / 2 {
                objects.push(vmem.allocate_named(&format!("n{n}"), LEN, HOST).await.unwrap());
            }
            change(vmem, &objects, round).await;
            let took = timed("close", async {
                if round % 2 == 0 {
                    by_hand(&objects, async |handle| vmem.flush(handle).await).await?;
                }
                vmem.clone().close().await
            });
            if round % 2 == 0 { &mut hand } else { &mut bulk }.push(took.await?);
        }
        compare("close", &bulk, &hand)
    });
}

#[test]
fn prefetch_of_many_is_as_fast_as_promotions_by_hand() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let objects = objects(vmem, DISK).await;
        let down = async || by_hand(&objects, async |handle| vmem.demote(handle, DISK).await).await;
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for _ in 0..ROUNDS {
            timed("demote by hand", down()).await?;
            bulk.push(timed("prefetch_many", vmem.prefetch_many(&objects, HOST)).await?);
            timed("demote by hand", down()).await?;
            let up = by_hand(&objects, async |handle| vmem.promote(handle, HOST).await);
            hand.push(timed("promote by hand", up).await?);
        }
        compare("prefetch_many", &bulk, &hand)
    });
}

#[test]
fn read_of_many_is_as_fast_as_reads_by_hand() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let objects = objects(vmem, DISK).await;
        let down = async || by_hand(&objects, async |handle| vmem.demote(handle, DISK).await).await;
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for _ in 0..ROUNDS {
            timed("demote by hand", down()).await?;
            let sets = timed("read_many", async {
                for set in objects.chunks(128) {
                    let read = vmem.read_many(set).await?;
                    assert_eq!(read.len(), set.len());
                }
                Ok(())
            });
            bulk.push(sets.await?);
            timed("demote by hand", down()).await?;
            let reads = by_hand(&objects, async |handle| vmem.read(handle).await.map(drop));
            hand.push(timed("read by hand", reads).await?);
        }
        compare("read_many", &bulk, &hand)
    });
}

/// A listing against the best that can be done without one: each name opened.
#[test]
fn listing_is_as_fast_as_names_opened_by_hand() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let puts = (0..COUNT).map(|n| async move {
            vmem.put_named(&format!("n{n:05}"), bytes(n, 1, 100), DISK).await.map(drop)
        });
        stream::iter(puts).buffer_unordered(64).try_collect::<Vec<_>>().await.unwrap();
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for _ in 0..ROUNDS {
            let listing = timed("names", async {
                let entries: Vec<_> = vmem.names("n").try_collect().await?;
                assert_eq!(entries.len(), COUNT);
                Ok(())
            });
            bulk.push(listing.await?);
            let opened = timed("open_named", async {
                let names = (0..COUNT)
                    .map(|n| async move { vmem.open_named(&format!("n{n:05}")).await.map(drop) });
                stream::iter(names).buffer_unordered(64).try_collect::<Vec<_>>().await.map(drop)
            });
            hand.push(opened.await?);
        }
        compare("names", &bulk, &hand)
    });
}

/// Objects that are freed, one after the other, against one operation of the disk for each.
#[test]
fn frees_are_as_fast_as_one_disk_operation_each() {
    each(async || {
        let store = slow_store().await;
        let vmem = &store.vmem;
        let before = vmem.stats().disk.used_bytes;
        let mut freed = Vec::new();
        let mut hand = Vec::new();
        for _ in 0..ROUNDS {
            let handles = objects(vmem, DISK).await;
            let copies = by_hand(&handles, async |handle| {
                vmem.read_into(handle, 0..LEN, &mut [0; LEN]).await
            });
            hand.push(timed("read_into by hand", copies).await?);
            let free = timed("free", async {
                for handle in handles {
                    vmem.free(handle).await?;
                }
                Ok(())
            });
            freed.push(free.await?);
        }
        compare("free", &freed, &hand)?;
        let came_back = || vmem.stats().disk.used_bytes == before;
        eventually("the space of freed objects comes back", came_back).await
    });
}

/// The same over real files, where commits and syncs are what costs.
#[test]
fn bulk_calls_are_as_fast_as_by_hand_over_a_real_disk() {
    let found = run(Threads::Two, || async {
        let store = open(Place::Real, SIZES, |builder| builder).await;
        let vmem = &store.vmem;
        let objects = objects(vmem, DISK).await;
        by_hand(&objects, async |handle| vmem.promote(handle, HOST).await).await.unwrap();
        let mut bulk = Vec::new();
        let mut hand = Vec::new();
        for round in 0..ROUNDS {
            change(vmem, &objects, 2 * round).await;
            bulk.push(timed("flush_all", vmem.flush_all()).await?);
            change(vmem, &objects, 2 * round + 1).await;
            let flushes = by_hand(&objects, async |handle| vmem.flush(handle).await);
            hand.push(timed("flush by hand", flushes).await?);
        }
        let mut buf = vec![0; LEN - 64];
        vmem.read_into(&objects[7], 64..LEN, &mut buf).await.unwrap();
        check(7, &[1], 64, &buf)?;
        compare("flush_all", &bulk, &hand)
    });
    assert_none(&Vec::from_iter(found.err()));
}
