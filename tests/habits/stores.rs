//! The places under test: a simulated disk, a real one, and the emulated CUDA driver above it.
//!
//! Invariant: this file alone knows what a store is made of; the others see its public surface.
//! Called by every module.

use std::sync::Arc;
use std::time::Duration;

use redb::backends::InMemoryBackend;
use tempfile::TempDir;
use vmem::backend::Backends;
use vmem::{
    Capabilities, GpuSelection, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig,
    VirtualMemoryConfigBuilder, VirtualMemoryError,
};
use vmem_cuda_emulator::Emulator;
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::sim::Speed;
use vmem_testkit::{Pattern, SimConfig, SimDriver, driver_under_test};

use crate::harness::{CLOSE_BOUND, WAIT, within};

pub(crate) const KIB: usize = 1024;
pub(crate) const MIB: usize = 1024 * KIB;
pub(crate) const VRAM: MemoryTier = MemoryTier::Vram;
pub(crate) const HOST: MemoryTier = MemoryTier::Host;
pub(crate) const DISK: MemoryTier = MemoryTier::Disk;
/// The least staging there is: two pieces, so that one that is not given back is soon missed.
pub(crate) const STAGING: usize = 128 * KIB;

/// What a store stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A simulated disk, with a catalog in memory.
    Simulated,
    /// A directory, through the driver of `VMEM_TEST_DRIVER`.
    Real,
    /// A directory, below the emulated CUDA driver with this much device memory, in bytes.
    Device(u64),
}

/// An open store with its directory. The directory stays until this is dropped.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) vmem: VirtualMemory,
    /// The simulated disk, if it is one.
    pub(crate) disk: Option<Arc<SimDriver>>,
    /// A directory for the store and for what the test puts beside it.
    pub(crate) dir: TempDir,
    emulator: Option<Emulator>,
}

/// `space` bytes of object space, `disk` bytes below, and what `set` sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) space: usize,
    pub(crate) disk: usize,
}

