//! Objects as streams of bytes, for peers that read at their own pace.
//!
//! Invariant: a reader gives the bytes of one version from start to end, and between two polls it
//! has nothing that others wait for: windows of the reserve for streams, and the extents of its
//! version. Tasks of the runtime fill the windows. Called by users.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, SeekFrom};
use std::ops::{Bound, Range, RangeBounds};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{Stream, poll_fn};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncSeek, ReadBuf};

use super::read::check_range;
use super::timed::{Read, timed_unless};
use super::{Result, VirtualMemory};
use crate::chunk::{CHUNK_BYTES, chunks_of};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::migrate::{Filled, Move, Source, fill_window, request_move_behind};
use crate::windows::Window;

/// What a reader asks the reserve for at a time, in bytes, unless the caller says otherwise.
const WINDOW: usize = 256 * 1024;
/// What it gets in any case.
const WINDOW_MIN: usize = 4 * 1024;
/// What one poll copies at most.
const STEP: usize = 256 * 1024;
/// Windows that are filled before the reader comes to them.
const EARLY_WINDOWS: usize = 2;

/// A window that is being filled.
struct Fetch {
    range: Range<usize>,
    filled: BoxFuture<'static, Result<Filled>>,
    /// Whether it began before a poll asked for it.
    is_early: bool,
}

/// Reads one version of an object, or a part of it, as a stream: see [`VirtualMemory::reader`].
#[must_use = "a reader reads nothing until it is polled"]
pub struct ObjectReader {
    vmem: VirtualMemory,
    handle: VMemHandle,
    /// What is asked for, in the object; an error once it cannot be.
    range: Result<Range<usize>>,
    /// Where the next byte is, in the object.
    at: usize,
    window: usize,
    /// The version; none before the first window has come, and none where one window has all.
    source: Option<Arc<Source>>,
    /// The window that is read, and where it begins in the object.
    front: Bytes,
    front_at: usize,
    fetches: VecDeque<Fetch>,
    asked_to_promote: bool,
    /// Chunks before this one were counted as read, since the last seek.
    counted: usize,
}

impl VirtualMemory {
    /// A reader of these bytes of the object. It reads one version from start to end, the one that
    /// is current when its first bytes are read, even if the object is written, replaced or freed
    /// meanwhile.
    ///
    /// What it has read early is charged to
    /// [`stream_capacity`](crate::VirtualMemoryConfigBuilder::stream_capacity), never to object
    /// space: a peer that does not read keeps nothing from others but its window, and on disk the
    /// extents of its version. To that end bytes that only host memory has are first written to
    /// disk; only where the disk is full the reader holds the host copy instead.
    ///
    /// ```
    /// use tokio::io::{AsyncReadExt, AsyncSeekExt};
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put(b"one version, from start to end", MemoryTier::Disk).await?;
    /// let mut reader = vmem.reader(&handle, 4..);
    /// let mut word = [0; 7];
    /// reader.read_exact(&mut word).await?;
    /// assert_eq!(&word, b"version");
    /// reader.seek(std::io::SeekFrom::End(-3)).await?;
    /// let mut rest = String::new();
    /// reader.read_to_string(&mut rest).await?;
    /// assert_eq!(rest, "end");
    /// # drop((reader, handle));
    /// # vmem.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// None here. Reading from it fails with an [`io::Error`] that has a [`VirtualMemoryError`] as
    /// its source: `HandleNotFound`, `OutOfRange`, `Closed`, `Corrupt`, `TimedOut`, `Io`. Its
    /// position is then unchanged, and the next read tries again.
    pub fn reader(&self, handle: &VMemHandle, range: impl RangeBounds<usize>) -> ObjectReader {
        let range = self.range_of(handle, &range);
        let at = range.as_ref().map_or(0, |range| range.start);
        ObjectReader {
            vmem: self.clone(),
            handle: handle.clone(),
            range,
            at,
            window: WINDOW,
            source: None,
            front: Bytes::new(),
            front_at: at,
            fetches: VecDeque::new(),
            asked_to_promote: false,
            counted: 0,
        }
    }

    fn range_of(
        &self,
        handle: &VMemHandle,
        range: &impl RangeBounds<usize>,
    ) -> Result<Range<usize>> {
        let object = self.check(handle)?;
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => object.len,
        };
        let range = start..end;
        check_range(object, &range).map(|()| range)
    }
}

