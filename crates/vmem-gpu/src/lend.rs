//! Memory of the tier as a slice of cudarc's, for views.
//!
//! Invariant: the slice frees nothing, and what was used of it on other streams than its own comes
//! before what its own gets after its end. Called by leases, when a view is first asked for.

#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use crate::card::Card;

/// A slice over memory that is not its own. Ended in the context of its stream.
#[derive(Debug)]
pub(crate) struct Lent(ManuallyDrop<CudaSlice<u8>>);

impl Lent {
    /// `len` bytes at `address`, which stay for longer than this. cudarc tracks their uses where
    /// the caller's context object does so, unless the driver refuses the events for it.
    pub(crate) fn new(card: &Card, stream: &Arc<CudaStream>, address: u64, len: usize) -> Self {
        // SAFETY: the range is that long and outlives this; the slice is never dropped, so that it
        // does not free what is not its own.
        let lend = |stream: &Arc<CudaStream>| unsafe { stream.upgrade_device_ptr(address, len) };
        let tracked = || {
            // The slice makes events of its own, and panics where it cannot: that is seen here,
            // with a stale error of the caller's put back.
            let context = stream.context();
            let stale = context.check_err();
            let made = context.new_event(None).map(drop).ok();
            let slice = made.and_then(|()| catch_unwind(AssertUnwindSafe(|| lend(stream))).ok());
            context.record_err(stale);
            slice
        };
        let slice = card.context().visit(tracked).ok().flatten().unwrap_or_else(|| {
            // SAFETY: the stream is kept for as long as the lease, which has this.
            let plain = unsafe { card.context().cuda().wrap_borrowed_stream(stream.cu_stream()) };
            lend(&plain)
        });
        Lent(ManuallyDrop::new(slice))
    }

    pub(crate) fn slice(&self) -> &CudaSlice<u8> {
        &self.0
    }

    pub(crate) fn slice_mut(&mut self) -> &mut CudaSlice<u8> {
        &mut self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: taken once: this is the end of it.
        let slice = unsafe { ManuallyDrop::take(&mut self.0) };
        let context = slice.context().clone();
        // A stale error of the caller's would keep cudarc from ordering its streams.
        let stale = context.check_err();
        slice.leak();
        context.record_err(stale);
    }
}
