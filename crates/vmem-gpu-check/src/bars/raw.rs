//! What a user writes by hand on the driver: copies, kernels, and their ends.
//!
//! Invariant: whatever a copy or a kernel touches is owned here, or borrowed until it has ended:
//! what owns memory waits before it lets anybody look at it, and before it gives it back. Called by
//! the bars.

#![allow(unsafe_code)]

use std::ffi::{c_uint, c_void};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use futures::task::AtomicWaker;
use vmem::gpu::{DeviceLease, DeviceLeaseMut, DeviceTarget, VramExt};
use vmem::{VMemHandle, VirtualMemory};

use crate::user::{DeviceMemory, Env, Pinned, User};

/// Some bytes of the pinned memory of a link and as many of its device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) host: usize,
    pub(super) device: usize,
    pub(super) len: usize,
}

impl Piece {
    /// `count` pieces of `len` bytes, one behind the other.
    pub(super) fn row(count: usize, len: usize) -> Vec<Piece> {
        (0..count).map(|at| Piece { host: at * len, device: at * len, len }).collect()
    }
}

// ---- Copies between pinned and device memory
// -----------------------------------------------------

/// Pinned memory, device memory, and streams on which is copied between them.
pub(super) struct Link {
    pinned: Pinned,
    device: DeviceMemory,
    lanes: Vec<Arc<CudaStream>>,
    batch: std::result::Result<BatchCopy, String>,
    rows: Option<Rows>,
}

/// Where rows are in pinned memory, as a kernel takes it.
struct Rows {
    addresses: DeviceMemory,
    count: usize,
    len: usize,
}

impl Link {
    /// With `len` bytes of each memory, and `streams` streams.
    pub(super) fn new(
        env: &Env,
        user: &User,
        pinned: usize,
        device: usize,
        lanes: usize,
    ) -> Result<Self> {
        Self::over(env, user, user.pinned(pinned)?, device, lanes)
    }

    /// With host memory of the kind that a store has: mapped, and registered afterwards.
    pub(super) fn registered(
        env: &Env,
        user: &User,
        pinned: usize,
        device: usize,
        lanes: usize,
    ) -> Result<Self> {
        Self::over(env, user, user.registered(pinned)?, device, lanes)
    }

    fn over(env: &Env, user: &User, pinned: Pinned, device: usize, lanes: usize) -> Result<Self> {
        let device = user.allocate(device)?;
        let lanes = (0..lanes).map(|_| user.context.new_stream());
        let lanes = lanes.collect::<std::result::Result<Vec<_>, _>>().context("streams")?;
        let mut link = Link { pinned, device, lanes, batch: BatchCopy::find(env), rows: None };
        if link.batch.is_ok() {
            // Found is not yet working.
            let tried = link.batch(0, true, &Piece::row(2, 16)).and_then(|()| link.wait());
            if let Err(error) = tried {
                link.batch = Err(format!("it was refused: {error:#}"));
            }
        }
        Ok(link)
    }

    pub(super) fn stream(&self, lane: usize) -> &Arc<CudaStream> {
        &self.lanes[lane]
    }

    /// Why there are no batches; none if there are.
    pub(super) fn no_batch(&self) -> Option<&str> {
        self.batch.as_ref().err().map(String::as_str)
    }

    /// Where the piece is, in host and in device memory.
    fn places(&self, piece: Piece) -> Result<(*mut u8, u64)> {
        let Piece { host, device, len } = piece;
        let within = |at: usize, all: usize| at.checked_add(len).is_some_and(|end| end <= all);
        ensure!(within(host, self.pinned.len()), "{piece:?} is outside of pinned memory");
        ensure!(within(device, self.device.len), "{piece:?} is outside of device memory");
        Ok((self.pinned.address().wrapping_add(host), self.device.address + device as u64))
    }

    /// Queues a copy to the device. On a thread that has the context.
    pub(super) fn up(&self, lane: usize, piece: Piece) -> Result<()> {
        let (host, device) = self.places(piece)?;
        let stream = self.lanes[lane].cu_stream();
        // SAFETY: both are within memory of the link, which waits for its lanes before it is looked
        // at or freed.
        unsafe { sys::cuMemcpyHtoDAsync_v2(device, host.cast(), piece.len, stream) }
            .result()
            .context("a copy up")
    }

    /// Queues a copy from the device.
    pub(super) fn down(&self, lane: usize, piece: Piece) -> Result<()> {
        let (host, device) = self.places(piece)?;
        let stream = self.lanes[lane].cu_stream();
        // SAFETY: as above.
        unsafe { sys::cuMemcpyDtoHAsync_v2(host.cast(), device, piece.len, stream) }
            .result()
            .context("a copy down")
    }

