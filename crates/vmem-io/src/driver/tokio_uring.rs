//! io_uring on threads of its own, by tokio-uring.
//!
//! Ownership: tokio-uring keeps the buffer of an operation whose future was dropped, but frees it
//! when its runtime is dropped, with the kernel still writing. So no future of an operation is
//! ever dropped here: a task on the ring's thread has the job and awaits each completion, and
//! the thread leaves its runtime only when it has no job. What is handed to tokio-uring is an
//! address; the buffer stays with the job. Made by `open_disk`.
//!
//! A thread takes all that is queued at each wake-up, and is woken only if it sleeps.

mod run;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::task::Poll;
use std::thread::{self, JoinHandle, ThreadId};

use futures::FutureExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::sync::Notify;
use vmem_core::backend::StagingMemory;

use self::run::{Counted, Running, run_job};
use super::RingOptions;
use super::closed_error;
use super::direct::Alignment;
use super::job::{self, Job};
use super::queued::{Engine, Queued};

/// Entries of the submission queue; the completion queue has twice as many.
const ENTRIES: u32 = 512;

/// I/O by io_uring on threads of its own; works without a runtime.
///
/// ```
/// use vmem_io::driver::{Driver, Keep, RingOptions, TokioUringDriver, WriteRun};
///
/// match TokioUringDriver::new(tempfile::tempfile()?, RingOptions::default()) {
///     Ok(driver) => futures::executor::block_on(async {
///         let run = WriteRun { offset: 0, parts: vec!["hello".into()] };
///         driver.write(vec![run], Keep::none()).await.1?;
///         driver.close().await
///     }),
///     // Where io_uring is denied.
///     Err(error) => Ok(println!("{error}")),
/// }
/// # ?; Ok::<(), std::io::Error>(())
/// ```
pub type TokioUringDriver = Queued<TokioUring>;

impl TokioUringDriver {
    /// A driver that owns `file`, which was opened as `options.alignment` says.
    ///
    /// # Errors
    ///
    /// If the system refuses a ring or a thread.
    pub fn new(file: File, options: RingOptions) -> io::Result<Self> {
        let options = options.clamped();
        Ok(Queued::over(TokioUring::start(file, options.rings)?, options.bounds()))
    }
}

/// Whether a ring moves bytes of this file, which is empty and of no further use.
///
/// # Errors
///
/// What the kernel refuses.
pub(super) fn prove(trial: File, alignment: Alignment) -> io::Result<()> {
    let engine = TokioUring::start(trial, 1)?;
    job::prove(alignment, |mut job| {
        let receiver = job.reply_to();
        engine.start(job);
        block_on(receiver).map_err(|_| io::Error::other("an I/O job was lost"))
    })
}

/// See the module's documentation.
pub struct TokioUring {
    lanes: Vec<Arc<Lane>>,
    next: AtomicUsize,
    ended: Arc<Ended>,
}

/// The threads, how many of them run, and the notification that all have ended.
#[derive(Default)]
struct Ended {
    threads: Mutex<Vec<JoinHandle<()>>>,
    live: AtomicUsize,
    bell: Notify,
}

/// What a thread is fed by.
#[derive(Default)]
struct Lane {
    queue: Mutex<Queue>,
    /// Registered while the thread sleeps.
    sleeper: AtomicWaker,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Box<Job>>,
    closing: bool,
}

impl TokioUring {
    fn start(file: File, lanes: usize) -> io::Result<Self> {
        let mut engine =
            TokioUring { lanes: Vec::new(), next: AtomicUsize::new(0), ended: Arc::default() };
        for number in 0..lanes {
            // The engine that is dropped on an error ends the threads that it has.
            engine.add_lane(number, file.try_clone()?)?;
        }
        Ok(engine)
    }

    fn add_lane(&mut self, number: usize, file: File) -> io::Result<()> {
        let lane = Arc::new(Lane::default());
        let (report, reported) = mpsc::sync_channel(1);
        let own = Arc::clone(&lane);
        let ended = Arc::clone(&self.ended);
        ended.live.fetch_add(1, Ordering::AcqRel);
        let body = move || {
            let _ending = Ending(ended);
            run_thread(&own, file, &report);
        };
        let spawned = thread::Builder::new().name(format!("vmem-uring-{number}")).spawn(body);
        self.ended.threads.lock().push(spawned?);
        self.lanes.push(lane);
        reported.recv().map_err(|_| io::Error::other("a ring thread was lost at its start"))?
    }

