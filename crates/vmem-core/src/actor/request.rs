//! What the actor can be asked for, and the channels through which.
//!
//! Invariant: each request is answered exactly once: by its task, by a refusal, or, if the runtime
//! itself goes, by the drop of its reply. Sent by the public methods.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::channel::oneshot as shared_oneshot;
use futures::{FutureExt, StreamExt};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::{Ended, spawn_named};
use crate::device::{DeviceAnswer, DeviceError};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::host_queue::Class;
use crate::migrate::{self, Changed, Fetch, Raise};
use crate::object::{Object, WeakFlight};
use crate::tier::MemoryTier;

/// A migration that somebody asked for.
pub(crate) enum Request {
    /// The bytes of one object; everybody who joined the flight gets them.
    Fetch {
        job: Fetch,
        flight: WeakFlight,
        reply: shared_oneshot::Sender<Result<Bytes, VirtualMemoryError>>,
    },
    /// One object to another tier, or to where its home tier has it all.
    Move {
        object: Arc<Object>,
        what: Move,
        asked: Instant,
        deadline: Instant,
        reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
    },
    /// What a kernel wrote becomes the current version, once it is `ready`.
    Finish { change: Box<Changed>, ready: DeviceAnswer<Result<(), DeviceError>> },
    /// Objects to a faster tier ahead of need, in this order.
    Prefetch {
        objects: Vec<Arc<Object>>,
        to: MemoryTier,
        asked: Instant,
        deadline: Instant,
        end: PrefetchEnd,
    },
}

/// Objects of one prefetch to VRAM that are on their way at once.
const RAISED_AT_ONCE: usize = 4;

/// Where an object is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Move {
    /// To VRAM.
    Raise,
    /// To VRAM again, behind a write, whoever waits for it.
    Refresh,
    /// Out of VRAM, to host memory if it has room.
    Lower,
    /// To host memory, to stay.
    Up,
    /// To disk, out of host memory.
    Down,
    /// To disk too.
    Flush,
}

/// How a prefetch ends: for its future, or, detached, for nobody.
#[derive(Debug)]
pub(crate) struct PrefetchEnd {
    pub(crate) reply: oneshot::Sender<Result<(), VirtualMemoryError>>,
    /// Nobody waits for it, and it is wanted all the same.
    pub(crate) detached: Arc<AtomicBool>,
}

impl Request {
    pub(super) fn kind(&self) -> Ended {
        match self {
            Request::Fetch { job, .. } if job.class == Class::Prefetch => Ended::Ahead,
            Request::Fetch { .. } | Request::Move { .. } => Ended::Demand,
            Request::Finish { .. } => Ended::Kernel,
            Request::Prefetch { .. } => Ended::Ahead,
        }
    }