    /// Queues copies in one call.
    pub(super) fn batch(&self, lane: usize, up: bool, pieces: &[Piece]) -> Result<()> {
        let batch = match &self.batch {
            Ok(batch) => batch,
            Err(why) => bail!("there are no batches: {why}"),
        };
        let mut to = Vec::new();
        let mut from = Vec::new();
        let mut lens: Vec<usize> = pieces.iter().map(|piece| piece.len).collect();
        for &piece in pieces {
            let (host, device) = self.places(piece)?;
            let host = host.expose_provenance() as u64;
            let (target, source) = if up { (device, host) } else { (host, device) };
            to.push(target);
            from.push(source);
        }
        // SAFETY: as for single copies; the driver takes copies of the lists.
        unsafe { batch.copy(&mut to, &mut from, &mut lens, &self.lanes[lane]) }
    }

    /// Waits for everything that was queued.
    pub(super) fn wait(&self) -> Result<()> {
        self.lanes.iter().try_for_each(|lane| lane.synchronize()).context("waiting for copies")
    }

    /// The pinned memory.
    pub(super) fn host(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        Ok(self.pinned.bytes_mut())
    }

    /// What is in device memory.
    pub(super) fn device(&self) -> Result<Vec<u8>> {
        self.wait()?;
        self.device.read(&self.lanes[0])
    }

    /// Clears device memory: what it has later was copied later.
    pub(super) fn clear_device(&self) -> Result<()> {
        self.wait()?;
        let at = self.device.address;
        let len = self.device.len;
        let lane = &self.lanes[0];
        lane.context().bind_to_thread()?;
        // SAFETY: the link's own memory, on its own stream.
        let cleared = unsafe { result::memset_d8_async(at, 0, len, lane.cu_stream()) };
        cleared.context("clearing device memory")?;
        self.wait()
    }

    /// Part of the device memory, for a kernel.
    pub(super) fn part(&self, at: usize, len: usize) -> Source<'_> {
        Source::Memory { memory: &self.device, at, len }
    }

    /// Tells the device where rows of one length are in pinned memory.
    pub(super) fn set_rows(&mut self, user: &User, pieces: &[Piece]) -> Result<()> {
        let len = pieces.first().context("no rows")?.len;
        ensure!(len % 16 == 0, "rows are of a multiple of 16 bytes");
        ensure!(pieces.len() * len <= self.device.len, "more rows than device memory");
        let mut list = Vec::new();
        for &piece in pieces {
            ensure!(piece.len == len && piece.host % 16 == 0, "{piece:?} is no row");
            let (host, _) = self.places(piece)?;
            list.extend_from_slice(&(host.expose_provenance() as u64).to_le_bytes());
        }
        let addresses = user.allocate(list.len())?;
        addresses.write(&list, &self.lanes[0])?;
        self.rows = Some(Rows { addresses, count: pieces.len(), len });
        Ok(())
    }

    /// Queues a kernel that copies the rows into device memory, one behind the other.
    pub(super) fn rows(&self, user: &User, lane: usize) -> Result<()> {
        let rows = self.rows.as_ref().context("no rows were set")?;
        let count = rows.count as u64;
        let len = rows.len as u64;
        let arguments = [self.device.address, rows.addresses.address, count, len];
        // A block for each row.
        let threads = count * 256;
        // SAFETY: the rows are within pinned memory, and fit device memory: that was looked at. The
        // link keeps all of it.
        unsafe { user.launch("vmem_rows", &arguments, threads, &self.lanes[lane]) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}

/// `cuMemcpyBatchAsync`, which drivers have since 12.8, and with other arguments since 13.0.
enum BatchCopy {
    V1(CopyV1),
    V2(CopyV2),
}

type CopyV1 = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> c_uint;
type CopyV2 = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    sys::CUstream,
) -> c_uint;

/// How the copies of a batch are ordered, with two hints that are not given.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    source_order: c_uint,
    source: [c_uint; 2],
    target: [c_uint; 2],
    flags: c_uint,
}

/// The source may be read at any time from the call on: it does not change before the stream was
/// waited for.
const ORDER_ANY: c_uint = 3;

