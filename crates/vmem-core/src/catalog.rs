//! What core needs of the catalog of named objects: changes in, committed together; rows out.
//!
//! Invariant: a commit is durable when it succeeds, and is whole or absent after any crash. What a
//! row leads to was durable before it was handed in. Called by `names/`; implemented in `vmem-io`.

use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::chunk::StoredChunk;
use crate::error::VirtualMemoryError;
use crate::memory_tier::MemoryTier;

/// The longest name, in bytes of UTF-8.
pub const NAME_LEN_MAX: usize = 1024;
/// The longest metadata of a name, in bytes.
pub const METADATA_LEN_MAX: usize = 4096;
/// Chunks whose places are stored, and rewritten, as one row.
pub const SEGMENT_CHUNKS: usize = 1024;
/// Closed names that stay in memory, unless the catalog says otherwise.
const CLOSED_NAMES_MAX: usize = 1024;

/// What a catalog answers, later.
pub type Answer<T> = BoxFuture<'static, Result<T, VirtualMemoryError>>;

/// A transactional store of names.
///
/// Every method may be called from any task; none blocks it. A commit whose future was dropped goes
/// on.
pub trait Catalog: fmt::Debug + Send + Sync + 'static {
    /// Applies the changes in this order, all or none, and makes them durable.
    ///
    /// # Errors
    ///
    /// After an error none is applied, unless the catalog [is poisoned](Self::is_poisoned) or [is
    /// shut](Self::is_shut) then. `VersionChanged`, `NameExists` and `NameNotFound` say that
    /// another store has changed a name of these.
    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()>;

    /// Whether the changes of several callers may be one commit, and fail together. Else each
    /// caller has a commit of its own, and several are made at once.
    fn shares_commits(&self) -> bool {
        true
    }

    /// How many commits were begun: one that is refused before it begins changes nothing.
    fn attempts(&self) -> u64;

    /// Whether a commit failed in a way after which it is not known whether it is durable. The next
    /// start tells; until then nothing more can be committed.
    fn is_poisoned(&self) -> bool;

    /// Whether a commit failed, and the catalog could not be opened again so far. Each commit
    /// tries; it goes on only if the one that failed turns out not to have been made.
    fn is_shut(&self) -> bool;

    /// What has this name.
    ///
    /// # Errors
    ///
    /// [`Damaged`](VirtualMemoryError::Damaged) if its rows are not what was written; `Io`.
    fn find(&self, name: Arc<str>) -> Answer<Option<CatalogObject>>;

    /// The record of this name, at a cost that does not depend on the length of the object.
    ///
    /// # Errors
    ///
    /// As `find`.
    fn record(&self, name: Arc<str>) -> Answer<Option<CatalogRecord>>;

    /// At most `limit` names that start with `prefix` and are not below `from`, in the order of
    /// their bytes.
    ///
    /// # Errors
    ///
    /// As `find`.
    fn names(
        &self,
        prefix: Arc<str>,
        from: Bound<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>>;

    /// How often a store asks which of the names that it has in memory [others have
    /// changed](Self::changed). None where no others do, or none is to learn of it before it
    /// commits.
    fn follow_every(&self) -> Option<Duration> {
        None
    }

    /// Which of these names another store has changed since it had this version, each as the error
    /// that a commit of that name would get: `VersionChanged` or `NameNotFound`.
    ///
    /// # Errors
    ///
    /// As `find`, if nothing could be found out of any.
    fn changed(&self, names: Vec<(Arc<str>, u64)>) -> Answer<Vec<VirtualMemoryError>> {
        let _ = names;
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// The time that a change which is committed now is stamped with.
    fn time(&self) -> SystemTime;

    /// How many names that no handle leads to core may keep in memory, to spare itself a look-up.
    fn closed_names_max(&self) -> usize {
        CLOSED_NAMES_MAX
    }

    /// Copies what is committed now into an empty directory, which opens as a store then. Nothing
    /// that is committed now may lose its space before this ends.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` if the directory cannot serve, `Damaged`, `Io`.
    fn snapshot(&self, directory: std::path::PathBuf) -> Answer<()>;

    /// The first number that neither an object nor a version in the catalog has.
    fn next_id(&self) -> u64;

    /// Checks that what is committed can be opened again: that its files were not removed or
    /// replaced.
    ///
    /// # Errors
    ///
    /// [`Unreachable`](VirtualMemoryError::Unreachable) with what is missing.
    fn check(&self) -> Answer<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Ends it: waits for what is in flight and refuses what comes after.
    ///
    /// # Errors
    ///
    /// Those of `check`; the catalog has ended nevertheless.
    fn close(&self) -> Answer<()>;
}

/// What is stored of a name, but for where the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogRecord {
    /// The number under which the segments of the object are; never used for another one.
    pub id: u64,
    /// The number of this state of bytes and metadata; never used for another one of any name.
    pub version: u64,
    /// When this state was committed: [`Catalog::time`] just before.
    pub modified: SystemTime,
    /// The length of the object, in bytes.
    pub len: u64,
    /// The home tier.
    pub home: MemoryTier,
    /// What the user stored beside it.
    pub metadata: Bytes,
}

/// A named object as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogObject {
    /// What it is.
    pub record: CatalogRecord,
    /// Where its chunks are; none is a chunk of zeros.
    pub chunks: Vec<Option<StoredChunk>>,
}

/// One change of the catalog.
#[derive(Clone, Debug)]
pub enum CatalogChange {
    /// Gives a name to an object, or a new record to the one that has it. The rows of another
    /// object that had the name go.
    Put {
        /// The name.
        name: Arc<str>,
        /// The new record.
        record: CatalogRecord,
    },
    /// Where some chunks of an object are: number `segment` of [`SEGMENT_CHUNKS`] each.
    Segment {
        /// The object.
        id: u64,
        /// Which of its segments.
        segment: u32,
        /// The chunks of the segment, all of them.
        chunks: Vec<Option<StoredChunk>>,
    },
    /// Moves an object, with its record, to another name. The rows of one that had that name go.
    Rename {
        /// The name that it has.
        from: Arc<str>,
        /// The name that it gets.
        to: Arc<str>,
    },
    /// Forgets a name and its object.
    Remove {
        /// The name.
        name: Arc<str>,
    },
}
