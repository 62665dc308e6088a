//! The choices of a configuration, and the words that stand for them.
//!
//! Invariant: each choice is displayed as the word that parses to it. Set by the builder and by
//! files.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;

/// Which GPU serves the VRAM tier.
///
/// ```
/// use vmem::GpuSelection;
///
/// for word in ["auto", "off", "0", "GPU-6d0f3c9e-0000-4000-8000-000000000000"] {
///     assert_eq!(word.parse::<GpuSelection>().unwrap().to_string(), word);
/// }
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GpuSelection {
    /// The first usable GPU; it is no error if there is none.
    #[default]
    Auto,
    /// None.
    Off,
    /// The one with this ordinal.
    Device(usize),
    /// The one with this UUID.
    Uuid(String),
}

impl fmt::Display for GpuSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GpuSelection::Auto => f.write_str("auto"),
            GpuSelection::Off => f.write_str("off"),
            GpuSelection::Device(ordinal) => write!(f, "{ordinal}"),
            GpuSelection::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

impl FromStr for GpuSelection {
    type Err = VirtualMemoryError;

    /// Parses `auto`, `off`, an ordinal such as `0`, or the UUID of a device.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "auto" => Ok(GpuSelection::Auto),
            "off" => Ok(GpuSelection::Off),
            number if number.bytes().all(|byte| byte.is_ascii_digit()) => number
                .parse()
                .map(GpuSelection::Device)
                .map_err(|_| unknown("gpu", word, "auto, off, an ordinal such as 0, or a UUID")),
            // Every UUID has a hyphen, and no other word here has one.
            uuid if uuid.contains('-') => Ok(GpuSelection::Uuid(uuid.to_owned())),
            _ => Err(unknown("gpu", word, "auto, off, an ordinal such as 0, or a UUID")),
        }
    }
}

/// The error for a word that is none of those expected for this field.
fn unknown(field: &'static str, word: &str, expected: &str) -> VirtualMemoryError {
    VirtualMemoryError::invalid_config(field, format!("{word:?} is none of {expected}"))
}

/// How the disk tier reaches its file.
///
/// ```
/// use vmem::IoDriver;
///
/// for word in ["auto", "reactor", "tokio-uring", "blocking"] {
///     assert_eq!(word.parse::<IoDriver>().unwrap().to_string(), word);
/// }
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoDriver {
    /// The fastest driver that works, as found by a probe.
    #[default]
    Auto,
    /// io_uring, submitted from the calling task.
    Reactor,
    /// io_uring, on threads of its own.
    TokioUring,
    /// Positional reads and writes on a bounded pool of threads.
    Blocking,
}

impl fmt::Display for IoDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoDriver::Auto => "auto",
            IoDriver::Reactor => "reactor",
            IoDriver::TokioUring => "tokio-uring",
            IoDriver::Blocking => "blocking",
        })
    }
}

impl FromStr for IoDriver {
    type Err = VirtualMemoryError;

    /// Parses `auto`, `reactor`, `tokio-uring` or `blocking`.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = [IoDriver::Auto, IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking];
        let named = all.into_iter().find(|driver| driver.to_string() == text);
        named.ok_or_else(|| unknown("io_driver", text, "auto, reactor, tokio-uring, blocking"))
    }
}

/// When a read, or a gather, promotes an object.
///
/// ```
/// use vmem::Promotion;
///
/// for word in ["1", "2", "gather:2", "never"] {
///     assert_eq!(word.parse::<Promotion>().unwrap().to_string(), word);
/// }
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// At the n-th read from a slower tier, to host memory; 1 is the first.
    OnNthRead(u32),
    /// At the n-th gather that has to read it from host memory or below, to the device; 1 is the
    /// first. An object that is gathered in pieces: at the next gather once `n - 1` times as many
    /// bytes were copied as it has.
    ///
    /// The object comes in the background, after the gather. It takes free memory, or that of what
    /// was not used since its own first gather; never that of what is pinned or leased, or was
    /// prefetched and not used yet. Where there is none it stays, and gathers are counted anew, as
    /// they are once it has left the device. What is counted are the last 262,144 objects that are
    /// gathered, for each device.
    OnNthGather(u32),
    /// Only when asked for by `promote`, `pin` or `prefetch`.
    Never,
}

