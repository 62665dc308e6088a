//! What the actor can be asked for, and the channels through which.
//!
//! Invariant: each request is answered exactly once: by its task, by a refusal, or, if the runtime
//! itself goes, by the drop of its reply. Sent by the public methods.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{DEMAND_MAX, Ended};
use crate::deadline::Deadline;
use crate::device::{DeviceAnswer, DeviceError};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::migrate::{self, Changed, Job};
use crate::object::{Object, WeakFlight};
use crate::parcel::Delivery;
use crate::shared::Shared;
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// A migration that somebody asked for.
pub(crate) enum Request {
    /// The bytes of one object; everybody who joined the flight gets them.
    Fetch { job: Job, flight: WeakFlight, reply: Delivery<Result<Bytes>> },
    /// One object to another tier, or to where its home tier has it all.
    Move { object: Arc<Object>, what: Move, deadline: Deadline, reply: Delivery<Result<()>> },
    /// What a kernel wrote becomes the current version, once it is `ready`.
    Finish { change: Box<Changed>, ready: DeviceAnswer<std::result::Result<(), DeviceError>> },
    /// Objects to a faster tier ahead of need, in this order.
    Prefetch { objects: Vec<Arc<Object>>, to: MemoryTier, deadline: Deadline, end: PrefetchEnd },
}

/// Objects of one prefetch that are on their way at once.
const PREFETCHED_AT_ONCE: usize = 32;

/// Where an object is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// To the memory of this device.
    ToDevice(usize),
    /// There again, behind a write, whoever waits for it.
    Refresh(usize),
    /// Out of the memory of devices, to host memory if it has space.
    OffDevices,
    /// To host memory, to stay.
    ToHost,
    /// To disk, out of host memory.
    ToDisk,
    /// To disk too.
    Flush,
}

/// How a prefetch ends: for its future, or, detached, for nobody.
#[derive(Debug)]
pub(crate) struct PrefetchEnd {
    pub(crate) reply: oneshot::Sender<Result<()>>,
    /// Nobody waits for it, and it is wanted all the same.
    pub(crate) detached: Arc<AtomicBool>,
}

impl Request {
    pub(super) fn kind(&self) -> Ended {
        match self {
            Request::Fetch { job, .. } if job.class == Class::Prefetch => Ended::Background,
            Request::Fetch { .. } | Request::Move { .. } => Ended::Demand,
            Request::Finish { .. } => Ended::Kernel,
            Request::Prefetch { .. } => Ended::Background,
        }
    }

    /// The name of its task.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Request::Fetch { .. } => "vmem-fetch",
            Request::Move { what: Move::ToHost | Move::ToDevice(_) | Move::Refresh(_), .. } => {
                "vmem-promote"
            }
            Request::Move { what: Move::OffDevices | Move::ToDisk, .. } => "vmem-demote",
            Request::Move { what: Move::Flush, .. } => "vmem-flush",
            Request::Finish { .. } => "vmem-finish",
            Request::Prefetch { .. } => "vmem-prefetch",
        }
    }

    /// Carries it out.
    pub(super) async fn serve(self) {
        match self {
            Request::Fetch { job, flight, reply } => {
                let object = job.object.clone();
                let outcome =
                    while_wanted(job, &reply, async |job| migrate::fetch(job).await).await;
                // First, so that nobody joins a flight that has landed.
                object.end_flight(&flight);
                let counted = outcome.is_ok().then_some(&object.shared.unclaimed);
                // Whoever asked may have gone.
                drop(reply.deliver(outcome, counted));
            }
            Request::Move { object, what, deadline, reply } => {
                let job = Job::new(object.clone(), MigrationCause::Promote, deadline);
                let outcome = match what {
                    Move::ToHost => {
                        while_wanted(job, &reply, async |job| migrate::fetch(job).await.map(drop))
                            .await
                    }
                    Move::ToDevice(device) => {
                        let promote =
                            async |job: &Job| migrate::promote_to_device(job, device).await;
                        while_wanted(job, &reply, promote).await
                    }
                    Move::Refresh(device) => migrate::promote_to_device(&job, device).await,
                    Move::OffDevices => migrate::leave_devices(&object, &deadline).await,
                    Move::ToDisk => migrate::demote(&object, &deadline).await,
                    Move::Flush => migrate::flush(&object, &deadline).await,
                };
                drop(reply.deliver(outcome, None));
            }
            Request::Finish { change, ready } => change.finish(ready).await,
            Request::Prefetch { objects, to, deadline, mut end } => {
                let outcome = tokio::select! {
                    biased;
                    () = end.cancelled() => return,
                    outcome = prefetch(objects, to, deadline) => outcome,
                };
                drop(end.reply.send(outcome));
            }
        }
    }

    /// Answers without doing anything.
    pub(super) fn refuse(self, error: VirtualMemoryError) {
        match self {
            Request::Fetch { job, flight, reply } => {
                job.object.end_flight(&flight);
                drop(reply.deliver(Err(error), None));
            }
            Request::Move { reply, .. } => drop(reply.deliver(Err(error), None)),
            Request::Finish { change, .. } => drop(change),
            Request::Prefetch { end, .. } => drop(end.reply.send(Err(error))),
        }
    }
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

