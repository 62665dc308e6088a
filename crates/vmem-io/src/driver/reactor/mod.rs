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

mod lane;
mod ring;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{BoxFuture, join_all};
use parking_lot::{Mutex, MutexGuard};
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use vmem_core::backend::{StagingMemory, spawn_named};

use self::lane::{Lane, State};
use self::ring::Ring;
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
        let serve = |(lane, fd)| {
            let serving = serve(Attached { lane, fd: Some(fd), origin });
            spawn_named(&runtime, "vmem-io-reactor", serving)
        };
        reactor.tasks = Mutex::new(made.into_iter().map(serve).collect());
        Ok(reactor)
    }

    /// A lane for this thread: its own, or the next one that is not locked.
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

/// A lane whose ring is drained by the owner of this. If this is dropped before the lane has
/// closed, because the runtime ends, its drop completes the rest.
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
                        tracing::error!(
                            target: "vmem::disk", %error, "the reactor does not watch the ring"
                        );
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
