//! New versions that a caller writes: in host memory, or on disk.
//!
//! Ownership: space and extents of a version that is being written belong to its value ([`NewVersion`],
//! [`DiskWrite`]), which the caller's future has within a poll and a task between two. Dropped before it was
//! published, it gives back what it took: what was set apart for the first write is set apart again.
//! Called by `vmem/write.rs`.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Job, fetch_into, load};
use crate::buffer::IoBuf;
use crate::copy::{Found, OwnedCopy};
use crate::deadline::Deadline;
use crate::disk::{CHUNK_BYTES, DiskError, Extent};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::object::{DiskMap, GatePass, Object, Version, chunk_count, chunk_len, chunk_lens};
use crate::object::{chunks_of, range_of};
use crate::parcel::Delivery;
use crate::shared::Shared;
use crate::stats::add;
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one large write that are on their way to disk at once.
const PIECES_MAX: usize = 4;

// ---- In host memory ----------------------------------------------------------------------------

/// Space for the next version of an object.
pub(crate) struct NewVersion {
    object: Arc<Object>,
    copy: Option<OwnedCopy>,
    was_spare: bool,
}

impl NewVersion {
    /// The space that was set apart when the object was allocated.
    pub(crate) fn spare(pass: &GatePass) -> Option<Self> {
        let copy = Some(pass.object().take_spare(pass)?);
        Some(NewVersion { object: pass.object().clone(), copy, was_spare: true })
    }

    pub(crate) fn taken(object: &Arc<Object>, copy: OwnedCopy) -> Self {
        NewVersion { object: object.clone(), copy: Some(copy), was_spare: false }
    }

    pub(crate) fn object(&self) -> &Arc<Object> {
        &self.object
    }

    /// The bytes of the whole object.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        self.copy.as_mut().expect("invariant: taken by publishing alone").as_mut_slice()
    }

    /// All bytes are those of the new version.
    pub(crate) fn publish_whole(mut self, pass: &GatePass) {
        let copy = self.copy.take();
        self.object.publish(pass, copy, DiskMap::clear);
    }
}

impl Drop for NewVersion {
    fn drop(&mut self) {
        let Some(copy) = self.copy.take().filter(|_| self.was_spare) else { return };
        let object = self.object.clone();
        if object.is_dead() {
            return;
        }
        if let Some(pass) = object.try_gate() {
            object.return_spare(&pass, copy);
            return;
        }
        let deadline = object.shared.deadline();
        self.object.shared.spawn("vmem-write", async move {
            if let Ok(pass) = object.gate(&deadline).await {
                object.return_spare(&pass, copy);
            }
        });
    }
}

/// The end of a write, for its caller. Nothing is published for one that has gone: that is asked with the gate held,
/// so a later write, which needs the gate too, is never undone by one that was dropped.
type Reply = Delivery<Result<()>>;

/// Publishes a version that has the caller's data at `range`; the rest comes from the version before. For a task.
pub(crate) async fn publish_version(
    version: NewVersion,
    range: Range<usize>,
    deadline: Deadline,
    reply: Reply,
) {
    let outcome = tokio::select! {
        biased;
        outcome = try_publish(version, range, &deadline, &reply) => outcome,
        () = reply.unwanted() => return,
    };
    // It takes nothing that others could use.
    drop(reply.deliver(outcome, None));
}

async fn try_publish(
    mut version: NewVersion,
    range: Range<usize>,
    deadline: &Deadline,
    reply: &Reply,
) -> Result<()> {
    let object = version.object.clone();
    let pass = object.gate(deadline).await?;
    if range.len() == object.len {
        if !reply.is_unwanted() {
            version.publish_whole(&pass);
        }
        return Ok(());
    }
    if let Found::Copy(old) = object.copy.acquire(&object.shared.copies) {
        let bytes = version.bytes();
        bytes[..range.start].copy_from_slice(&old.as_ref()[..range.start]);
        tokio::task::yield_now().await;
        bytes[range.end..].copy_from_slice(&old.as_ref()[range.end..]);
    } else if object.has_spare() {
        let bytes = version.bytes();
        bytes[..range.start].fill(0);
        bytes[range.end..].fill(0);
    } else {
        load_around(&object, &mut version, &range, deadline).await?;
    }
    if reply.is_unwanted() {
        return Ok(());
    }
    let chunks = chunks_of(&range);
    let copy = version.copy.take();
    object.publish(&pass, copy, |disk, old| disk.forget(object.len, chunks, old));
    Ok(())
}

