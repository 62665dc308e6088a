//! The tiers, from fast to slow.
//!
//! Invariant: `priority` orders tiers strictly, 0 being the fastest; nothing outside this file
//! relies on the numbers themselves, so that a tier below disk can be added without touching
//! policy code. Called by everybody.

use std::fmt;
use std::str::FromStr;

use crate::error::VirtualMemoryError;

/// A level of the storage hierarchy.
///
/// Tiers are ordered by [`priority`](Self::priority): the smaller, the faster.
///
/// ```
/// use vmem_core::MemoryTier;
///
/// assert!(MemoryTier::Vram.is_faster_than(MemoryTier::Host));
/// assert!(MemoryTier::Host < MemoryTier::Disk);
/// assert_eq!("host".parse::<MemoryTier>().unwrap(), MemoryTier::Host);
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryTier {
    /// Memory of one GPU.
    Vram,
    /// Main memory of the host.
    Host,
    /// The data file in the store's directory.
    Disk,
}

impl MemoryTier {
    /// The rank of the tier: 0 is the fastest, larger is slower.
    pub fn priority(self) -> u8 {
        match self {
            MemoryTier::Vram => 0,
            MemoryTier::Host => 1,
            MemoryTier::Disk => 2,
        }
    }

    /// Whether this tier is strictly faster than `other`.
    pub fn is_faster_than(self, other: MemoryTier) -> bool {
        self.priority() < other.priority()
    }
}

impl Ord for MemoryTier {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.priority().cmp(&other.priority())
    }
}

impl PartialOrd for MemoryTier {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for MemoryTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryTier::Vram => "vram",
            MemoryTier::Host => "host",
            MemoryTier::Disk => "disk",
        })
    }
}

impl FromStr for MemoryTier {
    type Err = VirtualMemoryError;

    /// Parses `vram`, `host` or `disk`, in any case of letters.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        [MemoryTier::Vram, MemoryTier::Host, MemoryTier::Disk]
            .into_iter()
            .find(|tier| tier.to_string().eq_ignore_ascii_case(word))
            .ok_or_else(|| VirtualMemoryError::InvalidConfig {
                field: "tier",
                reason: format!("unknown tier {word:?}: expected vram, host or disk").into(),
            })
    }
}
