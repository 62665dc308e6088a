//! Writing.
//!
//! Invariant: a write is seen whole or not at all. Either it changes bytes that nobody reads, in
//! one go that no await interrupts, or it fills a new version that is published at the end. The
//! caller's data is copied before the future returns, into memory that the runtime owns; a write
//! that is dropped half way leaves the version before.
//!
//! Where the new version goes: in place, if it is small and nobody reads the old one; into room in
//! host memory, if there is or can be made some; else through staging to disk.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, StreamExt};
use tokio::time::Instant;

use super::read::copy_politely;
use super::{Result, VirtualMemory};
use crate::buffer::IoBuf;
use crate::copy::{Found, OwnedCopy};
use crate::disk::{CHUNK_BYTES, DiskError, Extent};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::host_queue::{Class, Need, Refused};
use crate::migrate::{Fetch, fetch_into, load};
use crate::object::{DiskMap, GatePass, Object, Version, chunk_len, chunks_of};
use crate::stats::add;
use crate::tier::MemoryTier;

/// A copy of at most this many bytes is made in one go, in place.
const IN_PLACE_MAX: usize = 256 * 1024;
/// Pieces of one large write that are on their way to disk at once.
const PIECES_MAX: usize = 4;

/// The end of one write that is on its way.
type Written = std::result::Result<Vec<Extent>, DiskError>;
/// The writes of one call that are on their way, in order. Each holds staging until it was polled
/// to its end, so whoever waits for more staging polls them meanwhile.
type InFlight = FuturesOrdered<BoxFuture<'static, Written>>;