/// Carries a job out, which no longer waits for space once its callers have gone; I/O that has begun comes to its
/// end, so that calls with short deadlines over a slow disk make progress.
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

/// Promotes objects in order. One that fails does not keep the others; the first error counts.
async fn prefetch(objects: Vec<Arc<Object>>, to: MemoryTier, deadline: Deadline) -> Result<()> {
    let one = |object| async move {
        let mut job = Job::new(object, MigrationCause::Prefetch, deadline);
        job.class = Class::Prefetch;
        match to.device() {
            Some(device) => migrate::promote_to_device(&job, device).await,
            None => migrate::fetch(&job).await.map(drop),
        }
    };
    let mut ended = futures::stream::iter(objects).map(one).buffered(PREFETCHED_AT_ONCE);
    let mut outcome = Ok(());
    while let Some(one) = ended.next().await {
        outcome = outcome.and(one);
    }
    outcome
}

/// The sending ends.
#[derive(Debug)]
pub(crate) struct Requests {
    demand: mpsc::Sender<Request>,
    background: mpsc::Sender<Request>,
    /// As many as there are leases: what a kernel wrote stands in no line behind those who wait for it.
    kernels: mpsc::UnboundedSender<Request>,
}

impl Requests {
    pub(super) fn new(
        demand: mpsc::Sender<Request>,
        background: mpsc::Sender<Request>,
        kernels: mpsc::UnboundedSender<Request>,
    ) -> Self {
        Requests { demand, background, kernels }
    }

    /// Hands a request to the actor. Where the channel is full a task waits there, and the caller does not.
    pub(crate) fn send(&self, shared: &Arc<Shared>, request: Request) {
        let request = match self.read_now(shared, request) {
            Ok(()) => return,
            Err(request) => request,
        };
        if matches!(request.kind(), Ended::Kernel) {
            if let Err(unsent) = self.kernels.send(request) {
                unsent.0.refuse(VirtualMemoryError::Closed);
            }
            return;
        }
        let channel = match request.kind() {
            Ended::Background => &self.background,
            Ended::Demand | Ended::Kernel | Ended::Evicted { .. } => &self.demand,
        };
        match channel.try_send(request) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(request)) => {
                let channel = channel.clone();
                shared.spawn("vmem-request", async move {
                    if let Err(unsent) = channel.send(request).await {
                        unsent.0.refuse(VirtualMemoryError::Closed);
                    }
                });
            }
            Err(mpsc::error::TrySendError::Closed(request)) => {
                request.refuse(VirtualMemoryError::Closed);
            }
        }
    }

    /// Starts a read that moves nothing between tiers as a task of its own, past the actor: that spares two
    /// switches between tasks. Other requests come back, and this one if too many are under way.
    fn read_now(&self, shared: &Arc<Shared>, request: Request) -> std::result::Result<(), Request> {
        let Request::Fetch { job, .. } = &request else { return Err(request) };
        if job.stay || job.class != Class::Demand || self.demand.is_closed() {
            return Err(request);
        }
        if shared.tasks.len() >= DEMAND_MAX {
            return Err(request);
        }
        shared.spawn("vmem-read", request.serve());
        Ok(())
    }
}
