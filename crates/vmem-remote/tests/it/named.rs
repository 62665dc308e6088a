//! Whole stores whose names are in a bucket.
//!
//! Excluded: an acknowledged name that a store with an empty disk does not find, whole; a name of
//! which two stores are both told that their change is durable; and segments that go with the store
//! that put them.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use rand::Rng;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_remote::{BucketCatalog, RemoteOptions, RemoteTier};

use super::faulty::{Fault, Faulty, Op};
use super::{KIB, MIB, bytes, impatient, seed, stored};

const LEN: usize = 100 * KIB;
const HOMES: [MemoryTier; 3] = [MemoryTier::Host, MemoryTier::Disk, MemoryTier::Remote];

/// Host memory of 8 MiB, an empty disk of this many, and the names of this bucket.
async fn open(bucket: Arc<dyn ObjectStore>, disk: u64) -> VirtualMemory {
    open_with(bucket, disk, impatient()).await
}

pub(crate) async fn open_with(
    bucket: Arc<dyn ObjectStore>,
    disk: u64,
    options: RemoteOptions,
) -> VirtualMemory {
    open_to_collect(bucket, disk, options).await.0
}

/// The same, and what collects.
pub(crate) async fn open_to_collect(
    bucket: Arc<dyn ObjectStore>,
    disk: u64,
    options: RemoteOptions,
) -> (VirtualMemory, Arc<BucketCatalog>) {
    let (tier, names) = RemoteTier::open_with_names(bucket, options).await.unwrap();
    let config = VirtualMemoryConfig::builder()
        .host_capacity(8 << 20)
        .disk_capacity(disk)
        .io_driver(vmem_testkit::driver_under_test())
        .gpu(vmem::GpuSelection::Off)
        .wait_timeout(Duration::from_secs(30))
        .build()
        .unwrap();
    (vmem::open_over_names(config, tier, names.clone()).await.unwrap(), names)
}

fn memory() -> Arc<Faulty> {
    Faulty::new(Arc::new(InMemory::new()))
}

async fn found(vmem: &VirtualMemory, name: &str) -> Vec<u8> {
    let handle = vmem.open_named(name).await.unwrap();
    vmem.read(&handle).await.unwrap().to_vec()
}

async fn names(vmem: &VirtualMemory) -> Vec<String> {
    let all: Vec<_> = vmem.names("").try_collect().await.unwrap();
    all.into_iter().map(|entry| entry.name.to_string()).collect()
}

