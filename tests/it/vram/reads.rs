//! An object that comes to a device from disk, through staging, in several parts at once.
//!
//! Excluded: parts that are read one after the other; bytes of one part in the place of another;
//! more of staging than is the object's share, or a part that waits for staging while it holds
//! some; an error that waits for the other parts, or leaves space behind. Noticed by the operations
//! that the disk has begun, and by bytes.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, Op, STAGING, bytes, settle};

const VRAM: MemoryTier = MemoryTier::Vram;
/// The last part is a short one.
const LEN: usize = MIB + 1000;
/// Nothing that is expected takes longer.
const HANGS: Duration = Duration::from_secs(30);

/// A store with two devices and this much staging.
fn open(staging: usize) -> (VirtualMemory, Arc<MemDriver>, [SimDevice; 2]) {
    let devices = [SimDevice::new(4 * MIB as u64), SimDevice::new(4 * MIB as u64)];
    let backends = devices.iter().map(|device| Arc::new(device.clone()) as Arc<_>);
    let set = |builder: vmem::VirtualMemoryConfigBuilder| {
        builder.staging_capacity(staging as u64).wait_timeout(HANGS)
    };
    let (vmem, driver) = support::open_below(backends, 8 * MIB, 64 * MIB, set);
    (vmem, driver, devices)
}

async fn on_disk(vmem: &VirtualMemory, object: u64, len: usize) -> VMemHandle {
    vmem.put(bytes(object, 1, len), DISK).await.unwrap()
}

/// The copy on the device is what is read: the disk fails.
async fn assert_on_device(vmem: &VirtualMemory, driver: &MemDriver, handle: &VMemHandle, n: u64) {
    driver.fail(|_, _| Some(io::Error::other("it is not to be read")));
    assert!(vmem.read(handle).await.unwrap() == bytes(n, 1, handle.len()), "object {n}");
    driver.heal();
}

#[tokio::test]
async fn large_object_has_several_reads_in_flight() {
    // Pieces of 64 KiB: eight, four, two.
    for (staging, background, demand) in [(512 * KIB, 2, 4), (256 * KIB, 1, 2), (STAGING, 1, 1)] {
        let (vmem, driver, _devices) = open(staging);
        // After a demand the link gives a prefetch one turn at a time.
        for (object, expected) in [(1, background), (2, demand)] {
            let handle = on_disk(&vmem, object, LEN).await;
            driver.stand_still();
            let mut promoted = match object {
                1 => vmem.prefetch(&handle, VRAM).boxed(),
                _ => vmem.promote(&handle, VRAM).boxed(),
            };
            assert!((&mut promoted).now_or_never().is_none());
            let what = format!("{expected} reads with {staging} bytes of staging");
            support::eventually(&what, || driver.in_flight() == expected).await;
            tokio::time::sleep(Duration::from_millis(30)).await;
            assert_eq!(driver.in_flight(), expected, "{what}");
            driver.go_on();
            promoted.await.unwrap();
            assert_on_device(&vmem, &driver, &handle, object).await;
        }
        vmem.close().await.unwrap();
    }
}

#[tokio::test]
async fn parts_that_end_in_any_order_come_to_their_places() {
    let (vmem, driver, devices) = open(512 * KIB);
    let seed = support::seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut slow = SmallRng::seed_from_u64(seed + 1);
    driver.delay(move |_| Duration::from_micros(slow.random_range(0..3000)));
    devices[0].misbehave(SmallRng::seed_from_u64(seed + 2), Duration::from_millis(1), 0.0);
    for object in 1..20 {
        let handle = on_disk(&vmem, object, random.random_range(1..LEN)).await;
        vmem.promote(&handle, VRAM).await.unwrap();
        assert_on_device(&vmem, &driver, &handle, object).await;
    }
    vmem.close().await.unwrap();
}

/// Of two pieces a copy to the other device has one, and stands still.
#[tokio::test]
async fn one_piece_of_staging_is_enough() {
    let (vmem, driver, devices) = open(STAGING);
    let small = on_disk(&vmem, 1, KIB).await;
    let large = on_disk(&vmem, 2, LEN).await;
    devices[0].hold();
    let mut held = Box::pin(vmem.promote(&small, VRAM));
    assert!((&mut held).now_or_never().is_none());
    support::eventually("its upload", || devices[0].in_flight() > 0).await;
    let promoted = vmem.promote(&large, MemoryTier::of_device(1));
    tokio::time::timeout(HANGS / 2, promoted).await.expect("it comes").unwrap();
    devices[0].release_all();
    held.await.unwrap();
    assert_on_device(&vmem, &driver, &large, 2).await;
    vmem.close().await.unwrap();
}

