//! Machines without a CUDA driver, and with one that is not what it seems.
//!
//! Invariant: each case is a process of its own, whose dynamic linker finds what the case says
//! under the driver's name.
#![allow(missing_docs, clippy::unwrap_used)]
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;

use vmem_core::{GpuSelection, VirtualMemoryError};
use vmem_gpu::open_device;

/// What the child is to see in the reason.
const EXPECTED: &str = "VMEM_TEST_EXPECTED_REASON";

/// Runs only in a child: opens the device, and says why there is none.
#[test]
fn child_opens_no_device() {
    let Ok(expected) = std::env::var(EXPECTED) else { return };
    let opened = open_device(&GpuSelection::Auto, None).unwrap();
    assert!(opened.device.is_none());
    assert!(opened.reason.contains(&expected), "{}", opened.reason);
    // It says what failed with which file, and nothing of that twice.
    assert!(!opened.reason.contains("dlopen failed"), "{}", opened.reason);
    let causes: Vec<_> = opened.reason.split("; ").collect();
    assert!(causes.iter().all(|one| causes.iter().filter(|other| one == *other).count() == 1));
    let error = open_device(&GpuSelection::Device(0), None).unwrap_err();
    assert!(matches!(error, VirtualMemoryError::TierNotAvailable { .. }), "{error:?}");
    assert!(error.to_string().contains(&expected), "{error}");
}

fn run_child(libraries: &Path, expected: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["child_opens_no_device", "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", libraries)
        .env(EXPECTED, expected)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
    assert!(!text.contains("panicked"), "{text}");
}

/// A library that this process has loaded, for want of a smaller one.
fn some_library() -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    paths
        .find(|path| path.contains("libgcc_s") || path.contains("libc.so"))
        .expect("a test is linked dynamically")
        .to_owned()
}

#[test]
fn no_driver_at_all() {
    let empty = tempfile::tempdir().unwrap();
    if std::process::Command::new("ldconfig")
        .arg("-p")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("libcuda.so"))
    {
        println!("SKIPPED no_driver_at_all: this machine has a CUDA driver");
        return;
    }
    run_child(empty.path(), "libcuda.so.1: cannot open shared object file");
}

#[test]
fn a_driver_that_lacks_what_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(some_library(), folder.path().join("libcuda.so")).unwrap();
    run_child(folder.path(), "it lacks cuCtxGetCurrent");
}

#[test]
fn a_driver_that_is_no_library() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.path().join(name), "no library").unwrap();
    }
    run_child(folder.path(), "no CUDA driver");
}
