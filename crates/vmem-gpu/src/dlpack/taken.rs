//! Tensors of other libraries as buffers of gathers and scatters.
//!
//! Invariant: a tensor that was taken over has its deleter called once, when no copy uses its
//! memory any more; one that was refused stays its caller's. Called by users.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::CudaStream;
use dlpack_rs::ffi::DLDeviceType;

use super::elements::{bytes_of, invalid, row_major};
use super::{
    DLManagedTensor, DLManagedTensorVersioned, DLPACK_FLAG_BITMASK_READ_ONLY, DLTensor, Result,
};
use crate::owner::Owner;
use crate::target::DeviceTarget;

/// The form of DLPack that is understood.
const MAJOR: u32 = 1;

impl DeviceTarget<'static> {
    /// The memory of another library's tensor, in the order of `stream`. It takes the tensor over.
    ///
    /// Its deleter is called once, after this was dropped and after the last copy of its calls has
    /// ended, also of calls that failed or were dropped: by the drop of this, or else on a thread
    /// for that. So the memory is never given back under a copy. Work of other libraries is theirs
    /// to keep it for: PyTorch does so by the tensors that it keeps.
    ///
    /// Offsets of pieces count bytes from the first element.
    ///
    /// ```no_run
    /// # use vmem_gpu::dlpack::DLManagedTensor;
    /// # use vmem::gpu::{DeviceTarget, VramExt};
    /// # async fn run(
    /// #     vmem: vmem::VirtualMemory,
    /// #     rows: vmem::VMemHandle,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// #     tensor: *mut DLManagedTensor,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// // From the capsule of `__dlpack__(stream=..)`, which is renamed "used_dltensor" then.
    /// // SAFETY: nothing else writes to the tensor until the gather has ended.
    /// let target = unsafe { DeviceTarget::from_dlpack(tensor, &stream)? };
    /// vmem.gather(&[(&rows, 0..4096, 0)], &target).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Safety
    ///
    /// The pointer is null or that of a tensor that nobody has taken, with what its fields say; its
    /// deleter may be called on any thread, which PyTorch's, JAX's and CuPy's allow. What the other
    /// library has queued over the memory comes before what `stream` has now; from here on the
    /// memory has no other user until the calls that are given this target have ended. After a call
    /// that failed or was dropped only work that is queued on `stream` from then on, or ordered
    /// after it, may use it.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` if it is null, not on the CUDA device of `stream`, not contiguous with its
    /// last dimension innermost, or if its numbers do not fit each other. Then the tensor stays the
    /// caller's.
    pub unsafe fn from_dlpack(
        tensor: *mut DLManagedTensor,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        // SAFETY: the caller says that it is null or alive.
        let managed = unsafe { tensor.as_ref() }.ok_or_else(null)?;
        // SAFETY: the caller says that the fields are right.
        let memory = unsafe { Memory::of(&managed.dl_tensor, stream) }?;
        let taken = Taken { tensor, delete: managed.deleter };
        // SAFETY: as the caller says; the owner keeps the memory until the last copy has ended.
        Ok(unsafe { memory.target(stream, taken) })
    }

    /// As [`from_dlpack`](Self::from_dlpack), for the form of DLPack 1, "dltensor_versioned".
    ///
    /// # Safety
    ///
    /// As [`from_dlpack`](Self::from_dlpack).
    ///
    /// # Errors
    ///
    /// As [`from_dlpack`](Self::from_dlpack), and for another major version than 1, and for a
    /// tensor that is read only, although a scatter would only read it.
    pub unsafe fn from_dlpack_versioned(
        tensor: *mut DLManagedTensorVersioned,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        if tensor.is_null() {
            return Err(null());
        }
        // SAFETY: alive, as the caller says; every version begins with its number.
        let major = unsafe { (*tensor).version.major };
        if major != MAJOR {
            return Err(invalid(format!("of version {major} of DLPack, not {MAJOR}")));
        }
        // SAFETY: as above, and of this form.
        let managed = unsafe { &*tensor };
        if managed.flags & DLPACK_FLAG_BITMASK_READ_ONLY != 0 {
            return Err(invalid("it is read only".into()));
        }
        // SAFETY: the caller says that the fields are right.
        let memory = unsafe { Memory::of(&managed.dl_tensor, stream) }?;
        let taken = Taken { tensor, delete: managed.deleter };
        // SAFETY: as the caller says; the owner keeps the memory until the last copy has ended.
        Ok(unsafe { memory.target(stream, taken) })
    }
}

