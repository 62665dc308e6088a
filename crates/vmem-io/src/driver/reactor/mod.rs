//! io_uring without a thread: the calling task submits, and tokio's reactor announces completions.
//!
//! Ownership: a [`Ring`] owns its jobs, and a [`Lane`] owns its ring, under a lock. Nothing of an
//! operation belongs to a future: a dropped one drops the receiver of a reply. One task for each
//! lane drains completions; it ends when the driver is closed. If its runtime goes first, what the
//! kernel still has is drained by a thread that lives just as long; and a driver that is dropped
//! waits for the same. A ring is dropped with no operation in it. Made by `open_disk`.
//!
//! There are several lanes, because the call that submits is made under the lock of the lane:
//! threads use different ones, and one that is taken is passed by.

#![allow(clippy::vec_box, reason = "jobs change hands as pointers")]

mod ring;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{BoxFuture, join_all};
use parking_lot::{Mutex, MutexGuard};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use vmem_core::backend::StagingMemory;

use self::ring::{Ring, same};
use super::closed_error;
use super::direct::Alignment;
use super::job::{self, Job};
use super::queued::{Engine, Queued};
use super::{RETRY_AFTER, RingOptions};
use crate::process::Origin;

/// How long the kernel may take nothing of what is submitted before the ring is given up.
const STUCK_MAX: Duration = Duration::from_secs(5);

/// I/O by io_uring, submitted from the calling task. It is made inside a tokio runtime with an I/O
/// driver and a timer, which completes its operations; the calls may come from anywhere.
///
/// ```
/// use vmem_io::driver::{Driver, Keep, ReactorDriver, RingOptions, WriteRun};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> std::io::Result<()> {
/// match ReactorDriver::new(tempfile::tempfile()?, RingOptions::default()) {
///     Ok(driver) => {
///         let run = WriteRun { offset: 0, parts: vec!["hello".into()] };
///         driver.write(vec![run], Keep::none()).await.1?;
///         driver.close().await
///     }
///     // Where io_uring is denied.
///     Err(error) => Ok(println!("{error}")),
/// }
/// # }
/// ```
pub type ReactorDriver = Queued<Reactor>;

impl ReactorDriver {
    /// A driver that owns `file`, which was opened as `options.alignment` says.
    ///
    /// # Errors
    ///
    /// If the kernel refuses a ring, or this is not inside of a runtime that can watch it.
    pub fn new(file: File, options: RingOptions) -> io::Result<Self> {
        let options = options.clamped();
        Ok(Queued::over(Reactor::start(file, options.rings)?, options.bounds()))
    }
}

/// Whether a ring moves bytes of this file, which is empty and of no further use.
///
/// # Errors
///
/// What the kernel refuses.
pub(super) fn prove(trial: File, alignment: Alignment) -> io::Result<()> {
    let trial = Arc::new(trial);
    job::prove(alignment, |job| ring::run_alone(Arc::clone(&trial), job))
}

/// See the module's documentation.
pub struct Reactor {
    lanes: Box<[Arc<Lane>]>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// One ring, and what it takes to wait for it.
struct Lane {
    state: Mutex<State>,
    /// Rung for the task of the lane: something is to be tried again, or the lane closes.
    kick: Notify,
    /// Rung when a closing lane has no jobs any more.
    idle: Notify,
}

struct State {
    /// Gone once the lane is closed.
    ring: Option<Ring>,
    closing: bool,
    /// Why the kernel takes nothing any more.
    refusal: Option<io::Error>,
    /// Since when it has left something that was submitted.
    stuck_since: Option<Instant>,
}

impl Reactor {
    fn start(file: File, lanes: usize) -> io::Result<Self> {
        let runtime = Handle::try_current().map_err(io::Error::other)?;
        let file = Arc::new(file);
        let mut reactor = Reactor { lanes: Box::default(), tasks: Mutex::default() };
        let mut made = Vec::new();
        for _ in 0..lanes {
            let ring = Ring::new(Arc::clone(&file))?;
            let fd = ring.watch()?;
            made.push((Arc::new(Lane::new(ring)), fd));
        }
        reactor.lanes = made.iter().map(|(lane, _)| Arc::clone(lane)).collect();
        let origin = Origin::here();
        let serve = |(lane, fd)| runtime.spawn(serve(Attached { lane, fd: Some(fd), origin }));
        reactor.tasks = Mutex::new(made.into_iter().map(serve).collect());
        Ok(reactor)
    }

