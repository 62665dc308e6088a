//! The VRAM tier, over a simulated device and over the CUDA tier on the emulated driver: residency through three tiers, the
//! budget, pins, prefetches, failures.
//!
//! Invariant: both devices are late, own what they were given, and hold garbage where nothing was written; so bytes that
//! are right here were where they should be when they were read. The emulated driver has seen no rule broken.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::backend::{Backends, DeviceBackend};
use vmem::{
    Capabilities, GpuSelection, MemoryTier, MigrationCause, VMemHandle, VirtualMemory,
    VirtualMemoryConfigBuilder, VirtualMemoryError,
};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

use crate::support::{
    self, DISK, HOST, KIB, MIB, MemDriver, Op, STAGING, bytes, config, put_all, settle,
};

const VRAM: MemoryTier = MemoryTier::Vram;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Simulated,
    Emulated,
}

/// The device under test, which does what it is told.
struct Gpu {
    backend: Arc<dyn DeviceBackend>,
    control: Control,
}

enum Control {
    Simulated(SimDevice),
    Emulated(Emulator),
}

impl Gpu {
    fn new(which: Which, bytes: u64) -> Self {
        match which {
            Which::Simulated => {
                let device = SimDevice::new(bytes);
                Gpu { backend: Arc::new(device.clone()), control: Control::Simulated(device) }
            }
            Which::Emulated => {
                let emulator = Emulator::load().unwrap();
                let opened = vmem_gpu::open_device(&GpuSelection::Auto, Some(bytes)).unwrap();
                Gpu { backend: opened.device.unwrap(), control: Control::Emulated(emulator) }
            }
        }
    }

    /// Nothing goes up until it is released.
    fn hold(&self) {
        match &self.control {
            Control::Simulated(device) => device.hold(),
            Control::Emulated(emulator) => emulator.hold(Kind::Up),
        }
    }

    fn release_all(&self) {
        match &self.control {
            Control::Simulated(device) => device.release_all(),
            Control::Emulated(emulator) => emulator.release_all(),
        }
    }

    /// Whether something waits to go up.
    fn is_busy(&self) -> bool {
        match &self.control {
            Control::Simulated(device) => device.in_flight() > 0,
            Control::Emulated(emulator) => emulator.counter("queued_up") > 0,
        }
    }

    fn fail_next_upload(&self) {
        match &self.control {
            Control::Simulated(device) => device.fail_next(1),
            Control::Emulated(emulator) => emulator.fail("cuMemcpyHtoDAsync_v2", 1, 719),
        }
    }

    fn fail_next_download(&self) {
        match &self.control {
            Control::Simulated(device) => device.fail_next(1),
            Control::Emulated(emulator) => emulator.fail("cuMemcpyDtoHAsync_v2", 1, 719),
        }
    }

    fn lose(&self) {
        match &self.control {
            Control::Simulated(device) => device.lose(),
            Control::Emulated(emulator) => emulator.sticky(700),
        }
    }

    /// All came back, and no rule was broken.
    fn assert_well(&self) {
        assert_eq!(self.backend.usage().used_bytes, 0);
        if let Control::Emulated(emulator) = &self.control {
            assert_eq!(emulator.violations(), [""; 0]);
            assert_eq!(emulator.counter("context_synchronisations"), 0, "never the whole device");
        }
    }
}

/// Each test with each device.
macro_rules! on_each_device {
    ($($name:ident)*) => {
        mod simulated {
            $(#[test]
            fn $name() {
                super::run(super::$name(super::Which::Simulated));
            })*
        }
        #[cfg(target_os = "linux")]
        mod emulated {
            $(#[test]
            fn $name() {
                crate::support::process::alone(module_path!(), stringify!($name), || {
                    super::run(super::$name(super::Which::Emulated));
                });
            })*
        }
    };
}

on_each_device! {
    allocate_on_host_write_promote_to_vram_read
    a_read_takes_the_faster_copy
    what_is_used_least_leaves
    pins_keep_objects_in_vram
    a_promotion_that_is_dropped_half_way
    a_device_that_fails_and_one_that_is_lost
    at_home_in_vram
    prefetches_to_vram
    a_prefetch_that_is_dropped_half_way
    from_disk_with_host_memory_held
    every_tier_at_random
    migrations_to_vram_are_told
}