fn null() -> vmem_core::VirtualMemoryError {
    invalid("there is none".into())
}

/// A tensor that is ours.
struct Taken<T> {
    tensor: *mut T,
    /// None if there is nothing to be deleted.
    delete: Option<unsafe extern "C" fn(*mut T)>,
}

// SAFETY: its caller has said that its deleter may be called on any thread, and nothing else is
// done with it.
unsafe impl<T> Send for Taken<T> {}

impl<T> Drop for Taken<T> {
    fn drop(&mut self) {
        if let Some(delete) = self.delete {
            // SAFETY: it is ours, and this is the only call.
            unsafe { delete(self.tensor) };
        }
    }
}

/// Where a tensor is, checked.
struct Memory {
    address: u64,
    len: usize,
}

impl Memory {
    /// # Safety
    ///
    /// The shape and the strides are as long as the tensor has dimensions, or null.
    unsafe fn of(tensor: &DLTensor, stream: &CudaStream) -> Result<Self> {
        let DLTensor { data, device, ndim, dtype, shape, strides, byte_offset } = *tensor;
        let ordinal = stream.context().ordinal();
        let is_here = usize::try_from(device.device_id) == Ok(ordinal);
        if device.device_type != DLDeviceType::kDLCUDA || !is_here {
            let kind = device.device_type;
            let id = device.device_id;
            return Err(invalid(format!("on device {id} of kind {kind}, not on CUDA's {ordinal}")));
        }
        let count = usize::try_from(ndim).map_err(|_| invalid(format!("{ndim} dimensions")))?;
        // SAFETY: as the caller says.
        let lengths = unsafe { numbers(shape, count) };
        let lengths = lengths.ok_or_else(|| invalid("it has no shape".into()))?;
        let natural = |&length: &i64| usize::try_from(length);
        let shape = lengths.iter().map(natural).collect::<std::result::Result<Vec<_>, _>>();
        let shape = shape.map_err(|_| invalid(format!("a shape of {lengths:?}")))?;
        let len = bytes_of(dtype, &shape)?;
        // SAFETY: as the caller says.
        let steps = unsafe { numbers(strides, count) };
        if steps.is_some_and(|steps| len > 0 && !is_row_major(&shape, steps)) {
            return Err(invalid(format!("strides of {steps:?} in a shape of {shape:?}")));
        }
        let begin = (data.addr() as u64).checked_add(byte_offset);
        let begin = begin.filter(|begin| begin.checked_add(len as u64).is_some());
        match begin {
            Some(address) if len == 0 || !data.is_null() => Ok(Memory { address, len }),
            _ => Err(invalid(format!("{len} bytes from {byte_offset} on at {data:?}"))),
        }
    }

    /// # Safety
    ///
    /// As for `DeviceTarget::from_raw`, but that `owner` keeps the memory.
    unsafe fn target<T: 'static>(
        self,
        stream: &Arc<CudaStream>,
        owner: Taken<T>,
    ) -> DeviceTarget<'static> {
        // SAFETY: as the caller says.
        let target = unsafe { DeviceTarget::from_raw(self.address, self.len, stream) };
        target.kept_by(Owner::new(Box::new(owner)))
    }
}

/// None if there are none where some should be.
///
/// # Safety
///
/// The pointer is null, or there are as many.
unsafe fn numbers<'a>(pointer: *const i64, count: usize) -> Option<&'a [i64]> {
    if count == 0 {
        return Some(&[]);
    }
    if pointer.is_null() {
        return None;
    }
    // SAFETY: as the caller says; they live as long as the tensor, which is looked at at once.
    Some(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Whether elements lie one behind the other. The stride of a dimension of one has no meaning.
fn is_row_major(shape: &[usize], strides: &[i64]) -> bool {
    let expected = row_major(shape);
    let mut all = shape.iter().zip(strides).zip(expected);
    all.all(|((&length, &stride), expected)| length == 1 || stride == expected as i64)
}
