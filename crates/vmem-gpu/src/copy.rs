//! Copies to and from device memory, and the ownership of what they touch.
//!
//! Ownership: a copy that was handed to the driver is in a [`Batch`], with the bytes, the buffer
//! and the share of the device range that it touches. A batch gives them up only after its event
//! was seen complete, or the context is dead; one that is dropped otherwise leaks them. So no
//! future that is dropped, no panic and no end of a runtime frees memory under a copy. Called by
//! the lanes.

#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::sync::Arc;

use bytes::Bytes;
use cudarc::driver::{CudaStream, DriverError, result, sys};
use futures::channel::oneshot;
use vmem_core::backend::{DeviceError, DeviceRange, InUse, IoBuf, Part};

use crate::call::{Entered, Foreign};
use crate::card::{Card, failed};
use crate::event::{Bell, Event, Ring, ask_for_notice};

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
        // Before the answer, since its receiver may look at the ledger.
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

/// A stream for one direction, and one on which its ends are notified, so that no copy waits for
/// that.
pub(crate) struct CopyStream {
    stream: Arc<CudaStream>,
    notices: Arc<CudaStream>,
    ring: &'static Ring,
    card: Arc<Card>,
}

/// Operations that were handed to the driver together.
pub(crate) struct Batch {
    /// None where the driver refused it, in passing: it is asked again.
    event: Option<Event>,
    works: ManuallyDrop<Vec<Issued>>,
}

/// An operation that was handed to the driver.
struct Issued {
    work: Work,
    /// What of object space it touches.
    uses: Vec<InUse>,
    /// Its part in a call over memory of a caller.
    entered: Option<Entered>,
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
        let context = card.context();
        let stream = context.new_stream()?;
        let notices = context.new_stream()?;
        Ok(CopyStream { stream, notices, ring: Ring::new(bell), card })
    }

    /// The stream itself, for ordering others behind it.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Hands operations to the driver, in order, and asks for a notice of their end.
    pub(crate) fn submit(&self, works: Vec<Work>) -> Batch {
        let issue = |mut work: Work| {
            let mut uses = Vec::new();
            let mut entered = None;
            let issued = self.issue(&mut work, &mut uses, &mut entered);
            let refused = issued.err().map(|error| failed(work.name(), error));
            Issued { work, uses, entered, refused }
        };
        let works = works.into_iter().map(issue).collect();
        let mut batch = Batch { event: None, works: ManuallyDrop::new(works) };
        if let Err(error) = self.mark(&mut batch) {
            let error = crate::card::told("recording an event", error);
            tracing::debug!(target: "vmem::gpu", %error, "it is tried again");
        }
        batch
    }

    fn issue(
        &self,
        work: &mut Work,
        uses: &mut Vec<InUse>,
        entered: &mut Option<Entered>,
    ) -> Result<(), DriverError> {
        let stream = self.stream.cu_stream();
        match work {
            Work::Upload { to, offset, bytes, .. } => {
                check(*offset, bytes.len(), to)?;
                self.up(to.address() + *offset as u64, bytes, uses)
            }
            Work::Zero { range, .. } => {
                // SAFETY: the range is the operation's until it has ended: it is in the batch,
                // which gives nothing up before.
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
                let _open = to.enter(*offset, len, entered)?;
                let target = to.address + *offset as u64;
                match source {
                    Source::Device { range, offset, len } => {
                        check(*offset, *len, range)?;
                        let from = range.address() + *offset as u64;
                        // SAFETY: the range as above; the target is promised to stay while the
                        // batch has a share of the call.
                        unsafe { result::memcpy_dtod_async(target, from, *len, stream) }
                    }
                    Source::Host(bytes) => self.up(target, bytes, uses),
                }
            }
            Work::Take { from, offset, len, into, .. } => {
                let _open = from.enter(*offset, *len, entered)?;
                let into = into.get_mut(..*len).ok_or(INVALID)?;
                self.down(into, from.address + *offset as u64, uses)
            }
        }
    }

    /// Copies up, in parts of which none crosses a registration.
    fn up(&self, to: u64, bytes: &[u8], uses: &mut Vec<InUse>) -> Result<(), DriverError> {
        for Part { range, in_use, .. } in self.card.parts(bytes) {
            uses.extend(in_use);
            let to = to + range.start as u64;
            let part = &bytes[range];
            // SAFETY: the target is the operation's until it has ended, or is promised to stay
            // while it has a share of its call, and so are the bytes, which do not change: all is
            // in the batch, which gives nothing up before that.
            unsafe { result::memcpy_htod_async(to, part, self.stream.cu_stream()) }?;
        }
        Ok(())
    }

    /// Copies down, likewise.
    fn down(&self, into: &mut [u8], from: u64, uses: &mut Vec<InUse>) -> Result<(), DriverError> {
        for Part { range, in_use, .. } in self.card.parts(into) {
            uses.extend(in_use);
            let from = from + range.start as u64;
            let part = &mut into[range];
            // SAFETY: as above; the buffer moves with the batch, its memory does not, and it has no
            // other owner.
            unsafe { result::memcpy_dtoh_async(part, from, self.stream.cu_stream()) }?;
        }
        Ok(())
    }

    /// Records an event behind what was issued, and has the bell rung after it.
    fn mark(&self, batch: &mut Batch) -> Result<(), DriverError> {
        let event = self.card.events().take()?;
        event.record(&self.stream)?;
        // Without it the watchdog still sees its end.
        ask_for_notice(&self.notices, &event, self.ring);
        batch.event = Some(event);
        Ok(())
    }

    /// Whether a batch has ended.
    ///
    /// # Errors
    ///
    /// What the driver says, which may pass: the batch gets another event at the next look.
    pub(crate) fn has_ended(&self, batch: &mut Batch) -> Result<bool, DriverError> {
        match &batch.event {
            Some(event) => {
                let passed = event.has_passed();
                let ended = passed.map(|passed| passed || vmem_core::planted!("vram-completion"));
                if ended.is_err()
                    && let Some(event) = batch.event.take()
                {
                    event.discard();
                }
                ended
            }
            None => self.mark(batch).map(|()| false),
        }
    }

    /// Waits for everything; after the context has died this returns at once.
    pub(crate) fn drain(&self) {
        let _ = self.stream.synchronize();
    }
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
    /// Answers everything in it; `has_ended` has said so.
    pub(crate) fn end(self) {
        self.answer(None);
    }

    /// Answers everything in it with an error; the context is dead and was drained.
    pub(crate) fn end_dead(self, error: &DeviceError) {
        self.answer(Some(error));
    }

    fn answer(mut self, error: Option<&DeviceError>) {
        drop(self.event.take());
        // SAFETY: taken once: `self` is forgotten just below.
        let works = unsafe { ManuallyDrop::take(&mut self.works) };
        std::mem::forget(self);
        for Issued { work, uses, entered, refused } in works {
            drop((uses, entered));
            let refused = refused.filter(|_| !vmem_core::planted!("refused-copy"));
            let error = error.cloned().or(refused);
            work.end(error.map_or(Ok(()), Err));
        }
    }
}
