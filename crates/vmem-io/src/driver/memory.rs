//! Memory that the kernel reads or writes while an operation is in flight.
//!
//! Invariant: a [`Region`] is an address and a length, and gives no access: what is behind it is
//! owned by the [`Job`](super::job::Job) that it belongs to, which frees nothing while one of its
//! operations is in flight. A [`Bounce`] is charged to its [`BounceBudget`] until it is dropped.
//! Called by `job`, which plans transfers, and by the engines, which hand regions to the kernel.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use aligned_vec::{AVec, ConstAlign};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

/// The alignment of bounce buffers, in bytes: no device of today asks for more.
pub(super) const BOUNCE_ALIGN: usize = 4096;
/// What all bounce buffers of a driver may take, in bytes.
const BOUNCE_BYTES: usize = 4 * 1024 * 1024;
/// What one job may have of it at a time, so that several make progress.
pub(super) const BOUNCE_JOB_BYTES: usize = 1024 * 1024;
/// The longest bounce buffer, in bytes.
pub(super) const BOUNCE_MAX: usize = 256 * 1024;

/// The sizes in which bounce buffers are kept for reuse, in bytes.
const CLASSES: [usize; 3] = [BOUNCE_ALIGN, 64 * 1024, BOUNCE_MAX];

/// Bytes in a buffer of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// An address rather than a pointer: Rust code never follows it.
    address: usize,
    len: usize,
}

impl Region {
    /// For the kernel to read from.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Region { address: bytes.as_ptr().expose_provenance(), len: bytes.len() }
    }

    /// For the kernel to write to.
    pub(super) fn of_mut(bytes: &mut [u8]) -> Self {
        Region { address: bytes.as_mut_ptr().expose_provenance(), len: bytes.len() }
    }

    /// Memory that is registered with the kernel.
    pub(super) fn at(address: usize, len: usize) -> Self {
        Region { address, len }
    }

    /// Whether `other` is a part of it.
    pub(super) fn contains(self, other: Region) -> bool {
        let from = other.address.checked_sub(self.address);
        from.is_some_and(|from| from <= self.len && other.len <= self.len - from)
    }

    pub(super) fn address(self) -> usize {
        self.address
    }

    pub(super) fn len(self) -> usize {
        self.len
    }

    pub(super) fn is_aligned(self, align: usize) -> bool {
        self.address.is_multiple_of(align)
    }

    /// A part of it.
    pub(super) fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a region");
        Region { address: self.address + range.start, len: range.end - range.start }
    }

    /// Both as one, if `next` begins where this ends.
    pub(super) fn joined(self, next: Region) -> Option<Self> {
        let adjacent = self.address + self.len == next.address;
        adjacent.then_some(Region { address: self.address, len: self.len + next.len })
    }
}

/// Aligned memory of the driver, for transfers whose own memory is not.
pub(super) struct Bounce {
    bytes: Option<AVec<u8, ConstAlign<BOUNCE_ALIGN>>>,
    budget: Arc<Kept>,
}

impl Bounce {
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            self.budget.keep(bytes);
        }
    }
}

impl fmt::Debug for Bounce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bounce").field("len", &self.bytes().len()).finish()
    }
}

/// The right to take bounce buffers of this many bytes, their rounding included.
#[derive(Debug)]
pub(super) struct BounceShare {
    /// Held for its drop.
    _permit: OwnedSemaphorePermit,
}

/// All bounce buffers of a driver.
#[derive(Debug)]
pub(super) struct BounceBudget {
    space: Arc<Semaphore>,
    kept: Arc<Kept>,
}

/// Buffers that wait for reuse, by class.
#[derive(Debug, Default)]
struct Kept {
    free: [Mutex<Vec<AVec<u8, ConstAlign<BOUNCE_ALIGN>>>>; CLASSES.len()],
}

impl Kept {
    /// Half of the budget is kept at most, so that buffers of one class do not starve another:
    /// what is taken and what is kept is within one and a half budgets at the very worst.
    fn keep(&self, bytes: AVec<u8, ConstAlign<BOUNCE_ALIGN>>) {
        let Some(class) = CLASSES.iter().position(|&class| class == bytes.len()) else { return };
        let mut free = self.free[class].lock();
        if free.len() < BOUNCE_BYTES / 2 / CLASSES.len() / CLASSES[class] {
            free.push(bytes);
        }
    }
}

/// What a bounce buffer of `len` bytes is charged, in bytes.
pub(super) fn bounce_footprint(len: usize) -> usize {
    CLASSES.into_iter().find(|&class| class >= len).unwrap_or(BOUNCE_MAX)
}

impl BounceBudget {
    pub(super) fn new() -> Self {
        let space = Arc::new(Semaphore::new(BOUNCE_BYTES / BOUNCE_ALIGN));
        BounceBudget { space, kept: Arc::default() }
    }

    /// A share of this many bytes, if there is one now.
    ///
    /// # Errors
    ///
    /// If there is none, or the budget was closed.
    pub(super) fn try_share(&self, bytes: usize) -> Result<BounceShare, TryAcquireError> {
        let _permit = Arc::clone(&self.space).try_acquire_many_owned(permits(bytes))?;
        Ok(BounceShare { _permit })
    }

    /// A share of this many bytes, in turn; `None` once the budget was closed.
    pub(super) async fn share(&self, bytes: usize) -> Option<BounceShare> {
        let acquired = Arc::clone(&self.space).acquire_many_owned(permits(bytes)).await;
        acquired.ok().map(|_permit| BounceShare { _permit })
    }

    /// A buffer of at least `len` bytes, of which the caller has a share.
    pub(super) fn take(&self, len: usize) -> Bounce {
        let footprint = bounce_footprint(len);
        let class = CLASSES.iter().position(|&class| class == footprint);
        let kept = class.and_then(|class| self.kept.free[class].lock().pop());
        let bytes = kept.unwrap_or_else(|| {
            let mut bytes = AVec::with_capacity(BOUNCE_ALIGN, footprint);
            bytes.resize(footprint, 0);
            bytes
        });
        Bounce { bytes: Some(bytes), budget: Arc::clone(&self.kept) }
    }

    pub(super) fn close(&self) {
        self.space.close();
    }
}

fn permits(bytes: usize) -> u32 {
    // A job asks for no more than its part, so this neither truncates nor waits for ever.
    bytes.min(BOUNCE_BYTES).div_ceil(BOUNCE_ALIGN) as u32
}
