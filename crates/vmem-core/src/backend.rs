//! What a backend implements, and what a store is made of.
//!
//! Called by `vmem-io`, `vmem-gpu`, the facade and the test kit; users of the store need none of
//! it.

pub use crate::buffer::IoBuf;
pub use crate::catalog::{
    Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord, METADATA_LEN_MAX, NAME_LEN_MAX,
    SEGMENT_CHUNKS,
};
pub use crate::checksum::{Slices, checksums, crc32c};
pub use crate::chunk::{CHUNK_BYTES, Run, Runs, StoredChunk};
pub use crate::deadline::Clock;
pub use crate::device::{
    DeviceAnswer, DeviceBackend, DeviceError, DeviceRange, DeviceUsage, MissingPages, RangeLedger,
    RangeOwner, UseEnd,
};
pub use crate::storage::{
    Durable, Extent, ExtentOwner, ReadChunk, SharedOwner, Tier, TierError, TierUsage,
};

pub use crate::host::{InUse, ObjectSpace, Part, Registrar, StagingMemory};

pub use crate::ranges::{End, Ranges};

pub use crate::task::spawn_named;

pub use crate::object::{Backends, Remote};

pub use crate::runtime::{check_runtime, current_runtime, quietly};

pub use crate::vmem::{
    DeviceAccess, GatherCount, VramChange, VramHold, VramScratch, VramSet, VramShare,
};
