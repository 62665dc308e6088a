//! Work in the context of the tier, on threads that are not ours.
//!
//! Invariant: a thread of the user's has its own context back after, and no capture of its owner is
//! broken. Called by all that ends, orders or frees on a thread of the user's.

#![allow(unsafe_code)]

use std::cell::Cell;

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use crate::card::{Card, can_stick};

/// So often a thread enters the context that has none, before it is tried without.
const ENTERS_MAX: u32 = 64;

thread_local! {
    /// How often this thread still enters the context for what may need it.
    static ENTERS: Cell<u32> = const { Cell::new(0) };
}

impl Card {
    /// Works in the context on a thread that is not ours, which has its own context back after.
    ///
    /// For calls that no capture forbids; `visit` is for others.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T, DriverError> {
        enter(self.context(), work)
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
