//! Reads of what is resident already, and of sets in any form.
//!
//! Excluded: a look that waits, counts as a miss or starts a read; sets whose bytes are in another
//! order than their handles; one that never ends, or brings the bytes of another object, since some
//! of it leaves host memory while the rest is loaded. Noticed by figures, bytes and a bound.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vmem::{VMemHandle, VirtualMemory};

use crate::support::{self, DISK, HOST, KIB, bytes};

const LEN: usize = 40 * KIB;

async fn objects(vmem: &VirtualMemory, count: u64) -> BTreeMap<u64, VMemHandle> {
    let mut objects = BTreeMap::new();
    for n in 0..count {
        objects.insert(n, vmem.put(bytes(n, 1, LEN), HOST).await.unwrap());
    }
    objects
}

#[tokio::test]
async fn try_read_finds_what_is_in_host_memory_and_starts_nothing() {
    let (vmem, _driver) = support::open(1024 * KIB, 4096 * KIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    let empty = vmem.put([], HOST).await.unwrap();
    assert_eq!(vmem.try_read(&handle).unwrap(), bytes(1, 1, LEN));
    assert_eq!(
        vmem.try_read(&handle).unwrap().as_ptr(),
        vmem.read(&handle).await.unwrap().as_ptr()
    );
    assert_eq!(vmem.try_read(&empty).unwrap().len(), 0);
    vmem.demote(&handle, DISK).await.unwrap();
    let before = vmem.stats();
    assert!(vmem.try_read(&handle).is_none());
    tokio::time::sleep(Duration::from_millis(5)).await;
    let after = vmem.stats();
    assert_eq!((after.misses, after.disk.hits), (before.misses, before.disk.hits));
    assert!(!vmem.residency(&handle).unwrap().host);
    drop(vmem.read(&handle).await.unwrap());
    let clone = handle.clone();
    vmem.free(handle).await.unwrap();
    assert!(vmem.try_read(&clone).is_none(), "it was freed");
    let other = vmem.clone();
    vmem.close().await.unwrap();
    assert!(other.try_read(&empty).is_none(), "the store is closed");
}

#[tokio::test]
async fn sets_of_any_form_are_read_in_the_order_of_their_handles() {
    let (vmem, _driver) = support::open(1024 * KIB, 4096 * KIB, |builder| builder);
    let objects = objects(&vmem, 6).await;
    let reader = vmem.clone();
    let all = objects.clone();
    let in_task = tokio::spawn(async move { reader.read_many(all.values()).await });
    for (n, read) in in_task.await.unwrap().unwrap().into_iter().enumerate() {
        assert_eq!(read, bytes(n as u64, 1, LEN));
    }
    // Some are on disk, and one comes twice.
    for n in [1, 4] {
        vmem.demote(&objects[&n], DISK).await.unwrap();
    }
    let order = [4, 0, 1, 5, 1, 3, 0, 4];
    let read = vmem.read_many(order.iter().map(|n| &objects[n])).await.unwrap();
    assert_eq!(read.len(), order.len());
    for (n, read) in order.into_iter().zip(read) {
        assert_eq!(read, bytes(n, 1, LEN), "object {n}");
    }
    let array = [objects[&2].clone(), objects[&3].clone()];
    assert_eq!(vmem.read_many(&array).await.unwrap()[1], bytes(3, 1, LEN));
    assert_eq!(vmem.read_many(&array[..1]).await.unwrap()[0], bytes(2, 1, LEN));
    assert!(vmem.read_many(&[]).await.unwrap().is_empty());
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_whose_objects_leave_while_the_rest_comes_up_end() {
    // Four objects fit; eight readers want three each.
    let (vmem, _driver) = support::open(4 * LEN + 8 * KIB, 4096 * KIB, |builder| builder);
    let objects = objects(&vmem, 8).await;
    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..8 {
        let vmem = vmem.clone();
        let objects = objects.clone();
        readers.spawn(async move {
            let mut rng = SmallRng::seed_from_u64(support::seed() + reader);
            for _ in 0..40 {
                let mut set: Vec<u64> = (0..8).collect();
                set.shuffle(&mut rng);
                set.truncate(rng.random_range(2..=3));
                let read = vmem.read_many(set.iter().map(|n| &objects[n])).await.unwrap();
                let distinct: HashSet<_> = set.iter().collect();
                assert_eq!((read.len(), distinct.len()), (set.len(), set.len()));
                for (n, read) in set.into_iter().zip(read) {
                    assert_eq!(read, bytes(n, 1, LEN), "object {n}");
                }
            }
        });
    }
    let all = async {
        while let Some(ended) = readers.join_next().await {
            ended.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("no set waits for another");
    vmem.close().await.unwrap();
}
