//! The order of eviction.
//!
//! Invariant: a policy is a pure data structure: no I/O, no clock, no lock, and accesses do not
//! call it. An object marks its own accesses (a stamp, and a count); the
//! policy asks for them when it looks for a victim, through a *probe*. So an access costs nothing
//! here, and a look costs a bounded number of steps however many objects there are. Called by
//! objects that enter and leave host memory, and by the evictor, under one lock.

mod choice;
mod ghosts;
mod least;
mod lru;
mod order;
mod pass;
mod protected;
mod s3fifo;
mod sieve;
mod table;

use std::fmt;
use std::str::FromStr;

use crate::error::VirtualMemoryError;

pub use choice::PolicyChoice;
pub use lru::Lru;
pub use pass::Pass;
pub use protected::{PROTECTED_STEPS, Protected};
pub use s3fifo::S3Fifo;
pub use sieve::Sieve;

/// Entries that one call of [`Policy::victim`] looks at.
pub const STEPS_MAX: usize = 64;

/// Entries that the queue-based policies look at for one victim, over several calls, before the
/// next best has to do: a lap of a thousand entries costs what a lap of millions costs.
pub const VICTIM_STEPS_MAX: usize = 16 * STEPS_MAX;

/// Names an entry of a policy, from `insert` to `remove`; it never changes in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub(crate) u32);

impl Token {
    /// A token of a policy of your own. `u32::MAX` is not to be used.
    pub fn new(position: u32) -> Self {
        Token(position)
    }

    /// What the token was made of.
    pub fn position(self) -> u32 {
        self.0
    }
}

/// An object that becomes resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The object.
    pub id: u64,
    /// Its last access, in nanoseconds of the store's clock.
    pub stamp: u64,
    /// What it takes, in bytes, rounding included.
    pub footprint: u64,
    /// Whether it was prefetched and not used yet.
    pub prefetched: bool,
}

impl Entry {
    /// An object that is used at this moment.
    pub fn new(id: u64, stamp: u64, footprint: u64) -> Self {
        Entry { id, stamp, footprint, prefetched: false }
    }
}

/// How an object stands when the policy asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It could go.
    Evictable {
        /// The last access, in nanoseconds of the store's clock; goes back only
        /// where two threads mark one at once.
        stamp: u64,
        /// Accesses since the last probe that was answered so: the answer clears the count, which
        /// may stop counting at 3 or above.
        touches: u32,
    },
    /// It is being read or changed at this moment, which counts as an access.
    Busy {
        /// This moment, in nanoseconds of the store's clock.
        stamp: u64,
    },
    /// It could go, but not for the purpose of this pass: it keeps its place and its count of
    /// accesses, which the answer does not clear.
    Unfit,
    /// It is pinned: not to be asked about until [`Policy::unpark`].
    Pinned,
    /// It is being freed: not to be asked about any more. It is still to be removed.
    Gone,
}

/// What a look for a victim found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// This object. It stays where it is until it is removed: an evictor that cannot take it leaves
    /// it, and the pass goes on behind it.
    Victim {
        /// The object.
        id: u64,
        /// The bound on steps was reached first: there may be a better one.
        hurried: bool,
    },
    /// The bound on steps was reached: look again with the same pass, after others had their turn.
    Retry,
    /// The pass is over: each entry that was present when it began, and was not named, could not go
    /// when it was asked.
    Empty,
}

/// An order of eviction.
///
/// An entry that answers `Pinned` or `Gone` is *parked*: no look meets it again until `unpark`. To
/// unpin an object, first make it answer otherwise, then call `unpark`, so that no unpinning is
/// missed. The least recently used then stands where its last access says; the queue-based policies
/// file it as the newest.
///
/// ```
/// use vmem::policy::{Entry, Pass, Pick, PolicyKind, Probe, build};
///
/// let mut last_access = [10, 20, 30];
/// let mut policy = build(PolicyKind::Lru);
/// let tokens = [0, 1, 2].map(|id| policy.insert(Entry::new(id, last_access[id as usize], 4096)));
///
/// last_access[0] = 40; // without a call to the policy
/// let mut probe = |id: u64| Probe::Evictable { stamp: last_access[id as usize], touches: 1 };
/// let mut pass = Pass::default();
/// assert_eq!(policy.victim(&mut pass, &mut probe), Pick::Victim { id: 1, hurried: false });
/// policy.remove(tokens[1]);
/// assert_eq!(policy.victim(&mut pass, &mut probe), Pick::Victim { id: 2, hurried: false });
/// ```
///
/// # Panics
///
/// The policies that are built in panic when they are given a token that was removed before: the
/// ledger of the caller is wrong then.
pub trait Policy: fmt::Debug + Send {
    /// The object became resident. Its count of accesses starts at none: the one that brought it
    /// in is not a use of it. [`Protected`] tells a policy of what was prefetched after its first
    /// use, or when its protection has ended.
    fn insert(&mut self, entry: Entry) -> Token;

    /// The object is no longer resident. After it was a victim this is an eviction, else the object
    /// was freed or moved on request.
    fn remove(&mut self, token: Token);

    /// The next victim of this pass, after a look at [`STEPS_MAX`] entries at most.
    ///
    /// A pass ends: if nothing can go each entry is asked once, however much enters, or is used,
    /// meanwhile. It ends with [`Pick::Empty`] only if no entry could go all the time from its
    /// begin on. What it passed over, it does not ask again as long as nothing can go.
    fn victim(&mut self, pass: &mut Pass, probe: &mut dyn FnMut(u64) -> Probe) -> Pick;

    /// Up to `steps` steps of putting entries where their accesses say they belong, the coldest
    /// first. True if more is left. A run of calls ends, whatever the load.
    fn settle(&mut self, steps: usize, probe: &mut dyn FnMut(u64) -> Probe) -> bool;

    /// Shows up to `limit` entries that are likely to go soon, the next one first, as they are
    /// filed: some may have been used since.
    fn coldest(&self, limit: usize, visit: &mut dyn FnMut(u64));

    /// The object of this token is no longer pinned; nothing happens if it was not parked.
    fn unpark(&mut self, token: Token);

    /// How many entries there are, parked ones included.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory that the policy itself has allocated, in bytes.
    fn memory_bytes(&self) -> usize;
}

/// The policies that are built in.
///
/// ```
/// use vmem::PolicyKind;
///
/// for word in ["lru", "sieve", "s3-fifo", "s3fifo"] {
///     let kind: PolicyKind = word.parse().unwrap();
///     assert_eq!(kind.to_string().replace('-', ""), word.replace('-', ""));
/// }
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// Least recently used.
    #[default]
    Lru,
    /// SIEVE (Zhang et al., NSDI 2024): a queue with a moving hand; good where much is used once.
    Sieve,
    /// S3-FIFO (Yang et al., SOSP 2023): a small queue in front of a large one, with a memory of
    /// what left the small one.
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

    /// Parses `lru`, `sieve`, and `s3-fifo` or `s3fifo`.
    ///
    /// # Errors
    ///
    /// [`VirtualMemoryError::InvalidConfig`] for any other word.
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo]
            .into_iter()
            .find(|kind| {
                let name = kind.to_string();
                let names = [name.replace('-', ""), name];
                names.iter().any(|name| name.eq_ignore_ascii_case(word))
            })
            .ok_or_else(|| {
                let reason = format!("unknown policy {word:?}: expected lru, sieve or s3-fifo");
                VirtualMemoryError::invalid_config("policy", reason)
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
