//! What a correct store may answer.
//!
//! Invariant: the model never accuses a store that is linearisable (each call takes effect at one
//! moment between its start and its end). It accuses reads of bytes that no order of the calls
//! explains: wrong, stale or torn ones, and ones older than an earlier read saw. Called by tests,
//! from any number of tasks.
//!
//! Bracket every call: `begin_..` before the call of the runtime, the token's method right after it
//! returned. A token that is dropped says that the future was dropped, and leaves the write
//! undecided; [`Settles`] is what the runtime promises about those.

mod explain;
mod history;
mod ledger;
mod pattern;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::Seed;
use explain::{Read, explain};
use history::{History, NEVER};

pub use history::Settles;
pub use ledger::{Ledger, RemoveToken};
pub use pattern::Pattern;

/// The reference model of a store. Clones are the same model.
///
/// ```
/// use vmem_testkit::{Model, Seed};
///
/// let model = Model::new(Seed::new(1));
/// model.create(7, 100);
/// assert!(model.check_read(7, &[0; 100]).is_ok());
///
/// let write = model.begin_write(7);
/// let bytes = write.bytes(); // and give them to the store
/// write.commit();
/// assert!(model.check_read(7, &bytes).is_ok());
/// assert!(model.check_read(7, &[0; 100]).is_err(), "that would be stale");
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    seed: u64,
    settles: Settles,
    versions: Mutex<u64>,
    ledger: Mutex<ledger::Objects>,
}

/// Why a read cannot be right. Offsets and ranges are bytes of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The read returned another number of bytes than it was asked for.
    Length {
        /// What was asked for.
        expected: usize,
        /// What came.
        actual: usize,
    },
    /// These bytes were never written there.
    Foreign {
        /// Where.
        range: Range<usize>,
        /// The versions that could have been there; 0 is the zeros of a new object.
        candidates: Vec<u64>,
    },
    /// A newer version was complete, or had been seen, before the read started.
    Stale {
        /// Where.
        offset: usize,
        /// The version that was returned.
        version: u64,
    },
    /// No moment had these versions together.
    Mixed {
        /// The versions that were returned.
        versions: Vec<u64>,
    },
    /// The write returned an error, and yet a read saw its bytes.
    AppliedThoughFailed {
        /// The version of the write.
        version: u64,
    },
    /// The object was removed before the read started.
    Removed,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Length { expected, actual } => {
                write!(f, "{actual} bytes came, {expected} were asked for")
            }
            Violation::Foreign { range, candidates } => {
                write!(f, "bytes {range:?} are of none of the versions {candidates:?}")
            }
            Violation::Stale { offset, version } => {
                write!(f, "byte {offset} is of version {version}, which was superseded")
            }
            Violation::Mixed { versions } => {
                write!(f, "the versions {versions:?} were never there together")
            }
            Violation::AppliedThoughFailed { version } => {
                write!(f, "version {version} was read, though its write failed")
            }
            Violation::Removed => f.write_str("the object was removed before the read started"),
        }
    }
}

impl std::error::Error for Violation {}

impl Model {
    /// A model of an empty store that keeps the writes to one object in order
    /// ([`Settles::BeforeNextWrite`]).
    pub fn new(seed: Seed) -> Self {
        Model::with_settles(seed, Settles::default())
    }

    /// A model of an empty store that promises `settles` about dropped writes.
    pub fn with_settles(seed: Seed, settles: Settles) -> Self {
        Model {
            shared: Arc::new(Shared {
                seed: seed.fork("model").value(),
                settles,
                versions: Mutex::new(0),
                ledger: Mutex::default(),
            }),
        }
    }

    /// An object of `len` bytes, all zeros, exists from now on.
    ///
    /// # Panics
    ///
    /// When one of this id is alive: two live objects with one id are a bug of the store.
    pub fn create(&self, object: u64, len: usize) {
        let history = History::new(len, self.shared.settles);
        self.shared.ledger.lock().insert(object, len, history);
    }

    /// A write of the whole object is about to be called.
    ///
    /// # Panics
    ///
    /// This method and the following ones panic where no object of this id was created.
    pub fn begin_write(&self, object: u64) -> WriteToken {
        let len = self.history(object).lock().len;
        self.begin_write_at(object, 0..len)
    }

