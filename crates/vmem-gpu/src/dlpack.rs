//! Tensors of DLPack, which PyTorch, JAX, CuPy and others give and take without a copy: a lease as
//! a tensor for them, and one of theirs as the buffer of gathers and scatters.
//!
//! Invariant: the lease lives until the consumer has called the deleter of its tensor, on any
//! thread, and ends with that call; a tensor that was not handed out ends it when it is dropped.
//! Called by users.
//!
//! # Order of streams
//!
//! The bytes are on the device before the lease is granted, so any stream may use them at once.
//! Only the end needs an order: the deleter ends the lease as its drop does, behind all that is
//! queued *on the stream of the lease* by then. Take the lease on the stream on which the tensor is
//! used ([`adopt_stream`](crate::adopt_stream)), or make the stream of the lease wait for that one
//! before the deleter is called. In PyTorch:
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
//! # Tensors that are read, and tensors that are written
//!
//! That of a [`DeviceLease`] is read only, as the lease is: other leases read the same bytes. The
//! versioned form says so to its consumer, the other has no place for it: a consumer of that must
//! not write.
//!
//! That of a [`DeviceLeaseMut`] may be written, in either form. Its deleter publishes what was
//! written, as the drop of the lease does, once that has ended; how it went is seen by the next
//! read. [`touched`](DeviceLeaseMut::touched) counts if it was said before. A tensor that was not
//! handed out gives the change up, and so does a deleter that is called while its thread unwinds
//! from a panic of Rust's: half of a change is no version. An exception of Python is none, so the
//! deleter publishes then. To have the choice, keep the lease instead of the tensor, and give the
//! consumer its address.
//!
//! # Targets
//!
//! [`DeviceTarget::from_dlpack`](crate::DeviceTarget::from_dlpack) takes a tensor of another
//! library over. So no future that is dropped and no order of drops gives its memory back under a
//! copy: the deleter is called once the target was dropped and the last copy has ended.

#![allow(unsafe_code)]

mod elements;
mod taken;

use std::ptr;
use std::sync::Arc;

use cudarc::driver::CudaStream;
pub use dlpack_rs::ffi::{
    DLDataType, DLDataTypeCode, DLDevice, DLManagedTensor, DLManagedTensorVersioned,
    DLPACK_FLAG_BITMASK_READ_ONLY, DLPackVersion, DLTensor,
};
use dlpack_rs::safe::{self, TensorInfo};
use vmem_core::VirtualMemoryError;

use self::elements::Elements;
use crate::lease::{DeviceLease, DeviceLeaseMut};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// A lease as a tensor: one dimension, unsigned, 8 bits, unless [`view_as`](Self::view_as) says
/// what the bytes are.
///
/// ```no_run
/// # use vmem::gpu::VramExt;
/// use vmem_gpu::dlpack::{DLDataTypeCode, dtype};
///
/// # async fn run(
/// #     vmem: vmem::VirtualMemory,
/// #     rows: vmem::VMemHandle,
/// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
/// # ) -> Result<(), vmem::VirtualMemoryError> {
/// let mut tensor = vmem.device_on(&rows, &stream).await?.into_dlpack();
/// tensor.view_as(dtype(DLDataTypeCode::kDLBfloat, 16), &[512, 4096])?;
/// let raw = tensor.into_raw(); // into a PyCapsule with the name "dltensor"
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DlPackTensor<L = DeviceLease> {
    lease: L,
    elements: Elements,
}

impl DeviceLease {
    /// The lease as a tensor for other libraries in this process, which read it.
    pub fn into_dlpack(self) -> DlPackTensor {
        DlPackTensor::new(self)
    }
}

impl DeviceLeaseMut {
    /// The lease as a tensor for other libraries in this process, which may write to it. What they
    /// wrote is published when the deleter is called: see [`dlpack`](crate::dlpack).
    ///
    /// ```no_run
    /// # use vmem::gpu::VramExt;
    /// # async fn run(
    /// #     vmem: vmem::VirtualMemory,
    /// #     weights: vmem::VMemHandle,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// let tensor = vmem.device_mut_on(&weights, &stream).await?.into_dlpack();
    /// let raw = tensor.into_raw_versioned(); // "dltensor_versioned", not read only
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_dlpack(self) -> DlPackTensor<DeviceLeaseMut> {
        DlPackTensor::new(self)
    }
}

