//! The VRAM tier, over a simulated device and over the CUDA tier on the emulated driver: residency
//! through three tiers, the budget, pins, prefetches, failures.
//!
//! Invariant: both devices are late, own what they were given, and hold garbage where nothing was
//! written; so bytes that are right here were where they should be when they were read. The
//! emulated driver has seen no rule broken.

mod faults;
mod moves;

use std::sync::Arc;

use vmem::backend::{Backends, DeviceBackend};
use vmem::{
    Capabilities, GpuSelection, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder,
};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

use crate::support::{self, MIB, MemDriver, STAGING, config, settle};
use faults::{
    a_device_that_fails_and_one_that_is_lost, a_prefetch_that_is_dropped_half_way,
    a_promotion_that_is_dropped_half_way, every_tier_at_random,
};
use moves::{
    a_read_takes_the_faster_copy, allocate_on_host_write_promote_to_vram_read, at_home_in_vram,
    from_disk_with_host_memory_held, migrations_to_vram_are_told, pins_keep_objects_in_vram,
    prefetches_to_vram, what_is_used_least_leaves,
};

const VRAM: MemoryTier = MemoryTier::Vram;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Simulated,
    Emulated,
}

/// The device under test, which follows commands.
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

    /// Nothing is promoted until it is released.
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

    /// Whether something waits to be promoted.
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
    let driver = MemDriver::new();
    let gpu = Arc::new(Gpu::new(which, vram as u64));
    let backends = Backends {
        remote: None,
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
