//! Events and order: how far a stream has come, which streams follow it, and what is woken then.
//!
//! Invariant: nothing here goes through a context object of the user, which may hold a stale error,
//! and nothing here waits for a stream unless its name says so. An event that is dropped goes back
//! to its pool: recording it again does not change what was made to wait for it. Called by leases,
//! gathers, lanes and the watch.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use parking_lot::Mutex;

use crate::card::{Card, told};
use crate::context::enter;
use crate::lend::Lent;

/// Events that a pool keeps; further ones are destroyed.
const SPARE_MAX: usize = 4096;
/// Events that are made at a time, in one visit of the context, and lots that there are from the
/// start.
const LOT: usize = 64;
const LOTS_MIN: usize = 8;

/// An event of the driver.
#[derive(Clone, Copy, Debug)]
struct Raw(sys::CUevent);

// SAFETY: the driver's events may be used from any thread.
unsafe impl Send for Raw {}
// SAFETY: and from several at once; what is shared is the handle alone.
unsafe impl Sync for Raw {}

/// Events that can be recorded again.
#[derive(Debug)]
pub(crate) struct EventPool {
    context: Arc<CudaContext>,
    spare: Mutex<Vec<Raw>>,
}

impl EventPool {
    pub(crate) fn new(context: Arc<CudaContext>) -> Arc<Self> {
        Arc::new(EventPool { context, spare: Mutex::new(Vec::new()) })
    }

    /// An event, on any thread: a new one belongs to the context in which it is made.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn take(self: &Arc<Self>) -> Result<Event, DriverError> {
        let spare = self.spare.lock().pop();
        let raw = match spare {
            Some(raw) => raw,
            None => self.make_lot()?,
        };
        Ok(Event {
            raw: Some(raw),
            pool: self.clone(),
            span: Span::default(),
            is_spoilt: AtomicBool::new(false),
        })
    }

    /// Makes the first events, on a thread of ours. Where the driver refuses, they are made when
    /// they are needed.
    pub(crate) fn prepare(&self) {
        let first: Vec<Raw> = (0..LOTS_MIN).map_while(|_| self.make_lot().ok()).collect();
        self.spare.lock().extend(first);
    }

    /// Makes some events, and returns one of them. Entering the context costs as much as two
    /// events, so it is not done for each.
    fn make_lot(&self) -> Result<Raw, DriverError> {
        let create = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map(Raw);
        let (first, others) = enter(&self.context, || {
            let first = create()?;
            // What is refused now is asked for when it is needed.
            let others: Vec<Raw> =
                std::iter::repeat_with(create).map_while(Result::ok).take(LOT - 1).collect();
            Ok::<_, DriverError>((first, others))
        })??;
        self.spare.lock().extend(others);
        Ok(first)
    }

    fn destroy(&self, events: Vec<Raw>) {
        let destroy = |Raw(event)| {
            // SAFETY: it was created once, and has no owner any more.
            unsafe { result::event::destroy(event) }
        };
        let destroyed = enter(&self.context, || events.into_iter().try_for_each(destroy));
        if let Err(error) = destroyed.and_then(|destroyed| destroyed) {
            tracing::debug!(
                target: "vmem::gpu", error = %told("destroying events", error), "refused"
            );
        }
    }
}

impl Drop for EventPool {
    fn drop(&mut self) {
        let spare = std::mem::take(self.spare.get_mut());
        self.destroy(spare);
    }
}

/// A place in the order of a stream.
#[derive(Debug)]
pub(crate) struct Event {
    /// None while it is being dropped.
    raw: Option<Raw>,
    pool: Arc<EventPool>,
    /// When it was recorded.
    span: Span,
    is_spoilt: AtomicBool,
}

/// Some time between two stamps, each later than all before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

impl Span {
    /// Whether it had ended when the other began. Threads that record on one stream at once say
    /// nothing about the order of their events.
    pub(crate) fn is_before(self, other: Span) -> bool {
        self.ended < other.began || vmem_core::planted!("gpu-unordered")
    }
}

/// The next stamp.
fn stamp() -> u64 {
    static STAMPS: AtomicU64 = AtomicU64::new(0);
    STAMPS.fetch_add(1, Ordering::SeqCst)
}

impl Event {
    fn handle(&self) -> sys::CUevent {
        self.raw.map_or(std::ptr::null_mut(), |raw| raw.0)
    }

    /// When it was recorded for a lease.
    pub(crate) fn span(&self) -> Span {
        self.span
    }

