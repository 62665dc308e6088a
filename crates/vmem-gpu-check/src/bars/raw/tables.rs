//! The tier's own kernel for small copies, launched by hand.
//!
//! Invariant: its tables are this type's until its kernels were waited for. Called by the bars.

#![allow(unsafe_code)]

use std::ffi::{CString, c_void};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaStream, result, sys};

use crate::user::{Pinned, User};

/// The kernel, as the tier has it, and how that launches it: pieces of a launch, blocks at most,
/// threads of each.
const KERNEL: &str = include_str!("../../../../vmem-gpu/src/pieces.ptx");
const PIECES_MAX: usize = 512;
const BLOCKS_MAX: usize = 64;
const THREADS: u32 = 256;
/// Of an entry of a table: where to, where from, how many bytes.
const ENTRY_BYTES: usize = 24;

/// Copies of one list, for the kernel.
pub(in crate::bars) struct Tables {
    function: sys::CUfunction,
    tables: Pinned,
    count: usize,
}

impl Tables {
    /// For these copies: the addresses to which and from which, and the length in bytes.
    pub(super) fn new(user: &User, copies: &[(u64, u64, usize)]) -> Result<Self> {
        ensure!(!copies.is_empty(), "a list of copies");
        let text = CString::new(KERNEL)?;
        user.context.bind_to_thread()?;
        // SAFETY: a text that ends with a zero.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) };
        let module = module.context("loading the kernel for small copies")?;
        // SAFETY: the module was loaded just now, and is never unloaded.
        let function = unsafe { result::module::get_function(module, c"vmem_pieces".into()) };
        let function = function.context("finding the kernel for small copies")?;
        let mut tables = user.pinned(copies.len() * ENTRY_BYTES)?;
        let entries = tables.bytes_mut().chunks_exact_mut(ENTRY_BYTES);
        for (entry, &(to, from, len)) in entries.zip(copies) {
            ensure!(to % 16 == from % 16, "addresses that are equal modulo 16");
            entry[..8].copy_from_slice(&to.to_ne_bytes());
            entry[8..16].copy_from_slice(&from.to_ne_bytes());
            entry[16..].copy_from_slice(&(len as u64).to_ne_bytes());
        }
        Ok(Tables { function, tables, count: copies.len() })
    }

    /// Queues all copies, by as many launches as the tier would make.
    ///
    /// # Safety
    ///
    /// What is read and written stays until the stream was waited for, and so does this.
    pub(super) unsafe fn launch(&self, stream: &CudaStream) -> Result<()> {
        for first in (0..self.count).step_by(PIECES_MAX) {
            let mut count = (self.count - first).min(PIECES_MAX) as u64;
            let table = self.tables.address().wrapping_add(first * ENTRY_BYTES);
            let mut address = table.expose_provenance() as u64;
            let mut parameters: [*mut c_void; 2] =
                [(&raw mut address).cast(), (&raw mut count).cast()];
            let grid = ((count as usize).min(BLOCKS_MAX) as u32, 1, 1);
            let block = (THREADS, 1, 1);
            let stream = stream.cu_stream();
            // SAFETY: the arguments are those of the kernel; the caller promises the rest.
            let launched = unsafe {
                result::launch_kernel(self.function, grid, block, 0, stream, &mut parameters)
            };
            launched.context("launching the kernel for small copies")?;
        }
        Ok(())
    }
}