fn run(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().unwrap().block_on(test);
}

fn open(
    which: Which,
    vram: usize,
    space: usize,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> (VirtualMemory, Arc<MemDriver>, Arc<Gpu>) {
    let (driver, gpu) = (MemDriver::new(), Arc::new(Gpu::new(which, vram as u64)));
    let backends = Backends {
        host_capacity_bytes: (space + STAGING) as u64,
        disk: DiskTier::new(driver.clone(), 64 * MIB as u64),
        catalog: None,
        devices: vec![gpu.backend.clone()],
        capabilities: Capabilities::new("memory".into(), "".into()),
    };
    let vmem = VirtualMemory::with_backends(&config(space, set), backends).unwrap();
    (vmem, driver, gpu)
}

fn in_vram(vmem: &VirtualMemory, handle: &VMemHandle) -> bool {
    vmem.residency(handle).unwrap().vram
}

/// Everything that device and host were given came back.
async fn assert_all_back(
    vmem: VirtualMemory,
    driver: &MemDriver,
    gpu: &Gpu,
    handles: Vec<VMemHandle>,
) {
    drop(handles);
    let stats = settle(&vmem, driver).await;
    support::assert_empty(&stats, "the end");
    assert_eq!((stats.vram.used_bytes, stats.vram.objects), (0, 0), "{stats:#?}");
    vmem.close().await.unwrap();
    gpu.assert_well();
}

/// The example of the seed's documentation, with VRAM, awaited.
async fn allocate_on_host_write_promote_to_vram_read(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    assert!(vmem.capabilities().vram.is_some());
    let handle = vmem.allocate(5000, HOST).await.unwrap();
    vmem.write(&handle, bytes(1, 1, 5000)).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 5000));

    let residency = vmem.residency(&handle).unwrap();
    assert_eq!(residency.current_tier(), Some(VRAM));
    let stats = vmem.stats();
    assert_eq!((stats.vram.used_bytes, stats.vram.objects), (5120, 1));
    assert_eq!(stats.host_to_vram_bytes, 5000);
    // Already there or faster.
    vmem.promote(&handle, HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    assert_eq!(vmem.stats().host_to_vram_bytes, 5000);
    vmem.demote(&handle, HOST).await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}

/// What only device memory and the disk have is read from device memory: the disk fails every read.
async fn a_read_takes_the_faster_copy(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * MIB, 256 * KIB, |config| config);
    let len = 150_000;
    let handle = vmem.put(bytes(1, 1, len), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    // Others push it out of host memory.
    let others = put_all(&vmem, 8, 60_000, HOST).await;
    settle(&vmem, &driver).await;
    let residency = vmem.residency(&handle).unwrap();
    assert!(residency.vram && !residency.host && residency.disk, "{residency:?}");

    driver.fail(|op, _| (op == Op::Read).then(|| io::Error::from_raw_os_error(5)));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, len));
    let part = vmem.read_at(&handle, 70_000..140_001).await.unwrap();
    assert!(part == bytes(1, 1, len)[70_000..140_001]);
    drop(part);
    let stats = vmem.stats();
    assert!(stats.vram.hits >= 2 && stats.vram_to_host_bytes >= len as u64, "{stats:#?}");

    // A part of it is written: the rest is read from device memory too, and the copy there is stale.
    vmem.write_at(&handle, 65_530, [9; 20]).await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    driver.heal();
    let mut expected = bytes(1, 1, len);
    expected[65_530..65_550].fill(9);
    assert!(vmem.read(&handle).await.unwrap() == expected);

    // And if device memory fails, the copy below serves.
    vmem.promote(&handle, VRAM).await.unwrap();
    vmem.demote(&others[0], DISK).await.unwrap();
    for (n, other) in others.iter().enumerate() {
        assert!(vmem.read(other).await.unwrap() == bytes(n as u64 + 1, 1, 60_000));
        vmem.promote(other, HOST).await.unwrap();
    }
    settle(&vmem, &driver).await;
    if !vmem.residency(&handle).unwrap().host {
        gpu.fail_next_download();
        assert!(vmem.read(&handle).await.unwrap() == expected);
        assert!(vmem.stats().errors > 0);
    }
    let mut all = others;
    all.push(handle);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// More than device memory holds: the least recently used leave it, for nothing, and the budget holds.
