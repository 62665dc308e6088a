//! The driver that works everywhere: positional system calls on threads of its own.
//!
//! Invariant: an operation that was accepted runs to its end and returns what it owns, whoever
//! still waits for it, even if the file panics. Called by the disk tier.
//!
//! Through the page cache: a completed write still needs a sync. At most
//! [`BlockingOptions::queue_max`] reads and writes are accepted and not done; the futures of further
//! ones wait for room, first come first served, and must be polled to get it.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vmem_core::backend::IoBuf;

use super::file::{PositionalFile, persist, read_pieces, write_runs};
use super::pool::Pool;
use super::{Driver, Keep, ReadPiece, WriteRun, closed_error};

/// Limits of a [`BlockingDriver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockingOptions {
    /// At most so many threads; they start when there is work.
    pub threads_max: usize,
    /// At most so many reads and writes are accepted and not done.
    pub queue_max: usize,
    /// What extents are rounded to, in bytes: a power of two, at most 64 KiB.
    pub block_bytes: u32,
}

impl Default for BlockingOptions {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        BlockingOptions {
            threads_max: cores.saturating_mul(4).min(8),
            queue_max: 256,
            block_bytes: 512,
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
/// let (buf, _, result) = driver.read(IoBuf::from_vec(vec![0; 4]), vec![piece], Keep::none()).await;
/// result?;
/// assert_eq!(&buf[..], b"disk");
/// driver.close().await
/// # })?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct BlockingDriver<F: PositionalFile = File> {
    core: Arc<Core<F>>,
    options: BlockingOptions,
}

struct Core<F> {
    open: Arc<Open<F>>,
    pool: Pool,
    room: Arc<Semaphore>,
}

struct Open<F> {
    /// Taken out when the driver closes; running operations have their own share.
    file: Mutex<Option<Arc<F>>>,
    /// The file system said that it cannot punch holes: it is not asked again.
    punch_refused: AtomicBool,
}

/// What an operation gives back.
type Done<S> = (S, io::Result<()>);

impl<F: PositionalFile> BlockingDriver<F> {
    /// A driver that owns `file`. Limits that cannot work are moved to the nearest that can.
    pub fn new(file: F, options: BlockingOptions) -> Self {
        let options = BlockingOptions {
            threads_max: options.threads_max.clamp(1, 1024),
            queue_max: options.queue_max.clamp(1, Semaphore::MAX_PERMITS),
            block_bytes: options.block_bytes.clamp(1, 65536).next_power_of_two(),
        };
        let open = Arc::new(Open {
            file: Mutex::new(Some(Arc::new(file))),
            punch_refused: AtomicBool::new(false),
        });
        let closing = Arc::clone(&open);
        // Closing a large file that has no name any more frees its blocks, which takes a while:
        // the last thread of the pool does it, not the task that closes.
        let finish = Box::new(move || drop(closing.file.lock().take()));
        BlockingDriver {
            core: Arc::new(Core {
                open,
                pool: Pool::new(options.threads_max, finish),
                room: Arc::new(Semaphore::new(options.queue_max)),
            }),
            options,
        }
    }

    /// Starts at once where there is room, and else when the future gets some.
    fn admit<S: Send + 'static>(
        &self,
        state: S,
        work: fn(&Open<F>, &F, &mut S) -> io::Result<()>,
    ) -> BoxFuture<'static, Done<S>>
    where
        Lost: Into<S>,
    {
        if let Ok(permit) = Arc::clone(&self.core.room).try_acquire_owned() {
            return self.core.start(Some(permit), state, work);
        }
        let core = Arc::clone(&self.core);
        async move {
            match Arc::clone(&core.room).acquire_owned().await {
                Ok(permit) => core.start(Some(permit), state, work).await,
                Err(_) => (state, Err(closed_error())),
            }
        }
        .boxed()
    }
}

/// Stands for what an operation owned, if its thread was lost with it.
#[derive(Debug)]
struct Lost;

type Reading = (IoBuf, Vec<ReadPiece>, Keep);
type Writing = (Vec<WriteRun>, Keep);
type Punching = (Vec<Range<u64>>, Keep);

impl From<Lost> for Reading {
    fn from(_: Lost) -> Self {
        (IoBuf::from_vec(Vec::new()), Vec::new(), Keep::none())
    }
}

