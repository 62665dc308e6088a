//! Reading.
//!
//! Invariant: `Bytes` never change, and are charged to object space unless they are small parts; a
//! read that finds a valid host copy is a load, a count, a mark and no more, ready at its first
//! poll. All slower reads are boxed in `miss.rs`, so that the future of the fast path stays small.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::into::PIECE;
use super::miss::Asked;
use super::timed::{Read, timed};
use super::{Result, VirtualMemory};
use crate::copy::{Found, ReadGuard};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::latency::ReadOp;
use crate::object::{FREE_BYTES, Object};
use crate::options::{ReadClass, ReadOptions};
use crate::recency;
use crate::tier::Class;

/// A part of at most this many bytes, and of at most this share of its object, is copied rather
/// than held.
const COPY_SMALL_MAX: usize = 4096;
const COPY_SMALL_SHARE: usize = 8;

impl VirtualMemory {
    /// The bytes of the object. Zero-copy if it is resident in host memory: the same memory for
    /// every reader, until a write makes a new version.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Host).await?;
    /// let bytes = vmem.read(&handle).await?;
    /// vmem.write(&handle, [4, 5, 6]).await?;
    /// // Bytes that were read do not change.
    /// assert_eq!((&bytes[..], &vmem.read(&handle).await?[..]), (&[1, 2, 3][..], &[4, 5, 6][..]));
    /// # vmem.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`; and for an object that has to be loaded: `ExceedsCapacity`
    /// if it is larger than host memory (see [`read_into`](Self::read_into)), `AllPinned`,
    /// `TimedOut` or `TierFull` if there is no space for it, `Corrupt`, `Io`. `AllPinned` also if
    /// readers hold all that [`max_held`](crate::VirtualMemoryConfigBuilder::max_held) allows, and
    /// the object is larger than 64 KiB.
    pub async fn read(&self, handle: &VMemHandle) -> Result<Bytes> {
        if recency::is_turn() {
            tokio::task::coop::consume_budget().await;
        }
        let object = self.check(handle)?;
        match self.hit_to_keep(object) {
            Some(guard) => Ok(guard.into_bytes()),
            None => self.read_slowly(object, self.ordinary()).await,
        }
    }

    /// A part of the object, in bytes from its start. A small part (an eighth of the object at
    /// most, and 4 KiB) is a copy of its own; a larger one keeps all of the object's bytes in
    /// object space until it is dropped.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read), and `OutOfRange`. A part of an object that is larger than
    /// host memory needs space for itself only.
    pub async fn read_at(&self, handle: &VMemHandle, range: Range<usize>) -> Result<Bytes> {
        if recency::is_turn() {
            tokio::task::coop::consume_budget().await;
        }
        let object = self.check(handle)?;
        check_range(object, &range)?;
        match self.hit(object).and_then(|guard| self.part_of(guard, &range, None)) {
            Some(part) => Ok(part),
            None => self.part_slowly(object, range, self.ordinary(), None).await,
        }
    }

