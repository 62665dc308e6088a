//! How much of something a store may use: a number of bytes, or a part of what there is.
//!
//! Invariant: in a [`VirtualMemoryConfig`] a percentage is more than 0 and at most 100. What it is
//! a percentage of is known to the backend that opens the tier, which resolves it then. Set by the
//! builder and by files; called by the facade and by the crates of the tiers.

use std::fmt;

use super::builder::{at_least, refuse};
use super::{GpuSelection, IoDriver, VirtualMemoryConfig, VirtualMemoryConfigBuilder};
use crate::error::VirtualMemoryError;

/// How much of something a store may use.
///
/// ```
/// use vmem::Budget;
///
/// assert_eq!(Budget::Percent(25.0).resolve("host_capacity", 4096, || 0).unwrap(), 1024);
/// assert_eq!(Budget::Bytes(5000).resolve("host_capacity", 4096, || 0).unwrap(), 5000);
/// assert_eq!(Budget::Default.resolve("host_capacity", 4096, || 7).unwrap(), 7);
/// assert_eq!(Budget::Percent(12.5).to_string(), "12.5%");
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Budget {
    /// What the setter documents.
    #[default]
    Default,
    /// A number of bytes.
    Bytes(u64),
    /// Hundredths of what is available.
    Percent(f64),
}

impl Budget {
    /// The number of bytes, if it was given as one.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Budget::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The percentage, if it was given as one.
    pub fn percent(self) -> Option<f64> {
        match self {
            Budget::Percent(percent) => Some(percent),
            _ => None,
        }
    }

    /// The budget in bytes. A percentage is of `whole` bytes, which is 0 if unknown.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] of this field for a percentage of what is unknown.
    pub fn resolve(
        self,
        field: &'static str,
        whole: u64,
        default: impl FnOnce() -> u64,
    ) -> Result<u64, VirtualMemoryError> {
        match self {
            Budget::Default => Ok(default()),
            Budget::Bytes(bytes) => Ok(bytes),
            Budget::Percent(_) if whole == 0 => {
                let reason = format!("{self} of an unknown number of bytes: give a size in bytes");
                refuse(field, reason)
            }
            Budget::Percent(percent) => Ok(((whole as f64 * (percent / 100.0)) as u64).min(whole)),
        }
    }

    /// Whether it could work anywhere.
    pub(super) fn check(self, field: &'static str, least: u64) -> Result<(), VirtualMemoryError> {
        match self {
            // Written so that NaN is refused.
            Budget::Percent(percent) if !(percent > 0.0 && percent <= 100.0) => {
                refuse(field, format!("more than 0% and at most 100%, not {self}"))
            }
            other => at_least(field, other.bytes(), least),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Default => f.write_str("default"),
            Budget::Bytes(bytes) => write!(f, "{bytes}"),
            Budget::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl From<u64> for Budget {
    fn from(bytes: u64) -> Self {
        Budget::Bytes(bytes)
    }
}

impl From<Option<u64>> for Budget {
    fn from(bytes: Option<u64>) -> Self {
        bytes.map_or(Budget::Default, Budget::Bytes)
    }
}

impl VirtualMemoryConfig {
    /// Host memory, as it was asked for.
    pub fn host_budget(&self) -> Budget {
        self.fields.host_capacity
    }

    /// Space of the data file, as it was asked for.
    pub fn disk_budget(&self) -> Budget {
        self.fields.disk_capacity
    }

    /// Memory of each device, as it was asked for, unless that was done for each by itself.
    pub fn vram_budget(&self) -> Budget {
        self.fields.vram_capacity
    }

    /// Memory of the device with this number in [`gpus`](Self::gpus), as it was asked for.
    pub fn vram_budget_of(&self, device: usize) -> Budget {
        let by_itself = self.fields.vram_capacities.as_ref().and_then(|each| each.get(device));
        by_itself.copied().unwrap_or(self.fields.vram_capacity)
    }
}

/// What a store has found for what its configuration leaves open.
#[derive(Debug)]
pub(crate) struct Effective {
    pub(crate) host_bytes: u64,
    pub(crate) staging_bytes: u64,
    pub(crate) stream_bytes: u64,
    pub(crate) disk_bytes: u64,
    /// Of each device.
    pub(crate) vram_bytes: Vec<u64>,
    pub(crate) driver: Option<IoDriver>,
}

impl VirtualMemoryConfig {
    /// The same with what was found.
    pub(crate) fn effective(&self, found: Effective) -> Self {
        let mut config = self.clone();
        let fields = &mut config.fields;
        fields.host_capacity = Budget::Bytes(found.host_bytes);
        fields.staging_capacity = Some(found.staging_bytes);
        fields.stream_capacity = Some(found.stream_bytes);
        fields.disk_capacity = Budget::Bytes(found.disk_bytes);
        fields.io_driver = found.driver.unwrap_or(fields.io_driver);
        match found.vram_bytes[..] {
            [] => fields.gpus = vec![GpuSelection::Off],
            [first, ref others @ ..] if others.iter().all(|&bytes| bytes == first) => {
                fields.vram_capacity = Budget::Bytes(first);
                fields.vram_capacities = None;
            }
            ref all if all.len() == fields.gpus.len() => {
                fields.vram_capacity = Budget::Default;
                fields.vram_capacities = Some(all.iter().copied().map(Budget::Bytes).collect());
            }
            // Devices of a program's own, which no configuration lists.
            _ => {}
        }
        config
    }
}

impl VirtualMemoryConfigBuilder {
    /// [`host_capacity`](Self::host_capacity) in percent of the memory that this process may have:
    /// the smallest of RAM and the limits of its control groups. More than 0, at most 100.
    ///
    /// ```
    /// let config = vmem::VirtualMemoryConfig::builder().host_percent(12.5).build()?;
    /// assert_eq!(config.host_budget().percent(), Some(12.5));
    /// assert!(vmem::VirtualMemoryConfig::builder().host_percent(101.0).build().is_err());
    /// # Ok::<(), vmem::VirtualMemoryError>(())
    /// ```
    pub fn host_percent(mut self, percent: f64) -> Self {
        self.host_capacity = Budget::Percent(percent);
        self
    }

    /// [`disk_capacity`](Self::disk_capacity) in percent of what is free in its file system and
    /// what the store's named objects take there; of a tmpfs no more than the memory that this
    /// process may have. More than 0, at most 100, which leaves nothing for others.
    pub fn disk_percent(mut self, percent: f64) -> Self {
        self.disk_capacity = Budget::Percent(percent);
        self
    }

    /// [`vram_capacity`](Self::vram_capacity) in percent of what is free on each device. More than
    /// 0, at most 100.
    pub fn vram_percent(mut self, percent: f64) -> Self {
        self.vram_capacity = Budget::Percent(percent);
        self.vram_capacities = None;
        self
    }
}