impl VirtualMemory {
    /// Replaces all bytes of the object. Readers keep the version that they read; who reads
    /// afterwards gets the new one. Writes to one object apply in the order in which they complete.
    ///
    /// # Errors
    ///
    /// `SizeMismatch` if `data` is not as long as the object; `HandleNotFound`, `Closed`;
    /// `TierFull` if neither host memory nor disk has room for the version that a held reader
    /// forces, `TimedOut`, `Io`. After an error the object is as it was.
    pub async fn write(&self, handle: &VMemHandle, data: impl AsRef<[u8]> + Send) -> Result<()> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        let data = data.as_ref();
        if data.len() != object.len {
            let (handle, expected, actual) = (object.id, object.len, data.len());
            return Err(VirtualMemoryError::SizeMismatch { handle, expected, actual });
        }
        Box::pin(self.write_range(object, 0..data.len(), data)).await?;
        self.bring_home(object);
        Ok(())
    }

    /// Replaces a part of the object, from `offset` bytes from its start.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write); `OutOfRange`; and, where the rest of a chunk has to be
    /// read first, `Corrupt`.
    pub async fn write_at(
        &self,
        handle: &VMemHandle,
        offset: usize,
        data: impl AsRef<[u8]> + Send,
    ) -> Result<()> {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        let data = data.as_ref();
        let end = offset.saturating_add(data.len());
        if end > object.len || offset > object.len {
            let (handle, len) = (object.id, object.len);
            return Err(VirtualMemoryError::OutOfRange { handle, start: offset, end, len });
        }
        Box::pin(self.write_range(object, offset..end, data)).await?;
        self.bring_home(object);
        Ok(())
    }

    /// Builds all bytes of the object in place: `fill` gets zeros in host memory. If it panics the
    /// object is as it was.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write), and, since the bytes must be in host memory,
    /// `ExceedsCapacity` and `AllPinned`.
    pub async fn write_with<F>(&self, handle: &VMemHandle, fill: F) -> Result<()>
    where
        F: FnOnce(&mut [u8]) + Send,
    {
        tokio::task::coop::consume_budget().await;
        let object = self.check(handle)?;
        if object.len == 0 {
            fill(&mut []);
            return Ok(());
        }
        Box::pin(async {
            let deadline = self.shared.deadline();
            let room = || self.shared.host_room_or_error(need(object, false), deadline);
            // Before the gate: the version before may be what has to make way for this one.
            let taken = if object.has_spare() { None } else { Some(room().await?) };
            let pass = object.gate(deadline).await?;
            let room = match (Room::spare(&pass), taken) {
                (Some(spare), _) => spare,
                (None, Some(taken)) => Room::taken(&pass, taken),
                (None, None) => Room::taken(&pass, room().await?),
            };
            room.publish_whole(|bytes| {
                bytes.fill(0);
                fill(bytes);
            });
            object.touch();
            Ok(())
        })
        .await?;
        self.bring_home(object);
        Ok(())
    }

    /// What lives in device memory, or is pinned there, comes up again behind the write.
    fn bring_home(&self, object: &Arc<Object>) {
        if object.belongs_in_vram() && object.len > 0 {
            self.refresh(object);
        }
    }

    async fn write_range(
        &self,
        object: &Arc<Object>,
        range: Range<usize>,
        data: &[u8],
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let deadline = self.shared.deadline();
        let pass = object.gate(deadline).await?;
        object.touch();
        if data.len() <= IN_PLACE_MAX && object.write_in_place(&pass, range.clone(), data) {
            return Ok(());
        }
        if object.copy.is_some() {
            return self.write_version(&pass, range, data, deadline).await;
        }
        if let Some(room) = Room::spare(&pass) {
            return room.fill_new(range, data).await;
        }
        if self.comes_up(&pass, &range, deadline).await? {
            return Box::pin(self.write_resident(&pass, range, data, deadline)).await;
        }
        if range.len() == object.len
            && object.home != MemoryTier::Disk
            && let Some(room) = self.room_or_spill(object, deadline).await?
        {
            return Room::taken(&pass, room).fill_new(range, data).await;
        }
        self.write_to_disk(&pass, range, data, deadline).await
    }

    /// After the object was brought up for a partial write.
    async fn write_resident(
        &self,
        pass: &GatePass,
        range: Range<usize>,
        data: &[u8],
        deadline: Instant,
    ) -> Result<()> {
        let small = data.len() <= IN_PLACE_MAX;
        if small && pass.object().write_in_place(pass, range.clone(), data) {
            return Ok(());
        }
        self.write_version(pass, range, data, deadline).await
    }

    /// Whether a part of an object at home in host memory is better written there: if there is room
    /// for it right now, and it is not so large that reading it whole is the greater cost.
    async fn comes_up(
        &self,
        pass: &GatePass,
        range: &Range<usize>,
        deadline: Instant,
    ) -> Result<bool> {
        let object = pass.object();
        let partial = range.len() < object.len;
        if !partial || object.home == MemoryTier::Disk || object.len > IN_PLACE_MAX {
            return Ok(false);
        }
        let Some(room) = self.shared.try_host_room(need(object, true)) else { return Ok(false) };
        let job = Fetch {
            object: object.clone(),
            class: Class::Demand,
            cause: MigrationCause::Read,
            stay: true,
            asked: Instant::now(),
            deadline,
            unwanted: None,
        };
        fetch_into(&job, pass, Some(room)).await?;
        Ok(true)
    }

    /// A new version of an object that has a host copy which is large, or which somebody reads.
    async fn write_version(
        &self,
        pass: &GatePass,
        range: Range<usize>,
        data: &[u8],
        deadline: Instant,
    ) -> Result<()> {
        let object = pass.object();
        let mut room = self.shared.try_host_room(need(object, true));
        if room.is_none() && object.pins() == 0 {
            room = self.room_or_spill(object, deadline).await?;
        }
        if room.is_none() && object.write_in_place(pass, range.clone(), data) {
            // No room for two: in place, in one go, is better than not at all.
            return Ok(());
        }
        let mut room = match room {
            Some(room) => room,
            // It must not leave host memory.
            None if object.pins() > 0 => {
                self.shared.host_room_or_error(need(object, false), deadline).await?
            }
            None => return self.write_to_disk(pass, range, data, deadline).await,
        };
        let Found::Copy(old) = object.copy.acquire(&self.shared.copies) else {
            unreachable!("the holder of the gate found a host copy, and alone takes it away")
        };
        let bytes = room.as_mut_slice();
        copy_politely(&mut bytes[..range.start], &old.as_ref()[..range.start]).await;
        copy_politely(&mut bytes[range.clone()], data).await;
        copy_politely(&mut bytes[range.end..], &old.as_ref()[range.end..]).await;
        drop(old);
        let chunks = chunks_of(&range);
        object.publish(pass, Some(room), |disk, old| disk.forget(object.len, chunks, old));
        Ok(())
    }

    /// Room for the whole object in host memory; none if it can only go to disk.
    async fn room_or_spill(
        &self,
        object: &Arc<Object>,
        deadline: Instant,
    ) -> Result<Option<OwnedCopy>> {
        if !self.shared.fits_host(object.len) {
            return Ok(None);
        }
        match self.shared.host_room(need(object, true), deadline).await {
            Ok(room) => Ok(Some(room)),
            Err(Refused::Error(VirtualMemoryError::Closed)) => Err(VirtualMemoryError::Closed),
            Err(_) => Ok(None),
        }
    }

    /// Writes through staging: every chunk that the range touches goes to a new extent. If the
    /// host copy has the rest of the object, all of that goes down with it.
    async fn write_to_disk(
        &self,
        pass: &GatePass,
        range: Range<usize>,
        data: &[u8],
        deadline: Instant,
    ) -> Result<()> {
        let object = pass.object();
        let whole = range.len() == object.len;
        // Before anybody looks at the map: a clone of it would keep the reservation there.
        let reserved = whole
            .then(|| object.with_disk(pass, |disk, _| disk.take_reserved(object.len)))
            .flatten();
        let base = Base::of(pass, whole);
        let mut chunks: Vec<usize> = match &base {
            // What only host memory has must be on disk before the host copy goes.
            Base::Host { .. } => object.disk().missing(object.len),
            Base::Below(_) => Vec::new(),
        };
        chunks.extend(chunks_of(&range));
        chunks.sort_unstable();
        chunks.dedup();
        let mut extents: VecDeque<Extent> = match reserved {
            Some(extents) => extents.into(),
            None => self.reserve(object, &chunks)?.into(),
        };
        let mut written: Vec<Extent> = Vec::with_capacity(chunks.len());
        let mut in_flight = InFlight::new();
        let per_piece = (self.shared.staging.piece_bytes() / CHUNK_BYTES).max(1);
        for group in chunks.chunks(per_piece) {
            while in_flight.len() >= PIECES_MAX
                && let Some(oldest) = in_flight.next().await
            {
                self.account(object, oldest, &mut written)?;
            }
            let piece = self.staging(object, &mut in_flight, &mut written, deadline).await?;
            let piece = self.compose(object, &base, group, &range, data, piece).await?;
            let pieces = group.iter().enumerate().filter_map(|(nth, &index)| {
                let start = nth * CHUNK_BYTES;
                let bytes = piece.slice(start..start + chunk_len(object.len, index) as usize);
                Some((extents.pop_front()?, bytes))
            });
            in_flight.push_back(self.shared.disk.write(pieces.collect()));
        }
        while let Some(oldest) = in_flight.next().await {
            self.account(object, oldest, &mut written)?;
        }
        drop(base);
        let extents = chunks.into_iter().zip(written);
        object.publish(pass, None, |disk, old| disk.put(object.len, extents, old));
        Ok(())
    }

    fn reserve(&self, object: &Arc<Object>, chunks: &[usize]) -> Result<Vec<Extent>> {
        let lens: Vec<u32> = chunks.iter().map(|&index| chunk_len(object.len, index)).collect();
        let reserved = self.shared.disk.reserve(&lens);
        reserved.map_err(|error| self.shared.disk_error(object.id, error))
    }

    /// A piece of staging. What this call has in flight may hold the last ones.
    async fn staging(
        &self,
        object: &Arc<Object>,
        in_flight: &mut InFlight,
        written: &mut Vec<Extent>,
        deadline: Instant,
    ) -> Result<IoBuf> {
        let (acquired, late) = (self.shared.staging.acquire(), tokio::time::sleep_until(deadline));
        tokio::pin!(acquired, late);
        loop {
            tokio::select! {
                biased;
                piece = &mut acquired => return Ok(IoBuf::from_staging(piece)),
                Some(oldest) = in_flight.next() => self.account(object, oldest, written)?,
                () = &mut late => return Err(VirtualMemoryError::TimedOut {
                    operation: "waiting for staging memory",
                    waited: self.shared.limits.wait_timeout,
                }),
            }
        }
    }

    fn account(
        &self,
        object: &Arc<Object>,
        outcome: Written,
        written: &mut Vec<Extent>,
    ) -> Result<()> {
        match outcome {
            Ok(extents) => {
                let bytes: u64 = extents.iter().map(|extent| u64::from(extent.len())).sum();
                add(&self.shared.counters.host_to_disk_bytes, bytes);
                written.extend(extents);
                Ok(())
            }
            Err(error) => {
                add(&self.shared.counters.errors, 1);
                Err(self.shared.disk_error(object.id, error))
            }
        }
    }

    /// The new bytes of some chunks, each at a multiple of the chunk size, in a piece of staging.
    async fn compose(
        &self,
        object: &Arc<Object>,
        base: &Base,
        group: &[usize],
        range: &Range<usize>,
        data: &[u8],
        mut piece: IoBuf,
    ) -> Result<Bytes> {
        for (nth, &index) in group.iter().enumerate() {
            let at = nth * CHUNK_BYTES;
            let chunk =
                index * CHUNK_BYTES..index * CHUNK_BYTES + chunk_len(object.len, index) as usize;
            let new = range.start.max(chunk.start)..range.end.min(chunk.end);
            if new.start > chunk.start || new.end < chunk.end || new.is_empty() {
                piece = base.copy_chunk(object, index, chunk.clone(), piece, at).await?;
            }
            if !new.is_empty() {
                let to = at + new.start - chunk.start..at + new.end - chunk.start;
                piece[to].copy_from_slice(&data[new.start - range.start..new.end - range.start]);
            }
        }
        tokio::task::yield_now().await;
        Ok(piece.freeze())
    }
}

