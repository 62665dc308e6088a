//! What a backend implements, and what a store is made of.
//!
//! Called by `vmem-io`, `vmem-gpu`, the facade and the test kit; users of the store need none of
//! it.

use std::sync::Arc;

pub use crate::buffer::IoBuf;
pub use crate::catalog::{
    Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord, METADATA_LEN_MAX, NAME_LEN_MAX,
    SEGMENT_CHUNKS, StoredChunk,
};
pub use crate::deadline::Clock;
pub use crate::device::{
    DeviceAnswer, DeviceBackend, DeviceError, DeviceRange, DeviceUsage, RangeLedger, RangeOwner,
};
pub use crate::disk::{
    CHUNK_BYTES, DiskBackend, DiskError, DiskUsage, Extent, ExtentOwner, ReadChunk, Run, Runs,
};

pub use crate::host::{InUse, ObjectSpace, Part, Registrar, StagingMemory};

pub use crate::ranges::{End, Ranges};

pub use crate::vmem::{DeviceAccess, VramChange, VramHold, VramSet, VramShare};

use crate::capabilities::Capabilities;

/// The parts of a store.
#[derive(Debug)]
pub struct Backends {
    /// Host memory that the store may use, staging included, in bytes.
    pub host_capacity_bytes: u64,
    /// The tier below it.
    pub disk: Arc<dyn DiskBackend>,
    /// Where names are stored; without one there are no named objects.
    pub catalog: Option<Arc<dyn Catalog>>,
    /// The tiers above it, in the order of their numbers: `MemoryTier::Vram` is the first.
    pub devices: Vec<Arc<dyn DeviceBackend>>,
    /// What was found when they were opened.
    pub capabilities: Capabilities,
}
