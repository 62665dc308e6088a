//! Reads in flight that others join, and the damage that reads have found.
//!
//! Invariant: one read of an object from a slower tier is under way for all readers that want it
//! whole. Called by the reads.

use std::sync::atomic::Ordering;

use super::{ExtentMap, Flight, Object, WeakFlight};
use crate::error::VirtualMemoryError;
use crate::parcel::WeakParcel;

impl Object {
    /// Joins the read in flight, or registers `start` as the one. True if it was registered.
    pub(crate) fn join_or_start(&self, start: impl FnOnce() -> Flight) -> (Flight, bool) {
        let mut inner = self.inner.lock();
        if let Some(flight) = inner.flight.as_ref().and_then(WeakParcel::upgrade) {
            return (flight, false);
        }
        let flight = start();
        inner.flight = Some(flight.downgrade());
        (flight, true)
    }

    /// Ends the read in flight, if it is still the one that readers join.
    pub(crate) fn end_flight(&self, flight: &WeakFlight) {
        let mut inner = self.inner.lock();
        if inner.flight.as_ref().is_some_and(|current| current.is_same(flight)) {
            inner.flight = None;
        }
    }

    /// Whether a reader waits for a read from a slower tier.
    pub(crate) fn has_flight(&self) -> bool {
        let flight = self.inner.lock().flight.as_ref().and_then(WeakParcel::upgrade);
        flight.is_some()
    }

    /// Counts a read of `chunks` that host memory did not serve. Returns what reads had moved
    /// before.
    pub(crate) fn count_moved(&self, chunks: usize) -> u32 {
        let chunks = u32::try_from(chunks).unwrap_or(u32::MAX);
        let add = |before: u32| Some(before.saturating_add(chunks));
        let (Ok(before) | Err(before)) =
            self.chunks_moved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        before
    }

    /// The damage that was found before, or why the version is lost, if either is so.
    pub(crate) fn damage(&self) -> Option<VirtualMemoryError> {
        let inner = self.inner.lock();
        inner.rare.corrupt.as_deref().cloned().or_else(|| inner.lost_version(self))
    }

    /// Remembers that this map leads to damage, if it is still the current one.
    pub(crate) fn set_damage(&self, disk: &ExtentMap, error: VirtualMemoryError) {
        let mut inner = self.inner.lock();
        if inner.extents.is_same(disk) {
            inner.rare.change(|rare| rare.corrupt = Some(Box::new(error)));
        }
    }
}
