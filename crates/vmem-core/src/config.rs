//! What a store may use, and how it decides.
//!
//! Invariant: a [`VirtualMemoryConfig`] is always valid: the builder refuses what cannot work and
//! names the field. What depends on the machine (free memory, free space) is left open here and
//! filled in when the store opens. Called by users; read by the facade and by `Shared`.

mod budget;
mod builder;
mod choices;
#[cfg(feature = "serde")]
mod file;
#[cfg(feature = "serde")]
mod write;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use budget::Budget;
pub(crate) use budget::Effective;
pub use choices::{GpuSelection, IoDriver, Promotion, SwitchPoints, WriteBack};

use crate::policy::PolicyChoice;

/// The least `host_capacity`, in bytes: a few staging pieces and a few slots.
pub const HOST_CAPACITY_MIN: u64 = 256 * 1024;
/// The default of `staging_capacity` is an eighth of `host_capacity`, and at most this, in bytes.
pub const STAGING_CAPACITY_MAX: u64 = 256 * 1024 * 1024;
/// The least `staging_capacity`, in bytes.
pub const STAGING_CAPACITY_MIN: u64 = 128 * 1024;

/// The least `stream_capacity`, in bytes.
pub const STREAM_CAPACITY_MIN: u64 = 64 * 1024;
/// The default of `stream_capacity` is a sixteenth of `host_capacity`, and at most this, in bytes.
pub const STREAM_CAPACITY_MAX: u64 = 64 * 1024 * 1024;

/// The most GPUs that one store uses.
pub const GPUS_MAX: usize = 32;

/// A valid configuration. Sizes are bytes.
///
/// With the feature `serde` it is read from a file, and written to one: the fields have the names
/// of the builder's setters. An unknown field is an error.
///
/// - `disk_path`: text, the path of a directory. `allow_foreign_files`: `true` or `false`.
/// - `host_capacity`, `disk_capacity`, `vram_capacity`: a number of bytes, or text such as
///   `"512MiB"` or `"1.5 GB"`, with the units B, kB, MB, GB, TB, PB, EB (powers of 1000) and KiB,
///   MiB, GiB, TiB, PiB, EiB (powers of 1024); or a percentage such as `"25%"`, as
///   [`host_percent`](VirtualMemoryConfigBuilder::host_percent) and its siblings say.
/// - `vram_capacities`, in place of `vram_capacity`: a list of such, one for each of `gpus`.
/// - `staging_capacity`, `stream_capacity`, `catalog_cache`: the same, without percentages.
/// - `gpu`: `"auto"`, `"off"`, an ordinal such as `0`, or text with the UUID of a device; or
///   `gpus`, a list of ordinals and UUIDs.
/// - `io_driver`: `"auto"`, `"reactor"`, `"tokio-uring"` or `"blocking"`.
/// - `watermarks`: two numbers, low and high. `max_pinned`, `max_held`: a number.
/// - `policy`, `vram_policy`: `"lru"`, `"sieve"`, or `"s3-fifo"`, also written `"s3fifo"`.
/// - `vram_policies`, in place of `vram_policy`: a list of such, one for each of `gpus`.
/// - `promotion`: the number of the read, from 1 on, or `"never"`; or `"gather:2"`, which is
///   `gather_promotion = 2`.
/// - `gather_promotion`: the number of the gather, from 1 on, or `"never"`.
/// - `write_back`: `"eager"`, `"on-evict"`, or after how long, such as `"250ms"`.
/// - `switch_points`: a table with some of `small_max`, `small_min` and `batch_min`, whole numbers.
/// - `wait_timeout`, `slow_read_threshold`: text such as `"30s"`, `"1m 30s"` or `"250ms"`.
/// - `spans_per_second`: a number; 4294967295 is no bound.
///
/// ```
/// use vmem::{MemoryTier, VirtualMemoryConfig};
///
/// let config = VirtualMemoryConfig::builder()
///     .host_capacity(64 << 20)
///     .disk_capacity(1 << 30)
///     .build()
///     .unwrap();
/// assert_eq!(config.host_capacity(), Some(64 << 20));
///
/// let refused = VirtualMemoryConfig::builder().watermarks(0.9, 0.5).build().unwrap_err();
/// assert!(refused.to_string().contains("watermarks"));
/// ```
#[derive(Clone, Debug, Default)]
pub struct VirtualMemoryConfig {
    fields: VirtualMemoryConfigBuilder,
}

impl VirtualMemoryConfig {
    /// A builder with every field at its default.
    pub fn builder() -> VirtualMemoryConfigBuilder {
        VirtualMemoryConfigBuilder::default()
    }

    /// The directory of the store, if one was given.
    pub fn disk_path(&self) -> Option<&Path> {
        self.fields.disk_path.as_deref()
    }

    /// Whether that directory may hold files of others.
    pub fn allow_foreign_files(&self) -> bool {
        self.fields.allow_foreign_files
    }

    /// Host memory, staging included, if it was given in bytes.
    pub fn host_capacity(&self) -> Option<u64> {
        self.fields.host_capacity.bytes()
    }

    /// Staging memory, if it was given.
    pub fn staging_capacity(&self) -> Option<u64> {
        self.fields.staging_capacity
    }

    /// Memory for streams, if it was given.
    pub fn stream_capacity(&self) -> Option<u64> {
        self.fields.stream_capacity
    }

    /// Space of the data file, if it was given in bytes.
    pub fn disk_capacity(&self) -> Option<u64> {
        self.fields.disk_capacity.bytes()
    }

