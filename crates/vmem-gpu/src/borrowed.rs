//! A slice of cudarc's while a target has it.
//!
//! Invariant: while copies on another stream than that of the slice may begin or be in flight, the
//! caller's variable has an empty slice in its place. So whatever becomes of the target, be it
//! leaked with the future of a call, no such copy is one to memory that the variable could have
//! freed. Called by targets.

// The one block makes the empty slice.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::driver::{CudaSlice, DriverError, sys};
use parking_lot::Mutex;

/// A slice that goes back where it was when this is dropped.
#[derive(Debug)]
pub(crate) struct Borrowed<'a>(Mutex<Lent<'a>>);

#[derive(Debug)]
struct Lent<'a> {
    home: &'a mut CudaSlice<u8>,
    /// None while it is at home.
    slice: Option<CudaSlice<u8>>,
}

impl<'a> Borrowed<'a> {
    pub(crate) fn of(home: &'a mut CudaSlice<u8>) -> Self {
        Borrowed(Mutex::new(Lent { home, slice: None }))
    }

    /// Takes it, unless that was done.
    ///
    /// # Errors
    ///
    /// The driver refuses what an empty slice takes; it may do so no more the next time.
    pub(crate) fn take(&self) -> Result<(), DriverError> {
        let lent = &mut *self.0.lock();
        if lent.slice.is_some() || vmem_core::planted!("slice-left") {
            return Ok(());
        }
        let stream = lent.home.stream().clone();
        // It has events where cudarc keeps some, and panics where it gets none.
        let empty = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: a slice of no bytes has no memory that it could name or free.
            unsafe { stream.upgrade_device_ptr::<u8>(0, 0) }
        }));
        let refused = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let empty = empty.map_err(|_| refused)?;
        lent.slice = Some(std::mem::replace(lent.home, empty));
        Ok(())
    }

    pub(crate) fn with(&self, visit: impl FnOnce(&CudaSlice<u8>)) {
        let lent = self.0.lock();
        visit(lent.slice.as_ref().unwrap_or(lent.home));
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let lent = self.0.get_mut();
        if let Some(slice) = lent.slice.take() {
            let empty = std::mem::replace(lent.home, slice);
            // There is nothing to be freed.
            let _ = empty.leak();
        }
    }
}
