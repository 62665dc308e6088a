//! A driver made of jobs and an engine that runs them: what the drivers have in common.
//!
//! Invariant: a job is handed to the engine whole, with its bounce buffers and its place in the
//! queue, and comes back when its wave is over; this module never looks into a job that the engine
//! has. Called by the disk tier.
//!
//! At most [`Bounds::queue_max`] reads and writes are with the engine; the futures of further
//! ones wait for space, first come first served, and must be polled to get it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use vmem_core::backend::{IoBuf, StagingMemory};

use super::direct::Alignment;
use super::job::Job;
use super::memory::BounceBudget;
use super::{Driver, Keep, ReadPiece, WriteRun, closed_error};
use crate::process::Origin;

/// What a [`Queued`] driver is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Reads and writes that are with the engine at once.
    pub(super) queue_max: usize,
    /// How the file was opened.
    pub(super) alignment: Alignment,
    /// What extents are rounded to, in bytes.
    pub(super) block_bytes: u32,
}

/// Runs jobs.
pub trait Engine: fmt::Debug + Send + Sync + 'static {
    /// Runs the wave of a job and delivers the job; one that is closed refuses it. Never blocks.
    fn start(&self, job: Box<Job>);

    /// Refuses what comes after, and ends when nothing runs and the file is closed.
    fn close(&self) -> BoxFuture<'static, ()>;

    /// Waits for the same, blocking.
    fn shut_down(&self);

    /// Registers memory that stays where it is for the engine's life.
    fn register(&self, memory: StagingMemory) -> io::Result<()>;

    /// What it is, in words.
    fn describe(&self) -> String;
}

/// A driver made of an engine and the queue in front of it; named by the aliases
/// [`BlockingDriver`](super::BlockingDriver), [`ReactorDriver`](super::ReactorDriver) and
/// `TokioUringDriver`.
pub struct Queued<E: Engine> {
    core: Arc<Core<E>>,
    bounds: Bounds,
    described: Arc<str>,
}

struct Core<E> {
    origin: Origin,
    engine: E,
    space: Arc<Semaphore>,
    bounces: BounceBudget,
    punch_refused: Arc<AtomicBool>,
}

/// Where a job is between two waves.
enum State {
    /// With the engine.
    Started(oneshot::Receiver<Box<Job>>),
    /// It needs space in the queue, or bounce buffers.
    Waiting(Box<Job>),
}

impl<E: Engine> Queued<E> {
    pub(super) fn over(engine: E, bounds: Bounds) -> Self {
        let means = match bounds.alignment.is_direct() {
            false => "page cache",
            true => "direct I/O",
        };
        let Bounds { queue_max, block_bytes, .. } = bounds;
        let described = format!(
            "{}, {means}, at most {queue_max} operations, blocks of {block_bytes} bytes",
            engine.describe(),
        );
        let core = Core {
            origin: Origin::here(),
            engine,
            space: Arc::new(Semaphore::new(queue_max)),
            bounces: BounceBudget::new(),
            punch_refused: Arc::default(),
        };
        Queued { core: Arc::new(core), bounds, described: described.into() }
    }

    /// Starts the job now if there is space, and drives it to its end.
    fn run(
        &self,
        job: Box<Job>,
    ) -> impl Future<Output = Option<Box<Job>>> + Send + 'static + use<E> {
        let core = Arc::clone(&self.core);
        let mut state = core.try_start(job);
        async move {
            loop {
                let job = match state {
                    // Without an answer the job was lost to a panic, and leaked.
                    State::Started(receiver) => receiver.await.ok()?,
                    State::Waiting(job) if job.is_settled() => job,
                    State::Waiting(job) => match core.start_in_turn(job).await {
                        Ok(receiver) => receiver.await.ok()?,
                        Err(refused) => refused,
                    },
                };
                if job.is_settled() {
                    return Some(job);
                }
                state = core.try_start(job);
            }
        }
    }

    /// The same, past the queue.
    fn run_at_once(
        &self,
        mut job: Box<Job>,
    ) -> impl Future<Output = Option<Box<Job>>> + Send + 'static + use<E> {
        job.plan_wave();
        let receiver = job.reply_to();
        match job.is_settled() {
            true => job.deliver(),
            false => self.core.engine.start(job),
        }
        receiver.map(Result::ok)
    }
}

