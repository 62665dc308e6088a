//! How much of object space readers hold, and the reads that wait until it is less.
//!
//! Invariant: a read that is to hold more than [`FREE_BYTES`] has its bytes promised before it has
//! them, and the promise ends once readers are counted as holding them. A promise is kept by a task
//! of the runtime, or within one poll of a caller, never by a caller that waits. So what readers
//! hold exceeds `max_held` by small reads, and by the last of the large ones, alone. The waiters
//! are woken together and in no order, since a caller at the front of a line may be one that is not
//! polled again. Called by reads, and by the migrations that serve them.

use std::pin::pin;
use std::sync::atomic::Ordering;

use super::Shared;
use crate::chunk::CHUNK_BYTES;
use crate::copy::ReadGuard;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::host::HostArena;
use crate::latency::{self, ReadStage};
use crate::memory_tier::MemoryTier;
use crate::parcel::GRACE;

/// Reads of this many bytes and fewer wait for no other reader.
pub(crate) const FREE_BYTES: usize = CHUNK_BYTES;

/// Bytes that a read is going to hold.
#[derive(Debug)]
pub(crate) struct Promise<'a> {
    shared: &'a Shared,
    bytes: u64,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let before = self.shared.promised_bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        assert!(before >= self.bytes, "a promise ends once");
        self.shared.wake.if_waiting();
    }
}

impl Shared {
    /// What a read holds that others may have to wait for, in bytes of footprint.
    pub(crate) fn to_hold(len: usize) -> u64 {
        if len > FREE_BYTES { HostArena::footprint(len) } else { 0 }
    }

    /// Whether readers hold all that they may.
    pub(crate) fn readers_hold_all(&self) -> bool {
        self.limits.max_held_bytes.is_some_and(|max| self.held_or_promised() >= max)
    }

    /// Whether this reader may keep what it has just got: others hold it too, or hold less than
    /// they may.
    pub(crate) fn may_keep(&self, guard: &ReadGuard) -> bool {
        let Some(max) = self.limits.max_held_bytes else { return true };
        let footprint = guard.footprint();
        footprint <= FREE_BYTES as u64
            || guard.is_shared()
            || self.held_or_promised().saturating_sub(footprint) < max
    }

    /// A promise ends after its bytes are held, so what is promised is read first: then nothing is
    /// missed.
    fn held_or_promised(&self) -> u64 {
        let promised = self.promised_bytes.load(Ordering::SeqCst);
        promised + self.copies.held_bytes()
    }

    fn try_promise(&self, bytes: u64, max: u64) -> Option<Promise<'_>> {
        assert!(bytes > FREE_BYTES as u64, "{bytes} bytes wait for no other reader");
        self.promised_bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |before| {
                let promised = if crate::planted!("held-unpromised") { 0 } else { before };
                (promised + self.copies.held_bytes() < max).then_some(before + bytes)
            })
            .ok()
            .map(|_| Promise { shared: self, bytes })
    }

    /// Waits until readers hold less than they may, and has these bytes counted until it is known
    /// that they are held. At once for none, and where there is no bound.
    ///
    /// # Errors
    ///
    /// `AllPinned` at the deadline; `Closed`.
    pub(crate) async fn promise(
        &self,
        bytes: u64,
        deadline: &Deadline,
    ) -> Result<Option<Promise<'_>>, VirtualMemoryError> {
        let Some(max) = self.limits.max_held_bytes.filter(|_| bytes > 0) else {
            return Ok(None);
        };
        let _waiting = self.wake.waiting();
        let _stage = latency::enter(ReadStage::Space);
        loop {
            let mut released = pin!(self.wake.released());
            released.as_mut().enable();
            if self.is_closed() {
                return Err(VirtualMemoryError::Closed);
            }
            if let Some(promise) = self.try_promise(bytes, max) {
                return Ok(Some(promise));
            }
            if deadline.is_past() {
                return Err(self.all_held(MemoryTier::Host, bytes, deadline.waited()));
            }
            // Bytes in parcels that their callers do not claim count as held too.
            let (Ok(()) | Err(Late)) = deadline.share(1, GRACE).bound(released).await;
            self.unclaimed.recall();
        }
    }
}
