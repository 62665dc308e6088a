//! Why a request failed, in words that hold no secret.
//!
//! Invariant: no text of an object store passes. Its errors may quote requests, with keys and
//! signatures in them; what passes is the kind of the error and a short code. Made by the client,
//! given on by the tier.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmem_core::VirtualMemoryError;
use vmem_core::backend::TierError;

/// Why a request to the object store failed: the source of the [`io::Error`] in
/// [`TierError::Io`].
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is no such object, or no such bucket.
    #[error("the object store has no such object or bucket{}", shown(.code))]
    NotFound {
        /// What the store calls it.
        code: Option<String>,
    },
    /// There is an object already where one was to be created.
    #[error("the object exists already")]
    Exists,
    /// The credentials are wrong, have expired, or do not allow the request.
    #[error("the object store refused the credentials{}", shown(.code))]
    Denied {
        /// What the store calls it.
        code: Option<String>,
    },
    /// The object store cannot do what was asked.
    #[error("the object store does not support the request{}", shown(.code))]
    Unsupported {
        /// What the store calls it.
        code: Option<String>,
    },
    /// There was no answer in time.
    #[error("no answer within {waited:?}")]
    TimedOut {
        /// How long the last try was waited for.
        waited: Duration,
    },
    /// The request failed: there is no connection, or the object store reported an error of its
    /// own.
    #[error("the request failed: {kind}{}", shown(.code))]
    Failed {
        /// The kind of the error below, where it came from the operating system.
        kind: io::ErrorKind,
        /// What the store calls it.
        code: Option<String>,
    },
    /// A body had another length than was asked for.
    #[error("{actual_bytes} bytes arrived, {expected_bytes} were asked for")]
    Length {
        /// What was asked for, in bytes.
        expected_bytes: u64,
        /// What arrived, in bytes; where it was too much, up to there.
        actual_bytes: u64,
    },
    /// An object is longer than any that was put there.
    #[error("an object has {bytes} bytes, at most {bytes_max} were put")]
    TooLong {
        /// Its length, in bytes.
        bytes: u64,
        /// The most that it can have, in bytes.
        bytes_max: u64,
    },
    /// The bytes are not those that were put.
    #[error("a body differs from what was put: {actual:#010x} instead of {expected:#010x}")]
    Altered {
        /// CRC-32C of what was put.
        expected: u32,
        /// CRC-32C of what arrived.
        actual: u32,
        /// Index into the chunks of the call.
        chunk: usize,
    },
    /// The object store has failed too often; nothing was sent.
    #[error("the object store fails, and is asked again in {retry_after:?}")]
    CircuitOpen {
        /// When a request will be let through.
        retry_after: Duration,
    },
    /// The lease of this instance was not renewed in time; nothing was sent.
    #[error("the lease of this instance has expired")]
    LeaseExpired,
    /// The lease of this instance was not renewed for so long that a collector has ended it: what
    /// it has put may be deleted, and it puts nothing more until it is opened again.
    #[error("the lease of this instance has ended: open it again")]
    LeaseEnded,
    /// The task of the request ended early: its runtime was shut down, or the object store
    /// panicked.
    #[error("the task of the request ended early")]
    Abandoned,
}

/// Why a remote tier, or a catalog in a bucket, was not opened.
#[non_exhaustive]
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// An option that cannot work.
    #[error("{field}: {expected}")]
    InvalidOption {
        /// The field of the options.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
    },
    /// It must be opened inside of a tokio runtime with a timer.
    #[error("an object store needs a tokio runtime with a timer")]
    UnsuitableRuntime,
    /// The object store replaces an object when it is asked to create it: two writers of one name
    /// would both win.
    #[error("the object store does not do conditional creates")]
    NoConditionalCreate,
    /// The object store did not serve a small object under the prefix.
    #[error("the object store cannot be used: {request}: {source}")]
    Unavailable {
        /// The request that failed: `put`, `create`, `get` or `delete`.
        request: &'static str,
        /// The cause.
        source: RequestError,
    },
}

fn shown(code: &Option<String>) -> String {
    code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default()
}

impl RequestError {
    /// The error without what might be secret in it.
    pub(crate) fn of(error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let code = store_code(error);
        match error {
            E::NotFound { .. } => Self::NotFound { code },
            E::AlreadyExists { .. } | E::Precondition { .. } => Self::Exists,
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Self::Denied { code },
            E::NotSupported { .. }
            | E::NotImplemented { .. }
            | E::InvalidPath { .. }
            | E::UnknownConfigurationKey { .. } => Self::Unsupported { code },
            _ => Self::Failed { kind: io_kind(error), code },
        }
    }

