//! What core needs of the VRAM tier: ranges of device memory, owned buffers in and out.
//!
//! Invariant: the memory of a [`DeviceRange`] is its own until the range is dropped, and it is
//! dropped only after the last copy or kernel that touches it has completed: each user of a range
//! holds a share of it, and the share of an operation is dropped with its completion. So a range
//! that was just reserved is not in use. Called by the migrations; implemented in `vmem-gpu`, and
//! by backends for other devices.

mod ledger;
mod uses;

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::buffer::IoBuf;
use crate::error::VirtualMemoryError;
use crate::host::{ObjectSpace, StagingMemory};

use uses::Uses;

pub use ledger::RangeLedger;
pub(crate) use uses::EndedUse;
pub use uses::UseEnd;

/// The outcome of a device operation, once it has ended.
pub type DeviceAnswer<T> = BoxFuture<'static, T>;

/// A tier above host memory that holds whole objects.
///
/// Every method may be called from any task, and none blocks it. Futures may be dropped at any
/// point: the operation then goes on, and what it owns is released when it ends.
pub trait DeviceBackend: Any + fmt::Debug + Send + Sync {
    /// Takes memory for `len` bytes, within the budget; none if there is none in one piece now.
    /// The memory keeps its old bytes, which the caller must never show.
    fn reserve(&self, len: usize) -> Option<DeviceRange>;

    /// As `reserve`, of memory that does not lie at these addresses, which others are to have in
    /// one piece. Only where memory is one block: elsewhere none, and nothing moves.
    fn reserve_outside(&self, len: usize, window: &Range<u64>) -> Option<DeviceRange> {
        let _ = (len, window);
        None
    }

    /// What an object of `len` bytes takes of the budget, rounding included, in bytes.
    fn footprint(&self, len: usize) -> u64;

    /// Copies `bytes` to `offset` of the range.
    fn upload(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
    ) -> DeviceAnswer<Result<(), DeviceError>>;

    /// As `upload`, for bytes that no caller waits for: it may come behind all that some caller
    /// waits for, and what was not begun when the future is dropped may be left out. A backend
    /// without such an order does the same for both.
    fn upload_behind(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        self.upload(to, offset, bytes)
    }

    /// Copies the whole of `from` to the beginning of `to`, which is as long.
    fn copy_within(
        &self,
        from: Arc<DeviceRange>,
        to: Arc<DeviceRange>,
    ) -> DeviceAnswer<Result<(), DeviceError>>;

    /// Makes the whole range zeros.
    fn zero(&self, range: Arc<DeviceRange>) -> DeviceAnswer<Result<(), DeviceError>>;

    /// Copies `len` bytes from `offset` of the range to `at` of the buffer, which comes back in any
    /// case.
    fn download(
        &self,
        from: Arc<DeviceRange>,
        offset: usize,
        len: usize,
        into: IoBuf,
        at: usize,
    ) -> DeviceAnswer<(IoBuf, Result<(), DeviceError>)>;

    /// Registers staging memory, so that the device reaches it directly. Called once, after
    /// [`register_space`](Self::register_space) and before any copy; the backend keeps `memory`
    /// until it is unregistered.
    ///
    /// # Errors
    ///
    /// The refusal of the driver; everything works without it, more slowly.
    fn register(&self, memory: StagingMemory) -> io::Result<()>;

    /// Object space, parts of which the device may register as copies pass through them. Called
    /// once, before anything else. A device that gains nothing by that does nothing.
    fn register_space(&self, space: ObjectSpace) {
        drop(space);
    }

    /// Sets the hook, which is quick. The backend calls it when the device is lost, and when memory
    /// becomes free in another way than by the drop of a range. A dropped range does not count: a
    /// caller that took one on trial would wake itself for ever.
    fn set_freed_hook(&self, hook: Box<dyn Fn() + Send + Sync>);

    /// The free bytes from this address to the next range. A backend that does not know returns 0:
    /// then no stretch of memory that is to be emptied has free memory in it.
    fn free_from(&self, address: u64) -> u64 {
        let _ = address;
        0
    }

    /// Where memory is pages that are mapped to any address: how many whole pages would have to
    /// become free for an object of this footprint; none of them while memory is on its way,
    /// of which the hook tells. None where the object would lie in one piece of memory that has to
    /// become free, and where memory is no pages.
    fn missing_pages(&self, footprint: u64) -> Option<MissingPages> {
        let _ = footprint;
        None
    }

    /// The free bytes that nobody gets now, for they are on their way to where they are needed.
    fn coming_bytes(&self) -> u64 {
        0
    }

    /// In what pieces the budget can change while the device serves, in bytes; none if it cannot.
    fn resizes_by(&self) -> Option<u64> {
        None
    }

    /// What [`grow`](Self::grow) and [`shrink`](Self::shrink) go for from now on, in bytes, also
    /// those that are under way: neither goes beyond it.
    fn set_budget(&self, bytes: u64) {
        let _ = bytes;
    }

    /// What was set last, or else what it was opened with.
    fn budget(&self) -> u64 {
        self.usage().capacity_bytes
    }

    /// Takes what the budget lacks from the device, but no more than this, in whole pieces: how
    /// many bytes there were. It ends after all of these, and of `shrink`, that began before.
    fn grow(&self, bytes: u64) -> DeviceAnswer<Result<u64, DeviceError>> {
        let _ = bytes;
        Box::pin(std::future::ready(Ok(0)))
    }