impl ObjectReader {
    /// Asks for windows of `bytes`, 4 KiB at least. It may get less: see
    /// [`stream_capacity`](crate::VirtualMemoryConfigBuilder::stream_capacity). Default: 256 KiB.
    pub fn window(mut self, bytes: usize) -> Self {
        self.window = bytes.max(WINDOW_MIN);
        self
    }

    /// How many bytes are left to read; 0 for a range that cannot be read.
    pub fn remaining(&self) -> usize {
        self.range.as_ref().map_or(0, |range| range.end.saturating_sub(self.at))
    }

    /// What is left as a stream of windows, without a copy. Each counts against the reserve for
    /// streams until it is dropped. It ends with the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
        let mut reader = Some(self);
        poll_fn(move |context| {
            let Some(mut this) = reader.take() else { return Poll::Ready(None) };
            match this.poll_front(context) {
                Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
                Poll::Ready(Ok(bytes)) if bytes.is_empty() => Poll::Ready(None),
                Poll::Ready(Ok(bytes)) => {
                    this.at += bytes.len();
                    this.forget_front();
                    reader = Some(this);
                    Poll::Ready(Some(Ok(bytes)))
                }
                Poll::Pending => {
                    reader = Some(this);
                    Poll::Pending
                }
            }
        })
    }

    /// The bytes of the front window from here on; at the end there are none.
    fn poll_front(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes>> {
        let range = self.range.clone()?;
        loop {
            if let Some(bytes) = self.in_front() {
                return Poll::Ready(Ok(bytes));
            }
            self.forget_front();
            if self.at >= range.end {
                return Poll::Ready(Ok(Bytes::new()));
            }
            if let Err(closed) = self.vmem.check_open() {
                // `close` waits for what fills windows: no more of them begin.
                self.fetches.clear();
                return Poll::Ready(Err(closed));
            }
            if self.fetches.is_empty() {
                let (wanted, least) = self.wants(range.end - self.at);
                let window = self.vmem.shared.windows.grant(wanted, least);
                let first = self.fetch(self.at, range.end, window, false);
                self.fetches.push_back(first);
            }
            let Some(next) = self.fetches.front_mut() else { continue };
            let outcome = ready!(next.filled.poll_unpin(context));
            let Some(fetched) = self.fetches.pop_front() else { continue };
            match outcome {
                Ok(filled) => self.take(filled, &fetched.range, &range),
                // Its deadline may have passed before a poll asked for it.
                Err(_) if fetched.is_early => self.fetches.clear(),
                Err(error) => {
                    self.fetches.clear();
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    fn in_front(&self) -> Option<Bytes> {
        let start = self.at.checked_sub(self.front_at)?;
        (start < self.front.len()).then(|| self.front.slice(start..))
    }

    /// Gives the front window back, unless it is the only one there ever is.
    fn forget_front(&mut self) {
        let is_all = self.range.as_ref().is_ok_and(|range| range.len() == self.front.len());
        if !is_all && self.in_front().is_none() {
            (self.front, self.front_at) = (Bytes::new(), self.at);
        }
    }

    /// Goes on with a window that has come, and begins to fill the next ones.
    fn take(&mut self, filled: Filled, at: &Range<usize>, range: &Range<usize>) {
        let Filled { source, window, missed } = filled;
        if missed {
            self.count_miss(at);
        }
        (self.front, self.front_at) = (Bytes::from_owner(window), at.start);
        if at == range {
            // The window is all that this reader reads: a later seek finds its bytes here.
            return;
        }
        self.source = Some(source).filter(|_| !crate::planted!("stream-versions"));
        let mut next = self.fetches.back().map_or(at.end, |last| last.range.end);
        while self.fetches.len() < EARLY_WINDOWS && next < range.end {
            let (wanted, least) = self.wants(range.end - next);
            let Some(window) = self.vmem.shared.windows.grant_more(wanted, least) else { break };
            let fetch = self.fetch(next, range.end, window, true);
            next = fetch.range.end;
            self.fetches.push_back(fetch);
        }
    }

    /// How large a window is to be where so much is left, and how large in any case.
    fn wants(&self, left: usize) -> (usize, usize) {
        (self.window.min(left), WINDOW_MIN.min(left))
    }

    /// Begins to fill this window, from here on.
    fn fetch(&self, start: usize, end: usize, window: Window, is_early: bool) -> Fetch {
        let range = start..end_of(start, end, window.capacity());
        let filled = self.fill(range.clone(), window);
        Fetch { range, filled, is_early }
    }

    fn fill(&self, range: Range<usize>, window: Window) -> BoxFuture<'static, Result<Filled>> {
        let shared = self.vmem.shared.clone();
        let deadline = shared.deadline();
        let object = self.handle.object().clone();
        let source = self.source.clone();
        let all = self.range.as_ref().is_ok_and(|all| *all == range);
        // The version that the stream has begun with may be another one than that in host memory.
        let is_near = match &self.source {
            Some(source) => matches!(**source, Source::Host(_)),
            None => object.copy.is_some(),
        };
        let read = Read::of_window(&object, range.len(), is_near);
        let filling = fill_window(object, source, range, all, window, deadline);
        let filling = timed_unless(read, filling, |filled| !filled.missed);
        let parcel = shared.spawn_for_caller("vmem-stream", filling);
        async move {
            let filled = shared.answer(&parcel, &deadline, "reading a stream").await?;
            // A window is never taken back: its memory is the reader's own.
            filled.ok_or(VirtualMemoryError::Closed)
        }
        .boxed()
    }

    /// Counts a window that host memory did not serve. What the rule promotes is promoted behind
    /// it.
    fn count_miss(&mut self, at: &Range<usize>) {
        let object = self.handle.object();
        // A chunk that several small windows have between them is read once by the rule.
        let chunks = chunks_of(at);
        let fresh = chunks.end.saturating_sub(chunks.start.max(self.counted));
        self.counted = chunks.end;
        let promotes = self.vmem.miss(object, fresh) && fresh > 0;
        if promotes && !self.asked_to_promote && self.vmem.shared.fits_host(object.len) {
            self.asked_to_promote = true;
            request_move_behind(object, Move::ToHost);
        }
    }

    /// Goes on from another place. The front window stays if it has that place; windows in flight
    /// stay if they follow.
    fn move_to(&mut self, at: usize) {
        self.at = at;
        let front_end = self.front_at + self.front.len();
        if self.in_front().is_none() && at != front_end {
            self.fetches.clear();
            self.forget_front();
            self.counted = 0;
        }
    }
}

/// Where a window that starts here ends: at the end of a chunk, where it can, since chunks are read
/// whole.
fn end_of(start: usize, end: usize, capacity: usize) -> usize {
    let most = end.min(start + capacity);
    let chunk_end = most / CHUNK_BYTES * CHUNK_BYTES;
    if most < end && chunk_end > start { chunk_end } else { most }
}

impl AsyncBufRead for ObjectReader {
    fn poll_fill_buf(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        let amount = ready!(this.poll_front(context))?.len();
        let start = if amount == 0 { this.front.len() } else { this.at - this.front_at };
        Poll::Ready(Ok(&this.front[start..]))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let this = self.get_mut();
        let has = this.in_front().map_or(0, |bytes| bytes.len());
        // After a seek there may be fewer than there were.
        this.at += amount.min(has);
    }
}

impl AsyncRead for ObjectReader {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let budget = ready!(tokio::task::coop::poll_proceed(context));
        let bytes = ready!(this.poll_front(context))?;
        budget.made_progress();
        let amount = bytes.len().min(buf.remaining()).min(STEP);
        buf.put_slice(&bytes[..amount]);
        this.at += amount;
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for ObjectReader {
    /// Positions count from the start of the range; one beyond its end reads nothing.
    fn start_seek(self: Pin<&mut Self>, position: SeekFrom) -> io::Result<()> {
        let this = self.get_mut();
        let range = this.range.clone()?;
        let (from, offset) = match position {
            SeekFrom::Start(offset) => (range.start, i64::try_from(offset).unwrap_or(i64::MAX)),
            SeekFrom::End(offset) => (range.end, offset),
            SeekFrom::Current(offset) => (this.at, offset),
        };
        let at = i64::try_from(from).unwrap_or(i64::MAX).saturating_add(offset);
        let at = usize::try_from(at).ok().filter(|&at| at >= range.start);
        let before = || io::Error::new(io::ErrorKind::InvalidInput, "before the first byte");
        this.move_to(at.ok_or_else(before)?);
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<u64>> {
        let this = self.get_mut();
        let start = this.range.as_ref().map_or(0, |range| range.start);
        Poll::Ready(Ok((this.at - start) as u64))
    }
}

impl fmt::Debug for ObjectReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectReader")
            .field("handle", &self.handle)
            .field("range", &self.range)
            .field("at", &self.at)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}
