//! The driver: a context, the memory of the tier, streams, events, and the copies between them.
//!
//! Ownership: a copy that was handed to the driver is in a [`Batch`], with the bytes, the buffer and the share of
//! the device range that it touches. A batch gives them up only after its event was seen complete, or the context is
//! dead and takes no more part; one that is dropped otherwise leaks them. So no future that is dropped, no
//! panic and no end of a runtime frees memory under a copy. All unsafe code that touches the driver is here.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;

use bytes::Bytes;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DriverError, result, sys};
use futures::channel::oneshot;
use parking_lot::Mutex;
use vmem_core::backend::{
    DeviceError, DeviceRange, InUse, IoBuf, ObjectSpace, Part, Registrar, StagingMemory,
};

use crate::lane::Lost;

/// Where objects begin is a multiple of this, in bytes.
pub(crate) const UNIT: u64 = 512;
/// A tier smaller than this is none, in bytes.
pub(crate) const CAPACITY_MIN: u64 = 4 << 20;

/// What the driver said, in words.
pub(crate) fn told(what: &str, error: DriverError) -> String {
    format!("{what}: {} ({})", message(error), error.0 as i32)
}

fn message(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|_| "an error without a name".into())
}

/// The error of an operation.
pub(crate) fn failed(operation: &'static str, error: DriverError) -> DeviceError {
    DeviceError::Failed { operation, code: error.0 as i32, message: message(error).into() }
}

/// One device of the machine, as the driver lists them.
pub(crate) struct Listed {
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    pub(crate) uuid: String,
}

/// The devices that there are.
///
/// # Errors
///
/// What the driver says, in words.
pub(crate) fn list() -> Result<Vec<Listed>, String> {
    result::init().map_err(|error| told("the CUDA driver does not start", error))?;
    let count = result::device::get_count().map_err(|error| told("counting devices", error))?;
    let one = |ordinal: i32| {
        let device = result::device::get(ordinal)?;
        let name = result::device::get_name(device)?;
        let uuid = result::device::get_uuid(device)?;
        let hex: Vec<String> =
            uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
        let uuid = [0..4, 4..6, 6..8, 8..10, 10..16].map(|part| hex[part].concat()).join("-");
        Ok(Listed { ordinal: ordinal as usize, name, uuid: format!("GPU-{uuid}") })
    };
    (0..count).map(one).collect::<Result<_, _>>().map_err(|error| told("asking a device", error))
}

/// The context of the tier and the memory that it has. It is freed when the last of its streams has ended.
#[derive(Debug)]
pub(crate) struct Card {
    context: Arc<CudaContext>,
    /// 0 where each object has an allocation of its own.
    base: u64,
    capacity: u64,
    staging: Mutex<Option<StagingMemory>>,
    /// Slabs of it are registered as copies pass through them.
    space: OnceLock<ObjectSpace>,
    lost: Lost,
}