/// The version that a write to disk starts from.
enum Base {
    /// The host copy; read, so that it stays.
    Host { old: crate::copy::ReadGuard },
    /// What device memory or the disk has, and zeros.
    Below(Version),
}

impl Base {
    /// With `whole` nothing of it is needed.
    fn of(pass: &GatePass, whole: bool) -> Base {
        let object = pass.object();
        if whole {
            return Base::Below(Version::zeros());
        }
        match object.copy.acquire(&object.shared.copies) {
            Found::Copy(old) => Base::Host { old },
            Found::Locked | Found::Nothing => Base::Below(object.version()),
        }
    }

    /// Copies chunk `index` of the old version to `at` of `piece`.
    async fn copy_chunk(
        &self,
        object: &Arc<Object>,
        index: usize,
        chunk: Range<usize>,
        mut piece: IoBuf,
        at: usize,
    ) -> Result<IoBuf> {
        match self {
            Base::Host { old } => {
                piece[at..at + chunk.len()].copy_from_slice(&old.as_ref()[chunk]);
                Ok(piece)
            }
            Base::Below(version) => {
                let one = index..index + 1;
                let (loaded, outcome) = load(object, version, one, piece, at, Class::Demand).await;
                outcome.map(|()| loaded)
            }
        }
    }
}

