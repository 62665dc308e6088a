//! How bytes reach the file: the trait that every way of doing I/O implements.
//!
//! Ownership rule: an operation owns its buffers, its [`Keep`] and the file from the call until
//! its completion. Dropping the returned future cancels nothing that has started and frees nothing;
//! buffers and `Keep` are handed back with the result, or, if its waiter has gone, dropped when the
//! operation has ended, with no lock of the driver held. (An operation that was still waiting for
//! space in the queue has not started; dropping its future drops it.) Called by the disk tier
//! alone.

mod blocking;
mod choose;
mod direct;
mod file;
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "a part of it is for rings"))]
mod job;
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "a part of it is for rings"))]
mod memory;
mod queued;
#[cfg(target_os = "linux")]
mod reactor;
#[cfg(all(target_os = "linux", feature = "tokio-uring"))]
mod tokio_uring;

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use vmem_core::backend::{Clock, IoBuf, StagingMemory};

pub use blocking::{BlockingDriver, BlockingOptions};
pub use choose::driver_over;
pub(crate) use choose::{Chosen, choose};
pub use direct::Alignment;
pub use file::PositionalFile;
#[cfg(target_os = "linux")]
pub use reactor::ReactorDriver;
#[cfg(all(target_os = "linux", feature = "tokio-uring"))]
pub use tokio_uring::TokioUringDriver;

/// Positional I/O on one file.
///
/// The operation starts with the call, not with the first poll of the future. Short transfers are
/// resumed and `EINTR` is retried inside; an error keeps its errno. A driver whose queue is full
/// makes the futures of [`read`](Self::read) and [`write`](Self::write) wait, and never blocks the
/// calling thread; [`punch`](Self::punch) and [`sync`](Self::sync), of which the tier has one each
/// in flight, always start. After [`close`](Self::close) every call ends with [`closed_error`].
pub trait Driver: fmt::Debug + Send + Sync + 'static {
    /// Fills each piece of `buf` from the file, and returns the buffer. A file that ends before a
    /// piece does is [`io::ErrorKind::UnexpectedEof`]; the pieces that the file does hold are
    /// filled then, those in front of the first missing one at least.
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)>;

    /// Writes each run to the file; the parts of a run go one after the other from its offset.
    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)>;

    /// Gives the space of these ranges of the file back to the file system; they read as zeros
    /// afterwards. A file system that cannot is not an error.
    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)>;

    /// Waits until everything written before the call is on stable storage.
    fn sync(&self) -> BoxFuture<'static, io::Result<()>>;

    /// Waits for what is in flight, refuses what comes after, and closes the file.
    fn close(&self) -> BoxFuture<'static, io::Result<()>>;

    /// The time in which operations take place: that of the runtime where a test simulates them.
    fn clock(&self) -> Clock {
        Clock::Real
    }

    /// Whether a write that completed may still fail later, because it only reached a cache: the
    /// tier then reports a write as done only once a [`sync`](Self::sync) covers it.
    fn buffers_writes(&self) -> bool {
        true
    }

    /// Registers memory, from which and to which much will be transferred, with the kernel, so that
    /// it need not be pinned for each operation. The driver keeps `memory` until it has
    /// unregistered it.
    ///
    /// # Errors
    ///
    /// Why it was not; transfers work without it.
    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        drop(memory);
        Err(io::Error::new(io::ErrorKind::Unsupported, "this driver registers no memory"))
    }

    /// The alignment that offsets and lengths should have, in bytes, a power of two.
    fn block_bytes(&self) -> u32;

    /// The name of the driver and what it found, in words.
    fn describe(&self) -> Arc<str>;
}

/// How long the kernel is left alone after it was out of something.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// Limits of the io_uring drivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingOptions {
    /// The most reads and writes that are accepted and not done.
    pub queue_max: usize,
    /// How many rings; and threads, where each ring has its own.
    pub rings: usize,
    /// What extents are rounded to, in bytes: a power of two, at most 64 KiB.
    pub block_bytes: u32,
    /// How the file was opened.
    pub alignment: Alignment,
}

impl Default for RingOptions {
    /// Two rings, through the page cache.
    fn default() -> Self {
        RingOptions { queue_max: 256, rings: 2, block_bytes: 512, alignment: Alignment::NONE }
    }
}

#[cfg(target_os = "linux")]
impl RingOptions {
    /// Limits that cannot work are moved to the nearest that can.
    fn clamped(self) -> Self {
        let queue_max = self.queue_max.clamp(1, 4096);
        let rings = self.rings.clamp(1, 64);
        let block_bytes = self.block_bytes.clamp(512, 65536).next_power_of_two();
        RingOptions { queue_max, rings, block_bytes, ..self }
    }

    fn bounds(self) -> queued::Bounds {
        let RingOptions { queue_max, alignment, .. } = self;
        let block_bytes = alignment.block_bytes().max(self.block_bytes);
        queued::Bounds { queue_max, alignment, block_bytes }
    }
}

/// One contiguous read: `range` of the buffer from `offset` of the file, both in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPiece {
    /// Where in the file.
    pub offset: u64,
    /// Where in the buffer.
    pub range: Range<usize>,
}

/// One contiguous write from `offset` of the file, in bytes.
#[derive(Clone, Debug)]
pub struct WriteRun {
    /// Where in the file.
    pub offset: u64,
    /// What to write there, in order.
    pub parts: Vec<Bytes>,
}

impl WriteRun {
    /// What it writes, in bytes.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Whether it writes nothing.
    pub fn is_empty(&self) -> bool {
        self.parts.iter().all(Bytes::is_empty)
    }
}

/// What must live as long as an operation does, such as the extents that it writes to: moves into
/// the driver with the call and comes back with the completion.
///
/// ```
/// use vmem_io::driver::Keep;
///
/// let keep = Keep::new(vec![1, 2, 3]);
/// assert_eq!(keep.take::<Vec<i32>>(), Some(vec![1, 2, 3]));
/// assert_eq!(Keep::none().take::<Vec<i32>>(), None);
/// ```
pub struct Keep(Option<Box<dyn Any + Send>>);

impl Keep {
    /// Keeps `value`.
    pub fn new<T: Any + Send>(value: T) -> Self {
        Keep(Some(Box::new(value)))
    }

    /// Keeps nothing.
    pub fn none() -> Self {
        Keep(None)
    }

    /// The value, if it is a `T`; another one is dropped.
    pub fn take<T: Any>(self) -> Option<T> {
        self.0?.downcast().ok().map(|value| *value)
    }
}

impl fmt::Debug for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Keep(..)" } else { "Keep" })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the driver is closed")]
struct DriverClosed;

/// What a driver answers after it was closed.
pub fn closed_error() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, DriverClosed)
}

/// Whether this is [`closed_error`].
///
/// ```
/// use vmem_io::driver::{closed_error, is_closed};
///
/// assert!(is_closed(&closed_error()));
/// assert!(!is_closed(&std::io::ErrorKind::BrokenPipe.into()));
/// ```
pub fn is_closed(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<DriverClosed>())
}