impl Card {
    /// Takes memory on a device: so many bytes, or three quarters of what is free; less if others are faster.
    /// Called on a thread of ours, which it binds to the context.
    ///
    /// # Errors
    ///
    /// What the driver says, in words.
    pub(crate) fn open(
        ordinal: usize,
        capacity: Option<u64>,
        lost: Lost,
        separate: bool,
    ) -> Result<Arc<Self>, String> {
        let context =
            CudaContext::new(ordinal).map_err(|error| told("opening a context", error))?;
        // SAFETY: no slice of cudarc's is ever made in this context object, so nothing relies on it to track
        // who uses one. With it, the first stream would synchronise the whole context.
        unsafe { context.disable_event_tracking() };
        relax_capture().map_err(|error| told("exchanging the capture mode", error))?;
        let (free, _) = result::mem_get_info().map_err(|error| told("asking for memory", error))?;
        let mut wanted = capacity.unwrap_or(free as u64 / 4 * 3).min(free as u64) / UNIT * UNIT;
        let least = CAPACITY_MIN.min(capacity.unwrap_or(u64::MAX)) / UNIT * UNIT;
        loop {
            if wanted < least.max(UNIT) {
                return Err(format!("the device has {free} bytes free, which is too little"));
            }
            let block = match separate {
                true => Ok(0),
                // SAFETY: the memory is plain bytes, and whoever reads one has written it.
                false => unsafe { result::malloc_sync(wanted as usize) },
            };
            match block {
                Ok(base) => {
                    let staging = Mutex::new(None);
                    let space = OnceLock::new();
                    let capacity = wanted;
                    return Ok(Arc::new(Card { context, base, capacity, staging, space, lost }));
                }
                // Others took some meanwhile, or it lies in pieces.
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    wanted = wanted / 8 * 7 / UNIT * UNIT;
                }
                Err(error) => return Err(told("allocating device memory", error)),
            }
        }
    }

    /// Whether a stream belongs to this context.
    pub(crate) fn has(&self, stream: &CudaStream) -> bool {
        stream.context().cu_ctx() == self.context.cu_ctx()
    }

    /// Does something in the context on a thread that is not ours, which afterwards has the context that it had. A graph
    /// that somebody captures is not disturbed.
    pub(crate) fn visit<T>(&self, work: impl FnOnce() -> T) -> Result<T, DriverError> {
        let mut before = std::ptr::null_mut();
        // SAFETY: the context is retained, and is popped below.
        unsafe { sys::cuCtxPushCurrent_v2(self.context.cu_ctx()) }.result()?;
        let relaxed = exchange_capture(RELAXED);
        let done = work();
        let restored = relaxed.and_then(exchange_capture);
        // SAFETY: a place for what was pushed above.
        unsafe { sys::cuCtxPopCurrent_v2(&mut before) }.result()?;
        restored.map(|_| done)
    }

    /// Which device it is, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// An allocation for one object; none if there is no memory.
    pub(crate) fn allocate(&self, len: usize) -> Option<u64> {
        // SAFETY: as for the block.
        self.visit(|| unsafe { result::malloc_sync(len) }).and_then(|address| address).ok()
    }

    /// Frees one that `allocate` made, which nobody uses any more.
    pub(crate) fn free_one(&self, address: u64) {
        // SAFETY: its one caller is the end of the range that had it.
        let freed = self.visit(|| unsafe { result::free_sync(address) }).and_then(|freed| freed);
        if let Err(error) = freed {
            tracing::warn!(target: "vmem::gpu", "{}", told("freeing device memory", error));
        }
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Makes the context that of the calling thread, which is one of ours.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn bind(&self) -> Result<(), DriverError> {
        self.context.bind_to_thread()?;
        relax_capture()
    }

    /// Lets the device read and write this memory directly, from any context. On a thread that is bound.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn register(&self, memory: StagingMemory) -> Result<(), DriverError> {
        pin(memory.address(), memory.len())?;
        *self.staging.lock() = Some(memory);
        Ok(())
    }

    /// Whether the context is dead, also if nobody has noticed before. In the context or out of it.
    fn is_dead(&self) -> bool {
        if self.lost.get().is_none()
            && let Err(error) = self.visit(result::mem_get_info).and_then(|free| free)
        {
            let _ = self.lost.set(told("the device failed", error).into());
        }
        self.lost.get().is_some()
    }

    /// Registers slabs of this memory from now on, as copies pass through them.
    pub(crate) fn serve(self: &Arc<Self>, space: ObjectSpace) {
        if self.space.set(space.clone()).is_ok() {
            space.serve(Arc::new(Slabs(Arc::downgrade(self))));
        }
    }

    /// Memory of the host by what the device reaches directly. On a thread that is bound.
    fn parts(&self, memory: &[u8]) -> Vec<Part> {
        match self.space.get() {
            Some(space) => space.enter(memory.as_ptr().addr(), memory.len()),
            None => vec![Part { range: 0..memory.len(), direct: false, in_use: None }],
        }
    }
}

/// What registers slabs of object space. It keeps no card alive: that has everything unregistered when it goes.
#[derive(Debug)]
struct Slabs(Weak<Card>);

impl Slabs {
    fn visit(&self, work: impl FnOnce() -> Result<(), DriverError>) -> io::Result<()> {
        let card = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let done = card.visit(work).and_then(|done| done);
        done.map_err(|error| io::Error::other(told("registering memory", error)))
    }
}

impl Registrar for Slabs {
    fn register(&self, address: usize, len: usize) -> io::Result<()> {
        self.visit(|| pin(address, len))
    }

