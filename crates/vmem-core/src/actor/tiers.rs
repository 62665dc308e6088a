//! The tiers as their evictors see them: how an object stands there, what its leaving costs, and
//! how it leaves.
//!
//! Invariant: nothing here waits, and nothing decides: that is for `plan.rs`. An object leaves by
//! its gate, so never one that is held, read, in flight or being written. Called by the evictor of
//! the tier.

mod device;
mod host;
mod storage;

use std::ops::Range;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

pub(super) use self::device::OnDevice;
pub(super) use self::host::InHost;
pub(super) use self::storage::InStorage;
use super::Took;
use super::look::Spares;
use super::plan::Victim;
use crate::deadline::Deadline;
use crate::events::MigrationCause;
use crate::migrate::CopyFate;
use crate::object::{GatePass, Object, Shared};
use crate::policy::Probe;
use crate::storage::TierError;
use crate::tier::{Neighbours, Space, TierState, Wanted};

/// What is written before its space is needed.
pub(super) struct Cleaning {
    /// Once more than this is in use, in bytes.
    pub(super) above_bytes: u64,
    /// The length of the cold end, in bytes of footprint.
    pub(super) cold_bytes: u64,
    /// Only after something was evicted: what stays is written for nothing.
    pub(super) after_evictions: bool,
}

/// What the neighbours of a plan are to make free.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// None where they do not lie side by side.
    pub(super) addresses: Option<Range<u64>>,
    /// Objects that move out of it.
    pub(super) moves: usize,
    /// The least footprint for which there was no space elsewhere.
    pub(super) refused_bytes: Option<u64>,
}

/// A tier that evicts.
pub(super) trait Evicting {
    type Space: Space;

    /// An object that is to be written before it can leave, with its gate.
    type Leaving: Send + 'static;

    fn state<'a>(&self, shared: &'a Shared) -> &'a TierState<Self::Space>;

    /// What of the cold end is written early, so that most victims are clean when their space is
    /// needed. None if that is left to the moment when they go.
    fn cleans_early(&self, _shared: &Shared) -> Option<Cleaning> {
        None
    }

    /// Whether the holder of its gate may write an object early.
    fn may_clean(&self, _object: &Object) -> bool {
        true
    }

    /// How an object stands here, for the policy; what was used at `spared_since` or later is not
    /// to go.
    fn probe(&self, object: &Object, spared_since: u64) -> Probe;

    /// Since when what is used is spared by a prefetch, in nanoseconds of the store's clock: since
    /// the prefetch was asked for.
    fn spared_since(&self, shared: &Shared, wanted: &Wanted) -> u64 {
        let ago = |asked: Instant| asked.elapsed().as_nanos() as u64;
        shared.recency.now().saturating_sub(wanted.prefetch_asked.map_or(0, ago))
    }

    /// Whether an object is spared that was used before.
    fn is_spared(&self, _object: &Object, _spares: Spares) -> bool {
        false
    }

    /// In how long what was used at `stamp` makes way for a prefetch; none if it never does.
    fn cools_in(&self, _shared: &Shared, _stamp: u64) -> Option<Duration> {
        None
    }

    /// Whether the holder of its gate can take an object out now.
    fn may_leave(&self, object: &Object) -> bool;

    /// Whether an object cannot leave without new space below.
    fn needs_space_below(&self, object: &Object) -> bool;

    /// Whether it has to be written before it leaves, into such space or into space that it has.
    fn is_written_first(&self, object: &Object) -> bool {
        self.needs_space_below(object)
    }

    /// What its leaving costs and frees.
    fn victim(&self, object: &Object) -> Victim;

    /// Takes an object out that needs nothing written. False if it is held, read or being changed.
    fn drop_clean(&self, pass: &GatePass) -> bool;

    /// Takes space below for an object; none if it needs nothing written, and has left already.
    ///
    /// # Errors
    ///
    /// What the tier below says.
    fn prepare(&self, pass: GatePass) -> Result<Option<Self::Leaving>, TierError>;

    /// What is to be written of an object, in bytes.
    fn payload(leaving: &Self::Leaving) -> u64;

    /// Writes a batch, and lets its objects leave unless the copies here are kept.
    fn write(
        batch: Vec<Self::Leaving>,
        fate: CopyFate,
        cause: MigrationCause,
        deadline: Deadline,
    ) -> BoxFuture<'static, Took>;

    /// Objects whose leaving makes one piece of free space of what the first request needs.
    fn neighbours(&self, _shared: &Shared, _wanted: &Wanted) -> Neighbours {
        Neighbours::default()
    }

    /// Takes space elsewhere in the tier for an object that lies in the window, if there is some
    /// now, so that it moves instead of leaving.
    ///
    /// # Errors
    ///
    /// The gate, if it lies elsewhere, or there is none.
    fn move_out(&self, pass: GatePass, _window: &mut Window) -> Result<Self::Leaving, GatePass> {
        Err(pass)
    }

    /// Moves objects within the tier, so that free bytes become usable bytes. True if that freed
    /// some.
    fn compact(&self, _shared: &Shared) -> bool {
        false
    }
}