impl Default for Promotion {
    fn default() -> Self {
        Promotion::OnNthRead(2)
    }
}

impl fmt::Display for Promotion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Promotion::OnNthRead(nth) => write!(f, "{nth}"),
            Promotion::OnNthGather(nth) => write!(f, "gather:{nth}"),
            Promotion::Never => f.write_str("never"),
        }
    }
}

impl FromStr for Promotion {
    type Err = VirtualMemoryError;

    /// Parses the number of a read, from 1 on, `gather:2` with the number of a gather, or `never`.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let (rule, number): (fn(u32) -> Self, _) = match word.strip_prefix("gather:") {
            Some(number) => (Promotion::OnNthGather, number),
            None => (Promotion::OnNthRead, word),
        };
        match number.parse() {
            _ if word == "never" => Ok(Promotion::Never),
            Ok(nth) if nth > 0 => Ok(rule(nth)),
            _ => {
                let expected = "never, the number of a read from 1 on, or gather:2";
                Err(unknown("promotion", word, expected))
            }
        }
    }
}

/// Which way copies between host memory and a device go: small ones by a kernel, several at once by
/// one call of the driver, and the others one by one, by the copy engines.
///
/// The default is what an H200 does best. `gpu-check --only cost-crossover`, in the repository,
/// measures a device and prints the values for it.
///
/// ```
/// use vmem::{SwitchPoints, VirtualMemoryConfig};
///
/// let points = SwitchPoints { small_max: 64 << 10, ..SwitchPoints::default() };
/// let config = VirtualMemoryConfig::builder().switch_points(points).build()?;
/// assert_eq!(config.switch_points().small_min, 4);
/// # Ok::<(), vmem::VirtualMemoryError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct SwitchPoints {
    /// The longest copy that is small, in bytes, at most 1 MiB; 0 for none. Default: 32 KiB.
    pub small_max: usize,
    /// This many small copies are handed to the kernel; fewer go one by one. Default: 4.
    pub small_min: usize,
    /// This many other copies are handed to the driver in one call. Default: 2.
    pub batch_min: usize,
}

impl Default for SwitchPoints {
    fn default() -> Self {
        SwitchPoints { small_max: 32 << 10, small_min: 4, batch_min: 2 }
    }
}

/// When what kernels wrote in device memory is written back to host memory.
///
/// Until then the device alone has that version. It is written back earlier where a reader on the
/// host, a flush of the object to a home that is no device, a demotion or the end of the store asks
/// for it, before a lease overwrites the object, and before its device memory goes to another
/// object. An object that is pinned to host memory is written back with each lease. If the device
/// is lost first, reads of the object fail until it is written whole, or
/// [reverted](crate::VirtualMemory::revert).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteBack {
    /// With the end of each lease that changes it, which the next lease of the object waits for. If
    /// the device refuses the copy it is tried again; as long as it fails the device alone has the
    /// version, [`vram_dirty_bytes`](crate::VirtualMemoryStats::vram_dirty_bytes) counts it, and a
    /// lease that would change it fails with `Device`.
    #[default]
    Eager,
    /// Once it has been on the device alone for so long. Where the device is nearly full and
    /// objects leave it, what was used there longest ago is written back earlier, so that
    /// promotions seldom wait for a copy down.
    After(Duration),
    /// Only where something asks for it.
    OnEvict,
}

impl FromStr for MemoryTier {
    type Err = VirtualMemoryError;

    /// Parses `vram`, `host`, `disk` or `remote`, in upper or lower case, and `vram:1` for the
    /// memory of the second GPU.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let lower = word.to_ascii_lowercase();
        let numbered = lower.strip_prefix("vram:").and_then(|number| number.parse().ok());
        if let Some(device) = numbered {
            return Ok(MemoryTier::of_device(device));
        }
        [MemoryTier::Vram, MemoryTier::Host, MemoryTier::Disk, MemoryTier::Remote]
            .into_iter()
            .find(|tier| tier.to_string() == lower)
            .ok_or_else(|| {
                let expected = "vram, vram:N, host, disk or remote";
                let reason = format!("unknown tier {word:?}: expected {expected}");
                VirtualMemoryError::invalid_config("tier", reason)
            })
    }
}
