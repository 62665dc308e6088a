//! The driver that works everywhere: positional system calls on threads of its own.
//!
//! Invariant: a job that was accepted runs to its end and is delivered, with or without a waiter,
//! even if the file panics. Called by the disk tier.

use std::fmt;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::available_parallelism;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use vmem_core::backend::StagingMemory;

use super::closed_error;
use super::direct::Alignment;
use super::file::PositionalFile;
use super::job::{Job, Kind, Step};
use super::queued::{Bounds, Engine, Queued};
use crate::pool::Pool;

/// Limits of a [`BlockingDriver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockingOptions {
    /// The most threads; they start when there is work.
    pub threads_max: usize,
    /// The most reads and writes that are accepted and not done.
    pub queue_max: usize,
    /// What extents are rounded to, in bytes: a power of two, at most 64 KiB.
    pub block_bytes: u32,
    /// How the file was opened.
    pub alignment: Alignment,
}

impl Default for BlockingOptions {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        BlockingOptions {
            threads_max: cores.saturating_mul(4).min(8),
            queue_max: 256,
            block_bytes: 512,
            alignment: Alignment::NONE,
        }
    }
}

/// I/O by calls that block, on threads of its own; works without a runtime.
///
/// ```
/// use vmem_io::driver::{BlockingDriver, BlockingOptions, Driver, Keep, ReadPiece, WriteRun};
/// use vmem_core::backend::IoBuf;
///
/// let file = tempfile::tempfile()?;
/// let driver = BlockingDriver::new(file, BlockingOptions::default());
/// # futures::executor::block_on(async {
/// let run = WriteRun { offset: 512, parts: vec!["hello ".into(), "disk".into()] };
/// driver.write(vec![run], Keep::none()).await.1?;
/// let piece = ReadPiece { offset: 518, range: 0..4 };
/// let buf = IoBuf::from_vec(vec![0; 4]);
/// let (buf, _, result) = driver.read(buf, vec![piece], Keep::none()).await;
/// result?;
/// assert_eq!(&buf[..], b"disk");
/// driver.close().await
/// # })?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub type BlockingDriver<F = File> = Queued<Blocking<F>>;

impl<F: PositionalFile> BlockingDriver<F> {
    /// A driver that owns `file`. Limits that cannot work are moved to the nearest that can.
    pub fn new(file: F, options: BlockingOptions) -> Self {
        let threads_max = options.threads_max.clamp(1, 1024);
        let block_bytes = options.block_bytes.clamp(1, 65536).next_power_of_two();
        let bounds = Bounds {
            queue_max: options.queue_max.clamp(1, Semaphore::MAX_PERMITS),
            alignment: options.alignment,
            block_bytes: block_bytes.max(options.alignment.offset),
        };
        Queued::over(Blocking::start(file, threads_max), bounds)
    }
}

/// Runs jobs on a pool of threads, one thread each.
pub struct Blocking<F> {
    /// Taken out when the driver closes; running jobs have their own share.
    file: Arc<Mutex<Option<Arc<F>>>>,
    pool: Pool,
    threads_max: usize,
}

impl<F: PositionalFile> Blocking<F> {
    fn start(file: F, threads_max: usize) -> Self {
        let file = Arc::new(Mutex::new(Some(Arc::new(file))));
        let closing = Arc::clone(&file);
        // Closing a large file that has no name any more frees its blocks, which takes a while:
        // the last thread of the pool does it, not the task that closes.
        let finish = Box::new(move || drop(closing.lock().take()));
        Blocking { file, pool: Pool::new("vmem-io", threads_max, finish), threads_max }
    }
}

impl<F: PositionalFile> Engine for Blocking<F> {
    fn start(&self, job: Box<Job>) {
        let file = Arc::clone(&self.file);
        self.pool.submit(Box::new(move |run| {
            let open = run.and_then(|()| file.lock().clone().ok_or_else(closed_error));
            match open {
                Ok(file) => run_wave(&*file, job),
                Err(error) => job.refuse(error),
            }
        }));
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        self.pool.begin_close();
        self.pool.closed().boxed()
    }

    fn shut_down(&self) {
        self.pool.shut_down();
    }

    fn register(&self, _memory: StagingMemory) -> io::Result<()> {
        let why = "system calls know no registered memory";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    fn describe(&self) -> String {
        format!("blocking calls on at most {} threads", self.threads_max)
    }
}

impl<F> fmt::Debug for Blocking<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocking").field("pool", &self.pool).finish_non_exhaustive()
    }
}

/// Runs the wave of a job, one operation after the other, and delivers it.
fn run_wave<F: PositionalFile>(file: &F, mut job: Box<Job>) {
    while let Some(op) = job.start_op() {
        loop {
            // No call is in flight once it has returned, or panicked.
            let called = catch_unwind(AssertUnwindSafe(|| attempt(file, &mut job, op)));
            let error = match called {
                Ok(Ok(count)) => match job.complete(op, i32::try_from(count).unwrap_or(i32::MAX)) {
                    Step::Ended => break,
                    Step::Again | Step::Later => continue,
                },
                Ok(Err(error)) => error,
                Err(_) => io::Error::other("an I/O operation panicked"),
            };
            match error.raw_os_error() {
                None => {
                    job.fail(error);
                    break;
                }
                Some(errno) => match job.complete(op, -errno) {
                    Step::Ended => break,
                    Step::Again => {}
                    Step::Later => std::thread::sleep(super::RETRY_AFTER),
                },
            }
        }
    }
    job.deliver();
}

/// One system call; how many bytes it moved.
fn attempt<F: PositionalFile>(file: &F, job: &mut Job, op: usize) -> io::Result<usize> {
    let offset = job.submission(op).offset;
    match job.submission(op).kind {
        Kind::Read => file.read_at(job.target(op), offset),
        Kind::Write => file.write_vectored_at(&job.sources(op), offset),
        Kind::Punch => {
            let len = job.submission(op).len;
            file.punch(offset..offset + len).map(|()| 0)
        }
        Kind::Sync => file.sync().map(|()| 0),
    }
}
