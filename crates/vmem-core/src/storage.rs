//! What core needs of a tier below host memory: chunks of bytes in extents, owned buffers in and
//! out; and of the disk, which keeps names, that what was written lasts.
//!
//! Invariant: the space of an [`Extent`] is its own until the extent is dropped, and an extent
//! is dropped only after the last operation that touches it has completed; so a reader of an old
//! version never sees the bytes of a new one. A backend owns the buffers of an operation from the
//! call until the completion, whatever happens to the future. Called by the migrations; implemented
//! in `vmem-io`, and by backends for other media.

mod error;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use once_cell::race::OnceBox;

pub use self::error::TierError;
use crate::buffer::IoBuf;
use crate::chunk::{CHUNK_BYTES, Run, Runs, StoredChunk};
use crate::deadline::Clock;
use crate::host::StagingMemory;

/// A tier below host memory: it stores chunks.
///
/// Every method may be called from any task. Futures may be dropped at any point: the operation
/// then goes on, and what it owns is released when it ends.
pub trait Tier: fmt::Debug + Send + Sync + 'static {
    /// Takes space for chunks of these lengths (each at most [`CHUNK_BYTES`], in bytes), all or
    /// none. Contiguous and in this order where the free space allows it, so that they can be
    /// written in one run; chunks in pieces only where it allows nothing else. Never blocks on I/O.
    ///
    /// # Errors
    ///
    /// [`TierError::Full`] with what is free.
    fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, TierError>;

    /// Writes each chunk into its extent and seals the extent with the chunk's checksum. Chunks
    /// whose extents are adjacent are written in one transfer. All or none: after an error every
    /// extent of the call has been given back.
    fn write(
        &self,
        pieces: Vec<(Extent, Bytes)>,
    ) -> BoxFuture<'static, Result<Vec<Extent>, TierError>>;

    /// Reads whole chunks, each to its place in `buf`, and verifies it against its checksum.
    /// Chunks that were reserved and never written are zeros. What lies between the places is
    /// left alone; the contents of the places are unspecified after an error.
    fn read(
        &self,
        chunks: Vec<ReadChunk>,
        buf: IoBuf,
    ) -> BoxFuture<'static, (IoBuf, Result<(), TierError>)>;

    /// Registers staging memory with the driver that moves the bytes. Called once, before anything
    /// else; the backend keeps `memory` until it is unregistered.
    ///
    /// # Errors
    ///
    /// The refusal of the driver; [`Unsupported`](io::ErrorKind::Unsupported) from a backend that
    /// registers nothing. Everything works without it.
    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        drop(memory);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The space that a chunk of `len` bytes takes, in bytes, rounding included.
    fn footprint(&self, len: u32) -> u64;

    /// Space taken and free, now.
    fn usage(&self) -> TierUsage;

    /// The driver that serves, and why, in words.
    fn describe(&self) -> Arc<str>;

    /// The time in which its operations take place; deadlines are measured by it.
    fn clock(&self) -> Clock {
        Clock::Real
    }

    /// Its store was dropped and has begun to close: an opener of the same place may wait for that.
    fn leave(&self) {}

    /// Ends the backend: waits for what is in flight, refuses what comes after, gives back files
    /// and, last, the lock of the directory.
    fn close(&self) -> BoxFuture<'static, Result<(), TierError>>;
}

/// A tier that keeps names: what was written there lasts.
pub trait Durable: Tier {
    /// Waits until every write that completed before the call is on stable storage.
    ///
    /// # Errors
    ///
    /// [`TierError::Io`]: nothing that was written since the sync before can be trusted to be
    /// there.
    fn sync(&self) -> BoxFuture<'static, Result<(), TierError>> {
        Box::pin(std::future::ready(Err(unsupported("sync"))))
    }

    /// An extent that this backend was opened with, because a catalog names it: written with this
    /// checksum, and [kept](Extent::keep).
    ///
    /// # Errors
    ///
    /// [`TierError::Io`] if no such space was taken when the backend was opened.
    fn adopt(&self, len: u32, chunk: StoredChunk) -> Result<Extent, TierError> {
        let _ = (len, chunk);
        Err(unsupported("adopt"))
    }
}

