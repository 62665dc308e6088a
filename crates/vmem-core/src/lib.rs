//! What vmem does: the decisions. No file, no CUDA, no wall clock of its own.

mod buffer;
mod disk;
mod error;
mod tier;

pub use error::VirtualMemoryError;
pub use tier::MemoryTier;

/// What a backend implements and is handed.
pub mod backend {
    pub use crate::buffer::IoBuf;
    pub use crate::disk::{CHUNK_BYTES, DiskBackend, DiskError, DiskUsage, Extent, ExtentOwner};
}
