//! A thread that copies in one direction.
//!
//! Invariant: every operation that was handed in is answered once: after its end, or because the device is lost or the
//! lane closed. While copies are in flight the thread sleeps until the driver rings, or a tenth of a second has passed
//! (a notice may be lost); with nothing in flight it sleeps until there is work. Started by the tier.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use cudarc::driver::DriverError;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use vmem_core::backend::DeviceError;

use crate::card::{Batch, Bell, Card, CopyStream, Work, told};

/// How long a lost notice goes unnoticed.
pub(crate) const WATCHDOG: Duration = Duration::from_millis(100);
/// Operations that are handed to the driver before it is looked for their ends: fewer than its launch queue holds.
const BATCH_MAX: usize = 256;
/// Batches in flight.
const BATCHES_MAX: usize = 8;

/// Why a device serves no more, once it does not.
pub(crate) type Lost = Arc<OnceLock<Arc<str>>>;

/// The end of a lane, for several.
pub(crate) type Ended = Shared<BoxFuture<'static, ()>>;

/// The sending end.
#[derive(Debug)]
pub(crate) struct Lane {
    inbox: Arc<Inbox>,
    ended: Ended,
}

#[derive(Default)]
struct Inbox {
    queue: Mutex<Queue>,
    bell: Arc<Bell>,
}

#[derive(Default)]
struct Queue {
    works: VecDeque<Work>,
    closed: bool,
}

impl Lane {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the driver or the operating system says, in words.
    pub(crate) fn start(name: &str, card: Arc<Card>, lost: Lost) -> Result<Self, String> {
        let inbox = Arc::new(Inbox::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        let theirs = inbox.clone();
        let run = move || {
            theirs.bell.hang(thread::current());
            let stream = card.bind().and_then(|()| CopyStream::new(card, theirs.bell.clone()));
            match stream {
                Err(error) => drop(ready.send(Err(told("making a stream", error)))),
                Ok(stream) => {
                    drop(ready.send(Ok(())));
                    Driving { inbox: theirs, stream, in_flight: VecDeque::new(), lost }.run();
                }
            }
            drop(end);
        };
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
        spawned.map_err(|error| format!("starting a thread: {error}"))?;
        is_ready.recv().map_err(|_| "the thread ended".to_owned()).and_then(|ready| ready)?;
        Ok(Lane { inbox, ended: ended.map(drop).boxed().shared() })
    }

    /// Hands an operation in; it starts whether its answer is awaited or not.
    pub(crate) fn submit(&self, work: Work) {
        let mut queue = self.inbox.queue.lock();
        if queue.closed {
            drop(queue);
            return work.end(Err(DeviceError::Closed));
        }
        queue.works.push_back(work);
        drop(queue);
        self.inbox.bell.ring();
    }

    /// Nothing more is accepted; what was comes to its end.
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
    in_flight: VecDeque<Batch>,
    lost: Lost,
}

impl Driving {
    fn run(mut self) {
        loop {
            let works = self.take();
            let idle = works.is_empty();
            if !works.is_empty() {
                self.start(works);
            }
            let ended = self.end_what_has_ended();
            if !idle || ended {
                continue;
            }
            if !self.in_flight.is_empty() {
                thread::park_timeout(WATCHDOG);
            } else if self.inbox.queue.lock().is_at_its_end() {
                return;
            } else {
                thread::park();
            }
        }
    }

    fn take(&mut self) -> Vec<Work> {
        if self.in_flight.len() >= BATCHES_MAX {
            return Vec::new();
        }
        let mut queue = self.inbox.queue.lock();
        let count = queue.works.len().min(BATCH_MAX);
        queue.works.drain(..count).collect()
    }

    fn start(&mut self, works: Vec<Work>) {
        if let Some(reason) = self.lost.get() {
            let error = DeviceError::Lost(reason.clone());
            return works.into_iter().for_each(|work| work.end(Err(error.clone())));
        }
        let (batch, told) = self.stream.submit(works);
        self.in_flight.push_back(batch);
        if let Err(error) = told {
            self.lose(error);
        }
    }

    /// True if any has.
    fn end_what_has_ended(&mut self) -> bool {
        let mut any = false;
        while let Some(batch) = self.in_flight.front() {
            match batch.has_ended() {
                Ok(false) => break,
                Ok(true) => {
                    if let Some(batch) = self.in_flight.pop_front() {
                        batch.end(&mut self.stream);
                        any = true;
                    }
                }
                Err(error) => {
                    self.lose(error);
                    any = true;
                }
            }
        }
        any
    }

    /// The context is dead: nothing of it takes part any more.
    fn lose(&mut self, error: DriverError) {
        let reason: Arc<str> = told("the device failed", error).into();
        tracing::error!(target: "vmem::gpu", %reason, "the VRAM tier is lost; the copies below serve");
        let _ = self.lost.set(reason.clone());
        self.stream.drain();
        let error = DeviceError::Lost(reason);
        self.in_flight.drain(..).for_each(|batch| batch.end_dead(&error));
    }
}

impl Queue {
    fn is_at_its_end(&self) -> bool {
        self.closed && self.works.is_empty()
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("waiting", &self.queue.lock().works.len()).finish()
    }
}