    /// A write of a range, in bytes, is about to be called.
    pub fn begin_write_at(&self, object: u64, range: Range<usize>) -> WriteToken {
        let version = {
            let mut versions = self.shared.versions.lock();
            *versions += 1;
            *versions
        };
        let history = self.history(object);
        let pattern = Pattern::new(self.shared.seed, version);
        {
            let mut history = history.lock();
            let len = history.len;
            assert!(
                range.start <= range.end && range.end <= len,
                "the test writes {range:?} of object {object}, which has {len} bytes"
            );
            history.begin_write(version, range.clone(), pattern);
        }
        WriteToken { history, version, range, pattern, open: true }
    }

    /// A read is about to be called.
    pub fn begin_read(&self, object: u64) -> ReadToken {
        let history = self.history(object);
        let start = history.lock().begin_read();
        ReadToken { history, start }
    }

    /// Checks a read of the whole object during which nothing else happened to it.
    ///
    /// # Errors
    ///
    /// The reason why these bytes cannot be right.
    pub fn check_read(&self, object: u64, bytes: &[u8]) -> Result<(), Violation> {
        self.begin_read(object).check(bytes)
    }

    /// The store is about to be asked to remove the object.
    pub fn begin_remove(&self, object: u64) -> RemoveToken {
        RemoveToken::new(self.clone(), object)
    }

    /// The objects that should exist.
    pub fn ledger(&self) -> Ledger {
        self.shared.ledger.lock().ledger()
    }

    fn history(&self, object: u64) -> Arc<Mutex<History>> {
        match self.shared.ledger.lock().history(object) {
            Some(history) => history,
            None => panic!("the test uses object {object}, which the model does not know"),
        }
    }
}

/// A write that has begun. To drop it says that the future of the write was dropped.
#[derive(Debug)]
#[must_use = "dropping the token says that the write was abandoned"]
pub struct WriteToken {
    history: Arc<Mutex<History>>,
    version: u64,
    range: Range<usize>,
    pattern: Pattern,
    open: bool,
}

impl WriteToken {
    /// The number of this write, unique in its model.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The range that it writes, in bytes of the object.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// What to write.
    pub fn bytes(&self) -> Bytes {
        self.pattern.bytes(self.range.start as u64, self.range.len())
    }

    /// What to write, into a buffer of the length of the range.
    pub fn fill(&self, buf: &mut [u8]) {
        self.pattern.fill(self.range.start as u64, buf);
    }

    /// The write returned `Ok`.
    pub fn commit(mut self) {
        self.open = false;
        self.history.lock().commit(self.version);
    }

    /// The write returned an error, which says that it was not applied. Where the store does not
    /// promise that for an error, drop the token instead.
    ///
    /// # Errors
    ///
    /// [`Violation::AppliedThoughFailed`] when a read has seen it.
    pub fn fail(mut self) -> Result<(), Violation> {
        self.open = false;
        let version = self.version;
        match self.history.lock().fail(version) {
            true => Ok(()),
            false => Err(Violation::AppliedThoughFailed { version }),
        }
    }
}

impl Drop for WriteToken {
    fn drop(&mut self) {
        if self.open {
            self.history.lock().abandon(self.version);
        }
    }
}

/// A read that has begun. To drop it says that the read gave no bytes.
#[derive(Debug)]
#[must_use = "a read that is not checked tests nothing"]
pub struct ReadToken {
    history: Arc<Mutex<History>>,
    start: u64,
}

impl ReadToken {
    /// The read of the whole object returned these bytes.
    ///
    /// # Errors
    ///
    /// The reason why they cannot be right.
    pub fn check(self, bytes: &[u8]) -> Result<(), Violation> {
        let len = self.history.lock().len;
        self.check_at(0..len, bytes)
    }

    /// The read of a range of the object returned these bytes.
    ///
    /// # Errors
    ///
    /// The reason why they cannot be right.
    pub fn check_at(self, range: Range<usize>, bytes: &[u8]) -> Result<(), Violation> {
        let expected = range.len();
        if bytes.len() != expected {
            let actual = bytes.len();
            return Err(Violation::Length { expected, actual });
        }
        let mut history = self.history.lock();
        if history.removed_at != NEVER && history.removed_at < self.start {
            return Err(Violation::Removed);
        }
        let end = history.tick();
        let read = Read { start: self.start, offset: range.start, bytes };
        let learned = explain(&history, &read)?;
        history.learn(learned, self.start, end);
        Ok(())
    }
}

impl Drop for ReadToken {
    fn drop(&mut self) {
        self.history.lock().end_read(self.start);
    }
}
