//! Objects in device memory for kernels, on streams of the user.
//!
//! Invariant: from when a lease is granted until everything that was queued on its stream before it
//! was dropped has ended, the bytes stay where they are and are not written by others. Dropping a
//! lease, by cancellation too, records an event behind that work and hands what it kept to a thread
//! that waits for it; where there is no event, the thread asks again. A drop waits for nothing.
//! Called by users.

mod ending;
mod leased;
mod scratch;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};
use futures::FutureExt;
use futures::future::BoxFuture;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{DeviceAccess, VramChange, VramHold};

pub(crate) use self::ending::end_together;
use self::ending::kept;
use self::leased::{Leased, Passed, Scope};
pub use self::scratch::Scratch;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// An object in device memory that kernels read.
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DeviceLease {
    leased: Leased,
    /// None while it is being dropped.
    hold: Option<VramHold>,
}

impl DeviceLease {
    pub(crate) fn new(
        access: &DeviceAccess,
        stream: &Arc<CudaStream>,
        hold: VramHold,
    ) -> Result<Self> {
        let leased = Leased::new(access, stream, hold.range().as_deref())?;
        Ok(DeviceLease { leased, hold: Some(hold) })
    }

    /// The bytes, for kernels on the stream of the lease.
    pub fn view(&self) -> CudaView<'_, u8> {
        self.leased.view()
    }

    /// Lends the bytes to `work`, which may use them on the calling thread's own stream.
    ///
    /// That is the stream that is another one on each thread. The stream of the lease may be used
    /// as well.
    pub fn scope<T>(&self, work: impl FnOnce(CudaView<'_, u8>) -> T) -> T {
        let Leased { card, stream, strays, .. } = &self.leased;
        let _scope = Scope::enter(card, stream, strays);
        work(self.view())
    }

    /// The length of the object, in bytes.
    pub fn len(&self) -> usize {
        self.leased.len
    }

    /// Whether the object has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stream of the lease.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.leased.stream
    }

    /// Where the object is in device memory: a multiple of 256; 0 if it has no bytes.
    ///
    /// # Safety
    ///
    /// It is read only, by work on the stream of the lease alone, queued before the lease is
    /// dropped.
    #[allow(unsafe_code)]
    pub unsafe fn device_ptr(&self) -> u64 {
        self.leased.address
    }

    /// The device that the object is on, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(crate) fn ordinal(&self) -> usize {
        self.leased.ordinal()
    }
}

impl Drop for DeviceLease {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            // The pin ends now; the thread keeps the memory, whether the answer is awaited or not.
            drop(self.leased.release(kept(hold.end())));
        }
    }
}

/// An object in device memory that kernels change. Dropping it publishes what they wrote, once they
/// have ended; [`abandon`](Self::abandon) does not.
///
/// A lease that was not used is abandoned by its drop: nobody has asked for its bytes or its
/// address, nor said that anything was [`touched`](Self::touched). Nothing is copied then, and an
/// object that was to be overwritten keeps its bytes. [`finish`](Self::finish) always publishes.
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DeviceLeaseMut {
    leased: Leased,
    /// None while it is being dropped.
    change: Option<VramChange>,
    /// Somebody has asked for the bytes, or said that they were written. The change cannot tell:
    /// what begins as zeros counts there as written.
    is_used: AtomicBool,
}

impl DeviceLeaseMut {
    pub(crate) fn new(
        access: &DeviceAccess,
        stream: &Arc<CudaStream>,
        change: VramChange,
    ) -> Result<Self> {
        let leased = Leased::new(access, stream, change.unused_range().as_deref())?;
        Ok(DeviceLeaseMut { leased, change: Some(change), is_used: AtomicBool::new(false) })
    }

