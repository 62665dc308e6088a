//! Copies to and from device memory, and the ownership of what they touch.
//!
//! Ownership: a copy that was handed to the driver is in a [`Flight`], with the bytes, the buffer
//! and the share of the device range that it touches. A flight gives them up only after an event
//! behind it was seen complete, or the context is dead; one that is dropped otherwise leaks them.
//! So no future that is dropped, no panic and no end of a runtime frees memory under a copy. Called
//! by the lanes, and by gathers.

#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::sync::Arc;

use bytes::Bytes;
use cudarc::driver::{CudaStream, DriverError, result, sys};
use futures::channel::oneshot;
use vmem_core::backend::{DeviceError, DeviceRange, InUse, IoBuf, Part};

use crate::call::{Call, Entered, Foreign};
use crate::card::{Card, failed};
use crate::event::{Bell, Event, Ring, ask_for_notice};
use crate::given::{Given, Reached, given};
use crate::issue::{Move, Way, issue};
use crate::pieces::Table;

/// One operation, with all that it touches.
pub(crate) enum Work {
    /// Into device memory of a caller.
    Give {
        to: Foreign,
        pieces: Vec<Given>,
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
    /// From one range to another.
    Within {
        from: Arc<DeviceRange>,
        to: Arc<DeviceRange>,
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
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Work::Upload { .. } => "copying to the device",
            Work::Within { .. } => "moving on the device",
            Work::Zero { .. } => "zeroing device memory",
            Work::Download { .. } => "copying from the device",
            Work::Give { .. } => "gathering",
            Work::Take { .. } => "scattering",
        }
    }

    /// How many copies it is, about.
    pub(crate) fn copies(&self) -> usize {
        match self {
            Work::Give { pieces, .. } => pieces.len(),
            _ => 1,
        }
    }

    /// The bytes of an object that it copies to the device.
    pub(crate) fn uploaded(&self) -> usize {
        match self {
            Work::Upload { bytes, .. } => bytes.len(),
            _ => 0,
        }
    }

    /// Whether it is for an object, and nobody awaits it any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        matches!(self, Work::Upload { reply, .. } if reply.is_canceled())
    }

    /// Gives back what it owns and answers.
    pub(crate) fn end(self, outcome: Result<(), DeviceError>) {
        // Before the answer, since its receiver may look at the ledger.
        match self {
            Work::Upload { to, bytes, reply, .. } => {
                drop((to, bytes));
                drop(reply.send(outcome));
            }
            Work::Within { from, to, reply } => {
                drop((from, to));
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
            Work::Give { to, pieces, reply } => {
                drop((to, pieces));
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
    flight: Flight,
}

/// What the driver uses until its operations have ended: whatever drops it before leaks it.
pub(crate) struct Flight(ManuallyDrop<InFlight>);

/// What of a flight the driver uses.
pub(crate) struct InFlight {
    pub(crate) works: Vec<Issued>,
    /// The tables of kernels.
    pub(crate) tables: Vec<Table>,
}

/// A flight that is given back by the drop of this: for what is kept for as long as it is used.
pub(crate) struct Kept(Option<Flight>);

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.0.take().map(Flight::end));
    }
}

/// An operation that was handed to the driver.
pub(crate) struct Issued {
    pub(crate) work: Work,
    /// What of object space it touches.
    uses: Vec<InUse>,
    /// Its part in a call over memory of a caller.
    pub(crate) entered: Option<Entered>,
    /// What the driver said, if it refused it at once; a part of it may have been accepted.
    pub(crate) refused: Option<DeviceError>,
}

impl Flight {
    pub(crate) fn new(works: Vec<Work>) -> Self {
        Self::of(works.into_iter().map(Issued::new).collect())
    }

    pub(crate) fn of(works: Vec<Issued>) -> Self {
        Flight(ManuallyDrop::new(InFlight { works, tables: Vec::new() }))
    }

    pub(crate) fn inner(&mut self) -> &mut InFlight {
        &mut self.0
    }

    /// What the driver refused of it.
    pub(crate) fn refused(&self) -> Option<DeviceError> {
        self.0.works.iter().find_map(|issued| issued.refused.clone())
    }

    /// The driver uses it no more.
    fn end(self) -> InFlight {
        ManuallyDrop::into_inner(self.0)
    }

    /// It ends with the drop of what this returns.
    pub(crate) fn kept(self) -> Kept {
        Kept(Some(self))
    }
}

