//! The calls of users: objects for kernels, and parts of objects in device buffers of theirs.
//!
//! Invariant: a future of these holds nothing that is shared and counted between polls (the tasks
//! of `vmem-core` hold it). Called by users.

use std::any::Any;
use std::future::Future;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError};
use vmem_core::backend::DeviceAccess;
use vmem_core::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::card::{Card, failed};
use crate::event::{is_capturing, is_per_thread};
use crate::gather::{self, Gathered};
use crate::lease::{DeviceLease, DeviceLeaseMut, Scratch};
use crate::order::follow;
use crate::scatter::{self, Scattered};
use crate::set::DeviceSetRequest;
use crate::target::DeviceTarget;
use crate::tier::CudaTier;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Objects for kernels.
///
/// ```no_run
/// use cudarc::driver::CudaContext;
/// use vmem::gpu::VramExt;
/// use vmem::{MemoryTier, VirtualMemoryConfig};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let vmem = vmem::open(VirtualMemoryConfig::default()).await?;
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let weights = vmem.put(vec![1; 1 << 20], MemoryTier::Host).await?;
///
/// let lease = vmem.device_on(&weights, &stream).await?;
/// lease.scope(|view| { /* launch a kernel on `stream` that reads `view` */ });
/// drop(lease); // the kernel may still run: its memory stays until it has ended
/// # vmem.close().await?;
/// # Ok(())
/// # }
/// ```
pub trait VramExt {
    /// The object in device memory, for kernels on `stream` that read it.
    ///
    /// It is pinned there until the lease is dropped, and its memory is kept until what was queued
    /// by then has ended; what is written to the object meanwhile is another version.
    ///
    /// # Errors
    ///
    /// Those of a `pin` in VRAM; `InvalidConfig` for a stream of another context, of each thread's
    /// own, or on which a graph is being captured.
    fn device_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLease>> + Send;

    /// The object in device memory, for kernels on `stream` that change it, alone.
    ///
    /// Waits until other leases were dropped, and comes after what they have queued, in the order
    /// of the streams. What the kernels wrote is the current version once they have ended and,
    /// where the store [writes back eagerly](vmem_core::WriteBack::Eager), it was copied down,
    /// which the next lease waits for; a read that comes after the drop waits for that too, and
    /// where other leases came behind this one before its kernels had ended, for these.
    ///
    /// # Errors
    ///
    /// As [`device_on`](Self::device_on), and those of making space in host memory for the new
    /// version.
    fn device_mut_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLeaseMut>> + Send;

    /// As [`device_mut_on`](Self::device_mut_on), for kernels that write all of it.
    ///
    /// The bytes before are not loaded, it begins as zeros.
    ///
    /// # Errors
    ///
    /// As [`device_mut_on`](Self::device_mut_on).
    fn device_overwrite_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLeaseMut>> + Send;