    /// A lane for this thread: its own, or the next one that nobody is at.
    fn lane(&self) -> (&Arc<Lane>, MutexGuard<'_, State>) {
        let own = own_number() % self.lanes.len();
        let from_own = self.lanes[own..].iter().chain(&self.lanes[..own]);
        for lane in from_own {
            if let Some(state) = lane.state.try_lock() {
                return (lane, state);
            }
        }
        (&self.lanes[own], self.lanes[own].state.lock())
    }
}

/// A small number that stays the same for a thread.
fn own_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    }
    let number = |own: &Cell<Option<usize>>| {
        let number = own.get().unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed));
        own.set(Some(number));
        number
    };
    OWN.try_with(number).unwrap_or(0)
}

impl Engine for Reactor {
    fn start(&self, job: Box<Job>) {
        let (lane, state) = self.lane();
        lane.start(state, job);
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let lanes: Vec<_> = self.lanes.iter().map(Arc::clone).collect();
        lanes.iter().for_each(|lane| lane.begin_close());
        let tasks = std::mem::take(&mut *self.tasks.lock());
        async move {
            let rings = join_all(lanes.iter().map(|lane| lane.closed())).await;
            // They have nothing left to do; one that was cancelled with its runtime has ended too.
            join_all(tasks).await;
            drop_apart(rings).await;
        }
        .boxed()
    }

    fn shut_down(&self) {
        for lane in &self.lanes {
            lane.begin_close();
            lane.drain();
        }
    }

    /// One ring is enough: it is the calls that bypass object space which use this memory.
    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        match &mut self.lanes[0].state.lock().ring {
            Some(ring) => ring.register(memory),
            None => Err(closed_error()),
        }
    }

    fn describe(&self) -> String {
        format!("io_uring from the calling task, {} rings", self.lanes.len())
    }
}

/// Drops `value` on a thread of its own: closing a large file that has no name frees its blocks,
/// which takes a while.
async fn drop_apart<T: Send + 'static>(value: T) {
    let (sender, receiver) = oneshot::channel();
    let work = move || {
        drop(value);
        let _ = sender.send(());
    };
    // Where no thread is to be had, it was dropped here, with the closure.
    if let Ok(thread) = thread::Builder::new().name("vmem-io-close".to_owned()).spawn(work) {
        let _ = receiver.await;
        let _ = thread.join();
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

impl Lane {
    fn new(ring: Ring) -> Self {
        Lane {
            state: Mutex::new(State {
                ring: Some(ring),
                closing: false,
                refusal: None,
                stuck_since: None,
            }),
            kick: Notify::new(),
            idle: Notify::new(),
        }
    }

    /// Submits a job and takes what is complete, which may be the same job.
    fn start(&self, mut state: MutexGuard<'_, State>, job: Box<Job>) {
        if let Err(error) = state.accepts() {
            drop(state);
            return job.refuse(error);
        }
        if let Some(ring) = &mut state.ring {
            ring.insert(job);
        }
        self.turn(state);
    }

    /// Submits what is to be submitted, and takes what is complete until there is no more of
    /// either. Jobs that are over are delivered with the lock released.
    fn turn(&self, mut state: MutexGuard<'_, State>) {
        let mut over = Vec::new();
        state.turn(&mut over);
        let kick = state.ring.as_ref().is_some_and(Ring::wants_retry);
        let idle = state.is_idle();
        drop(state);
        over.into_iter().for_each(Job::deliver);
        if kick {
            self.kick.notify_one();
        }
        if idle {
            self.idle.notify_waiters();
        }
    }

    fn begin_close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        self.turn(state);
        self.kick.notify_one();
    }

    /// Waits until a lane that closes has no jobs, and takes its ring away.
    async fn closed(&self) -> Option<Ring> {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if let Some(ring) = self.take_idle_ring() {
                return Some(ring);
            }
            if self.is_gone() {
                return None;
            }
            idle.await;
        }
    }

    fn take_idle_ring(&self) -> Option<Ring> {
        let mut state = self.state.lock();
        if state.is_idle() { state.ring.take() } else { None }
    }

    /// Waits for all jobs, blocking, with nobody's help; then drops the ring.
    fn drain(&self) {
        while !self.is_gone() {
            if let Some(ring) = self.take_idle_ring() {
                drop(ring);
                break;
            }
            let mut over = Vec::new();
            let refused = {
                let mut state = self.state.lock();
                state.turn(&mut over);
                let waiting = over.is_empty() && !state.is_idle();
                let ring = state.ring.as_mut().filter(|_| waiting);
                ring.is_some_and(|ring| ring.wants_retry() || ring.submit_and_wait().is_err())
            };
            over.into_iter().for_each(Job::deliver);
            if refused {
                thread::sleep(RETRY_AFTER);
                self.retry();
            }
        }
        self.idle.notify_waiters();
    }

    fn retry(&self) {
        let mut state = self.state.lock();
        if let Some(ring) = &mut state.ring {
            ring.unpark();
        }
        self.turn(state);
    }

    /// Whether its ring was taken away, after which there is nothing to do.
    fn is_gone(&self) -> bool {
        self.state.lock().ring.is_none()
    }

    /// Whether its task is needed no more, and else whether something is to be tried again.
    fn outlook(&self) -> (bool, bool) {
        let state = self.state.lock();
        let retry = state.ring.as_ref().is_some_and(Ring::wants_retry);
        (state.ring.is_none() || state.is_idle(), retry)
    }
}

