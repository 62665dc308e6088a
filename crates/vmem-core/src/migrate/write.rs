//! New versions that a caller writes, in host memory.
//!
//! Ownership: the space of a version that is being written belongs to its value ([`NewVersion`]),
//! which the caller's future has within a poll, a parcel or a task between two. Dropped before it
//! was published, it gives back what it took: what was set apart for the first write is set apart
//! again. Called by `vmem/write.rs`.

use std::ops::Range;
use std::sync::Arc;

use super::load;
use crate::chunk::{CHUNK_BYTES, chunk_len, chunks_of};
use crate::copy::{Found, OwnedCopy};
use crate::deadline::Deadline;
use crate::error::VirtualMemoryError;
use crate::object::{ExtentMap, GatePass, Object};
use crate::parcel::Delivery;
use crate::tier::Class;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

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
        self.object.publish(pass, copy, ExtentMap::clear);
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

/// The end of a write, for its caller. Nothing is published for one that has gone: that is asked
/// with the gate held, so a later write, which needs the gate too, is never undone by one that was
/// dropped.
pub(super) type Reply = Delivery<Result<()>>;

/// Publishes a version that has the caller's data at `range`; the rest comes from the version
/// before. For a task.
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
    object.publish(&pass, copy, |map, old| map.forget(object.len, chunks, old));
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
            let piece = object.shared.staging(below.tier(), deadline).await?;
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