    /// Device memory of `len` bytes for kernels on `stream`, which is no object's and begins as
    /// zeros. It counts as leased, and is free once it was dropped and what was queued by then has
    /// ended; nothing of it is copied down.
    ///
    /// ```no_run
    /// # use vmem::gpu::VramExt;
    /// # async fn step(
    /// #     vmem: vmem::VirtualMemory,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// let activations = vmem.allocate_scratch(64 << 20, &stream).await?;
    /// // ... kernels on `stream` use `activations.view()` ...
    /// drop(activations);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` if the tier, or what leases may hold of it, is smaller; else as
    /// [`device_on`](Self::device_on).
    fn allocate_scratch(
        &self,
        len: usize,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<Scratch>> + Send;

    /// Copies parts of objects, from whichever tier has them, into one device buffer of the caller,
    /// each to its offset there.
    ///
    /// Takes no space of the VRAM budget. It comes after what the caller has queued on the buffer's
    /// stream: pieces that the device reaches itself are queued there at once, the others are
    /// copied once that has ended. When it has ended well, work that is queued on the buffer's
    /// stream finds all of it there; after an error, or if it is dropped before, what the pieces
    /// hold is unspecified, and that stream comes after every copy that has begun.
    ///
    /// # Errors
    ///
    /// `OutOfRange`; `InvalidConfig` for pieces outside of the buffer or over each other, or a
    /// stream that will not do; `TimedOut` for what the stream had before, or for a copy; those of
    /// reading each piece; `Device`.
    fn gather(
        &self,
        pieces: &[Gathered<'_>],
        target: &DeviceTarget<'_>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Copies parts of one device buffer of the caller, as they are after what is queued on its
    /// stream now, into objects.
    ///
    /// Each object is written as by `write_at`, a megabyte at a time, its pieces in their order;
    /// objects do not wait for each other. After an error some may have been written.
    ///
    /// # Errors
    ///
    /// As [`gather`](Self::gather), and those of writing.
    fn scatter(
        &self,
        target: &DeviceTarget<'_>,
        pieces: &[Scattered<'_>],
    ) -> impl Future<Output = Result<()>> + Send;

    /// Several objects at once, all or none.
    ///
    /// `vmem.device_set(&stream).read(&a).write(&b).acquire().await`
    fn device_set(&self, stream: &Arc<CudaStream>) -> DeviceSetRequest;
}

impl VramExt for VirtualMemory {
    async fn device_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> Result<DeviceLease> {
        let access = device_of(self, stream)?;
        let mut hold = access.hold(handle).await?;
        follow(&access, stream, hold.take_after())?;
        DeviceLease::new(&access, stream, hold)
    }

    async fn device_mut_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> Result<DeviceLeaseMut> {
        change(self, handle, stream, false).await
    }

    async fn device_overwrite_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> Result<DeviceLeaseMut> {
        change(self, handle, stream, true).await
    }

    async fn allocate_scratch(&self, len: usize, stream: &Arc<CudaStream>) -> Result<Scratch> {
        let access = device_of(self, stream)?;
        let memory = access.take_scratch(len).await?;
        Scratch::new(&access, stream, memory)
    }

    async fn gather(&self, pieces: &[Gathered<'_>], target: &DeviceTarget<'_>) -> Result<()> {
        gather::gather(self, pieces, target).await
    }

    async fn scatter(&self, target: &DeviceTarget<'_>, pieces: &[Scattered<'_>]) -> Result<()> {
        scatter::scatter(self, target, pieces).await
    }

    fn device_set(&self, stream: &Arc<CudaStream>) -> DeviceSetRequest {
        DeviceSetRequest::new(self, stream)
    }
}

async fn change(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    stream: &Arc<CudaStream>,
    overwrite: bool,
) -> Result<DeviceLeaseMut> {
    let access = device_of(vmem, stream)?;
    let mut change = access.change(handle, overwrite).await?;
    follow(&access, stream, change.take_after())?;
    DeviceLeaseMut::new(&access, stream, change)
}

/// The tier of a device, if it is one of ours.
pub(crate) fn tier(access: &DeviceAccess) -> Result<&CudaTier> {
    let device = &**access.backend() as &dyn Any;
    device.downcast_ref().ok_or_else(|| {
        let reason = "it is no device of this crate";
        VirtualMemoryError::tier_not_available(access.tier(), reason)
    })
}

/// The device of the store that a stream belongs to.
///
/// # Errors
///
/// `TierNotAvailable` if there is none or it is lost; `InvalidConfig` for a stream of another
/// context, and for one that will not do.
pub(crate) fn device_of(vmem: &VirtualMemory, stream: &Arc<CudaStream>) -> Result<DeviceAccess> {
    let invalid = |reason: &str| Err(VirtualMemoryError::invalid_config("stream", reason));
    let mut lost = None;
    for access in DeviceAccess::all(vmem) {
        match tier(&access).and_then(CudaTier::card) {
            Ok(card) if card.has(stream) => {
                check_stream(&card, stream)?;
                return Ok(access);
            }
            Ok(_) => {}
            Err(error) => lost = Some(error),
        }
    }
    match lost {
        Some(error) => Err(error),
        None if DeviceAccess::all(vmem).len() == 0 => {
            let reason = vmem.capabilities().vram_reason.clone();
            Err(VirtualMemoryError::tier_not_available(MemoryTier::Vram, reason))
        }
        None => invalid("it belongs to another context than that of the store's device"),
    }
}

fn check_stream(card: &Card, stream: &Arc<CudaStream>) -> Result<()> {
    let invalid = |reason: &str| Err(VirtualMemoryError::invalid_config("stream", reason));
    if is_per_thread(stream) {
        return invalid("it is another one on each thread, and a future may move between threads");
    }
    let capturing = card.context().on_stream(stream, || is_capturing(stream));
    match capturing.map_err(|error| device_error("asking a stream", error))? {
        true => invalid("a graph is being captured on it"),
        false => Ok(()),
    }
}

fn device_error(operation: &'static str, error: DriverError) -> VirtualMemoryError {
    failed(operation, error).public()
}
