//! Streams that other libraries own.
//!
//! Invariant: a stream that is adopted belongs to the context in which it is used, and is never
//! destroyed here. Called by users.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, sys};
use vmem_core::VirtualMemoryError;

use crate::card::failed;
use crate::context::enter;

/// A stream of another library in this process, by its handle, for leases and gathers.
///
/// Dropping it destroys nothing. The handle is a `cudaStream_t` or `CUstream`, which are the same:
/// in PyTorch `torch.cuda.current_stream().cuda_stream`. The two handles of the default stream, 0
/// (PyTorch's, unless another stream was chosen) and 1, are the default stream of `context`. It
/// takes turns with all streams that were not created as non-blocking, so leases on it may end
/// later than their kernels.
///
/// Adopt a stream once and keep it; `context` is that of its device, as `CudaContext::new` opens
/// it.
///
/// ```no_run
/// # use vmem::gpu::{adopt_stream, VramExt};
/// # use vmem::gpu::cudarc::driver::{CudaContext, sys};
/// # async fn run(
/// #     vmem: vmem::VirtualMemory,
/// #     rows: vmem::VMemHandle,
/// #     cuda_stream: usize,
/// # ) -> Result<(), Box<dyn std::error::Error>> {
/// let context = CudaContext::new(0)?;
/// let handle: sys::CUstream = std::ptr::without_provenance_mut(cuda_stream);
/// // SAFETY: PyTorch's streams live as long as the process.
/// let stream = unsafe { adopt_stream(&context, handle)? };
/// let lease = vmem.device_on(&rows, &stream).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Safety
///
/// The stream is alive until the last clone of what this returns is gone. A lease, a set and a
/// target have one, and so has vmem after their end, until what they used has ended:
/// [`Arc::strong_count`] says when yours is the last. Streams of PyTorch's pools and its default
/// stream are never destroyed. A library whose 0 means each thread's own default stream (one that
/// was compiled so) must not give 0 or 1 here.
///
/// Where the context has made no stream of its own, cudarc orders nothing between adopted streams:
/// then order them yourself wherever two of them use one slice, its drop included. Make one stream
/// of the context first, and cudarc does it.
///
/// # Errors
///
/// `InvalidConfig` for a stream of another context than `context`, and for handle 2: it is another
/// stream on each thread, and a future may move between threads. `Device` if the driver refuses.
pub unsafe fn adopt_stream(
    context: &Arc<CudaContext>,
    stream: sys::CUstream,
) -> Result<Arc<CudaStream>, VirtualMemoryError> {
    let invalid = |reason: &str| Err(VirtualMemoryError::invalid_config("stream", reason));
    match stream.addr() {
        0 | 1 => return Ok(context.default_stream()),
        2 => return invalid("it is another one on each thread"),
        _ => {}
    }
    let mut its_own = std::ptr::null_mut();
    let asked = enter(context, || {
        // SAFETY: the caller says that it is alive; the argument is a place for its context.
        unsafe { sys::cuStreamGetCtx(stream, &mut its_own) }.result()
    });
    let asked = asked.and_then(|asked| asked);
    asked.map_err(|error| failed("asking a stream for its context", error).public())?;
    if its_own != context.cu_ctx() {
        return invalid("it belongs to another context than the one that was given");
    }
    // SAFETY: as the caller says, it lives for as long as the wrapper.
    Ok(unsafe { context.wrap_borrowed_stream(stream) })
}
