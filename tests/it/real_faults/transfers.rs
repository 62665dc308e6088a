//! Transfers that the kernel cuts short or interrupts (scenarios 3 and 28).
//!
//! Invariant: they are resumed, which only the driver sees: every byte is right.

use rand::Rng;
use rand::seq::SliceRandom;
use vmem::{IoDriver, VirtualMemory, VirtualMemoryError};
use vmem_testkit::{Errno, OpKind, Seed, When};

use super::fuse::{Opens, Trouble};
use super::machine::{
    Known, assert_same, check, errno, odd_lengths, on_fuse, over_dir, over_fuse, skipped, test,
};
use super::place::Ext4;
use crate::support::quiet;
use crate::support::{DISK, HOST, MIB, assert_empty, bytes};

/// Objects of odd lengths are demoted and promoted in every possible way.
async fn round_trips(vmem: &VirtualMemory, seed: Seed) {
    let mut rng = seed.fork("round trips").rng();
    let mut objects: Vec<Known> = Vec::new();
    for len in odd_lengths() {
        for home in [HOST, DISK] {
            let object = objects.len() as u64 + 1;
            objects.push((object, vmem.put(bytes(object, 1, len), home).await.unwrap()));
        }
    }
    for (_, handle) in &objects {
        vmem.demote(handle, DISK).await.unwrap();
        assert!(!vmem.residency(handle).unwrap().host);
    }
    check(vmem, &objects).await;
    objects.shuffle(&mut rng);
    for (object, handle) in &objects {
        let end = rng.random_range(1..=handle.len());
        let start = rng.random_range(0..end);
        let read = vmem.read_at(handle, start..end).await.unwrap();
        let want = &bytes(*object, 1, handle.len())[start..end];
        assert!(read == want, "object {object}: {start}..{end} of {}", handle.len());
    }
    for (object, handle) in &objects {
        assert_same(&vmem.read(handle).await.unwrap(), *object);
    }
    // In pieces, in place: the chunks around the edges are read, changed and written.
    for (object, handle) in &objects {
        vmem.demote(handle, DISK).await.unwrap();
        let at = rng.random_range(0..handle.len());
        let end = rng.random_range(at..=handle.len());
        let piece = &bytes(*object, 1, handle.len())[at..end];
        vmem.write_at(handle, at, piece).await.unwrap();
        vmem.demote(handle, DISK).await.unwrap();
    }
    check(vmem, &objects).await;
    drop(objects);
    assert_empty(&quiet(vmem).await, "round trips");
}

/// Excluded: a short read that counts as a whole one (stale bytes), a short write whose rest is
/// lost, or which is written at the wrong place. Noticed by the bytes, and by checksums.
#[test]
fn scenario_28_short_transfers_are_resumed() {
    test("scenario_28_short_transfers_are_resumed", |seed| {
        // With and without direct I/O of the caller's own, which goes on in whole sectors only.
        for (opens, unit) in [(Opens::Direct, 512), (Opens::Refused, 1)] {
            let driver = IoDriver::Blocking;
            on_fuse("short transfers", driver, opens, seed, 3 * MIB, async |vmem, faulty, seed| {
                for kind in [OpKind::Read, OpKind::Write] {
                    faulty.on(kind, When::Chance(0.5), Trouble::Short(unit));
                }
                round_trips(&vmem, seed).await;
                assert!(faulty.injected(OpKind::Read) > 20, "{}", faulty.summary());
                assert!(faulty.injected(OpKind::Write) > 20, "{}", faulty.summary());
                assert_eq!(vmem.stats().errors, 0, "no error was counted");
                vmem.close().await.unwrap();
            });
        }
        skipped(
            "short transfers over the rings",
            "io_uring continues them itself, see `over_fuse`",
        );
    });
}

/// The same where every answer is short, down to the last sector.
#[test]
fn scenario_28_short_to_the_last_sector() {
    test("scenario_28_short_to_the_last_sector", |seed| {
        let driver = IoDriver::Blocking;
        let opens = Opens::Direct;
        on_fuse("the last sector", driver, opens, seed, 2 * MIB, async |vmem, faulty, _| {
            let handle = vmem.put(bytes(1, 1, 240 * 512), HOST).await.unwrap();
            for kind in [OpKind::Read, OpKind::Write] {
                faulty.on(kind, When::ALWAYS, Trouble::Short(512));
            }
            vmem.demote(&handle, DISK).await.unwrap();
            let known = [(1, handle)];
            check(&vmem, &known).await;
            let short = |kind| faulty.injected(kind);
            assert!(short(OpKind::Write) > 0 && short(OpKind::Read) > 0, "{}", faulty.summary());
            // The last sector of a request cannot be short.
            assert!(faulty.seen(OpKind::Write) > short(OpKind::Write), "{}", faulty.summary());
            drop(known);
            vmem.close().await.unwrap();
        });
    });
}