    /// Memory of each device, if it was given in bytes, as one number for all.
    pub fn vram_capacity(&self) -> Option<u64> {
        self.fields.vram_capacity.bytes().filter(|_| self.fields.vram_capacities.is_none())
    }

    /// Which GPU.
    pub fn gpus(&self) -> &[GpuSelection] {
        &self.fields.gpus
    }

    /// Which disk driver.
    pub fn io_driver(&self) -> IoDriver {
        self.fields.io_driver
    }

    /// Low and high watermark, as fractions of capacity.
    pub fn watermarks(&self) -> (f64, f64) {
        self.fields.watermarks
    }

    /// The fraction of a tier that pins and leases may hold.
    pub fn max_pinned(&self) -> f64 {
        self.fields.max_pinned
    }

    /// The fraction of object space that readers may hold.
    pub fn max_held(&self) -> f64 {
        self.fields.max_held
    }

    /// The order of eviction.
    pub fn policy(&self) -> PolicyChoice {
        self.fields.policy.clone()
    }

    /// The order of eviction in device memory, unless it was given for each device by itself.
    pub fn vram_policy(&self) -> PolicyChoice {
        self.fields.vram_policy.clone().unwrap_or_else(|| self.policy())
    }

    /// The order of eviction in the memory of the device with this number in [`gpus`](Self::gpus).
    pub fn vram_policy_of(&self, device: usize) -> PolicyChoice {
        let by_itself = self.fields.vram_policies.as_ref().and_then(|each| each.get(device));
        by_itself.cloned().unwrap_or_else(|| self.vram_policy())
    }

    /// When a read promotes an object.
    pub fn promotion(&self) -> Promotion {
        self.fields.promotion
    }

    /// When a gather promotes an object.
    pub fn gather_promotion(&self) -> Promotion {
        self.fields.gather_promotion
    }

    /// When what kernels wrote in device memory is written back.
    pub fn write_back(&self) -> WriteBack {
        self.fields.write_back
    }

    /// Which way copies to and from a device go.
    pub fn switch_points(&self) -> SwitchPoints {
        self.fields.switch_points
    }

    /// What the catalog of names keeps of itself in memory, in bytes.
    pub fn catalog_cache(&self) -> u64 {
        self.fields.catalog_cache
    }

    /// How long a request waits for space.
    pub fn wait_timeout(&self) -> Duration {
        self.fields.wait_timeout
    }

    /// From when on an event tells of a read.
    pub fn slow_read_threshold(&self) -> Duration {
        self.fields.slow_read_threshold
    }

    /// How many spans a second reads have, and how many what runs for none.
    pub fn spans_per_second(&self) -> u32 {
        self.fields.spans_per_second
    }
}

/// Sets the fields of a [`VirtualMemoryConfig`], by value.
#[derive(Clone, Debug)]
pub struct VirtualMemoryConfigBuilder {
    disk_path: Option<PathBuf>,
    allow_foreign_files: bool,
    host_capacity: Budget,
    staging_capacity: Option<u64>,
    stream_capacity: Option<u64>,
    disk_capacity: Budget,
    vram_capacity: Budget,
    /// Of each device by itself, where they are not alike.
    vram_capacities: Option<Vec<Budget>>,
    gpus: Vec<GpuSelection>,
    io_driver: IoDriver,
    watermarks: (f64, f64),
    max_pinned: f64,
    max_held: f64,
    policy: PolicyChoice,
    vram_policy: Option<PolicyChoice>,
    /// Of each device by itself.
    vram_policies: Option<Vec<PolicyChoice>>,
    promotion: Promotion,
    gather_promotion: Promotion,
    write_back: WriteBack,
    switch_points: SwitchPoints,
    catalog_cache: u64,
    wait_timeout: Duration,
    slow_read_threshold: Duration,
    spans_per_second: u32,
}

impl Default for VirtualMemoryConfigBuilder {
    fn default() -> Self {
        VirtualMemoryConfigBuilder {
            disk_path: None,
            allow_foreign_files: false,
            host_capacity: Budget::Default,
            staging_capacity: None,
            stream_capacity: None,
            disk_capacity: Budget::Default,
            vram_capacity: Budget::Default,
            vram_capacities: None,
            gpus: vec![GpuSelection::default()],
            io_driver: IoDriver::default(),
            watermarks: (0.85, 0.95),
            max_pinned: 0.8,
            max_held: 1.0,
            policy: PolicyChoice::default(),
            vram_policy: None,
            vram_policies: None,
            promotion: Promotion::default(),
            gather_promotion: Promotion::Never,
            write_back: WriteBack::default(),
            switch_points: SwitchPoints::default(),
            catalog_cache: 8 << 20,
            wait_timeout: Duration::from_secs(30),
            slow_read_threshold: Duration::from_secs(1),
            spans_per_second: 500,
        }
    }
}

/// Staging memory that a store with this much host memory gets when none was asked for, in bytes.
pub(crate) fn default_staging(host_capacity: u64) -> u64 {
    (host_capacity / 8).clamp(STAGING_CAPACITY_MIN, STAGING_CAPACITY_MAX)
}

/// Memory for streams that a store with this much host memory gets when none was asked for, in
/// bytes.
pub(crate) fn default_streams(host_capacity: u64) -> u64 {
    (host_capacity / 16).clamp(STREAM_CAPACITY_MIN, STREAM_CAPACITY_MAX)
}