/// The bytes around `range`, from below host memory.
async fn load_around(
    object: &Arc<Object>,
    version: &mut NewVersion,
    range: &Range<usize>,
    deadline: &Deadline,
) -> Result<()> {
    if let Some(damage) = object.damage() {
        return Err(damage);
    }
    let below = object.version();
    for around in [0..range.start, range.end..object.len] {
        for chunk in chunks_of(&around) {
            let piece = object.shared.staging(deadline).await?;
            let one = chunk..chunk + 1;
            let (piece, outcome) = load(object, &below, one, piece, 0, Class::Demand).await;
            outcome?;
            let base = chunk * CHUNK_BYTES;
            let end = base + chunk_len(object.len, chunk) as usize;
            let wanted = around.start.max(base)..around.end.min(end);
            let from = &piece[wanted.start - base..wanted.end - base];
            version.bytes()[wanted].copy_from_slice(from);
        }
    }
    Ok(())
}

// ---- On disk -----------------------------------------------------------------------------------

/// The outcome of one write that is on its way.
type Written = std::result::Result<Vec<Extent>, DiskError>;

/// A version on its way to disk: chunks that the data covers go ahead, those at its edges wait for the gate.
pub(crate) struct DiskWrite {
    object: Arc<Object>,
    range: Range<usize>,
    /// Chunks that the data covers whole and that were not submitted yet, with their extents.
    next: Range<usize>,
    extents: VecDeque<Extent>,
    in_flight: VecDeque<(Range<usize>, oneshot::Receiver<Written>)>,
    written: Vec<(usize, Extent)>,
    /// The data in chunks that it covers in part, and where in the object that is.
    edges: Vec<(Range<usize>, Bytes)>,
}

impl DiskWrite {
    /// Takes the extents for the chunks that the data covers whole.
    ///
    /// # Errors
    ///
    /// `TierFull`, `HandleNotFound`.
    pub(crate) fn begin(object: &Arc<Object>, range: &Range<usize>) -> Result<Self> {
        let whole = range.len() == object.len;
        // Before anybody looks at the map: a clone of it would keep the reservation there.
        let reserved = match object.gate_if_open()? {
            Some(pass) if whole => {
                object.with_disk(&pass, |disk, _| disk.take_reserved(object.len))
            }
            _ => None,
        };
        let first = range.start.div_ceil(CHUNK_BYTES);
        let last =
            if range.end == object.len { chunk_count(object.len) } else { range.end / CHUNK_BYTES };
        let next = first..last.max(first);
        let extents = match reserved {
            Some(extents) => extents,
            None => reserve(object, next.clone())?,
        };
        Ok(DiskWrite {
            object: object.clone(),
            range: range.clone(),
            next,
            extents: extents.into(),
            in_flight: VecDeque::new(),
            written: Vec::new(),
            edges: Vec::new(),
        })
    }

    /// Keeps the data of chunks that it covers in part: less than two chunks.
    pub(crate) fn take_edges(&mut self, range: &Range<usize>, data: &[u8]) {
        let covered = self.next.start * CHUNK_BYTES..self.next.end * CHUNK_BYTES;
        let front = range.start..range.end.min(covered.start);
        let back = if self.next.is_empty() {
            range.end..range.end
        } else {
            range.end.min(covered.end)..range.end
        };
        let front = if self.next.is_empty() { range.clone() } else { front };
        for edge in [front, back] {
            for index in chunks_of(&edge) {
                let chunk = range_of(self.object.len, index);
                let part = edge.start.max(chunk.start)..edge.end.min(chunk.end);
                let bytes = &data[part.start - range.start..part.end - range.start];
                self.edges.push((part, Bytes::copy_from_slice(bytes)));
            }
        }
    }

    /// The bytes of the object that the next piece has; none once all are submitted. One chunk of them, or as many as
    /// a piece of staging holds.
    pub(crate) fn next_chunks(&self, one: bool) -> Option<Range<usize>> {
        let piece_bytes = if one { CHUNK_BYTES } else { self.object.shared.staging.piece_bytes() };
        let fit = (piece_bytes / CHUNK_BYTES).max(1);
        let chunks = self.next.start..self.next.end.min(self.next.start + fit);
        (!chunks.is_empty())
            .then(|| chunks.start * CHUNK_BYTES..(chunks.end * CHUNK_BYTES).min(self.object.len))
    }

    /// Sends a piece with these bytes of the object on its way.
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
            // Begun here, on the runtime of the store.
            drop(reply.send(shared.disk.write(pieces).await));
        });
        self.in_flight.push_back((chunks, answer));
    }

    /// Waits until another write may be on its way.
    ///
    /// # Errors
    ///
    /// Those of the writes before it.
    pub(crate) async fn settle_some(&mut self) -> Result<()> {
        while self.in_flight.len() >= PIECES_MAX {
            self.settle_oldest().await?;
        }
        Ok(())
    }

    /// Waits for the oldest write that is on its way.
    async fn settle_oldest(&mut self) -> Result<()> {
        let Some((_, answer)) = self.in_flight.front_mut() else { return Ok(()) };
        let outcome = answer.await.unwrap_or(Err(DiskError::Closed));
        let Some((chunks, _)) = self.in_flight.pop_front() else { return Ok(()) };
        let written = account(&self.object, outcome)?;
        self.written.extend(chunks.zip(written));
        Ok(())
    }
}