/// A type of elements, for [`view_as`](DlPackTensor::view_as): of `bits` bits each, one lane.
pub const fn dtype(code: DLDataTypeCode::Type, bits: u8) -> DLDataType {
    DLDataType { code: code as u8, bits, lanes: 1 }
}

impl<L: sealed::Lease> DlPackTensor<L> {
    fn new(lease: L) -> Self {
        let elements = Elements::bytes(lease.len());
        DlPackTensor { lease, elements }
    }

    /// Says what the bytes are: elements of this type, in this shape, the last dimension innermost.
    /// After an error it is what it was.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` unless such a tensor has as many bytes as the lease, or if an element is not
    /// whole bytes.
    pub fn view_as(&mut self, dtype: DLDataType, shape: &[usize]) -> Result<()> {
        self.elements = Elements::new(dtype, shape, self.len())?;
        Ok(())
    }

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
        let (lease, info) = self.into_parts();
        safe::pack(sent(lease), info)
    }

    /// Hands it to a consumer of the form of DLPack 1, "dltensor_versioned", which learns whether
    /// the tensor is read only. The owner of the pointer calls its deleter once, on any thread, or
    /// the object stays pinned for good.
    #[must_use = "the lease ends with its deleter only"]
    pub fn into_raw_versioned(self) -> *mut DLManagedTensorVersioned {
        let (lease, info) = self.into_parts();
        safe::pack_versioned(sent(lease), info, L::FLAGS)
    }

    /// Gives the lease back.
    pub fn into_lease(self) -> L {
        self.lease
    }

    fn into_parts(self) -> (L, TensorInfo) {
        let DlPackTensor { lease, elements } = self;
        // Device memory: nothing here ever follows it.
        let data = ptr::without_provenance_mut(lease.address() as usize);
        // The driver counts devices in an `i32`.
        let device = safe::cuda_device(lease.ordinal() as i32);
        let Elements { dtype, shape, strides } = elements;
        // Newer readers count on strides, with one dimension too.
        (lease, TensorInfo::strided(data, device, dtype, shape, strides))
    }
}

/// The deleter may be called on any thread, which the packing does not ask for.
fn sent<T: Send>(lease: T) -> T {
    lease
}

mod sealed {
    //! The leases that a tensor can have.

    use super::*;

    /// A lease, of either kind.
    pub trait Lease: Send + 'static {
        /// What the versioned form says of it.
        const FLAGS: u64;
        fn stream(&self) -> &Arc<CudaStream>;
        fn len(&self) -> usize;
        fn ordinal(&self) -> usize;
        /// Where it is, for a consumer that keeps to the order of the page above.
        fn address(&self) -> u64;
    }

    impl Lease for DeviceLease {
        const FLAGS: u64 = DLPACK_FLAG_BITMASK_READ_ONLY;

        fn stream(&self) -> &Arc<CudaStream> {
            self.stream()
        }

        fn len(&self) -> usize {
            self.len()
        }

        fn ordinal(&self) -> usize {
            self.ordinal()
        }

        fn address(&self) -> u64 {
            // SAFETY: it is read only, and in the order that the page above asks of the consumer.
            unsafe { self.device_ptr() }
        }
    }

    impl Lease for DeviceLeaseMut {
        const FLAGS: u64 = 0;

        fn stream(&self) -> &Arc<CudaStream> {
            self.stream()
        }

        fn len(&self) -> usize {
            self.len()
        }

        fn ordinal(&self) -> usize {
            self.ordinal()
        }

        fn address(&self) -> u64 {
            // SAFETY: it is used in the order that the page above asks of the consumer.
            unsafe { self.device_ptr() }
        }
    }
}