    /// Puts it behind everything that the stream has by now.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn record(&self, stream: &CudaStream) -> Result<(), DriverError> {
        // SAFETY: both are alive.
        unsafe { result::event::record(self.handle(), stream.cu_stream()) }
    }

    /// Whether what it was recorded behind has ended. On a thread of ours, or in a visit: elsewhere
    /// it would break captures.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn has_passed(&self) -> Result<bool, DriverError> {
        // SAFETY: it is alive.
        match unsafe { result::event::query(self.handle()) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a stream wait for it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn hold_back(&self, stream: &CudaStream) -> Result<(), DriverError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(stream.cu_stream(), self.handle(), flags) }
    }

    /// The driver fails on it: it is destroyed in the end, and not used again.
    pub(crate) fn discard(&self) {
        self.is_spoilt.store(true, Ordering::Relaxed);
    }

    /// Whether the driver has failed on it.
    pub(crate) fn is_spoilt(&self) -> bool {
        self.is_spoilt.load(Ordering::Relaxed)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Some(raw) = self.raw.take() else { return };
        let mut spare = self.pool.spare.lock();
        if spare.len() < SPARE_MAX && !*self.is_spoilt.get_mut() {
            return spare.push(raw);
        }
        drop(spare);
        self.pool.destroy(vec![raw]);
    }
}

/// Why there is no event behind what a stream has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unmarked {
    /// A graph is being captured on it, broken or not: an event would be part of the graph.
    Captured,
    /// The driver refused.
    Refused(DriverError),
}

impl Card {
    /// An event behind everything that the stream, and what was lent on it, has by now. On any
    /// thread; waits for nothing. What was lent is ended only if there is an event.
    pub(crate) fn mark(
        &self,
        stream: &CudaStream,
        lent: &mut Vec<Lent>,
    ) -> Result<Event, Unmarked> {
        let is_lent = !lent.is_empty();
        let began = stamp();
        let mut mark = || {
            if is_capturing(stream)? && !vmem_core::planted!("gpu-capture") {
                return Ok(None);
            }
            let event = self.events().take()?;
            // This has the stream wait for uses of it on others.
            lent.clear();
            if vmem_core::planted!("gpu-stale") && stream.context().check_err().is_err() {
                let _ = stream.synchronize();
            }
            event.record(stream)?;
            Ok(Some(event))
        };
        let marked = if is_lent {
            self.context().enter(mark).and_then(|marked| marked)
        } else {
            self.context().on_stream(stream, &mut mark)
        };
        let mut event = marked.map_err(Unmarked::Refused)?.ok_or(Unmarked::Captured)?;
        event.span = Span { began, ended: stamp() };
        Ok(event)
    }

    /// Whether a stream has done all that it has by now. On any thread; false where that cannot be
    /// said.
    pub(crate) fn has_caught_up(&self, stream: &CudaStream) -> bool {
        let passed = self.context().visit(|| {
            let event = self.mark(stream, &mut Vec::new()).ok();
            event.is_some_and(|event| event.has_passed().unwrap_or(false))
        });
        passed.unwrap_or(false)
    }
}

/// Whether a graph is being captured on a stream. On a thread that has its context, or through
/// `on_stream`.
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

/// Wakes a thread of ours.
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

/// What the driver calls when an event may have passed. A hint: what counts is what the event says.
#[derive(Debug)]
pub(crate) struct Ring {
    rung: AtomicBool,
    bell: Arc<Bell>,
}

impl Ring {
    /// It is never freed: a host function may come late, or after everything else.
    pub(crate) fn new(bell: Arc<Bell>) -> &'static Self {
        Box::leak(Box::new(Ring { rung: AtomicBool::new(false), bell }))
    }

    /// Whether it was rung since this was last asked.
    pub(crate) fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }
}

/// The host function: a store and a wake; no call of the driver, no lock, nothing freed.
unsafe extern "C" fn ring(ring: *mut c_void) {
    // SAFETY: the pointer is that of a `Ring`, which is never freed.
    let ring = unsafe { &*ring.cast::<Ring>() };
    ring.rung.store(true, Ordering::Release);
    ring.bell.ring();
}

/// Has a ring rung behind an event. If the driver refuses, the waiter queries the event itself.
pub(crate) fn ask_for_notice(stream: &CudaStream, event: &Event, to: &'static Ring) {
    let asked = event.hold_back(stream).and_then(|()| {
        let argument = std::ptr::from_ref(to).cast_mut().cast();
        // SAFETY: the function takes the ring, which is never freed.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), ring, argument) }
    });
    if let Err(error) = asked {
        tracing::debug!(
            target: "vmem::gpu", error = %told("asking for a notice", error), "refused"
        );
    }
}