impl State {
    fn accepts(&self) -> io::Result<()> {
        match (&self.refusal, self.closing || self.ring.is_none()) {
            (_, true) => Err(closed_error()),
            (Some(refusal), false) => Err(same(refusal)),
            (None, false) => Ok(()),
        }
    }

    /// It closes, and has no jobs.
    fn is_idle(&self) -> bool {
        self.closing && self.ring.as_ref().is_some_and(|ring| ring.jobs() == 0)
    }

    fn turn(&mut self, over: &mut Vec<Box<Job>>) {
        let Some(ring) = &mut self.ring else { return };
        loop {
            let outcome = ring.submit();
            let more = ring.reap(over);
            if !ring.has_unsent() {
                self.stuck_since = None;
            } else if self.stuck_since.is_none() {
                self.stuck_since = Some(Instant::now());
            }
            let refusal = match (outcome, self.stuck_since) {
                (Err(refusal), _) => refusal,
                (Ok(()), Some(since)) if since.elapsed() > STUCK_MAX => {
                    io::ErrorKind::ResourceBusy.into()
                }
                (Ok(()), None) if more => continue,
                (Ok(()), _) => return,
            };
            tracing::error!(error = %refusal, "io_uring takes no more operations");
            ring.give_up(&refusal, over);
            self.refusal = Some(refusal);
            return;
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lane = f.debug_struct("Lane");
        if let Some(state) = self.state.try_lock() {
            lane.field("ring", &state.ring).field("closing", &state.closing);
        }
        lane.finish_non_exhaustive()
    }
}

/// A lane whose ring is drained by whoever has this. Dropped before the lane has closed, which is
/// when the runtime goes, it sees to the rest.
struct Attached {
    lane: Arc<Lane>,
    /// The ring, in the reactor. None while this is dropped.
    fd: Option<AsyncFd<OwnedFd>>,
    origin: Origin,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let fd = self.fd.take();
        if self.origin.is_inherited() {
            // The memory of the ring is not here, and the reactor is the parent's.
            return std::mem::forget((fd, Arc::clone(&self.lane)));
        }
        drop(fd);
        if self.lane.outlook().0 {
            return;
        }
        self.lane.begin_close();
        let lane = Arc::clone(&self.lane);
        let rescue = thread::Builder::new().name("vmem-io-drain".to_owned());
        if rescue.spawn(move || lane.drain()).is_err() {
            self.lane.drain();
        }
    }
}

/// Drains the ring of a lane until the lane is closed.
async fn serve(attached: Attached) {
    let (lane, Some(fd)) = (&attached.lane, &attached.fd) else { return };
    loop {
        let (done, retry) = lane.outlook();
        if done {
            return;
        }
        tokio::select! {
            ready = fd.readable() => {
                // What completes after this line makes it readable again.
                match ready {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(error) => {
                        tracing::error!(%error, "the reactor does not watch the ring");
                        return;
                    }
                }
                lane.turn(lane.state.lock());
            }
            () = lane.kick.notified() => {}
            () = tokio::time::sleep(RETRY_AFTER), if retry => lane.retry(),
        }
    }
}
