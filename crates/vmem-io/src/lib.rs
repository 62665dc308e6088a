//! The disk tier of vmem: chunks in extents of one data file.
//!
//! Invariant: what an operation owns, memory and space, is free only after it has completed. Called
//! by the facade, which hands the tier to core as a
//! [`Tier`](vmem_core::backend::Tier).
//!
//! In the order in which data flows: [`open_disk`] takes a [`StoreDirectory`] and makes a
//! [`DiskTier`]; the tier finds space, plans transfers, and verifies what comes back; a
//! [`Driver`](driver::Driver) moves the bytes.

pub mod catalog;
mod cgroup;
mod directory;
pub mod driver;
mod ledger;
mod lock;
mod machine;
mod open;
mod plan;
mod pool;
mod process;
mod settle;
mod space;
mod stale;
mod sync_gate;
mod tier;
mod verify;

pub use directory::{CATALOG_FILE, DATA_FILE, LOCK_FILE, StoreDirectory};
pub use machine::memory_limit_bytes;
pub use open::{DiskOptions, OpenedDisk, open_disk, open_disk_with};
pub use tier::{DiskTier, Taken};
pub use verify::{Verified, verify};
