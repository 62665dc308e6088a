//! Objects in device memory for kernels, on streams of the user.
//!
//! Invariant: from when a lease is granted until everything that was queued on its stream before it was dropped has ended, the bytes
//! stay where they are and nobody else writes to them. Dropping a lease, by cancellation too, records an event behind that
//! work and hands what it kept to a thread that waits for it. Called by users.

use std::any::Any;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DriverError};
use futures::FutureExt;
use futures::future::BoxFuture;
use vmem_core::backend::{DeviceAnswer, DeviceError, DeviceRange, VramChange, VramHold};
use vmem_core::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::card::{self, Card, failed};
use crate::gather::{self, DeviceTarget, Gathered, Scattered};
use crate::set::DeviceSetRequest;
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
    /// The object in device memory, for kernels on `stream` that read it. It is pinned there until the lease is dropped, and its
    /// memory is kept until what was queued by then has ended; what is written to the object meanwhile is another version.
    ///
    /// # Errors
    ///
    /// Those of a `pin` in VRAM; `InvalidConfig` for a stream of another context, of each thread's own, or on which a graph is
    /// being captured.
    fn device_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLease>> + Send;

    /// The object in device memory, for kernels on `stream` that change it, alone: waits until other leases have ended. What
    /// they wrote is the current version once they have ended and it was copied down; a read that comes after the drop waits
    /// for that.
    ///
    /// # Errors
    ///
    /// As [`device_on`](Self::device_on), and those of making room in host memory for the new version.
    fn device_mut_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLeaseMut>> + Send;

    /// As [`device_mut_on`](Self::device_mut_on), for kernels that write all of it: the bytes before are not brought up, it
    /// begins as zeros.
    ///
    /// # Errors
    ///
    /// As [`device_mut_on`](Self::device_mut_on).
    fn device_overwrite_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> impl Future<Output = Result<DeviceLeaseMut>> + Send;

    /// Copies parts of objects, from whichever tier has them, into one device buffer of the caller, each to its offset there. Takes
    /// no room in device memory. It begins once what the caller has queued on the buffer's stream has ended, however long
    /// that takes. When it has ended well, work that is queued on the buffer's stream finds all of
    /// it there; after an error what the pieces hold is unspecified. Dropped before, it waits for copies that have begun.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, `InvalidConfig` for a piece outside of the buffer or a stream that will not do; those of reading each piece;
    /// `Device`.
    fn gather(
        &self,
        pieces: &[Gathered<'_>],
        target: &DeviceTarget<'_>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Copies parts of one device buffer of the caller, as they are after what is queued on its stream now, into objects. Each object is
    /// written as by `write_at`, a megabyte at a time; after an error some may have been.
    ///
    /// # Errors
    ///
    /// As [`gather`](Self::gather), and those of writing.
    fn scatter(
        &self,
        target: &DeviceTarget<'_>,
        pieces: &[Scattered<'_>],
    ) -> impl Future<Output = Result<()>> + Send;

    /// Several objects at once, all or none: `vmem.device_set(&stream).read(&a).write(&b).acquire().await`.
    fn device_set(&self, stream: &Arc<CudaStream>) -> DeviceSetRequest;
}

impl VramExt for VirtualMemory {
    async fn device_on(
        &self,
        handle: &VMemHandle,
        stream: &Arc<CudaStream>,
    ) -> Result<DeviceLease> {
        check_stream(self, stream)?;
        let hold = self.hold_in_vram(handle).await?;
        let leased = Leased::new(self, stream, hold.range())?;
        Ok(DeviceLease { leased, hold: Some(hold) })
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

    async fn gather(&self, pieces: &[Gathered<'_>], target: &DeviceTarget<'_>) -> Result<()> {
        gather::gather(self, pieces, target).await
    }

    async fn scatter(&self, target: &DeviceTarget<'_>, pieces: &[Scattered<'_>]) -> Result<()> {
        gather::scatter(self, target, pieces).await
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
    check_stream(vmem, stream)?;
    let change = vmem.change_in_vram(handle, overwrite).await?;
    let leased = Leased::new(vmem, stream, change.range())?;
    Ok(DeviceLeaseMut { leased, change: Some(change) })
}

/// The tier of a store, if it is one of ours.
pub(crate) fn tier(vmem: &VirtualMemory) -> Result<&CudaTier> {
    let device = vmem.device().map(|device| &**device as &dyn Any);
    device.and_then(|device| device.downcast_ref()).ok_or_else(|| {
        let reason = vmem.capabilities().vram_reason.clone();
        VirtualMemoryError::TierNotAvailable { tier: MemoryTier::Vram, reason }
    })
}

pub(crate) fn check_stream(vmem: &VirtualMemory, stream: &Arc<CudaStream>) -> Result<()> {
    let card = tier(vmem)?.card()?;
    let invalid = |reason: &str| {
        Err(VirtualMemoryError::InvalidConfig { field: "stream", reason: reason.into() })
    };
    if !card.has(stream) {
        return invalid("it belongs to another context than that of the store's device");
    }
    if card::is_per_thread(stream) {
        return invalid("it is another one on each thread, and a future may move between threads");
    }
    let capturing = card.visit(|| card::is_capturing(stream)).and_then(|capturing| capturing);
    match capturing.map_err(|error| device_error("asking a stream", error))? {
        true => invalid("a graph is being captured on it"),
        false => Ok(()),
    }
}

pub(crate) fn device_error(operation: &'static str, error: DriverError) -> VirtualMemoryError {
    failed(operation, error).public()
}

/// What both kinds of leases have.
#[derive(Debug)]
struct Leased {
    /// Never dropped, for it would free what is not its own: leaked.
    slice: ManuallyDrop<CudaSlice<u8>>,
    stream: Arc<CudaStream>,
    /// For the thread that waits; the store may be closed first.
    vmem: VirtualMemory,
    /// The memory outlives the store too. None once the lease has ended.
    card: Option<Arc<Card>>,
}

impl Leased {
    fn new(
        vmem: &VirtualMemory,
        stream: &Arc<CudaStream>,
        range: Option<Arc<DeviceRange>>,
    ) -> Result<Self> {
        let card = tier(vmem)?.card()?;
        let slice = card.visit(|| card::slice_of(stream, range.as_deref())).and_then(|slice| slice);
        let slice = slice.map_err(|error| device_error("making a lease", error))?;
        Ok(Leased { slice, stream: stream.clone(), vmem: vmem.clone(), card: Some(card) })
    }

    /// An event behind all that was queued on the stream; none if it had to be waited for here.
    fn record(&self, card: &Card) -> std::result::Result<Option<CudaEvent>, DriverError> {
        let recorded = card.visit(|| {
            self.stream.record_event(None).map(Some).or_else(|_| {
                // It may run, and nothing says when it has ended.
                self.stream.synchronize().map(|()| None)
            })
        });
        recorded.and_then(|recorded| recorded)
    }

    /// Keeps `keep` until the stream has come to where it is now, and the card as long, which so does not go on a
    /// thread of the user's. Once.
    fn release(
        &mut self,
        keep: Box<dyn Any + Send>,
    ) -> DeviceAnswer<std::result::Result<(), DeviceError>> {
        let Some(card) = self.card.take() else {
            return futures::future::ready(Ok(())).boxed();
        };
        let slice = &mut self.slice;
        if let Err(error) = card.visit(|| card::leak(slice)) {
            tracing::debug!(target: "vmem::gpu", "{}", card::told("ending a lease", error));
        }
        let outcome = match (self.record(&card), tier(&self.vmem)) {
            (Ok(Some(event)), Ok(tier)) => {
                let passed = tier.watch(event, Box::new((keep, card)));
                return passed.map(|passed| passed.unwrap_or(Err(DeviceError::Closed))).boxed();
            }
            (Ok(_), _) => Ok(()),
            // The context is dead: nothing runs in it any more.
            (Err(error), _) => Err(failed("recording the end of a lease", error)),
        };
        drop((keep, card));
        futures::future::ready(outcome).boxed()
    }
}

/// Lends to work of the calling thread: what that queues on the thread's own stream comes after what the lease's has
/// before, and before what it has after.
fn within<T>(card: &Option<Arc<Card>>, stream: &Arc<CudaStream>, work: impl FnOnce() -> T) -> T {
    let Some(card) = card else { return work() };
    let own = stream.context().per_thread_stream();
    order(card, stream, &own);
    // However it ends: what was queued runs.
    let _after = After { card, own: &own, stream };
    work()
}

/// The end of a scope.
struct After<'a> {
    card: &'a Card,
    own: &'a CudaStream,
    stream: &'a CudaStream,
}

impl Drop for After<'_> {
    fn drop(&mut self) {
        order(self.card, self.own, self.stream);
    }
}

/// What `then` gets from here on comes after what `first` has.
fn order(card: &Card, first: &CudaStream, then: &CudaStream) {
    let ordered = card.visit(|| {
        let ordered = first.record_event(None).and_then(|event| then.wait(&event));
        ordered.or_else(|_| first.synchronize())
    });
    if let Err(error) = ordered.and_then(|ordered| ordered) {
        // The context is dead: nothing runs in it any more.
        tracing::debug!(target: "vmem::gpu", "{}", card::told("ordering streams", error));
    }
}

/// An object in device memory that kernels read.
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DeviceLease {
    leased: Leased,
    /// None while it is being dropped.
    hold: Option<VramHold>,
}

impl DeviceLease {
    /// The bytes, for kernels on the stream of the lease.
    pub fn view(&self) -> CudaView<'_, u8> {
        self.leased.slice.slice(..)
    }

    /// Lends the bytes to `work`, which may use them on the calling thread's own stream (the one that is another on each thread)
    /// as well as on that of the lease.
    pub fn scope<T>(&self, work: impl FnOnce(CudaView<'_, u8>) -> T) -> T {
        within(&self.leased.card, &self.leased.stream, || work(self.view()))
    }

    /// The length of the object, in bytes.
    pub fn len(&self) -> usize {
        self.leased.slice.len()
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
    /// It is read only, by work on the stream of the lease alone, queued before the lease is dropped.
    #[allow(unsafe_code)]
    pub unsafe fn device_ptr(&self) -> u64 {
        self.hold.as_ref().and_then(VramHold::range).map_or(0, |range| range.address())
    }

    /// The device that the object is on, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(crate) fn ordinal(&self) -> usize {
        self.leased.card.as_ref().map_or(0, |card| card.ordinal())
    }
}

impl Drop for DeviceLease {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            // The pin goes now; the thread keeps the memory, whether anybody awaits that or not.
            drop(self.leased.release(Box::new(hold.end())));
        }
    }
}

