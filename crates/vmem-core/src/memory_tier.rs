//! The tiers, from fast to slow.
//!
//! Invariant: `level` is the place of a tier in the chain, 0 being the fastest; the devices stand
//! beside each other on one level. Nothing outside this file relies on the numbers themselves, so
//! that a tier below disk is added without touching policy code. Used by all modules.

use std::fmt;
use std::num::NonZeroU8;

/// A tier of the store.
///
/// Tiers are not totally ordered: GPUs stand beside each other, and what is in the memory of one
/// does not serve a kernel on another.
///
/// ```
/// use vmem::MemoryTier;
///
/// for word in ["vram", "vram:1", "host", "disk", "remote"] {
///     assert_eq!(word.parse::<MemoryTier>().unwrap().to_string(), word);
/// }
/// assert!(MemoryTier::Vram.is_faster_than(MemoryTier::Host));
/// assert_eq!("host".parse::<MemoryTier>().unwrap(), MemoryTier::Host);
///
/// let second = MemoryTier::of_device(1);
/// assert_eq!(second.to_string(), "vram:1");
/// assert_eq!(second.priority(), MemoryTier::Vram.priority());
/// assert!(!second.is_faster_than(MemoryTier::Vram));
/// assert_eq!(MemoryTier::of_device(0), MemoryTier::Vram);
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryTier {
    /// Memory of the first GPU.
    Vram,
    /// Memory of another GPU of the store, counted from 1 in the order of the configuration; see
    /// [`of_device`](Self::of_device).
    OtherVram(NonZeroU8),
    /// Main memory of the host.
    Host,
    /// The data file in the store's directory.
    Disk,
    /// What lies below the disk, on another machine say. A store has it if it was opened over a
    /// backend for it.
    Remote,
}

/// The place of a tier in the chain whose middle is host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// The memory of this device.
    Device(usize),
    Host,
    /// So far below host memory, from 0.
    Below(usize),
}

impl MemoryTier {
    /// The memory of the GPU with this number in the store, from 0.
    pub fn of_device(device: u8) -> Self {
        NonZeroU8::new(device).map_or(MemoryTier::Vram, MemoryTier::OtherVram)
    }

    /// Which GPU of the store it belongs to, from 0; none for the other tiers.
    pub fn device(self) -> Option<usize> {
        match self.position() {
            Position::Device(device) => Some(device),
            Position::Host | Position::Below(_) => None,
        }
    }

    /// Where it stands in the chain.
    pub(crate) fn position(self) -> Position {
        match self {
            MemoryTier::Vram => Position::Device(0),
            MemoryTier::OtherVram(device) => Position::Device(usize::from(device.get())),
            MemoryTier::Host => Position::Host,
            MemoryTier::Disk => Position::Below(0),
            MemoryTier::Remote => Position::Below(1),
        }
    }

    /// Its place among the tiers below host memory, from 0; none for the others.
    pub(crate) fn level(self) -> Option<usize> {
        match self.position() {
            Position::Below(level) => Some(level),
            Position::Device(_) | Position::Host => None,
        }
    }

    /// The tier at this place below host memory.
    pub(crate) fn of_level(level: usize) -> Self {
        if level == 0 { MemoryTier::Disk } else { MemoryTier::Remote }
    }

    /// The rank of the tier: 0 is the fastest, larger is slower. Siblings have the same.
    pub fn priority(self) -> u8 {
        match self {
            MemoryTier::Vram | MemoryTier::OtherVram(_) => 0,
            MemoryTier::Host => 1,
            MemoryTier::Disk => 2,
            MemoryTier::Remote => 3,
        }
    }

    /// Whether this tier is strictly faster than `other`.
    pub fn is_faster_than(self, other: MemoryTier) -> bool {
        self.priority() < other.priority()
    }
}

impl fmt::Display for MemoryTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryTier::Vram => f.write_str("vram"),
            MemoryTier::OtherVram(device) => write!(f, "vram:{device}"),
            MemoryTier::Host => f.write_str("host"),
            MemoryTier::Disk => f.write_str("disk"),
            MemoryTier::Remote => f.write_str("remote"),
        }
    }
}
