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
//! `vmem-core` decides, `vmem-io` is the disk tier, `vmem-gpu` the VRAM tier;
//! this crate opens them together. See `docs/architecture.md` for the life of a read.

pub use vmem_core::*;

/// Objects for kernels: leases on streams of cudarc's, whose types are re-exported.
pub mod gpu {
    pub use cudarc;
    #[cfg(feature = "dlpack")]
    pub use vmem_gpu::dlpack;
    pub use vmem_gpu::{
        DeviceLease, DeviceLeaseMut, DeviceSet, DeviceSetRequest, DeviceTarget, Gathered,
        Scattered, VramExt,
    };
}

use vmem_core::backend::Backends;

/// Opens a store on this machine, inside a tokio runtime whose timer is enabled.
///
/// # Errors
///
/// `InUse` if another process, or another store in this one, has the directory; `InvalidConfig`
/// with the field that cannot work here; `TierNotAvailable` if a driver or a GPU was asked for
/// that is not to be had; `Io` with what was attempted.
pub async fn open(config: VirtualMemoryConfig) -> Result<VirtualMemory, VirtualMemoryError> {
    // Opening makes, tries and registers things, which blocks for a moment.
    let opening = tokio::task::spawn_blocking(move || open_blocking(&config));
    let lost = |error: tokio::task::JoinError| VirtualMemoryError::io("opening", error.into());
    opening.await.map_err(lost)?
}

fn open_blocking(config: &VirtualMemoryConfig) -> Result<VirtualMemory, VirtualMemoryError> {
    let (vram, wait) = (config.vram_capacity(), config.wait_timeout());
    let gpu = vmem_gpu::open_device_within(config.gpu(), vram, wait)?;
    let (path, capacity) = (config.disk_path(), config.disk_capacity());
    let disk = vmem_io::open_disk(path, capacity, config.io_driver(), config.catalog_cache())?;
    let mut capabilities = Capabilities::new(disk.backend.describe(), gpu.reason);
    capabilities.disk_driver = Some(disk.driver);
    capabilities.disk_direct = disk.direct;
    capabilities.disk_notes = disk.notes;
    capabilities.disk_path = Some(disk.path);
    capabilities.disk_is_tmpfs = disk.tmpfs;
    let host_capacity_bytes =
        config.host_capacity().unwrap_or_else(|| vmem_io::memory_limit_bytes() / 4);
    VirtualMemory::with_backends(
        config,
        Backends {
            host_capacity_bytes,
            disk: disk.backend,
            catalog: Some(disk.catalog),
            device: gpu.device,
            capabilities,
        },
    )
}
