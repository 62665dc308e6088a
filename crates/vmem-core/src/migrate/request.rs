//! What can be asked of the actor, and how each is carried out.
//!
//! Invariant: each request is answered exactly once: by its task, or, unserved, by the drop of its
//! reply. Called by the public methods; the actor starts the tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{Notify, oneshot};

use super::{Changed, Job};
use crate::asker;
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::latency::{self, ReadStage};
use crate::memory_tier::{MemoryTier, Position};
use crate::object::{Object, Shared, WeakFlight};
use crate::parcel::{Delivery, parcel};
use crate::requests::{Line, Request};
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Objects of one prefetch that are in flight at once, if they have no more bytes than staging.
const PREFETCHED_AT_ONCE: usize = 32;
/// This many are in flight in any case: what one waits for does not hold up the next, and large
/// ones come in about the order in which they are needed.
const PREFETCHED_LEAST: usize = 4;

/// Where an object is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// To the memory of this device.
    ToDevice(usize),
    /// Promoted again to this tier after a change, with or without a waiter.
    Refresh(MemoryTier),
    /// Out of the memory of devices, to host memory if it has space.
    OffDevices,
    /// To host memory, to stay.
    ToHost,
    /// To this tier below host memory; it stays in the slower ones too.
    PromoteTo(usize),
    /// To this tier below host memory, out of the faster ones.
    DemoteTo(usize),
    /// To its home below host memory too.
    Flush,
    /// To host memory, or below it, too, if only a device has it.
    WriteBack,
    /// Back to the version that was last written back, if the current one is lost.
    Revert,
}

/// The end of a prefetch, of which its future hears unless it is detached.
#[derive(Debug)]
pub(crate) struct PrefetchEnd {
    pub(crate) reply: oneshot::Sender<Result<()>>,
    /// Whether it goes on although its future was dropped.
    pub(crate) detached: Arc<AtomicBool>,
}

/// Requests the bytes of one object, for all readers that joined the flight. A read that leaves the
/// object where it is moves nothing between tiers and needs no decision: its task starts at once,
/// past the actor, unless too many are under way.
pub(crate) fn request_fetch(job: Job, flight: WeakFlight, reply: Delivery<Result<Bytes>>) {
    let shared = job.object.shared.clone();
    let is_read = !job.stay && job.class == Class::Demand;
    let line = match job.class {
        Class::Demand => Line::Demand,
        Class::Prefetch => Line::Background,
    };
    let work = latency::inherit(serve_fetch(job, flight, reply));
    if is_read && shared.takes_reads() {
        shared.spawn("vmem-read", work);
    } else {
        let turn = latency::enter(ReadStage::Turn);
        let work = async move {
            drop(turn);
            work.await;
        };
        shared.request(Request::new("vmem-fetch", line, work));
    }
}

async fn serve_fetch(job: Job, flight: WeakFlight, reply: Delivery<Result<Bytes>>) {
    let object = job.object.clone();
    let outcome = while_wanted(job, &reply, async |job| super::fetch(job).await).await;
    // First, so that no reader joins a flight that has ended.
    object.end_flight(&flight);
    let counted = outcome.is_ok().then_some(&object.shared.unclaimed);
    // The caller may have gone.
    drop(reply.deliver(outcome, counted));
}

/// Requests that one object moves to another tier, or that its home tier gets all of it.
pub(crate) fn request_move(
    object: &Arc<Object>,
    what: Move,
    deadline: Deadline,
    reply: Delivery<Result<()>>,
) {
    let work = asker::awaited(serve_move(object.clone(), what, deadline, reply));
    send_move(object, what, work);
}

/// The same, and nobody waits for its end, so it is not traced as part of a request.
pub(crate) fn request_move_behind(object: &Arc<Object>, what: Move) {
    let (reply, _nobody_waits) = parcel();
    let deadline = object.shared.deadline();
    let work = serve_move(object.clone(), what, deadline, reply);
    send_move(object, what, work);
}

fn send_move(object: &Arc<Object>, what: Move, work: impl Future<Output = ()> + Send + 'static) {
    let name = match what {
        Move::ToHost | Move::ToDevice(_) | Move::Refresh(_) | Move::PromoteTo(_) => "vmem-promote",
        Move::OffDevices | Move::DemoteTo(_) => "vmem-demote",
        Move::Flush | Move::WriteBack => "vmem-flush",
        Move::Revert => "vmem-revert",
    };
    object.shared.request(Request::new(name, Line::Demand, work));
}

