//! A device buffer of the caller, and the calls over it.
//!
//! Invariant: the buffer is touched after what the caller queued on its stream before the call, and
//! before what it queues there after: a call that ends with copies in flight, by an error or
//! because it was dropped, has put the stream behind them. A future that is leaked ends no
//! call; then the target ends its copies, before the buffer goes back to the caller. Called by
//! gathers and scatters.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use parking_lot::Mutex;
use vmem_core::backend::{DeviceAccess, DeviceError};
use vmem_core::{VMemHandle, VirtualMemoryError};

use crate::apart::{Place, run_apart};
use crate::borrowed::Borrowed;
use crate::call::{Call, Foreign};
use crate::card::{Card, failed};
use crate::copy::{Flight, Issued};
use crate::event::is_capturing;
use crate::ext::tier;
use crate::given::{Given, reach};
use crate::issue::{Plan, carry_out};
use crate::owner::Owner;
use crate::tier::CudaTier;
use crate::watch::Answer;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// A device buffer of the caller, and the stream in whose order it is used.
#[derive(Debug)]
pub struct DeviceTarget<'a> {
    address: u64,
    len: usize,
    stream: Arc<CudaStream>,
    /// The calls that have not ended.
    running: Mutex<Vec<Running>>,
    /// For cudarc's own record of its uses.
    slice: Option<Borrowed<'a>>,
    /// Keeps memory that was handed over.
    owner: Option<Owner>,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> DeviceTarget<'a> {
    /// A slice, in the order of its stream. Its variable has it again once the target was dropped;
    /// a target that is leaked may take the memory with it, and leave an empty slice.
    pub fn from_slice(slice: &'a mut CudaSlice<u8>) -> Self {
        let stream = slice.stream().clone();
        let len = slice.len();
        // Whatever used it on other streams comes before what its stream does from here on.
        let (address, before) = slice.device_ptr_mut(&stream);
        drop(before);
        let mut target = DeviceTarget::over(address, len, stream);
        target.slice = Some(Borrowed::of(slice));
        target
    }

    /// `len` bytes of device memory, in the order of `stream`.
    ///
    /// # Safety
    ///
    /// They are device memory of the context of `stream`, without another user until the calls that
    /// are given this target have ended. After a call that failed or was dropped only work that is
    /// queued on `stream` from then on, or ordered after it, may use them.
    #[allow(unsafe_code)]
    pub unsafe fn from_raw(address: u64, len: usize, stream: &Arc<CudaStream>) -> Self {
        DeviceTarget::over(address, len, stream.clone())
    }

    fn over(address: u64, len: usize, stream: Arc<CudaStream>) -> Self {
        DeviceTarget {
            address,
            len,
            stream,
            running: Mutex::default(),
            slice: None,
            owner: None,
            borrowed: PhantomData,
        }
    }

    /// The same memory, which `owner` keeps until this was dropped and no copy uses it any more.
    #[cfg(feature = "dlpack")]
    pub(crate) fn kept_by(mut self, owner: Owner) -> Self {
        self.owner = Some(owner);
        self
    }

    /// It, for the copies of one call.
    fn foreign(&self) -> Foreign {
        let call = Call::over(self.owner.as_ref().and_then(Owner::share));
        Foreign { address: self.address, len: self.len, call }
    }

    /// Its length, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a piece lies within it.
    ///
    /// # Errors
    ///
    /// `InvalidConfig`.
    pub(crate) fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => {
                let have = self.len;
                Err(invalid(format!(
                    "{len} bytes at {offset} are outside of a buffer of {have} bytes"
                )))
            }
        }
    }

    /// Runs a call over the buffer, in a task of the runtime: what it holds does not wait for the
    /// caller.
    ///
    /// # Errors
    ///
    /// Those of the work.
    pub(crate) async fn run<F, W>(&self, access: &DeviceAccess, work: F) -> Result<()>
    where
        F: FnOnce(DeviceAccess, Foreign) -> W,
        W: Future<Output = Result<()>> + Send + 'static,
    {
        let card = tier(access)?.card()?;
        if let Some(slice) = &self.slice {
            // Copies on the slice's own stream come before the end of its memory anyhow.
            slice
                .take(card.context())
                .map_err(|error| access.fault(failed("borrowing a buffer", error)))?;
        }
        let foreign = self.foreign();
        let call = foreign.call.clone();
        let place = Place::default();
        let running =
            Running { access: access.clone(), card, call: call.clone(), work: place.clone() };
        self.running.lock().push(running);
        let _ends = Ends { target: self, call };
        let runtime = tier(access)?.runtime();
        run_apart(runtime, place, work(access.clone(), foreign)).await
    }

    /// Copies pieces into the buffer on its own stream, behind what that has: those that the device
    /// reaches, if the stream takes that many calls without a wait. Waits for nothing. Returns an
    /// answer that comes once they are there, and the other pieces.
    ///
    /// # Errors
    ///
    /// What the driver refused.
    pub(crate) fn give_in_order(
        &self,
        tier: &CudaTier,
        card: &Arc<Card>,
        pieces: Vec<Given>,
    ) -> std::result::Result<(Option<Answer>, Vec<Given>), DeviceError> {
        let DeviceTarget { stream, slice, .. } = self;
        let to = self.foreign();
        let failed = |error| failed("gathering", error);
        let mut reached = reach(card, &to, pieces).map_err(failed)?;
        let mut others = std::mem::take(&mut reached.others);
        let moves = std::mem::take(&mut reached.moves).into_iter().map(|one| (0, one)).collect();
        let plan = Plan::of(card, stream, moves);
        // In a capture the copies would become part of the graph, which outlives what they use.
        let is_captured = || {
            !vmem_core::planted!("gather-capture")
                && card.context().on_stream(stream, || is_capturing(stream)).unwrap_or(true)
        };
        let may_queue = plan.places() > 0 && !vmem_core::planted!("gather-order") && !is_captured();
        let queued = may_queue.then(|| card.try_queue(stream, plan.places())).flatten();
        let Some(queued) = queued else {
            others.append(&mut reached.pieces);
            return Ok((None, others));
        };
        let mut flight = Flight::of(vec![Issued::reached(to, reached)]);
        let issued = card.context().visit(|| {
            carry_out(plan, card, stream, flight.inner());
            // So what writes to it on another stream comes after that.
            if let Some(slice) = slice {
                slice.with(|slice| drop(slice.device_ptr(stream)));
            }
        });
        let refused = flight.refused();
        let kept = Some(flight.kept()).filter(|_| !vmem_core::planted!("gather-keep"));
        let keep = Box::new((kept, queued));
        let (answer, _end) = tier.keep_until_passed(card, stream, Vec::new(), |_| keep);
        issued.map_err(failed)?;
        refused.map_or(Ok((Some(answer), others)), Err)
    }

    /// The stream in whose order it is used.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// Waits for what the caller has queued, so that copies of others do not queue behind it.
