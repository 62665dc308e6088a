//! How bytes reach the file: the trait that every way of doing I/O implements.
//!
//! Ownership rule: a driver owns the buffers (and the file) of an operation from the call until
//! its completion. Dropping the returned future cancels nothing and frees nothing; the buffers are
//! released when the operation ends. Called by the disk tier alone.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use vmem_core::backend::IoBuf;

/// Positional I/O on one file.
///
/// The operation starts with the call, not with the first poll of the future. Short transfers are
/// resumed and `EINTR` is retried inside; an error keeps its errno. A driver whose queue is full
/// makes the future wait and never blocks the calling thread.
pub trait Driver: fmt::Debug + Send + Sync + 'static {
    /// Fills each piece of `buf` from the file, and returns the buffer. A file that ends before a
    /// piece does is [`io::ErrorKind::UnexpectedEof`].
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
    ) -> BoxFuture<'static, (IoBuf, io::Result<()>)>;

    /// Writes each run to the file; the parts of a run go one after the other from its offset.
    fn write(&self, runs: Vec<WriteRun>) -> BoxFuture<'static, io::Result<()>>;

    /// Gives the space of these ranges of the file back to the file system; they read as zeros
    /// afterwards. A file system that cannot is not an error.
    fn punch(&self, ranges: Vec<Range<u64>>) -> BoxFuture<'static, io::Result<()>>;

    /// Waits until everything written before the call is on stable storage.
    fn sync(&self) -> BoxFuture<'static, io::Result<()>>;

    /// Waits for what is in flight, refuses what comes after, and closes the file.
    fn close(&self) -> BoxFuture<'static, io::Result<()>>;

    /// The alignment that offsets and lengths should have, in bytes, a power of two.
    fn block_bytes(&self) -> u32;

    /// The name of the driver and what it found, in words.
    fn describe(&self) -> Arc<str>;
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