impl From<Lost> for Writing {
    fn from(_: Lost) -> Self {
        (Vec::new(), Keep::none())
    }
}

impl From<Lost> for Punching {
    fn from(_: Lost) -> Self {
        (Vec::new(), Keep::none())
    }
}

impl From<Lost> for () {
    fn from(_: Lost) -> Self {}
}

impl<F: PositionalFile> Core<F> {
    /// Hands the operation to the pool, with all that it owns.
    fn start<S: Send + 'static>(
        &self,
        permit: Option<OwnedSemaphorePermit>,
        mut state: S,
        work: fn(&Open<F>, &F, &mut S) -> io::Result<()>,
    ) -> BoxFuture<'static, Done<S>>
    where
        Lost: Into<S>,
    {
        let (sender, receiver) = oneshot::channel();
        let open = Arc::clone(&self.open);
        self.pool.submit(Box::new(move |run| {
            let result = run.and_then(|()| open.perform(&mut state, work));
            drop(permit);
            // Where nobody waits any more this drops buffers and extents, now that the
            // operation has ended.
            drop(sender.send((state, result)));
        }));
        let lost = || (Lost.into(), Err(io::Error::other("an I/O thread was lost")));
        receiver.map(move |done| done.unwrap_or_else(|_| lost())).boxed()
    }
}

impl<F: PositionalFile> Open<F> {
    fn perform<S>(
        &self,
        state: &mut S,
        work: fn(&Open<F>, &F, &mut S) -> io::Result<()>,
    ) -> io::Result<()> {
        let file = self.file.lock().clone().ok_or_else(closed_error)?;
        catch_unwind(AssertUnwindSafe(|| work(self, &file, state)))
            .unwrap_or_else(|_| Err(io::Error::other("an I/O operation panicked")))
    }

    fn punch(&self, file: &F, ranges: &[Range<u64>]) -> io::Result<()> {
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            if self.punch_refused.load(Ordering::Relaxed) {
                break;
            }
            match persist(|| file.punch(range.clone())) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    self.punch_refused.store(true, Ordering::Relaxed);
                }
                other => other?,
            }
        }
        Ok(())
    }
}

impl<F: PositionalFile> Driver for BlockingDriver<F> {
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        self.admit::<Reading>((buf, pieces, keep), |_, file, (buf, pieces, _)| {
            read_pieces(file, buf, pieces)
        })
        .map(|((buf, _, keep), result)| (buf, keep, result))
        .boxed()
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        self.admit::<Writing>((runs, keep), |_, file, (runs, _)| write_runs(file, runs))
            .map(|((_, keep), result)| (keep, result))
            .boxed()
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let work: fn(&Open<F>, &F, &mut Punching) -> _ =
            |open, file, (ranges, _)| open.punch(file, ranges);
        self.core
            .start(None, (ranges, keep), work)
            .map(|((_, keep), result)| (keep, result))
            .boxed()
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        // A sync that was interrupted has not synced; one that failed is never repeated here.
        let work: fn(&Open<F>, &F, &mut ()) -> _ = |_, file, ()| persist(|| file.sync());
        self.core.start(None, (), work).map(|((), result)| result).boxed()
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        self.core.room.close();
        self.core.pool.begin_close();
        self.core.pool.closed().map(Ok).boxed()
    }

    fn block_bytes(&self) -> u32 {
        self.options.block_bytes
    }

    fn describe(&self) -> Arc<str> {
        let BlockingOptions { threads_max, queue_max, block_bytes } = self.options;
        format!(
            "blocking driver: page cache, at most {threads_max} threads and {queue_max} operations, \
             blocks of {block_bytes} bytes"
        )
        .into()
    }
}

impl<F: PositionalFile> Drop for BlockingDriver<F> {
    /// Waits for what was accepted; what waits for room is refused.
    fn drop(&mut self) {
        self.core.room.close();
        self.core.pool.shut_down();
    }
}

impl<F: PositionalFile> fmt::Debug for BlockingDriver<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingDriver")
            .field("options", &self.options)
            .field("pool", &self.core.pool)
            .field("room", &self.core.room.available_permits())
            .finish()
    }
}
