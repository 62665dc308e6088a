//! What the scenarios of pressure, disk and life share: stores over any driver, a child process,
//! and footprints as a black box.
//!
//! Invariant: nothing here knows how the store works; a footprint is measured on a store of its
//! own. Called by the scenario tests.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vmem::backend::Backends;
use vmem::{
    Capabilities, VirtualMemory, VirtualMemoryConfig, VirtualMemoryConfigBuilder,
    VirtualMemoryStats,
};
use vmem_io::DiskTier;
use vmem_io::driver::Driver;

use crate::common::{DISK, HOST, STAGING, config};

/// A store over this driver, with `space` bytes of object space and `disk` bytes below.
pub(crate) fn over(
    driver: Arc<dyn Driver>,
    space: usize,
    disk: u64,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemory {
    let backends = Backends {
        host_capacity_bytes: (space + STAGING) as u64,
        disk: DiskTier::new(driver, disk),
        catalog: None,
        devices: Vec::new(),
        capabilities: Capabilities::new("of the test".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&config(space, set), backends).expect("opens")
}

/// A real store in this directory.
pub(crate) fn real_config(dir: &Path, host: usize, disk: usize) -> VirtualMemoryConfig {
    VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .disk_path(dir)
        .host_capacity(host as u64)
        .disk_capacity(disk as u64)
        .wait_timeout(Duration::from_secs(20))
        .build()
        .expect("a valid configuration")
}

/// Waits until no migration is in flight and nobody waits, several times in a row.
pub(crate) async fn quiet(vmem: &VirtualMemory) -> VirtualMemoryStats {
    let mut quiet = 0;
    for _ in 0..20_000 {
        let stats = vmem.stats();
        let busy = stats.migrations_in_flight > 0 || stats.waiters > 0;
        quiet = if busy { 0 } else { quiet + 1 };
        if quiet == 3 {
            return stats;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("does not settle: {:#?}", vmem.stats());
}

/// Waits, on the real clock, for something that comes about; panics where it does not come.
pub(crate) async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if check() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// What an object of this length takes in host memory, in bytes: measured on a store of its own.
pub(crate) async fn host_footprint(len: usize) -> u64 {
    let (probe, _driver) = crate::common::open(64 << 20, 64 << 20, |b| b);
    let handle = probe.allocate(len, HOST).await.expect("room");
    let footprint = probe.stats().host.used_bytes;
    assert!(footprint >= len as u64, "{footprint} for {len}");
    assert!(footprint <= (len + len / 4 + 4096) as u64, "{footprint} for {len}");
    drop(handle);
    footprint
}

/// What an object of this length takes on disk, in bytes: measured on a store of its own.
pub(crate) async fn disk_footprint(len: usize) -> u64 {
    let (probe, _driver) = crate::common::open(1 << 20, 64 << 20, |b| b);
    let handle = probe.allocate(len, DISK).await.expect("room");
    let footprint = probe.stats().disk.used_bytes;
    assert!(footprint >= len as u64 && footprint < len as u64 + 512, "{footprint} for {len}");
    drop(handle);
    footprint
}

/// The variable that tells a child which directory it is to use.
pub(crate) const CHILD_DIR: &str = "VMEM_TEST_CHILD_DIR";

/// This test binary again, running one test, told to play the child in `dir`.
pub(crate) fn child(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().expect("the test binary has a path"))
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(CHILD_DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the child starts")
}
