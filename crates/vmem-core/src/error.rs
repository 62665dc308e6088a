//! The one error type of the public surface.
//!
//! Invariant: every variant carries the numbers that explain it, and is cheap to clone, since one
//! failed migration is reported to each of its waiters. Made by every module.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::memory_tier::MemoryTier;

/// The reason why a call failed. All sizes are in bytes.
///
/// ```
/// use vmem::VirtualMemoryError;
///
/// let error = VirtualMemoryError::SizeMismatch { handle: 7, expected: 4096, actual: 12 };
/// assert!(!error.is_retryable());
/// assert_eq!(error.to_string(), "object 7 holds 4096 bytes, the call brought 12");
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum VirtualMemoryError {
    /// The request is larger than the tier could ever serve. Reported at once.
    #[error("{requested_bytes} bytes can never fit in {tier}: at most {capacity_bytes} would")]
    ExceedsCapacity {
        /// The tier that was asked.
        tier: MemoryTier,
        /// What was asked for, rounding included.
        requested_bytes: u64,
        /// The most that the tier could hold.
        capacity_bytes: u64,
    },
    /// There is no space to evict to: the tier below is full. Reported at once; retryable.
    #[error("{tier} is full: {requested_bytes} bytes asked, {free_bytes} free of {capacity_bytes}")]
    TierFull {
        /// The tier that has no space.
        tier: MemoryTier,
        /// What was asked for, rounding included.
        requested_bytes: u64,
        /// What is free there now.
        free_bytes: u64,
        /// The capacity of the tier.
        capacity_bytes: u64,
    },
    /// The deadline passed while pins, leases or bytes that readers hold kept the space.
    #[error(
        "{requested_bytes} bytes in {tier} not free after {waited:?}: {pinned_bytes} pinned, \
         {leased_bytes} leased, {held_bytes} held by readers, of {capacity_bytes}"
    )]
    AllPinned {
        /// The tier that was asked.
        tier: MemoryTier,
        /// What was asked for, rounding included.
        requested_bytes: u64,
        /// Bytes that pins keep there.
        pinned_bytes: u64,
        /// Bytes that device leases keep there.
        leased_bytes: u64,
        /// Bytes that `Bytes` given to callers keep there.
        held_bytes: u64,
        /// The capacity of the tier.
        capacity_bytes: u64,
        /// How long the request waited.
        waited: Duration,
    },
    /// The deadline passed while I/O was still making space. Retryable.
    #[error("{operation} did not end within {waited:?}")]
    TimedOut {
        /// What was waited for.
        operation: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The tier does not exist here.
    #[error("{tier} is not available: {reason}")]
    TierNotAvailable {
        /// The tier that was asked.
        tier: MemoryTier,
        /// What the probe found.
        reason: Arc<str>,
    },
    /// The object is pinned or leased in the tier that it was asked to leave.
    #[error("object {handle} is held in {tier} by {pins} pins")]
    Pinned {
        /// The object.
        handle: u64,
        /// Where it is pinned.
        tier: MemoryTier,
        /// How many pins hold it.
        pins: u32,
    },
    /// The handle was freed, or belongs to another instance.
    #[error("no object {handle} in this store")]
    HandleNotFound {
        /// The id that the handle carries.
        handle: u64,
    },
    /// No object has this name.
    #[error("no object is named {name:?}")]
    NameNotFound {
        /// The name.
        name: Arc<str>,
    },
    /// An object of this name exists already.
    #[error("an object named {name:?} exists")]
    NameExists {
        /// The name.
        name: Arc<str>,
    },
    /// The name has another version than the one that the caller expected.
    #[error("{name:?} has version {current}, not {expected}")]
    VersionChanged {
        /// The name.
        name: Arc<str>,
        /// The version that the caller knew.
        expected: u64,
        /// The version that the name has now.
        current: u64,
    },
    /// The object has a name already, or is being given one.
    #[error("object {handle} is named {name:?}")]
    AlreadyNamed {
        /// The object.
        handle: u64,
        /// Its name.
        name: Arc<str>,
    },
    /// The data of a whole-object write is not as long as the object.
    #[error("object {handle} holds {expected} bytes, the call brought {actual}")]
    SizeMismatch {
        /// The object.
        handle: u64,
        /// Its length.
        expected: usize,
        /// The length of the data.
        actual: usize,
    },
    /// A range reaches outside of the object, or ends before it starts.
    #[error("range {start}..{end} is outside of object {handle} of {len} bytes")]
    OutOfRange {
        /// The object.
        handle: u64,
        /// First byte of the range.
        start: usize,
        /// One past its last byte.
        end: usize,
        /// The length of the object.
        len: usize,
    },
    /// The stored bytes are not those that were written.
    #[error(
        "object {handle} is corrupt: chunk {chunk} has checksum {actual:08x}, not {expected:08x}"
    )]
    Corrupt {
        /// The object.
        handle: u64,
        /// Index of the first damaged chunk of the object.
        chunk: u64,
        /// The checksum of what was written.
        expected: u32,
        /// The checksum of what was read.
        actual: u32,
    },
    /// The operating system refused an operation.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The shared cause, with its errno.
        source: Arc<io::Error>,
    },
    /// The GPU or its driver failed.
    #[error("{operation} failed on the device with code {code}: {message}")]
    Device {
        /// What was attempted.
        operation: &'static str,
        /// The code of the driver.
        code: i32,
        /// Its text.
        message: Arc<str>,
    },
    /// A configuration field has an invalid value.
    #[error("invalid configuration: {field}: {reason}")]
    InvalidConfig {
        /// The field, by the name of its setter.
        field: &'static str,
        /// Why, and what is accepted.
        reason: Arc<str>,
    },
    /// Another process, or another instance in this one, has the directory open.
    #[error(
        "{} is in use{}",
        path.display(),
        pid.map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    InUse {
        /// The directory of the store.
        path: PathBuf,
        /// The process that holds it, where it could be read.
        pid: Option<u32>,
    },
    /// The files of an open store were removed, replaced or made inaccessible: what is written to
    /// them could not be opened again, so nothing becomes durable until they are back.
    #[error("{} cannot be opened again: {reason}", path.display())]
    Unreachable {
        /// The directory of the store.
        path: PathBuf,
        /// Which of its files, and what happened to it.
        reason: Arc<str>,
    },
    /// The tokio runtime on which the store was opened lacks something.
    #[error("no store can run here: {missing}; {remedy}")]
    UnsuitableRuntime {
        /// What it lacks.
        missing: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The files in the directory are not as they were written; `vmem_io::verify` says what can
    /// still be read.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found, and what can still be read where that is known.
        reason: Arc<str>,
    },
    /// The directory was written by another version of the format.
    #[error("{} has format {found}, this version reads {known}", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that this build reads.
        known: u32,
    },
    /// These named objects have changes that are not durable.
    #[error("{} named objects were not flushed, {:?} first: {source}", names.len(), names.first())]
    NotFlushed {
        /// Their names.
        names: Vec<Arc<str>>,
        /// The first error.
        source: Box<VirtualMemoryError>,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl VirtualMemoryError {
    /// Whether the same call may succeed later with nothing changed by the caller.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            VirtualMemoryError::TierFull { .. }
                | VirtualMemoryError::AllPinned { .. }
                | VirtualMemoryError::TimedOut { .. }
                | VirtualMemoryError::InUse { .. }
        )
    }

    /// An [`Io`](Self::Io) error of a named operation.
    pub fn io(operation: &'static str, source: io::Error) -> Self {
        VirtualMemoryError::Io { operation, source: Arc::new(source) }
    }

    /// An [`InvalidConfig`](Self::InvalidConfig) error of a field, by the name of its setter.
    pub fn invalid_config(field: &'static str, reason: impl Into<Arc<str>>) -> Self {
        VirtualMemoryError::InvalidConfig { field, reason: reason.into() }
    }

    /// A [`TierNotAvailable`](Self::TierNotAvailable) error of a tier.
    pub fn tier_not_available(tier: MemoryTier, reason: impl Into<Arc<str>>) -> Self {
        VirtualMemoryError::TierNotAvailable { tier, reason: reason.into() }
    }
}

