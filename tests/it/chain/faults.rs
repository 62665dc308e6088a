//! Tiers that fail, each on its own.

use std::io;

use vmem::VirtualMemoryError;

use super::{REMOTE, open};
use crate::support::{DISK, HOST, KIB, MIB, Op, bytes, eventually};

const LEN: usize = 200 * KIB;

fn broken() -> io::Error {
    io::Error::from_raw_os_error(5)
}

#[tokio::test(start_paused = true)]
async fn object_stays_on_disk_while_the_tier_below_fails() {
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    chain.remote.fail(|_, _| Some(broken()));
    let refused = vmem.demote(&handle, REMOTE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
    assert_eq!(chain.places(&handle), [false, true, false]);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
    assert_eq!(chain.settle().await.remote.used_bytes, 0, "what was reserved went back");
    chain.remote.heal();
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert_eq!(chain.places(&handle), [false, false, true]);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
}

#[tokio::test(start_paused = true)]
async fn tier_that_cannot_be_read_concerns_its_objects_alone() {
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let near = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let far = vmem.put(bytes(2, 1, LEN), REMOTE).await.unwrap();
    chain.remote.fail(|op, _| (op == Op::Read).then(broken));
    let refused = vmem.read(&far).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
    assert!(vmem.read(&near).await.unwrap() == bytes(1, 1, LEN));
    chain.remote.heal();
    assert!(vmem.read(&far).await.unwrap() == bytes(2, 1, LEN));
}

#[tokio::test(start_paused = true)]
async fn copy_in_a_slower_tier_serves_where_the_faster_one_fails() {
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), REMOTE).await.unwrap();
    vmem.promote(&handle, DISK).await.unwrap();
    chain.disk.fail(|op, _| (op == Op::Read).then(broken));
    let errors = vmem.stats().errors;
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
    assert!(vmem.stats().errors > errors, "it is counted");
    // Damage is found by its checksum, and read past as well.
    chain.disk.heal();
    let at = chain.disk.find(&bytes(1, 1, LEN)[..100]).expect("it is on disk");
    chain.disk.flip(at + 17);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
    // What is on disk alone is reported.
    let alone = vmem.put(bytes(2, 1, LEN), DISK).await.unwrap();
    let at = chain.disk.find(&bytes(2, 1, LEN)[..100]).expect("it is on disk");
    chain.disk.flip(at + 17);
    let refused = vmem.demote(&alone, REMOTE).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Corrupt { chunk: 0, .. })), "{refused:?}");
}

/// Excluded: a chunk that can be read from a slower tier and is not, since another chunk of the
/// read is in none.
#[tokio::test(start_paused = true)]
async fn damaged_chunk_is_read_past_beside_one_that_only_the_disk_has() {
    const CHUNK: usize = 64 * KIB;
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, 3 * CHUNK), DISK).await.unwrap();
    vmem.demote(&handle, REMOTE).await.unwrap();
    vmem.promote(&handle, DISK).await.unwrap();
    vmem.write_at(&handle, 2 * CHUNK, bytes(2, 1, CHUNK)).await.unwrap();
    let at = chain.disk.find(&bytes(1, 1, 3 * CHUNK)[..100]).expect("it is on disk");
    chain.disk.flip(at + 17);
    let read = vmem.read(&handle).await.unwrap();
    assert!(read[..2 * CHUNK] == bytes(1, 1, 3 * CHUNK)[..2 * CHUNK]);
    assert!(read[2 * CHUNK..] == bytes(2, 1, CHUNK)[..]);
}

