//! A thread that waits for what others do on the device.
//!
//! Invariant: what was handed in with an event is kept until that event was seen complete, or the device is lost; so a kernel that
//! was launched is never forgotten, whatever became of the future or the lease that launched it. Events are looked at in
//! no order: a slow kernel keeps nobody waiting. Started by the tier.

use std::any::Any;
use std::sync::Arc;
use std::thread;

use cudarc::driver::CudaEvent;
use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::Mutex;
use vmem_core::backend::DeviceError;

use crate::card::{Bell, Card, Notices, told};
use crate::lane::{Ended, Lost, WATCHDOG};

/// What is kept for as long as it is used.
pub(crate) type Keep = Box<dyn Any + Send>;

/// The sending end.
#[derive(Debug)]
pub(crate) struct Watch {
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
    new: Vec<Watched>,
    closed: bool,
}

struct Watched {
    event: CudaEvent,
    keep: Keep,
    reply: oneshot::Sender<Result<(), DeviceError>>,
}

impl Watched {
    fn end(self, outcome: Result<(), DeviceError>) {
        drop((self.event, self.keep));
        drop(self.reply.send(outcome));
    }
}

impl Watch {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the driver or the operating system says, in words.
    pub(crate) fn start(card: Arc<Card>, lost: Lost) -> Result<Self, String> {
        let inbox = Arc::new(Inbox::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        let theirs = inbox.clone();
        let run = move || {
            theirs.bell.hang(thread::current());
            let notices = card.bind().and_then(|()| Notices::new(&card, theirs.bell.clone()));
            match notices {
                Err(error) => drop(ready.send(Err(told("making a stream", error)))),
                Ok(notices) => {
                    drop(ready.send(Ok(())));
                    watch(&theirs, notices, &lost);
                }
            }
            drop((card, end));
        };
        let spawned = thread::Builder::new().name("vmem-gpu-watch".to_owned()).spawn(run);
        spawned.map_err(|error| format!("starting a thread: {error}"))?;
        is_ready.recv().map_err(|_| "the thread ended".to_owned()).and_then(|ready| ready)?;
        Ok(Watch { inbox, ended: ended.map(drop).boxed().shared() })
    }

    /// Keeps `keep` until the event has passed, and answers then.
    pub(crate) fn submit(
        &self,
        event: CudaEvent,
        keep: Keep,
    ) -> oneshot::Receiver<Result<(), DeviceError>> {
        let (reply, answer) = oneshot::channel();
        let watched = Watched { event, keep, reply };
        let mut queue = self.inbox.queue.lock();
        if queue.closed {
            drop(queue);
            // Nobody is left who would wait, and whoever ends a lease may not.
            let waiting = move || {
                let relaxed = crate::card::relax_capture();
                let outcome = relaxed.and_then(|()| watched.event.synchronize());
                watched.end(outcome.map_err(|error| crate::card::failed("a kernel", error)));
            };
            if let Err(error) = thread::Builder::new().spawn(waiting) {
                tracing::error!(target: "vmem::gpu", %error, "what a kernel uses is given back late");
            }
        } else {
            queue.new.push(watched);
            drop(queue);
            self.inbox.bell.ring();
        }
        answer
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

impl Drop for Watch {
    fn drop(&mut self) {
        self.close();
    }
}

fn watch(inbox: &Inbox, mut notices: Notices, lost: &Lost) {
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        let (new, closed) = {
            let mut queue = inbox.queue.lock();
            (std::mem::take(&mut queue.new), queue.closed)
        };
        new.iter().for_each(|watched| notices.ask(&watched.event));
        watched.extend(new);
        let mut rest = Vec::with_capacity(watched.len());
        for one in watched.drain(..) {
            match one.event.try_is_complete() {
                Ok(false) => rest.push(one),
                Ok(true) => one.end(Ok(())),
                Err(error) => {
                    let reason: Arc<str> = told("the device failed", error).into();
                    if lost.set(reason.clone()).is_ok() {
                        tracing::error!(target: "vmem::gpu", %reason, "the VRAM tier is lost; the copies below serve");
                    }
                    one.end(Err(DeviceError::Lost(reason)));
                }
            }
        }
        watched = rest;
        if !watched.is_empty() {
            thread::park_timeout(WATCHDOG);
        } else if closed {
            return;
        } else {
            thread::park();
        }
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("new", &self.queue.lock().new.len()).finish()
    }
}