    /// The bytes, for kernels on the stream of the lease.
    pub fn view(&self) -> CudaView<'_, u8> {
        self.is_used.store(true, Ordering::Relaxed);
        self.leased.view()
    }

    /// The bytes, for kernels on the stream of the lease that write to them.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        self.mark_used();
        self.leased.view_mut()
    }

    /// Lends the bytes to `work`, which may use them on the calling thread's own stream.
    ///
    /// That is the stream that is another one on each thread. The stream of the lease may be used
    /// as well.
    pub fn scope<T>(&mut self, work: impl FnOnce(CudaViewMut<'_, u8>) -> T) -> T {
        self.mark_used();
        self.leased.lent();
        let Leased { card, stream, strays, lent, .. } = &mut self.leased;
        let lent = lent.get_mut().expect("invariant: it was made just now");
        let _scope = Scope::enter(card, stream, strays);
        work(lent.slice_mut().slice_mut(..))
    }

    /// From now on a kernel may write to it.
    fn mark_used(&self) {
        self.is_used.store(true, Ordering::Relaxed);
        if let Some(change) = &self.change {
            change.mark_used();
        }
    }

    /// The length of the object, in bytes.
    pub fn len(&self) -> usize {
        self.leased.len
    }

    /// Whether the object has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stream of the lease.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.leased.stream
    }

    /// Where the object is in device memory: a multiple of 256; 0 if it has no bytes.
    ///
    /// # Safety
    ///
    /// It is used by work on the stream of the lease alone, queued before the lease is dropped.
    #[allow(unsafe_code)]
    pub unsafe fn device_ptr(&self) -> u64 {
        self.mark_used();
        self.leased.address
    }

    /// The device that the object is on, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(crate) fn ordinal(&self) -> usize {
        self.leased.ordinal()
    }

    /// Says that kernels write to this range of the object, in bytes, and to none that no such call
    /// names: then no more than these ranges is copied to host memory, if that has the rest.
    /// Without any call they may write to all of it.
    ///
    /// ```no_run
    /// # use vmem::gpu::VramExt;
    /// # async fn append(
    /// #     vmem: vmem::VirtualMemory,
    /// #     block: vmem::VMemHandle,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// #     used: usize,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// let mut lease = vmem.device_mut_on(&block, &stream).await?;
    /// lease.touched(used..used + 4096)?;
    /// // ... a kernel writes to these bytes ...
    /// lease.finish().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `OutOfRange`.
    pub fn touched(&mut self, range: Range<usize>) -> Result<()> {
        let Some(change) = &mut self.change else { return Ok(()) };
        change.touched(range)?;
        self.is_used.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Publishes what kernels wrote, and says how that went; where none did, the bytes as they are,
    /// which are zeros in a lease that overwrites. It waits for what was queued, and for its copy,
    /// where the store writes back eagerly. Where it does not, and another lease came behind this
    /// one before its kernels had ended, what both wrote is published at the end of that.
    ///
    /// # Errors
    ///
    /// `Device` if what was queued failed, or the device was lost before the copy: then the
    /// previous version stays, or is lost if the device alone had it (see
    /// [`WriteBack`](vmem_core::WriteBack)). A copy that the device refuses is no error: the
    /// version stays there until it could be copied.
    pub async fn finish(self) -> Result<()> {
        self.end_now().await
    }

    /// Ends the lease without a new version: the object has the bytes that it had before, whatever
    /// kernels have written. Its device memory is not reused before they have ended. A lease that
    /// is dropped by a panic is abandoned too.
    ///
    /// If the device alone had the version before (see [`WriteBack`](vmem_core::WriteBack)), that
    /// is lost with the change: reads of the object fail until it is written whole or
    /// [reverted](vmem_core::VirtualMemory::revert).
    ///
    /// ```no_run
    /// # use vmem::gpu::VramExt;
    /// # async fn step(
    /// #     vmem: vmem::VirtualMemory,
    /// #     weights: vmem::VMemHandle,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// #     is_diverging: bool,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// let lease = vmem.device_mut_on(&weights, &stream).await?;
    /// // ... kernels write to it ...
    /// if is_diverging {
    ///     lease.abandon();
    /// } else {
    ///     lease.finish().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn abandon(mut self) {
        self.give_up();
    }

    /// Whether nobody can have written to it.
    fn is_unused(&self) -> bool {
        !self.is_used.load(Ordering::Relaxed) && !vmem_core::planted!("lease-unused")
    }

    fn give_up(&mut self) {
        if vmem_core::planted!("lease-abandon") {
            return drop(self.end());
        }
        let Some(change) = self.change.take() else { return };
        // The thread keeps the memory, whether the answer is awaited or not.
        drop(self.leased.release(kept(change.share())));
        drop(change);
    }

    /// Ends it before the future is polled.
    fn end_now(mut self) -> BoxFuture<'static, Result<()>> {
        self.end().unwrap_or_else(|| futures::future::ready(Ok(())).boxed())
    }

    fn end(&mut self) -> Option<BoxFuture<'static, Result<()>>> {
        let change = self.change.take()?;
        // However the change ends, the range is not reused before the kernel has ended.
        let Passed { answer, end } = self.leased.release(kept(change.share()));
        Some(change.finish(answer, end).boxed())
    }
}

impl Drop for DeviceLeaseMut {
    fn drop(&mut self) {
        // Half of a change is no version, and none of it is no new one.
        if std::thread::panicking() || self.is_unused() {
            return self.give_up();
        }
        // The future is not needed: the end goes on without it.
        drop(self.end());
    }
}
