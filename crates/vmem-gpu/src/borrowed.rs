//! A slice of cudarc's while a target has it.
//!
//! Invariant: while copies on another stream than that of the slice may begin or be in flight, the
//! caller's variable has an empty slice in its place. So whatever becomes of the target, be it
//! leaked with the future of a call, no such copy is one to memory that the variable could have
//! freed. Called by targets.

// The one block makes the empty slice.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cudarc::driver::{CudaSlice, DriverError, sys};
use parking_lot::Mutex;

use crate::context::Context;

/// A slice that goes back where it was when this is dropped.
#[derive(Debug)]
pub(crate) struct Borrowed<'a>(Mutex<Lent<'a>>);

#[derive(Debug)]
struct Lent<'a> {
    home: &'a mut CudaSlice<u8>,
    /// None while it is at home; the context of what copies to it.
    lent: Option<(CudaSlice<u8>, Arc<Context>)>,
}

impl<'a> Borrowed<'a> {
    pub(crate) fn of(home: &'a mut CudaSlice<u8>) -> Self {
        Borrowed(Mutex::new(Lent { home, lent: None }))
    }

    /// Takes it for copies in this context, unless that was done.
    ///
    /// # Errors
    ///
    /// The driver refuses what an empty slice takes; it may do so no more the next time.
    pub(crate) fn take(&self, context: &Arc<Context>) -> Result<(), DriverError> {
        let Lent { home, lent } = &mut *self.0.lock();
        if lent.is_some() || vmem_core::planted!("slice-left") {
            return Ok(());
        }
        let stream = home.stream().clone();
        // It has events where cudarc keeps some, and panics where it gets none.
        let make = AssertUnwindSafe(|| {
            // SAFETY: a slice of no bytes has no memory that it could name or free.
            unsafe { stream.upgrade_device_ptr::<u8>(0, 0) }
        });
        let mut made = None;
        let visited = context.visit(|| made = catch_unwind(make).ok());
        let Some(empty) = made else {
            let refused = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            return Err(visited.err().unwrap_or(refused));
        };
        let slice = std::mem::replace(*home, empty);
        *lent = Some((slice, context.clone()));
        Ok(())
    }

    pub(crate) fn with(&self, visit: impl FnOnce(&CudaSlice<u8>)) {
        let Lent { home, lent } = &*self.0.lock();
        visit(lent.as_ref().map_or(home, |(slice, _)| slice));
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let Lent { home, lent } = self.0.get_mut();
        if let Some((slice, context)) = lent.take() {
            let mut empty = Some(std::mem::replace(*home, slice));
            // There is nothing to be freed.
            let mut leak = || empty.take().map(CudaSlice::leak);
            if context.visit(&mut leak).is_err() {
                leak();
            }
        }
    }
}