/// The error of a backend that serves no catalog.
fn unsupported(operation: &'static str) -> TierError {
    TierError::Io { operation, source: Arc::new(io::ErrorKind::Unsupported.into()) }
}

/// A piece of a tier that holds, or will hold, one chunk. Dropping it frees the space, unless it is
/// [kept](Self::keep).
pub struct Extent {
    /// Where the first run starts; its length is `footprint`. As one `Run` the two would have
    /// padding, of eight bytes for each extent.
    offset: u64,
    footprint: u32,
    len: u32,
    sum: u32,
    sealed: bool,
    kept: AtomicBool,
    /// Which of the tiers below host memory it is in.
    level: u8,
    more: OnceBox<More>,
    owner: SharedOwner,
}

/// What few extents have.
struct More {
    /// The runs behind the first.
    runs: Runs,
    /// The same chunk in a slower tier.
    below: OnceBox<Arc<Extent>>,
}

// A store has one of these for each chunk on disk.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Extent>() <= 40, "an extent takes more memory than it did");

/// One chunk to read.
#[derive(Clone, Debug)]
pub struct ReadChunk {
    /// Where it is on disk.
    pub extent: Arc<Extent>,
    /// Where in the buffer its first byte goes.
    pub at: usize,
}

impl ReadChunk {
    /// These chunks one after the other, from the front of a buffer.
    pub fn in_sequence(extents: impl IntoIterator<Item = Arc<Extent>>) -> Vec<ReadChunk> {
        let place = |at: &mut usize, extent: Arc<Extent>| {
            let chunk = ReadChunk { at: *at, extent };
            *at += chunk.extent.len() as usize;
            Some(chunk)
        };
        extents.into_iter().scan(0, place).collect()
    }
}

/// The owner of the space, which takes it back.
pub trait ExtentOwner: fmt::Debug + Send + Sync + 'static {
    /// This run of an extent is no longer used.
    fn release(&self, offset: u64, footprint: u32);

    /// This run of an extent is no longer used here, and stays in use nevertheless: something
    /// durable leads there, or may.
    fn forget(&self, offset: u64, footprint: u32) {
        let _ = (offset, footprint);
    }
}

/// The owner of extents as each of them holds it: one pointer. A backend makes one.
#[derive(Clone, Debug)]
pub struct SharedOwner(Arc<Owner>);

struct Owner {
    backend: Box<dyn ExtentOwner>,
    /// Called after an extent was released.
    freed: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl SharedOwner {
    /// Shares `owner` between extents.
    pub fn new(owner: impl ExtentOwner) -> Self {
        SharedOwner(Arc::new(Owner { backend: Box::new(owner), freed: OnceLock::new() }))
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.backend.fmt(f)
    }
}

impl<T: ExtentOwner> ExtentOwner for Arc<T> {
    fn release(&self, offset: u64, footprint: u32) {
        T::release(self, offset, footprint);
    }

    fn forget(&self, offset: u64, footprint: u32) {
        T::forget(self, offset, footprint);
    }
}

impl Extent {
    /// An unwritten extent of one run; for backends.
    pub fn new(offset: u64, len: u32, footprint: u32, owner: SharedOwner) -> Self {
        Self::in_runs(&[Run { offset, footprint }], len, owner)
    }

    /// An unwritten extent of these runs, which the chunk fills in this order; for backends.
    pub fn in_runs(runs: &[Run], len: u32, owner: SharedOwner) -> Self {
        let footprint: u64 = runs.iter().map(|run| u64::from(run.footprint)).sum();
        let fits = len as usize <= CHUNK_BYTES && u64::from(len) <= footprint;
        assert!(fits && u32::try_from(footprint).is_ok(), "a chunk fits its extent");
        let Run { offset, footprint } =
            runs.first().copied().unwrap_or(Run { offset: 0, footprint: 0 });
        let more = OnceBox::new();
        if let Some(behind) = runs.get(1..).filter(|behind| !behind.is_empty()) {
            let runs = Runs::from_slice(behind);
            let _ = more.set(Box::new(More { runs, below: OnceBox::new() }));
        }
        let kept = AtomicBool::new(false);
        Extent { offset, footprint, len, sum: 0, sealed: false, kept, level: 0, more, owner }
    }

