//! Named objects where a sync or the catalog fails, and where callers go away.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::TryStreamExt;
use vmem::backend::{Answer, Catalog, CatalogChange};
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryError};
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{Errno, Fault, FaultPlan, OpKind, When, exhaust_with};

use super::failing::{Place, Slow, open, open_where, open_with};

fn is_eio(error: &VirtualMemoryError) -> bool {
    let VirtualMemoryError::Io { source, .. } = error else { return false };
    source.raw_os_error() == io::Error::from(Errno::IO).raw_os_error()
}

async fn byte_of(vmem: &VirtualMemory, name: &str) -> u8 {
    let bytes = vmem.read(&vmem.open_named(name).await.unwrap()).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{name} is torn");
    bytes[0]
}

/// After the failure nothing is acknowledged, everything is readable, and the next start has what
/// was acknowledged before.
async fn poisons(place: Place, fail: impl FnOnce(&Place)) {
    let vmem = &place.vmem;
    let kept = vmem.put_named("kept", vec![1; 100_000], MemoryTier::Host).await.unwrap();
    let other = vmem.put_named("other", [1; 100], MemoryTier::Host).await.unwrap();
    assert!(!vmem.stats().commits_stopped);
    fail(&place);
    vmem.write(&kept, vec![2; 100_000]).await.unwrap();
    let failed = vmem.flush(&kept).await.unwrap_err();
    assert!(is_eio(&failed), "{failed:?}");
    assert!(vmem.stats().commits_stopped);
    let faults = vmem.tier_stats(MemoryTier::Disk).faults;
    assert_eq!(faults, 1, "a sync that fails is a fault of the disk");
    // The cause has gone; what it hit is still not known to be durable.
    place.disk.clear();
    place.catalog_fails.sync.store(false, Ordering::SeqCst);
    for refused in [
        vmem.flush(&kept).await.err(),
        vmem.put_named("new", [3; 10], MemoryTier::Disk).await.err(),
        vmem.rename_named("other", "another").await.err(),
        vmem.remove_named("other").await.err(),
    ] {
        let refused = refused.expect("nothing is acknowledged any more");
        assert!(is_eio(&refused), "{refused:?}");
        assert!(refused.to_string().contains("opened again"), "{refused}");
    }
    vmem.write(&other, [2; 100]).await.unwrap();
    assert_eq!((byte_of(vmem, "kept").await, byte_of(vmem, "other").await), (2, 2));
    let unnamed = vmem.put(vec![5; 100_000], MemoryTier::Disk).await.unwrap();
    assert_eq!(vmem.read(&unnamed).await.unwrap()[..], [5; 100_000]);
    drop((kept, other, unnamed));
    let tape = place.tape.clone();
    let Err(VirtualMemoryError::NotFlushed { names, source }) = place.vmem.close().await else {
        panic!("what was not flushed is named");
    };
    assert_eq!(names.iter().map(|name| &**name).collect::<Vec<_>>(), ["kept", "other"]);
    assert!(is_eio(&source));
    let again = open(tape.image(), true).vmem;
    let kept = byte_of(&again, "kept").await;
    assert!(kept == 1 || kept == 2, "whole, and one of the two that it may be");
    assert_eq!(byte_of(&again, "other").await, 1);
    assert!(again.open_named("new").await.is_err());
    again.close().await.unwrap();
}

#[tokio::test]
async fn a_failed_sync_of_the_data_is_not_retried() {
    for buffered in [false, true] {
        let place = open(Image::default(), buffered);
        if buffered {
            // There the write itself waits for the sync, and fails: nothing was taken for written.
            let vmem = &place.vmem;
            let kept = vmem.put_named("kept", vec![1; 1000], MemoryTier::Host).await.unwrap();
            vmem.write(&kept, vec![2; 1000]).await.unwrap();
            let fault = Fault::Error(Errno::IO);
            place.disk.set(FaultPlan::new().on(OpKind::Sync, When::Nth(1), fault));
            assert!(is_eio(&vmem.flush(&kept).await.unwrap_err()));
            vmem.flush(&kept).await.unwrap();
            drop(kept);
            let tape = place.tape.clone();
            place.vmem.close().await.unwrap();
            let again = open(tape.image(), true).vmem;
            assert_eq!(byte_of(&again, "kept").await, 2);
            continue;
        }
        poisons(place, |place| {
            let fault = Fault::Error(Errno::IO);
            place.disk.set(FaultPlan::new().on(OpKind::Sync, When::Nth(1), fault));
        })
        .await;
    }
}