    fn unregister(&self, address: usize, _len: usize) -> io::Result<()> {
        self.visit(|| unpin(address)).or_else(|error| {
            // A dead context takes no more part, whatever it says.
            let dead = self.0.upgrade().is_some_and(|card| card.is_dead());
            if dead { Ok(()) } else { Err(error) }
        })
    }
}

/// Has the device know memory of the host that stays mapped, with all its pages, until `unpin`.
fn pin(address: usize, len: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the callers have staging, which stays as it is while it lives, and slabs of object space, of which no page is
    // given back before `unpin`.
    unsafe { sys::cuMemHostRegister_v2(address, len, sys::CU_MEMHOSTREGISTER_PORTABLE) }.result()
}

/// Has the device forget memory that no copy uses.
fn unpin(address: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: it was registered, and no copy uses it any more: that is counted.
    match unsafe { sys::cuMemHostUnregister(address) }.result() {
        // Somebody was quicker.
        Err(DriverError(sys::CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)) => Ok(()),
        unregistered => unregistered,
    }
}

impl Drop for Card {
    /// With the last stream or the last lease; all copies have ended.
    fn drop(&mut self) {
        let staging = self.staging.get_mut().take();
        let freed = self.visit(|| self.free(staging));
        if let Err(error) = freed.and_then(|freed| freed) {
            tracing::warn!(target: "vmem::gpu", "{}", told("freeing device memory", error));
        }
    }
}

impl Card {
    fn free(&self, staging: Option<StagingMemory>) -> Result<(), DriverError> {
        // A dead context takes no more part, whatever it says.
        let dead = self.is_dead();
        if let Some(memory) = staging
            && unpin(memory.address()).is_err()
            && !dead
        {
            // It may still be known to the device: it is never to be unmapped then.
            std::mem::forget(memory);
        }
        if let Some(space) = self.space.get() {
            space.retire(&|address, _| unpin(address).is_ok() || dead);
        }
        if self.base == 0 {
            return Ok(());
        }
        // SAFETY: it was allocated once, is freed here alone, and no copy uses it any more; the driver waits for kernels.
        unsafe { result::free_sync(self.base) }
    }
}

const RELAXED: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

/// On our own threads a graph that somebody else captures is none of our business.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn relax_capture() -> Result<(), DriverError> {
    exchange_capture(RELAXED).map(drop)
}

/// Sets how this thread minds captures; returns how it did.
fn exchange_capture(
    mut mode: sys::CUstreamCaptureMode,
) -> Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: the argument is a place for the mode that was set before.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    Ok(mode)
}

/// Rung by the driver when a batch may have ended. It is a hint: what counts is what the event says.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    thread: OnceLock<Thread>,
}

impl Bell {
    /// Wakes this thread from now on.
    pub(crate) fn hang(&self, thread: Thread) {
        let _ = self.thread.set(thread);
    }

