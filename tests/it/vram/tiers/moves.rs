//! Ways to device memory and back: promotions, prefetches, pins, eviction, and their events.
//!
//! Invariant: bytes are right wherever they are read from. Run on each device by the module above.

use std::io;
use std::time::Duration;

use futures::FutureExt;
use vmem::{MigrationCause, VirtualMemoryError};

use super::{VRAM, Which, assert_all_back, in_vram, open};
use crate::support::{DISK, HOST, KIB, MIB, Op, bytes, put_all, settle};

/// The example of the seed's documentation, with VRAM, awaited.
pub(super) async fn allocate_on_host_write_promote_to_vram_read(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    assert!(vmem.capabilities().vram.is_some());
    let handle = vmem.allocate(5000, HOST).await.unwrap();
    vmem.write(&handle, bytes(1, 1, 5000)).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 5000));

    let residency = vmem.residency(&handle).unwrap();
    assert_eq!(residency.current_tier(), Some(VRAM));
    let stats = vmem.stats();
    assert_eq!((stats.vram.used_bytes, stats.vram.objects), (5120, 1));
    assert_eq!(stats.host_to_vram_bytes, 5000);
    // Already there or faster.
    vmem.promote(&handle, HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    assert_eq!(vmem.stats().host_to_vram_bytes, 5000);
    vmem.demote(&handle, HOST).await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}

/// What only device memory and the disk have is read from device memory: the disk fails every read.
pub(super) async fn a_read_takes_the_faster_copy(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * MIB, 256 * KIB, |config| config);
    let len = 150_000;
    let handle = vmem.put(bytes(1, 1, len), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    // Others push it out of host memory.
    let others = put_all(&vmem, 8, 60_000, HOST).await;
    settle(&vmem, &driver).await;
    let residency = vmem.residency(&handle).unwrap();
    assert!(residency.vram && !residency.host && residency.disk, "{residency:?}");

    driver.fail(|op, _| (op == Op::Read).then(|| io::Error::from_raw_os_error(5)));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, len));
    let part = vmem.read_at(&handle, 70_000..140_001).await.unwrap();
    assert!(part == bytes(1, 1, len)[70_000..140_001]);
    drop(part);
    let stats = vmem.stats();
    assert!(stats.vram.hits >= 2 && stats.vram_to_host_bytes >= len as u64, "{stats:#?}");

    // A part of it is written: the rest is read from device memory too, and the copy there is
    // stale.
    vmem.write_at(&handle, 65_530, [9; 20]).await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    driver.heal();
    let mut expected = bytes(1, 1, len);
    expected[65_530..65_550].fill(9);
    assert!(vmem.read(&handle).await.unwrap() == expected);

    // And if device memory fails, the copy below serves.
    vmem.promote(&handle, VRAM).await.unwrap();
    vmem.demote(&others[0], DISK).await.unwrap();
    for (n, other) in others.iter().enumerate() {
        assert!(vmem.read(other).await.unwrap() == bytes(n as u64 + 1, 1, 60_000));
        vmem.promote(other, HOST).await.unwrap();
    }
    settle(&vmem, &driver).await;
    if !vmem.residency(&handle).unwrap().host {
        gpu.fail_next_download();
        assert!(vmem.read(&handle).await.unwrap() == expected);
        assert!(vmem.stats().errors > 0);
    }
    let mut all = others;
    all.push(handle);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// More than device memory holds: the least recently used leave it, for nothing, and the budget
