//! A thread that waits for what others do on the device.
//!
//! Invariant: what was handed in is kept until all that its stream had by then has ended, or the
//! context is proven dead; so a kernel that was launched is never forgotten, whatever became of the
//! future or the lease that launched it. Where the driver gives no event, in a capture or for an
//! error that passes, it is kept and asked again. Streams do not wait for each other: each has a
//! line. Started by the tier, and again by a lease that ends after it.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::CudaStream;
use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::Mutex;
use vmem_core::backend::DeviceError;

use crate::card::{Card, told};
use crate::event::{Bell, Event};
use crate::lane::{Ended, WATCHDOG};
use crate::lend::Lent;
use crate::line::Line;
use crate::notices::Notices;

/// What is kept for as long as it is used.
pub(crate) type Keep = Box<dyn Any + Send>;

/// The shortest pause before the driver is asked for an event again; each is twice the previous
/// one.
const RETRY_MIN: Duration = Duration::from_millis(1);

/// What is kept until a stream has come to where it was.
pub(crate) struct Watched {
    pub(crate) stream: Arc<CudaStream>,
    /// None if there is none yet.
    pub(crate) event: Option<Arc<Event>>,
    /// Ended before there is an event.
    pub(crate) lent: Vec<Lent>,
    /// None once it was given back: whatever else ends this leaks it, and the card with it.
    keep: Option<Keep>,
    card: Option<Arc<Card>>,
    reply: Option<oneshot::Sender<Result<(), DeviceError>>>,
}

/// Says how it ended.
pub(crate) type Answer = oneshot::Receiver<Result<(), DeviceError>>;

impl Watched {
    /// `keep` is kept until the event has passed; where there is none, until one behind all that
    /// the stream has by then has.
    pub(crate) fn new(
        stream: Arc<CudaStream>,
        event: Option<Arc<Event>>,
        lent: Vec<Lent>,
        keep: Keep,
    ) -> (Self, Answer) {
        let (reply, answer) = oneshot::channel();
        let keep = Some(keep);
        let reply = Some(reply);
        (Watched { stream, event, lent, keep, card: None, reply }, answer)
    }

    pub(crate) fn end(mut self, outcome: Result<(), DeviceError>) {
        drop((self.event.take(), self.keep.take(), self.card.take()));
        if let Some(reply) = self.reply.take() {
            drop(reply.send(outcome));
        }
    }
}

