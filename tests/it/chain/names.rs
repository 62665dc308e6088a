//! Objects with names: the catalog leads to the disk, so that is where they stay.

use std::io;
use std::sync::Arc;

use vmem::backend::{Backends, Remote};
use vmem::{Capabilities, MemoryTier, VirtualMemory, VirtualMemoryError};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{Tape, TapeDriver, TapeStorage};

use super::REMOTE;
use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, Op, STAGING, bytes};

const LEN: usize = 64 * KIB;

/// A store whose disk and catalog outlive it, with or without a tier below.
fn open(tape: &Arc<Tape>, disk: usize, has_remote: bool) -> VirtualMemory {
    let remote = has_remote.then(|| DiskTier::new(MemDriver::new(), 64 << 20));
    open_over(tape, disk, remote)
}

fn open_over(tape: &Arc<Tape>, disk: usize, remote: Option<Arc<DiskTier>>) -> VirtualMemory {
    let storage = TapeStorage(tape.clone());
    let (catalog, taken) = NameCatalog::over(Arc::new(storage), 512).unwrap();
    let driver = TapeDriver::new(tape, false);
    let backends = Backends {
        host_capacity_bytes: (MIB + STAGING) as u64,
        disk: DiskTier::with_taken(driver, disk as u64, &taken, None).unwrap(),
        remote: remote.map(|remote| Remote::Unnamed(remote)),
        catalog: Some(Arc::new(catalog)),
        devices: Vec::new(),
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&support::config(MIB, |builder| builder), backends).unwrap()
}

fn is_on(vmem: &VirtualMemory, handle: &vmem::VMemHandle, tier: MemoryTier) -> bool {
    vmem.residency(handle).unwrap().is_in(tier)
}

#[tokio::test]
async fn object_that_gets_a_name_comes_to_the_disk_and_stays_there() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 4 * MIB, true);
    let handle = vmem.put(bytes(1, 1, 200_000), DISK).await.unwrap();
    vmem.demote(&handle, REMOTE).await.unwrap();
    vmem.adopt(&handle, "one").await.unwrap();
    assert!(is_on(&vmem, &handle, DISK));
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert!(is_on(&vmem, &handle, DISK), "the catalog leads there");
    for home in [HOST, DISK, REMOTE] {
        let name = format!("at home in {home}");
        vmem.put_named(&name, bytes(2, 1, 100_000), home).await.unwrap();
    }
    drop(handle);
    vmem.close().await.unwrap();
    let again = open(&Tape::of(tape.image()), 4 * MIB, true);
    let handle = again.open_named("one").await.unwrap();
    assert!(again.read(&handle).await.unwrap() == bytes(1, 1, 200_000));
    for home in [HOST, DISK, REMOTE] {
        let handle = again.open_named(&format!("at home in {home}")).await.unwrap();
        assert_eq!(handle.home_tier(), home);
        assert!(again.read(&handle).await.unwrap() == bytes(2, 1, 100_000));
    }
    drop(handle);
    again.close().await.unwrap();
}

#[tokio::test]
async fn name_at_home_in_a_tier_that_is_gone_is_refused() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 4 * MIB, true);
    vmem.put_named("far", [1; 1000], REMOTE).await.unwrap();
    vmem.close().await.unwrap();
    let again = open(&Tape::of(tape.image()), 4 * MIB, false);
    let refused = again.open_named("far").await;
    let is_it = matches!(refused, Err(VirtualMemoryError::TierNotAvailable { tier: REMOTE, .. }));
    assert!(is_it, "{refused:?}");
    again.close().await.unwrap();
}

#[tokio::test]
async fn objects_without_a_name_make_way_on_disk_for_those_that_have_one() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 32 * LEN, true);
    let mut unnamed = Vec::new();
    for object in 1..=40 {
        unnamed.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
    }
    for object in 1..=24 {
        let name = format!("{object}");
        drop(vmem.put_named(&name, bytes(object, 2, LEN), DISK).await.unwrap());
    }
    let stats = support::quiet(&vmem).await;
    assert!(stats.disk.peak_bytes <= stats.disk.capacity_bytes, "{stats:#?}");
    for object in 1..=24 {
        let handle = vmem.open_named(&format!("{object}")).await.unwrap();
        assert!(is_on(&vmem, &handle, DISK), "{object}");
        assert!(vmem.read(&handle).await.unwrap() == bytes(object, 2, LEN));
    }
    for (object, handle) in (1..).zip(&unnamed) {
        let mut read = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
        assert!(read == bytes(object, 1, LEN), "{object}");
    }
    drop(unnamed);
    vmem.close().await.unwrap();
}

