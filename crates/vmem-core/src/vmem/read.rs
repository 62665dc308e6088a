//! Reading.
//!
//! Invariant: `Bytes` are always charged to object space and never change; a read that finds a
//! valid host copy is a load, a count, a mark and no more, ready at its first poll. Everything
//! slower is behind one box, so that the fast path's future stays small.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{StreamExt, TryStreamExt};
use tokio::time::Instant;

use super::{Result, VirtualMemory};
use crate::actor::Request;
use crate::buffer::IoBuf;
use crate::config::Promotion;
use crate::copy::{Found, ReadGuard};
use crate::disk::CHUNK_BYTES;
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::host::HostArena;
use crate::host_queue::{Class, Need};
use crate::migrate::{Fetch, count_hit, load};
use crate::object::{Object, Version, chunks_of};
use crate::options::{ReadClass, ReadOptions};
use crate::shared::far_future_or;
use crate::stats::add;
use crate::tier::MemoryTier;

/// How often a reader lets others run while a copy is locked, before it stands in line.
const YIELDS_MAX: u32 = 3;

/// A read with its options resolved.
#[derive(Clone, Debug)]
struct Asked {
    class: Class,
    promote: Option<bool>,
    asked: Instant,
    deadline: Instant,
}

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
    /// // What was read stays what it was.
    /// assert_eq!((&bytes[..], &vmem.read(&handle).await?[..]), (&[1, 2, 3][..], &[4, 5, 6][..]));
    /// # vmem.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`; and for an object that has to be brought up: `ExceedsCapacity`
    /// if it is larger than host memory (see [`read_into`](Self::read_into)), `AllPinned`,
    /// `TimedOut` or `TierFull` if there is no room for it, `Corrupt`, `Io`.
    pub async fn read(&self, handle: &VMemHandle) -> Result<Bytes> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        match self.hit(object) {
            Some(guard) => Ok(guard.into_bytes()),
            None => self.read_slowly(object, self.ordinary()).await,
        }
    }

    /// A part of the object, in bytes from its start.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read), and `OutOfRange`. A part of an object that is larger than
    /// host memory needs room for itself only.
    pub async fn read_at(&self, handle: &VMemHandle, range: Range<usize>) -> Result<Bytes> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        check_range(object, &range)?;
        match self.hit(object) {
            Some(guard) => Ok(guard.into_bytes().slice(range)),
            None => self.part_slowly(object, range, self.ordinary()).await,
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
        if let Some(guard) = self.hit(object) {
            return Ok(guard.into_bytes().slice(range));
        }
        let asked = Instant::now();
        let timeout = options.timeout.unwrap_or(self.shared.limits.wait_timeout);
        let class = match options.class {
            ReadClass::Demand => Class::Demand,
            ReadClass::Background => Class::Prefetch,
        };
        let deadline = far_future_or(asked, timeout);
        let how = Asked { class, promote: options.promote, asked, deadline };
        if range == (0..object.len) && self.shared.fits_host(object.len) {
            self.read_slowly(object, how).await
        } else {
            self.part_slowly(object, range, how).await
        }
    }

    /// Copies a part of the object into memory of the caller. Needs no room in host memory:
    /// what is not there passes through staging.
    ///
    /// # Errors
    ///
    /// `HandleNotFound`, `Closed`, `OutOfRange`, `SizeMismatch` if `buf` is not as long as
    /// `range`, `Corrupt`, `Io`. The contents of `buf` are unspecified after an error.
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
            let (handle, expected, actual) = (object.id, range.len(), buf.len());
            return Err(VirtualMemoryError::SizeMismatch { handle, expected, actual });
        }
        if range.is_empty() {
            return Ok(());
        }
        if let Some(guard) = self.hit(object) {
            copy_politely(buf, &guard.as_ref()[range]).await;
            return Ok(());
        }
        Box::pin(self.through_staging(object, range, buf)).await
    }

    /// Several objects at once, in the order of `handles`: all of them, or none. While it waits for
    /// room it holds nothing, so that calls over overlapping sets never wait for each other.
    ///
    /// # Errors
    ///
    /// The first error of any of them; `ExceedsCapacity` at once if host memory could never hold
    /// the whole set.
    pub async fn read_many(&self, handles: &[VMemHandle]) -> Result<Vec<Bytes>> {
        tokio::task::coop::consume_budget().await;
        let objects: Vec<_> =
            handles.iter().map(|handle| self.check(handle)).collect::<Result<_>>()?;
        let hits: Option<Vec<_>> = objects.iter().map(|object| self.hit(object)).collect();
        if let Some(hits) = hits {
            return Ok(hits.into_iter().map(ReadGuard::into_bytes).collect());
        }
        Box::pin(self.many_slowly(&objects)).await
    }

    // ---- The fast path -------------------------------------------------------------------------

    /// The current host copy, if there is one: a load, a count, a mark.
    fn hit(&self, object: &Arc<Object>) -> Option<ReadGuard> {
        match object.copy.acquire(&self.shared.copies) {
            Found::Copy(guard) => {
                object.touch();
                self.shared.copies.count_hit();
                Some(guard)
            }
            Found::Locked | Found::Nothing => None,
        }
    }

    fn ordinary(&self) -> Asked {
        let asked = Instant::now();
        let deadline = far_future_or(asked, self.shared.limits.wait_timeout);
        Asked { class: Class::Demand, promote: None, asked, deadline }
    }

    // ---- The slow paths ------------------------------------------------------------------------

    fn read_slowly<'a>(
        &'a self,
        object: &'a Arc<Object>,
        how: Asked,
    ) -> BoxFuture<'a, Result<Bytes>> {
        async move {
            if object.len == 0 {
                return Ok(Bytes::new());
            }
            if !self.shared.fits_host(object.len) {
                return Err(self.shared.exceeds_host(object.len));
            }
            let mut stay = None;
            let mut locked = 0;
            loop {
                match object.copy.acquire(&self.shared.copies) {
                    Found::Copy(guard) => {
                        object.touch();
                        return Ok(guard.into_bytes());
                    }
                    Found::Locked => self.wait_for_lock(object, &mut locked, &how).await?,
                    Found::Nothing => {
                        let stay = *stay.get_or_insert_with(|| self.miss(object, &how));
                        if let Some(outcome) = self.join_flight(object, &how, stay).await {
                            return outcome;
                        }
                        self.check_open()?;
                    }
                }
            }
        }
        .boxed()
    }

    /// Counts a read that host memory did not serve; says whether the object comes up to stay.
    fn miss(&self, object: &Arc<Object>, how: &Asked) -> bool {
        add(&self.shared.counters.misses, 1);
        object.touch();
        let nth = object.count_cold_read();
        let by_rule = match self.shared.limits.promotion {
            Promotion::OnNthRead(n) => nth >= n,
            Promotion::Never => false,
        };
        how.promote.unwrap_or(by_rule)
    }

    /// Somebody writes to the copy, or takes it away: a matter of a memory copy.
    async fn wait_for_lock(
        &self,
        object: &Arc<Object>,
        locked: &mut u32,
        how: &Asked,
    ) -> Result<()> {
        *locked += 1;
        if *locked <= YIELDS_MAX {
            tokio::task::yield_now().await;
        } else {
            drop(object.gate(how.deadline).await?);
        }
        Ok(())
    }

    /// Joins the read in flight, or starts one. `None` if it ended without an answer.
    async fn join_flight(
        &self,
        object: &Arc<Object>,
        how: &Asked,
        stay: bool,
    ) -> Option<Result<Bytes>> {
        if let Some(damage) = object.damage() {
            return Some(Err(damage));
        }
        if object.is_dead() {
            return Some(Err(object.not_found()));
        }
        let mut reply = None;
        let (flight, started) = object.join_or_start(|| {
            let (sender, receiver) = oneshot::channel();
            reply = Some(sender);
            receiver.shared()
        });
        if let Some(reply) = reply.filter(|_| started) {
            let job = Fetch {
                object: object.clone(),
                class: how.class,
                cause: MigrationCause::Read,
                stay,
                asked: how.asked,
                deadline: how.deadline,
                unwanted: None,
            };
            let request = Request::Fetch { job, flight: flight.downgrade(), reply };
            if let Err(request) = self.shared.requests.read_now(request) {
                self.shared.requests.send(request).await;
            }
        }
        match tokio::time::timeout_at(how.deadline, flight.clone()).await {
            // It gave up at the deadline of whoever started it; ours is later.
            Ok(Ok(Err(
                VirtualMemoryError::AllPinned { .. } | VirtualMemoryError::TimedOut { .. },
            ))) if !started && Instant::now() < how.deadline => {
                object.end_flight(flight.downgrade());
                None
            }
            Ok(Ok(outcome)) => Some(outcome),
            // Whoever started it was dropped before it was sent: start another.
            Ok(Err(oneshot::Canceled)) => {
                object.end_flight(flight.downgrade());
                None
            }
            // The fetch has the same deadline or an earlier one, and explains itself better.
            Err(_) => Some(self.late_answer(flight, how).await),
        }
    }

    async fn late_answer(&self, flight: crate::object::Flight, how: &Asked) -> Result<Bytes> {
        const GRACE: std::time::Duration = std::time::Duration::from_millis(20);
        match tokio::time::timeout(GRACE, flight).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Err(VirtualMemoryError::TimedOut {
                operation: "reading from a slower tier",
                waited: how.asked.elapsed(),
            }),
        }
    }

    /// A part of an object that is not in host memory.
    fn part_slowly<'a>(
        &'a self,
        object: &'a Arc<Object>,
        range: Range<usize>,
        how: Asked,
    ) -> BoxFuture<'a, Result<Bytes>> {
        async move {
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            // What is one chunk is read whole anyway; so is what is to stay.
            let small = object.len <= CHUNK_BYTES;
            if self.shared.fits_host(object.len) && (small || how.promote == Some(true)) {
                return Ok(self.read_slowly(object, how).await?.slice(range));
            }
            let (len, owner) = (range.len(), object.id);
            let need = Need { len, owner, class: how.class, may_spill: false };
            let mut room = self.shared.host_room_or_error(need, how.deadline).await?;
            self.through_staging(object, range, room.as_mut_slice()).await?;
            Ok(room.into_bytes(&self.shared.copies))
        }
        .boxed()
    }

    /// Copies a part of one version, piece by piece.
    async fn through_staging(
        &self,
        object: &Arc<Object>,
        range: Range<usize>,
        buf: &mut [u8],
    ) -> Result<()> {
        add(&self.shared.counters.misses, 1);
        object.touch();
        let deadline = self.shared.deadline();
        // One version for the whole range: it keeps what it leads to alive.
        let version = loop {
            if let Some(version) = object.cold_version() {
                break version;
            }
            if let Some(guard) = self.hit(object) {
                copy_politely(buf, &guard.as_ref()[range]).await;
                return Ok(());
            }
            let pass = object.gate(deadline).await?;
            // Room that was set apart holds no bytes: the object is zeros.
            if object.has_spare() {
                buf.fill(0);
                return Ok(());
            }
            drop(pass);
        };
        if let Some(damage) = object.damage() {
            return Err(damage);
        }
        let per_piece = (self.shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
        let chunks = chunks_of(&range);
        for first in chunks.clone().step_by(per_piece) {
            let some = first..(first + per_piece).min(chunks.end);
            let (piece, outcome) = self.staged(object, &version, some.clone()).await;
            outcome?;
            let start = range.start.max(first * CHUNK_BYTES);
            let end = range.end.min(some.end * CHUNK_BYTES);
            let from = &piece[start - first * CHUNK_BYTES..end - first * CHUNK_BYTES];
            buf[start - range.start..end - range.start].copy_from_slice(from);
        }
        count_hit(object, &version);
        Ok(())
    }

    async fn staged(
        &self,
        object: &Arc<Object>,
        version: &Version,
        chunks: Range<usize>,
    ) -> (IoBuf, Result<()>) {
        let piece = IoBuf::from_staging(self.shared.staging.acquire().await);
        load(object, version, chunks, piece, 0, Class::Demand).await
    }

    async fn many_slowly(&self, objects: &[&Arc<Object>]) -> Result<Vec<Bytes>> {
        let mut footprint = 0_u64;
        let mut seen = std::collections::HashSet::new();
        for object in objects {
            if seen.insert(object.id) {
                footprint = footprint.saturating_add(HostArena::footprint(object.len));
            }
        }
        let capacity_bytes = self.shared.host_space();
        if footprint > capacity_bytes {
            let tier = MemoryTier::Host;
            let requested_bytes = footprint;
            return Err(VirtualMemoryError::ExceedsCapacity {
                tier,
                requested_bytes,
                capacity_bytes,
            });
        }
        // One set at a time gathers room; whoever waits for his turn holds nothing.
        let how = self.ordinary();
        let turn = tokio::time::timeout_at(how.deadline, self.shared.set_turn.lock());
        let _turn = turn.await.map_err(|_| VirtualMemoryError::TimedOut {
            operation: "waiting for another set of objects",
            waited: how.asked.elapsed(),
        })?;
        // Boxed one by one: a closure over borrowed handles would make this future `Send` for some
        // lifetimes only, and callers could not spawn it.
        let mut reads = Vec::with_capacity(objects.len());
        for object in objects {
            reads.push(match self.hit(object) {
                Some(guard) => futures::future::ready(Ok(guard.into_bytes())).boxed(),
                None => self.read_slowly(object, how.clone()),
            });
        }
        futures::stream::iter(reads).buffered(SET_READS_MAX).try_collect().await
    }
}

/// Reads of one set that are asked for at once.
const SET_READS_MAX: usize = 64;

fn check_range(object: &Object, range: &Range<usize>) -> Result<()> {
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

/// Copies, letting others run after each piece of a large copy.
pub(super) async fn copy_politely(to: &mut [u8], from: &[u8]) {
    const PIECE: usize = 256 * 1024;
    for (to, from) in to.chunks_mut(PIECE).zip(from.chunks(PIECE)) {
        to.copy_from_slice(from);
        if from.len() == PIECE {
            tokio::task::yield_now().await;
        }
    }
}
