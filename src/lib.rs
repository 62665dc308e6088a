//! Async tiered storage: one awaitable handle over GPU memory, host RAM and disk.
//!
//! A service holds more data than its memory can. It puts objects into a [`VirtualMemory`], keeps
//! their [`VMemHandle`]s and awaits what it needs; a background actor moves objects between the
//! tiers behind it, within hard budgets, and loses none.
//!
//! ```
//! use vmem::{MemoryTier, VirtualMemoryConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), vmem::VirtualMemoryError> {
//! let config = VirtualMemoryConfig::builder()
//!     .host_capacity(16 << 20)
//!     .disk_capacity(64 << 20)
//!     .build()?;
//! let vmem = vmem::open(config).await?;
//!
//! let handle = vmem.put(b"an embedding", MemoryTier::Host).await?;
//! assert_eq!(&vmem.read(&handle).await?[..], b"an embedding");
//!
//! vmem.demote(&handle, MemoryTier::Disk).await?;
//! vmem.prefetch(&handle, MemoryTier::Host).detach();
//! assert_eq!(&vmem.read_at(&handle, 3..12).await?[..], b"embedding");
//!
//! vmem.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `gpu` (default): the VRAM tier over CUDA, and [`gpu`]. Without it a GPU that is asked for is
//!   `TierNotAvailable`, and [`Capabilities`] says why there is none.
//! - `tokio-uring` (default): the disk driver [`IoDriver::TokioUring`], on Linux. Without it that
//!   driver is `TierNotAvailable`; [`IoDriver::Auto`] has the reactor driver, also io_uring, and
//!   blocking calls.
//! - `metrics`: `VirtualMemory::publish_metrics`, and `metrics`, what it publishes.
//! - `serde`: a [`VirtualMemoryConfig`] is read from a file.
//! - `dlpack`: leases become tensors for PyTorch and others, and theirs buffers; implies `gpu`.
//! - `tokio-console`: shows tasks, migrations, tiers and waiting reads in tokio-console, where
//!   `--cfg tokio_unstable` is set too.
//!
//! `vmem-core` decides, `vmem-io` is the disk tier, `vmem-gpu` the VRAM tier;
//! this crate opens them together. See `docs/architecture.md` for the life of a read.

pub use vmem_core::*;
pub use vmem_io::{Verified, verify};

/// Objects for kernels: leases on streams of cudarc's, whose types are re-exported.
#[cfg(feature = "gpu")]
pub mod gpu {
    pub use cudarc;
    #[cfg(feature = "dlpack")]
    pub use vmem_gpu::dlpack;
    pub use vmem_gpu::{
        DeviceLease, DeviceLeaseMut, DeviceSet, DeviceSetRequest, DeviceTarget, Gathered,
        Scattered, Scratch, VramExt, adopt_stream,
    };
}

use std::sync::Arc;

use vmem_core::backend::{Backends, DeviceBackend, Remote};

/// Opens a store on this machine, inside of a tokio runtime whose timer is enabled. What of it runs
/// in the background runs on that runtime. An I/O driver makes the fastest disk driver available
/// and is not needed.
///
/// # Forks
///
/// A store belongs to the process that opened it. A forked child that goes on without `exec` may
/// drop its copy, which gives nothing back: files, lock and memory stay the parent's. It must not
/// use it: host memory is not inherited, so reading an object, or a `Bytes` that was read before,
/// ends the child by a signal, and calls that need the runtime's threads never return. As with any
/// tokio runtime, dropping one that has threads of its own hangs in a child; end it by `_exit`.
///
/// # Errors
///
/// `UnsuitableRuntime`, with the remedy, outside of a tokio runtime and in one without a timer;
/// `InUse` if another process, or another store in this one, has the directory; `InvalidConfig`
/// with the field that cannot work here, such as the path of a directory that holds files and no
/// store; `TierNotAvailable` if a driver or a GPU was asked for that is unavailable; `Io` with what
/// was attempted.
pub async fn open(config: VirtualMemoryConfig) -> Result<VirtualMemory, VirtualMemoryError> {
    open_all(config, None).await
}

/// The same, with `remote` as the tier below the disk, [`MemoryTier::Remote`]: the crate
/// `vmem-remote` makes one of an object store. [`VirtualMemory::close`] closes it.
///
/// # Errors
///
/// Those of [`open`]. The tier was not closed then.
pub async fn open_over(
    config: VirtualMemoryConfig,
    remote: Arc<dyn vmem_core::backend::Tier>,
) -> Result<VirtualMemory, VirtualMemoryError> {
    open_all(config, Some((Remote::Unnamed(remote), None))).await
}

/// The same, with the names of the store in `remote` as well: what has a name is durable once it is
/// there, whatever its home, and the disk has copies of it. `names` is the catalog of the same
/// place. The crate `vmem-remote` makes both of an object store. [`VirtualMemory::close`] closes
/// them.
///
/// # Errors
///
/// Those of [`open`]; `InvalidConfig` if `disk_path` is a store that has names of its own. Neither
/// the tier nor the catalog was closed then.
pub async fn open_over_names(
    config: VirtualMemoryConfig,
    remote: Arc<dyn vmem_core::backend::Durable>,
    names: Arc<dyn vmem_core::backend::Catalog>,
) -> Result<VirtualMemory, VirtualMemoryError> {
    open_all(config, Some((Remote::Named(remote), Some(names)))).await
}

/// What lies below the disk, and the names that lead there.
type Below = (Remote, Option<Arc<dyn vmem_core::backend::Catalog>>);