    pub(crate) fn ring(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// The host function: one wake, no call of the driver, no lock, nothing freed.
unsafe extern "C" fn ring(bell: *mut c_void) {
    // SAFETY: the pointer is that of a `Bell` that is never freed.
    let bell = unsafe { &*bell.cast::<Bell>() };
    bell.ring();
}

/// Device memory of a caller, who promised that it stays until every operation with a share of `call` has ended.
#[derive(Clone)]
pub(crate) struct Foreign {
    pub(crate) address: u64,
    pub(crate) len: usize,
    pub(crate) call: Arc<Call>,
}

/// One call over memory of a caller: whoever ends it waits for the last share.
#[derive(Debug, Default)]
pub(crate) struct Call {
    /// The caller has gone: what was not begun is not begun any more.
    pub(crate) cancelled: AtomicBool,
}

/// Where bytes for a caller come from.
pub(crate) enum Source {
    Device { range: Arc<DeviceRange>, offset: usize, len: usize },
    Host(Bytes),
}

/// One operation, with all that it touches.
pub(crate) enum Work {
    /// Into device memory of a caller.
    Give {
        to: Foreign,
        offset: usize,
        source: Source,
        reply: oneshot::Sender<Result<(), DeviceError>>,
    },
    /// Out of device memory of a caller.
    Take {
        from: Foreign,
        offset: usize,
        len: usize,
        into: IoBuf,
        reply: oneshot::Sender<(IoBuf, Result<(), DeviceError>)>,
    },
    Upload {
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
        reply: oneshot::Sender<Result<(), DeviceError>>,
    },
    Zero {
        range: Arc<DeviceRange>,
        reply: oneshot::Sender<Result<(), DeviceError>>,
    },
    Download {
        from: Arc<DeviceRange>,
        offset: usize,
        len: usize,
        into: IoBuf,
        at: usize,
        reply: oneshot::Sender<(IoBuf, Result<(), DeviceError>)>,
    },
}

impl Work {
    /// What the driver calls it, for errors.
    fn name(&self) -> &'static str {
        match self {
            Work::Upload { .. } => "copying to the device",
            Work::Zero { .. } => "zeroing device memory",
            Work::Download { .. } => "copying from the device",
            Work::Give { .. } => "gathering",
            Work::Take { .. } => "scattering",
        }
    }

    /// Gives back what it owns and answers.
    pub(crate) fn end(self, outcome: Result<(), DeviceError>) {
        // Before the answer: whoever gets it may look at the ledger.
        match self {
            Work::Upload { to, bytes, reply, .. } => {
                drop((to, bytes));
                drop(reply.send(outcome));
            }
            Work::Zero { range, reply } => {
                drop(range);
                drop(reply.send(outcome));
            }
            Work::Download { from, into, reply, .. } => {
                drop(from);
                drop(reply.send((into, outcome)));
            }
            Work::Give { to, source, reply, .. } => {
                drop((to, source));
                drop(reply.send(outcome));
            }
            Work::Take { from, into, reply, .. } => {
                drop(from);
                drop(reply.send((into, outcome)));
            }
        }
    }
}

/// A stream for one direction, and one on which its ends are told, so that no copy waits for that.
pub(crate) struct CopyStream {
    stream: Arc<CudaStream>,
    notices: Arc<CudaStream>,
    /// Events that are free.
    events: Vec<CudaEvent>,
    bell: &'static Bell,
    card: Arc<Card>,
}

/// Operations that were handed to the driver together.
pub(crate) struct Batch {
    /// None if it could not be recorded: then the context is dead.
    event: Option<CudaEvent>,
    works: ManuallyDrop<Vec<Issued>>,
}

/// An operation that was handed to the driver.
struct Issued {
    work: Work,
    /// What of object space it touches.
    uses: Vec<InUse>,
    /// What the driver said, if it refused it at once; a part of it may have been accepted.
    refused: Option<DeviceError>,
}

impl CopyStream {
    /// On the thread that uses it, bound to the context.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn new(card: Arc<Card>, bell: Arc<Bell>) -> Result<Self, DriverError> {
        let (stream, notices) = (card.context.new_stream()?, card.context.new_stream()?);
        // SAFETY: the count is never given back: a host function may come late, or after everything else.
        let bell = unsafe { &*Arc::into_raw(bell) };
        Ok(CopyStream { stream, notices, events: Vec::new(), bell, card })
    }

    /// Hands operations to the driver, in order, and asks to be told of their end.
    ///
    /// # Errors
    ///
    /// With the batch: the driver refuses to say when it ends, so that the context is dead.
    pub(crate) fn submit(&mut self, works: Vec<Work>) -> (Batch, Result<(), DriverError>) {
        let issue = |mut work: Work| {
            let mut uses = Vec::new();
            let issued = self.issue(&mut work, &mut uses);
            let refused = issued.err().map(|error| failed(work.name(), error));
            Issued { work, uses, refused }
        };
        let works = ManuallyDrop::new(works.into_iter().map(issue).collect());
        match self.mark() {
            Ok(event) => (Batch { event: Some(event), works }, Ok(())),
            Err(error) => (Batch { event: None, works }, Err(error)),
        }
    }