fn need(object: &Object, may_spill: bool) -> Need {
    Need { len: object.len, owner: object.id, class: Class::Demand, may_spill }
}

/// Room for a version that needs nothing of the one before. Dropped before it was published, it goes
/// back to where it came from: what was set apart for the first write still is.
struct Room<'a> {
    pass: &'a GatePass,
    copy: Option<OwnedCopy>,
    was_spare: bool,
}

impl<'a> Room<'a> {
    /// The room that was set apart when the object was allocated.
    fn spare(pass: &'a GatePass) -> Option<Self> {
        let copy = Some(pass.object().take_spare(pass)?);
        Some(Room { pass, copy, was_spare: true })
    }

    fn taken(pass: &'a GatePass, copy: OwnedCopy) -> Self {
        Room { pass, copy: Some(copy), was_spare: false }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.copy.as_mut().expect("invariant: taken by publishing alone").as_mut_slice()
    }

    fn publish(mut self) {
        let copy = self.copy.take();
        self.pass.object().publish(self.pass, copy, DiskMap::clear);
    }

    /// Lets `fill` make all bytes in one go.
    fn publish_whole(mut self, fill: impl FnOnce(&mut [u8])) {
        fill(self.bytes());
        self.publish();
    }

    /// These bytes, and zeros around them.
    async fn fill_new(mut self, range: Range<usize>, data: &[u8]) -> Result<()> {
        let bytes = self.bytes();
        bytes[..range.start].fill(0);
        bytes[range.end..].fill(0);
        copy_politely(&mut bytes[range], data).await;
        self.publish();
        Ok(())
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let object = self.pass.object();
        if let Some(copy) = self.copy.take().filter(|_| self.was_spare && !object.is_dead()) {
            object.set_spare(self.pass, copy);
        }
    }
}