async fn open_all(
    config: VirtualMemoryConfig,
    below: Option<Below>,
) -> Result<VirtualMemory, VirtualMemoryError> {
    let runtime = vmem_core::backend::current_runtime()?;
    let (reply, answer) = tokio::sync::oneshot::channel();
    // Opening makes files, tries drivers and registers memory, which blocks for a moment. It does
    // not run on the runtime's blocking threads, since those may all be busy, for any time.
    let opening = move || {
        let _inside = runtime.enter();
        let _ = reply.send(open_blocking(&config, below));
    };
    let started = std::thread::Builder::new().name("vmem-open".to_owned()).spawn(opening);
    started.map_err(|error| VirtualMemoryError::io("starting a thread", error))?;
    let panicked = |_| {
        let why = std::io::Error::other("it ended in a panic, which is a bug of this crate");
        Err(VirtualMemoryError::io("opening", why))
    };
    answer.await.unwrap_or_else(panicked)
}

fn open_blocking(
    config: &VirtualMemoryConfig,
    below: Option<Below>,
) -> Result<VirtualMemory, VirtualMemoryError> {
    vmem_core::backend::check_runtime()?;
    let (devices, no_device) = open_devices(config)?;
    let host_capacity_bytes = host_capacity_bytes(config)?;
    let disk = vmem_io::open_disk_with(vmem_io::DiskOptions {
        path: config.disk_path(),
        allow_foreign_files: config.allow_foreign_files(),
        capacity: config.disk_budget(),
        driver: config.io_driver(),
        catalog_cache: config.catalog_cache(),
    })?;
    let mut capabilities = Capabilities::new(disk.backend.describe(), no_device);
    capabilities.disk_driver = Some(disk.driver);
    capabilities.disk_direct = disk.direct;
    capabilities.disk_notes = disk.notes;
    capabilities.disk_path = Some(disk.path);
    capabilities.disk_is_tmpfs = disk.tmpfs;
    let (remote, names) = below.unzip();
    let catalog = match names.flatten() {
        None => disk.catalog,
        Some(names) => {
            refuse_names(&*disk.catalog)?;
            names
        }
    };
    VirtualMemory::with_backends(
        config,
        Backends {
            remote,
            host_capacity_bytes,
            disk: disk.backend,
            catalog: Some(catalog),
            devices,
            capabilities,
        },
    )
}

/// The disk of a store whose names are elsewhere has none.
///
/// # Errors
///
/// `InvalidConfig` if it has; those of its catalog.
fn refuse_names(catalog: &dyn vmem_core::backend::Catalog) -> Result<(), VirtualMemoryError> {
    let runtime = tokio::runtime::Handle::current();
    let first = catalog.names("".into(), std::ops::Bound::Unbounded, 1);
    let found = runtime.block_on(first);
    runtime.block_on(catalog.close())?;
    match found?.first() {
        None => Ok(()),
        Some((name, _)) => {
            let reason = format!("it is a store that has names of its own, such as {name:?}");
            Err(VirtualMemoryError::invalid_config("disk_path", reason))
        }
    }
}

fn host_capacity_bytes(config: &VirtualMemoryConfig) -> Result<u64, VirtualMemoryError> {
    if let Some(bytes) = config.host_capacity() {
        return Ok(bytes);
    }
    let budget = config.host_budget();
    let limit = vmem_io::memory_limit_bytes();
    let bytes = budget.resolve("host_capacity", limit, || (limit / 4).max(HOST_CAPACITY_MIN))?;
    if bytes < HOST_CAPACITY_MIN {
        let reason = format!("at least {HOST_CAPACITY_MIN}, and {budget} of {limit} are {bytes}");
        return Err(VirtualMemoryError::invalid_config("host_capacity", reason));
    }
    Ok(bytes)
}

/// The devices, and why there are none.
#[cfg(feature = "gpu")]
fn open_devices(config: &VirtualMemoryConfig) -> Result<Devices, VirtualMemoryError> {
    let wait = config.wait_timeout();
    let mut devices = Vec::new();
    let mut no_device = "".into();
    for (number, selection) in config.gpus().iter().enumerate() {
        let budget = config.vram_budget_of(number);
        let points = config.switch_points();
        let opened = vmem_gpu::open_device_within(selection, budget, points, wait)?;
        devices.extend(opened.device);
        no_device = opened.reason;
    }
    Ok((devices, no_device))
}

/// No device, whatever the machine has.
#[cfg(not(feature = "gpu"))]
fn open_devices(config: &VirtualMemoryConfig) -> Result<Devices, VirtualMemoryError> {
    let reason: Arc<str> = "this build lacks the feature `gpu`".into();
    match config.gpus() {
        [GpuSelection::Off] => Ok((Vec::new(), "switched off by the configuration".into())),
        [GpuSelection::Auto] => Ok((Vec::new(), reason)),
        _ => Err(VirtualMemoryError::tier_not_available(MemoryTier::Vram, reason)),
    }
}

type Devices = (Vec<Arc<dyn DeviceBackend>>, Arc<str>);

/// The pages of the guide, whose programs doctests compile and run. That of the service is with
/// `vmem-dashboard`, which it mounts; that of the console with `examples/console`.
#[cfg(doctest)]
mod guide {
    #[doc = include_str!("../docs/guide/src/start.md")]
    mod start {}
    #[doc = include_str!("../docs/guide/src/homes.md")]
    mod homes {}
    #[doc = include_str!("../docs/guide/src/budgets.md")]
    mod budgets {}
    #[doc = include_str!("../docs/guide/src/names.md")]
    mod names {}
    #[doc = include_str!("../docs/guide/src/seeing.md")]
    mod seeing {}
    #[doc = include_str!("../docs/guide/src/operating.md")]
    mod operating {}
    #[cfg(feature = "gpu")]
    #[doc = include_str!("../docs/guide/src/gpu.md")]
    mod gpu {}
}