impl CopyStream {
    /// On the thread that uses it, bound to the context.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn new(card: Arc<Card>, bell: Arc<Bell>) -> Result<Self, DriverError> {
        let context = card.context().cuda();
        // A kernel that copies does not queue behind those of users.
        let (_, greatest) = result::stream::get_priority_range()?;
        let stream = context.new_stream_with_priority(greatest)?;
        let notices = context.new_stream()?;
        Ok(CopyStream { stream, notices, ring: Ring::new(bell), card })
    }

    /// The stream itself, for ordering others behind it.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Hands operations to the driver, in no order among each other, and asks for a notice of their
    /// end.
    pub(crate) fn submit(&self, works: Vec<Work>) -> Batch {
        let mut flight = Flight::new(works);
        issue(&self.card, &self.stream, flight.inner());
        let mut batch = Batch { event: None, flight };
        if let Err(error) = self.mark(&mut batch) {
            let error = crate::card::told("recording an event", error);
            tracing::debug!(target: "vmem::gpu", %error, "it is tried again");
        }
        batch
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

pub(crate) const INVALID: DriverError = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);

/// A copy stays within its range.
pub(crate) fn check(offset: usize, len: usize, range: &DeviceRange) -> Result<(), DriverError> {
    match offset.checked_add(len) {
        Some(end) if end <= range.len() => Ok(()),
        _ => Err(INVALID),
    }
}

impl Issued {
    fn new(work: Work) -> Self {
        Issued { work, uses: Vec::new(), entered: None, refused: None }
    }

    /// Pieces that the device reaches, which stays so; their copies are planned.
    pub(crate) fn reached(to: Foreign, reached: Reached) -> Self {
        let (reply, _) = oneshot::channel();
        let Reached { pieces, in_use, .. } = reached;
        let work = Work::Give { to, pieces, reply };
        let uses = in_use.into_iter().collect();
        Issued { uses, ..Self::new(work) }
    }

    /// The call over memory of a caller that it is a part of.
    pub(crate) fn call(&self) -> Option<&Arc<Call>> {
        match &self.work {
            Work::Give { to: foreign, .. } | Work::Take { from: foreign, .. } => {
                Some(&foreign.call)
            }
            _ => None,
        }
    }

    /// The driver's error, of which the operation dies.
    pub(crate) fn refuse(&mut self, error: DriverError) {
        self.refused.get_or_insert(failed(self.work.name(), error));
    }

    /// The copies that it is, none of which crosses a registration. What they touch is held from
    /// here on.
    ///
    /// # Errors
    ///
    /// An invalid value for one outside of its range.
    pub(crate) fn moves(&mut self, card: &Card) -> Result<Vec<Move>, DriverError> {
        let uses = &mut self.uses;
        match &mut self.work {
            Work::Zero { .. } => Ok(Vec::new()),
            Work::Within { from, to, .. } => {
                check(0, from.len(), to)?;
                Ok(vec![Move::within(to.address(), from.address(), from.len())])
            }
            Work::Upload { to, offset, bytes, .. } => {
                check(*offset, bytes.len(), to)?;
                Ok(up(card, to.address() + *offset as u64, bytes, uses))
            }
            Work::Download { from, offset, len, into, at, .. } => {
                check(*offset, *len, from)?;
                let end = at.checked_add(*len).filter(|&end| end <= into.len());
                let into = &mut into[*at..end.ok_or(INVALID)?];
                Ok(down(card, into, from.address() + *offset as u64, uses))
            }
            Work::Give { to, pieces, .. } => given(card, to, pieces, uses),
            Work::Take { from, offset, len, into, .. } => {
                from.check(*offset, *len)?;
                let into = into.get_mut(..*len).ok_or(INVALID)?;
                Ok(down(card, into, from.address + *offset as u64, uses))
            }
        }
    }
}

/// Copies up, in parts.
pub(crate) fn up(card: &Card, to: u64, bytes: &[u8], uses: &mut Vec<InUse>) -> Vec<Move> {
    let from = bytes.as_ptr().expose_provenance() as u64;
    let whole = Move { to, from, len: bytes.len(), way: Way::Up, direct: false };
    in_parts(card, bytes, whole, uses)
}

/// Copies down, likewise.
fn down(card: &Card, into: &mut [u8], from: u64, uses: &mut Vec<InUse>) -> Vec<Move> {
    let to = into.as_mut_ptr().expose_provenance() as u64;
    let whole = Move { to, from, len: into.len(), way: Way::Down, direct: false };
    in_parts(card, into, whole, uses)
}

/// The parts of a copy from or to this memory of the host.
fn in_parts(card: &Card, memory: &[u8], whole: Move, uses: &mut Vec<InUse>) -> Vec<Move> {
    let part = |Part { range, direct, in_use }: Part| {
        uses.extend(in_use);
        let at = range.start as u64;
        Move { to: whole.to + at, from: whole.from + at, len: range.len(), direct, ..whole }
    };
    card.parts(memory).into_iter().map(part).collect()
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

    fn answer(self, error: Option<&DeviceError>) {
        let Batch { event, flight } = self;
        drop(event);
        let InFlight { works, tables } = flight.end();
        drop(tables);
        for Issued { work, uses, entered, refused, .. } in works {
            drop((uses, entered));
            let refused = refused.filter(|_| !vmem_core::planted!("refused-copy"));
            let error = error.cloned().or(refused);
            work.end(error.map_or(Ok(()), Err));
        }
    }
}
