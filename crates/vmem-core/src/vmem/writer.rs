//! Objects of unknown length, written as streams.
//!
//! Invariant: what a writer has taken in lies in a window of the reserve for streams, or in extents
//! on disk that are its own; there is no object before `commit`, and whatever happens to the writer
//! without it, its extents go back, after a crash too, since no catalog names them. Called by
//! users.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::future::{BoxFuture, FutureExt, poll_fn};
use tokio::io::AsyncWrite;

use super::entries::PutOptions;
use super::{OBJECT_LEN_MAX, Result, VirtualMemory};
use crate::chunk::CHUNK_BYTES;
use crate::error::{VirtualMemoryError, check_capacity};
use crate::handle::VMemHandle;
use crate::memory_tier::MemoryTier;
use crate::migrate::{Sent, send_window};
use crate::names::{self, Expected};
use crate::storage::Extent;
use crate::tier::Space;
use crate::windows::Window;

/// What a writer asks the reserve for at a time, in bytes, unless the caller says otherwise.
const WINDOW: usize = 256 * 1024;
/// What one poll copies at most.
const STEP: usize = 256 * 1024;
/// Windows that are in flight to disk at once.
const SENDS_MAX: usize = 4;

/// A name, and what is stored with it.
type Name = (Arc<str>, PutOptions);

/// Makes an object of the bytes that are written to it: see [`VirtualMemory::writer`].
///
/// Dropped before [`commit`](Self::commit) it leaves nothing.
#[must_use = "a writer makes an object by `commit`"]
pub struct ObjectWriter {
    vmem: VirtualMemory,
    home: MemoryTier,
    name: Option<Name>,
    window: usize,
    /// The bytes that were not submitted yet. Empty, and without memory, until there are some.
    front: Window,
    sends: VecDeque<BoxFuture<'static, Result<Sent>>>,
    extents: Vec<Extent>,
    len: u64,
    /// What went wrong: it says so for ever.
    failed: Option<VirtualMemoryError>,
    shut_down: bool,
}

impl VirtualMemory {
    /// A writer of an object whose length is not known yet. It takes bytes in windows of
    /// [`stream_capacity`](crate::VirtualMemoryConfigBuilder::stream_capacity), at least 64 KiB for
    /// each writer, and goes on to disk as they fill, so that it never waits for object space.
    /// There is an object once [`commit`](ObjectWriter::commit) has returned.
    ///
    /// ```
    /// use tokio::io::AsyncWriteExt;
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(4 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let mut writer = vmem.writer(MemoryTier::Disk);
    /// for line in 0..100_000 {
    ///     writer.write_all(format!("{line}\n").as_bytes()).await?;
    /// }
    /// let handle = writer.commit().await?;
    /// assert_eq!(handle.len(), 588_890);
    /// assert_eq!(&vmem.read_at(&handle, 588_884..588_890).await?[..], b"99999\n");
    /// # drop(handle);
    /// # vmem.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// None here. Writing to it fails with an [`io::Error`] that has a [`VirtualMemoryError`] as
    /// its source: `TierFull` when the disk is, `ExceedsCapacity` beyond [`OBJECT_LEN_MAX`],
    /// `TimedOut`, `Closed`, `Io`. Later calls get the same error.
    pub fn writer(&self, home: MemoryTier) -> ObjectWriter {
        self.writer_of(home, None, self.shared.check_tier(home))
    }

    /// As [`writer`](Self::writer), for an object with a name: `commit` is a
    /// [`put_named_with`](Self::put_named_with), durable, with bytes, metadata and name at once.
    /// What has the name is replaced then and not before.
    ///
    /// # Errors
    ///
    /// None here. A name that cannot be one, metadata that are too long, or a condition that does
    /// not hold already are reported by the first write; a condition that does not hold in the end
    /// by `commit`.
    pub fn writer_named(&self, name: &str, options: PutOptions) -> ObjectWriter {
        let home = options.home;
        let checked = self.check_named(name).and_then(|name| {
            self.shared.check_tier(home)?;
            names::check_metadata(&options.metadata)?;
            if let Some(record) = self.names.record_in_memory(&name) {
                Expected::from(options.mode).check(&name, Some(&record))?;
            }
            Ok(name)
        });
        match checked {
            Ok(name) => self.writer_of(home, Some((name, options)), Ok(())),
            Err(error) => self.writer_of(home, None, Err(error)),
        }
    }

    fn writer_of(&self, home: MemoryTier, name: Option<Name>, checked: Result<()>) -> ObjectWriter {
        ObjectWriter {
            vmem: self.clone(),
            home,
            name,
            window: WINDOW,
            front: self.shared.windows.grant(0, 0),
            sends: VecDeque::new(),
            extents: Vec::new(),
            len: 0,
            failed: checked.err(),
            shut_down: false,
        }
    }

    /// Makes an object that is on disk.
    fn object_of(&self, extents: Vec<Extent>, len: usize, home: MemoryTier) -> VMemHandle {
        let handle = VMemHandle::adopt(self.shared.create(len, home));
        self.announce_on_disk(handle.object(), extents);
        self.bring_home(handle.object());
        handle
    }
}

impl ObjectWriter {
    /// Asks for windows of `bytes`, 64 KiB at least. It may get less: see
    /// [`stream_capacity`](crate::VirtualMemoryConfigBuilder::stream_capacity). Default: 256 KiB.
    pub fn window(mut self, bytes: usize) -> Self {
        self.window = bytes.max(CHUNK_BYTES);
        self
    }