#[tokio::test]
async fn a_failed_commit_is_not_retried() {
    let place = open(Image::default(), true);
    poisons(place, |place| place.catalog_fails.sync.store(true, Ordering::SeqCst)).await;
}

/// Nothing of it was made durable, nothing is lost, and when there is space again it goes on.
#[tokio::test]
async fn a_full_disk_under_the_catalog_is_recovered_from() {
    for all_writes in [false, true] {
        full_under_the_catalog(all_writes).await;
    }
}

async fn full_under_the_catalog(all_writes: bool) {
    let Place { vmem, tape, catalog_fails, .. } = open_where(Image::default(), false, all_writes);
    let kept = vmem.put_named("kept", vec![1; 100_000], MemoryTier::Host).await.unwrap();
    let used = vmem.stats().disk.used_bytes;
    catalog_fails.space.store(true, Ordering::SeqCst);
    for byte in 2..5 {
        vmem.write(&kept, vec![byte; 100_000]).await.unwrap();
        for refused in [
            vmem.flush(&kept).await.err(),
            vmem.put_named("new", vec![3; 10], MemoryTier::Disk).await.err(),
            vmem.rename_named("kept", "another").await.err(),
            vmem.remove_named("kept").await.err(),
        ] {
            let Some(VirtualMemoryError::Io { source, .. }) = &refused else {
                panic!("{refused:?}");
            };
            let shut = all_writes && source.kind() == io::ErrorKind::Other;
            assert!(shut || source.kind() == io::ErrorKind::StorageFull, "{refused:?}");
        }
        assert_eq!(byte_of(&vmem, "kept").await, byte);
    }
    catalog_fails.space.store(false, Ordering::SeqCst);
    vmem.flush(&kept).await.unwrap();
    vmem.put_named("new", vec![3; 10], MemoryTier::Disk).await.unwrap();
    // Of one commit it was not known whether it was made: what it would have led to is kept until
    // the next start. The others were refused before they began.
    let in_doubt = if all_writes { used } else { 0 };
    let kept_for = vmem.stats().disk.used_bytes - used - 512;
    assert!(kept_for <= in_doubt, "{kept_for} bytes are kept in vain");
    drop(kept);
    vmem.close().await.unwrap();
    let again = open(tape.image(), false).vmem;
    assert_eq!((byte_of(&again, "kept").await, byte_of(&again, "new").await), (4, 3));
    assert_eq!(again.stats().disk.used_bytes, used + 512);
    again.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_share_commits() {
    let Place { vmem, .. } = open(Image::default(), false);
    let tasks = (0..64_u8).map(|task| {
        let vmem = vmem.clone();
        tokio::spawn(async move {
            let name = format!("{task}");
            let handle = vmem.put_named(&name, vec![0; 4096], MemoryTier::Host).await.unwrap();
            for round in 0..20 {
                vmem.write(&handle, vec![round; 4096]).await.unwrap();
                vmem.flush(&handle).await.unwrap();
            }
            // Nothing to flush, nothing to commit.
            vmem.flush(&handle).await.unwrap();
        })
    });
    for task in futures::future::join_all(tasks).await {
        task.unwrap();
    }
    let stats = vmem.stats();
    println!("{} changes in {} commits", stats.named_changes, stats.commits);
    assert_eq!(stats.named_changes, 64 * 21);
    assert!(stats.commits * 4 < stats.named_changes, "{} commits", stats.commits);
    vmem.close().await.unwrap();
}

/// Callers that go away at every point: each change happens whole or not at all, and nothing leaks.
#[tokio::test]
async fn dropped_at_every_point() {
    let Place { vmem, tape, .. } = open(Image::default(), false);
    let vmem = &vmem;
    let keep = vmem.put_named("a", vec![1; 70_000], MemoryTier::Host).await.unwrap();
    exhaust_with(
        |polls| async move {
            let byte = polls as u8 + 1;
            vmem.put_named("a", vec![byte; 70_000], MemoryTier::Disk).await.unwrap();
            vmem.set_metadata("a", &[byte]).await.unwrap();
            let handle = vmem.open_named("a").await.unwrap();
            vmem.write(&handle, vec![byte; 70_000]).await.unwrap();
            vmem.flush(&handle).await.unwrap();
            drop(handle);
            vmem.rename_named("a", "b").await.unwrap();
            drop(vmem.allocate_named("c", 10, MemoryTier::Host).await);
            vmem.flush_all().await.unwrap();
            vmem.rename_named("b", "a").await.unwrap();
            vmem.remove_named("c").await.unwrap();
        },
        async |_polls| {
            // What was started goes on without its caller.
            while !quiet(vmem).await {}
            // On a busy machine a change may go on still: one that comes later waits for its turn.
            for name in ["a", "b", "c"] {
                drop(vmem.set_metadata(name, b"later").await);
            }
            for leftover in ["b", "c"] {
                if vmem.open_named(leftover).await.is_ok() {
                    if leftover == "b" && vmem.open_named("a").await.is_err() {
                        vmem.rename_named("b", "a").await.unwrap();
                    } else {
                        vmem.remove_named(leftover).await.unwrap();
                    }
                }
            }
            byte_of(vmem, "a").await;
        },
    )
    .await;
    drop(keep);
    let used = vmem.stats().disk.used_bytes;
    assert_eq!(used, 70_144, "the one name that is left");
    assert_eq!(vmem.stats().objects, 1);
    vmem.clone().close().await.unwrap();
    let again = open(tape.image(), false).vmem;
    let names: Vec<_> = again.names("").try_collect().await.unwrap();
    assert_eq!(names.len(), 1);
    assert_eq!(again.stats().disk.used_bytes, used);
    byte_of(&again, "a").await;
}

/// Whether nothing was committed for a while.
async fn quiet(vmem: &VirtualMemory) -> bool {
    let before = (vmem.stats().commits, vmem.stats().host_to_disk_bytes);
    tokio::time::sleep(Duration::from_millis(10)).await;
    before == (vmem.stats().commits, vmem.stats().host_to_disk_bytes)
}

/// A catalog of which the rows of one name are damaged.
#[derive(Debug)]
struct Picky(NameCatalog);

impl Catalog for Picky {
    vmem_testkit::hand_on!(
        attempts,
        is_poisoned,
        is_shut,
        find,
        record,
        names,
        time,
        snapshot,
        next_id,
        close
    );

    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        let of_bad = |change: &CatalogChange| match change {
            CatalogChange::Put { name, .. } => &**name == "bad",
            _ => false,
        };
        if changes.iter().any(of_bad) {
            let path = "catalog".into();
            let reason = "its row is not what was written".into();
            return Box::pin(async { Err(VirtualMemoryError::Damaged { path, reason }) });
        }
        self.0.commit(changes)
    }
}