    /// Whether the same request may succeed later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::TimedOut { .. }
            | Self::Failed { .. }
            | Self::Length { .. }
            | Self::Altered { .. } => true,
            Self::NotFound { .. }
            | Self::Exists
            | Self::Denied { .. }
            | Self::Unsupported { .. }
            | Self::TooLong { .. }
            | Self::CircuitOpen { .. }
            | Self::LeaseExpired
            | Self::LeaseEnded
            | Self::Abandoned => false,
        }
    }

    /// Whether it speaks of the object store as a whole, and not of one object.
    pub(crate) fn is_of_store(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Failed { .. } | Self::Denied { .. })
    }

    /// Whether nothing was sent.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::CircuitOpen { .. } | Self::Abandoned)
    }

    /// Whether a try that ended so may have done what was asked nevertheless.
    pub(crate) fn is_ambiguous(&self) -> bool {
        self.is_transient() || *self == Self::Abandoned
    }

    /// Whether there is a bucket, but no such object in it.
    pub(crate) fn is_missing_object(&self) -> bool {
        let of_bucket = ["NoSuchBucket", "ContainerNotFound"];
        let is_of_bucket = |code: &str| of_bucket.contains(&code);
        matches!(self, Self::NotFound { code } if !code.as_deref().is_some_and(is_of_bucket))
    }

    /// The error of a call of the tier.
    pub(crate) fn of_tier(self, operation: &'static str) -> TierError {
        if let Self::Altered { expected, actual, chunk } = self {
            return TierError::Corrupt { chunk, expected, actual };
        }
        TierError::Io { operation, source: Arc::new(self.into()) }
    }

    /// The error of a call of the catalog.
    pub(crate) fn of_catalog(self, operation: &'static str) -> VirtualMemoryError {
        VirtualMemoryError::io(operation, self.into())
    }
}

impl From<RequestError> for io::Error {
    fn from(error: RequestError) -> Self {
        use RequestError as E;
        let kind = match &error {
            E::NotFound { .. } => io::ErrorKind::NotFound,
            E::Exists => io::ErrorKind::AlreadyExists,
            E::Denied { .. } => io::ErrorKind::PermissionDenied,
            E::Unsupported { .. } => io::ErrorKind::Unsupported,
            E::TimedOut { .. } | E::LeaseExpired => io::ErrorKind::TimedOut,
            E::Failed { kind, .. } => *kind,
            E::Length { .. } => io::ErrorKind::UnexpectedEof,
            E::TooLong { .. } => io::ErrorKind::InvalidData,
            E::CircuitOpen { .. } => io::ErrorKind::NotConnected,
            E::Altered { .. } | E::LeaseEnded | E::Abandoned => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// Input that no call may have.
pub(crate) fn invalid(operation: &'static str, why: &'static str) -> TierError {
    let source = Arc::new(io::Error::new(io::ErrorKind::InvalidInput, why));
    TierError::Io { operation, source }
}

/// The kind of the first error of the operating system below this one.
fn io_kind(error: &object_store::Error) -> io::ErrorKind {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.kind();
        }
        cause = error.source();
    }
    io::ErrorKind::Other
}

/// The code in the answer of the store, such as `SlowDown`: a short word, and nothing else.
fn store_code(error: &object_store::Error) -> Option<String> {
    let text = error.to_string();
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let is_word = (1..=64).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_alphabetic());
    is_word.then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> object_store::Error {
        object_store::Error::Unauthenticated { path: "a?sig=SECRET".into(), source: text.into() }
    }

    #[test]
    fn texts_of_the_store_do_not_pass() {
        let text = "<Error><Code>InvalidAccessKeyId</Code><Key>SECRET</Key></Error>";
        let error = RequestError::of(&refused(text));
        let shown = format!("{error} {error:?} {:?}", error.clone().of_tier("read"));
        assert!(shown.contains("InvalidAccessKeyId"), "{shown}");
        assert!(!shown.contains("SECRET"), "{shown}");
        let error = RequestError::of(&refused("<Code>the SECRET is</Code>"));
        assert_eq!(error, RequestError::Denied { code: None });
    }

    #[test]
    fn missing_bucket_is_no_missing_object() {
        let missing = |text: &str| {
            let error = object_store::Error::NotFound { path: "a".into(), source: text.into() };
            RequestError::of(&error).is_missing_object()
        };
        assert!(missing("no body") && missing("<Code>NoSuchKey</Code>"));
        assert!(missing("<Code>BlobNotFound</Code>"));
        assert!(!missing("<Error><Code>NoSuchBucket</Code></Error>"));
        assert!(!missing("<Code>ContainerNotFound</Code>"));
        assert!(!RequestError::Exists.is_missing_object());
    }

    #[test]
    fn refused_creates_say_that_the_object_exists() {
        let path = || "a?sig=SECRET".to_owned();
        let errors = [
            object_store::Error::AlreadyExists { path: path(), source: "x".into() },
            object_store::Error::Precondition { path: path(), source: "x".into() },
        ];
        for error in &errors {
            let error = RequestError::of(error);
            assert_eq!(error, RequestError::Exists);
            assert!(!error.is_of_store() && !error.is_transient() && !error.is_ambiguous());
            let VirtualMemoryError::Io { source, .. } = error.of_catalog("commit") else {
                panic!("an error of another kind")
            };
            assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
            assert!(!format!("{source:?}").contains("SECRET"));
        }
    }

    #[test]
    fn kind_of_the_system_passes() {
        let source = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = object_store::Error::Generic { store: "S3", source: Box::new(source) };
        let kind = io::ErrorKind::ConnectionRefused;
        assert_eq!(RequestError::of(&error), RequestError::Failed { kind, code: None });
    }
}
