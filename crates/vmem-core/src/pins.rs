//! How much of a tier pins may keep.
//!
//! Invariant: what is charged never exceeds the most that the configuration allows, and never falls below
//! zero. Charged by the first pin of an object, given back by its last.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// The pins of one tier, in bytes of footprint.
#[derive(Debug)]
pub(crate) struct PinBudget {
    bytes: AtomicU64,
    max: u64,
    gone: Notify,
}

impl PinBudget {
    pub(crate) fn new(max: u64) -> Self {
        PinBudget { bytes: AtomicU64::new(0), max, gone: Notify::new() }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// Charges one object, if the budget allows it.
    pub(crate) fn try_charge(&self, footprint: u64) -> bool {
        self.bytes
            .try_update(Ordering::SeqCst, Ordering::SeqCst, |bytes| {
                let bytes = bytes.checked_add(footprint)?;
                (bytes <= self.max).then_some(bytes)
            })
            .is_ok()
    }

    pub(crate) fn uncharge(&self, footprint: u64) {
        let before = self.bytes.fetch_sub(footprint, Ordering::SeqCst);
        assert!(before >= footprint, "pinned bytes never fall below zero");
        self.ring();
    }

    /// Ends when a pin goes, or the store.
    pub(crate) fn gone(&self) -> Notified<'_> {
        self.gone.notified()
    }

    pub(crate) fn ring(&self) {
        self.gone.notify_waiters();
    }
}
