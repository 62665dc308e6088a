//! Why a tier below host memory failed.
//!
//! Invariant: a damaged chunk has the number that it had in the call that failed; a caller that
//! passes the error on gives it the number that its own caller knows. Returned by tiers.

use std::io;
use std::sync::Arc;

/// Why an operation of such a tier failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TierError {
    /// No space: the budget is used up, or the file system is full and `source` says so.
    #[error("no space for {requested_bytes} bytes: {free_bytes} are free in the budget")]
    Full {
        /// Bytes asked for, rounding included.
        requested_bytes: u64,
        /// Bytes free in the budget.
        free_bytes: u64,
        /// The cause, where the operating system refused.
        source: Option<Arc<io::Error>>,
    },
    /// A chunk is not what was written.
    #[error(
        "chunk {chunk} is not what was written: its checksum is {actual:#x}, not {expected:#x}"
    )]
    Corrupt {
        /// Index into the chunks of the call.
        chunk: usize,
        /// CRC-32C of what was written.
        expected: u32,
        /// CRC-32C of what was read.
        actual: u32,
    },
    /// The operating system refused.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// The cause, with its errno.
        source: Arc<io::Error>,
    },
    /// The backend was closed.
    #[error("the backend was closed")]
    Closed,
}

impl TierError {
    /// With another number for a chunk that is damaged: what `number` says of that in this call.
    pub(crate) fn renumbered(self, number: impl FnOnce(usize) -> Option<usize>) -> Self {
        match self {
            TierError::Corrupt { chunk, expected, actual } => {
                let chunk = number(chunk).unwrap_or(chunk);
                TierError::Corrupt { chunk, expected, actual }
            }
            other => other,
        }
    }
}
