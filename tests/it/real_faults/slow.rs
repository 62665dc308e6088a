//! A disk that is slow, or does not answer for a while (scenarios 4, 20 and 24).
//!
//! Invariant: a call that does not need the disk does not wait for it; the buffers of a dropped
//! future stay with the kernel until it answers, and nothing is left over then.

use std::thread;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use vmem::{VirtualMemory, VirtualMemoryError};
use vmem_testkit::{OpKind, When};

use super::fuse::Trouble;
use super::machine::{
    LEN, assert_same, block_on, check, drivers, open, over_fuse_that_waits, put, skipped, test,
};
use super::place::{Ext4, SlowGroup};
use crate::support::{DISK, MIB, assert_empty};
use crate::support::{eventually, quiet};

/// While the disk stands still host hits go on; cold reads wait, and then get their bytes.
#[test]
fn scenario_20_host_hits_do_not_wait_for_the_disk() {
    test("scenario_20_host_hits_do_not_wait_for_the_disk", |seed| {
        over_fuse_that_waits("a disk that waits", seed, 4 * MIB, async |vmem, faulty, _| {
            let cold = put(&vmem, 1, 8, true).await;
            let warm = put(&vmem, 20, 8, false).await;
            for kind in [OpKind::Read, OpKind::Write, OpKind::Sync] {
                faulty.on(kind, When::ALWAYS, Trouble::Held);
            }
            let reads = cold.iter().map(|(object, handle)| {
                let vmem = vmem.clone();
                let object = *object;
                let handle = handle.clone();
                tokio::spawn(async move {
                    assert_same(&vmem.read(&handle).await.unwrap(), object);
                })
            });
            let reads: Vec<_> = reads.collect();
            eventually("reads are held", || faulty.held() > 0).await;
            for _ in 0..50 {
                for (object, handle) in &warm {
                    // No hit may wait at all, so each is polled just once.
                    let read = vmem.read(handle).now_or_never().expect("a host hit is ready");
                    assert_same(&read.unwrap(), *object);
                    tokio::task::yield_now().await;
                }
            }
            assert!(reads.iter().all(|read| !read.is_finished()), "the disk stands still");
            faulty.heal();
            for read in reads {
                read.await.unwrap();
            }
            drop((cold, warm));
            assert_empty(&quiet(&vmem).await, "a disk that stood still");
            vmem.close().await.unwrap();
        });
    });
}

/// Futures of every kind are dropped while the kernel has their buffers. The test excludes that a
/// buffer or an extent is reused before the answer (wrong bytes, in the file or in the reader), and
/// that one is never given back.
#[test]
fn scenario_4_futures_dropped_while_the_kernel_has_their_buffers() {
    test("scenario_4_futures_dropped_while_the_kernel_has_their_buffers", |seed| {
        over_fuse_that_waits("dropped futures", seed, 4 * MIB, async |vmem, faulty, _| {
            for round in 0..4 {
                let cold = put(&vmem, 1, 8, true).await;
                let warm = put(&vmem, 20, 8, false).await;
                faulty.on(OpKind::Read, When::ALWAYS, Trouble::Held);
                faulty.on(OpKind::Write, When::ALWAYS, Trouble::Held);
                let reader = vmem.clone();
                let writer = vmem.clone();
                let some_cold = cold[..4].to_vec();
                let some_warm = warm[..4].to_vec();
                let reads = tokio::spawn(async move {
                    join_all(some_cold.iter().map(|(_, handle)| reader.read(handle))).await;
                });
                let more = cold[4..6].to_vec();
                let into = tokio::spawn({
                    let vmem = vmem.clone();
                    async move {
                        join_all(more.iter().map(async |(_, handle)| {
                            let mut read = vec![0; LEN];
                            vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
                        }))
                        .await;
                    }
                });
                let writes = tokio::spawn(async move {
                    join_all(some_warm.iter().map(|(_, handle)| writer.demote(handle, DISK))).await;
                });
                eventually("requests are held", || faulty.held() > 0).await;
                for task in [reads, into, writes] {
                    task.abort();
                    assert!(task.await.unwrap_err().is_cancelled());
                }
                assert!(faulty.held() > 0, "the kernel still has them");
                if round % 2 == 0 {
                    // The objects go too, and their space is asked for by others at once.
                    drop((cold, warm));
                    let others = tokio::spawn({
                        let vmem = vmem.clone();
                        async move { put(&vmem, 100, 20, true).await }
                    });
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    faulty.heal();
                    let others = others.await.unwrap();
                    check(&vmem, &others).await;
                } else {
                    faulty.heal();
                    check(&vmem, &cold).await;
                    check(&vmem, &warm).await;
                    drop((cold, warm));
                }
                eventually("all is given back", || faulty.held() == 0).await;
                assert_empty(&quiet(&vmem).await, "dropped futures");
            }
            vmem.close().await.unwrap();
        });
    });
}