impl BatchCopy {
    /// # Errors
    ///
    /// Why there is none.
    fn find(env: &Env) -> std::result::Result<Self, String> {
        if env.emulator.is_some() {
            return Err("the emulated driver has none".into());
        }
        // SAFETY: the driver, which is loaded already.
        let library = unsafe { libloading::Library::new("libcuda.so.1") };
        let library = library.map_err(|error| error.to_string())?;
        // For the life of the process, as the driver itself.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        // SAFETY: its type is that of the symbol of this version.
        if let Ok(found) = unsafe { library.get::<CopyV2>(b"cuMemcpyBatchAsync_v2\0") } {
            return Ok(BatchCopy::V2(*found));
        }
        // SAFETY: as above.
        match unsafe { library.get::<CopyV1>(b"cuMemcpyBatchAsync\0") } {
            Ok(found) => Ok(BatchCopy::V1(*found)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// # Safety
    ///
    /// The memory stays until the stream has done everything.
    unsafe fn copy(
        &self,
        to: &mut [u64],
        from: &mut [u64],
        lens: &mut [usize],
        stream: &CudaStream,
    ) -> Result<()> {
        let count = to.len();
        ensure!(count > 0 && from.len() == count && lens.len() == count, "lists of one length");
        let to = to.as_mut_ptr();
        let from = from.as_mut_ptr();
        let lens = lens.as_mut_ptr();
        let mut attributes = Attributes { source_order: ORDER_ANY, ..Attributes::default() };
        // They are those of all copies from the first on.
        let mut first = 0_usize;
        let mut failed = 0_usize;
        let attributes = &raw mut attributes;
        let first = &raw mut first;
        let stream = stream.cu_stream();
        let code = match self {
            BatchCopy::V1(copy) => {
                // SAFETY: the lists are that long, and the caller promises what they point to.
                unsafe {
                    copy(to, from, lens, count, attributes, first, 1, &raw mut failed, stream)
                }
            }
            BatchCopy::V2(copy) => {
                // SAFETY: as above.
                unsafe { copy(to, from, lens, count, attributes, first, 1, stream) }
            }
        };
        ensure!(code == 0, "a batch of {count} copies: error {code}");
        Ok(())
    }
}

// ---- Kernels that read
// -----------------------------------------------------------------------------

/// What a kernel reads.
pub(super) enum Source<'a> {
    Lease(&'a DeviceLease),
    Memory { memory: &'a DeviceMemory, at: usize, len: usize },
}

/// Where kernels put what they read, on a stream of their own.
pub(super) struct Sink {
    scratch: DeviceMemory,
    samples: DeviceMemory,
    stream: Arc<CudaStream>,
}

/// What is kept of each object that a kernel read, in bytes.
const SAMPLE: usize = 1024;

impl Sink {
    /// For objects of at most `len` bytes, of which `count` are read before anybody looks.
    pub(super) fn new(
        user: &User,
        len: usize,
        count: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        let scratch = user.allocate(len)?;
        let samples = user.allocate(count * SAMPLE)?;
        Ok(Sink { scratch, samples, stream: stream.clone() })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Which part of an object the sample in this slot is.
    fn sampled(slot: usize, len: usize) -> Range<usize> {
        let start = (slot * 7919 * 16) % (len - SAMPLE.min(len) + 1);
        start..start + SAMPLE.min(len)
    }

    /// Queues a kernel that reads all of it, one that keeps a part of what was read, and one that
    /// takes so long.
    pub(super) fn read(
        &self,
        user: &User,
        source: &Source<'_>,
        slot: usize,
        work: Duration,
    ) -> Result<()> {
        let (from, len) = match source {
            Source::Lease(lease) => {
                ensure!(Arc::ptr_eq(lease.stream(), &self.stream), "a lease of another stream");
                // SAFETY: it is read on the stream of the lease, which is borrowed.
                (unsafe { lease.device_ptr() }, lease.len())
            }
            Source::Memory { memory, at, len } => {
                ensure!(at + len <= memory.len, "outside of device memory");
                (memory.address + *at as u64, *len)
            }
        };
        ensure!(len <= self.scratch.len, "longer than the scratch memory");
        let sample = Self::sampled(slot, len);
        ensure!((slot + 1) * SAMPLE <= self.samples.len, "more than were to be read");
        // SAFETY: what is read stays while its lease does, which is ended behind it on this stream,
        // or until its memory is freed, which waits; what is written is the sink's own.
        unsafe { user.copy(self.scratch.address, from, len, &self.stream) }?;
        let to = self.samples.address + (slot * SAMPLE) as u64;
        let from = self.scratch.address + sample.start as u64;
        // SAFETY: as above.
        unsafe { user.copy(to, from, sample.len(), &self.stream) }?;
        if work.is_zero() { Ok(()) } else { user.spin(work, &self.stream) }
    }

    /// Nothing was read: what is kept from here on was read from here on.
    pub(super) fn forget(&self) -> Result<()> {
        let to = self.samples.address;
        let len = self.samples.len;
        let stream = self.stream.cu_stream();
        self.stream.context().bind_to_thread()?;
        // SAFETY: the sink's own memory, on its own stream.
        unsafe { result::memset_d8_async(to, 0, len, stream) }.context("clearing samples")
    }

    /// What was kept, by slots, with the part of the object that it is.
    pub(super) fn samples(&self, count: usize, len: usize) -> Result<Vec<(Range<usize>, Vec<u8>)>> {
        let all = self.samples.read(&self.stream)?;
        let slots = all.chunks(SAMPLE).take(count).enumerate();
        Ok(slots
            .map(|(slot, bytes)| {
                let part = Self::sampled(slot, len);
                let bytes = bytes[..part.len()].to_vec();
                (part, bytes)
            })
            .collect())
    }
}

/// Adds to each byte of an object that is leased for it.
pub(super) fn add(user: &User, lease: &mut DeviceLeaseMut, value: u8) -> Result<()> {
    // SAFETY: it is used on the stream of the lease, before that is dropped.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above, and alone.
    unsafe { user.add(at, lease.len(), value, lease.stream()) }
}

/// Takes what is in device memory down, to compare it.
pub(super) struct Reader {
    into: Pinned,
    stream: Arc<CudaStream>,
}

impl Reader {
    /// Of objects of at most `len` bytes.
    pub(super) fn new(user: &User, len: usize) -> Result<Self> {
        Ok(Reader { into: user.pinned(len)?, stream: user.context.new_stream()? })
    }

    /// An object as device memory has it.
    pub(super) async fn object(
        &mut self,
        vmem: &VirtualMemory,
        handle: &VMemHandle,
    ) -> Result<&[u8]> {
        ensure!(vmem.residency(handle)?.vram, "it is not in device memory");
        self.leased(vmem, handle).await
    }

    /// An object as device memory has it, promoted to it first if it is elsewhere.
    pub(super) async fn leased(
        &mut self,
        vmem: &VirtualMemory,
        handle: &VMemHandle,
    ) -> Result<&[u8]> {
        let lease = vmem.device_on(handle, &self.stream).await.context("a lease")?;
        ensure!(lease.len() <= self.into.len(), "longer than what reads it");
        self.stream.context().bind_to_thread()?;
        // SAFETY: it is read on the stream of the lease, before that is dropped.
        let from = unsafe { lease.device_ptr() };
        let into = self.into.address();
        let stream = self.stream.cu_stream();
        // SAFETY: the memory is this type's, which waits below.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(into.cast(), from, lease.len(), stream) };
        let waited = self.stream.synchronize();
        copied.result().context("reading an object")?;
        waited.context("reading an object")?;
        Ok(&self.into.bytes()[..lease.len()])
    }
}

// ---- Ends
// --------------------------------------------------------------------------------------------

/// Told by the driver's thread when a stream has come so far.
#[derive(Default)]
pub(super) struct Signal {
    fired: AtomicBool,
    waker: AtomicWaker,
}

impl Signal {
    /// One that stays, for a host function may come late.
    pub(super) fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    pub(super) fn fire(&self) {
        self.fired.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits until it fires, and makes it ready for the next time.
    pub(super) async fn wait(&self) {
        std::future::poll_fn(|context| {
            self.waker.register(context.waker());
            match self.fired.swap(false, Ordering::SeqCst) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    /// Has the driver fire it behind what is queued.
    pub(super) fn fire_behind(&'static self, stream: &CudaStream) -> Result<()> {
        let this: *const Signal = self;
        let argument = this.cast_mut().cast();
        // SAFETY: the function takes a signal, which is never freed.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), fire, argument) }
            .context("a host function")
    }
}

unsafe extern "C" fn fire(signal: *mut c_void) {
    // SAFETY: it is that of a `Signal` that is never freed.
    let signal = unsafe { &*signal.cast::<Signal>() };
    signal.fire();
}

/// Two small pieces of device memory, and copies from one to the other.
pub(super) struct Small {
    pub(super) from: DeviceMemory,
    pub(super) to: DeviceMemory,
}

impl Small {
    pub(super) fn new(user: &User, len: usize) -> Result<Self> {
        Ok(Small { from: user.allocate(len)?, to: user.allocate(len)? })
    }

    /// Queues a copy within device memory.
    pub(super) fn copy(&self, stream: &CudaStream) -> Result<()> {
        let to = self.to.address;
        let from = self.from.address;
        let len = self.from.len;
        stream.context().bind_to_thread()?;
        // SAFETY: both are that long, and the driver waits for the copy before it frees them.
        unsafe { result::memcpy_dtod_async(to, from, len, stream.cu_stream()) }.context("a copy")
    }
}

/// Device memory of the user as the target of a gather.
pub(super) fn target<'a>(
    memory: &'a mut DeviceMemory,
    stream: &Arc<CudaStream>,
) -> DeviceTarget<'a> {
    // SAFETY: it is borrowed for as long as the target, of the context of all users.
    unsafe { DeviceTarget::from_raw(memory.address, memory.len, stream) }
}

/// An event that has a time.
pub(super) fn timed_event(user: &User) -> Result<CudaEvent> {
    user.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).context("an event")
}

/// An event that a thread sleeps on.
pub(super) fn sleeping_event(user: &User) -> Result<CudaEvent> {
    user.context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC)).context("an event")
}