    /// It is in this one of the tiers below host memory.
    pub(crate) fn set_level(&mut self, level: usize) {
        self.level = level as u8;
    }

    /// `hook` is called whenever an extent of this one's owner was released, from now on; the first
    /// hook counts.
    pub(crate) fn on_release(&self, hook: impl FnOnce() -> Box<dyn Fn() + Send + Sync>) {
        self.owner.0.freed.get_or_init(hook);
    }

    pub(crate) fn level(&self) -> usize {
        usize::from(self.level)
    }

    /// The same chunk in a slower tier, if that has it too.
    pub(crate) fn below(&self) -> Option<&Arc<Extent>> {
        self.more.get()?.below.get()
    }

    /// A slower tier has the chunk too, from now on. Once.
    pub(crate) fn set_below(&self, below: Arc<Extent>) {
        assert!(below.level > self.level, "what is below is in a slower tier");
        let none = || Box::new(More { runs: Runs::new(), below: OnceBox::new() });
        let is_first = self.more.get_or_init(none).below.set(Box::new(below)).is_ok();
        assert!(is_first, "a chunk has one copy in a slower tier");
    }

    /// Marks the chunk as written, with the CRC-32C of its bytes; for backends.
    pub fn seal(&mut self, sum: u32) {
        self.sum = sum;
        self.sealed = true;
    }

    /// The same space for a chunk of the same length, as if nothing had been written to it. A copy
    /// in a slower tier is no longer one.
    pub(crate) fn into_unwritten(mut self) -> Self {
        (self.sum, self.sealed) = (0, false);
        if let Some(More { runs, .. }) = self.more.get()
            && !crate::planted!("below-outdated")
        {
            let more = More { runs: runs.clone(), below: OnceBox::new() };
            self.more = OnceBox::with_value(Box::new(more));
        }
        self
    }

    /// From now on its space outlives it, because something durable leads there, or may.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// Nothing durable leads to it any more: dropping it frees its space.
    pub fn let_go(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Where the chunk is, if it was written.
    pub fn stored(&self) -> Option<StoredChunk> {
        Some(StoredChunk { sum: self.sum()?, runs: self.runs().collect() })
    }

    /// Where its first run starts, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its runs, in the order in which the chunk fills them.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let first = Run { offset: self.offset, footprint: self.footprint };
        let behind = self.more.get().into_iter().flat_map(|more| more.runs.iter().copied());
        std::iter::once(first).chain(behind)
    }

    /// Payload, in bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the payload is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Space taken, in bytes, rounding included.
    pub fn footprint(&self) -> u32 {
        self.runs().map(|run| run.footprint).sum()
    }

    /// The CRC-32C of the chunk; `None` while it was only reserved.
    pub fn sum(&self) -> Option<u32> {
        self.sealed.then_some(self.sum)
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        let is_kept = *self.kept.get_mut();
        let backend = &self.owner.0.backend;
        for Run { offset, footprint } in self.runs() {
            match is_kept {
                true => backend.forget(offset, footprint),
                false => backend.release(offset, footprint),
            }
        }
        if !is_kept
            && let Some(freed) = self.owner.0.freed.get()
            && !crate::planted!("below-silent")
        {
            freed();
        }
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extent")
            .field("runs", &self.runs().collect::<Runs>())
            .field("len", &self.len)
            .field("sum", &self.sum())
            .finish()
    }
}

/// Space of a tier below host memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierUsage {
    /// The budget.
    pub capacity_bytes: u64,
    /// Footprint of all extents that exist.
    pub used_bytes: u64,
    /// The largest that `used_bytes` ever was.
    pub peak_bytes: u64,
    /// The largest contiguous free run.
    pub largest_free_bytes: u64,
    /// How many runs the extents that exist have: one each, but where free space is in pieces.
    pub extents: u64,
}
