//! An ext4 that is shut down under load, by the ioctl that its developers test power cuts with.
//!
//! Invariant: every call ends with the right bytes or a typed error, host-resident objects stay
//! readable, `close` ends, and after a new mount the directory serves again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::Rng;
use vmem::{VirtualMemory, VirtualMemoryError};
use vmem_testkit::Seed;

use super::machine::{Known, assert_same, block_on, check, drivers, errno, open, skipped, test};
use super::place::{Ext4, Shutdown};
use crate::support::eventually;
use crate::support::{DISK, HOST, KIB, MIB, bytes, is_pressure};

const TASKS: u64 = 4;

/// What the load has seen.
#[derive(Debug, Default)]
struct Seen {
    dead: AtomicBool,
    done: AtomicU64,
    /// Errors of the operating system, after the shutdown.
    errors: AtomicU64,
}

#[test]
fn a_file_system_that_dies_under_load() {
    test("a_file_system_that_dies_under_load", |seed| {
        for how in [Shutdown::Default, Shutdown::LogFlush, Shutdown::NoLogFlush] {
            for driver in drivers() {
                let ext4 = match Ext4::mount(96 << 20, 512) {
                    Ok(ext4) => ext4,
                    Err(why) => return skipped("an ext4 that dies", why),
                };
                let dir = ext4.path().join("store");
                block_on(async {
                    let Some(vmem) = open(&dir, driver, 2 * MIB).await else { return };
                    println!("{how:?} under {driver:?}");
                    under_load(vmem, &ext4, how, seed).await;
                    ext4.remount().unwrap();
                    let vmem = open(&dir, driver, 2 * MIB).await.expect("it served before");
                    let object = (1, vmem.put(bytes(1, 1, 300_001), DISK).await.unwrap());
                    check(&vmem, &[object]).await;
                    vmem.close().await.unwrap();
                });
            }
        }
    });
}

async fn under_load(vmem: VirtualMemory, ext4: &Ext4, how: Shutdown, seed: Seed) {
    let seen = Arc::new(Seen::default());
    let tasks = (0..TASKS).map(|task| {
        tokio::spawn(load(vmem.clone(), seed.fork_nth("task", task), task, seen.clone()))
    });
    let tasks: Vec<_> = tasks.collect();
    eventually("there is load", || seen.done.load(Ordering::Relaxed) > 60).await;
    ext4.shut_down(how).unwrap();
    seen.dead.store(true, Ordering::SeqCst);
    let mut objects: Vec<Known> = Vec::new();
    for task in tasks {
        objects.extend(task.await.unwrap());
    }
    println!("{seen:?}");
    assert!(seen.errors.load(Ordering::Relaxed) > 0, "the file system is dead");
    let mut resident = 0;
    for (object, handle) in &objects {
        if vmem.residency(handle).unwrap().host {
            assert_same(&vmem.read(handle).await.unwrap(), *object);
            resident += 1;
        }
    }
    assert!(resident > 0, "some have a host copy");
    drop(objects);
    // It may say that the dead file system refused its end; it must end.
    match vmem.close().await {
        Ok(()) => {}
        Err(error) => assert!(errno(&error).is_some(), "{error:?}"),
    }
}

/// Random operations until some time after the file system is dead.
async fn load(vmem: VirtualMemory, seed: Seed, task: u64, seen: Arc<Seen>) -> Vec<Known> {
    let mut rng = seed.rng();
    let mut objects: Vec<Known> = Vec::new();
    let mut after = 0;
    let told = |error: VirtualMemoryError, dead: bool| {
        // The call may have begun before the flag was set, not before the file system died.
        if errno(&error).is_some() {
            seen.errors.fetch_add(1, Ordering::Relaxed);
        } else {
            assert!(is_pressure(&error) || sync_failed(&error), "{error:?} (dead: {dead})");
        }
    };
    for step in 0.. {
        let dead = seen.dead.load(Ordering::SeqCst);
        after += u64::from(dead);
        if after > 80 {
            break;
        }
        let pick = rng.random_range(0..objects.len().max(1));
        match (rng.random_range(0..10), objects.get(pick)) {
            (0..4, _) | (_, None) if objects.len() < 60 => {
                let object = task * 1_000_000 + step + 1;
                let home = if rng.random_bool(0.5) { HOST } else { DISK };
                let len = rng.random_range(1..100 * KIB);
                match vmem.put(bytes(object, 1, len), home).await {
                    Ok(handle) => objects.push((object, handle)),
                    Err(error) => told(error, dead),
                }
            }
            (4..6, Some((object, handle))) => match vmem.read(handle).await {
                Ok(read) => assert_same(&read, *object),
                Err(error) => told(error, dead),
            },
            (6..8, Some((object, handle))) => {
                let mut read = vec![0xEE; handle.len()];
                match vmem.read_into(handle, 0..read.len(), &mut read).await {
                    Ok(()) => assert_same(&read, *object),
                    Err(error) => told(error, dead),
                }
            }
            (8, Some((_, handle))) => {
                if let Err(error) = vmem.demote(handle, DISK).await {
                    told(error, dead);
                }
            }
            (_, Some(_)) => {
                objects.swap_remove(pick);
            }
            (_, None) => {}
        }
        seen.done.fetch_add(1, Ordering::Relaxed);
    }
    objects
}

/// A write whose sync failed beside it has no errno of its own.
fn sync_failed(error: &VirtualMemoryError) -> bool {
    matches!(error, VirtualMemoryError::Io { operation: "sync", .. })
}