impl<E: Engine> Core<E> {
    fn try_start(&self, mut job: Box<Job>) -> State {
        if job.is_settled() {
            return State::Waiting(job);
        }
        let Ok(permit) = Arc::clone(&self.space).try_acquire_owned() else {
            return State::Waiting(job);
        };
        let bytes = job.plan_wave();
        let share = match bytes {
            0 => None,
            _ => match self.bounces.try_share(bytes) {
                Ok(share) => Some(share),
                Err(_) => return State::Waiting(job),
            },
        };
        job.equip(&self.bounces, share);
        job.permit = Some(permit);
        let receiver = job.reply_to();
        self.engine.start(job);
        State::Started(receiver)
    }

    /// Waits for space. What it holds meanwhile, others give back without waiting for this job:
    /// bounce buffers go back when their wave has ended, polled or not.
    async fn start_in_turn(
        &self,
        mut job: Box<Job>,
    ) -> Result<oneshot::Receiver<Box<Job>>, Box<Job>> {
        let bytes = job.plan_wave();
        let share = match bytes {
            0 => None,
            _ => match self.bounces.share(bytes).await {
                Some(share) => Some(share),
                None => return Err(job.refused(closed_error())),
            },
        };
        let Ok(permit) = Arc::clone(&self.space).acquire_owned().await else {
            return Err(job.refused(closed_error()));
        };
        job.equip(&self.bounces, share);
        job.permit = Some(permit);
        let receiver = job.reply_to();
        self.engine.start(job);
        Ok(receiver)
    }

    fn refuse_waiting(&self) {
        self.space.close();
        self.bounces.close();
    }
}

fn lost() -> io::Error {
    io::Error::other("an I/O job was lost")
}

impl<E: Engine> Driver for Queued<E> {
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        let job = self.run(Job::read(buf, &pieces, keep, self.bounds.alignment));
        async move {
            let Some(job) = job.await else {
                return (IoBuf::from_vec(Vec::new()), Keep::none(), Err(lost()));
            };
            let (buf, keep, result) = job.into_result();
            (buf.unwrap_or_else(|| IoBuf::from_vec(Vec::new())), keep, result)
        }
        .boxed()
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        settled(self.run(Job::write(runs, keep, self.bounds.alignment))).boxed()
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let refused = Arc::clone(&self.core.punch_refused);
        settled(self.run_at_once(Job::punch(&ranges, keep, refused))).boxed()
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        settled(self.run_at_once(Job::sync())).map(|(_, result)| result).boxed()
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        self.core.refuse_waiting();
        self.core.engine.close().map(Ok).boxed()
    }

    fn buffers_writes(&self) -> bool {
        !self.bounds.alignment.is_direct()
    }

    fn block_bytes(&self) -> u32 {
        self.bounds.block_bytes
    }

    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        self.core.engine.register(memory)
    }

    fn describe(&self) -> Arc<str> {
        Arc::clone(&self.described)
    }
}

async fn settled(job: impl Future<Output = Option<Box<Job>>>) -> (Keep, io::Result<()>) {
    match job.await {
        None => (Keep::none(), Err(lost())),
        Some(job) => {
            let (_, keep, result) = job.into_result();
            (keep, result)
        }
    }
}

impl<E: Engine> Drop for Queued<E> {
    /// Waits for what the engine has; what waits for space is refused.
    fn drop(&mut self) {
        if self.core.origin.is_inherited() {
            // The engine's memory and threads are not here, its rings are the parent's.
            return std::mem::forget(Arc::clone(&self.core));
        }
        self.core.refuse_waiting();
        self.core.engine.shut_down();
    }
}

impl<E: Engine> fmt::Debug for Queued<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queued")
            .field("bounds", &self.bounds)
            .field("engine", &self.core.engine)
            .field("space", &self.core.space.available_permits())
            .finish()
    }
}
