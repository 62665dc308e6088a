//! Errors that the kernel reports, and files that are not what they were (scenarios 3, 17 and 18).
//!
//! Invariant: the errno reaches the caller, the object stays readable where it has a copy, other
//! objects do not notice, and when the cause goes the store recovers without help.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::Rng;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::{Errno, OpKind, Seed, When};

use super::fuse::{Opens, Trouble};
use super::machine::{Known, LEN, assert_same, check, errno, over_fuse, put, test};
use crate::support::quiet;
use crate::support::{DISK, HOST, KIB, MIB, assert_empty, bytes, is_pressure};

fn in_host(vmem: &VirtualMemory, handle: &VMemHandle) -> bool {
    vmem.residency(handle).unwrap().host
}

async fn end<T>(vmem: VirtualMemory, objects: T) {
    drop(objects);
    assert_empty(&quiet(&vmem).await, "faults");
    vmem.close().await.unwrap();
}

/// Excluded: a victim that is lost while it is written back; an errno that does not reach the
/// caller; a write that failed half-way and counts.
#[test]
fn scenario_18_a_refused_write() {
    test("scenario_18_a_refused_write", |seed| {
        over_fuse("refused writes", Opens::Direct, seed, 4 * MIB, async |vmem, faulty, _| {
            let cold = put(&vmem, 1, 4, true).await;
            let warm = put(&vmem, 10, 4, false).await;
            let codes = [Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::ROFS];
            let troubles = codes
                .into_iter()
                .flat_map(|code| [(code, Trouble::Fail(code)), (code, Trouble::Torn(code))]);
            for (code, trouble) in troubles {
                let before = (faulty.injected(OpKind::Write), vmem.stats().errors);
                faulty.on(OpKind::Write, When::ALWAYS, trouble);
                for (_, handle) in &warm {
                    let error = vmem.demote(handle, DISK).await.unwrap_err();
                    match error {
                        VirtualMemoryError::TierFull { tier: DISK, .. }
                            if [Errno::NOSPC, Errno::DQUOT].contains(&code) => {}
                        error => {
                            assert_eq!(errno(&error), Some(code.raw_os_error()), "{error:?}");
                        }
                    }
                    assert!(in_host(&vmem, handle), "it stays where it was");
                }
                // One that brings its bytes and has no other place than the disk.
                let refused = vmem.put(bytes(99, 1, LEN), DISK).await;
                assert!(refused.is_err() || faulty.injected(OpKind::Write) > before.0);
                check(&vmem, &cold).await;
                check(&vmem, &warm).await;
                assert!(faulty.injected(OpKind::Write) >= before.0 + warm.len() as u64);
                assert!(vmem.stats().errors >= before.1 + warm.len() as u64, "and counted");
                faulty.heal();
            }
            for (_, handle) in &warm {
                vmem.demote(handle, DISK).await.unwrap();
                assert!(!in_host(&vmem, handle));
            }
            check(&vmem, &warm).await;
            end(vmem, (cold, warm)).await;
        });
    });
}

/// Excluded: `Ok` with what the buffer held before; an error that sticks to the object; an error
/// that others get.
#[test]
fn scenario_3_a_refused_read() {
    test("scenario_3_a_refused_read", |seed| {
        for opens in [Opens::Direct, Opens::Cached] {
            over_fuse("refused reads", opens, seed, 4 * MIB, async |vmem, faulty, _| {
                // Larger than any early read of the kernel's.
                let cold = put(&vmem, 1, 8, true).await;
                let warm = put(&vmem, 20, 4, false).await;
                faulty.on(OpKind::Read, When::ALWAYS, Trouble::Fail(Errno::IO));
                let mut refused = 0;
                for (object, handle) in &cold {
                    let mut read = vec![0xEE; LEN];
                    match vmem.read_into(handle, 0..LEN, &mut read).await {
                        Ok(()) => assert_same(&read, *object),
                        Err(error) => {
                            assert_eq!(errno(&error), Some(Errno::IO.raw_os_error()), "{error:?}");
                            refused += 1;
                        }
                    }
                    match vmem.read(handle).await {
                        Ok(read) => assert_same(&read, *object),
                        Err(error) => assert_eq!(errno(&error), Some(5), "{error:?}"),
                    }
                }
                check(&vmem, &warm).await;
                for (object, handle) in &warm {
                    assert_same(&vmem.read(handle).await.unwrap(), *object);
                }
                // Through the cache of the kernel a read may never reach the disk.
                assert_eq!(refused > 0, faulty.injected(OpKind::Read) > 0);
                if opens == Opens::Direct {
                    assert_eq!(refused, cold.len(), "{}", faulty.summary());
                }
                faulty.heal();
                check(&vmem, &cold).await;
                for (object, handle) in &cold {
                    assert_same(&vmem.read(handle).await.unwrap(), *object);
                }
                end(vmem, (cold, warm)).await;
            });
        }
    });
}