/// The kernel itself puts the rest of a short transfer in the wrong place, and reports success (see
/// `over_fuse`). Excluded: wrong bytes; a reader gets the right ones, or `Corrupt`.
#[test]
fn scenario_3_what_the_kernel_misplaces_is_never_returned() {
    test("scenario_3_what_the_kernel_misplaces_is_never_returned", |seed| {
        for driver in [IoDriver::Reactor, IoDriver::TokioUring] {
            let opens = Opens::Direct;
            on_fuse("misplaced", driver, opens, seed, 3 * MIB, async |vmem, faulty, _| {
                for kind in [OpKind::Read, OpKind::Write] {
                    faulty.on(kind, When::Chance(0.3), Trouble::Short(512));
                }
                let mut right = 0;
                let mut corrupt = 0;
                for (object, handle) in put(&vmem, 24, 70_000).await {
                    vmem.demote(&handle, DISK).await.unwrap();
                    match vmem.read(&handle).await {
                        Ok(read) => {
                            assert_same(&read, object);
                            right += 1;
                        }
                        Err(VirtualMemoryError::Corrupt { .. }) => corrupt += 1,
                        Err(error) => panic!("{error:?}"),
                    }
                }
                println!("{right} right, {corrupt} corrupt");
                assert!(faulty.injected(OpKind::Write) > 4, "{}", faulty.summary());
                vmem.close().await.unwrap();
            });
        }
    });
}

/// A system call, or an entry of the ring, is interrupted before it did anything.
#[test]
fn scenario_28_interrupts_are_retried() {
    test("scenario_28_interrupts_are_retried", |seed| {
        for opens in [Opens::Direct, Opens::Cached] {
            over_fuse("interrupts", opens, seed, 3 * MIB, async |vmem, faulty, seed| {
                for kind in [OpKind::Read, OpKind::Write, OpKind::Sync] {
                    faulty.on(kind, When::Chance(0.4), Trouble::Fail(Errno::INTR));
                }
                round_trips(&vmem, seed).await;
                assert!(faulty.injected(OpKind::Write) > 20, "{}", faulty.summary());
                assert_eq!(vmem.stats().errors, 0, "no error was counted");
                vmem.close().await.unwrap();
            });
        }
    });
}

/// `EAGAIN` and `EBUSY` are retried or reported, with their errno; the I/O thread lives on.
#[test]
fn scenario_28_busy_is_retried_or_reported() {
    test("scenario_28_busy_is_retried_or_reported", |seed| {
        over_fuse("busy", Opens::Direct, seed, 2 * MIB, async |vmem, faulty, _| {
            for code in [Errno::AGAIN, Errno::BUSY] {
                let handles = put(&vmem, 16, 70_000).await;
                for kind in [OpKind::Read, OpKind::Write] {
                    faulty.on(kind, When::Chance(0.5), Trouble::Fail(code));
                }
                let mut reported = 0;
                for (object, handle) in &handles {
                    let mut read = vec![0; handle.len()];
                    let written = vmem.demote(handle, DISK).await;
                    let fetched = vmem.read_into(handle, 0..read.len(), &mut read).await;
                    for outcome in [&written, &fetched] {
                        if let Err(error) = outcome {
                            assert_eq!(errno(error), Some(code.raw_os_error()), "{error:?}");
                            reported += 1;
                        }
                    }
                    if fetched.is_ok() {
                        assert_same(&read, *object);
                    }
                }
                println!("{code}: {reported} reported, {}", faulty.summary());
                faulty.heal();
                for (_, handle) in &handles {
                    vmem.demote(handle, DISK).await.unwrap();
                }
                check(&vmem, &handles).await;
            }
            assert!(faulty.injected(OpKind::Write) > 4, "{}", faulty.summary());
            assert!(faulty.injected(OpKind::Read) > 4, "{}", faulty.summary());
            vmem.close().await.unwrap();
        });
    });
}

async fn put(vmem: &VirtualMemory, count: u64, len: usize) -> Vec<Known> {
    let mut objects = Vec::new();
    for object in 1..=count {
        objects.push((object, vmem.put(bytes(object, 1, len), HOST).await.unwrap()));
    }
    objects
}

/// Sectors of 4096 bytes: direct I/O must be in those, or is refused.
#[test]
fn direct_io_on_sectors_of_4096_bytes() {
    test("direct_io_on_sectors_of_4096_bytes", |seed| {
        let ext4 = match Ext4::mount(128 << 20, 4096) {
            Ok(ext4) => ext4,
            Err(why) => return skipped("sectors of 4096 bytes", why),
        };
        assert!(ext4.refuses_small_direct_io().unwrap(), "the sectors are large");
        over_dir(ext4.path(), 3 * MIB, async |vmem| {
            assert!(vmem.capabilities().disk_direct, "{}", vmem.capabilities());
            round_trips(&vmem, seed).await;
            vmem.close().await.unwrap();
        });
    });
}
