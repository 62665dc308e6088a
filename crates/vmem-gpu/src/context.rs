//! The context of a device: whether it lives, and work in it on threads that are not ours.
//!
//! Invariant: a thread of the user's has its own context back after, and no capture of its owner is
//! broken; a context counts as dead only by errors that can stick. Called by all that ends, orders
//! or frees on a thread of the user's.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::card::told;
use crate::lane::Lost;

/// Looks at a context that all have to fail before it counts as dead, and the pause between two.
const LOOKS: usize = 3;
const LOOK_PAUSE: Duration = Duration::from_millis(2);
/// So often a thread enters the context that has none, before it is tried without.
const ENTERS_MAX: u32 = 64;

thread_local! {
    /// How often this thread still enters the context for what may need it.
    static ENTERS: Cell<u32> = const { Cell::new(0) };
}

/// The context of a device, which stays as long as this.
#[derive(Debug)]
pub(crate) struct Context {
    cuda: Arc<CudaContext>,
    lost: Lost,
}

impl Context {
    pub(crate) fn new(cuda: Arc<CudaContext>, lost: Lost) -> Self {
        Context { cuda, lost }
    }

    /// As cudarc has it; it tracks no events.
    pub(crate) fn cuda(&self) -> &Arc<CudaContext> {
        &self.cuda
    }

    /// Makes it that of the calling thread, which is one of ours.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn bind(&self) -> Result<(), DriverError> {
        self.cuda.bind_to_thread()?;
        relax_capture()
    }

    /// Why the device serves no more, once it does not.
    pub(crate) fn lost(&self) -> Option<Arc<str>> {
        self.lost.get().cloned()
    }

    /// Whether it is dead, also if that was not noticed before.
    ///
    /// Called after an error, on any thread. An error that passes, of whatever function, is no
    /// proof: several looks in a row have to fail, each with an error that can stick.
    pub(crate) fn is_dead(&self) -> bool {
        let one_look = vmem_core::planted!("gpu-sticky") && self.lost.set("an error".into());
        if one_look || self.lost.get().is_some() {
            return true;
        }
        let mut last = None;
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::sleep(LOOK_PAUSE);
            }
            match self.visit(result::mem_get_info).and_then(|free| free) {
                Err(error) if can_stick(error) => last = Some(error),
                _ => return false,
            }
        }
        let Some(error) = last else { return false };
        let reason: Arc<str> = told("the device failed", error).into();
        if self.lost.set(reason.clone()) {
            tracing::error!(
                target: "vmem::fallback", error = %reason,
                "the VRAM tier is lost; the copies below serve"
            );
        }
        true
    }

    /// Works in the context on a thread that is not ours, which has its own context back after.
    ///
    /// For calls that no capture forbids; `visit` is for others.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T, DriverError> {
        enter(&self.cuda, work)
    }

    /// Works on a stream and its events, which name their context: so it has not to be entered on a
    /// thread that has any. Tried again in the context if the driver wants that.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn on_stream<T>(
        &self,
        stream: &CudaStream,
        mut work: impl FnMut() -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        // The first handles mean another stream in each context.
        let names_context = stream.cu_stream().addr() > 2;
        if names_context && ENTERS.get() == 0 && !vmem_core::planted!("gpu-always-pushes") {
            match work() {
                Err(error) if can_stick(error) => {
                    // Of another context, or for want of one.
                    let done = self.enter(&mut work)??;
                    ENTERS.set(ENTERS_MAX);
                    return Ok(done);
                }
                done => return done,
            }
        }
        ENTERS.set(ENTERS.get().saturating_sub(1));
        self.enter(work)?
    }

    /// Works in the context on a thread that is not ours, without breaking a capture of its owner.
    pub(crate) fn visit<T>(&self, work: impl FnOnce() -> T) -> Result<T, DriverError> {
        self.enter(|| {
            let relaxed = exchange_capture(relaxed());
            let done = work();
            relaxed.and_then(exchange_capture).map(|_| done)
        })?
    }
}

/// Works in a context on a thread that is not ours, which has its own context back after.
pub(crate) fn enter<T>(context: &CudaContext, work: impl FnOnce() -> T) -> Result<T, DriverError> {
    let mut before = std::ptr::null_mut();
    // SAFETY: the context is retained, and is popped below.
    unsafe { sys::cuCtxPushCurrent_v2(context.cu_ctx()) }.result()?;
    let done = work();
    // SAFETY: a place for what was pushed above.
    unsafe { sys::cuCtxPopCurrent_v2(&mut before) }.result()?;
    Ok(done)
}

/// Sets how this thread minds captures; returns how it did.
fn exchange_capture(
    mut mode: sys::CUstreamCaptureMode,
) -> Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: the argument is a place for the mode that was set before.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    Ok(mode)
}

/// The mode of a thread that captures of others do not hinder.
fn relaxed() -> sys::CUstreamCaptureMode {
    if vmem_core::planted!("capture-careless") {
        return sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    }
    sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED
}

/// Lets calls on this thread, one of our own, leave captures on other threads alone.
///
/// # Errors
///
/// What the driver says.
pub(crate) fn relax_capture() -> Result<(), DriverError> {
    exchange_capture(relaxed()).map(drop)
}

/// Whether an error may be one that ends its context: not for want of memory, or of a capture.
fn can_stick(DriverError(code): DriverError) -> bool {
    let passing = [
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        sys::CUresult::CUDA_ERROR_NOT_READY,
        sys::CUresult::CUDA_ERROR_NOT_PERMITTED,
    ];
    !passing.contains(&code) && !(900..910).contains(&(code as u32))
}