/// Excluded: a failed sync that counts as done, or is tried again as if the pages were still dirty.
/// The bytes are written back once more, from the host copy.
#[test]
fn scenario_18_a_failed_sync() {
    test("scenario_18_a_failed_sync", |seed| {
        for opens in [Opens::Refused, Opens::Direct] {
            over_fuse("failed syncs", opens, seed, 4 * MIB, async |vmem, faulty, _| {
                let warm = put(&vmem, 1, 6, false).await;
                for (_, handle) in &warm {
                    let syncs = faulty.seen(OpKind::Sync);
                    let writes = faulty.seen(OpKind::Write);
                    faulty.heal();
                    faulty.on(OpKind::Sync, When::Nth(1), Trouble::Fail(Errno::IO));
                    let first = vmem.demote(handle, DISK).await;
                    if faulty.seen(OpKind::Sync) == syncs {
                        println!("this driver goes round the cache and needs no sync");
                        first.unwrap();
                        continue;
                    }
                    let error = first.unwrap_err();
                    assert_eq!(errno(&error), Some(Errno::IO.raw_os_error()), "{error:?}");
                    assert!(in_host(&vmem, handle), "its copy stays until a sync covers it");
                    let again = faulty.seen(OpKind::Write);
                    assert!(again > writes);
                    vmem.demote(handle, DISK).await.unwrap();
                    assert!(faulty.seen(OpKind::Write) > again, "written again, not only synced");
                    assert!(!in_host(&vmem, handle));
                }
                // Where direct I/O is refused everything passes a cache, and needs syncs.
                assert!(opens != Opens::Refused || faulty.injected(OpKind::Sync) == 6);
                check(&vmem, &warm).await;
                end(vmem, warm).await;
            });
        }
    });
}

