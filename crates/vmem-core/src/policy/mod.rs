//! Who is evicted first.
//!
//! Invariant: a policy is a pure data structure: no I/O, no clock, no lock, and it is not told of
//! accesses. An object marks its own accesses (a stamp that never goes back, and a count); the
//! policy asks for them when it looks for a victim, through a *probe*. So an access costs nothing
//! here, and a look costs a bounded number of steps however many objects there are. Called by
//! objects that enter and leave host memory, and by the evictor, under one lock.

mod list;
mod lru;
mod s3fifo;
mod sieve;

use std::fmt;
use std::str::FromStr;

use crate::error::VirtualMemoryError;

pub use lru::Lru;
pub use s3fifo::S3Fifo;
pub use sieve::Sieve;

/// Entries that one call of [`Policy::victim`] looks at.
pub const STEPS_MAX: usize = 64;

/// Names an entry of a policy, from `insert` to `remove`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub(crate) u32);

/// How an object stands when the policy asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It could go. `stamp`: its last access; `touches`: accesses since the last probe.
    Evictable {
        /// The last access, in nanoseconds of the store's clock.
        stamp: u64,
        /// Accesses since the last probe.
        touches: u32,
    },
    /// Somebody reads or changes it at this moment, which counts as an access.
    Busy {
        /// This moment, in nanoseconds of the store's clock.
        stamp: u64,
    },
    /// It is pinned: not to be asked about until `unpark`.
    Pinned,
    /// It is being freed: not to be asked about any more.
    Gone,
}

/// What a look for a victim found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// This object. It stays in the structure until it is removed.
    Victim {
        /// The object.
        id: u64,
        /// The bound on steps was reached first: there may be a better one.
        hurried: bool,
    },
    /// The bound on steps was reached: look again.
    Retry,
    /// There is nothing to look at.
    Empty,
}

/// An order of eviction.
pub trait Policy: fmt::Debug + Send {
    /// The object became resident; `stamp` is its last access, `footprint` its size in bytes.
    fn insert(&mut self, id: u64, stamp: u64, footprint: u64) -> Token;

    /// The object is no longer resident.
    fn remove(&mut self, token: Token);

    /// The next victim, after a look at [`STEPS_MAX`] entries at most.
    fn victim(&mut self, probe: &mut dyn FnMut(u64) -> Probe) -> Pick;

    /// Up to `steps` steps of putting entries where their accesses say they belong. True if
    /// more is left.
    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool;

    /// Shows up to `limit` entries that are likely to go soon, the next one first.
    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64));

    /// The object of this token is no longer pinned.
    fn unpark(&mut self, token: Token);

    /// How many entries there are.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The policies that are built in.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// Least recently used.
    #[default]
    Lru,
    /// SIEVE (Zhang et al., NSDI 2024): a queue with a moving hand; good where much is used once.
    Sieve,
    /// S3-FIFO (Yang et al., SOSP 2023): a small queue in front of a large one, with a memory of what
    /// left the small one.
    S3Fifo,
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PolicyKind::Lru => "lru",
            PolicyKind::Sieve => "sieve",
            PolicyKind::S3Fifo => "s3-fifo",
        })
    }
}

impl FromStr for PolicyKind {
    type Err = VirtualMemoryError;

    /// Parses `lru`, `sieve` or `s3-fifo`.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo]
            .into_iter()
            .find(|kind| kind.to_string().eq_ignore_ascii_case(word))
            .ok_or_else(|| VirtualMemoryError::InvalidConfig {
                field: "policy",
                reason: format!("unknown policy {word:?}: expected lru, sieve or s3-fifo").into(),
            })
    }
}

/// An empty policy of this kind.
pub fn build(kind: PolicyKind) -> Box<dyn Policy> {
    match kind {
        PolicyKind::Lru => Box::<Lru>::default(),
        PolicyKind::Sieve => Box::<Sieve>::default(),
        PolicyKind::S3Fifo => Box::<S3Fifo>::default(),
    }
}
