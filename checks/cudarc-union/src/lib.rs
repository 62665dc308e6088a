//! vmem-gpu beside what others ask of cudarc. Compiles, or does not; nothing in it is ever run.
//!
//! Invariant: there is one cudarc here, so that a stream of others is one of ours. Called by
//! `.ci/run`.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use vmem_core::VirtualMemory;
use vmem_gpu::{DeviceSetRequest, VramExt};

/// What only others turn on: without it this would check nothing new.
#[cfg(feature = "candle")]
pub use cudarc::cublaslt::CudaBlasLT;
#[cfg(feature = "cubecl")]
pub use cudarc::nccl::Comm;

/// Objects for kernels on a stream that another crate has made.
pub fn objects_on(vmem: &VirtualMemory, stream: &Arc<CudaStream>) -> DeviceSetRequest {
    vmem.device_set(stream)
}
