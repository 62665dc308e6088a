//! What tokio-console shows of a store besides its tasks.
//!
//! The console has two tables. In that of tasks each migration is a row of its own for as long as
//! it runs, and for the seconds after that the console keeps what has ended: its name says from
//! where to where, its fields which object, and why. In that of resources each tier is a row, with
//! what fills it and what waits for space in it, and the reads of the store are one, whose view
//! lists each read that is not a hit, the task that reads, and what it waits for now.
//!
//! Invariant: without `tokio_unstable` and the feature `tokio-console` every type here has no size
//! and every function no code. Nothing here waits. Called by `migrate`, `latency`, `vmem/timed.rs`
//! and the actor.

#![cfg_attr(
    not(all(tokio_unstable, feature = "tokio-console")),
    expect(dead_code, reason = "nobody looks at the figures")
)]

#[cfg(all(tokio_unstable, feature = "tokio-console"))]
mod shown;
#[cfg(all(tokio_unstable, feature = "tokio-console"))]
pub(crate) use shown::{Migration, Read, Reads, show};

#[cfg(not(all(tokio_unstable, feature = "tokio-console")))]
mod hidden;
#[cfg(not(all(tokio_unstable, feature = "tokio-console")))]
pub(crate) use hidden::{Migration, Read, Reads, show};

use crate::memory_tier::MemoryTier;

/// One object on its way.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) object: String,
    pub(crate) bytes: usize,
}

/// What a tier is filled with, and what waits for it.
#[derive(Debug)]
pub(crate) struct TierNow {
    pub(crate) tier: MemoryTier,
    pub(crate) used_bytes: u64,
    pub(crate) capacity_bytes: u64,
    pub(crate) pinned_bytes: u64,
    /// Requests that wait for space in it.
    pub(crate) waiters: usize,
}

/// What a store does now.
#[derive(Debug)]
pub(crate) struct Now {
    pub(crate) tiers: Vec<TierNow>,
    /// Reads that are no hits, by the stage in which they are.
    pub(crate) reads: Vec<(&'static str, u64)>,
    /// What readers hold of host memory.
    pub(crate) held_bytes: u64,
    /// Migrations that are under way.
    pub(crate) migrations: u64,
}
