//! Objects whose names lead to the tier below the disk: there they are durable, and the disk has
//! copies of them.
//!
//! Excluded: bytes of a name that only the disk has once a flush has ended, names that stay on a
//! disk that others need, and a disk whose loss costs a name.

use std::io;
use std::sync::Arc;

use vmem::backend::{Backends, Catalog, Remote};
use vmem::{Capabilities, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{ClosedNames, Tape, TapeDriver, TapeStorage};

use super::REMOTE;
use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, Op, STAGING, bytes};

const LEN: usize = 64 * KIB;

/// A store with an empty disk above what is on the tape.
fn open(tape: &Arc<Tape>, disk: usize) -> VirtualMemory {
    open_over(tape, disk, None)
}

/// The same, with this many closed names in memory.
fn open_over(tape: &Arc<Tape>, disk: usize, closed: Option<usize>) -> VirtualMemory {
    let storage = TapeStorage(tape.clone());
    let (catalog, taken) = NameCatalog::over(Arc::new(storage), 512).unwrap();
    let driver = TapeDriver::new(tape, false);
    let remote = DiskTier::with_taken(driver, 64 << 20, &taken, None).unwrap();
    open_with(remote, catalog, disk, closed)
}

fn open_with(
    remote: Arc<DiskTier>,
    catalog: NameCatalog,
    disk: usize,
    closed: Option<usize>,
) -> VirtualMemory {
    let catalog: Arc<dyn Catalog> = match closed {
        Some(max) => Arc::new(ClosedNames(Arc::new(catalog), max)),
        None => Arc::new(catalog),
    };
    let backends = Backends {
        host_capacity_bytes: (MIB + STAGING) as u64,
        disk: DiskTier::new(MemDriver::new(), disk as u64),
        remote: Some(Remote::Named(remote)),
        catalog: Some(catalog),
        devices: Vec::new(),
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&support::config(MIB, |builder| builder), backends).unwrap()
}

fn places(vmem: &VirtualMemory, handle: &VMemHandle) -> [bool; 3] {
    let residency = vmem.residency(handle).unwrap();
    [residency.host, residency.disk, residency.remote]
}

#[tokio::test]
async fn names_are_durable_below_the_disk_wherever_their_home_is() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 4 * MIB);
    for home in [HOST, DISK, REMOTE] {
        let name = format!("at home in {home}");
        let handle = vmem.put_named(&name, bytes(1, 1, 200_000), home).await.unwrap();
        assert!(places(&vmem, &handle)[2], "{home}");
        let allocated = vmem.allocate_named(&format!("zeros in {home}"), 100_000, home).await;
        vmem.flush(&allocated.unwrap()).await.unwrap();
    }
    // The power is cut, and the disk is another one.
    let again = open(&Tape::of(tape.image()), 4 * MIB);
    for home in [HOST, DISK, REMOTE] {
        let handle = again.open_named(&format!("at home in {home}")).await.unwrap();
        assert_eq!(handle.home_tier(), home);
        assert!(again.read(&handle).await.unwrap() == bytes(1, 1, 200_000));
        let zeros = again.open_named(&format!("zeros in {home}")).await.unwrap();
        assert!(again.read(&zeros).await.unwrap() == vec![0; 100_000]);
    }
    again.close().await.unwrap();
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn names_come_to_the_disk_and_leave_it_as_other_objects_do() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 8 * LEN);
    let mut handles = Vec::new();
    for object in 0..32 {
        let name = format!("{object}");
        let handle = vmem.put_named(&name, bytes(object, 1, LEN), DISK).await.unwrap();
        handles.push(handle);
    }
    for turn in 0..3 {
        for (object, handle) in (0..).zip(&handles) {
            // What host memory has is not promoted to the disk.
            vmem.demote(handle, REMOTE).await.unwrap();
            vmem.promote(handle, DISK).await.unwrap();
            assert_eq!(places(&vmem, handle), [false, true, true]);
            let mut read = vec![0; LEN];
            vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
            assert!(read == bytes(object, 1, LEN), "{object} in turn {turn}");
        }
    }
    let stats = support::quiet(&vmem).await;
    assert!(stats.disk.peak_bytes <= 8 * LEN as u64, "{stats:#?}");
    // What is on both is in the way of nobody.
    let pin = vmem.pin(&handles[0], DISK).await.unwrap();
    assert!(places(&vmem, &handles[0])[1]);
    let refused = vmem.demote(&handles[0], REMOTE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Pinned { tier: DISK, .. })), "{refused:?}");
    drop(pin);
    vmem.demote(&handles[0], REMOTE).await.unwrap();
    assert_eq!(places(&vmem, &handles[0]), [false, false, true]);
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(0, 1, LEN));
    drop(handles);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn changes_are_durable_once_they_were_flushed() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 4 * MIB);
    let len = 3 * LEN + 100;
    let handle = vmem.put_named("named", bytes(1, 1, len), HOST).await.unwrap();
    let mut expected = bytes(1, 1, len);
    for version in 2..6 {
        let at = version as usize * 30_000;
        let change = bytes(1, version, 5000);
        vmem.write_at(&handle, at, &change).await.unwrap();
        if version % 2 == 0 {
            // On disk alone, which is another one after a cut.
            vmem.demote(&handle, DISK).await.unwrap();
            assert!(!places(&vmem, &handle)[0]);
        }
        let before = Tape::of(tape.image());
        let cut = open(&before, 4 * MIB);
        let found = cut.open_named("named").await.unwrap();
        assert!(cut.read(&found).await.unwrap() == expected, "version {version} is not flushed");
        expected[at..at + 5000].copy_from_slice(&change);
        vmem.flush(&handle).await.unwrap();
        assert!(places(&vmem, &handle)[2]);
        let cut = open(&Tape::of(tape.image()), 4 * MIB);
        let found = cut.open_named("named").await.unwrap();
        assert!(cut.read(&found).await.unwrap() == expected, "version {version} is flushed");
    }
    // What was not flushed is, when the store closes.
    vmem.write(&handle, bytes(1, 9, len)).await.unwrap();
    vmem.demote(&handle, DISK).await.unwrap();
    drop(handle);
    vmem.close().await.unwrap();
    let again = open(&Tape::of(tape.image()), 4 * MIB);
    let handle = again.open_named("named").await.unwrap();
    assert!(again.read(&handle).await.unwrap() == bytes(1, 9, len));
    again.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn flushes_that_fail_below_the_disk_succeed_later() {
    let remote = MemDriver::new();
    let tier = DiskTier::new(remote.clone(), 4 * LEN as u64);
    let storage = TapeStorage(Tape::of(Image::default()));
    let (catalog, _) = NameCatalog::over(Arc::new(storage), 512).unwrap();
    let vmem = open_with(tier, catalog, 4 * MIB, None);
    let handle = vmem.put_named("named", bytes(1, 1, LEN), HOST).await.unwrap();
    for (version, is_on_disk) in [(2, false), (3, true)] {
        vmem.write(&handle, bytes(1, version, LEN)).await.unwrap();
        if is_on_disk {
            vmem.demote(&handle, DISK).await.unwrap();
        }
        remote.fail(|op, _| (op == Op::Write).then(|| io::Error::other("gone")));
        let failed = vmem.flush(&handle).await;
        assert!(matches!(failed, Err(VirtualMemoryError::Io { .. })), "{failed:?}");
        assert!(!places(&vmem, &handle)[2]);
        remote.heal();
        vmem.flush(&handle).await.unwrap();
        assert!(places(&vmem, &handle)[2]);
    }
    // A tier that is full says so, and nothing is lost.
    let large = vmem.put(bytes(2, 1, 4 * LEN), HOST).await.unwrap();
    let full = vmem.adopt(&large, "large").await;
    let is_full = matches!(full, Err(VirtualMemoryError::TierFull { tier: REMOTE, .. }));
    assert!(is_full, "{full:?}");
    assert!(vmem.read(&large).await.unwrap() == bytes(2, 1, 4 * LEN));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 3, LEN));
    drop((handle, large));
    vmem.close().await.unwrap();
}