/// holds.
pub(super) async fn what_is_used_least_leaves(which: Which) {
    let (vmem, driver, gpu) = open(which, 10 * 8192, 4 * MIB, |config| config);
    let handles = put_all(&vmem, 30, 8192, HOST).await;
    for handle in &handles {
        vmem.promote(handle, VRAM).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let there: Vec<_> = handles.iter().map(|handle| in_vram(&vmem, handle)).collect();
    assert_eq!(there.iter().filter(|there| **there).count(), 10, "{there:?}");
    assert!(there[20..].iter().all(|there| *there), "{there:?}");
    // One that is used again stays.
    vmem.promote(&handles[20], VRAM).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2)).await;
    vmem.promote(&handles[0], VRAM).await.unwrap();
    assert!(in_vram(&vmem, &handles[20]) && !in_vram(&vmem, &handles[21]));

    // One that takes as much as three of them makes three of them leave, and no more.
    let large = vmem.put(bytes(99, 1, 3 * 8192), HOST).await.unwrap();
    vmem.promote(&large, VRAM).await.unwrap();
    let left = handles.iter().filter(|handle| in_vram(&vmem, handle)).count();
    assert!((5..=7).contains(&left), "{left} of 10 are left");
    let stats = vmem.stats();
    assert!(stats.vram.peak_bytes <= stats.vram.capacity_bytes && stats.clean_drops >= 20);
    assert_eq!(stats.host_to_disk_bytes, 0, "leaving device memory writes nothing");

    let too_large = vmem.put(bytes(3, 1, 11 * 8192), HOST).await.unwrap();
    let error = vmem.promote(&too_large, VRAM).await.unwrap_err();
    drop(too_large);
    let exceeds = VirtualMemoryError::ExceedsCapacity {
        tier: VRAM,
        requested_bytes: 11 * 8192,
        capacity_bytes: 10 * 8192,
    };
    assert_eq!(error.to_string(), exceeds.to_string());
    let mut all = handles;
    all.push(large);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

pub(super) async fn pins_keep_objects_in_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * 8192, 4 * MIB, |config| {
        config.wait_timeout(Duration::from_secs(3)).max_pinned(0.75)
    });
    let handles = put_all(&vmem, 8, 8192, HOST).await;
    let first = vmem.pin(&handles[0], VRAM).await.unwrap();
    let again = vmem.pin(&handles[0], VRAM).await.unwrap();
    for to in [HOST, DISK] {
        let refused = vmem.demote(&handles[0], to).await;
        assert!(
            matches!(refused, Err(VirtualMemoryError::Pinned { tier: VRAM, pins: 2, .. })),
            "{refused:?}"
        );
    }
    for handle in &handles[1..] {
        vmem.promote(handle, VRAM).await.unwrap();
    }
    assert!(in_vram(&vmem, &handles[0]));

    // The budget of pins: three of four.
    let more: Vec<_> =
        [vmem.pin(&handles[1], VRAM).await.unwrap(), vmem.pin(&handles[2], VRAM).await.unwrap()]
            .into();
    let refused = vmem.pin(&handles[3], VRAM).await;
    assert!(
        matches!(refused, Err(VirtualMemoryError::AllPinned { tier: VRAM, .. })),
        "{refused:?}"
    );
    // A waiter gets its turn when a pin goes.
    let mut waiting = Box::pin(vmem.pin(&handles[3], VRAM));
    assert!((&mut waiting).now_or_never().is_none());
    drop(more);
    let fourth = waiting.await.unwrap();

    // A write makes the copy stale; it is promoted again without a call, in the same memory.
    vmem.write(&handles[0], bytes(1, 2, 8192)).await.unwrap();
    settle(&vmem, &driver).await;
    while !in_vram(&vmem, &handles[0]) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop((first, again));
    vmem.demote(&handles[0], HOST).await.unwrap();
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(1, 2, 8192));
    drop(fourth);
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

