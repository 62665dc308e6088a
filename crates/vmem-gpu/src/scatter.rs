//! Parts of one device buffer of the caller, into objects.
//!
//! Invariant: the pieces of one object are written in their order; objects do not wait for each
//! other; and the space in host memory through which they pass belongs to a task of the runtime.
//! Called by users.

use std::collections::HashMap;
use std::ops::Range;

use futures::stream::{self, StreamExt, TryStreamExt};
use vmem_core::backend::{DeviceAccess, IoBuf};
use vmem_core::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::call::Foreign;
use crate::ext::{device_of, tier};
use crate::target::{DeviceTarget, caught_up, check_range};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// What is taken out of a buffer at a time, in bytes.
const TAKE_BYTES: usize = 1 << 20;
/// Objects that are written at once.
const OBJECTS_MAX: usize = 16;
/// Pieces of one object that are taken before their turn to be written.
const TAKES_MAX: usize = 8;

/// A piece of a scatter: where in the buffer it comes from, the object, and the part of it.
pub type Scattered<'a> = (usize, &'a VMemHandle, Range<usize>);

/// The pieces of one object: where each comes from, and where it goes.
type Pieces = (VMemHandle, Vec<(usize, Range<usize>)>);

pub(crate) async fn scatter(
    vmem: &VirtualMemory,
    target: &DeviceTarget<'_>,
    pieces: &[Scattered<'_>],
) -> Result<()> {
    for (offset, handle, range) in pieces {
        check_range(handle, range)?;
        target.check(*offset, range.len())?;
    }
    let access = device_of(vmem, target.stream())?;
    let stream = target.stream();
    let work = |access: DeviceAccess, from: Foreign| {
        let objects = by_object(pieces);
        let stream = stream.clone();
        async move {
            caught_up(&access, &stream).await?;
            // The task keeps no stream of the user's alive.
            drop(stream);
            let written = stream::iter(objects)
                .map(|object| write_pieces(&access, object, &from))
                .buffer_unordered(OBJECTS_MAX);
            written.try_collect().await
        }
    };
    target.run(&access, work).await
}

/// Each object with its pieces, in parts of at most `TAKE_BYTES`.
fn by_object(pieces: &[Scattered<'_>]) -> Vec<Pieces> {
    let mut objects: Vec<Pieces> = Vec::new();
    let mut places: HashMap<u64, usize> = HashMap::new();
    for (offset, handle, range) in pieces {
        let place = *places.entry(handle.id()).or_insert_with(|| {
            objects.push(((*handle).clone(), Vec::new()));
            objects.len() - 1
        });
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + TAKE_BYTES);
            objects[place].1.push((offset + (at - range.start), at..end));
            at = end;
        }
    }
    objects
}

/// Takes some pieces early, and writes them one after the other.
async fn write_pieces(
    access: &DeviceAccess,
    (handle, pieces): Pieces,
    from: &Foreign,
) -> Result<()> {
    let takes = stream::iter(pieces).map(|(at, range)| async move {
        let buf = take(access, from.clone(), at, range.len()).await?;
        Ok((buf, range))
    });
    let mut takes = std::pin::pin!(takes.buffered(TAKES_MAX));
    while let Some((buf, range)) = takes.try_next().await? {
        access.store().write_at(&handle, range.start, &buf[..range.len()]).await?;
    }
    Ok(())
}

async fn take(access: &DeviceAccess, from: Foreign, at: usize, len: usize) -> Result<IoBuf> {
    let tier = tier(access)?;
    let buf = access.scratch(len).await?;
    let taken = tier.within("copying from a buffer", tier.take(from, at, len, buf)).await?;
    let (buf, outcome) = taken;
    outcome.map_err(|error| access.fault(error))?;
    Ok(buf)
}
