//! Writes of a new version straight to disk, without a host copy.
//!
//! Ownership: the extents of such a version belong to its [`DiskWrite`], which the caller's future
//! owns only within a poll. Between polls a task owns it, or it lies in a parcel, which is taken
//! back when the disk has no space left ([`Shared::reserve`]); then the write begins again. Dropped
//! before it was published, it gives back what it took: what was reserved for the first write is
//! reserved for the object again. Called by `vmem/write.rs`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::edges::{Edge, Written, account, write_edges, write_rest};
use super::transfer::write_chunks;
use super::write_back_from_device;
use crate::buffer::IoBuf;
use crate::chunk::{CHUNK_BYTES, chunk_count, chunk_len, chunk_lens, chunks_of, range_of};
use crate::copy::Found;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::memory_tier::MemoryTier;
use crate::object::{ExtentMap, GatePass, Object};
use crate::parcel::{Delivery, GRACE, Parcel, SetAside};
use crate::storage::{Extent, TierError};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one large write that are in flight at once.
const PIECES_MAX: usize = 4;

/// A version that is being written to disk. Chunks that the data covers whole go first, those at
/// its edges wait for the gate.
pub(crate) struct DiskWrite {
    object: Arc<Object>,
    range: Range<usize>,
    /// Chunks that the data covers whole and that were not submitted yet, with their extents.
    next: Range<usize>,
    extents: VecDeque<Extent>,
    in_flight: VecDeque<(Range<usize>, oneshot::Receiver<Written>)>,
    written: Vec<(usize, Extent)>,
    edges: Vec<Edge>,
    /// Whether the extents are those that `allocate` reserved for the object.
    was_reserved: bool,
}

/// What a task sets aside for the caller of a large write. Each of the two can be taken back
/// without the other.
pub(crate) struct Turn {
    pub(crate) write: Parcel<DiskWrite>,
    /// Staging for the next chunks; none if their piece is to lie in memory of its own.
    pub(crate) piece: Option<Parcel<IoBuf>>,
}

impl SetAside for Turn {
    /// Its two parcels say so themselves.
    fn is_shared(&self) -> bool {
        false
    }
}

impl DiskWrite {
    /// A write of `data` to this range, which has no extents yet. Keeps the data of chunks that it
    /// covers in part: less than two chunks.
    pub(crate) fn new(object: &Arc<Object>, range: &Range<usize>, data: &[u8]) -> Self {
        let first = range.start.div_ceil(CHUNK_BYTES);
        let last =
            if range.end == object.len { chunk_count(object.len) } else { range.end / CHUNK_BYTES };
        let mut write = DiskWrite {
            object: object.clone(),
            range: range.clone(),
            next: first..last.max(first),
            extents: VecDeque::new(),
            in_flight: VecDeque::new(),
            written: Vec::new(),
            edges: Vec::new(),
            was_reserved: false,
        };
        write.take_edges(data);
        write
    }

    fn take_edges(&mut self, data: &[u8]) {
        let range = &self.range;
        let covered = self.next.start * CHUNK_BYTES..self.next.end * CHUNK_BYTES;
        let parts = if self.next.is_empty() {
            [range.clone(), range.end..range.end]
        } else {
            [range.start..covered.start, range.end.min(covered.end)..range.end]
        };
        for part in parts {
            for index in chunks_of(&part) {
                let chunk = range_of(self.object.len, index);
                let part = part.start.max(chunk.start)..part.end.min(chunk.end);
                let bytes = &data[part.start - range.start..part.end - range.start];
                self.edges.push((part.clone(), Bytes::copy_from_slice(bytes)));
            }
        }
    }

    /// Takes the extents for the chunks that the data covers whole: those that `allocate` reserved,
    /// if the data covers the whole object.
    async fn take_extents(&mut self, deadline: &Deadline) -> Result<()> {
        let object = self.object.clone();
        if object.gate_if_open()?.is_some_and(|pass| self.take_reserved(&pass)) {
            return Ok(());
        }
        let shared = &object.shared;
        let lens = chunk_lens(object.len, self.next.clone());
        loop {
            let extents = shared.reserve_soon(object.home_level(), &lens, deadline).await;
            // A write that was taken back has given the reservation back, or is about to, with the
            // gate.
            if extents.is_err()
                && !object.has_host_space()
                && object.extents().is_unwritten()
                && let Ok(pass) = object.gate(deadline).await
                && self.take_reserved(&pass)
            {
                return Ok(());
            }
            // Another first write, which has the reservation, is with its task: it publishes, or is
            // set aside and then taken back.
            let is_lent = matches!(extents, Err(TierError::Full { .. }))
                && object.has_nothing()
                && !crate::planted!("lent-extents");
            if is_lent && object.is_dead() {
                return Err(object.not_found());
            }
            if !is_lent || deadline.is_past() || shared.is_closed() {
                let public = |error| shared.tier_error(object.id, error);
                self.extents = extents.map_err(public)?.into();
                return Ok(());
            }
            let Err(Late) = shared.deadline_in(GRACE).bound(pending::<Infallible>()).await;
        }
    }

