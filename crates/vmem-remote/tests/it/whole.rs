//! A whole store over a real disk and an object store below it.

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use tempfile::TempDir;
use vmem::backend::Tier;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_remote::RemoteTier;

use super::faulty::{Fault, Faulty, Op};
use super::{KIB, bytes, emptied, impatient, seed, stored};

const HOST: u64 = 8 << 20;
const DISK: u64 = 8 << 20;
const LEN: usize = 100 * KIB;

struct Whole {
    vmem: VirtualMemory,
    remote: Arc<RemoteTier>,
    _directory: TempDir,
}

/// Host memory and a disk of 8 MiB each, and this bucket below them.
async fn open(bucket: Arc<dyn ObjectStore>) -> Whole {
    let directory = tempfile::tempdir().unwrap();
    let remote = RemoteTier::open(bucket, impatient()).await.unwrap();
    let config = VirtualMemoryConfig::builder()
        .host_capacity(HOST)
        .disk_capacity(DISK)
        .disk_path(directory.path().join("store"))
        .io_driver(vmem_testkit::driver_under_test())
        .gpu(vmem::GpuSelection::Off)
        .wait_timeout(Duration::from_secs(30))
        .build()
        .unwrap();
    let vmem = vmem::open_over(config, remote.clone()).await.unwrap();
    Whole { vmem, remote, _directory: directory }
}

/// Four times what the disk holds, written, read in another order, rewritten in part, and freed.
async fn four_times_the_disk(bucket: Arc<dyn ObjectStore>) {
    let seed = seed();
    let whole = open(bucket.clone()).await;
    let count = 4 * DISK / LEN as u64;
    let tasks = (0..4).map(|task| {
        let vmem = whole.vmem.clone();
        tokio::spawn(async move {
            let mut rng = seed.fork_nth("task", task).rng();
            let mut held: Vec<(VMemHandle, u64)> = Vec::new();
            for n in 0..count / 4 {
                let name = task << 32 | n;
                let home = [MemoryTier::Host, MemoryTier::Disk][rng.random_range(0..2)];
                held.push((vmem.put(bytes(name, LEN), home).await.unwrap(), name));
            }
            held.shuffle(&mut rng);
            for (n, (handle, name)) in held.iter_mut().enumerate() {
                assert!(vmem.read(handle).await.unwrap() == bytes(*name, LEN), "{task} {n}");
                if n.is_multiple_of(3) {
                    *name += 1 << 40;
                    vmem.write(handle, bytes(*name, LEN)).await.unwrap();
                }
            }
            for (handle, name) in &held {
                assert!(vmem.read(handle).await.unwrap() == bytes(*name, LEN), "{task}");
            }
            held
        })
    });
    let held = futures::future::join_all(tasks).await;
    let stats = whole.vmem.stats();
    assert!(stats.remote.objects > count / 4, "{stats:#?}");
    assert!(stats.disk.peak_bytes <= DISK && stats.host.peak_bytes <= HOST, "{stats:#?}");
    assert!(stats.remote.hits > 0, "{stats:#?}");
    let requests = whole.remote.stats();
    println!("{requests:?}");
    drop(held.into_iter().map(Result::unwrap).collect::<Vec<_>>());
    emptied(&*bucket).await;
    assert_eq!(whole.remote.usage().used_bytes, 0);
    let kept = whole.vmem.put(bytes(1, LEN), MemoryTier::Remote).await.unwrap();
    assert!(stored(&*bucket).await.0 > 0);
    drop(kept);
    whole.vmem.close().await.unwrap();
    assert_eq!(stored(&*bucket).await, (0, 0), "a close leaves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn working_set_of_four_disks_is_served_over_memory() {
    four_times_the_disk(Arc::new(InMemory::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn working_set_of_four_disks_is_served_over_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = LocalFileSystem::new_with_prefix(directory.path()).unwrap();
    four_times_the_disk(Arc::new(bucket)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn working_set_of_four_disks_is_served_past_faults() {
    let bucket = Faulty::new(Arc::new(InMemory::new()));
    let mut dice = seed().fork("faults").rng();
    bucket.fail(move |op| {
        let kinds = [Fault::Refused, Fault::Lost, Fault::Cut, Fault::Shifted];
        let kinds = if op == Op::Get { &kinds[..] } else { &kinds[..2] };
        dice.random_bool(0.1).then(|| *kinds.choose(&mut dice).unwrap())
    });
    four_times_the_disk(bucket.clone()).await;
    assert!(bucket.hit() > 10, "{} faults", bucket.hit());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bucket_that_fails_concerns_its_objects_alone() {
    let bucket = Faulty::new(Arc::new(InMemory::new()));
    let Whole { vmem, remote, _directory } = open(bucket.clone()).await;
    let far = vmem.put(bytes(1, LEN), MemoryTier::Remote).await.unwrap();
    let near = vmem.put(bytes(2, LEN), MemoryTier::Disk).await.unwrap();
    bucket.fail(|_| Some(Fault::Refused));
    for _ in 0..4 {
        let refused = vmem.read(&far).await;
        assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
    }
    assert!(remote.stats().is_circuit_open);
    // The disk and host memory serve as before, to the last byte that they have.
    let mut held = Vec::new();
    for name in 10..70 {
        held.push((vmem.put(bytes(name, LEN), MemoryTier::Host).await.unwrap(), name));
        assert!(vmem.read(&near).await.unwrap() == bytes(2, LEN));
    }
    for (handle, name) in &held {
        assert!(vmem.read(handle).await.unwrap() == bytes(*name, LEN));
    }
    let refused = vmem.demote(&near, MemoryTier::Remote).await;
    assert!(matches!(refused, Err(VirtualMemoryError::Io { .. })), "{refused:?}");
    assert!(vmem.read(&near).await.unwrap() == bytes(2, LEN));
    bucket.heal();
    let mut read = vmem.read(&far).await;
    for _ in 0..200 {
        if read.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        read = vmem.read(&far).await;
    }
    assert!(read.unwrap() == bytes(1, LEN), "it recovers by itself");
    drop((far, near, held));
    vmem.close().await.unwrap();
    emptied(&*bucket).await;
}

/// Excluded: demotions that wait for a bucket keep the staging memory that reads from disk need.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_from_disk_pass_demotions_without_an_answer() {
    let bucket = Faulty::new(Arc::new(InMemory::new()));
    let Whole { vmem, remote, _directory } = open(bucket.clone()).await;
    let mut near = Vec::new();
    for name in 0..40 {
        near.push(vmem.put(bytes(name, LEN), MemoryTier::Disk).await.unwrap());
    }
    bucket.fail(|_| Some(Fault::Silent));
    let demoting: Vec<_> = near[..20]
        .iter()
        .map(|handle| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            tokio::spawn(async move { vmem.demote(&handle, MemoryTier::Remote).await })
        })
        .collect();
    while bucket.hit() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for (name, handle) in (20..).zip(&near[20..]) {
        let mut buf = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut buf).await.unwrap();
        assert!(buf == bytes(name, LEN));
    }
    assert!(!demoting.iter().any(|demotion| demotion.is_finished()), "all wait for the bucket");
    for demotion in demoting {
        let refused = demotion.await.unwrap();
        assert!(refused.is_err(), "{refused:?}");
    }
    for (name, handle) in (0..).zip(&near[..20]) {
        assert!(vmem.read(handle).await.unwrap() == bytes(name, LEN));
    }
    assert_eq!(remote.stats().buffered_bytes, 0);
}
