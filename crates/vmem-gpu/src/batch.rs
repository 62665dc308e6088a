//! The driver's copies of many pieces in one call, where it has that.
//!
//! Invariant: what it is given stays until the stream has come this far: so the driver may read its
//! sources at any time. Called by the copy streams.

#![allow(unsafe_code)]

use std::ffi::c_uint;

use cudarc::driver::{DriverError, sys};

/// `cuMemcpyBatchAsync` as drivers have had it since 12.8: looked up here, since a cudarc that was
/// built for a newer one has it with other arguments.
type CopyMany = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;

/// How the copies of a batch are ordered, with two hints that are not given.
#[repr(C)]
#[derive(Debug)]
struct Attributes {
    source_order: c_uint,
    source: [c_uint; 2],
    target: [c_uint; 2],
    flags: c_uint,
}

/// Sources may be read at any time from the call on.
const ORDER_ANY: c_uint = 3;

/// The function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batches(CopyMany);

/// Copies of one call.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    to: Vec<u64>,
    from: Vec<u64>,
    lens: Vec<usize>,
}

impl Listed {
    pub(crate) fn push(&mut self, to: u64, from: u64, len: usize) {
        self.to.push(to);
        self.from.push(from);
        self.lens.push(len);
    }
}

impl Batches {
    /// None where the driver lacks it.
    pub(crate) fn find() -> Option<Self> {
        let library = crate::probe::loaded()?;
        // SAFETY: its type is that of the symbol of this version.
        let found = unsafe { library.get::<CopyMany>(b"cuMemcpyBatchAsync\0") }.ok().map(|f| *f);
        // For the life of the process, as the driver itself.
        std::mem::forget(library);
        found.map(Batches)
    }

    /// Queues copies on a stream, in no order among each other.
    ///
    /// # Errors
    ///
    /// What the driver says: some may have been queued.
    ///
    /// # Safety
    ///
    /// All that is read and written stays until the stream has come this far, is reached by the
    /// device, and is written by nothing else meanwhile. No length is 0.
    pub(crate) unsafe fn copy(
        self,
        mut listed: Listed,
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let count = listed.to.len();
        assert!(listed.from.len() == count && listed.lens.len() == count, "lists of one length");
        let mut attributes =
            Attributes { source_order: ORDER_ANY, source: [0; 2], target: [0; 2], flags: 0 };
        // They are those of all copies from the first on.
        let mut first = 0_usize;
        let mut failed = 0_usize;
        let to = listed.to.as_mut_ptr();
        let from = listed.from.as_mut_ptr();
        let lens = listed.lens.as_mut_ptr();
        let attributes = &raw mut attributes;
        let first = &raw mut first;
        let failed = &raw mut failed;
        // SAFETY: the lists are that long, and what they lead to is promised to stay.
        let code = unsafe { self.0(to, from, lens, count, attributes, first, 1, failed, stream) };
        code.result()
    }
}
