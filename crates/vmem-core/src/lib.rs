//! What vmem does: the decisions. No file, no CUDA, no wall clock of its own.
//!
//! # Layout, in the order in which a read flows
//!
//! - `vmem/`: [`VirtualMemory`], the store as its users see it: `read`, `write`, `place`.
//! - `handle`, `object/`: a [`VMemHandle`] holds its object's entry: where its bytes are, the right
//!   to change that (the *gate*), and how recently it was used.
//! - `copy/`: the host copy of an object: one atomic word says whether it is valid and how many
//!   readers it has.
//! - `host/`, `host_queue`: object space in slabs, the staging reserve, and the queue for space.
//! - `actor/`: the one task that evicts, and that starts every migration as a task of its own.
//! - `migrate/`: what such a task does: reserve, copy, verify, publish, release.
//! - `names/`, `catalog`: named objects, and what a catalog of them implements.
//! - `policy/`: the order of eviction.
//! - `ranges`: the set of ranges that every allocator stands on.
//! - `storage`, `buffer`: what a tier below host memory implements.
//! - `device`, `vram`: what a tier above it implements, and the objects in it.
//! - `plans`: orders of objects that repeat, for prefetches.
//! - `latency`: how long reads take that are not hits, and what they wait for.
//! - `console`, `task`: what tokio-console shows, with the feature of that name.
//! - `metrics`: the figures for a recorder of the facade of that name, with the feature.
//! - `notice`: what operators learn of pressure, refusals, faults and fallbacks.
//! - `config`, `options`, `error`, `events`, `stats`, `capabilities`: what goes in and comes out.
//! - `locks`: the order in which locks are taken, asserted in debug builds.
//! - `planted`: the bugs that tests are seen to find; none in an ordinary build.

mod actor;
mod asker;
pub mod backend;
mod buffer;
mod capabilities;
mod catalog;
mod checksum;
mod chunk;
mod config;
mod console;
mod copy;
mod deadline;
mod device;
mod error;
mod events;
mod handle;
mod host;
mod latency;
mod locks;
mod memory_tier;
#[cfg(feature = "metrics")]
pub mod metrics;
mod migrate;
mod names;
mod notice;
mod object;
mod options;
mod parcel;
mod plans;
mod planted;
pub mod policy;
mod promotion;
mod ranges;
mod recency;
mod requests;
mod runtime;
mod span_rate;
mod stats;
mod storage;
mod task;
mod tier;
mod totals;
mod vmem;
mod wake;
mod windows;

pub use capabilities::Capabilities;
pub use config::{
    Budget, GPUS_MAX, GpuSelection, HOST_CAPACITY_MIN, IoDriver, Promotion, STAGING_CAPACITY_MAX,
    STAGING_CAPACITY_MIN, STREAM_CAPACITY_MAX, STREAM_CAPACITY_MIN, SwitchPoints,
    VirtualMemoryConfig, VirtualMemoryConfigBuilder, WriteBack,
};
pub use error::VirtualMemoryError;
pub use events::{MigrationCause, MigrationEvent};
pub use handle::VMemHandle;
pub use latency::{LatencySnapshot, ReadOp, ReadOutcome, ReadStage, ReadTimes, SlowRead};
pub use memory_tier::MemoryTier;
pub use notice::{Incident, IncidentKind};
pub use options::{ReadClass, ReadOptions};
#[cfg(vmem_planted)]
#[doc(hidden)]
pub use planted::is_planted;
pub use policy::{PolicyChoice, PolicyKind};
pub use stats::{TierStats, VirtualMemoryStats};
pub use tier::{HeldObject, HoldKind};
pub use totals::MigrationStats;
pub use vmem::{
    ListOptions, Listed, NamedEntry, OBJECT_LEN_MAX, ObjectReader, ObjectWriter, PinGuard,
    PlannedPrefetch, Prefetch, PrefetchPlan, PutMode, PutOptions, Residency, VirtualMemory,
};