    /// The name of its task.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Request::Fetch { .. } => "vmem-fetch",
            Request::Move { what: Move::Up | Move::Raise | Move::Refresh, .. } => "vmem-promote",
            Request::Move { what: Move::Lower, .. } => "vmem-demote",
            Request::Move { what: Move::Down, .. } => "vmem-demote",
            Request::Move { what: Move::Flush, .. } => "vmem-flush",
            Request::Finish { .. } => "vmem-finish",
            Request::Prefetch { .. } => "vmem-prefetch",
        }
    }

    /// Carries it out.
    pub(super) async fn serve(self) {
        match self {
            Request::Fetch { job, flight, mut reply } => {
                let object = job.object.clone();
                let outcome = fetch_while_wanted(job, reply.cancellation()).await;
                // First, so that nobody joins a flight that has landed.
                object.end_flight(flight);
                // Whoever asked may have gone.
                drop(reply.send(outcome));
            }
            Request::Move { object, what, asked, deadline, mut reply } => {
                let outcome = match what {
                    Move::Up => {
                        let cause = MigrationCause::Promote;
                        let class = Class::Demand;
                        let (stay, unwanted) = (true, None);
                        let job = Fetch { object, class, cause, stay, asked, deadline, unwanted };
                        fetch_while_wanted(job, reply.closed()).await.map(drop)
                    }
                    Move::Raise => {
                        let (class, cause) = (Class::Demand, MigrationCause::Promote);
                        let job = Raise { object, class, cause, asked, deadline, unwanted: None };
                        raise_while_wanted(job, reply.closed()).await
                    }
                    Move::Refresh => {
                        let (class, cause) = (Class::Demand, MigrationCause::Promote);
                        let job = Raise { object, class, cause, asked, deadline, unwanted: None };
                        migrate::raise(&job).await
                    }
                    Move::Lower => migrate::lower(&object, asked, deadline).await,
                    Move::Down => migrate::demote(&object, asked, deadline).await,
                    Move::Flush => migrate::flush(&object, asked, deadline).await,
                };
                drop(reply.send(outcome));
            }
            Request::Finish { change, ready } => change.finish(ready).await,
            Request::Prefetch { objects, to, asked, deadline, mut end } => {
                let outcome = tokio::select! {
                    biased;
                    () = end.cancelled() => return,
                    outcome = prefetch(objects, to, asked, deadline) => outcome,
                };
                drop(end.reply.send(outcome));
            }
        }
    }

    /// Answers without doing anything.
    pub(super) fn refuse(self, error: VirtualMemoryError) {
        match self {
            Request::Fetch { job, flight, reply } => {
                job.object.end_flight(flight);
                drop(reply.send(Err(error)));
            }
            Request::Move { reply, .. } => drop(reply.send(Err(error))),
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

/// A fetch that no longer waits for room once whoever asked has `gone`; I/O that has begun comes to
/// its end, so that calls with short deadlines over a slow disk get there by and by.
async fn fetch_while_wanted(
    mut job: Fetch,
    gone: impl Future,
) -> Result<Bytes, VirtualMemoryError> {
    let unwanted = Arc::new(Notify::new());
    job.unwanted = Some(unwanted.clone());
    let fetch = migrate::fetch(&job);
    tokio::pin!(fetch);
    tokio::select! {
        biased;
        outcome = &mut fetch => return outcome,
        _ = gone => unwanted.notify_one(),
    }
    fetch.await
}

/// As `fetch_while_wanted`, to VRAM.
async fn raise_while_wanted(mut job: Raise, gone: impl Future) -> Result<(), VirtualMemoryError> {
    let unwanted = Arc::new(Notify::new());
    job.unwanted = Some(unwanted.clone());
    let raise = migrate::raise(&job);
    tokio::pin!(raise);
    tokio::select! {
        biased;
        outcome = &mut raise => return outcome,
        _ = gone => unwanted.notify_one(),
    }
    raise.await
}

/// Brings objects up in order. One that fails does not keep the others; the first error counts.
async fn prefetch(
    objects: Vec<Arc<Object>>,
    to: MemoryTier,
    asked: Instant,
    deadline: Instant,
) -> Result<(), VirtualMemoryError> {
    let (class, cause) = (Class::Prefetch, MigrationCause::Prefetch);
    let one = |object| async move {
        if to == MemoryTier::Vram {
            let job = Raise { object, class, cause, asked, deadline, unwanted: None };
            return migrate::raise(&job).await;
        }
        let job = Fetch { object, class, cause, stay: true, asked, deadline, unwanted: None };
        migrate::fetch(&job).await.map(drop)
    };
    // A copy to the device is short beside its way there and back; a disk has others to serve.
    let at_once = if to == MemoryTier::Vram { RAISED_AT_ONCE } else { 1 };
    let mut ended = futures::stream::iter(objects).map(one).buffered(at_once);
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
    ahead: mpsc::Sender<Request>,
    /// As many as there are leases: what a kernel wrote stands in no line behind those who wait for it.
    kernels: mpsc::UnboundedSender<Request>,
    reads: Arc<Semaphore>,
}

impl Requests {
    pub(super) fn new(
        demand: mpsc::Sender<Request>,
        ahead: mpsc::Sender<Request>,
        kernels: mpsc::UnboundedSender<Request>,
        reads: Arc<Semaphore>,
    ) -> Self {
        Requests { demand, ahead, kernels, reads }
    }

    /// Starts a read that moves nothing between tiers as a task of its own, past the actor. If it
    /// is to stay, or too many are under way, or the actor is gone, the request comes back.
    pub(crate) fn read_now(&self, request: Request) -> Result<(), Request> {
        let Request::Fetch { job, .. } = &request else { return Err(request) };
        if job.stay || job.class != Class::Demand || self.demand.is_closed() {
            return Err(request);
        }
        let Ok(permit) = self.reads.clone().try_acquire_owned() else { return Err(request) };
        let shared = job.object.shared.clone();
        let runtime = shared.runtime.clone();
        let served = async move {
            // A migration never panics; if one does, the store is not to be trusted with more.
            if AssertUnwindSafe(request.serve()).catch_unwind().await.is_err() {
                tracing::error!(target: "vmem::actor", "a read ended in a panic");
                shared.set_closed();
            }
            drop(permit);
        };
        spawn_named(&runtime, "vmem-read", served);
        Ok(())
    }

    fn channel(&self, request: &Request) -> &mpsc::Sender<Request> {
        match request.kind() {
            Ended::Ahead => &self.ahead,
            Ended::Demand | Ended::Kernel | Ended::Evicted { .. } => &self.demand,
        }
    }

    /// Sends as soon as there is room in the channel.
    pub(crate) async fn send(&self, request: Request) {
        if let Err(unsent) = self.channel(&request).send(request).await {
            unsent.0.refuse(VirtualMemoryError::Closed);
        }
    }

    /// Sends if there is room in the channel; else the request comes back.
    pub(crate) fn try_send(&self, request: Request) -> Result<(), Request> {
        if matches!(request.kind(), Ended::Kernel) {
            if let Err(unsent) = self.kernels.send(request) {
                unsent.0.refuse(VirtualMemoryError::Closed);
            }
            return Ok(());
        }
        match self.channel(&request).try_send(request) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(request)) => Err(request),
            Err(mpsc::error::TrySendError::Closed(request)) => {
                request.refuse(VirtualMemoryError::Closed);
                Ok(())
            }
        }
    }
}