/// Excluded: bytes of a name that were written below a full disk, and are lost when the store
/// closes.
#[tokio::test]
async fn name_whose_bytes_lie_below_the_disk_is_durable_when_the_store_closes() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 8 * LEN, true);
    let named = vmem.put_named("named", bytes(1, 1, 4 * LEN), HOST).await.unwrap();
    let mut others = Vec::new();
    for object in 2..=5 {
        others.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
    }
    vmem.write(&named, bytes(1, 2, 4 * LEN)).await.unwrap();
    vmem.demote(&named, DISK).await.unwrap();
    assert!(is_on(&vmem, &named, REMOTE), "there is no space on disk");
    drop(named);
    vmem.close().await.unwrap();
    let again = open(&Tape::of(tape.image()), 8 * LEN, true);
    let named = again.open_named("named").await.unwrap();
    assert!(again.read(&named).await.unwrap() == bytes(1, 2, 4 * LEN));
    drop(named);
    again.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn disk_that_is_full_of_names_is_said_to_be_full() {
    let tape = Tape::of(Image::default());
    let vmem = open(&tape, 8 * LEN, true);
    let mut named = Vec::new();
    for object in 1..=8 {
        let name = format!("{object}");
        named.push(vmem.put_named(&name, bytes(object, 1, LEN), DISK).await.unwrap());
    }
    let below = vmem.put(bytes(9, 1, LEN), REMOTE).await.unwrap();
    let refused = vmem.promote(&below, DISK).await;
    assert!(matches!(refused, Err(VirtualMemoryError::TierFull { tier: DISK, .. })), "{refused:?}");
    // A name less, and there is space.
    vmem.remove_named("1").await.unwrap();
    drop(named.remove(0));
    vmem.promote(&below, DISK).await.unwrap();
}

/// Excluded: bytes that host memory has and that are lost, since they were written below the disk
/// too and cannot be read there.
#[tokio::test(start_paused = true)]
async fn name_is_durable_from_host_memory_while_the_tier_below_fails() {
    let tape = Tape::of(Image::default());
    let remote = MemDriver::new();
    let vmem = open_over(&tape, 8 * LEN, Some(DiskTier::new(remote.clone(), 64 << 20)));
    let named = vmem.put_named("named", bytes(1, 1, 3 * LEN), HOST).await.unwrap();
    let pinned = vmem.put(bytes(2, 1, 4 * LEN), DISK).await.unwrap();
    let pin = vmem.pin(&pinned, DISK).await.unwrap();
    vmem.write(&named, bytes(1, 2, 3 * LEN)).await.unwrap();
    let refused = vmem.flush(&named).await;
    assert!(matches!(refused, Err(VirtualMemoryError::AllPinned { .. })), "{refused:?}");
    assert!(is_on(&vmem, &named, HOST) && is_on(&vmem, &named, REMOTE));
    remote.fail(|op, _| (op == Op::Read).then(|| io::Error::other("gone")));
    drop((pin, pinned, named));
    vmem.close().await.unwrap();
    let again = open(&Tape::of(tape.image()), 8 * LEN, true);
    let named = again.open_named("named").await.unwrap();
    assert!(again.read(&named).await.unwrap() == bytes(1, 2, 3 * LEN));
}

/// Excluded: a name that cannot be made durable for want of space, while the disk has copies that
/// are below it too.
#[tokio::test(start_paused = true)]
async fn name_gets_the_space_of_copies_where_the_tier_below_is_full() {
    let tape = Tape::of(Image::default());
    let vmem = open_over(&tape, 8 * LEN, Some(DiskTier::new(MemDriver::new(), 6 << 16)));
    let mut copied = Vec::new();
    for object in 1..=6 {
        let handle = vmem.put(bytes(object, 1, LEN), REMOTE).await.unwrap();
        vmem.promote(&handle, DISK).await.unwrap();
        copied.push(handle);
    }
    let named = vmem.put_named("named", bytes(7, 1, 3 * LEN), HOST).await.unwrap();
    assert!(is_on(&vmem, &named, DISK));
    for (object, handle) in (1..).zip(&copied) {
        assert!(vmem.read(handle).await.unwrap() == bytes(object, 1, LEN), "{object}");
    }
}