    /// How many bytes it has taken in.
    #[allow(clippy::len_without_is_empty, reason = "a count, not a container")]
    pub fn len(&self) -> u64 {
        self.len + self.front.as_slice().len() as u64
    }

    /// Makes the object, with its name if it is to have one. What fits in one window is
    /// [`put`](VirtualMemory::put) into its home tier; what is longer is on disk, and is promoted
    /// by use.
    ///
    /// # Errors
    ///
    /// What went wrong before; those of [`put`](VirtualMemory::put), and of
    /// [`put_named_with`](VirtualMemory::put_named_with) for a name. There is no object then, and
    /// the name leads to what it did.
    pub async fn commit(mut self) -> Result<VMemHandle> {
        self.check()?;
        let handle = if self.len == 0 {
            self.vmem.put(self.front.as_slice(), self.home).await?
        } else {
            poll_fn(|context| self.poll_settle(context, SENDS_MAX - 1)).await?;
            self.send()?;
            let unsettled_max = usize::from(crate::planted!("stream-early-name"));
            poll_fn(|context| self.poll_settle(context, unsettled_max)).await?;
            let extents = std::mem::take(&mut self.extents);
            self.vmem.object_of(extents, self.len as usize, self.home)
        };
        match self.name.take() {
            Some((name, options)) => self.vmem.replace_named(name, handle, options).await,
            None => Ok(handle),
        }
    }

    /// # Errors
    ///
    /// What went wrong before; `Closed`.
    fn check(&self) -> Result<()> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => self.vmem.check_open(),
        }
    }

    /// Waits until at most `at_most` windows are in flight.
    fn poll_settle(&mut self, context: &mut Context<'_>, at_most: usize) -> Poll<Result<()>> {
        while self.sends.len() > at_most {
            let Some(oldest) = self.sends.front_mut() else { break };
            let outcome = ready!(oldest.poll_unpin(context));
            self.sends.pop_front();
            match outcome {
                Ok(Sent(extents)) => self.extents.extend(extents),
                Err(error) => return Poll::Ready(self.fail(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Gives back what it took.
    fn fail(&mut self, error: VirtualMemoryError) -> Result<()> {
        self.failed = Some(error.clone());
        self.sends.clear();
        self.extents.clear();
        self.front = self.vmem.shared.windows.grant(0, 0);
        Err(error)
    }

    /// Submits the bytes that it has.
    fn send(&mut self) -> Result<()> {
        let bytes = self.front.as_slice().len() as u64;
        if bytes == 0 {
            return Ok(());
        }
        let requested_bytes = self.len + bytes;
        // What gets a name is on disk in the end.
        let level = if self.name.is_some() { 0 } else { self.home.level().unwrap_or(0) };
        let storage = &self.vmem.shared.storage()[level];
        let capacity_bytes = storage.state.space().capacity_bytes().min(OBJECT_LEN_MAX);
        if let Err(error) = check_capacity(storage.tier(), requested_bytes, capacity_bytes) {
            return self.fail(error);
        }
        self.len = requested_bytes;
        let shared = self.vmem.shared.clone();
        let full = std::mem::replace(&mut self.front, shared.windows.grant(0, 0));
        let deadline = shared.deadline();
        let sending = send_window(shared.clone(), level, full, deadline);
        let parcel = shared.spawn_for_caller("vmem-stream", sending);
        let sent = async move {
            let sent = shared.answer(&parcel, &deadline, "writing a stream").await?;
            // They are never taken back: the extents are the writer's own.
            sent.ok_or(VirtualMemoryError::Closed)
        };
        self.sends.push_back(sent.boxed());
        Ok(())
    }

    /// Submits the window that is full, and takes another one. Where the reserve has none left it
    /// waits for the windows in flight: so beyond the reserve a writer has one window.
    fn poll_window(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.poll_settle(context, SENDS_MAX - 1))?;
        self.send()?;
        let windows = self.vmem.shared.windows.clone();
        if let Some(window) = windows.grant_more(self.window, CHUNK_BYTES) {
            self.front = window;
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_settle(context, 0))?;
        self.front = windows.grant(self.window, CHUNK_BYTES);
        Poll::Ready(Ok(()))
    }

    /// What is to fill before it is sent: whole chunks, since all chunks of an object but the last
    /// are.
    fn space_left(&self) -> usize {
        let whole = self.front.capacity() / CHUNK_BYTES * CHUNK_BYTES;
        whole - self.front.as_slice().len()
    }
}

impl AsyncWrite for ObjectWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.check()?;
        if this.shut_down {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let budget = ready!(tokio::task::coop::poll_proceed(context));
        if this.space_left() == 0 {
            ready!(this.poll_window(context))?;
        }
        budget.made_progress();
        let amount = data.len().min(this.space_left()).min(STEP);
        Poll::Ready(Ok(this.front.fill(&data[..amount])))
    }

    /// Waits for the windows in flight. Bytes that do not fill a window yet stay in memory.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check()?;
        this.poll_settle(context, 0).map_err(io::Error::from)
    }

    /// As a flush, and the last write: there is an object after [`commit`](ObjectWriter::commit)
    /// alone.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut_down = true;
        self.poll_flush(context)
    }
}

impl fmt::Debug for ObjectWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectWriter")
            .field("name", &self.name.as_ref().map(|(name, _)| name))
            .field("home", &self.home)
            .field("len", &self.len())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
