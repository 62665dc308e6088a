//! The files of an open store are removed, replaced or made inaccessible (scenario 40).
//!
//! Mechanism: what was written went to files that no path led to any more. Effect: `put_named`,
//! `flush_all` and `close` said `Ok`, and everything was gone. Fix: whatever calls something
//! durable looks whether the directory, the lock, the data and the catalog are still where they
//! were opened.
#![cfg(target_os = "linux")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use vmem::{GpuSelection, MemoryTier, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};

use crate::support::process::again;

const CATALOG: &str = "vmem.catalog";
const DATA: &str = "vmem.data";
const LOCK: &str = "vmem.lock";
const PLACE: &str = "VMEM_TEST_PLACE";
const NOBODY: u32 = 65_534;

fn config(path: &Path) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_capacity(32 << 20);
    builder.disk_path(path).gpu(GpuSelection::Off).build().unwrap()
}

/// A store with one name in it.
async fn store(path: &Path) -> VirtualMemory {
    let vmem = vmem::open(config(path)).await.unwrap();
    vmem.put_named("before", vec![7; 100_000], MemoryTier::Host).await.unwrap();
    vmem
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().canonicalize().unwrap().join("store");
    (scratch, path)
}

/// What the error says, which must be that the files of this store cannot be reached.
#[track_caller]
fn unreachable<T: std::fmt::Debug>(outcome: Result<T, VirtualMemoryError>, of: &Path) -> String {
    let error = outcome.unwrap_err();
    let source = match &error {
        VirtualMemoryError::NotFlushed { source, .. } => source,
        other => other,
    };
    match source {
        VirtualMemoryError::Unreachable { path, reason } if path == of => reason.to_string(),
        _ => panic!("{error:?}"),
    }
}

/// Each call that makes something durable, also where there is nothing new to write.
async fn every_durable_point_fails(vmem: VirtualMemory, path: &Path, names: &str) {
    let before = vmem.open_named("before").await.unwrap();
    let elsewhere = path.with_extension("snapshot");
    let said = [
        unreachable(vmem.flush(&before).await, path),
        unreachable(vmem.flush_all().await, path),
        unreachable(vmem.put_named("after", b"2", MemoryTier::Host).await, path),
        unreachable(vmem.set_metadata("before", b"beside").await, path),
        unreachable(vmem.remove_named("before").await, path),
        unreachable(vmem.snapshot(&elsewhere).await, path),
    ];
    for reason in &said {
        assert!(reason.contains(names), "{reason:?} does not name {names:?}");
    }
    assert!(!elsewhere.exists(), "nothing is left of the snapshot");
    assert_eq!(vmem.read(&before).await.unwrap().len(), 100_000, "it can still be read");
    drop(before);
    unreachable(vmem.close().await, path);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_durable_point_fails_once_files_are_gone() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 8] = [
        ("directory was removed", |path| fs::remove_dir_all(path).unwrap()),
        ("directory was removed", |path| fs::rename(path, path.with_extension("moved")).unwrap()),
        ("directory was replaced", |path| {
            fs::rename(path, path.with_extension("moved")).unwrap();
            fs::create_dir(path).unwrap();
        }),
        (CATALOG, |path| fs::remove_file(path.join(CATALOG)).unwrap()),
        (DATA, |path| fs::remove_file(path.join(DATA)).unwrap()),
        (LOCK, |path| fs::remove_file(path.join(LOCK)).unwrap()),
        (CATALOG, |path| {
            fs::copy(path.join(CATALOG), path.join("copy")).unwrap();
            fs::rename(path.join("copy"), path.join(CATALOG)).unwrap();
        }),
        // An opener would refuse it, since its bytes may be changed under another name.
        (DATA, |path| fs::hard_link(path.join(DATA), path.join("link")).unwrap()),
    ];
    for (names, damage) in damages {
        let (_scratch, path) = scratch();
        let vmem = store(&path).await;
        damage(&path);
        every_durable_point_fails(vmem, &path, names).await;
    }
}

#[tokio::test]
async fn a_store_recovers_once_its_directory_is_back() {
    let (_scratch, path) = scratch();
    let vmem = store(&path).await;
    let moved = path.with_extension("moved");
    fs::rename(&path, &moved).unwrap();
    unreachable(vmem.put_named("lost", b"1", MemoryTier::Host).await, &path);
    fs::rename(&moved, &path).unwrap();
    vmem.put_named("after", b"2", MemoryTier::Host).await.unwrap();
    vmem.close().await.unwrap();
    let again = vmem::open(config(&path)).await.unwrap();
    for name in ["before", "after"] {
        again.open_named(name).await.unwrap();
    }
    let lost = again.open_named("lost").await;
    assert!(matches!(lost, Err(VirtualMemoryError::NameNotFound { .. })), "{lost:?}");
    again.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_store_leaves_its_successor_alone() {
    let (_scratch, path) = scratch();
    let first = store(&path).await;
    fs::remove_dir_all(&path).unwrap();
    let second = vmem::open(config(&path)).await.unwrap();
    second.put_named("second", b"3", MemoryTier::Host).await.unwrap();
    let reason = unreachable(first.close().await, &path);
    assert!(reason.contains("replaced"), "{reason}");
    second.close().await.unwrap();
    let again = vmem::open(config(&path)).await.unwrap();
    again.open_named("second").await.unwrap();
    again.close().await.unwrap();
}

#[tokio::test]
async fn a_store_without_names_closes_although_its_directory_is_gone() {
    let (_scratch, path) = scratch();
    let vmem = vmem::open(config(&path)).await.unwrap();
    vmem.put(b"of this process alone", MemoryTier::Disk).await.unwrap();
    fs::remove_dir_all(&path).unwrap();
    vmem.flush_all().await.unwrap();
    vmem.close().await.unwrap();
    let temporary = VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_capacity(1 << 20);
    let vmem = vmem::open(temporary.build().unwrap()).await.unwrap();
    let path = vmem.capabilities().disk_path.clone().unwrap();
    vmem.put_named("never opened again", b"1", MemoryTier::Host).await.unwrap();
    fs::remove_dir_all(path).unwrap();
    vmem.put_named("nor this", b"1", MemoryTier::Host).await.unwrap();
    vmem.close().await.unwrap();
}

/// Plays the child of the test below; alone it does nothing.
#[tokio::test]
async fn child_loses_its_permissions() {
    let Some(place) = std::env::var_os(PLACE) else { return };
    for (name, names) in [(DATA, DATA), (CATALOG, CATALOG), ("", "directory")] {
        let path = Path::new(&place).join(format!("of-{names}"));
        let vmem = store(&path).await;
        let mode = fs::metadata(path.join(name)).unwrap().permissions();
        fs::set_permissions(path.join(name), Permissions::from_mode(0o000)).unwrap();
        every_durable_point_fails(vmem, &path, names).await;
        fs::set_permissions(path.join(name), mode).unwrap();
    }
    println!("reached the end");
}

/// Root may open what has no permissions, so the child runs as `nobody`.
#[test]
fn every_durable_point_fails_once_files_cannot_be_opened() {
    let place = tempfile::tempdir_in("/tmp").unwrap();
    let mut child = again(module_path!(), "child_loses_its_permissions");
    child.env(PLACE, place.path()).env("TMPDIR", place.path()).current_dir("/");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(place.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        child.uid(NOBODY).gid(NOBODY);
    }
    let output = match child.output() {
        Ok(output) => output,
        Err(error) => return eprintln!("SKIPPED files without permissions: no child: {error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let reached = output.status.success() && text.contains("reached the end");
    assert!(reached, "{}: {text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}