async fn what_is_used_least_leaves(which: Which) {
    let (vmem, driver, gpu) = open(which, 10 * 8192, 4 * MIB, |config| config);
    let handles = put_all(&vmem, 30, 8192, HOST).await;
    for handle in &handles {
        vmem.promote(handle, VRAM).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let there: Vec<_> = handles.iter().map(|handle| in_vram(&vmem, handle)).collect();
    assert_eq!(there.iter().filter(|there| **there).count(), 10, "{there:?}");
    assert!(there[20..].iter().all(|there| *there), "{there:?}");
    // One that is used again stays.
    vmem.promote(&handles[20], VRAM).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2)).await;
    vmem.promote(&handles[0], VRAM).await.unwrap();
    assert!(in_vram(&vmem, &handles[20]) && !in_vram(&vmem, &handles[21]));

    // One that takes as much as three of them makes three of them leave, and no more.
    let large = vmem.put(bytes(99, 1, 3 * 8192), HOST).await.unwrap();
    vmem.promote(&large, VRAM).await.unwrap();
    let left = handles.iter().filter(|handle| in_vram(&vmem, handle)).count();
    assert!((5..=7).contains(&left), "{left} of 10 are left");
    let stats = vmem.stats();
    assert!(stats.vram.peak_bytes <= stats.vram.capacity_bytes && stats.clean_drops >= 20);
    assert_eq!(stats.host_to_disk_bytes, 0, "leaving device memory writes nothing");

    let too_large = vmem.put(bytes(3, 1, 11 * 8192), HOST).await.unwrap();
    let error = vmem.promote(&too_large, VRAM).await.unwrap_err();
    drop(too_large);
    let exceeds = VirtualMemoryError::ExceedsCapacity {
        tier: VRAM,
        requested_bytes: 11 * 8192,
        capacity_bytes: 10 * 8192,
    };
    assert_eq!(error.to_string(), exceeds.to_string());
    let mut all = handles;
    all.push(large);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

async fn pins_keep_objects_in_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * 8192, 4 * MIB, |config| {
        config.wait_timeout(Duration::from_secs(3)).max_pinned(0.75)
    });
    let handles = put_all(&vmem, 8, 8192, HOST).await;
    let first = vmem.pin(&handles[0], VRAM).await.unwrap();
    let again = vmem.pin(&handles[0], VRAM).await.unwrap();
    for to in [HOST, DISK] {
        let refused = vmem.demote(&handles[0], to).await;
        assert!(
            matches!(refused, Err(VirtualMemoryError::Pinned { tier: VRAM, pins: 2, .. })),
            "{refused:?}"
        );
    }
    for handle in &handles[1..] {
        vmem.promote(handle, VRAM).await.unwrap();
    }
    assert!(in_vram(&vmem, &handles[0]));

    // The budget of pins: three of four.
    let more: Vec<_> =
        [vmem.pin(&handles[1], VRAM).await.unwrap(), vmem.pin(&handles[2], VRAM).await.unwrap()]
            .into();
    let refused = vmem.pin(&handles[3], VRAM).await;
    assert!(
        matches!(refused, Err(VirtualMemoryError::AllPinned { tier: VRAM, .. })),
        "{refused:?}"
    );
    // A waiter gets his turn when a pin goes.
    let mut waiting = Box::pin(vmem.pin(&handles[3], VRAM));
    assert!((&mut waiting).now_or_never().is_none());
    drop(more);
    let fourth = waiting.await.unwrap();

    // A write makes the copy stale; it comes up again by itself, in the same memory.
    vmem.write(&handles[0], bytes(1, 2, 8192)).await.unwrap();
    settle(&vmem, &driver).await;
    while !in_vram(&vmem, &handles[0]) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop((first, again));
    vmem.demote(&handles[0], HOST).await.unwrap();
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(1, 2, 8192));
    drop(fourth);
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

