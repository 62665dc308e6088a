//! A lease as a tensor of DLPack, which PyTorch, JAX, CuPy and others take without a copy.
//!
//! Invariant: the lease lives until the consumer has called the deleter of its tensor, on any
//! thread, and ends with that call; a tensor that was not handed out ends it when it is dropped.
//! Called by users.
//!
//! # Order of streams
//!
//! The bytes are on the device before the lease is granted, so any stream may read them at once.
//! Only the end needs an order: the deleter ends the lease as its drop does, behind all that is
//! queued *on the stream of the lease* by then. Use the tensor on that stream, or make that stream
//! wait for yours before the deleter is called. In PyTorch:
//!
//! ```python
//! lease_stream = torch.cuda.ExternalStream(pointer_of_the_stream)  # `tensor.stream().cu_stream()`
//! rows = torch.utils.dlpack.from_dlpack(capsule)  # a PyCapsule with the name "dltensor"
//! with torch.cuda.stream(lease_stream):
//!     ...                                         # or elsewhere, and then:
//! lease_stream.wait_stream(torch.cuda.current_stream())
//! del rows                                        # calls the deleter
//! ```
//!
//! `record_stream` does not help: it is for memory of PyTorch's own allocator.
//!
//! The tensor is read only, as the lease is: other leases read the same bytes. The versioned form
//! says so to its consumer, the other has no place for it.

#![allow(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use cudarc::driver::CudaStream;
pub use dlpack_rs::ffi::{
    DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPACK_FLAG_BITMASK_READ_ONLY,
    DLPackVersion, DLTensor,
};
use dlpack_rs::safe::{self, TensorInfo};

use crate::lease::DeviceLease;

/// The bytes of a lease as a tensor: one dimension, unsigned, 8 bits. The consumer views them as
/// what they are.
///
/// ```no_run
/// # use vmem::gpu::VramExt;
/// # async fn run(
/// #     vmem: vmem::VirtualMemory,
/// #     rows: vmem::VMemHandle,
/// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
/// # ) -> Result<(), vmem::VirtualMemoryError> {
/// let tensor = vmem.device_on(&rows, &stream).await?.into_dlpack();
/// let raw = tensor.into_raw(); // into a PyCapsule with the name "dltensor"
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DlPackTensor {
    lease: DeviceLease,
}

impl DeviceLease {
    /// The lease as a tensor for other libraries in this process.
    pub fn into_dlpack(self) -> DlPackTensor {
        DlPackTensor { lease: self }
    }
}

impl DlPackTensor {
    /// The stream on which the tensor is used, or which waits for those on which it was.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.lease.stream()
    }

    /// The length, in bytes.
    pub fn len(&self) -> usize {
        self.lease.len()
    }

    /// Whether the tensor has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hands it to a consumer of the first form, "dltensor". The owner of the pointer calls its
    /// deleter once, on any thread, or the object stays pinned for good.
    #[must_use = "the lease ends with its deleter only"]
    pub fn into_raw(self) -> *mut DLManagedTensor {
        let info = self.info();
        safe::pack(sent(self.lease), info)
    }

    /// Hands it to a consumer of the form of DLPack 1, "dltensor_versioned", which learns that the
    /// tensor is read only. The owner of the pointer calls its deleter once, on any thread, or the
    /// object stays pinned for good.
    #[must_use = "the lease ends with its deleter only"]
    pub fn into_raw_versioned(self) -> *mut DLManagedTensorVersioned {
        let info = self.info();
        safe::pack_versioned(sent(self.lease), info, DLPACK_FLAG_BITMASK_READ_ONLY)
    }

    /// Gives the lease back.
    pub fn into_lease(self) -> DeviceLease {
        self.lease
    }

    fn info(&self) -> TensorInfo {
        // SAFETY: it is read only, and in the order that the page above asks of the consumer.
        let address = unsafe { self.lease.device_ptr() };
        // Device memory: nothing here ever follows it.
        let data = ptr::without_provenance_mut(address as usize);
        // The driver counts devices in an `i32`.
        let device = safe::cuda_device(self.lease.ordinal() as i32);
        // Newer readers count on strides, with one dimension too. A length fits: it is that of
        // memory.
        TensorInfo::strided(data, device, safe::dtype_u8(), vec![self.len() as i64], vec![1])
    }
}

/// The deleter may be called on any thread, which the packing does not ask for.
fn sent<T: Send>(lease: T) -> T {
    lease
}
