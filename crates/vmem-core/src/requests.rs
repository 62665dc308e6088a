//! The channels through which the actor is asked to start migrations.
//!
//! Invariant: a request is a task that has not begun; dropping it answers its waiter, by the drop
//! of its reply. So each is answered exactly once: by its task, or, unserved, by its end. Made by
//! `migrate`, sent by the public methods, started by the actor.

use std::fmt;
use std::future::Future;

use futures::future::BoxFuture;
use tokio::sync::mpsc;

/// Requests of one class that wait in its channel; a sender beyond that waits.
const QUEUE_MAX: usize = 1024;

/// Whose place a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A caller waits for it.
    Demand,
    Background,
    /// It waits for a kernel of a user, for an unknown time, and takes no other request's place.
    Kernel,
}

/// A migration that was asked for.
#[must_use]
pub(crate) struct Request {
    /// The name of its task.
    pub(crate) name: &'static str,
    pub(crate) line: Line,
    pub(crate) work: BoxFuture<'static, ()>,
}

impl Request {
    pub(crate) fn new(
        name: &'static str,
        line: Line,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Request { name, line, work: Box::pin(work) }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The sending ends.
#[derive(Debug)]
pub(crate) struct Requests {
    demand: mpsc::Sender<Request>,
    background: mpsc::Sender<Request>,
    /// Unbounded, with at most one request a lease: what a kernel wrote must not queue behind
    /// requests that wait for it.
    kernels: mpsc::UnboundedSender<Request>,
}

/// The ends of the channels that the actor holds.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) demand: mpsc::Receiver<Request>,
    pub(crate) background: mpsc::Receiver<Request>,
    pub(crate) kernels: mpsc::UnboundedReceiver<Request>,
}

/// The channels between the store and its actor.
pub(crate) fn channels() -> (Requests, Inbox) {
    let (demand_tx, demand) = mpsc::channel(QUEUE_MAX);
    let (background_tx, background) = mpsc::channel(QUEUE_MAX);
    let (kernels_tx, kernels) = mpsc::unbounded_channel();
    let requests = Requests { demand: demand_tx, background: background_tx, kernels: kernels_tx };
    (requests, Inbox { demand, background, kernels })
}

impl Requests {
    /// Whether the actor takes no more.
    pub(crate) fn is_closed(&self) -> bool {
        self.demand.is_closed()
    }

    /// Hands a request over; where its channel is full it comes back, with the channel to wait at.
    pub(crate) fn try_send(&self, request: Request) -> Option<(mpsc::Sender<Request>, Request)> {
        let channel = match request.line {
            Line::Kernel if crate::planted!("kernel-line") => &self.demand,
            Line::Kernel => {
                drop(self.kernels.send(request));
                return None;
            }
            Line::Background => &self.background,
            Line::Demand => &self.demand,
        };
        match channel.try_send(request) {
            Err(mpsc::error::TrySendError::Full(request)) => Some((channel.clone(), request)),
            // Refused by its drop.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => None,
        }
    }
}