/// An upload that is under way when its caller goes keeps what it uses; a write waits its turn.
async fn a_promotion_that_is_dropped_half_way(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.put(bytes(1, 1, 100_000), HOST).await.unwrap();
    gpu.hold();
    let promote = tokio::spawn({
        let (vmem, handle) = (vmem.clone(), handle.clone());
        async move { vmem.promote(&handle, VRAM).await }
    });
    while !gpu.is_busy() {
        tokio::task::yield_now().await;
    }
    promote.abort();
    assert!(promote.await.unwrap_err().is_cancelled());
    // Readers are served meanwhile.
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 100_000));
    assert_eq!(vmem.stats().vram.used_bytes, 100_352);
    // A write waits for it, and wins.
    let mut write = Box::pin(vmem.write(&handle, bytes(1, 2, 100_000)));
    assert!((&mut write).now_or_never().is_none());
    gpu.release_all();
    write.await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, 100_000));

    // Freed while it goes up.
    gpu.hold();
    let promote = vmem.promote(&handle, VRAM);
    let mut promote = Box::pin(promote);
    assert!((&mut promote).now_or_never().is_none());
    while !gpu.is_busy() {
        tokio::task::yield_now().await;
    }
    vmem.free(handle.clone()).await.unwrap();
    drop(promote);
    assert!(vmem.stats().vram.used_bytes > 0, "the copy in flight has it");
    gpu.release_all();
    assert_all_back(vmem, &driver, &gpu, Vec::new()).await;
}

async fn a_device_that_fails_and_one_that_is_lost(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handles = put_all(&vmem, 3, 20_000, HOST).await;
    vmem.demote(&handles[2], DISK).await.unwrap();
    for handle in &handles {
        gpu.fail_next_upload();
        let error = vmem.promote(handle, VRAM).await.unwrap_err();
        assert!(matches!(error, VirtualMemoryError::Device { code: 719, .. }), "{error:?}");
        assert_eq!(vmem.stats().vram.used_bytes, 0, "what was taken came back");
        vmem.promote(handle, VRAM).await.unwrap();
        assert!(in_vram(&vmem, handle));
        vmem.demote(handle, HOST).await.unwrap();
    }
    vmem.promote(&handles[1], VRAM).await.unwrap();
    gpu.lose();
    assert!(vmem.promote(&handles[0], VRAM).await.is_err());
    assert!(!in_vram(&vmem, &handles[1]));
    for (n, handle) in handles.iter().enumerate() {
        let error = vmem.promote(handle, VRAM).await.unwrap_err();
        let VirtualMemoryError::TierNotAvailable { tier: VRAM, reason } = error else {
            panic!("{error:?}")
        };
        assert!(!reason.is_empty());
        assert!(vmem.pin(handle, VRAM).await.is_err());
        assert!(vmem.allocate(10, VRAM).await.is_err());
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 1, 20_000));
        vmem.write(handle, bytes(n as u64 + 1, 2, 20_000)).await.unwrap();
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 2, 20_000));
    }
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

