//! What the scenario tests share: a disk that the test commands, stores over it, and the checks
//! that nothing was left behind.
//!
//! Invariant: a store that [`settle`] has returned for does nothing any more, so its figures are
//! exact. Called by the scenario tests.

mod drops;
mod footprint;
pub(crate) mod journal;
mod mem_driver;
pub(crate) mod process;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmem::backend::{Backends, DeviceBackend};
use vmem::{
    Capabilities, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig,
    VirtualMemoryConfigBuilder, VirtualMemoryError, VirtualMemoryStats,
};
use vmem_io::DiskTier;
use vmem_io::driver::Driver;
use vmem_testkit::{Pattern, Seed};

pub(crate) use drops::{DropAt, dropped_at};
pub(crate) use footprint::{disk_footprint, host_footprint};
pub(crate) use mem_driver::{MemDriver, Op};

pub(crate) const KIB: usize = 1024;
pub(crate) const MIB: usize = 1024 * KIB;
/// The least staging there is: two pieces of a chunk, so that one that leaks is soon missed.
pub(crate) const STAGING: usize = 128 * KIB;
pub(crate) const HOST: MemoryTier = MemoryTier::Host;
pub(crate) const DISK: MemoryTier = MemoryTier::Disk;

/// The seed of this run, printed: `VMEM_SEED` replays one.
pub(crate) fn seed() -> u64 {
    let seed = Seed::from_env_or(|| 11).value();
    println!("VMEM_SEED={seed}");
    seed
}

/// A configuration with `space` bytes of object space, and the fields that `set` sets.
pub(crate) fn config(
    space: usize,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder()
        .host_capacity((space + STAGING) as u64)
        .staging_capacity(STAGING as u64)
        .wait_timeout(Duration::from_secs(30));
    set(builder).build().expect("a valid configuration")
}

/// A store over a [`MemDriver`], with `space` bytes of object space and `disk` bytes below.
pub(crate) fn open(
    space: usize,
    disk: usize,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> (VirtualMemory, Arc<MemDriver>) {
    open_below(None, space, disk, set)
}

/// The same, with these devices above it.
pub(crate) fn open_below(
    devices: impl IntoIterator<Item = Arc<dyn DeviceBackend>>,
    space: usize,
    disk: usize,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> (VirtualMemory, Arc<MemDriver>) {
    let driver = MemDriver::new();
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (space + STAGING) as u64,
        disk: DiskTier::new(driver.clone(), disk as u64),
        catalog: None,
        devices: devices.into_iter().collect(),
        capabilities: Capabilities::new("memory".into(), "not in this test".into()),
    };
    let vmem = VirtualMemory::with_backends(&config(space, set), backends).expect("opens");
    (vmem, driver)
}

/// A store over this driver, with `space` bytes of object space and `disk` bytes below.
pub(crate) fn over(
    driver: Arc<dyn Driver>,
    space: usize,
    disk: u64,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemory {
    let backends = Backends {
        remote: None,
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

/// Waits until there is no migration in flight and no waiter, several times in a row.
pub(crate) async fn quiet(vmem: &VirtualMemory) -> VirtualMemoryStats {
    settle_with(vmem, || 0).await
}

/// As [`quiet`], and until drivers have nothing in flight either.
pub(crate) async fn settle_with(
    vmem: &VirtualMemory,
    in_flight: impl Fn() -> usize,
) -> VirtualMemoryStats {
    let mut quiet = 0;
    for _ in 0..20_000 {
        let stats = vmem.stats();
        // An object that was freed while it moved on a device is there until the copy has ended.
        let moves = stats.objects == 0 && stats.vram.used_bytes > 0;
        let busy = in_flight() > 0 || stats.migrations_in_flight > 0 || stats.waiters > 0 || moves;
        quiet = if busy { 0 } else { quiet + 1 };
        if quiet == 3 {
            return stats;
        }
        // On a paused clock this returns when everything else has come to a stand.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("does not settle: {:#?}", vmem.stats());
}

/// Waits, on the real clock, until a condition holds; panics if it does not.
pub(crate) async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if check() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// The bytes of one version of one object; version 0 is zeros.
pub(crate) fn bytes(object: u64, version: u64, len: usize) -> Vec<u8> {
    match version {
        0 => vec![0; len],
        _ => Pattern::new(object, version).bytes(0, len).into(),
    }
}

/// Objects `1..=count` with version 1 in them.
pub(crate) async fn put_all(
    vmem: &VirtualMemory,
    count: usize,
    len: usize,
    home: MemoryTier,
) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for object in 1..=count as u64 {
        handles.push(vmem.put(bytes(object, 1, len), home).await.expect("space"));
    }
    handles
}

/// Waits until nothing is in flight and there is no waiter. Panics if that does not happen.
pub(crate) async fn settle(vmem: &VirtualMemory, driver: &MemDriver) -> VirtualMemoryStats {
    settle_with(vmem, || driver.in_flight()).await
}

/// Asserts that no space is taken, since all objects of the store were freed.
pub(crate) fn assert_empty(stats: &VirtualMemoryStats, when: &str) {
    let left = [
        stats.host.used_bytes,
        stats.disk.used_bytes,
        stats.vram.used_bytes,
        stats.objects,
        stats.host.objects,
        stats.vram.objects,
        stats.held_bytes,
        stats.pinned_bytes,
        stats.dirty_bytes,
        stats.waiters,
        stats.migrations_in_flight,
    ];
    assert!(left.iter().all(|&left| left == 0), "{when} left behind: {stats:#?}");
}

/// What calls take and must give back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    host: u64,
    disk: u64,
    objects: u64,
    held: u64,
    pinned: u64,
    waiters: u64,
    in_flight: u64,
}

pub(crate) fn taken(stats: &VirtualMemoryStats) -> Taken {
    Taken {
        host: stats.host.used_bytes,
        disk: stats.disk.used_bytes,
        objects: stats.objects,
        held: stats.held_bytes,
        pinned: stats.pinned_bytes,
        waiters: stats.waiters,
        in_flight: stats.migrations_in_flight,
    }
}

/// Errors that a lack of space explains.
pub(crate) fn is_pressure(error: &VirtualMemoryError) -> bool {
    use VirtualMemoryError::{AllPinned, Pinned, TierFull, TimedOut};
    matches!(error, TierFull { .. } | AllPinned { .. } | TimedOut { .. } | Pinned { .. })
}