    /// As [`read`](Self::read) or [`read_at`](Self::read_at), with options.
    ///
    /// # Errors
    ///
    /// Those of both.
    pub async fn read_with(&self, handle: &VMemHandle, options: ReadOptions) -> Result<Bytes> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        let range = options.range.clone().unwrap_or(0..object.len);
        check_range(object, &range)?;
        let hit = self.hit(object);
        if let Some(part) = hit.and_then(|guard| self.part_of(guard, &range, options.copy_small)) {
            return Ok(part);
        }
        let timeout = options.timeout.unwrap_or(self.shared.limits.wait_timeout);
        let class = match options.class {
            ReadClass::Demand => Class::Demand,
            ReadClass::Background => Class::Prefetch,
        };
        let deadline = self.shared.deadline_in(timeout);
        let how = Asked { class, promote: options.promote, deadline, ..self.ordinary() };
        if range == (0..object.len) && self.shared.fits_host(object.len) {
            self.read_slowly(object, how).await
        } else {
            self.part_slowly(object, range, how, options.copy_small).await
        }
    }

    /// Copies a part of the object into memory of the caller. It needs no space in host memory: an
    /// object that is not resident passes through staging.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`, `OutOfRange`, `SizeMismatch` if `buf` is not as long as
    /// `range`, `TimedOut`, `Corrupt`, `Io`. The contents of `buf` are unspecified after an error.
    pub async fn read_into(
        &self,
        handle: &VMemHandle,
        range: Range<usize>,
        buf: &mut [u8],
    ) -> Result<()> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        check_range(object, &range)?;
        if buf.len() != range.len() {
            return Err(VirtualMemoryError::SizeMismatch {
                handle: object.id,
                expected: range.len(),
                actual: buf.len(),
            });
        }
        if range.is_empty() {
            return Ok(());
        }
        if let Some(guard) = self.hit(object)
            && range.len() <= PIECE
        {
            buf.copy_from_slice(&guard.as_ref()[range]);
            return Ok(());
        }
        // More than that is copied in several polls, between which this holds no reader count.
        let how = Asked { keeps: false, ..self.ordinary() };
        let read = Read::of(ReadOp::Into, object, range.len());
        Box::pin(timed(read, self.copy_in_pieces(object, range, buf, how))).await
    }

    /// The bytes of the object if they are in host memory right now; no wait, no I/O. `None` also
    /// if they are being changed at this moment, if readers hold all that
    /// [`max_held`](crate::VirtualMemoryConfigBuilder::max_held) allows and the object is larger
    /// than 64 KiB, if it was freed, or the store was closed.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put([1, 2, 3], MemoryTier::Host).await?;
    /// assert_eq!(vmem.try_read(&handle).as_deref(), Some(&[1, 2, 3][..]));
    /// vmem.demote(&handle, MemoryTier::Disk).await?;
    /// assert!(vmem.try_read(&handle).is_none());
    /// # vmem.close().await
    /// # }
    /// ```
    pub fn try_read(&self, handle: &VMemHandle) -> Option<Bytes> {
        let object = self.check(handle).ok()?;
        if object.len == 0 {
            return Some(Bytes::new());
        }
        self.hit_to_keep(object).map(ReadGuard::into_bytes)
    }

    /// Several objects at once, in the order of `handles`: all of them, or none. While it waits for
    /// space it holds nothing, so that calls over overlapping sets never wait for each other.
    ///
    /// # Errors
    ///
    /// The first error of any of them; `ExceedsCapacity` at once if host memory could never hold
    /// the whole set.
    pub async fn read_many<'a>(
        &self,
        handles: impl IntoIterator<Item = &'a VMemHandle>,
    ) -> Result<Vec<Bytes>> {
        tokio::task::coop::consume_budget().await;
        let objects: Vec<_> =
            handles.into_iter().map(|handle| self.check(handle)).collect::<Result<_>>()?;
        if let Some(hits) = self.hits(&objects) {
            return Ok(hits);
        }
        let objects: Vec<_> = objects.into_iter().cloned().collect();
        let read = Read::of_many(&objects);
        Box::pin(timed(read, self.many_slowly(objects))).await
    }

    /// The current host copies, if there is one of each.
    fn hits(&self, objects: &[&Arc<Object>]) -> Option<Vec<Bytes>> {
        if !objects.iter().all(|object| object.copy.is_some()) {
            return None;
        }
        let mut hits = Vec::with_capacity(objects.len());
        for object in objects {
            hits.push(self.hit_to_keep(object)?.into_bytes());
        }
        Some(hits)
    }

    /// The current host copy, if there is one: a load, a count, a mark.
    pub(super) fn hit(&self, object: &Arc<Object>) -> Option<ReadGuard> {
        match object.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => {
                object.touch_by_hit();
                guard.count_hit();
                Some(guard)
            }
            Found::Locked | Found::Nothing => None,
        }
    }

    /// As `hit`, for a reader that keeps it; `None` where readers hold all that they may.
    fn hit_to_keep(&self, object: &Arc<Object>) -> Option<ReadGuard> {
        let may_keep = |guard: &ReadGuard| object.len <= FREE_BYTES || self.shared.may_keep(guard);
        self.hit(object).filter(may_keep)
    }

    /// A part of a version that is resident; `None` if the reader must wait until others hold less.
    fn part_of(
        &self,
        guard: ReadGuard,
        range: &Range<usize>,
        copy_small: Option<usize>,
    ) -> Option<Bytes> {
        let len = guard.as_ref().len();
        let is_copied = is_copied(range.len(), len, copy_small);
        if !is_copied && (len <= FREE_BYTES || self.shared.may_keep(&guard)) {
            return Some(guard.into_bytes().slice(range.clone()));
        }
        let may_copy = is_copied || range.len() <= FREE_BYTES;
        may_copy.then(|| Bytes::copy_from_slice(&guard.as_ref()[range.clone()]))
    }

    fn ordinary(&self) -> Asked {
        let deadline = self.shared.deadline();
        Asked { class: Class::Demand, promote: None, may_spill: false, keeps: true, deadline }
    }
}

/// Whether a part of an object of `len` bytes is copied rather than held.
pub(super) fn is_copied(part: usize, len: usize, at_most: Option<usize>) -> bool {
    part <= at_most.unwrap_or(COPY_SMALL_MAX.min(len / COPY_SMALL_SHARE))
}

pub(super) fn check_range(object: &Object, range: &Range<usize>) -> Result<()> {
    if range.start <= range.end && range.end <= object.len {
        return Ok(());
    }
    Err(VirtualMemoryError::OutOfRange {
        handle: object.id,
        start: range.start,
        end: range.end,
        len: object.len,
    })
}