fn reserve(object: &Object, chunks: impl IntoIterator<Item = usize>) -> Result<Vec<Extent>> {
    let reserved = object.shared.disk.reserve(&chunk_lens(object.len, chunks));
    reserved.map_err(|error| object.shared.disk_error(object.id, error))
}

fn account(object: &Object, outcome: Written) -> Result<Vec<Extent>> {
    let counters = &object.shared.counters;
    match outcome {
        Ok(extents) => {
            let bytes = extents.iter().map(|extent| u64::from(extent.len())).sum();
            add(&counters.host_to_disk_bytes, bytes);
            Ok(extents)
        }
        Err(error) => {
            add(&counters.errors, 1);
            Err(object.shared.disk_error(object.id, error))
        }
    }
}

/// A piece of staging for the next chunks; for a task.
///
/// # Errors
///
/// `TimedOut`.
pub(crate) async fn write_piece(shared: Arc<Shared>, deadline: Deadline) -> Result<IoBuf> {
    shared.staging(&deadline).await
}

/// Writes the chunks at the edges, and, if host memory has the rest of the object, what it alone has; then
/// publishes. For a task.
pub(crate) async fn finish_disk_write(write: DiskWrite, deadline: Deadline, reply: Reply) {
    let outcome = tokio::select! {
        biased;
        outcome = try_finish(write, &deadline, &reply) => outcome,
        () = reply.unwanted() => return,
    };
    drop(reply.deliver(outcome, None));
}

async fn try_finish(mut write: DiskWrite, deadline: &Deadline, reply: &Reply) -> Result<()> {
    while !write.in_flight.is_empty() {
        write.settle_oldest().await?;
    }
    let object = write.object.clone();
    let pass = object.gate(deadline).await?;
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
        return Ok(());
    }
    let written = std::mem::take(&mut write.written);
    object.publish(&pass, None, |disk, old| {
        disk.put(object.len, written.into_iter().chain(edges).chain(rest), old);
    });
    if object.pins() > 0 {
        // It was pinned meanwhile, and must be in host memory.
        let job = Job::new(object.clone(), MigrationCause::Promote, *deadline);
        if let Err(error) = fetch_into(&job, &pass, None).await {
            tracing::warn!(target: "vmem::migration", %error, "a pinned object is on disk only");
        }
    }
    Ok(())
}

/// Writes the chunks that the data covers in part; the rest of each comes from the version before.
async fn write_edges(
    pass: &GatePass,
    edges: &[(Range<usize>, Bytes)],
    deadline: &Deadline,
) -> Result<Vec<(usize, Extent)>> {
    let object = pass.object();
    let mut written = Vec::with_capacity(edges.len());
    for (range, data) in edges {
        let index = range.start / CHUNK_BYTES;
        let chunk = range_of(object.len, index);
        let mut piece = object.shared.staging(deadline).await?;
        match object.copy.acquire(&object.shared.copies) {
            Found::Copy(old) => {
                piece[..chunk.len()].copy_from_slice(&old.as_ref()[chunk.clone()]);
            }
            Found::Locked | Found::Nothing => {
                if let Some(damage) = object.damage() {
                    return Err(damage);
                }
                let below: Version = object.version();
                let (loaded, outcome) =
                    load(object, &below, index..index + 1, piece, 0, Class::Demand).await;
                outcome?;
                piece = loaded;
            }
        }
        piece[range.start - chunk.start..range.end - chunk.start].copy_from_slice(data);
        let extent = reserve(object, [index])?;
        let bytes = piece.freeze().slice(..chunk.len());
        let pieces = extent.into_iter().map(|extent| (extent, bytes.clone())).collect();
        drop(bytes);
        let extents = account(object, object.shared.disk.write(pieces).await)?;
        written.extend(extents.into_iter().map(|extent| (index, extent)));
    }
    Ok(written)
}

/// Writes what only host memory has of the chunks outside of `range`: its copy is about to go.
async fn write_rest(
    pass: &GatePass,
    range: &Range<usize>,
    host: Bytes,
) -> Result<Vec<(usize, Extent)>> {
    let object = pass.object();
    let touched = chunks_of(range);
    let missing = object.disk().missing(object.len);
    let rest: Vec<_> = missing.into_iter().filter(|index| !touched.contains(index)).collect();
    if rest.is_empty() {
        return Ok(Vec::new());
    }
    let extents = reserve(object, rest.iter().copied())?;
    let slice = |(&index, extent)| (extent, host.slice(range_of(object.len, index)));
    let pieces = rest.iter().zip(extents).map(slice).collect();
    drop(host);
    let extents = account(object, object.shared.disk.write(pieces).await)?;
    Ok(rest.into_iter().zip(extents).collect())
}
