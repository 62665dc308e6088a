//! Directories of named objects: snapshots into others, lock files, and when they are free again.
//!
//! Invariant: a directory is one store's, from `open` to the return of the last call.

use std::sync::Arc;

use vmem::{
    MemoryTier::{self, Disk, Host},
    VirtualMemoryConfig, VirtualMemoryError,
};

use super::life::{is, listed, open};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_a_store_of_one_moment() {
    let directory = tempfile::tempdir().unwrap();
    let snapshots = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for n in 0..20_u8 {
        vmem.put_named(&format!("{n}"), vec![n; 50_000], MemoryTier::Host).await.unwrap();
    }
    let unnamed = vmem.put(vec![1; 100_000], Disk).await.unwrap();
    // Two that always say the same, replaced together by their own rename.
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = tokio::spawn({
        let vmem = vmem.clone();
        let stop = stop.clone();
        async move {
            let mut version = 0_u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                version += 1;
                let bytes = version.to_le_bytes().repeat(10_000);
                vmem.put_named("moving", bytes, Disk).await.unwrap();
            }
        }
    });
    while vmem.open_named("moving").await.is_err() {
        tokio::task::yield_now().await;
    }
    for n in 0..5 {
        let path = snapshots.path().join(format!("{n}"));
        vmem.snapshot(&path).await.unwrap();
        let copy = open(&path).await;
        assert_eq!(listed(&copy, "").await.len(), 21);
        let moving = copy.read(&copy.open_named("moving").await.unwrap()).await.unwrap();
        assert!(moving.chunks(4).all(|word| word == &moving[..4]), "one version");
        for n in 0..20_u8 {
            let handle = copy.open_named(&format!("{n}")).await.unwrap();
            is(&copy, &handle, n, 50_000).await;
        }
        drop(moving);
        copy.put_named("of its own", [1; 10], Host).await.unwrap();
        copy.close().await.unwrap();
        assert!(vmem_io::verify(&path).unwrap().damaged.is_empty());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.await.unwrap();
    let again = vmem.snapshot(&snapshots.path().join("0")).await;
    assert!(matches!(again, Err(VirtualMemoryError::InvalidConfig { .. })), "{again:?}");
    let own = vmem.snapshot(directory.path()).await;
    assert!(matches!(own, Err(VirtualMemoryError::InUse { .. })), "{own:?}");
    is(&vmem, &unnamed, 1, 100_000).await;
    drop(unnamed);
    vmem.close().await.unwrap();
}

/// A process was killed while it wrote its number over a longer one.
#[tokio::test]
async fn a_lock_file_that_was_half_written() {
    let place = tempfile::tempdir().unwrap();
    let config = || {
        let config = VirtualMemoryConfig::builder().disk_path(place.path());
        config.host_capacity(2 << 20).disk_capacity(16 << 20).build().unwrap()
    };
    let vmem = vmem::open(config()).await.unwrap();
    vmem.put_named("a", [1; 100], MemoryTier::Host).await.unwrap();
    vmem.close().await.unwrap();
    for left in ["678\n5\n", "12345\n", "7\n\0\0"] {
        std::fs::write(place.path().join("vmem.lock"), left).unwrap();
        assert_eq!(vmem_io::verify(place.path()).unwrap().objects, 1, "{left:?}");
        let vmem = vmem::open(config()).await.unwrap();
        let handle = vmem.open_named("a").await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == [1; 100][..]);
        drop(handle);
        vmem.close().await.unwrap();
    }
}

/// Once a store was closed, or verified, the directory is free for any process: no work goes on in
/// the background.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_is_free_when_its_last_call_returns() {
    let directory = tempfile::tempdir().unwrap();
    let is_free = |after: &str| {
        // As another process would: past what this one knows of its stores.
        let lock = std::fs::File::open(directory.path().join(vmem_io::LOCK_FILE)).unwrap();
        assert!(lock.try_lock().is_ok(), "locked after {after}");
        lock.unlock().unwrap();
    };
    for round in 0..50_u8 {
        let vmem = open(directory.path()).await;
        vmem.put_named("one", vec![round; 3000], MemoryTier::Disk).await.unwrap();
        vmem.close().await.unwrap();
        is_free("close");
        for _ in 0..5 {
            assert_eq!(vmem_io::verify(directory.path()).unwrap().objects, 1);
            is_free("verify");
        }
    }
}