async fn serve_move(
    object: Arc<Object>,
    what: Move,
    deadline: Deadline,
    reply: Delivery<Result<()>>,
) {
    let job = Job::new(object.clone(), MigrationCause::Promote, deadline);
    let outcome = match what {
        Move::ToHost => {
            while_wanted(job, &reply, async |job| super::fetch(job).await.map(drop)).await
        }
        Move::ToDevice(device) => {
            let promote = async |job: &Job| super::promote_to_device(job, device).await;
            while_wanted(job, &reply, promote).await
        }
        Move::Refresh(tier) => match tier.position() {
            Position::Device(device) => super::promote_to_device(&job, device).await,
            Position::Host => Ok(()),
            Position::Below(level) => {
                // Where there is no space for it, it stays below.
                let job = Job { may_spill: true, ..job };
                super::promote_between(&job, level).await
            }
        },
        Move::OffDevices => super::leave_devices(&object, &deadline).await,
        Move::PromoteTo(level) => {
            let promote = async |job: &Job| super::promote_between(job, level).await;
            while_wanted(job, &reply, promote).await
        }
        Move::DemoteTo(level) => super::demote(&object, level, &deadline).await,
        Move::Flush => super::flush(&object, &deadline).await,
        Move::WriteBack => write_back_one(&object, &deadline).await,
        Move::Revert => match object.gate(&deadline).await {
            Ok(pass) => object.revert(&pass),
            Err(error) => Err(error),
        },
    };
    drop(reply.deliver(outcome, None));
}

async fn write_back_one(object: &Arc<Object>, deadline: &Deadline) -> Result<()> {
    let pass = object.gate(deadline).await?;
    super::write_back_from_device(&pass, MigrationCause::WriteBack, deadline).await
}

/// Promotes an object, in the background, to the tier below host memory where it is held, if a
/// change has put it into a slower one.
pub(crate) fn refresh_below(object: &Arc<Object>) {
    if let Some(level) = object.level_to_refresh() {
        request_move_behind(object, Move::Refresh(MemoryTier::of_level(level)));
    }
}

/// What a kernel wrote becomes the current version, once it is `ready`.
pub(crate) fn request_finish(
    shared: &Arc<Shared>,
    change: Changed,
    ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
) {
    shared.request(Request::new("vmem-finish", Line::Kernel, change.finish(ready)));
}

/// Objects to prefetch into a faster tier, in this order.
pub(crate) fn request_prefetch(
    shared: &Arc<Shared>,
    objects: Vec<Arc<Object>>,
    to: MemoryTier,
    deadline: Deadline,
    mut end: PrefetchEnd,
) {
    let bytes_at_once = match crate::planted!("prefetch-unbounded") {
        true => u64::MAX,
        false => shared.limits.staging_capacity,
    };
    let work = asker::prefetch(&shared.migration_spans, objects.len(), to, async move {
        let outcome = tokio::select! {
            biased;
            () = end.cancelled() => return,
            outcome = prefetch(objects, to, bytes_at_once, deadline) => outcome,
        };
        drop(end.reply.send(outcome));
    });
    shared.request(Request::new("vmem-prefetch", Line::Background, work));
}

impl PrefetchEnd {
    /// Ends when the prefetch is no longer wanted; one that was detached always is.
    async fn cancelled(&mut self) {
        self.reply.closed().await;
        if self.detached.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }
}

/// Carries a job out, which no longer waits for space once its callers have gone; I/O that has
/// begun completes, so that calls with short deadlines over a slow disk make progress.
async fn while_wanted<T>(
    mut job: Job,
    reply: &Delivery<Result<T>>,
    carry_out: impl AsyncFnOnce(&Job) -> Result<T>,
) -> Result<T>
where
    T: Send + 'static,
{
    let unwanted = Arc::new(Notify::new());
    job.unwanted = Some(unwanted.clone());
    let work = carry_out(&job);
    tokio::pin!(work);
    tokio::select! {
        biased;
        outcome = &mut work => return outcome,
        () = reply.unwanted() => unwanted.notify_one(),
    }
    work.await
}

/// Promotes objects in order, as many at once as have `bytes_at_once` bytes, and a few at least.
/// One that fails does not keep the others; the error of the first one counts.
async fn prefetch(
    objects: Vec<Arc<Object>>,
    to: MemoryTier,
    bytes_at_once: u64,
    deadline: Deadline,
) -> Result<()> {
    let one = |place, object: Arc<Object>| async move {
        let len = object.len as u64;
        let mut job = Job::new(object, MigrationCause::Prefetch, deadline);
        job.class = Class::Prefetch;
        let outcome = match to.position() {
            Position::Device(device) => super::promote_to_device(&job, device).await,
            Position::Host => super::fetch(&job).await.map(drop),
            Position::Below(_) if job.object.has_host_space() => Ok(()),
            Position::Below(level) => super::promote_between(&job, level).await,
        };
        (place, len, outcome)
    };
    let least = if crate::planted!("prefetch-one-by-one") { 1 } else { PREFETCHED_LEAST };
    let mut left = objects.into_iter().enumerate().peekable();
    let mut running = FuturesUnordered::new();
    let mut bytes = 0;
    let mut first_error: Option<(usize, VirtualMemoryError)> = None;
    loop {
        let begins = |(_, object): &(usize, Arc<Object>)| {
            let fits = bytes + object.len as u64 <= bytes_at_once;
            running.len() < least || fits && running.len() < PREFETCHED_AT_ONCE
        };
        if let Some((place, object)) = left.next_if(begins) {
            bytes += object.len as u64;
            running.push(one(place, object));
            continue;
        }
        let Some((place, len, outcome)) = running.next().await else { break };
        bytes -= len;
        if let Err(error) = outcome
            && first_error.as_ref().is_none_or(|(before, _)| place < *before)
        {
            first_error = Some((place, error));
        }
    }
    first_error.map_or(Ok(()), |(_, error)| Err(error))
}