    fn take_reserved(&mut self, pass: &GatePass) -> bool {
        let len = self.object.len;
        if self.range.len() < len {
            return false;
        }
        let reserved = self.object.with_extents(pass, |map, _| map.take_reserved(len));
        let Some(reserved) = reserved else { return false };
        (self.extents, self.was_reserved) = (reserved.into(), true);
        true
    }

    /// Whether all chunks that the data covers whole were submitted.
    pub(crate) fn is_submitted(&self) -> bool {
        self.next.is_empty()
    }

    /// The bytes of the object that the next piece has. That is one chunk, or as many as a piece of
    /// staging holds.
    pub(crate) fn next_bytes(&self, one: bool) -> Range<usize> {
        let piece_bytes = if one { CHUNK_BYTES } else { self.object.shared.staging.piece_bytes() };
        let fit = (piece_bytes / CHUNK_BYTES).max(1);
        let end = self.next.end.min(self.next.start + fit);
        self.next.start * CHUNK_BYTES..(end * CHUNK_BYTES).min(self.object.len)
    }

    /// Submits a piece, which has these bytes of the object.
    pub(crate) fn submit(&mut self, piece: IoBuf, bytes: Range<usize>) {
        let chunks = chunks_of(&bytes);
        self.next.start = chunks.end;
        let piece = piece.freeze();
        let mut pieces = Vec::with_capacity(chunks.len());
        for (nth, index) in chunks.clone().enumerate() {
            let start = nth * CHUNK_BYTES;
            let end = start + chunk_len(self.object.len, index) as usize;
            if let Some(extent) = self.extents.pop_front() {
                pieces.push((extent, piece.slice(start..end)));
            }
        }
        let (reply, answer) = oneshot::channel();
        let shared = self.object.shared.clone();
        self.object.shared.spawn("vmem-write", async move {
            // The write begins here, so that it runs on the runtime of the store.
            drop(reply.send(write_chunks(&shared, pieces).await));
        });
        self.in_flight.push_back((chunks, answer));
    }

    /// Waits until another piece may be submitted.
    ///
    /// # Errors
    ///
    /// Those of the writes before it.
    async fn settle_some(&mut self) -> Result<()> {
        while self.in_flight.len() >= PIECES_MAX {
            self.settle_oldest().await?;
        }
        Ok(())
    }

    /// Waits for the oldest piece that is in flight.
    async fn settle_oldest(&mut self) -> Result<()> {
        let Some((_, answer)) = self.in_flight.front_mut() else { return Ok(()) };
        let outcome = answer.await.unwrap_or(Err(TierError::Closed));
        let Some((chunks, _)) = self.in_flight.pop_front() else { return Ok(()) };
        let written = account(&self.object.shared, self.object.id, outcome)?;
        self.written.extend(chunks.zip(written));
        Ok(())
    }
}

impl Drop for DiskWrite {
    fn drop(&mut self) {
        if !self.was_reserved || self.object.is_dead() {
            return;
        }
        let object = self.object.clone();
        let mut extents = std::mem::take(&mut self.written);
        extents.extend(self.next.clone().zip(self.extents.drain(..)));
        let in_flight = std::mem::take(&mut self.in_flight);
        // The gate is taken at once if it is open: the next write finds the reservation, or waits
        // for it behind the gate.
        let pass = object.try_gate();
        if in_flight.is_empty()
            && let Some(pass) = &pass
        {
            return return_reserved(pass, extents);
        }
        self.object.shared.spawn("vmem-write", async move {
            let pass = match pass {
                Some(pass) => Ok(pass),
                None => object.gate(&object.shared.deadline()).await,
            };
            for (chunks, answer) in in_flight {
                if let Ok(Ok(written)) = answer.await {
                    extents.extend(chunks.zip(written));
                }
            }
            if let Ok(pass) = pass {
                return_reserved(&pass, extents);
            }
        });
    }
}

