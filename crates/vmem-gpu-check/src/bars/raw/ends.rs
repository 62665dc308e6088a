//! How the end of a kernel is seen: by a host function, by a small copy behind it, by an event.
//!
//! Invariant: a signal lives until no host function can fire it. Called by the bars.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use anyhow::{Context, Result};
use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use futures::task::AtomicWaker;
use vmem::gpu::DeviceTarget;

use crate::user::{DeviceMemory, User};

/// Signalled by the driver's thread when a stream has come this far.
#[derive(Default)]
pub(in crate::bars) struct Signal {
    fired: AtomicBool,
    waker: AtomicWaker,
}

impl Signal {
    /// One that stays, for a host function may come late.
    pub(in crate::bars) fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    pub(in crate::bars) fn fire(&self) {
        self.fired.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Waits until it fires, and makes it ready for the next time.
    pub(in crate::bars) async fn wait(&self) {
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
    pub(in crate::bars) fn fire_behind(&'static self, stream: &CudaStream) -> Result<()> {
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
pub(in crate::bars) struct Small {
    pub(in crate::bars) from: DeviceMemory,
    pub(in crate::bars) to: DeviceMemory,
}

impl Small {
    pub(in crate::bars) fn new(user: &User, len: usize) -> Result<Self> {
        Ok(Small { from: user.allocate(len)?, to: user.allocate(len)? })
    }

    /// Queues a copy within device memory.
    pub(in crate::bars) fn copy(&self, stream: &CudaStream) -> Result<()> {
        let to = self.to.address;
        let from = self.from.address;
        let len = self.from.len;
        stream.context().bind_to_thread()?;
        // SAFETY: both are that long, and the driver waits for the copy before it frees them.
        unsafe { result::memcpy_dtod_async(to, from, len, stream.cu_stream()) }.context("a copy")
    }
}

/// Device memory of the user as the target of a gather.
pub(in crate::bars) fn target<'a>(
    memory: &'a mut DeviceMemory,
    stream: &Arc<CudaStream>,
) -> DeviceTarget<'a> {
    // SAFETY: it is borrowed for as long as the target, of the context of all users.
    unsafe { DeviceTarget::from_raw(memory.address, memory.len, stream) }
}

/// An event that has a time.
pub(in crate::bars) fn timed_event(user: &User) -> Result<CudaEvent> {
    user.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).context("an event")
}

/// An event that a thread sleeps on.
pub(in crate::bars) fn sleeping_event(user: &User) -> Result<CudaEvent> {
    user.context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC)).context("an event")
}
