//! A kernel that copies many small pieces at once.
//!
//! A copy engine takes a few microseconds for each copy, however small; a kernel reads and writes
//! memory of the host at the rate of the link. It takes some multiprocessors for that time.
//!
//! Invariant: a table is the kernel's from its launch until that has ended: its owner gives it back
//! only then. Called by the copy streams.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use parking_lot::Mutex;

use crate::card::told;

/// The kernel, for any card.
const KERNEL: &str = include_str!("pieces.ptx");
/// Blocks at most, and threads of each: enough for the link, few of what a card has.
const BLOCKS_MAX: usize = 64;
const THREADS: u32 = 256;
/// Copies at most that one launch makes.
pub(crate) const PIECES_MAX: usize = 512;
/// Launches at most that are under way, and how many of them only the tier's own streams may have.
const TABLES: usize = 88;
const TABLES_OF_LANES: usize = 24;

/// One copy, as the kernel finds it in its table. Both addresses are equal modulo [`ALIGNED`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) len: u64,
}

/// What the kernel moves at a time, in bytes.
pub(crate) const ALIGNED: u64 = 16;

/// The kernel, with the tables that are not in use.
#[derive(Debug)]
pub(crate) struct Pieces {
    function: sys::CUfunction,
    module: sys::CUmodule,
    /// Memory of the host that the driver allocated: [`TABLES`] times [`PIECES_MAX`] pieces.
    memory: *mut Piece,
    free: Arc<Mutex<Vec<usize>>>,
}

// SAFETY: what the driver gave is good on every thread that has the context; a table has one owner
// at a time.
unsafe impl Send for Pieces {}
// SAFETY: as above.
unsafe impl Sync for Pieces {}

/// A table in use. It goes back when it is dropped: only once the kernel has ended.
#[derive(Debug)]
pub(crate) struct Table {
    nth: usize,
    home: Arc<Mutex<Vec<usize>>>,
}

impl Drop for Table {
    fn drop(&mut self) {
        self.home.lock().push(self.nth);
    }
}

/// Whether registered memory has the same address for the device.
///
/// # Errors
///
/// `CUDA_ERROR_NOT_SUPPORTED` if it has not; what the driver says.
fn is_addressed_alike(ordinal: usize) -> Result<(), DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let alike = Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: a device of the driver.
    match unsafe { result::device::get_attribute(device, alike) }? {
        0 => Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_SUPPORTED)),
        _ => Ok(()),
    }
}

impl Pieces {
    /// On a thread that is bound to the context. None where the driver does not take the kernel, or
    /// the device knows memory of the host by other addresses.
    pub(crate) fn load(context: &Arc<CudaContext>) -> Option<Self> {
        let alike = is_addressed_alike(context.ordinal());
        match alike.and_then(|()| Self::try_load(context)) {
            Ok(pieces) => Some(pieces),
            Err(error) => {
                let error = told("loading the kernel for small copies", error);
                tracing::debug!(target: "vmem::gpu", %error, "small copies are made one by one");
                None
            }
        }
    }

    fn try_load(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let invalid = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        let text = CString::new(KERNEL).map_err(|_| invalid)?;
        // SAFETY: a text that ends with a zero.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) }?;
        let null = std::ptr::null_mut();
        let free = Arc::new(Mutex::new((0..TABLES).collect()));
        let mut pieces = Pieces { function: std::ptr::null_mut(), module, memory: null, free };
        let bytes = TABLES * PIECES_MAX * size_of::<Piece>();
        // SAFETY: the module was loaded just now.
        let function = unsafe { result::module::get_function(module, c"vmem_pieces".into()) };
        let loaded = function.and_then(|function| {
            // SAFETY: `unload` frees it.
            let memory = unsafe { result::malloc_host(bytes, 0) }?;
            Ok((function, memory))
        });
        let tried = loaded.and_then(|(function, memory)| {
            pieces.function = function;
            pieces.memory = memory.cast();
            pieces.try_out(context)
        });
        match tried {
            Ok(()) => Ok(pieces),
            Err(error) => pieces.unload().and(Err(error)),
        }
    }

    /// Launches the kernel once, with nothing to copy: the first launch may wait for whatever the
    /// device does then.
    fn try_out(&self, context: &Arc<CudaContext>) -> Result<(), DriverError> {
        let not_ready = DriverError(sys::CUresult::CUDA_ERROR_NOT_READY);
        let stream = context.new_stream()?;
        let table = self.table(true).ok_or(not_ready)?;
        // SAFETY: it copies nothing.
        unsafe { self.launch(&table, &[], &stream) }?;
        let ended = stream.synchronize();
        if ended.is_err() {
            // The kernel may run yet: so nothing of it is given back.
            std::mem::forget(table);
        }
        ended
    }

    /// Gives everything back to the driver, which waits for kernels. In the context.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn unload(self) -> Result<(), DriverError> {
        if self.free.lock().len() < TABLES {
            // A kernel whose end is not known may have one, and run.
            return Ok(());
        }
        if !self.memory.is_null() {
            // SAFETY: it was allocated once, and no kernel has a part of it.
            unsafe { result::free_host(self.memory.cast()) }?;
        }
        // SAFETY: it was loaded once, and no kernel of it runs.
        unsafe { result::module::unload(self.module) }
    }

    /// A table for one launch; none if all are in use. Those of lanes are kept back from others:
    /// work behind a kernel of a user may keep its table for long.
    pub(crate) fn table(&self, is_of_tier: bool) -> Option<Table> {
        let mut free = self.free.lock();
        let reserve = if is_of_tier { 0 } else { TABLES_OF_LANES };
        let nth = if free.len() > reserve { free.pop() } else { None };
        drop(free);
        nth.map(|nth| Table { nth, home: self.free.clone() })
    }

    /// Queues the copies on a stream, in no order among each other. The table is to be kept until
    /// they have ended.
    ///
    /// # Errors
    ///
    /// What the driver says: then none is made.
    ///
    /// # Safety
    ///
    /// All that is read and written stays until the stream has come this far, is reached by the
    /// device, and is written by nothing else meanwhile.
    pub(crate) unsafe fn launch(
        &self,
        table: &Table,
        pieces: &[Piece],
        stream: &CudaStream,
    ) -> Result<(), DriverError> {
        assert!(pieces.len() <= PIECES_MAX, "the pieces fit their table");
        assert!(Arc::ptr_eq(&table.home, &self.free), "a table of this kernel");
        // SAFETY: the table is one of those in the memory, has that many, and nobody else has it.
        let memory = unsafe { self.memory.add(table.nth * PIECES_MAX) };
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(pieces.as_ptr(), memory, pieces.len()) };
        let mut address = memory.expose_provenance() as u64;
        let mut count = pieces.len() as u64;
        let mut parameters = [(&raw mut address).cast(), (&raw mut count).cast()];
        let grid = (pieces.len().clamp(1, BLOCKS_MAX) as u32, 1, 1);
        let block = (THREADS, 1, 1);
        // SAFETY: the arguments are those of the kernel; what they lead to is promised to stay, and
        // the table is the caller's.
        unsafe {
            result::launch_kernel(
                self.function,
                grid,
                block,
                0,
                stream.cu_stream(),
                &mut parameters,
            )
        }
    }
}