/// A disk that is full long before its budget is: writers get errors, what was accepted is readable
/// all the time, and once there is space the store goes on without being asked.
#[test]
fn scenario_18_a_full_disk() {
    test("scenario_18_a_full_disk", |seed| {
        over_fuse("a full disk", Opens::Direct, seed, 12 * LEN, async |vmem, faulty, _| {
            faulty.on(OpKind::Write, When::From(20), Trouble::Fail(Errno::NOSPC));
            let mut objects: Vec<Known> = Vec::new();
            let refused = loop {
                let object = objects.len() as u64 + 1;
                match vmem.put(bytes(object, 1, LEN), HOST).await {
                    Ok(handle) => objects.push((object, handle)),
                    Err(error) => break error,
                }
                assert!(object < 1000, "{}", faulty.summary());
            };
            let full = matches!(refused, VirtualMemoryError::TierFull { .. });
            assert!(full && refused.is_retryable(), "{refused:?}");
            check(&vmem, &objects).await;
            assert!(faulty.injected(OpKind::Write) > 0);
            faulty.heal();
            let wanted = objects.len() + 30;
            for attempt in 0.. {
                let object = objects.len() as u64 + 1;
                match vmem.put(bytes(object, 1, LEN), HOST).await {
                    Ok(handle) => objects.push((object, handle)),
                    Err(error) => {
                        assert!(is_pressure(&error) && attempt < 500, "{error:?}");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                if objects.len() == wanted {
                    break;
                }
            }
            check(&vmem, &objects).await;
            end(vmem, objects).await;
        });
    });
}

/// The data file is truncated. What lay behind the cut is `Corrupt`, at once and for good, without
/// a loop of retries; what lies before the cut is fine, and so is what is in host memory; the rest
/// of the disk still serves.
#[test]
fn scenario_17_a_truncated_file() {
    test("scenario_17_a_truncated_file", |seed| {
        for opens in [Opens::Direct, Opens::Cached] {
            over_fuse("a truncated file", opens, seed, 4 * MIB, async |vmem, faulty, _| {
                let cold = put(&vmem, 1, 20, true).await;
                let warm = put(&vmem, 50, 4, false).await;
                let len = faulty.data_len();
                assert!(len >= 20 * LEN);
                assert_eq!(faulty.truncate(len / 2), len);
                let mut lost = Vec::new();
                let mut whole = 0;
                for (object, handle) in &cold {
                    let mut read = vec![0xEE; LEN];
                    match vmem.read_into(handle, 0..LEN, &mut read).await {
                        Ok(()) => {
                            assert_same(&read, *object);
                            whole += 1;
                        }
                        Err(VirtualMemoryError::Corrupt { handle: id, .. }) => {
                            assert_eq!(id, handle.id());
                            lost.push(handle.clone());
                        }
                        Err(error) => panic!("{error:?}"),
                    }
                }
                println!("{whole} whole, {} lost", lost.len());
                // The kernel's cache may still have what the file lost; direct I/O cannot.
                assert!(whole > 0);
                assert!(opens == Opens::Cached || lost.len() > 5);
                let reads = faulty.seen(OpKind::Read);
                for handle in &lost {
                    let again = vmem.read(handle).await.unwrap_err();
                    assert!(matches!(again, VirtualMemoryError::Corrupt { .. }), "{again:?}");
                }
                let asked = faulty.seen(OpKind::Read) - reads;
                assert!(asked <= lost.len() as u64, "damage is remembered, or asked for once");
                check(&vmem, &warm).await;
                // The same bytes again, over all that was lost, and more than the file was long.
                drop(lost);
                let again = put(&vmem, 100, 30, true).await;
                check(&vmem, &again).await;
                end(vmem, (cold, warm, again)).await;
            });
        }
    });
}

/// Everything at once, from several tasks: each read has the right bytes or there is an error that
/// the faults explain; afterwards everything that was accepted can be read, and nothing is left
/// over.
#[test]
fn scenario_18_a_storm() {
    test("scenario_18_a_storm", |seed| {
        over_fuse("a storm", Opens::Direct, seed, MIB, async |vmem, faulty, seed| {
            for kind in [OpKind::Read, OpKind::Write] {
                faulty.on(kind, When::Chance(0.05), Trouble::Fail(Errno::IO));
                if faulty.may_be_short() {
                    faulty.on(kind, When::Chance(0.1), Trouble::Short(512));
                }
                faulty.on(kind, When::Chance(0.1), Trouble::Late(Duration::from_millis(2)));
                faulty.on(kind, When::Chance(0.1), Trouble::Fail(Errno::INTR));
            }
            faulty.on(OpKind::Write, When::Chance(0.05), Trouble::Torn(Errno::NOSPC));
            faulty.on(OpKind::Sync, When::Chance(0.05), Trouble::Fail(Errno::IO));
            let refused = Arc::new(AtomicU64::new(0));
            let tasks = (0..6).map(|task| {
                let vmem = vmem.clone();
                let refused = refused.clone();
                tokio::spawn(one_task(vmem, seed.fork_nth("task", task), task, refused))
            });
            let mut objects = Vec::new();
            for task in tasks.collect::<Vec<_>>() {
                objects.extend(task.await.unwrap());
            }
            println!("{} objects, {refused:?} refused", objects.len());
            assert!(refused.load(Ordering::Relaxed) > 0, "{}", faulty.summary());
            for kind in [OpKind::Read, OpKind::Write] {
                assert!(faulty.injected(kind) > 20, "{}", faulty.summary());
            }
            faulty.heal();
            check(&vmem, &objects).await;
            for (_, handle) in &objects {
                vmem.demote(handle, DISK).await.unwrap();
            }
            check(&vmem, &objects).await;
            end(vmem, objects).await;
        });
    });
}

/// What the faults of the storm explain.
fn expected(error: &VirtualMemoryError) -> bool {
    let io = [Errno::IO, Errno::NOSPC].map(|code| Some(code.raw_os_error()));
    let swallowed = matches!(error, VirtualMemoryError::Io { operation: "sync", .. });
    is_pressure(error) || swallowed || io.contains(&errno(error))
}

async fn one_task(
    vmem: VirtualMemory,
    seed: Seed,
    task: u64,
    refused: Arc<AtomicU64>,
) -> Vec<Known> {
    let mut rng = seed.rng();
    let mut objects: Vec<Known> = Vec::new();
    let told = |error: VirtualMemoryError| {
        assert!(expected(&error), "{error:?}");
        refused.fetch_add(1, Ordering::Relaxed);
    };
    for step in 0..150 {
        let pick = rng.random_range(0..objects.len().max(1));
        match (rng.random_range(0..10), objects.get(pick)) {
            (0..4, _) | (_, None) => {
                let object = task * 1000 + step + 1;
                let home = if rng.random_bool(0.5) { HOST } else { DISK };
                let len = rng.random_range(1..150 * KIB);
                match vmem.put(bytes(object, 1, len), home).await {
                    Ok(handle) => objects.push((object, handle)),
                    Err(error) => told(error),
                }
            }
            (4..6, Some((object, handle))) => match vmem.read(handle).await {
                Ok(read) => assert_same(&read, *object),
                Err(error) => told(error),
            },
            (6..8, Some((object, handle))) => {
                let mut read = vec![0xEE; handle.len()];
                match vmem.read_into(handle, 0..read.len(), &mut read).await {
                    Ok(()) => assert_same(&read, *object),
                    Err(error) => told(error),
                }
            }
            (8, Some((_, handle))) => {
                if let Err(error) = vmem.demote(handle, DISK).await {
                    told(error);
                }
            }
            _ => {
                objects.swap_remove(pick);
            }
        }
    }
    objects
}