/// Home is VRAM: room is taken there, zeros are read, and what is written comes up by itself.
async fn at_home_in_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.allocate(70_000, VRAM).await.unwrap();
    assert_eq!(handle.home_tier(), VRAM);
    assert_eq!(vmem.stats().vram.used_bytes, 70_144, "room is taken at home");
    assert!(vmem.read(&handle).await.unwrap() == vec![0; 70_000]);
    vmem.flush(&handle).await.unwrap();
    assert!(in_vram(&vmem, &handle));
    vmem.demote(&handle, DISK).await.unwrap();
    assert_eq!(vmem.stats().vram.used_bytes, 0);
    vmem.promote(&handle, VRAM).await.unwrap();
    // Zeros need no bytes: they were made where they are. Nothing of what was there before shows.
    settle(&vmem, &driver).await;
    assert!(vmem.read(&handle).await.unwrap() == vec![0; 70_000]);

    for version in 1..4 {
        vmem.write(&handle, bytes(1, version, 70_000)).await.unwrap();
        vmem.flush(&handle).await.unwrap();
        assert!(in_vram(&vmem, &handle), "{version}");
        assert_eq!(vmem.stats().vram.used_bytes, 70_144, "in the same memory");
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, version, 70_000));
    }
    // More than device memory holds: those that find no room there live below.
    let mut all = put_all(&vmem, 40, 50_000, VRAM).await;
    for (n, handle) in all.iter().enumerate() {
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 1, 50_000));
    }
    let empty = vmem.put([], VRAM).await.unwrap();
    vmem.promote(&empty, VRAM).await.unwrap();
    drop(vmem.pin(&empty, VRAM).await.unwrap());
    all.push(handle);
    all.push(empty);
    vmem.flush_all().await.unwrap();
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// A prefetch comes up in order, makes nothing leave that is in use, and can be dropped.
async fn prefetches_to_vram(which: Which) {
    let (vmem, driver, gpu) = open(which, 4 * 8192, 4 * MIB, |config| config.max_pinned(1.0));
    let handles = put_all(&vmem, 8, 8192, HOST).await;
    let group: Vec<_> = handles[..4].to_vec();
    vmem.prefetch_many(&group, VRAM).await.unwrap();
    assert!(group.iter().all(|handle| in_vram(&vmem, handle)));
    assert_eq!(vmem.stats().vram.objects, 4);
    // It waits for what is pinned, and then takes nothing that was used since it was asked for.
    let mut pins = Vec::new();
    for handle in &group {
        pins.push(vmem.pin(handle, VRAM).await.unwrap());
    }
    let mut prefetch = vmem.prefetch(&handles[4], VRAM);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!((&mut prefetch).now_or_never().is_none());
    vmem.promote(&group[0], VRAM).await.unwrap();
    vmem.promote(&group[2], VRAM).await.unwrap();
    // A dropped one is gone.
    drop(vmem.prefetch(&handles[5], VRAM));
    drop(pins);
    prefetch.await.unwrap();
    let there: Vec<_> = handles.iter().map(|handle| in_vram(&vmem, handle)).collect();
    assert!(there[0] && there[2] && there[4] && !(there[1] && there[3]), "{there:?}");
    settle(&vmem, &driver).await;
    assert!(!in_vram(&vmem, &handles[5]));
    drop(group);
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

/// A prefetch that is dropped half way leaves nothing behind.
async fn a_prefetch_that_is_dropped_half_way(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.put(bytes(1, 1, 100_000), HOST).await.unwrap();
    gpu.hold();
    let prefetch = vmem.prefetch(&handle, VRAM);
    while !gpu.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(vmem.stats().vram.used_bytes > 0);
    drop(prefetch);
    gpu.release_all();
    let mut left = vmem.stats().vram.used_bytes;
    for _ in 0..2000 {
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        left = vmem.stats().vram.used_bytes;
    }
    assert_eq!((left, vmem.stats().vram.objects), (0, 0));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 100_000));
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}

/// From disk, piece by piece through the least staging there is, with host memory full of what readers hold.
async fn from_disk_with_host_memory_held(which: Which) {
    let (vmem, driver, gpu) = open(which, 8 * MIB, 256 * KIB, |config| config);
    let len = MIB + 12_345;
    let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    let others = put_all(&vmem, 3, 65_536, HOST).await;
    let mut held = Vec::new();
    for other in &others {
        held.push(vmem.read(other).await.unwrap());
    }
    vmem.promote(&handle, VRAM).await.unwrap();
    assert!(in_vram(&vmem, &handle));
    driver.fail(|op, _| (op == Op::Read).then(|| io::Error::from_raw_os_error(5)));
    let mut read = vec![0; len];
    vmem.read_into(&handle, 0..len, &mut read).await.unwrap();
    assert!(read == bytes(1, 1, len));
    driver.heal();
    drop(held);
    let mut all = others;
    all.push(handle);
    assert_all_back(vmem, &driver, &gpu, all).await;
}