    fn begin_close(&self) {
        for lane in &self.lanes {
            lane.queue.lock().closing = true;
            lane.sleeper.wake();
        }
    }
}

fn current_id() -> ThreadId {
    thread::current().id()
}

impl Ended {
    fn join(&self) {
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // The last owner of an engine may be a job, dropped on one of its own threads, which
            // ends right after.
            if thread.thread().id() != current_id() {
                let _ = thread.join();
            }
        }
    }
}

/// Counts a thread out, however it ends.
struct Ending(Arc<Ended>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::AcqRel);
        self.0.bell.notify_waiters();
    }
}

impl Engine for TokioUring {
    fn start(&self, job: Box<Job>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len();
        self.lanes[number].add(job);
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.begin_close();
        let ended = Arc::clone(&self.ended);
        async move {
            loop {
                let bell = ended.bell.notified();
                tokio::pin!(bell);
                bell.as_mut().enable();
                if ended.live.load(Ordering::Acquire) == 0 {
                    break;
                }
                bell.await;
            }
            // They have nothing left to do, so this takes no time worth yielding for.
            ended.join();
        }
        .boxed()
    }

    fn shut_down(&self) {
        self.begin_close();
        self.ended.join();
    }

    fn register(&self, _memory: StagingMemory) -> io::Result<()> {
        let why = "tokio-uring lends a registered buffer to one operation at a time";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    fn describe(&self) -> String {
        format!("io_uring by tokio-uring, {} threads", self.lanes.len())
    }
}

impl Drop for TokioUring {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl fmt::Debug for TokioUring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioUring")
            .field("threads", &self.ended.live.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Lane {
    fn add(&self, job: Box<Job>) {
        let mut queue = self.queue.lock();
        if queue.closing {
            drop(queue);
            return job.refuse(closed_error());
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.sleeper.wake();
    }

    /// All that is queued; `None` when nothing is and nothing will be.
    async fn take(&self) -> Option<VecDeque<Box<Job>>> {
        poll_fn(|context| {
            for asleep in [false, true] {
                let mut queue = self.queue.lock();
                if !queue.jobs.is_empty() {
                    return Poll::Ready(Some(std::mem::take(&mut queue.jobs)));
                }
                if queue.closing {
                    return Poll::Ready(None);
                }
                drop(queue);
                if !asleep {
                    self.sleeper.register(context.waker());
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Refuses what was queued when the thread was lost.
    fn refuse_all(&self) {
        let jobs = {
            let mut queue = self.queue.lock();
            queue.closing = true;
            std::mem::take(&mut queue.jobs)
        };
        jobs.into_iter().for_each(|job| job.refuse(closed_error()));
    }
}

/// The life of a ring thread.
fn run_thread(lane: &Arc<Lane>, file: File, report: &mpsc::SyncSender<io::Result<()>>) {
    // Never `tokio_uring::start`, which panics where io_uring is denied.
    let made = tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES));
    let runtime = match made {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = report.send(Err(error));
            return;
        }
    };
    let _ = report.send(Ok(()));
    struct Refusing<'a>(&'a Lane);
    impl Drop for Refusing<'_> {
        fn drop(&mut self) {
            self.0.refuse_all();
        }
    }
    let _refusing = Refusing(lane);
    runtime.block_on(serve(lane, tokio_uring::fs::File::from_std(file)));
}

/// Runs jobs, each as a task of this thread, until the lane closes and none is left.
async fn serve(lane: &Arc<Lane>, file: tokio_uring::fs::File) {
    let file = Rc::new(file);
    let running = Rc::new(Running::default());
    while let Some(jobs) = lane.take().await {
        for job in jobs {
            let count = Counted::new(&running);
            let file = Rc::clone(&file);
            tokio_uring::spawn(async move {
                run_job(&file, job).await;
                drop(count);
            });
        }
    }
    while running.count.get() > 0 {
        running.bell.notified().await;
    }
}
