//! The builder of a configuration, which checks what it is given.
//!
//! Invariant: what `build` returns is within the limits that the parent module names. Called by
//! users, and by `file` and `budget`.

use std::path::PathBuf;
use std::time::Duration;

use super::{
    Budget, GPUS_MAX, GpuSelection, HOST_CAPACITY_MIN, IoDriver, Promotion, STAGING_CAPACITY_MIN,
    STREAM_CAPACITY_MIN, SwitchPoints, VirtualMemoryConfig, VirtualMemoryConfigBuilder, WriteBack,
};
use crate::error::VirtualMemoryError;
use crate::policy::PolicyChoice;

/// Copies that are longer are never small, in bytes.
const SMALL_MAX: usize = 1 << 20;

impl VirtualMemoryConfigBuilder {
    /// The directory of the store. If it does not exist it is created, private to the user. One
    /// that holds anything but a store is refused when the store opens.
    /// Default: a private temporary directory, removed on close. If the process is killed, the next
    /// store with such a directory removes it.
    pub fn disk_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.disk_path = Some(path.into());
        self
    }

    /// Accepts a directory that holds other files and no store. Otherwise it is refused, since it
    /// is probably the wrong one. The other files are left alone. Default: false.
    pub fn allow_foreign_files(mut self, allow: bool) -> Self {
        self.allow_foreign_files = allow;
        self
    }

    /// Host memory in bytes, staging included; at least [`HOST_CAPACITY_MIN`].
    /// Default: a quarter of the smallest of RAM and the memory limits of the process's control
    /// groups, from its own up to the root.
    pub fn host_capacity(mut self, bytes: u64) -> Self {
        self.host_capacity = Budget::Bytes(bytes);
        self
    }

    /// The part of `host_capacity`, in bytes, through which bytes pass between callers and tiers,
    /// and between tiers; at least [`STAGING_CAPACITY_MIN`], less than `host_capacity`.
    /// Default: an eighth of `host_capacity`, at most
    /// [`STAGING_CAPACITY_MAX`](crate::STAGING_CAPACITY_MAX).
    pub fn staging_capacity(mut self, bytes: u64) -> Self {
        self.staging_capacity = Some(bytes);
        self
    }

    /// Memory in bytes, beside `host_capacity`, for what readers and writers of streams have
    /// buffered and their peers have not consumed yet: see
    /// [`VirtualMemory::reader`](crate::VirtualMemory::reader). One window gets at most a quarter
    /// of what is free. No stream waits for such memory: where none is free a reader goes on with 4
    /// KiB, and a writer with 64 KiB, beyond the capacity. At least [`STREAM_CAPACITY_MIN`].
    /// Default: a sixteenth of `host_capacity`, at most
    /// [`STREAM_CAPACITY_MAX`](crate::STREAM_CAPACITY_MAX).
    pub fn stream_capacity(mut self, bytes: u64) -> Self {
        self.stream_capacity = Some(bytes);
        self
    }

    /// Space of the data file in bytes. Default: half of what is free in its file system; in a
    /// tmpfs at most a quarter of the memory that the process may have.
    pub fn disk_capacity(mut self, bytes: u64) -> Self {
        self.disk_capacity = Budget::Bytes(bytes);
        self
    }

    /// Memory of each device in bytes. Default: three quarters of what is free on it.
    pub fn vram_capacity(mut self, bytes: u64) -> Self {
        self.vram_capacity = Budget::Bytes(bytes);
        self.vram_capacities = None;
        self
    }

    /// [`vram_capacity`](Self::vram_capacity) of each device by itself, in the order of
    /// [`gpus`](Self::gpus), and as many as these.
    ///
    /// ```
    /// use vmem::{GpuSelection, VirtualMemoryConfig};
    ///
    /// let two = VirtualMemoryConfig::builder().gpus([0, 1].map(GpuSelection::Device));
    /// let config = two.clone().vram_capacities([16 << 30, 40 << 30]).build()?;
    /// assert_eq!(config.vram_budget_of(1).bytes(), Some(40 << 30));
    /// assert!(two.vram_capacities([16 << 30]).build().is_err());
    /// # Ok::<(), vmem::VirtualMemoryError>(())
    /// ```
    pub fn vram_capacities(mut self, bytes: impl IntoIterator<Item = u64>) -> Self {
        self.vram_capacity = Budget::Default;
        self.vram_capacities = Some(bytes.into_iter().map(Budget::Bytes).collect());
        self
    }

    /// Which GPU serves the VRAM tier. Default: [`GpuSelection::Auto`].
    pub fn gpu(mut self, gpu: GpuSelection) -> Self {
        self.gpus = vec![gpu];
        self
    }

    /// Several GPUs, each named by its ordinal or its UUID, [`GPUS_MAX`] at most. Their memory is
    /// [`MemoryTier::of_device`](crate::MemoryTier::of_device), counted from 0 in this order. A
    /// store that cannot use all of them does not open.
    pub fn gpus(mut self, gpus: impl IntoIterator<Item = GpuSelection>) -> Self {
        self.gpus = gpus.into_iter().collect();
        self
    }

    /// How the disk tier reaches its file. Default: [`IoDriver::Auto`].
    pub fn io_driver(mut self, driver: IoDriver) -> Self {
        self.io_driver = driver;
        self
    }

    /// Eviction starts above `high` and ends at `low`, as fractions of the capacity of object
    /// space, `0 < low < high <= 1`. Default: 0.85 and 0.95.
    pub fn watermarks(mut self, low: f64, high: f64) -> Self {
        self.watermarks = (low, high);
        self
    }

    /// The fraction of a tier that pins and leases may hold, `0 < fraction <= 1`. Default: 0.8.
    pub fn max_pinned(mut self, fraction: f64) -> Self {
        self.max_pinned = fraction;
        self
    }

    /// The fraction of object space in host memory that readers may hold, by the bytes that they
    /// have not dropped yet, `0 < fraction <= 1`. Once they hold that much, a read of more than 64
    /// KiB waits until they hold less, whether its object is resident or not, so that slow clients
    /// leave space for others; [`try_read`](crate::VirtualMemory::try_read) finds nothing then, and
    /// a part of at most 64 KiB of a larger object is copied. A resident object that another reader
    /// holds already is shared at once. What such reads are going to hold counts from when they
    /// begin to wait for space or for the disk. Default: 1, no bound.
    pub fn max_held(mut self, fraction: f64) -> Self {
        self.max_held = fraction;
        self
    }

    /// The order of eviction, a [`PolicyKind`](crate::PolicyKind) or one of your own. Default: the
    /// least recently used.
    pub fn policy(mut self, policy: impl Into<PolicyChoice>) -> Self {
        self.policy = policy.into();
        self
    }

    /// The order of eviction in device memory. Default: as [`policy`](Self::policy). A load that
    /// goes through more objects than a device holds, again and again in the same order, such as
    /// the layers of a model, finds none there under `lru`, and some under `s3-fifo`.
    pub fn vram_policy(mut self, policy: impl Into<PolicyChoice>) -> Self {
        self.vram_policy = Some(policy.into());
        self.vram_policies = None;
        self
    }

    /// [`vram_policy`](Self::vram_policy) of each device by itself, in the order of
    /// [`gpus`](Self::gpus), and as many as these.
    ///
    /// ```
    /// use vmem::{GpuSelection, PolicyKind, VirtualMemoryConfig};
    ///
    /// let two = VirtualMemoryConfig::builder().gpus([0, 1].map(GpuSelection::Device));
    /// let config = two.vram_policies([PolicyKind::Lru, PolicyKind::S3Fifo]).build()?;
    /// assert_eq!(config.vram_policy_of(1), PolicyKind::S3Fifo);
    /// # Ok::<(), vmem::VirtualMemoryError>(())
    /// ```
    pub fn vram_policies<P: Into<PolicyChoice>>(
        mut self,
        policies: impl IntoIterator<Item = P>,
    ) -> Self {
        self.vram_policy = None;
        self.vram_policies = Some(policies.into_iter().map(Into::into).collect());
        self
    }

    /// When a read promotes an object to host memory. Default: at the second read.
    /// [`Promotion::OnNthGather`] is the rule for gathers, as if it were given to
    /// [`gather_promotion`](Self::gather_promotion), and changes nothing for reads.
    pub fn promotion(mut self, promotion: Promotion) -> Self {
        match promotion {
            Promotion::OnNthGather(_) => self.gather_promotion = promotion,
            Promotion::OnNthRead(_) | Promotion::Never => self.promotion = promotion,
        }
        self
    }

    /// When a gather promotes an object to the memory of the device that it is for:
    /// [`Promotion::OnNthGather`], or [`Promotion::Never`], which is the default.
    ///
    /// ```
    /// use vmem::{Promotion, VirtualMemoryConfig};
    ///
    /// let config = VirtualMemoryConfig::builder().gather_promotion(Promotion::OnNthGather(2));
    /// let config = config.build().unwrap();
    /// assert_eq!(config.gather_promotion(), Promotion::OnNthGather(2));
    /// assert_eq!(config.promotion(), Promotion::OnNthRead(2), "reads have a rule of their own");
    /// ```
    pub fn gather_promotion(mut self, promotion: Promotion) -> Self {
        self.gather_promotion = promotion;
        self
    }

    /// When what kernels wrote in device memory is written back to host memory. Default:
    /// [`WriteBack::Eager`].
    pub fn write_back(mut self, write_back: WriteBack) -> Self {
        self.write_back = write_back;
        self
    }

    /// From which length and count on copies to and from a device go another way, see
    /// [`SwitchPoints`]. Default: that of an H200.
    pub fn switch_points(mut self, points: SwitchPoints) -> Self {
        self.switch_points = points;
        self
    }

    /// The cache of the catalog of names, in bytes, at least 64 KiB; beside `host_capacity`.
    /// Default: 8 MiB.
    pub fn catalog_cache(mut self, bytes: u64) -> Self {
        self.catalog_cache = bytes;
        self
    }

    /// How long a request waits before it fails, more than zero; default: 30 s. Waits for space,
    /// for another change of the object, for the disk and for a device count together, but those
    /// of [`read_into`](crate::VirtualMemory::read_into) and of streams, which have it for each
    /// piece. So a promotion or a write of very many GiB may need more. A change of names, a
    /// flush of one among them, takes as long as its bytes do; it fails once one commit, with the
    /// sync before it, has not ended for this long, and may still be made then.
    pub fn wait_timeout(mut self, timeout: Duration) -> Self {
        self.wait_timeout = timeout;
        self
    }

    /// A read that is not a hit and takes this long, or longer, causes an event of the target
    /// `vmem::read`, with what it waited for. [`Duration::MAX`]: none does. Default: 1 s.
    pub fn slow_read_threshold(mut self, threshold: Duration) -> Self {
        self.slow_read_threshold = threshold;
        self
    }

    /// How many spans a second reads that are not hits have in the mean, with their migrations; and
    /// how many prefetches and migrations have that run for no read. What was not used is kept for
    /// a second. Beyond it reads and prefetches have none, nor what moves for them, and the next
    /// span has the number of those in its field `left_out`: a subscriber takes microseconds for
    /// each. 0: none has one; `u32::MAX`: all have. Default: 500.
    pub fn spans_per_second(mut self, spans: u32) -> Self {
        self.spans_per_second = spans;
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] with the name of the first field that is invalid.
    pub fn build(self) -> Result<VirtualMemoryConfig, VirtualMemoryError> {
        self.check_capacities()?;
        let (low, high) = self.watermarks;
        // Written so that NaN fails every comparison.
        if !(low > 0.0 && low < high && high <= 1.0) {
            return refuse("watermarks", format!("0 < low < high <= 1, not {low} and {high}"));
        }
        if !(self.max_pinned > 0.0 && self.max_pinned <= 1.0) {
            return refuse("max_pinned", format!("0 < fraction <= 1, not {}", self.max_pinned));
        }
        if !(self.max_held > 0.0 && self.max_held <= 1.0) {
            return refuse("max_held", format!("0 < fraction <= 1, not {}", self.max_held));
        }
        if self.promotion == Promotion::OnNthRead(0) {
            return refuse("promotion", "reads are counted from 1".into());
        }
        match self.gather_promotion {
            Promotion::Never | Promotion::OnNthGather(1..) => {}
            Promotion::OnNthGather(0) => {
                return refuse("gather_promotion", "gathers are counted from 1".into());
            }
            Promotion::OnNthRead(_) => {
                return refuse("gather_promotion", "OnNthGather or Never, not OnNthRead".into());
            }
        }
        let SwitchPoints { small_max, small_min, batch_min } = self.switch_points;
        if small_max > SMALL_MAX || small_min == 0 || batch_min == 0 {
            let reason = format!(
                "small_max at most {SMALL_MAX}, small_min and batch_min at least 1, not \
                 {small_max}, {small_min} and {batch_min}"
            );
            return refuse("switch_points", reason);
        }
        self.check_gpus()?;
        if self.wait_timeout.is_zero() {
            return refuse("wait_timeout", "more than zero".into());
        }
        if self.disk_path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return refuse("disk_path", "an empty path names no directory".into());
        }
        Ok(VirtualMemoryConfig { fields: self })
    }

    fn check_gpus(&self) -> Result<(), VirtualMemoryError> {
        let gpus = &self.gpus;
        if gpus.is_empty() || gpus.len() > GPUS_MAX {
            return refuse("gpus", format!("1 to {GPUS_MAX} GPUs, not {}", gpus.len()));
        }
        let alone = |gpu: &GpuSelection| matches!(gpu, GpuSelection::Auto | GpuSelection::Off);
        if gpus.len() > 1 && gpus.iter().any(alone) {
            return refuse("gpus", "several GPUs need an ordinal or UUID each".into());
        }
        match gpus.iter().enumerate().find(|(at, gpu)| gpus[..*at].contains(gpu)) {
            Some((_, gpu)) => refuse("gpus", format!("{gpu:?} is listed twice")),
            None => Ok(()),
        }
    }

    fn check_capacities(&self) -> Result<(), VirtualMemoryError> {
        self.host_capacity.check("host_capacity", HOST_CAPACITY_MIN)?;
        at_least("staging_capacity", self.staging_capacity, STAGING_CAPACITY_MIN)?;
        at_least("stream_capacity", self.stream_capacity, STREAM_CAPACITY_MIN)?;
        self.disk_capacity.check("disk_capacity", 1)?;
        self.vram_capacity.check("vram_capacity", 1)?;
        for budget in self.vram_capacities.iter().flatten() {
            budget.check("vram_capacities", 1)?;
        }
        let gpus = self.gpus.len();
        if let Some(budgets) = self.vram_capacities.as_ref().map(Vec::len)
            && budgets != gpus
        {
            return refuse("vram_capacities", format!("{budgets} for {gpus} GPUs"));
        }
        if let Some(policies) = self.vram_policies.as_ref().map(Vec::len)
            && policies != gpus
        {
            return refuse("vram_policies", format!("{policies} for {gpus} GPUs"));
        }
        at_least("catalog_cache", Some(self.catalog_cache), 64 << 10)?;
        match (self.staging_capacity, self.host_capacity.bytes()) {
            (Some(staging), Some(host)) if staging >= host => {
                let reason = format!("{staging} leaves nothing of host_capacity {host}");
                refuse("staging_capacity", reason)
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn at_least(
    field: &'static str,
    value: Option<u64>,
    least: u64,
) -> Result<(), VirtualMemoryError> {
    // Offsets are signed in the system calls below.
    let most = i64::MAX as u64;
    match value {
        Some(value) if value < least => refuse(field, format!("at least {least}, not {value}")),
        Some(value) if value > most => refuse(field, format!("at most {most}, not {value}")),
        _ => Ok(()),
    }
}

pub(super) fn refuse<T>(field: &'static str, reason: String) -> Result<T, VirtualMemoryError> {
    Err(VirtualMemoryError::invalid_config(field, reason))
}
