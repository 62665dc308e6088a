//! A thread that copies in one direction.
//!
//! Invariant: every operation that was handed in is answered once: after its end, or because the
//! device is lost or the lane closed. An error that passes ends nothing. While copies are in flight
//! the thread sleeps until the driver rings, or a tenth of a second has passed (a notice may be
//! lost); with nothing in flight it sleeps until there is work. Started by the tier.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use cudarc::driver::{CudaStream, DriverError};
use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use vmem_core::backend::DeviceError;

use crate::backlog::{BATCH_MAX, Backlog, Urgency};
use crate::card::{Card, told};
use crate::copy::{Batch, CopyStream, Work};
use crate::event::Bell;

/// How long a lost notice goes unnoticed.
pub(crate) const WATCHDOG: Duration = Duration::from_millis(100);
/// The pause before the driver is asked again after an error that passed.
const RETRY: Duration = Duration::from_millis(2);
/// Batches in flight.
const BATCHES_MAX: usize = 8;

/// Why a device serves no more, once it does not.
pub(crate) type Lost = Arc<Loss>;

/// The end of a device, with the reason that all waiters get, and the bell of its tier.
#[derive(Default)]
pub(crate) struct Loss {
    reason: OnceLock<Arc<str>>,
    hook: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Loss {
    pub(crate) fn get(&self) -> Option<&Arc<str>> {
        self.reason.get()
    }

    /// It is lost, for this reason. False if it was lost before.
    pub(crate) fn set(&self, reason: Arc<str>) -> bool {
        let is_first = self.reason.set(reason).is_ok();
        if is_first {
            self.ring();
        }
        is_first
    }

    /// Memory may be free, or none will be.
    pub(crate) fn ring(&self) {
        if let Some(hook) = self.hook.get() {
            hook();
        }
    }

    /// `hook` is called once it is lost, and when it rings. Set once.
    pub(crate) fn tell(&self, hook: Box<dyn Fn() + Send + Sync>) {
        let is_first = self.hook.set(hook).is_ok();
        assert!(is_first, "a device has one hook");
    }
}

impl std::fmt::Debug for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Loss").field(&self.reason.get()).finish()
    }
}

/// The end of a lane, for several.
pub(crate) type Ended = Shared<BoxFuture<'static, ()>>;

/// The sending end.
#[derive(Debug)]
pub(crate) struct Lane {
    inbox: Arc<Inbox>,
    ended: Ended,
    /// Of the thread, which alone keeps it.
    stream: Weak<CudaStream>,
}

#[derive(Default)]
struct Inbox {
    queue: Mutex<Queue>,
    bell: Arc<Bell>,
}

#[derive(Default)]
struct Queue {
    works: Backlog,
    closed: bool,
}