/// Names of which the disk has a copy are in use: that copy would be lost with them.
#[tokio::test]
async fn closed_names_leave_memory_once_they_have_left_the_disk() {
    let tape = Tape::of(Image::default());
    let vmem = open_over(&tape, 8 * LEN, Some(0));
    for object in 0..8 {
        let name = format!("{object}");
        let handle = vmem.put_named(&name, bytes(object, 1, LEN), DISK).await.unwrap();
        vmem.demote(&handle, REMOTE).await.unwrap();
        if object < 4 {
            vmem.promote(&handle, DISK).await.unwrap();
        }
    }
    support::eventually("the others", || vmem.stats().names_in_memory == 4).await;
    for object in 0..4 {
        let handle = vmem.open_named(&format!("{object}")).await.unwrap();
        assert!(places(&vmem, &handle)[1], "it is where it was");
        vmem.demote(&handle, REMOTE).await.unwrap();
    }
    support::eventually("all", || vmem.stats().names_in_memory == 0).await;
    let stats = support::quiet(&vmem).await;
    assert_eq!(stats.disk.used_bytes, 0, "{stats:#?}");
    for object in 0..8 {
        let handle = vmem.open_named(&format!("{object}")).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(object, 1, LEN));
        vmem.remove_named(&format!("{object}")).await.unwrap();
    }
    support::eventually("the space", || vmem.stats().remote.used_bytes == 0).await;
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn objects_get_names_from_wherever_they_are() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 4 * MIB);
    for (nth, tier) in [HOST, DISK, REMOTE].into_iter().enumerate() {
        let object = nth as u64;
        let handle = vmem.put(bytes(object, 1, 150_000), HOST).await.unwrap();
        if tier != HOST {
            vmem.demote(&handle, tier).await.unwrap();
        }
        vmem.adopt(&handle, &format!("{nth}")).await.unwrap();
        assert!(places(&vmem, &handle)[2], "{tier}");
    }
    vmem.rename_named("0", "first").await.unwrap();
    vmem.remove_named("1").await.unwrap();
    let again = open(&Tape::of(tape.image()), 4 * MIB);
    let first = again.open_named("first").await.unwrap();
    assert!(again.read(&first).await.unwrap() == bytes(0, 1, 150_000));
    let gone = again.open_named("1").await;
    assert!(matches!(gone, Err(VirtualMemoryError::NameNotFound { .. })), "{gone:?}");
    let last = again.open_named("2").await.unwrap();
    assert!(again.read(&last).await.unwrap() == bytes(2, 1, 150_000));
    again.close().await.unwrap();
    vmem.close().await.unwrap();
}
