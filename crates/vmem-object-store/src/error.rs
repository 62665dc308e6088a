//! What went wrong, in the terms of `object_store`.
//!
//! Invariant: nothing is lost on the way: the source of an error is what said it. Called by every
//! module.

use object_store::path::Path;
use vmem_core::VirtualMemoryError;

/// The name of the store, in errors of `object_store`.
const STORE: &str = "vmem";

/// What was asked for and cannot be, found out before the store was asked: the source of an
/// [`object_store::Error`].
///
/// ```
/// use object_store::ObjectStoreExt;
/// use object_store::path::Path;
/// use vmem_object_store::{RequestError, Store};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let config = vmem::VirtualMemoryConfig::builder();
/// # let config = config.host_capacity(16 << 20).disk_capacity(16 << 20).build()?;
/// # let store = Store::new(vmem::open(config).await?);
/// let long = Path::from("x".repeat(1025));
/// let Err(object_store::Error::Generic { source, .. }) = store.head(&long).await else {
///     panic!("no name is as long");
/// };
/// let reason = source.downcast_ref();
/// assert!(matches!(reason, Some(RequestError::NameTooLong { len: 1025, max: 1024 })));
/// # Ok(())
/// # }
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The path, behind the prefix of the store, is longer than a name may be.
    #[error("a name has at most {max} bytes, this one has {len}")]
    NameTooLong {
        /// The length of the name, in bytes.
        len: usize,
        /// The most that it may have.
        max: usize,
    },
    /// The attributes take more space than there is beside an object.
    #[error("attributes take at most {max} bytes as JSON, these take {len}")]
    AttributesTooLong {
        /// What they take, in bytes.
        len: usize,
        /// The most that they may take.
        max: usize,
    },
    /// An attribute that this crate does not know.
    #[error("the attribute {attribute} cannot be stored")]
    UnknownAttribute {
        /// Its name.
        attribute: String,
    },
    /// An update names neither an `e_tag` nor a `version`.
    #[error("an update needs an e_tag or a version")]
    NoVersion,
    /// The version that was asked for is not the current one; no other is kept.
    #[error("version {asked:?} is not kept, the current one is {current}")]
    OtherVersion {
        /// What was asked for.
        asked: String,
        /// The current version.
        current: u64,
    },
    /// A part of an upload did not arrive, or was given up.
    #[error("part {part} of the upload is missing")]
    PartMissing {
        /// Its number, from 0.
        part: usize,
    },
    /// The upload was completed or aborted, or is not one of this store.
    #[error("no such upload is under way")]
    NoUpload,
    /// The caller's memory cannot hold what it asked for at once.
    #[error("no memory for {len} bytes at once")]
    OutOfMemory {
        /// What was asked for, in bytes.
        len: u64,
    },
}

impl From<RequestError> for object_store::Error {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::UnknownAttribute { .. } => {
                object_store::Error::NotSupported { source: error.into() }
            }
            _ => generic(error),
        }
    }
}

/// An error of no kind that `object_store` knows.
pub(crate) fn generic(
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> object_store::Error {
    object_store::Error::Generic { store: STORE, source: source.into() }
}

/// An error of the store, about a path.
pub(crate) fn of(error: VirtualMemoryError, path: &Path) -> object_store::Error {
    let path = path.to_string();
    match error {
        VirtualMemoryError::NameNotFound { .. } => {
            object_store::Error::NotFound { path, source: error.into() }
        }
        VirtualMemoryError::NameExists { .. } => {
            object_store::Error::AlreadyExists { path, source: error.into() }
        }
        VirtualMemoryError::VersionChanged { .. } => {
            object_store::Error::Precondition { path, source: error.into() }
        }
        VirtualMemoryError::TierNotAvailable { .. } => {
            object_store::Error::NotSupported { source: error.into() }
        }
        _ => generic(error),
    }
}