    /// Gives what is beyond the budget back to the device, but no more than this, in whole pieces
    /// of which nothing is used: how many bytes it gave. `range` is dropped first, and nobody else
    /// has what it had before that was given back.
    fn shrink(
        &self,
        bytes: u64,
        range: Option<DeviceRange>,
    ) -> DeviceAnswer<Result<u64, DeviceError>> {
        let _ = (bytes, range);
        Box::pin(std::future::ready(Ok(0)))
    }

    /// The ledger, now.
    fn usage(&self) -> DeviceUsage;

    /// Why the device is lost; none while it serves. A lost device never comes back.
    fn lost(&self) -> Option<Arc<str>>;

    /// The device, in words.
    fn describe(&self) -> Arc<str>;

    /// Waits for what is in flight, and gives the device back. An operation that does not end is
    /// reported, and its memory is never freed.
    fn close(&self) -> DeviceAnswer<Result<(), DeviceError>>;
}

/// The owner of ranges, which takes them back.
pub trait RangeOwner: fmt::Debug + Send + Sync {
    /// The range at this address is free.
    fn release(&self, address: u64, footprint: u64);
}

/// A share of a range of device memory; the last one that is dropped gives the range back.
pub struct DeviceRange {
    /// None while it is being dropped.
    range: Option<Arc<Owned>>,
}

/// Called, on any thread, when a share was dropped.
pub(crate) type ShareWatcher = Arc<dyn Fn() + Send + Sync>;

struct Owned {
    address: u64,
    len: usize,
    footprint: u64,
    owner: Arc<dyn RangeOwner>,
    watcher: OnceLock<ShareWatcher>,
    /// The shares of users that are gone.
    uses: Uses,
}

impl DeviceRange {
    /// A range of this memory, which goes back to `owner`; for backends.
    pub fn new(address: u64, len: usize, footprint: u64, owner: Arc<dyn RangeOwner>) -> Self {
        let watcher = OnceLock::new();
        let uses = Uses::default();
        let owned = Owned { address, len, footprint, owner, watcher, uses };
        DeviceRange { range: Some(Arc::new(owned)) }
    }

    fn owned(&self) -> &Arc<Owned> {
        self.range.as_ref().expect("invariant: taken by the drop alone")
    }

    /// From now on `watcher` is called after each share that is dropped. Set once.
    pub(crate) fn watch(&self, watcher: ShareWatcher) {
        let unset = self.owned().watcher.set(watcher).is_ok();
        assert!(unset, "a range has one watcher");
    }

    /// Another share, for one user of the memory.
    pub(crate) fn share(&self) -> DeviceRange {
        DeviceRange { range: Some(self.owned().clone()) }
    }

    /// Whether this is the only share.
    pub(crate) fn is_idle(&self) -> bool {
        Arc::strong_count(self.owned()) == 1
    }

    /// Drops a share that was taken on trial, without calling the watcher.
    pub(crate) fn put_back(mut self) {
        drop(self.range.take());
    }

    /// Where it begins, in terms of the device.
    pub fn address(&self) -> u64 {
        self.owned().address
    }

    /// The length for which it was reserved, in bytes.
    pub fn len(&self) -> usize {
        self.owned().len
    }

    /// Whether its length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it takes of the budget, in bytes.
    pub fn footprint(&self) -> u64 {
        self.owned().footprint
    }
}

impl Drop for DeviceRange {
    fn drop(&mut self) {
        let Some(range) = self.range.take() else { return };
        let watcher = range.watcher.get().cloned();
        drop(range);
        // Last, so that the watcher finds the share gone.
        tell(watcher.as_ref());
    }
}

fn tell(watcher: Option<&ShareWatcher>) {
    if let Some(watcher) = watcher.filter(|_| !crate::planted!("share-silent")) {
        watcher();
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.owner.release(self.address, self.footprint);
    }
}

impl fmt::Debug for DeviceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceRange")
            .field("address", &self.address())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// Pages that have to become free. A page begins at a multiple of its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingPages {
    /// The size of a page, in bytes.
    pub page_bytes: u64,
    /// How many.
    pub count: u64,
}

/// The ledger of a device. Bytes are footprints: rounding included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceUsage {
    /// In use.
    pub used_bytes: u64,
    /// The budget.
    pub capacity_bytes: u64,
    /// The largest that `used_bytes` ever was.
    pub peak_bytes: u64,
    /// An object of this length would fit now.
    pub largest_free_bytes: u64,
}

/// Why a device operation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// An operation failed; others may succeed.
    #[error("{operation} failed on the device with code {code}: {message}")]
    Failed {
        /// What was attempted.
        operation: &'static str,
        /// The code of the driver.
        code: i32,
        /// Its text.
        message: Arc<str>,
    },
    /// The device serves no more.
    #[error("the device is lost: {0}")]
    Lost(Arc<str>),
    /// The backend was closed.
    #[error("the device is closed")]
    Closed,
}

impl DeviceError {
    /// The public form of this error.
    pub fn public(self) -> VirtualMemoryError {
        match self {
            DeviceError::Failed { operation, code, message } => {
                VirtualMemoryError::Device { operation, code, message }
            }
            DeviceError::Lost(message) => {
                VirtualMemoryError::Device { operation: "using the device", code: 0, message }
            }
            DeviceError::Closed => VirtualMemoryError::Closed,
        }
    }
}
