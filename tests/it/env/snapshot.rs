//! Snapshots into directories that cannot hold them.
//!
//! Mechanism: the target was opened as any store's directory, and what had been written to it
//! stayed where the copy failed. Effect: half a store and its lock file were left on a full file
//! system, a directory with other files in it, even `/`, was accepted, and the error named a field
//! of the configuration. Fix: the target is empty or made, and emptied again unless the snapshot is
//! whole.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmem::{GpuSelection, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};

use crate::support::{HOST, bytes};

const OBJECTS: u64 = 6;
const LEN: usize = 1 << 20;

fn config(path: &Path) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder().host_capacity(32 << 20).disk_capacity(64 << 20);
    builder.disk_path(path).gpu(GpuSelection::Off).build().unwrap()
}

async fn store(path: &Path) -> VirtualMemory {
    let vmem = vmem::open(config(path)).await.unwrap();
    for n in 0..OBJECTS {
        vmem.put_named(&format!("k{n}"), bytes(n + 1, 1, LEN), HOST).await.unwrap();
    }
    vmem
}

/// The directory opens as a store with everything in it.
async fn assert_whole(path: &Path) {
    let vmem = vmem::open(config(path)).await.unwrap();
    for n in 0..OBJECTS {
        let handle = vmem.open_named(&format!("k{n}")).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(n + 1, 1, LEN));
    }
    vmem.close().await.unwrap();
}

/// Everything below a directory, by path.
fn listing(path: &Path) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(path).sort_by_file_name().into_iter();
    entries.map(|entry| entry.unwrap().into_path()).collect()
}

/// A file system in memory that holds less than the objects.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(bytes: u64) -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(place.path());
        mount.output().is_ok_and(|output| output.status.success()).then_some(Small(place))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_without_space_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let vmem = store(&place.path().join("store")).await;
    for size in [0, 2 << 20, 4 << 20] {
        // A tmpfs of size zero has no limit, so the smallest has a page.
        let Some(small) = Small::mount(size.max(4096)) else {
            return eprintln!("SKIPPED a snapshot without space: nothing can be mounted here");
        };
        let empty = small.0.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let before = listing(small.0.path());
        for target in ["made", "a/b/c", "empty", "made"] {
            let refused = vmem.snapshot(&small.0.path().join(target)).await.unwrap_err();
            let VirtualMemoryError::Io { operation, source } = &refused else {
                panic!("{refused:?}")
            };
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{operation}");
            assert_eq!(listing(small.0.path()), before, "{target} of {size} bytes");
        }
    }
    vmem.put_named("after", b"9", HOST).await.unwrap();
    let ample = place.path().join("a/b/snapshot");
    vmem.snapshot(&ample).await.unwrap();
    assert_whole(&ample).await;
    vmem.close().await.unwrap();
    assert_whole(&place.path().join("store")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_takes_only_an_empty_directory() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("store");
    let vmem = store(&path).await;
    let foreign = place.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("precious"), "somebody's").unwrap();
    let taken = place.path().join("taken");
    vmem.snapshot(&taken).await.unwrap();
    let before = listing(place.path());
    let targets = [
        ("/".into(), "not empty"),
        (foreign.clone(), "precious"),
        (taken.clone(), "holds a store already"),
        (path.join("vmem.data"), "not a directory"),
        (path.join("vmem.data/below"), "cannot be used"),
        (PathBuf::new(), "cannot be used"),
    ];
    for (target, why) in targets {
        match vmem.snapshot(&target).await {
            Err(VirtualMemoryError::InvalidConfig { field: "directory", reason }) => {
                assert!(reason.contains(why), "{target:?}: {reason}");
            }
            other => panic!("{target:?}: {other:?}"),
        }
    }
    let itself = vmem.snapshot(&path).await;
    assert!(matches!(itself, Err(VirtualMemoryError::InUse { .. })), "{itself:?}");
    assert_eq!(listing(place.path()), before);
    assert!(!Path::new("/vmem.lock").exists());
    // `lost+found`, which each new file system has, does not count.
    let fresh = place.path().join("fresh");
    fs::create_dir_all(fresh.join("lost+found")).unwrap();
    vmem.snapshot(&fresh).await.unwrap();
    vmem.close().await.unwrap();
    for whole in [&path, &taken, &fresh] {
        assert_whole(whole).await;
    }
}

#[tokio::test]
async fn a_snapshot_of_no_names_opens_as_an_empty_store() {
    let place = tempfile::tempdir().unwrap();
    let vmem = vmem::open(config(&place.path().join("store"))).await.unwrap();
    let target = place.path().join("snapshot");
    vmem.snapshot(&target).await.unwrap();
    vmem.close().await.unwrap();
    let vmem = vmem::open(config(&target)).await.unwrap();
    assert!(matches!(vmem.open_named("k0").await, Err(VirtualMemoryError::NameNotFound { .. })));
    vmem.close().await.unwrap();
}