impl Lane {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the driver or the operating system says, in words.
    pub(crate) fn start(name: &str, card: Arc<Card>) -> Result<Self, String> {
        let inbox = Arc::new(Inbox::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        let theirs = inbox.clone();
        let run = move || {
            theirs.bell.hang(thread::current());
            let bound = card.context().bind();
            let stream = bound.and_then(|()| CopyStream::new(card.clone(), theirs.bell.clone()));
            match stream {
                Err(error) => drop(ready.send(Err(told("making a stream", error)))),
                Ok(stream) => {
                    drop(ready.send(Ok(Arc::downgrade(stream.stream()))));
                    let in_flight = VecDeque::new();
                    Driving { inbox: theirs, stream, in_flight, card }.run();
                }
            }
            drop(end);
        };
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
        spawned.map_err(|error| format!("starting a thread: {error}"))?;
        let ready = is_ready.recv().map_err(|_| "the thread ended".to_owned());
        let stream = ready.and_then(|ready| ready)?;
        Ok(Lane { inbox, ended: ended.map(drop).boxed().shared(), stream })
    }

    /// Its stream, while the thread lives. Only in a visit: this may be the last share of it.
    pub(crate) fn stream(&self) -> Option<Arc<CudaStream>> {
        self.stream.upgrade()
    }

    /// Hands an operation in; it starts whether its answer is awaited or not.
    pub(crate) fn submit(&self, work: Work) {
        self.submit_as(work, Urgency::Awaited);
    }

    /// As `submit`, for an operation that comes behind those that callers wait for.
    pub(crate) fn submit_behind(&self, work: Work) {
        self.submit_as(work, Urgency::Behind);
    }

    fn submit_as(&self, work: Work, urgency: Urgency) {
        let mut queue = self.inbox.queue.lock();
        if queue.closed {
            drop(queue);
            return work.end(Err(DeviceError::Closed));
        }
        queue.works.push(work, urgency);
        drop(queue);
        self.inbox.bell.ring();
    }

    /// Nothing more is accepted; what was accepted completes.
    pub(crate) fn close(&self) {
        self.inbox.queue.lock().closed = true;
        self.inbox.bell.ring();
    }

    /// When the thread has let go of the card.
    pub(crate) fn ended(&self) -> Ended {
        self.ended.clone()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the thread has.
struct Driving {
    inbox: Arc<Inbox>,
    stream: CopyStream,
    /// In the order in which they end.
    in_flight: VecDeque<(Batch, Urgency)>,
    card: Arc<Card>,
}

impl Driving {
    fn run(mut self) {
        let watchdog = if vmem_core::planted!("watchdog") { Duration::MAX } else { WATCHDOG };
        loop {
            let batch = self.take();
            let idle = batch.is_none();
            if let Some((works, urgency)) = batch {
                self.start(works, urgency);
            }
            match self.reap() {
                Reaped::Some => {}
                // It may pass soon.
                Reaped::Refused => thread::park_timeout(RETRY),
                Reaped::None if !idle => {}
                Reaped::None if !self.in_flight.is_empty() => thread::park_timeout(watchdog),
                Reaped::None if self.inbox.queue.lock().has_ended() => {
                    assert!(self.in_flight.is_empty(), "a lane ends with nothing in flight");
                    return;
                }
                Reaped::None => thread::park(),
            }
        }
    }

    fn take(&mut self) -> Option<(Vec<Work>, Urgency)> {
        if self.in_flight.len() >= BATCHES_MAX {
            return None;
        }
        let behind = self.in_flight.iter().filter(|(_, urgency)| *urgency == Urgency::Behind);
        let behind = behind.count();
        self.inbox.queue.lock().works.take(behind)
    }

    fn start(&mut self, works: Vec<Work>, urgency: Urgency) {
        if let Some(reason) = self.card.context().lost() {
            let error = DeviceError::Lost(reason);
            return works.into_iter().for_each(|work| work.end(Err(error.clone())));
        }
        assert!(works.len() <= BATCH_MAX, "a batch fits the launch queue of the driver");
        self.in_flight.push_back((self.stream.submit(works), urgency));
        assert!(self.in_flight.len() <= BATCHES_MAX, "no more is in flight than may be");
    }

    /// Answers the batches that have ended.
    fn reap(&mut self) -> Reaped {
        let mut reaped = Reaped::None;
        while let Some((batch, _)) = self.in_flight.front_mut() {
            match self.stream.has_ended(batch) {
                Ok(false) => break,
                Ok(true) => {
                    if let Some((batch, _)) = self.in_flight.pop_front() {
                        batch.end();
                    }
                    reaped = Reaped::Some;
                }
                Err(error) => return self.refused(error),
            }
        }
        reaped
    }

    /// The driver did not say whether a batch has ended. In a dead context nothing runs any more;
    /// else it is asked again.
    fn refused(&mut self, error: DriverError) -> Reaped {
        if !self.card.context().is_dead() {
            tracing::debug!(
                target: "vmem::gpu", error = %told("a query", error), "it is tried again"
            );
            return Reaped::Refused;
        }
        self.stream.drain();
        let reason =
            self.card.context().lost().unwrap_or_else(|| told("the device failed", error).into());
        let error = DeviceError::Lost(reason);
        self.in_flight.drain(..).for_each(|(batch, _)| batch.end_dead(&error));
        Reaped::Some
    }
}

/// What a look at the batches came to.
enum Reaped {
    None,
    Some,
    /// The driver refused to say.
    Refused,
}

impl Queue {
    fn has_ended(&self) -> bool {
        self.closed && self.works.is_empty()
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("waiting", &self.queue.lock().works.len()).finish()
    }
}
