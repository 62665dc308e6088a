//! The order of streams: what one gets comes after what another one has, and the host waits for
//! neither.
//!
//! Invariant: no graph that is being captured gets part of it, and no event is waited for that was
//! recorded for something else meanwhile, since the caller has a share of it. Called by leases and
//! gathers.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result, sys};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{DeviceAccess, UseEnd};

use crate::card::{Card, failed, told};
use crate::event::{Event, is_capturing};
use crate::ext::tier;

/// Where the work of a lease ends.
#[derive(Debug)]
pub(crate) struct StreamEnd {
    /// Kept, so that no other stream has its handle.
    stream: Arc<CudaStream>,
    event: Arc<Event>,
}

impl StreamEnd {
    /// As leases tell it to others.
    pub(crate) fn of(stream: &Arc<CudaStream>, event: &Arc<Event>) -> UseEnd {
        Arc::new(StreamEnd { stream: stream.clone(), event: event.clone() })
    }

    /// Whether what comes after the other one comes after this too.
    fn is_before(&self, other: &StreamEnd) -> bool {
        let is_same = Arc::ptr_eq(&self.event, &other.event);
        let is_earlier = Arc::ptr_eq(&self.stream, &other.stream)
            && self.event.span().is_before(other.event.span());
        is_same || is_earlier
    }

    fn hold_back(&self, stream: &CudaStream) -> Result<(), DriverError> {
        if self.event.is_spoilt() {
            // It may be part of a graph. Another takes its place soon.
            return Err(DriverError(sys::CUresult::CUDA_ERROR_CAPTURED_EVENT));
        }
        self.event.hold_back(stream)
    }
}

/// Puts what a stream gets from here on behind these.
///
/// # Errors
///
/// `InvalidConfig` if a graph is being captured on it; `Device`.
pub(crate) fn follow(
    access: &DeviceAccess,
    stream: &Arc<CudaStream>,
    after: Vec<UseEnd>,
) -> Result<(), VirtualMemoryError> {
    let mut events: Vec<&StreamEnd> = Vec::new();
    for end in after.iter().filter_map(|end| end.downcast_ref::<StreamEnd>()) {
        // A stream comes after itself.
        if Arc::ptr_eq(&end.stream, stream) || vmem_core::planted!("lease-unordered") {
            continue;
        }
        if events.iter().any(|other| end.is_before(other)) {
            continue;
        }
        events.retain(|other| !other.is_before(end));
        events.push(end);
    }
    if events.is_empty() {
        return Ok(());
    }
    let ordered = tier(access)?.card()?.context().enter(|| {
        // An event from outside of a capture would break it.
        if is_capturing(stream)? {
            return Ok(false);
        }
        events.iter().try_for_each(|end| end.hold_back(stream)).map(|()| true)
    });
    match ordered.and_then(|ordered| ordered) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let reason = "a graph is being captured on it";
            Err(VirtualMemoryError::invalid_config("stream", reason))
        }
        Err(error) => Err(access.fault(failed("ordering streams", error))),
    }
}

impl Card {
    /// What `then` gets from here on comes after what `first` has, without a wait of the host.
    /// False if that cannot be had.
    pub(crate) fn order(&self, first: &CudaStream, then: &CudaStream) -> bool {
        let ordered = self.context().enter(|| {
            // An event from outside of a capture would break it.
            if is_capturing(then)? && !is_capturing(first)? {
                return Err(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION));
            }
            let event = self.events().take()?;
            event.record(first)?;
            event.hold_back(then)
        });
        let ordered = ordered.and_then(|ordered| ordered);
        if let Err(error) = ordered {
            tracing::debug!(
                target: "vmem::gpu", error = %told("ordering streams", error), "refused"
            );
        }
        ordered.is_ok()
    }

    /// As `order`, but where that cannot be had the calling thread waits for `first`.
    pub(crate) fn order_or_wait(&self, first: &CudaStream, then: &CudaStream) -> bool {
        let wait = || {
            // A wait would break its capture.
            if is_capturing(first)? {
                return Err(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
            }
            // SAFETY: the stream is alive.
            unsafe { result::stream::synchronize(first.cu_stream()) }
        };
        self.order(first, then) || self.context().visit(wait).and_then(|waited| waited).is_ok()
    }
}