/// Copies to the device stand still with what staging they have; the disk and the host do not.
#[tokio::test]
async fn reads_from_disk_end_while_copies_to_the_device_stand_still() {
    // Four pieces.
    let (vmem, _driver, devices) = open(2 * STAGING);
    let mut promoted = Vec::new();
    for n in 0..8 {
        promoted.push(on_disk(&vmem, n, 60 * KIB).await);
    }
    let read = on_disk(&vmem, 100, 60 * KIB).await;
    let kept = on_disk(&vmem, 101, 60 * KIB).await;
    devices[0].hold();
    let mut held = Vec::new();
    for handle in &promoted {
        let vmem = vmem.clone();
        let handle = handle.clone();
        held.push(tokio::spawn(async move { vmem.promote(&handle, VRAM).await }));
    }
    support::eventually("an upload", || devices[0].in_flight() > 0).await;
    // What can begin has begun.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let mut left_alone = Box::pin(vmem.read(&kept));
    assert!((&mut left_alone).now_or_never().is_none());
    let mut buf = vec![0; read.len()];
    for _ in 0..3 {
        let outcome = vmem.read_into(&read, 0..read.len(), &mut buf);
        tokio::time::timeout(HANGS / 2, outcome).await.expect("it needs no device").unwrap();
        assert!(buf == bytes(100, 1, read.len()));
    }
    assert!(!held.iter().any(|held| held.is_finished()), "the device stood still");
    devices[0].release_all();
    for held in held {
        held.await.unwrap().unwrap();
    }
    assert!(left_alone.await.unwrap() == bytes(101, 1, kept.len()));
    drop((promoted, read, kept));
    vmem.close().await.unwrap();
}

/// One part fails while the others are still on their way.
#[tokio::test]
async fn failure_of_one_part_ends_all() {
    let (vmem, driver, devices) = open(512 * KIB);
    let handle = on_disk(&vmem, 1, LEN).await;
    let slow = Duration::from_secs(1);
    for which in ["read", "upload"] {
        let mut reads = 0;
        driver.delay(move |_| {
            reads += 1;
            if reads == 1 { Duration::ZERO } else { slow }
        });
        match which {
            "read" => {
                let failing = |op, _: &std::ops::Range<u64>| {
                    (op == Op::Read).then(|| io::Error::other("as told"))
                };
                driver.fail(failing);
            }
            _ => devices[0].fail_next(1),
        }
        let begun = Instant::now();
        let error = vmem.promote(&handle, VRAM).await.unwrap_err();
        match which {
            "read" => assert!(matches!(error, VirtualMemoryError::Io { .. }), "{error:?}"),
            _ => assert!(matches!(error, VirtualMemoryError::Device { .. }), "{error:?}"),
        }
        assert!(begun.elapsed() < slow, "it waits for the others: {:?}", begun.elapsed());
        assert_eq!(vmem.tier_stats(VRAM).used_bytes, 0, "{which}");
        assert!(driver.in_flight() > 0, "the others are on their way");
        // No write to the object waits for them, and none of theirs is seen.
        driver.heal();
        driver.delay(|_| Duration::ZERO);
        vmem.promote(&handle, VRAM).await.unwrap();
        assert_on_device(&vmem, &driver, &handle, 1).await;
        vmem.demote(&handle, HOST).await.unwrap();
        vmem.demote(&handle, DISK).await.unwrap();
        settle(&vmem, &driver).await;
        driver.assert_untouched();
    }
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn damage_is_that_of_its_chunk() {
    let (vmem, driver, _devices) = open(512 * KIB);
    let handle = on_disk(&vmem, 1, LEN).await;
    let image = bytes(1, 1, LEN);
    for chunk in [9, 6] {
        let at = driver.find(&image[chunk * 64 * KIB..(chunk + 1) * 64 * KIB]).unwrap();
        driver.flip(at);
    }
    let error = vmem.promote(&handle, VRAM).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Corrupt { chunk: 6 | 9, .. }), "{error:?}");
    assert_eq!(vmem.tier_stats(VRAM).used_bytes, 0);
    drop(handle);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn prefetch_that_is_dropped_gives_everything_back() {
    let (vmem, driver, _devices) = open(512 * KIB);
    let handle = on_disk(&vmem, 1, LEN).await;
    for _ in 0..8 {
        driver.stand_still();
        let prefetch = vmem.prefetch(&handle, VRAM);
        support::eventually("its reads", || driver.in_flight() == 2).await;
        drop(prefetch);
        support::eventually("the space", || vmem.tier_stats(VRAM).used_bytes == 0).await;
        driver.go_on();
    }
    settle(&vmem, &driver).await;
    driver.assert_untouched();
    vmem.promote(&handle, VRAM).await.unwrap();
    assert_on_device(&vmem, &driver, &handle, 1).await;
    vmem.close().await.unwrap();
}