/// An object in device memory that kernels change. Dropping it publishes what they wrote, once they have ended.
#[derive(Debug)]
#[must_use = "dropping it ends the lease"]
pub struct DeviceLeaseMut {
    leased: Leased,
    /// None while it is being dropped.
    change: Option<VramChange>,
}

impl DeviceLeaseMut {
    /// The bytes, for kernels on the stream of the lease.
    pub fn view(&self) -> CudaView<'_, u8> {
        self.leased.slice.slice(..)
    }

    /// The bytes, for kernels on the stream of the lease that write to them.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        self.leased.slice.slice_mut(..)
    }

    /// Lends the bytes to `work`, which may use them on the calling thread's own stream (the one that is another on each thread)
    /// as well as on that of the lease.
    pub fn scope<T>(&mut self, work: impl FnOnce(CudaViewMut<'_, u8>) -> T) -> T {
        let Leased { slice, stream, card, .. } = &mut self.leased;
        within(card, stream, || work(slice.slice_mut(..)))
    }

    /// The length of the object, in bytes.
    pub fn len(&self) -> usize {
        self.leased.slice.len()
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
        self.change.as_ref().and_then(VramChange::range).map_or(0, |range| range.address())
    }

    /// Ends the lease as the drop does, and says how that went.
    ///
    /// # Errors
    ///
    /// `Device` if what was queued, or the copy of what it wrote, failed: the version before stays then.
    pub async fn finish(self) -> Result<()> {
        self.end_now().await
    }

    /// Ends it before the future is polled.
    pub(crate) fn end_now(mut self) -> BoxFuture<'static, Result<()>> {
        self.end().unwrap_or_else(|| futures::future::ready(Ok(())).boxed())
    }

    fn end(&mut self) -> Option<BoxFuture<'static, Result<()>>> {
        let change = self.change.take()?;
        // Whatever becomes of the change: the range is nobody else's before the kernel has ended.
        let ready = self.leased.release(Box::new(change.range()));
        Some(change.finish(ready).boxed())
    }
}

impl Drop for DeviceLeaseMut {
    fn drop(&mut self) {
        // It goes on by itself.
        drop(self.end());
    }
}