/// `close` with operations in the kernel: it waits for them, they end with `Ok` or `Closed`, and
/// the directory can be opened again.
#[test]
fn scenario_24_close_while_the_disk_stands_still() {
    test("scenario_24_close_while_the_disk_stands_still", |seed| {
        over_fuse_that_waits("close", seed, 4 * MIB, async |vmem, faulty, _| {
            let cold = put(&vmem, 1, 12, true).await;
            faulty.on(OpKind::Read, When::ALWAYS, Trouble::Held);
            let reads = cold.iter().map(|(object, handle)| {
                let vmem = vmem.clone();
                let object = *object;
                let handle = handle.clone();
                tokio::spawn(async move {
                    match vmem.read(&handle).await {
                        Ok(read) => {
                            assert_same(&read, object);
                            true
                        }
                        Err(VirtualMemoryError::Closed) => false,
                        Err(error) => panic!("{error:?}"),
                    }
                })
            });
            let reads: Vec<_> = reads.collect();
            eventually("reads are held", || faulty.held() > 0).await;
            let closing = tokio::spawn(vmem.close());
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(faulty.held() > 0 && !closing.is_finished(), "the kernel has its buffers");
            faulty.heal();
            closing.await.unwrap().unwrap();
            let mut served = 0;
            for read in reads {
                served += u32::from(read.await.unwrap());
            }
            println!("{served} of 12 were served");
            drop(cold);
            assert_eq!(faulty.data_len(), 0, "the data file is gone");
        });
    });
}

/// Every answer comes late: demand reads still end, none is lost in a queue, and written bytes read
/// back.
#[test]
fn scenario_20_a_slow_disk() {
    test("scenario_20_a_slow_disk", |seed| {
        over_fuse_that_waits("a slow disk", seed, 6 * LEN, async |vmem, faulty, _| {
            for kind in [OpKind::Read, OpKind::Write, OpKind::Sync] {
                faulty.on(kind, When::ALWAYS, Trouble::Late(Duration::from_millis(3)));
            }
            let writers = (0..4).map(|task| {
                let vmem = vmem.clone();
                tokio::spawn(async move {
                    let mut objects = put(&vmem, task * 100 + 1, 20, false).await;
                    for _ in 0..2 {
                        check(&vmem, &objects).await;
                        objects.rotate_left(7);
                    }
                    objects
                })
            });
            let mut objects = Vec::new();
            for writer in writers.collect::<Vec<_>>() {
                objects.extend(writer.await.unwrap());
            }
            assert!(faulty.injected(OpKind::Read) > 20, "{}", faulty.summary());
            assert!(faulty.injected(OpKind::Write) > 5, "{}", faulty.summary());
            drop(objects);
            assert_empty(&quiet(&vmem).await, "a slow disk");
            vmem.close().await.unwrap();
        });
    });
}

/// A block device of 4 MiB a second, asynchronous all the way: host hits go on, demand reads end,
/// dropped futures leave nothing, `close` ends.
#[test]
fn scenario_20_throttled() {
    test("scenario_20_throttled", |_| {
        for driver in drivers() {
            let slow = Ext4::mount(128 << 20, 512)
                .and_then(|ext4| Ok((SlowGroup::new(&ext4, 4 * MIB as u64)?, ext4)));
            let (group, ext4) = match slow {
                Ok(slow) => slow,
                Err(why) => return skipped("a throttled device", why),
            };
            let run = || {
                group.join().unwrap();
                block_on(async {
                    let vmem = open(&ext4.path().join("store"), driver, 4 * MIB).await?;
                    let direct = vmem.capabilities().disk_direct;
                    throttled(vmem).await;
                    Some(direct)
                })
            };
            let direct = thread::scope(|scope| scope.spawn(run).join().unwrap());
            let moved = group.moved_bytes();
            println!("{driver:?}: {moved} bytes were throttled");
            // Writes through the page cache are charged to the kernel, not to the group.
            assert!(direct != Some(true) || moved > 24 * LEN as u64, "{moved}");
        }
    });
}

async fn throttled(vmem: VirtualMemory) {
    let warm = put(&vmem, 100, 8, false).await;
    let cold = put(&vmem, 1, 24, true).await;
    let reads = cold.iter().map(|(object, handle)| {
        let vmem = vmem.clone();
        let object = *object;
        let handle = handle.clone();
        tokio::spawn(async move { assert_same(&vmem.read(&handle).await.unwrap(), object) })
    });
    let reads: Vec<_> = reads.collect();
    let mut hits = 0;
    let mut waited = 0;
    while !reads.iter().all(|read| read.is_finished()) {
        for (object, handle) in &warm {
            let read = vmem.read(handle).now_or_never().expect("a host hit is ready");
            assert_same(&read.unwrap(), *object);
            hits += 1;
        }
        waited += u32::from(vmem.stats().migrations_in_flight > 0);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for read in reads {
        read.await.unwrap();
    }
    println!("{hits} host hits beside the reads, {waited} times they were under way");
    // In each round half of the reads are dropped in flight.
    for round in 0..4 {
        for (_, handle) in &cold {
            vmem.demote(handle, DISK).await.unwrap();
        }
        let some = cold[..12].to_vec();
        let reader = vmem.clone();
        let dropped = tokio::spawn(async move {
            join_all(some.iter().map(|(_, handle)| reader.read(handle))).await;
        });
        tokio::time::sleep(Duration::from_millis(5 * round)).await;
        dropped.abort();
        drop(dropped.await);
    }
    check(&vmem, &cold).await;
    let again = cold[..6].iter().map(|(_, handle)| vmem.read(handle).now_or_never());
    drop(again.collect::<Vec<_>>());
    drop((warm, cold));
    assert_empty(&quiet(&vmem).await, "a throttled device");
    let last = put(&vmem, 1, 4, true).await;
    let reader = vmem.clone();
    let reading = tokio::spawn(async move {
        for (object, handle) in last {
            match reader.read(&handle).await {
                Ok(read) => assert_same(&read, object),
                Err(VirtualMemoryError::Closed) => return,
                Err(error) => panic!("{error:?}"),
            }
        }
    });
    vmem.close().await.unwrap();
    reading.await.unwrap();
}