/// Excluded: bytes that host memory has and that are given up, since the disk has them damaged.
#[tokio::test(start_paused = true)]
async fn host_copy_outlives_damage_on_disk() {
    let chain = open((MIB, 16 * LEN, 64 * LEN), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let asked = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    let evicted = vmem.put(bytes(2, 1, LEN), HOST).await.unwrap();
    for (object, handle) in [(1, &asked), (2, &evicted)] {
        vmem.demote(handle, DISK).await.unwrap();
        vmem.promote(handle, HOST).await.unwrap();
        assert_eq!(chain.places(handle), [true, true, false]);
        let at = chain.disk.find(&bytes(object, 1, LEN)[..100]).expect("it is on disk");
        chain.disk.flip(at + 17);
    }
    vmem.demote(&asked, REMOTE).await.unwrap();
    assert_eq!(chain.places(&asked), [false, false, true]);
    assert!(vmem.read(&asked).await.unwrap() == bytes(1, 1, LEN));
    // Others take all of the disk, so that the second is to leave it, and cannot be read there.
    let mut others = Vec::new();
    for object in 3..40 {
        others.push(vmem.put(bytes(object, 1, LEN), REMOTE).await.unwrap());
        vmem.promote(others.last().unwrap(), DISK).await.unwrap();
    }
    chain.settle().await;
    assert!(vmem.residency(&evicted).unwrap().host, "nothing wanted its space");
    vmem.demote(&evicted, DISK).await.unwrap();
    assert!(vmem.read(&evicted).await.unwrap() == bytes(2, 1, LEN));
}

#[tokio::test(start_paused = true)]
async fn disk_that_has_less_space_than_it_says_is_passed_by() {
    let chain = open((4 * LEN, 16 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let no_space = || io::Error::from_raw_os_error(28);
    chain.disk.fail(move |op, _| (op == Op::Write).then(no_space));
    let mut handles = Vec::new();
    for object in 1..=16 {
        handles.push(vmem.put(bytes(object, 1, LEN), HOST).await.unwrap());
    }
    for (object, handle) in (1..).zip(&handles) {
        assert!(vmem.read(handle).await.unwrap() == bytes(object, 1, LEN));
    }
    let stats = chain.settle().await;
    assert!(stats.remote.objects >= 12 && stats.disk.used_bytes == 0, "{stats:#?}");
}

/// Excluded: one damaged object on disk that keeps all others from leaving it.
#[tokio::test(start_paused = true)]
async fn damaged_object_keeps_no_other_on_disk() {
    let len = 16 * KIB;
    let chain = open((MIB, MIB, 16 * MIB), |builder| builder.watermarks(0.5, 0.8));
    let vmem = &chain.vmem;
    let damaged = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let at = chain.disk.find(&bytes(1, 1, len)[..100]).expect("it is on disk");
    chain.disk.flip(at);
    let mut handles = Vec::new();
    for object in 2..=200 {
        handles.push(vmem.put(bytes(object, 1, len), DISK).await.unwrap());
    }
    let stats = chain.settle().await;
    assert!(stats.remote.objects > 100, "{stats:#?}");
    assert!(stats.disk.used_bytes <= (MIB * 8 / 10) as u64, "{stats:#?}");
    for (object, handle) in (2..).zip(&handles) {
        assert!(vmem.read(handle).await.unwrap() == bytes(object, 1, len));
    }
    let refused = vmem.read(&damaged).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Corrupt { .. })), "{refused:?}");
}

/// All others are pinned, so that the two are a batch each time.
#[tokio::test]
async fn damaged_object_keeps_no_other_of_its_batch_on_disk() {
    let chain = open((MIB, MIB, 16 * MIB), |builder| builder.watermarks(0.5, 0.8));
    let vmem = &chain.vmem;
    let len = 64 * KIB;
    let damaged = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let at = chain.disk.find(&bytes(1, 1, len)[..100]).expect("it is on disk");
    chain.disk.flip(at);
    let beside = vmem.put(bytes(2, 1, len), DISK).await.unwrap();
    let mut pinned = Vec::new();
    for object in 3..=14 {
        let handle = vmem.put(bytes(object, 1, len), DISK).await.unwrap();
        pinned.push(vmem.pin(&handle, DISK).await.unwrap());
    }
    eventually("the other leaves", || chain.places(&beside)[2]).await;
    assert!(vmem.read(&beside).await.unwrap() == bytes(2, 1, len));
    drop((damaged, pinned));
}

#[tokio::test(start_paused = true)]
async fn host_memory_is_emptied_past_a_disk_that_fails() {
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    chain.disk.fail(|_, _| Some(broken()));
    let refused = vmem.demote(&handle, DISK).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert_eq!(chain.places(&handle), [false, false, true]);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
}

/// Excluded: an object that a full file system drives from the disk, where it is pinned.
#[tokio::test(start_paused = true)]
async fn one_chunk_without_space_on_disk_takes_no_other_below_it() {
    const CHUNK: usize = 64 * KIB;
    let chain = open((MIB, 4 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, 6 * CHUNK), DISK).await.unwrap();
    let _pin = vmem.pin(&handle, DISK).await.unwrap();
    vmem.promote(&handle, HOST).await.unwrap();
    vmem.write_at(&handle, 0, bytes(2, 1, CHUNK)).await.unwrap();
    let no_space = || io::Error::from_raw_os_error(28);
    chain.disk.fail(move |op, _| (op == Op::Write).then(no_space));
    vmem.demote(&handle, DISK).await.unwrap();
    let stats = chain.settle().await;
    assert_eq!(stats.remote.used_bytes, CHUNK as u64, "{stats:#?}");
    let read = vmem.read(&handle).await.unwrap();
    assert!(read[..CHUNK] == bytes(2, 1, CHUNK)[..]);
    assert!(read[CHUNK..] == bytes(1, 1, 6 * CHUNK)[CHUNK..]);
}
