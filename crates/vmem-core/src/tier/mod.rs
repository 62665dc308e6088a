//! The tiers that evict: space within a budget, the queue for it, the order of eviction, the holds.
//!
//! Invariant: every tier with a budget is a value of [`TierState`], by one set of rules; what
//! differs is the [`Space`] that it grants. Called by the migrations and the public calls, which
//! ask, and by the actor, which serves.

mod device;
mod gathers;
mod holds;
mod host;
mod link;
mod need;
mod neighbours;
mod queue;
mod state;
mod storage;
mod waiters;

pub(crate) use device::{Destination, Device, DeviceSpace};
pub use holds::{HeldObject, HoldKind};
pub(crate) use holds::{HoldCount, Holds};
pub(crate) use host::HostSpace;
pub(crate) use link::Link;
pub(crate) use need::{Class, Grant, Need, NoSpace, Refused, Space, Wanted};
pub(crate) use neighbours::Neighbours;
pub(crate) use queue::Queue;
pub(crate) use state::{TierState, Watermarks};
pub(crate) use storage::{Storage, StorageSpace};
