//! One object under stress, and the versions that a reader of it may see.
//!
//! Invariant: the bytes of a version follow from its number and the object's salt. Called by the
//! workers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmem::VMemHandle;

/// One object: its handle, and which versions a reader may see. Only its own task writes to it.
pub(crate) struct Object {
    pub(crate) handle: VMemHandle,
    pub(crate) salt: u64,
    /// Every write up to here has completed.
    pub(crate) completed: AtomicU64,
    /// Every write up to here has begun; one that was dropped may have been applied or not.
    pub(crate) begun: AtomicU64,
}

pub(crate) fn fill(salt: u64, version: u64, start: usize, buf: &mut [u8]) {
    if version == 0 {
        buf.fill(0);
        return;
    }
    let key = (salt ^ version.wrapping_mul(0x9E37_79B9_7F4A_7C15)) as usize;
    for (at, byte) in (start..).zip(buf) {
        *byte = (at ^ (at >> 8).wrapping_mul(31) ^ key ^ (key >> 11)) as u8;
    }
}

impl Object {
    pub(crate) fn new(handle: VMemHandle, salt: u64) -> Arc<Self> {
        Arc::new(Object { handle, salt, completed: 0.into(), begun: 0.into() })
    }

    /// The version that it has, if no write is under way or was dropped.
    pub(crate) fn settled(&self) -> Option<u64> {
        let completed = self.completed.load(Ordering::SeqCst);
        (self.begun.load(Ordering::SeqCst) == completed).then_some(completed)
    }

    pub(crate) fn bytes(&self, version: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.handle.len()];
        fill(self.salt, version, 0, &mut bytes);
        bytes
    }

    /// Checks bytes that were read by a call that began when `from` was complete.
    pub(crate) fn check(&self, from: u64, range: Range<usize>, read: &[u8]) {
        assert_eq!(read.len(), range.len());
        let until = self.begun.load(Ordering::SeqCst);
        let mut expected = vec![0; range.len()];
        for version in (from..=until).rev() {
            fill(self.salt, version, range.start, &mut expected);
            if expected == read {
                return;
            }
        }
        let older = (0..from).rev().find(|&version| {
            fill(self.salt, version, range.start, &mut expected);
            expected == read
        });
        panic!(
            "object {} range {range:?}: version {older:?}, not one of {from}..={until}: {:?}...",
            self.handle.id(),
            &read[..read.len().min(16)]
        );
    }
}
