//! What a configuration chooses between, and the words for it.
//!
//! Invariant: each choice is shown by the word that is read for it. Set by the builder and by files.

use std::fmt;
use std::str::FromStr;

use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;
/// Which GPU serves the VRAM tier.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GpuSelection {
    /// The first usable one; none is no error.
    #[default]
    Auto,
    /// None.
    Off,
    /// The one with this ordinal.
    Device(usize),
    /// The one with this UUID.
    Uuid(String),
}

/// How the disk tier reaches its file.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoDriver {
    /// The fastest that the probe found to work.
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
        named.ok_or_else(|| VirtualMemoryError::InvalidConfig {
            field: "io_driver",
            reason: format!("{text:?} is none of auto, reactor, tokio-uring, blocking").into(),
        })
    }
}

/// When a read brings an object up to stay.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// At the n-th read from a slower tier; 1 is the first.
    OnNthRead(u32),
    /// Only when asked for by `promote`, `pin` or `prefetch`.
    Never,
}

impl Default for Promotion {
    fn default() -> Self {
        Promotion::OnNthRead(2)
    }
}

impl FromStr for MemoryTier {
    type Err = VirtualMemoryError;

    /// Parses `vram`, `host` or `disk`, in any case of letters, and `vram:1` for the memory of the second GPU.
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
        [MemoryTier::Vram, MemoryTier::Host, MemoryTier::Disk]
            .into_iter()
            .find(|tier| tier.to_string() == lower)
            .ok_or_else(|| VirtualMemoryError::InvalidConfig {
                field: "tier",
                reason: format!("unknown tier {word:?}: expected vram, vram:N, host or disk")
                    .into(),
            })
    }
}