impl Drop for Watched {
    /// A panic of the thread proves nothing about the device.
    fn drop(&mut self) {
        std::mem::forget((self.keep.take(), self.card.take()));
    }
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct Watch {
    inbox: Arc<Inbox>,
    /// Of the first thread.
    ended: Ended,
}

#[derive(Default)]
struct Inbox(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    new: Vec<Watched>,
    closed: bool,
    /// None while there is no thread.
    bell: Option<Arc<Bell>>,
}

impl Watch {
    /// Starts the thread. It holds a share of the card until it has ended.
    ///
    /// # Errors
    ///
    /// What the driver or the operating system says, in words.
    pub(crate) fn start(card: Arc<Card>) -> Result<Self, String> {
        let inbox = Arc::new(Inbox::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let ended = spawn(&inbox, &mut inbox.0.lock(), card, Some(ready))?;
        is_ready.recv().map_err(|_| "the thread ended".to_owned()).and_then(|ready| ready)?;
        Ok(Watch { inbox, ended })
    }

    /// Keeps it until its time has come. On any thread; waits for nothing.
    pub(crate) fn submit(&self, mut watched: Watched, card: &Arc<Card>) {
        watched.card = Some(card.clone());
        let mut queue = self.inbox.0.lock();
        queue.new.push(watched);
        if let Some(bell) = &queue.bell
            && !(queue.closed && vmem_core::planted!("gpu-late-threads"))
        {
            return bell.ring();
        }
        // The first one after the close, or after the last of those.
        if let Err(error) = spawn(&self.inbox, &mut queue, card.clone(), None) {
            let text = "what kernels use is kept until another lease ends";
            tracing::error!(target: "vmem::gpu", %error, "{text}");
        }
    }

    /// The thread ends once everything that was handed in has.
    pub(crate) fn close(&self) {
        let mut queue = self.inbox.0.lock();
        queue.closed = true;
        if let Some(bell) = &queue.bell {
            bell.ring();
        }
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

type Ready = std::sync::mpsc::Sender<Result<(), String>>;

/// Starts a thread for a queue that has none.
fn spawn(
    inbox: &Arc<Inbox>,
    queue: &mut Queue,
    card: Arc<Card>,
    ready: Option<Ready>,
) -> Result<Ended, String> {
    let (end, ended) = oneshot::channel::<()>();
    let bell = Arc::new(Bell::default());
    let inbox = inbox.clone();
    let theirs = bell.clone();
    let run = move || {
        theirs.hang(thread::current());
        let _gone = Gone(&inbox, &theirs);
        let mut notices = Notices::new(card.clone(), theirs.clone());
        let mut bound = card.context().bind().and_then(|()| notices.prepare());
        if let Some(ready) = ready {
            let said = bound.map_err(|error| told("making a stream", error));
            let refused = said.is_err();
            drop(ready.send(said));
            if refused {
                return;
            }
        }
        while bound.is_err() && !card.context().is_dead() {
            thread::sleep(WATCHDOG);
            bound = card.context().bind();
        }
        Watching { inbox: inbox.clone(), card, notices, lines: HashMap::new() }.run();
        drop(end);
    };
    let spawned = thread::Builder::new().name("vmem-gpu-watch".to_owned()).spawn(run);
    spawned.map_err(|error| format!("starting a thread: {error}"))?;
    queue.bell = Some(bell);
    Ok(ended.map(drop).boxed().shared())
}

/// The end of a thread, by a panic too: the next lease that is handed in starts another thread.
struct Gone<'a>(&'a Inbox, &'a Arc<Bell>);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.0.lock();
        if queue.bell.as_ref().is_some_and(|bell| Arc::ptr_eq(bell, self.1)) {
            queue.bell = None;
        }
    }
}

/// Whether the driver owes a line an event.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Refused {
    Nothing,
    Still,
    Newly,
}

/// What the thread has.
struct Watching {
    inbox: Arc<Inbox>,
    card: Arc<Card>,
    notices: Notices,
    /// By the handle of the stream.
    lines: HashMap<usize, Line>,
}

impl Watching {
    fn run(mut self) {
        let mut looked = Instant::now();
        let mut pause = WATCHDOG;
        loop {
            let mut queue = self.inbox.0.lock();
            let new = std::mem::take(&mut queue.new);
            if new.is_empty() && queue.closed && self.lines.is_empty() {
                queue.bell = None;
                return;
            }
            let closed = queue.closed;
            drop(queue);
            if new.iter().any(|watched| watched.event.is_none()) {
                pause = RETRY_MIN;
            }
            new.into_iter().for_each(|watched| self.accept(watched));
            // A notice may have been lost, and what was refused is tried again.
            let all = looked.elapsed() >= pause;
            let refused = self.look(all);
            if all {
                looked = Instant::now();
            }
            pause = match refused {
                Refused::Newly => RETRY_MIN,
                Refused::Still if all => (pause * 2).min(WATCHDOG),
                Refused::Still => pause,
                Refused::Nothing => WATCHDOG,
            };
            if self.lines.is_empty() {
                // A closed queue does not ring for its last entry.
                if !closed {
                    thread::park();
                }
            } else {
                let pause = if vmem_core::planted!("watchdog") { Duration::MAX } else { pause };
                thread::park_timeout(pause.saturating_sub(looked.elapsed()));
            }
        }
    }

    /// Puts one at the end of its line.
    fn accept(&mut self, mut watched: Watched) {
        let line = self.lines.entry(watched.stream.cu_stream().addr()).or_default();
        let event = watched.event.take();
        line.push(event, watched);
    }

    /// Looks at the lines of which something is new, or at all.
    fn look(&mut self, all: bool) -> Refused {
        let mut refused = Refused::Nothing;
        let Watching { card, notices, lines, .. } = self;
        lines.retain(|_, line| {
            let before = line.is_refused();
            line.look(card, notices, all);
            let after = if before { Refused::Still } else { Refused::Newly };
            refused = refused.max(if line.is_refused() { after } else { Refused::Nothing });
            !line.is_empty()
        });
        refused
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("new", &self.0.lock().new.len()).finish()
    }
}
