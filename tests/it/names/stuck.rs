//! Changes of names where a commit does not end, or takes its time.
//!
//! Excluded: a caller that waits for a dead disk for ever, and one that is given up although its
//! change goes on.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryError};

use vmem::backend::{Answer, Catalog, CatalogChange};
use vmem_io::catalog::NameCatalog;

use super::failing::{Slow, open_with};

/// What does not come by then does not come.
const HANGS: Duration = Duration::from_secs(60);
const WAIT: Duration = Duration::from_millis(250);

fn open(commit: Duration) -> (VirtualMemory, Arc<Semaphore>) {
    let permits = Arc::new(Semaphore::new(1));
    (open_with(WAIT, |catalog| Slow(catalog, permits.clone(), commit)), permits)
}

fn is_late(error: &VirtualMemoryError) -> bool {
    matches!(error, VirtualMemoryError::TimedOut { .. }) && error.is_retryable()
}

/// Each kind of change ends with an error that says so; what was under way is made once the disk
/// goes on, whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_end_in_time_where_a_commit_does_not() {
    let (vmem, commits) = open(Duration::ZERO);
    let kept = vmem.put_named("kept", vec![1; 1000], MemoryTier::Host).await.unwrap();
    let held = commits.acquire().await.unwrap();
    vmem.write(&kept, vec![2; 1000]).await.unwrap();
    let in_time = tokio::time::timeout(HANGS, async {
        let error = vmem.put_named("new", vec![3; 1000], MemoryTier::Disk).await.unwrap_err();
        assert!(error.to_string().contains("may still be made"), "{error}");
        for error in [
            error,
            vmem.flush(&kept).await.unwrap_err(),
            vmem.set_metadata("kept", b"m").await.unwrap_err(),
            vmem.rename_named("kept", "other").await.unwrap_err(),
            vmem.remove_many(&["kept"]).await.unwrap_err(),
        ] {
            assert!(is_late(&error), "{error:?}");
        }
        match vmem.flush_all().await.unwrap_err() {
            VirtualMemoryError::NotFlushed { source, .. } => assert!(is_late(&source)),
            error => assert!(is_late(&error), "{error:?}"),
        }
        // What needs no commit does not care.
        assert_eq!(vmem.read(&kept).await.unwrap()[..], [2; 1000]);
    });
    in_time.await.expect("each wait has a deadline");
    drop(held);
    let goes_on = async {
        while vmem.flush(&kept).await.is_err() {}
        loop {
            match vmem.open_named("new").await {
                Ok(new) => break vmem.read(&new).await.unwrap(),
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let new = tokio::time::timeout(HANGS, goes_on).await.expect("the disk goes on");
    assert_eq!(new[..], [3; 1000]);
    drop(kept);
    vmem.close().await.unwrap();
}

/// Many changes, which take several times as long as any wait may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_go_on_are_waited_for() {
    const NAMES: usize = 1000;
    let (vmem, _commits) = open(WAIT / 2);
    let names: Vec<_> = (0..NAMES).map(|n| format!("name/{n}")).collect();
    let puts = names.iter().map(|name| vmem.put_named(name, [7; 10], MemoryTier::Disk));
    for put in futures::future::join_all(puts).await {
        drop(put.unwrap());
    }
    let before = vmem.stats().commits;
    let removed = vmem.remove_many(&names).await.unwrap();
    let commits = vmem.stats().commits - before;
    assert_eq!(removed, NAMES as u64);
    assert!(commits > 2, "{commits} commits of half a wait are no test");
    vmem.close().await.unwrap();
}

/// A catalog that commits each name by itself; that of `slow` needs a permit.
#[derive(Debug)]
struct Apart(NameCatalog, Arc<Semaphore>);

impl Catalog for Apart {
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

    fn shares_commits(&self) -> bool {
        false
    }

    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        let is_of_slow = |change: &CatalogChange| match change {
            CatalogChange::Put { name, .. } => &**name == "slow",
            _ => false,
        };
        let permits = self.1.clone();
        let is_slow = changes.iter().any(is_of_slow);
        let commit = self.0.commit(changes);
        Box::pin(async move {
            if is_slow {
                drop(permits.acquire().await);
            }
            commit.await
        })
    }
}

/// Where each name has a commit of its own, one that does not end holds up no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_beside_each_other_do_not_wait_for_the_slowest() {
    let permits = Arc::new(Semaphore::new(1));
    let vmem = open_with(HANGS, |catalog| Apart(catalog, permits.clone()));
    let held = permits.acquire().await.unwrap();
    let slow = tokio::spawn({
        let vmem = vmem.clone();
        async move { vmem.put_named("slow", [1; 10], MemoryTier::Host).await }
    });
    for round in 0..3 {
        let names: Vec<_> = (0..20).map(|n| format!("{round}/{n}")).collect();
        let puts = names.iter().map(|name| vmem.put_named(name, [7; 10], MemoryTier::Disk));
        let puts = futures::future::join_all(puts);
        let puts = tokio::time::timeout(HANGS / 2, puts).await.expect("they wait for `slow`");
        assert!(puts.iter().all(Result::is_ok), "{puts:?}");
    }
    assert!(!slow.is_finished(), "its commit is held");
    drop(held);
    slow.await.unwrap().unwrap();
    vmem.close().await.unwrap();
}
