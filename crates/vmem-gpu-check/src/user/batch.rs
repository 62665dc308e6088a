//! The driver's copies of many pieces in one call, in the two forms that drivers have.
//!
//! Invariant: nothing is copied by a function whose form the driver did not name. Called by the
//! bars and by `contract`.

#![allow(unsafe_code)]

use std::ffi::c_uint;

use anyhow::{Result, ensure};
use cudarc::driver::{CudaStream, sys};

use super::machine::driver;

/// `cuMemcpyBatchAsync`, which drivers have since 12.8, and with other arguments since 13.0.
pub(crate) struct BatchCopy(Form);

enum Form {
    V1(CopyV1),
    V2(CopyV2),
}

type CopyV1 = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> c_uint;
type CopyV2 = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    sys::CUstream,
) -> c_uint;

/// How the copies of a batch are ordered, with two hints that are not given.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    source_order: c_uint,
    source: [c_uint; 2],
    target: [c_uint; 2],
    flags: c_uint,
}

/// The source may be read at any time from the call on: it does not change before the stream was
/// waited for.
const ORDER_ANY: c_uint = 3;

impl BatchCopy {
    /// # Errors
    ///
    /// Why there is none.
    pub(crate) fn find() -> std::result::Result<Self, String> {
        let library = driver()?;
        // SAFETY: its type is that of the symbol of this version.
        if let Ok(found) = unsafe { library.get::<CopyV2>(b"cuMemcpyBatchAsync_v2\0") } {
            return Ok(BatchCopy(Form::V2(*found)));
        }
        // SAFETY: as above.
        match unsafe { library.get::<CopyV1>(b"cuMemcpyBatchAsync\0") } {
            Ok(found) => Ok(BatchCopy(Form::V1(*found))),
            Err(error) => Err(error.to_string()),
        }
    }

    /// # Safety
    ///
    /// The memory stays until the stream has done everything.
    pub(crate) unsafe fn copy(
        &self,
        to: &mut [u64],
        from: &mut [u64],
        lens: &mut [usize],
        stream: &CudaStream,
    ) -> Result<()> {
        let count = to.len();
        ensure!(count > 0 && from.len() == count && lens.len() == count, "lists of one length");
        let to = to.as_mut_ptr();
        let from = from.as_mut_ptr();
        let lens = lens.as_mut_ptr();
        let mut attributes = Attributes { source_order: ORDER_ANY, ..Attributes::default() };
        // They are those of all copies from the first on.
        let mut first = 0_usize;
        let mut failed = 0_usize;
        let attributes = &raw mut attributes;
        let first = &raw mut first;
        let stream = stream.cu_stream();
        let code = match &self.0 {
            Form::V1(copy) => {
                // SAFETY: the lists are that long, and the caller promises what they point to.
                unsafe {
                    copy(to, from, lens, count, attributes, first, 1, &raw mut failed, stream)
                }
            }
            Form::V2(copy) => {
                // SAFETY: as above.
                unsafe { copy(to, from, lens, count, attributes, first, 1, stream) }
            }
        };
        ensure!(code == 0, "a batch of {count} copies: error {code}");
        Ok(())
    }
}