/// Whether a tier of this capacity could ever serve this many bytes.
///
/// # Errors
///
/// `ExceedsCapacity`.
pub(crate) fn check_capacity(
    tier: MemoryTier,
    requested_bytes: u64,
    capacity_bytes: u64,
) -> Result<(), VirtualMemoryError> {
    if requested_bytes <= capacity_bytes {
        return Ok(());
    }
    Err(VirtualMemoryError::ExceedsCapacity { tier, requested_bytes, capacity_bytes })
}

/// For the traits of streams and files; the error itself is the source.
impl From<VirtualMemoryError> for io::Error {
    fn from(error: VirtualMemoryError) -> Self {
        use VirtualMemoryError::{
            Closed, ExceedsCapacity, HandleNotFound, Io, NameExists, NameNotFound, OutOfRange,
            TierFull, TimedOut,
        };
        let kind = match &error {
            HandleNotFound { .. } | NameNotFound { .. } => io::ErrorKind::NotFound,
            NameExists { .. } => io::ErrorKind::AlreadyExists,
            OutOfRange { .. } => io::ErrorKind::InvalidInput,
            TierFull { .. } => io::ErrorKind::StorageFull,
            ExceedsCapacity { .. } => io::ErrorKind::FileTooLarge,
            TimedOut { .. } => io::ErrorKind::TimedOut,
            Closed => io::ErrorKind::NotConnected,
            Io { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}
