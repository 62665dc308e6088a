//! Scenario 18 on a real file system: a small tmpfs under a larger configured capacity.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmem::{MemoryTier, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};

const MIB: usize = 1 << 20;

/// A tmpfs that is unmounted at the end.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// None, and a word of why, where mounting is not permitted.
    fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(dir.path())
            .output();
        match mount {
            Ok(output) if output.status.success() => Some(Tmpfs(dir)),
            other => {
                eprintln!("SKIPPED: a tmpfs cannot be mounted here: {other:?}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.path()).status());
    }
}

async fn open(path: &Path) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .disk_path(path.join("store"))
        .host_capacity(4 * MIB as u64)
        .disk_capacity(256 * MIB as u64)
        .wait_timeout(Duration::from_secs(10))
        .build()
        .unwrap();
    vmem::open(config).await.unwrap()
}

/// The file system is full long before the budget is: what was accepted stays readable where it
/// is, writers get `TierFull`, and when space returns the store goes on without help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_18_a_full_file_system() {
    let Some(tmpfs) = Tmpfs::mount("16m") else { return };
    let vmem = open(tmpfs.path()).await;
    assert!(vmem.capabilities().disk_is_tmpfs);
    let ballast = tmpfs.path().join("ballast");
    std::fs::write(&ballast, vec![1; 8 * MIB]).unwrap();

    let mut accepted = Vec::new();
    let refused = loop {
        let n = accepted.len();
        match vmem.put(vec![n as u8; 100_000], MemoryTier::Host).await {
            Ok(handle) => accepted.push(handle),
            Err(error) => break error,
        }
        assert!(n < 1000, "the file system takes 8 MiB");
    };
    assert!(matches!(refused, VirtualMemoryError::TierFull { .. }), "{refused:?}");
    assert!(refused.is_retryable());
    check_all(&vmem, &accepted).await;

    std::fs::remove_file(&ballast).unwrap();
    let before = accepted.len();
    for attempt in 0.. {
        match vmem.put(vec![accepted.len() as u8; 100_000], MemoryTier::Host).await {
            Ok(handle) => accepted.push(handle),
            Err(VirtualMemoryError::TierFull { .. }) if attempt < 200 => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error:?}"),
        }
        if accepted.len() >= before + 30 {
            break;
        }
    }
    check_all(&vmem, &accepted).await;
    accepted.clear();
    assert_eq!(vmem.stats().disk.used_bytes, 0);
    vmem.close().await.unwrap();
}

async fn check_all(vmem: &VirtualMemory, handles: &[vmem::VMemHandle]) {
    let mut read = vec![0; 100_000];
    for (n, handle) in handles.iter().enumerate() {
        vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
        assert!(read.iter().all(|&byte| byte == n as u8), "object {n}");
    }
}

/// With no capacity configured, a store that was closed opens again, however much of the file
/// system its names take.
#[tokio::test]
async fn the_default_capacity_always_holds_what_is_named() {
    let Some(tmpfs) = Tmpfs::mount("64m") else { return };
    let config = || {
        let config = VirtualMemoryConfig::builder().disk_path(tmpfs.path().join("store"));
        config.host_capacity(8 << 20).build().unwrap()
    };
    let vmem = vmem::open(config()).await.unwrap();
    for n in 0..10 {
        vmem.put_named(&format!("{n}"), vec![n; 3 << 20], MemoryTier::Disk).await.unwrap();
    }
    vmem.close().await.unwrap();
    for _ in 0..3 {
        let vmem = vmem::open(config()).await.unwrap();
        assert!(vmem.stats().disk.capacity_bytes >= 30 << 20, "{:?}", vmem.stats().disk);
        let handle = vmem.open_named("7").await.unwrap();
        assert!(vmem.read(&handle).await.unwrap()[..] == vec![7; 3 << 20]);
        drop(handle);
        vmem.close().await.unwrap();
    }
}