/// A damaged name fails its own changes, and no others that were to be committed with them.
#[tokio::test]
async fn damage_of_one_name_is_the_matter_of_one() {
    let vmem = open_with(Duration::from_secs(30), Picky);
    let puts = ["a", "bad", "b", "c"].map(|name| vmem.put_named(name, b"bytes", MemoryTier::Host));
    let outcomes = futures::future::join_all(puts).await;
    for (nth, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Err(error) => assert!(nth == 1, "{nth}: {error:?}"),
            Ok(_) => assert!(nth != 1),
        }
    }
    assert!(matches!(outcomes[1], Err(VirtualMemoryError::Damaged { .. })));
    drop(outcomes);
    vmem.close().await.unwrap();
}

/// Changes of one name that wait for each other have one deadline each, from when they were asked
/// for; so `close` ends soon after the one that is under way, however many there are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_wait_in_line_do_not_add_up() {
    let held = Arc::new(tokio::sync::Semaphore::new(1));
    let wait = Duration::from_millis(500);
    let vmem = open_with(wait, |catalog| Slow(catalog, held.clone(), Duration::ZERO));
    drop(vmem.put_named("a", [1; 100], MemoryTier::Host).await.unwrap());
    let commit = held.acquire().await.unwrap();
    // The first is under way, the others wait for it.
    for _ in 0..40 {
        let change = vmem.set_metadata("a", b"m");
        let left = tokio::time::timeout(Duration::from_millis(5), change).await;
        assert!(left.is_err(), "{left:?}");
    }
    let closing = tokio::spawn(vmem.close());
    tokio::time::sleep(wait * 2).await;
    drop(commit);
    let begun = std::time::Instant::now();
    closing.await.unwrap().unwrap();
    // Forty deadlines are twenty seconds.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