/// An upload that is in flight when its caller is dropped keeps what it uses; a write waits its
/// turn. With home in VRAM space is taken there, zeros are read, and what is written is promoted
/// without a call.
pub(super) async fn at_home_in_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.allocate(70_000, VRAM).await.unwrap();
    assert_eq!(handle.home_tier(), VRAM);
    assert_eq!(vmem.stats().vram.used_bytes, 70_144, "space is taken at home");
    assert!(vmem.read(&handle).await.unwrap() == vec![0; 70_000]);
    vmem.flush(&handle).await.unwrap();
    assert!(in_vram(&vmem, &handle));
    vmem.demote(&handle, DISK).await.unwrap();
    assert_eq!(vmem.stats().vram.used_bytes, 0);
    vmem.promote(&handle, VRAM).await.unwrap();
    // Zeros need no bytes: they were made where they are. None of the previous bytes shows.
    settle(&vmem, &driver).await;
    assert!(vmem.read(&handle).await.unwrap() == vec![0; 70_000]);

    for version in 1..4 {
        vmem.write(&handle, bytes(1, version, 70_000)).await.unwrap();
        vmem.flush(&handle).await.unwrap();
        assert!(in_vram(&vmem, &handle), "{version}");
        assert_eq!(vmem.stats().vram.used_bytes, 70_144, "in the same memory");
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, version, 70_000));
    }
    // More than device memory holds: those that find no space there live below.
    let mut all = put_all(&vmem, 40, 50_000, VRAM).await;
    for (n, handle) in all.iter().enumerate() {
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 1, 50_000));
    }
    let empty = vmem.put([], VRAM).await.unwrap();
    vmem.promote(&empty, VRAM).await.unwrap();
    drop(vmem.pin(&empty, VRAM).await.unwrap());
    all.push(handle);
    all.push(empty);
    vmem.flush_all().await.unwrap();
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// A prefetch promotes in order, makes nothing leave that is in use, and can be dropped.
pub(super) async fn prefetches_to_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * 8192, 4 * MIB, |config| config.max_pinned(1.0));
    let handles = put_all(&vmem, 8, 8192, HOST).await;
    let group: Vec<_> = handles[..4].to_vec();
    vmem.prefetch_many(&group, VRAM).await.unwrap();
    assert!(group.iter().all(|handle| in_vram(&vmem, handle)));
    assert_eq!(vmem.stats().vram.objects, 4);
    // It waits for what is pinned, and then takes nothing that was used since it was asked for.
    let mut pins = Vec::new();
    for handle in &group {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let mut prefetch = vmem.prefetch(&handles[4], VRAM);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!((&mut prefetch).now_or_never().is_none());
    vmem.promote(&group[0], VRAM).await.unwrap();
    vmem.promote(&group[2], VRAM).await.unwrap();
    // A dropped one is gone.
    drop(vmem.prefetch(&handles[5], VRAM));
    drop(pins);
    prefetch.await.unwrap();
    let there: Vec<_> = handles.iter().map(|handle| in_vram(&vmem, handle)).collect();
    assert!(there[0] && there[2] && there[4] && !(there[1] && there[3]), "{there:?}");
    settle(&vmem, &driver).await;
    assert!(!in_vram(&vmem, &handles[5]));
    drop(group);
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

/// A prefetch that is dropped half way leaves nothing behind.
/// From disk, piece by piece through the least staging there is, with host memory full of what
/// readers hold.
pub(super) async fn from_disk_with_host_memory_held(which: Which) {
    let (vmem, driver, gpu) = open(which, 8 * MIB, 256 * KIB, |config| config);
    let len = MIB + 12_345;
    let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let others = put_all(&vmem, 3, 65_536, HOST).await;
    let mut held = Vec::new();
    for other in &others {
        held.push(vmem.read(other).await.unwrap());
    }
    vmem.promote(&handle, VRAM).await.unwrap();
    assert!(in_vram(&vmem, &handle));
    driver.fail(|op, _| (op == Op::Read).then(|| io::Error::from_raw_os_error(5)));
    let mut read = vec![0; len];
    vmem.read_into(&handle, 0..len, &mut read).await.unwrap();
    assert!(read == bytes(1, 1, len));
    driver.heal();
    drop(held);
    let mut all = others;
    all.push(handle);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// Every operation that names a tier, at random, from many tasks, with futures dropped at random:
/// no wrong byte, never above the budget, nothing left. A migration to VRAM is reported with its
/// route.
pub(super) async fn migrations_to_vram_are_told(which: Which) {
    use futures::StreamExt;
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let mut migrations = Box::pin(vmem.migrations());
    let handle = vmem.put(bytes(1, 1, 3000), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to, event.bytes), (HOST, VRAM, 3000));
    assert_eq!(event.cause, MigrationCause::Promote);
    vmem.demote(&handle, DISK).await.unwrap();
    drop(migrations.next().await.unwrap());
    vmem.promote(&handle, VRAM).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to), (DISK, VRAM));
    vmem.demote(&handle, HOST).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to, event.cause), (VRAM, HOST, MigrationCause::Demote));
    assert!(vmem.residency(&handle).unwrap().host);
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}