/// Gives the object its reservation back after a first write that was not published, unless it has
/// bytes by now.
fn return_reserved(pass: &GatePass, extents: Vec<(usize, Extent)>) {
    let object = pass.object();
    if object.is_dead() || !object.has_nothing() {
        return;
    }
    let mut all: Vec<Option<Extent>> = (0..chunk_count(object.len)).map(|_| None).collect();
    for (index, extent) in extents {
        all[index] = Some(extent.into_unwritten());
    }
    // After an error these were freed, and may be another object's by now.
    let missing: Vec<_> = (0..all.len()).filter(|&index| all[index].is_none()).collect();
    let lens = chunk_lens(object.len, missing.iter().copied());
    let Ok(more) = object.shared.reserve(object.home_level(), &lens) else {
        tracing::warn!(target: "vmem::migration", handle = object.id, "a reservation is lost");
        return;
    };
    missing.into_iter().zip(more).for_each(|(index, extent)| all[index] = Some(extent));
    object.with_extents(pass, |map, _| *map = ExtentMap::of_some(all));
}

/// Begins a write, and sets it aside with memory for its first piece. For a task.
///
/// # Errors
///
/// `TierFull`, `HandleNotFound`, `TimedOut`.
pub(crate) async fn begin_disk_write(
    mut write: DiskWrite,
    owned: bool,
    deadline: Deadline,
) -> Result<Turn> {
    write.take_extents(&deadline).await?;
    next_turn(write, owned, deadline).await
}

/// Sets the write aside for its caller once another piece may be submitted, with memory for that
/// piece. With `owned` the caller brings the memory. For a task.
///
/// # Errors
///
/// Those of the pieces before; `TimedOut`.
pub(crate) async fn next_turn(
    mut write: DiskWrite,
    owned: bool,
    deadline: Deadline,
) -> Result<Turn> {
    let shared = write.object.shared.clone();
    let settled = deadline.bound(write.settle_some()).await;
    settled.map_err(|Late| deadline.error("writing to disk"))??;
    let piece = match owned {
        true => None,
        false => {
            let piece = shared.staging(MemoryTier::Disk, &deadline).await?;
            Some(Parcel::set_aside(piece, &shared.unclaimed))
        }
    };
    Ok(Turn { write: Parcel::set_aside(write, &shared.unfinished), piece })
}

/// The outcome of a write to disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finished {
    /// It is the current version.
    Published,
    /// The object was pinned to host memory meanwhile, and the new version is not there. The
    /// previous version is still current.
    Pinned,
}

/// Delivers the outcome of a write to disk to its caller; as [`Reply`](super::write::Reply).
type Reply = Delivery<Result<Finished>>;

/// Writes the chunks at the edges, and those of the rest that only host memory has; then publishes.
/// For a task.
pub(crate) async fn finish_disk_write(write: DiskWrite, deadline: Deadline, reply: Reply) {
    let outcome = tokio::select! {
        biased;
        outcome = try_finish(write, &deadline, &reply) => outcome,
        () = reply.unwanted() => return,
    };
    drop(reply.deliver(outcome, None));
}

async fn try_finish(mut write: DiskWrite, deadline: &Deadline, reply: &Reply) -> Result<Finished> {
    while !write.in_flight.is_empty() {
        write.settle_oldest().await?;
    }
    let object = write.object.clone();
    let pass = object.gate(deadline).await?;
    // Pins are made under the gate, so none is added from here on.
    if object.pins() > 0 && !crate::planted!("disk-write-unpins") {
        return Ok(Finished::Pinned);
    }
    if write.range.len() < object.len {
        // The rest of a version is to be where its chunks can be kept.
        write_back_from_device(&pass, MigrationCause::WriteBack, deadline).await?;
    }
    let edges = write_edges(&pass, &write.edges, deadline).await?;
    let host = match object.copy.acquire(&object.shared.copies) {
        Found::Copy(old) if write.range.len() < object.len => Some(old.into_bytes()),
        _ => None,
    };
    let rest = match host {
        Some(host) => write_rest(&pass, &write.range, host).await?,
        None => Vec::new(),
    };
    if reply.is_unwanted() {
        return Ok(Finished::Published);
    }
    let written = std::mem::take(&mut write.written);
    write.was_reserved = false;
    object.publish(&pass, None, |map, old| {
        map.put(object.len, written.into_iter().chain(edges).chain(rest), old);
    });
    Ok(Finished::Published)
}