pub(crate) fn config(
    sizes: Sizes,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemoryConfigBuilder {
    let builder = VirtualMemoryConfig::builder()
        .host_capacity((sizes.space + STAGING) as u64)
        .staging_capacity(STAGING as u64)
        .disk_capacity(sizes.disk as u64)
        .gpu(GpuSelection::Off)
        .io_driver(driver_under_test())
        .wait_timeout(WAIT);
    set(builder)
}

/// Opens a store there, in a runtime.
pub(crate) async fn open(
    place: Place,
    sizes: Sizes,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> Store {
    let dir = tempfile::tempdir().unwrap();
    let builder = config(sizes, set);
    match place {
        Place::Simulated => {
            let (vmem, disk) = open_simulated(&builder.build().unwrap(), sizes.disk);
            Store { vmem, disk: Some(disk), dir, emulator: None }
        }
        Place::Real => {
            let config = builder.disk_path(dir.path().join("store")).build().unwrap();
            let vmem = vmem::open(config).await.unwrap();
            Store { vmem, disk: None, dir, emulator: None }
        }
        Place::Device(bytes) => {
            let emulator = Emulator::load().unwrap();
            let builder = builder.gpu(GpuSelection::Auto).vram_capacity(bytes);
            let config = builder.disk_path(dir.path().join("store")).build().unwrap();
            let vmem = vmem::open(config).await.unwrap();
            assert!(vmem.capabilities().vram.is_some(), "{}", vmem.capabilities());
            Store { vmem, disk: None, dir, emulator: Some(emulator) }
        }
    }
}

fn open_simulated(config: &VirtualMemoryConfig, bytes: usize) -> (VirtualMemory, Arc<SimDriver>) {
    let disk = SimDriver::new(SimConfig::default());
    let (catalog, taken) = NameCatalog::over(Arc::new(InMemoryBackend::new()), 512).unwrap();
    let backends = Backends {
        remote: None,
        host_capacity_bytes: config.host_capacity().unwrap(),
        disk: DiskTier::with_taken(disk.clone(), bytes as u64, &taken, None).unwrap(),
        catalog: Some(Arc::new(catalog)),
        devices: Vec::new(),
        capabilities: Capabilities::new("simulated".into(), "not in this test".into()),
    };
    (VirtualMemory::with_backends(config, backends).unwrap(), disk)
}

/// A test of a store above the emulated driver, which has the driver to itself: however the test
/// ends, the store is closed before another one gets the driver.
pub(crate) async fn on_a_device(
    bytes: u64,
    sizes: Sizes,
    test: impl AsyncFnOnce(&Store) -> Result<(), String>,
) -> Result<(), String> {
    let store = open(Place::Device(bytes), sizes, |builder| builder).await;
    let ended = test(&store).await;
    // A test that ended well may have closed it, and has looked at how that went.
    let closed = within("close", CLOSE_BOUND, store.vmem.clone().close()).await;
    store.leaves_the_device().await;
    ended?;
    match closed? {
        Ok(()) | Err(VirtualMemoryError::Closed) => store.no_rule_is_broken(),
        Err(error) => Err(format!("close: {error}")),
    }
}

impl Store {
    /// Waits until the last thread of the tier has let go of the device, which may be after
    /// `close`: what it gives back then is not to be counted against the next test.
    async fn leaves_the_device(&self) {
        let Some(emulator) = &self.emulator else { return };
        let began = std::time::Instant::now();
        while emulator.counter("contexts") > 0 && began.elapsed() < CLOSE_BOUND {
            tokio::task::yield_now().await;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A complaint if the emulated driver has seen a rule broken.
    fn no_rule_is_broken(&self) -> Result<(), String> {
        let violations = self.emulator.as_ref().map(Emulator::violations).unwrap_or_default();
        if violations.is_empty() { Ok(()) } else { Err(violations.join("; ")) }
    }

    /// Makes the simulated disk take this long for each operation; a real one is as it is.
    pub(crate) fn slow(&self, latency: Duration, queue_depth: usize) {
        if let Some(disk) = &self.disk {
            let read_latency = latency;
            let write_latency = latency;
            let speed = Speed { read_latency, write_latency, queue_depth, ..Speed::default() };
            disk.set_speed(speed);
        }
    }
}

/// The bytes of a version of an object.
pub(crate) fn bytes(object: usize, version: u64, len: usize) -> bytes::Bytes {
    Pattern::new(object as u64, version).bytes(0, len)
}

/// A complaint unless `found` is, from `offset` on, one of these versions of the object.
pub(crate) fn check(
    object: usize,
    versions: &[u64],
    offset: usize,
    found: &[u8],
) -> Result<(), String> {
    let is = |version: &u64| {
        Pattern::new(object as u64, *version).mismatch(offset as u64, found).is_none()
    };
    match versions.iter().any(is) {
        true => Ok(()),
        false => {
            let len = found.len();
            let instead = (0..16).find(is);
            let said = format!("object {object}: {len} bytes at {offset} are none of {versions:?}");
            Err(format!("{said}, but {instead:?}"))
        }
    }
}

/// Objects `from..from + count` in version 1, on disk and nowhere else; every second one is at home
/// in host memory.
pub(crate) async fn cold(
    vmem: &VirtualMemory,
    from: usize,
    count: usize,
    len: usize,
) -> Vec<VMemHandle> {
    let mut handles = Vec::with_capacity(count);
    for object in from..from + count {
        let home = if object % 2 == 0 { HOST } else { DISK };
        let handle = vmem.put(bytes(object, 1, len), home).await.unwrap();
        vmem.demote(&handle, DISK).await.unwrap();
        handles.push(handle);
    }
    handles
}

/// Objects that were never written back, until host memory has no space for another one.
pub(crate) async fn fill_host(vmem: &VirtualMemory, from: usize, len: usize) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    let most = 2 * vmem.stats().host.capacity_bytes as usize / len;
    let mut full = 0;
    // Where eviction works early there is always a little free: twice the capacity is full too.
    while full < 3 && handles.len() < most {
        let object = from + handles.len();
        handles.push(vmem.put(bytes(object, 1, len), HOST).await.unwrap());
        let host = vmem.stats().host;
        full += usize::from(host.capacity_bytes - host.used_bytes < 3 * len as u64);
    }
    handles
}