/// One store after the other, each with an empty disk.
pub(crate) async fn one_after_the_other(bucket: Arc<dyn ObjectStore>) {
    let first = open(bucket.clone(), 8 << 20).await;
    for (nth, home) in (0..).zip(HOMES) {
        first.put_named(&format!("{home}"), bytes(nth, LEN), home).await.unwrap();
    }
    let unnamed = first.put(bytes(9, LEN), MemoryTier::Remote).await.unwrap();
    first.set_metadata("host", b"beside it").await.unwrap();
    // It is killed: nobody closes it before the next one opens.
    let second = open(bucket.clone(), 8 << 20).await;
    assert_eq!(names(&second).await, ["disk", "host", "remote"]);
    for (nth, home) in (0..).zip(HOMES) {
        assert!(found(&second, &format!("{home}")).await == bytes(nth, LEN));
    }
    drop(unnamed);
    first.close().await.unwrap();
    let host = second.open_named("host").await.unwrap();
    let mut changed = bytes(0, LEN).to_vec();
    changed[70_000..70_010].fill(1);
    second.write_at(&host, 70_000, &[1; 10]).await.unwrap();
    second.flush(&host).await.unwrap();
    second.rename_named("disk", "moved").await.unwrap();
    second.remove_named("remote").await.unwrap();
    drop(host);
    second.close().await.unwrap();
    let third = open(bucket.clone(), 8 << 20).await;
    assert_eq!(names(&third).await, ["host", "moved"]);
    assert!(found(&third, "host").await == changed);
    assert!(found(&third, "moved").await == bytes(1, LEN));
    let entries: Vec<_> = third.names("host").try_collect().await.unwrap();
    assert_eq!(entries[0].metadata, b"beside it"[..]);
    third.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_found_by_stores_with_an_empty_disk() {
    one_after_the_other(memory()).await;
    let directory = tempfile::tempdir().unwrap();
    one_after_the_other(Arc::new(LocalFileSystem::new_with_prefix(directory.path()).unwrap()))
        .await;
}

/// Whether another store was faster.
fn is_lost(error: &VirtualMemoryError) -> bool {
    use VirtualMemoryError::{NameExists, NameNotFound, VersionChanged};
    matches!(error, VersionChanged { .. } | NameExists { .. } | NameNotFound { .. })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_name_by_two_stores_have_one_winner() {
    let bucket = memory();
    let one = open(bucket.clone(), 8 << 20).await;
    let other = open(bucket.clone(), 8 << 20).await;
    one.put_named("shared", bytes(1, LEN), MemoryTier::Host).await.unwrap();
    one.put_named("own", bytes(2, LEN), MemoryTier::Host).await.unwrap();
    let mine = one.open_named("shared").await.unwrap();
    let theirs = other.open_named("shared").await.unwrap();
    one.write(&mine, bytes(3, LEN)).await.unwrap();
    other.write(&theirs, bytes(4, LEN)).await.unwrap();
    one.flush(&mine).await.unwrap();
    let lost = other.flush(&theirs).await.unwrap_err();
    assert!(matches!(lost, VirtualMemoryError::VersionChanged { .. }), "{lost:?}");
    // The loser's handle keeps its bytes, without the name; the name is what the winner made it.
    assert!(other.read(&theirs).await.unwrap() == bytes(4, LEN));
    assert!(found(&other, "shared").await == bytes(3, LEN));
    let again = other.open_named("shared").await.unwrap();
    other.write(&again, bytes(5, LEN)).await.unwrap();
    other.flush(&again).await.unwrap();
    let removed = one.remove_named("shared").await.unwrap_err();
    assert!(is_lost(&removed), "{removed:?}");
    assert!(found(&one, "shared").await == bytes(5, LEN));
    drop((mine, theirs, again));
    other.close().await.unwrap();
    one.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losers_share_the_chunks_that_the_winner_kept() {
    let bucket = memory();
    let one = open(bucket.clone(), 8 << 20).await;
    let other = open(bucket.clone(), 8 << 20).await;
    let mine = one.put_named("shared", bytes(1, LEN), MemoryTier::Host).await.unwrap();
    let theirs = other.open_named("shared").await.unwrap();
    other.write_at(&theirs, 70_000, &[1; 10]).await.unwrap();
    other.flush(&theirs).await.unwrap();
    one.write_at(&mine, 70_000, &[2; 10]).await.unwrap();
    for _ in 0..2 {
        let lost = one.flush(&mine).await.unwrap_err();
        assert!(is_lost(&lost), "it is not durable: {lost:?}");
    }
    let mut expected = bytes(1, LEN).to_vec();
    expected[70_000..70_010].fill(1);
    let again = one.open_named("shared").await.unwrap();
    assert!(one.read(&again).await.unwrap() == expected);
    // The old version goes, with its extents of the same chunks.
    drop(mine);
    one.demote(&again, MemoryTier::Remote).await.unwrap();
    assert!(one.read(&again).await.unwrap() == expected);
    drop(again);
    one.remove_named("shared").await.unwrap();
    let gone = one.open_named("shared").await;
    assert!(matches!(gone, Err(VirtualMemoryError::NameNotFound { .. })), "{gone:?}");
    drop(theirs);
    other.close().await.unwrap();
    one.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_another_store_moved_are_found_again() {
    let bucket = memory();
    let one = open(bucket.clone(), 8 << 20).await;
    let other = open(bucket.clone(), 8 << 20).await;
    // All of a segment of the first store's own is out of use, and comes into use again.
    drop(one.put_named("before", bytes(1, LEN), MemoryTier::Host).await.unwrap());
    other.rename_named("before", "after").await.unwrap();
    let removed = one.remove_named("before").await.unwrap_err();
    assert!(is_lost(&removed), "{removed:?}");
    for _ in 0..3 {
        let handle = one.open_named("after").await.unwrap();
        one.demote(&handle, MemoryTier::Remote).await.unwrap();
        assert!(one.read(&handle).await.unwrap() == bytes(1, LEN));
    }
    one.remove_named("after").await.unwrap();
    // A name that is in memory, and that another store has put anew.
    drop(one.put_named("both", bytes(2, LEN), MemoryTier::Host).await.unwrap());
    drop(other.open_named("both").await.unwrap());
    other.put_named("both", bytes(3, LEN), MemoryTier::Host).await.unwrap();
    let lost = one.put_named("both", bytes(4, LEN), MemoryTier::Host).await.unwrap_err();
    assert!(is_lost(&lost), "{lost:?}");
    one.put_named("both", bytes(4, LEN), MemoryTier::Host).await.unwrap();
    // A conflict at the one name of a rename takes nothing from the other.
    let from = one.put_named("from", bytes(5, LEN), MemoryTier::Host).await.unwrap();
    drop(one.put_named("to", bytes(8, LEN), MemoryTier::Host).await.unwrap());
    drop(other.open_named("to").await.unwrap());
    other.put_named("to", bytes(6, LEN), MemoryTier::Host).await.unwrap();
    one.write(&from, bytes(7, LEN)).await.unwrap();
    let lost = one.rename_named("from", "to").await.unwrap_err();
    assert!(is_lost(&lost), "{lost:?}");
    one.flush(&from).await.unwrap();
    let third = open(bucket.clone(), 8 << 20).await;
    for (name, version) in [("both", 4), ("from", 7), ("to", 6)] {
        assert!(found(&third, name).await == bytes(version, LEN), "{name}");
    }
    drop(from);
    for vmem in [third, other, one] {
        vmem.close().await.unwrap();
    }
}

/// Mechanism: changes that wait for a commit shared the next one. Effect: a name that another store
/// had changed failed all of them. Fix: each name is a commit of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_of_a_name_fail_no_other_name() {
    let bucket = memory();
    let one = open(bucket.clone(), 8 << 20).await;
    let mut handles = Vec::new();
    for nth in 0..20 {
        let name = format!("{nth}");
        handles.push(one.put_named(&name, bytes(nth, 5000), MemoryTier::Host).await.unwrap());
    }
    let other = open(bucket.clone(), 8 << 20).await;
    for nth in 15..20 {
        let theirs = other.open_named(&format!("{nth}")).await.unwrap();
        other.write(&theirs, bytes(100 + nth, 5000)).await.unwrap();
        other.flush(&theirs).await.unwrap();
    }
    for (nth, handle) in (200..).zip(&handles) {
        one.write(handle, bytes(nth, 5000)).await.unwrap();
    }
    // While the first is committed the others come to wait.
    bucket.fail(|op| (op == Op::Put).then_some(Fault::Slow(Duration::from_millis(50))));
    let flushes = futures::future::join_all(handles.iter().map(|handle| one.flush(handle))).await;
    bucket.heal();
    let is_right = |(nth, flushed): (usize, &Result<_, VirtualMemoryError>)| match flushed {
        Ok(()) => nth < 15,
        Err(error) => nth >= 15 && is_lost(error),
    };
    assert!(flushes.iter().enumerate().all(is_right), "{flushes:?}");
    let third = open(bucket.clone(), 8 << 20).await;
    for nth in 0..20 {
        let version = if nth < 15 { 200 + nth } else { 100 + nth };
        assert!(found(&third, &format!("{nth}")).await == bytes(version, 5000));
    }
    drop(handles);
    for vmem in [third, other, one] {
        vmem.close().await.unwrap();
    }
}

/// What a store leaves behind when it closes: names, and the segments to which they lead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segments_without_names_go_with_their_store() {
    let bucket = memory();
    let vmem = open(bucket.clone(), MIB as u64).await;
    let mut unnamed = Vec::new();
    for nth in 0..60 {
        unnamed.push(vmem.put(bytes(nth, LEN), MemoryTier::Remote).await.unwrap());
    }
    vmem.put_named("kept", bytes(100, LEN), MemoryTier::Remote).await.unwrap();
    drop(unnamed);
    vmem.close().await.unwrap();
    let left = stored(&*bucket).await;
    assert!(left.1 < 3 * MIB as u64, "one name, and its segment: {left:?}");
    let again = open(bucket.clone(), MIB as u64).await;
    assert!(found(&again, "kept").await == bytes(100, LEN));
    again.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_survive_faults_of_the_bucket_and_the_loss_of_the_disk() {
    survive_faults(memory()).await;
}

/// A working set of four times the disk, named, under faults: what was flushed is found, whole.
pub(crate) async fn survive_faults(bucket: Arc<Faulty>) {
    const COUNT: usize = 40;
    let seed = seed();
    let vmem = open(bucket.clone(), MIB as u64).await;
    let mut rng = seed.fork("faults").rng();
    bucket.fail(move |op| {
        let fault = [Fault::Refused, Fault::Lost, Fault::Slow(Duration::from_millis(3))];
        let is_faulty = op != Op::List && rng.random_bool(0.1);
        is_faulty.then(|| fault[rng.random_range(0..3)])
    });
    let mut rng = seed.fork("calls").rng();
    let mut handles: Vec<Option<VMemHandle>> = vec![None; COUNT];
    // What may be found of each, the last acknowledged first.
    let mut may_be: Vec<Vec<Option<u64>>> = vec![vec![None]; COUNT];
    for turn in 0..300_u64 {
        let at = rng.random_range(0..COUNT);
        let name = format!("{at}");
        let version = 1000 + turn;
        let outcome = match &handles[at] {
            None => {
                let home = HOMES[rng.random_range(0..3)];
                let put = vmem.put_named(&name, bytes(version, LEN), home).await;
                put.map(|handle| handles[at] = Some(handle))
            }
            Some(handle) => match vmem.write(handle, bytes(version, LEN)).await {
                Ok(()) => vmem.flush(handle).await,
                Err(error) => Err(error),
            },
        };
        match outcome {
            Ok(()) => may_be[at] = vec![Some(version)],
            Err(_) => may_be[at].push(Some(version)),
        }
        let other = rng.random_range(0..COUNT);
        if let Some(handle) = &handles[other]
            && let Ok(read) = vmem.read(handle).await
        {
            let is_one = may_be[other].iter().flatten().any(|&one| read == bytes(one, LEN));
            assert!(is_one, "{other} in turn {turn}");
        }
    }
    bucket.heal();
    // Killed.
    let again = open(bucket.clone(), MIB as u64).await;
    let acknowledged = may_be.iter().filter(|may| may.len() == 1 && may[0].is_some()).count();
    assert!(acknowledged > COUNT / 2, "{acknowledged} of {COUNT} are known");
    for (at, may_be) in may_be.iter().enumerate() {
        let found = match again.open_named(&format!("{at}")).await {
            Ok(handle) => Some(again.read(&handle).await.unwrap()),
            Err(VirtualMemoryError::NameNotFound { .. }) => None,
            Err(error) => panic!("{at}: {error:?}"),
        };
        let is_one = may_be.iter().any(|one| match (one, &found) {
            (Some(version), Some(read)) => *read == bytes(*version, LEN),
            (one, found) => one.is_none() && found.is_none(),
        });
        assert!(is_one, "{at}: none of {may_be:?}");
    }
    again.close().await.unwrap();
    drop(handles);
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_with_names_of_its_own_is_refused_above_names() {
    let directory = tempfile::tempdir().unwrap();
    let config = || {
        VirtualMemoryConfig::builder()
            .host_capacity(8 << 20)
            .disk_capacity(8 << 20)
            .disk_path(directory.path().join("store"))
            .gpu(vmem::GpuSelection::Off)
            .build()
            .unwrap()
    };
    let own = vmem::open(config()).await.unwrap();
    own.put_named("mine", b"bytes", MemoryTier::Disk).await.unwrap();
    own.close().await.unwrap();
    let options = RemoteOptions::default();
    let (tier, names) = RemoteTier::open_with_names(memory(), options).await.unwrap();
    let refused = vmem::open_over_names(config(), tier, names).await;
    let is_it =
        matches!(&refused, Err(VirtualMemoryError::InvalidConfig { field: "disk_path", .. }));
    assert!(is_it, "{refused:?}");
    let own = vmem::open(config()).await.unwrap();
    assert!(found(&own, "mine").await == b"bytes");
    own.close().await.unwrap();
}