    fn issue(&self, work: &mut Work, uses: &mut Vec<InUse>) -> Result<(), DriverError> {
        let stream = self.stream.cu_stream();
        match work {
            Work::Upload { to, offset, bytes, .. } => {
                check(*offset, bytes.len(), to)?;
                self.up(to.address() + *offset as u64, bytes, uses)
            }
            Work::Zero { range, .. } => {
                // SAFETY: the range is the operation's until it has ended: it is in the batch, which gives nothing up before.
                unsafe { result::memset_d8_async(range.address(), 0, range.len(), stream) }
            }
            Work::Download { from, offset, len, into, at, .. } => {
                check(*offset, *len, from)?;
                let end = at.checked_add(*len).filter(|&end| end <= into.len());
                let into = &mut into[*at..end.ok_or(INVALID)?];
                self.down(into, from.address() + *offset as u64, uses)
            }
            Work::Give { to, offset, source, .. } => {
                let len = match source {
                    Source::Device { len, .. } => *len,
                    Source::Host(bytes) => bytes.len(),
                };
                self.enter(to, *offset, len)?;
                let target = to.address + *offset as u64;
                match source {
                    Source::Device { range, offset, len } => {
                        check(*offset, *len, range)?;
                        let from = range.address() + *offset as u64;
                        // SAFETY: the range as above; the target is promised to stay while the batch has a share of the call.
                        unsafe { result::memcpy_dtod_async(target, from, *len, stream) }
                    }
                    Source::Host(bytes) => self.up(target, bytes, uses),
                }
            }
            Work::Take { from, offset, len, into, .. } => {
                self.enter(from, *offset, *len)?;
                let into = into.get_mut(..*len).ok_or(INVALID)?;
                self.down(into, from.address + *offset as u64, uses)
            }
        }
    }

    /// Copies up, in parts of which none crosses a registration.
    fn up(&self, to: u64, bytes: &[u8], uses: &mut Vec<InUse>) -> Result<(), DriverError> {
        for Part { range, in_use, .. } in self.card.parts(bytes) {
            uses.extend(in_use);
            let (to, part) = (to + range.start as u64, &bytes[range]);
            // SAFETY: the target is the operation's until it has ended, or is promised to stay while it has a share of its
            // call, and so are the bytes, which do not change: all is in the batch, which gives nothing up before that.
            unsafe { result::memcpy_htod_async(to, part, self.stream.cu_stream()) }?;
        }
        Ok(())
    }

    /// Copies down, likewise.
    fn down(&self, into: &mut [u8], from: u64, uses: &mut Vec<InUse>) -> Result<(), DriverError> {
        for Part { range, in_use, .. } in self.card.parts(into) {
            uses.extend(in_use);
            let (from, part) = (from + range.start as u64, &mut into[range]);
            // SAFETY: as above; the buffer moves with the batch, its memory does not, and nobody else has it.
            unsafe { result::memcpy_dtoh_async(part, from, self.stream.cu_stream()) }?;
        }
        Ok(())
    }

    /// What comes now works on memory of a caller, who was waited for before.
    fn enter(&self, foreign: &Foreign, offset: usize, len: usize) -> Result<(), DriverError> {
        if foreign.call.cancelled.load(Ordering::SeqCst) {
            return Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_PERMITTED));
        }
        match offset.checked_add(len) {
            Some(end) if end <= foreign.len => Ok(()),
            _ => Err(INVALID),
        }
    }

    /// Records an event behind what was issued, and has the bell rung after it.
    fn mark(&mut self) -> Result<CudaEvent, DriverError> {
        let event = match self.events.pop() {
            Some(event) => event,
            None => self.card.context.new_event(None)?,
        };
        event.record(&self.stream)?;
        // Without it the watchdog sees its end all the same.
        ask_for_notice(&self.notices, &event, self.bell);
        Ok(event)
    }

    /// Waits for everything; after the context has died this returns at once.
    pub(crate) fn drain(&self) {
        let _ = self.stream.synchronize();
    }
}

/// Streams on which the ends of foreign work are told, so that little waits behind a slow kernel.
const NOTICE_STREAMS: usize = 4;

/// Has a bell rung when events on streams of others have passed.
pub(crate) struct Notices {
    streams: Vec<Arc<CudaStream>>,
    next: usize,
    bell: &'static Bell,
}