///
/// # Errors
///
/// `TimedOut`, `Closed`, `Device`.
pub(crate) async fn caught_up(access: &DeviceAccess, stream: &Arc<CudaStream>) -> Result<()> {
    let tier = tier(access)?;
    let card = tier.card()?;
    if card.has_caught_up(stream) {
        return Ok(());
    }
    let (passed, _end) = tier.keep_until_passed(&card, stream, Vec::new(), |_| Box::new(()));
    drop(card);
    let passed = tier.within("waiting for the stream of a buffer", passed).await?;
    passed.map_err(|_| VirtualMemoryError::Closed)?.map_err(|error| access.fault(error))
}

/// A call over the caller's memory that has not ended.
#[derive(Debug)]
struct Running {
    access: DeviceAccess,
    card: Arc<Card>,
    call: Arc<Call>,
    work: Place,
}

/// Ends a call with its future.
struct Ends<'a, 'b> {
    target: &'a DeviceTarget<'b>,
    call: Arc<Call>,
}

impl Drop for Ends<'_, '_> {
    fn drop(&mut self) {
        let mut running = self.target.running.lock();
        let at = running.iter().position(|one| Arc::ptr_eq(&one.call, &self.call));
        let ended = at.map(|at| running.swap_remove(at));
        drop(running);
        if let Some(ended) = ended {
            self.target.end(&ended);
        }
    }
}

impl DeviceTarget<'_> {
    /// A call ends, for whatever reason: nothing more begins, and what has begun comes before what
    /// the caller's stream gets from here on.
    fn end(&self, running: &Running) {
        running.work.clear();
        let Ok(tier) = tier(&running.access) else { return };
        let stream = &self.stream;
        if tier.cancel(&running.call, &running.card, stream)
            && let Some(slice) = &self.slice
        {
            // So a later write on another stream is ordered after that too.
            let visit = || slice.with(|slice| drop(slice.device_ptr(stream)));
            let _ = running.card.context().visit(visit);
        }
    }
}

impl Drop for DeviceTarget<'_> {
    /// The futures of calls that have not ended were leaked.
    fn drop(&mut self) {
        for running in std::mem::take(self.running.get_mut()) {
            if !vmem_core::planted!("target-leaks") {
                self.end(&running);
            }
        }
    }
}

/// Whether a part lies within its object.
///
/// # Errors
///
/// `OutOfRange`.
pub(crate) fn check_range(handle: &VMemHandle, range: &std::ops::Range<usize>) -> Result<()> {
    if range.start <= range.end && range.end <= handle.len() {
        return Ok(());
    }
    Err(VirtualMemoryError::OutOfRange {
        handle: handle.id(),
        start: range.start,
        end: range.end,
        len: handle.len(),
    })
}

pub(crate) fn invalid(reason: String) -> VirtualMemoryError {
    VirtualMemoryError::invalid_config("target", reason)
}