/// Every operation that names a tier, at random, from many tasks, with futures dropped at random: no wrong
/// byte, never above the budget, nothing left.
async fn every_tier_at_random(which: Which) {
    let seed = support::seed();
    let (vmem, driver, gpu) = open(which, 1500 * KIB, MIB, |config| {
        config.wait_timeout(Duration::from_millis(300)).max_pinned(0.5)
    });
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8_u64 {
        let (vmem, gpu) = (vmem.clone(), gpu.clone());
        tasks.spawn(async move {
            let mut rng = SmallRng::seed_from_u64(seed ^ (task << 32));
            let mut counts = [0_usize; 2];
            let mut objects = Vec::new();
            for step in 0..400_u64 {
                if objects.len() < 12 || rng.random_ratio(1, 20) {
                    let len = [500, 4096, 40_000, 65_536, 150_000][rng.random_range(0..5)];
                    let home = [VRAM, HOST, DISK][rng.random_range(0..3)];
                    if let Ok(handle) = vmem.allocate(len, home).await {
                        objects.push((handle, 0, 0));
                    }
                    continue;
                }
                let at = rng.random_range(0..objects.len());
                let (handle, done, begun): &mut (VMemHandle, u64, u64) = &mut objects[at];
                let (id, len) = (handle.id(), handle.len());
                let tier = [VRAM, HOST, DISK][rng.random_range(0..3)];
                let patience = match rng.random_range(0..4) {
                    0 => Duration::from_micros(rng.random_range(0..2000)),
                    _ => Duration::from_secs(20),
                };
                if rng.random_ratio(1, 50) {
                    gpu.fail_next_upload();
                    gpu.fail_next_download();
                }
                let outcome = match rng.random_range(0..9) {
                    0..=2 => {
                        let read = tokio::time::timeout(patience, vmem.read(handle)).await;
                        if let Ok(Ok(read)) = &read {
                            let right = (*done..=*begun)
                                .any(|version| read[..] == bytes(id, version, len)[..]);
                            assert!(right, "step {step}: object {id} versions {done}..={begun}");
                        }
                        read.map(|read| read.map(drop))
                    }
                    3 => {
                        *begun += 1;
                        let new = bytes(id, *begun, len);
                        let write = tokio::time::timeout(patience, vmem.write(handle, new)).await;
                        if let Ok(Ok(())) = write {
                            *done = *begun;
                        }
                        write
                    }
                    4 | 5 => tokio::time::timeout(patience, vmem.promote(handle, tier)).await,
                    6 => tokio::time::timeout(patience, vmem.demote(handle, tier)).await,
                    7 => {
                        let pin = tokio::time::timeout(patience, vmem.pin(handle, tier)).await;
                        tokio::task::yield_now().await;
                        if let Ok(Ok(_guard)) = &pin
                            && tier == VRAM
                        {
                            let residency = vmem.residency(handle).unwrap();
                            assert!(residency.vram, "pinned, and not there: {residency:?}");
                        }
                        pin.map(|pin| pin.map(drop))
                    }
                    _ if rng.random_bool(0.5) => {
                        vmem.prefetch(handle, tier).detach();
                        Ok(Ok(()))
                    }
                    _ => {
                        objects.swap_remove(at);
                        continue;
                    }
                };
                match outcome {
                    Ok(Ok(())) => counts[0] += 1,
                    Ok(Err(VirtualMemoryError::Device { .. })) => {}
                    Ok(Err(error)) if support::is_pressure(&error) => counts[1] += 1,
                    Ok(Err(error)) => panic!("{error:?}"),
                    Err(_dropped) => {}
                }
                let stats = vmem.stats();
                assert!(stats.vram.used_bytes <= stats.vram.capacity_bytes, "{stats:#?}");
            }
            counts
        });
    }
    let counts = tasks.join_all().await;
    println!("{counts:?}, {:?}", vmem.stats());
    let stats = vmem.stats();
    assert!(stats.vram.hits > 0 && stats.host_to_vram_bytes > 0 && stats.evictions > 0);
    assert!(counts.iter().map(|counts| counts[0]).sum::<usize>() > 1000, "{counts:?}");
    assert_all_back(vmem, &driver, &gpu, Vec::new()).await;
}

/// A migration to VRAM is told with its route.
async fn migrations_to_vram_are_told(which: Which) {
    use futures::StreamExt;
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let mut migrations = Box::pin(vmem.migrations());
    let handle = vmem.put(bytes(1, 1, 3000), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to, event.bytes), (HOST, VRAM, 3000));
    assert_eq!(event.cause, MigrationCause::Promote);
    vmem.demote(&handle, DISK).await.unwrap();
    drop(migrations.next().await.unwrap());
    vmem.promote(&handle, VRAM).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to), (DISK, VRAM));
    vmem.demote(&handle, HOST).await.unwrap();
    let event = migrations.next().await.unwrap();
    assert_eq!((event.from, event.to, event.cause), (VRAM, HOST, MigrationCause::Demote));
    assert!(vmem.residency(&handle).unwrap().host);
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}