impl Notices {
    /// On the thread that uses it, bound to the context.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn new(card: &Card, bell: Arc<Bell>) -> Result<Self, DriverError> {
        let streams =
            (0..NOTICE_STREAMS).map(|_| card.context.new_stream()).collect::<Result<_, _>>()?;
        // SAFETY: the count is never given back: a host function may come late, or after everything else.
        let bell = unsafe { &*Arc::into_raw(bell) };
        Ok(Notices { streams, next: 0, bell })
    }

    /// Has the bell rung behind this event. If the driver refuses, whoever waits has to look for himself.
    pub(crate) fn ask(&mut self, event: &CudaEvent) {
        self.next = (self.next + 1) % self.streams.len();
        ask_for_notice(&self.streams[self.next], event, self.bell);
    }
}

fn ask_for_notice(stream: &CudaStream, event: &CudaEvent, bell: &'static Bell) {
    let told = stream.wait(event).and_then(|()| {
        let bell: *const Bell = bell;
        // SAFETY: the function takes the bell that is never freed.
        unsafe {
            result::stream::launch_host_function(stream.cu_stream(), ring, bell.cast_mut().cast())
        }
    });
    if let Err(error) = told {
        tracing::warn!(target: "vmem::gpu", "{}", crate::card::told("asking for a notice", error));
    }
}

/// Whether a graph is being captured on a stream. On a thread that has its context.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn is_capturing(stream: &CudaStream) -> Result<bool, DriverError> {
    // SAFETY: the stream is alive.
    let status = unsafe { result::stream::is_capturing(stream.cu_stream()) }?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// The handle that means each thread's own stream.
pub(crate) fn is_per_thread(stream: &CudaStream) -> bool {
    stream.cu_stream().addr() == 2
}

/// Memory of the tier as a slice of cudarc's, for views. It must be leaked, never dropped.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn slice_of(
    stream: &Arc<CudaStream>,
    range: Option<&DeviceRange>,
) -> Result<ManuallyDrop<CudaSlice<u8>>, DriverError> {
    // The slice makes events of its own, and panics where it cannot: whether it can is seen here.
    drop(stream.context().new_event(None)?);
    let (address, len) = range.map_or((0, 0), |range| (range.address(), range.len()));
    // SAFETY: the range is that long and alive for as long as the lease; the slice is never dropped, so that it
    // does not free what is not its own.
    Ok(ManuallyDrop::new(unsafe { stream.upgrade_device_ptr(address, len) }))
}

/// Ends a slice of `slice_of`, which frees nothing. Once.
pub(crate) fn leak(slice: &mut ManuallyDrop<CudaSlice<u8>>) {
    // SAFETY: its one caller is the end of a lease, which uses it no more.
    unsafe { ManuallyDrop::take(slice) }.leak();
}

const INVALID: DriverError = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);

/// A copy stays within its range.
fn check(offset: usize, len: usize, range: &DeviceRange) -> Result<(), DriverError> {
    match offset.checked_add(len) {
        Some(end) if end <= range.len() => Ok(()),
        _ => Err(INVALID),
    }
}

impl Batch {
    /// Whether it has ended.
    ///
    /// # Errors
    ///
    /// What the driver says: the context is dead.
    pub(crate) fn has_ended(&self) -> Result<bool, DriverError> {
        match &self.event {
            Some(event) => event.try_is_complete(),
            None => Err(DriverError(sys::CUresult::CUDA_ERROR_UNKNOWN)),
        }
    }

    /// Answers everything in it; `has_ended` has said so.
    pub(crate) fn end(mut self, stream: &mut CopyStream) {
        stream.events.extend(self.event.take());
        // SAFETY: taken once: `self` is forgotten just below.
        let works = unsafe { ManuallyDrop::take(&mut self.works) };
        std::mem::forget(self);
        for Issued { work, uses, refused } in works {
            drop(uses);
            work.end(refused.map_or(Ok(()), Err));
        }
    }

    /// Answers everything in it with an error; the context is dead and was drained.
    pub(crate) fn end_dead(mut self, error: &DeviceError) {
        // SAFETY: as above.
        let works = unsafe { ManuallyDrop::take(&mut self.works) };
        drop(self.event.take());
        std::mem::forget(self);
        for Issued { work, uses, .. } in works {
            drop(uses);
            work.end(Err(error.clone()));
        }
    }
}
