//! Host memory: object space, and the staging reserve beside it.
//!
//! Invariant: the physical memory that the two hold, unused parts of spans and pages kept for
//! reuse included, never exceeds what they were given. Address space is another matter: there
//! is several times as much of it, so that a large object finds contiguous addresses whenever
//! there are pages for it, whatever lies scattered around.
//!
//! - `mapping`: address space from the operating system, and pages given back to it.
//! - `slabs`: which parts a device has registered. Pure.
//! - `pages`: which pages are live, kept for reuse, or given back. The hard budget.
//! - `classes`: the size classes of small objects. Pure.
//! - `spans`: the slots of one class.
//! - `arena`: object space as its users see it.
//! - `evacuation`: moving small objects together, so that whole spans become free.
//! - `space`: object space as a device sees it.
//! - `staging`: the reserve for bytes in passage.
//!
//! Called by the queue for space, and by the migrations.

mod arena;
mod classes;
mod evacuation;
mod mapping;
mod pages;
mod slabs;
mod space;
mod spans;
mod staging;

pub(crate) use arena::{HostArena, HostSlot};
pub(crate) use evacuation::Evacuation;
pub use space::{InUse, ObjectSpace, Part, Registrar};
pub use staging::StagingMemory;
pub(crate) use staging::{StagingPiece, StagingPool};
