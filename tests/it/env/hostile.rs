//! Scenario 25: places that deny what the disk tier would like to have. In each the store opens and
//! works, and says what serves and why; or `open` fails at once with an error that names what is
//! missing.
//!
//! Invariant: each denial is in force in a child process alone, and the child shows that it is.
#![cfg(target_os = "linux")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, setrlimit};
use vmem::{
    Capabilities, IoDriver, MemoryTier, ReadOptions, VirtualMemory, VirtualMemoryConfig,
    VirtualMemoryError,
};
use vmem_testkit::Denied;

use crate::support::process::again;

/// What a child is to deny itself.
const PLACE: &str = "VMEM_TEST_PLACE";
const NOBODY: u32 = 65_534;
const EPERM: i32 = 1;
const ENOSYS: i32 = 38;

fn config(driver: IoDriver) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder().host_capacity(2 << 20).disk_capacity(64 << 20);
    builder.io_driver(driver).build().unwrap()
}

/// Many objects, more than host memory holds, up and down and compared; returns what served.
async fn works(driver: IoDriver) -> Capabilities {
    let vmem = vmem::open(config(driver)).await.unwrap();
    let capabilities = vmem.capabilities().clone();
    println!("{capabilities}");
    let mut objects = Vec::new();
    for n in 0..60_usize {
        let data: Vec<u8> = (0..n * 3_001).map(|at| (at * 31 + n) as u8).collect();
        let home = if n % 2 == 0 { MemoryTier::Host } else { MemoryTier::Disk };
        objects.push((vmem.put(&data, home).await.unwrap(), data));
    }
    let objects = Arc::new(objects);
    let tasks = (0..8).map(|task| {
        let vmem = vmem.clone();
        let objects = objects.clone();
        tokio::spawn(async move {
            for round in 0..40 {
                let (handle, data) = &objects[(task * 7 + round * 11) % objects.len()];
                check(&vmem, handle, data, round).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    drop(objects);
    vmem.close().await.unwrap();
    capabilities
}

async fn check(vmem: &VirtualMemory, handle: &vmem::VMemHandle, data: &[u8], round: usize) {
    match round % 3 {
        0 => assert!(vmem.read(handle).await.unwrap() == data),
        1 => {
            let options = ReadOptions::new().promote(false);
            assert!(vmem.read_with(handle, options).await.unwrap() == data);
        }
        _ => {
            let mut read = vec![0xee; data.len()];
            vmem.read_into(handle, 0..data.len(), &mut read).await.unwrap();
            assert!(read == data);
            vmem.demote(handle, MemoryTier::Disk).await.unwrap();
        }
    }
}

/// The reason why this driver is unavailable.
async fn refused(driver: IoDriver) -> String {
    match vmem::open(config(driver)).await {
        Err(VirtualMemoryError::TierNotAvailable { tier: MemoryTier::Disk, reason }) => {
            println!("{driver}: {reason}");
            reason.to_string()
        }
        other => panic!("{driver}: {other:?}"),
    }
}

fn says(capabilities: &Capabilities, what: &str) -> bool {
    capabilities.disk_notes.iter().any(|note| note.contains(what))
}

/// Plays the child: everything in here runs where something is denied.
async fn in_place(place: &str) {
    match place {
        "no io_uring" | "old kernel" | "no submission" => {
            for driver in [IoDriver::Reactor, IoDriver::TokioUring] {
                let reason = refused(driver).await;
                // A driver that the build lacks asks the kernel for nothing.
                let built = driver != IoDriver::TokioUring || cfg!(feature = "tokio-uring");
                let cause = if built { "os error" } else { "feature `tokio-uring`" };
                assert!(reason.contains(cause) && reason.contains("Auto"), "{reason}");
            }
            let found = works(IoDriver::Auto).await;
            assert_eq!(found.disk_driver, Some(IoDriver::Blocking));
            assert!(says(&found, "reactor driver") && says(&found, "tokio-uring driver"));
        }
        "no registration" => {
            let found = works(IoDriver::Auto).await;
            assert!(!found.staging_registered);
            if found.disk_driver == Some(IoDriver::Reactor) {
                assert!(says(&found, "registered memory"), "{found}");
            }
        }
        "no direct I/O" => {
            for driver in [IoDriver::Auto, IoDriver::Blocking] {
                let found = works(driver).await;
                assert!(!found.disk_direct && says(&found, "O_DIRECT"), "{found}");
            }
        }
        "little locked memory" => {
            let found = works(IoDriver::Auto).await;
            // 64 KiB: less than staging has.
            assert!(!found.staging_registered, "{found}");
        }
        "few descriptors" => match vmem::open(config(IoDriver::Auto)).await {
            Ok(vmem) => {
                vmem.close().await.unwrap();
                works(IoDriver::Auto).await;
            }
            Err(error) => panic!("32 descriptors are enough: {error}"),
        },
        "hardly any descriptors" => match vmem::open(config(IoDriver::Auto)).await {
            Ok(vmem) => vmem.close().await.unwrap(),
            Err(error) => {
                let text = format!("{error}: {:?}", std::error::Error::source(&error));
                assert!(text.contains("open files"), "names what is missing: {text}");
            }
        },
        _ => panic!("no place {place}"),
    }
}

/// What is to be in force in the child; `Err` if this machine cannot have it.
fn enforce(place: &str) -> Result<(), String> {
    let limit = |resource, most| {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, limit).map_err(|error| error.to_string())
    };
    match place {
        "no io_uring" => Denied::IoUring { errno: EPERM }.enforce(),
        "old kernel" => Denied::IoUring { errno: ENOSYS }.enforce(),
        "no submission" => Denied::IoUringEnter { errno: EPERM }.enforce(),
        "no registration" => Denied::IoUringRegister { errno: EPERM }.enforce(),
        "no direct I/O" => Denied::DirectIo.enforce(),
        "little locked memory" => limit(Resource::Memlock, 64 * 1024),
        "few descriptors" => limit(Resource::Nofile, 32),
        "hardly any descriptors" => limit(Resource::Nofile, 12),
        _ => Ok(()),
    }
}

#[test]
#[ignore = "plays the child of the other tests"]
fn child_in_a_hostile_place() {
    let Ok(place) = std::env::var(PLACE) else { return };
    if let Err(why) = enforce(&place) {
        println!("SKIPPED {place}: {why}");
        return;
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    match runtime.worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime.block_on(in_place(&place)),
        // tokio itself has no space in here.
        Err(error) => println!("SKIPPED {place}: no runtime: {error}"),
    }
    println!("reached the end of {place}");
}

/// Runs a child in the place. It must reach the end, or say that it was skipped.
fn visit(place: &str, prepare: impl FnOnce(&mut Command)) {
    let mut child = again(module_path!(), "child_in_a_hostile_place");
    child.env(PLACE, place);
    prepare(&mut child);
    let output = match child.output() {
        Ok(output) => output,
        Err(error) => return println!("SKIPPED {place}: no child: {error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    print!("== {place}\n{text}");
    let done = text.contains("reached the end of") || text.contains("SKIPPED");
    assert!(output.status.success() && done, "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn scenario_25_io_uring_is_denied() {
    visit("no io_uring", |_| {});
    visit("old kernel", |_| {});
    visit("no submission", |_| {});
}

#[test]
fn scenario_25_registration_is_denied() {
    visit("no registration", |_| {});
}

#[test]
fn scenario_25_direct_io_is_refused() {
    visit("no direct I/O", |_| {});
}

/// Root ignores the limit on locked memory, so the child runs as `nobody`.
#[test]
fn scenario_25_little_locked_memory() {
    if !rustix::process::geteuid().is_root() {
        return visit("little locked memory", |_| {});
    }
    let place = tempfile::tempdir_in("/tmp").unwrap();
    std::os::unix::fs::chown(place.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    visit("little locked memory", |child| {
        child.uid(NOBODY).gid(NOBODY).env("TMPDIR", place.path()).current_dir("/");
    });
}

#[test]
fn scenario_25_few_descriptors() {
    visit("few descriptors", |_| {});
    visit("hardly any descriptors", |_| {});
}

/// A mount that is for reading only, in the way in which a test can have one.
#[tokio::test]
async fn scenario_25_a_read_only_mount() {
    let place = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        let done = Command::new("mount").args(args).arg(place.path()).output();
        done.is_ok_and(|output| output.status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=1m,ro", "tmpfs"]) {
        return println!("SKIPPED a read-only mount: not permitted here");
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
    let _unmount = Unmount(place.path());
    let config = VirtualMemoryConfig::builder().disk_path(place.path().join("store"));
    match vmem::open(config.build().unwrap()).await {
        Err(VirtualMemoryError::InvalidConfig { field, reason }) => {
            let named = reason.contains("ead-only") && reason.contains("store");
            assert!(field == "disk_path" && named, "{reason}");
        }
        other => panic!("a read-only place: {other:?}"),
    }
}

/// tokio tells of a missing reactor by a panic alone; the store tells by what serves instead.
#[test]
fn scenario_25_a_runtime_without_a_reactor() {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        let found = works(IoDriver::Auto).await;
        assert_ne!(found.disk_driver, Some(IoDriver::Reactor));
        assert!(says(&found, "reactor driver"), "{found}");
        let reason = refused(IoDriver::Reactor).await;
        println!("{reason}");
    });
}
