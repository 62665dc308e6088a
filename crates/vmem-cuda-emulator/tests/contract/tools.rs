//! What the tests have in common: a context, memory, copies, kernels.
//!
//! Invariant: what a test takes here it has alone. Called by the tests.

use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

pub(crate) const MIB: usize = 1 << 20;

/// The names of the kernels; their code does not matter here.
const PTX: &str = ".entry vmem_fill( .entry vmem_add( .entry vmem_copy( .entry unknown_kernel(";

pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, DriverError>) -> i32 {
    result.map_or_else(|DriverError(code)| code as i32, |_| 0)
}

pub(crate) fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: no slice is used by two streams here without an order that the test makes.
    unsafe { context.disable_event_tracking() };
    context
}

pub(crate) fn until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not come");
        std::thread::yield_now();
    }
}

pub(crate) fn alloc(bytes: usize) -> u64 {
    // SAFETY: plain bytes.
    unsafe { result::malloc_sync(bytes) }.unwrap()
}

pub(crate) fn free(pointer: u64) {
    // SAFETY: each test frees what it allocated, once.
    unsafe { result::free_sync(pointer) }.unwrap();
}

/// Registered memory, for the length of a test.
pub(crate) struct Registered(pub(crate) Vec<u8>);

impl Registered {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let mut bytes = bytes;
        // SAFETY: the vector lives until it is unregistered, and does not move.
        unsafe { sys::cuMemHostRegister_v2(bytes.as_mut_ptr().cast(), bytes.len(), 1) }
            .result()
            .unwrap();
        Registered(bytes)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: it was registered.
        let _ = unsafe { sys::cuMemHostUnregister(self.0.as_mut_ptr().cast()) }.result();
    }
}

pub(crate) fn up(to: u64, bytes: &[u8], stream: &CudaStream) -> i32 {
    // SAFETY: the tests keep what they copy until it has been copied, or mean to break that.
    code(unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) })
}

pub(crate) fn down(to: &mut [u8], from: u64, stream: &CudaStream) -> i32 {
    // SAFETY: as above.
    code(unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) })
}

/// Launches a kernel that changes a range.
pub(crate) fn launch(name: &str, pointer: u64, len: u64, value: u8, stream: &CudaStream) -> i32 {
    let text = CString::new(PTX).unwrap();
    // SAFETY: a text that ends.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap();
    // SAFETY: the module was loaded just now, and stays.
    let function =
        match unsafe { result::module::get_function(module, CString::new(name).unwrap()) } {
            Ok(function) => function,
            Err(error) => return code::<()>(Err(error)),
        };
    let mut pointer = pointer;
    let mut len = len;
    let mut value = value;
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut pointer).cast(), (&raw mut len).cast(), (&raw mut value).cast()];
    let grid = (1, 1, 1);
    let block = (32, 1, 1);
    // SAFETY: the arguments are those that the kernels take.
    code(unsafe {
        result::launch_kernel(function, grid, block, 0, stream.cu_stream(), &mut arguments)
    })
}
