//! Many pieces of objects, from any tier, into one device buffer of the caller.
//!
//! Invariant: no two pieces of a call lie over each other in the buffer, so their order does not
//! matter; and what a call reads, holds and copies belongs to a task of the runtime. Called by
//! users.

use std::ops::Range;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use vmem_core::backend::{DeviceAccess, DeviceError};
use vmem_core::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::call::Foreign;
use crate::copy::Source;
use crate::ext::tier;
use crate::target::{DeviceTarget, caught_up, check_range, invalid};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one call that are read, or under way, at once.
const PIECES_MAX: usize = 32;

/// A piece of a gather: the object, the part of it, and where in the buffer that goes.
pub type Gathered<'a> = (&'a VMemHandle, Range<usize>, usize);

/// A piece for the task.
type Piece = (VMemHandle, Range<usize>, usize);

pub(crate) async fn gather(
    vmem: &VirtualMemory,
    pieces: &[Gathered<'_>],
    target: &DeviceTarget<'_>,
) -> Result<()> {
    for (handle, range, offset) in pieces {
        check_range(handle, range)?;
        target.check(*offset, range.len())?;
    }
    check_disjoint(pieces)?;
    let stream = target.stream();
    let work = |access: DeviceAccess, to: Foreign| {
        let there = pieces.iter().filter(|(_, range, _)| !range.is_empty());
        let pieces: Vec<Piece> = there
            .map(|(handle, range, offset)| ((*handle).clone(), range.clone(), *offset))
            .collect();
        let stream = stream.clone();
        async move {
            if !vmem_core::planted!("gather-order") {
                caught_up(tier(&access)?, &stream).await?;
            }
            // The task keeps no stream of the user's alive.
            drop(stream);
            give_all(&access, pieces, &to).await
        }
    };
    target.run(vmem, work).await
}

/// Pieces that lie over each other have no order.
fn check_disjoint(pieces: &[Gathered<'_>]) -> Result<()> {
    let mut targets: Vec<_> = pieces.iter().map(|(_, range, at)| (*at, at + range.len())).collect();
    targets.retain(|(start, end)| start < end);
    targets.sort_unstable();
    let mut pairs = targets.windows(2);
    match pairs.find(|two| two[1].0 < two[0].1 && !vmem_core::planted!("gpu-overlap")) {
        Some(two) => Err(invalid(format!("pieces lie over each other at offset {}", two[1].0))),
        None => Ok(()),
    }
}

async fn give_all(access: &DeviceAccess, pieces: Vec<Piece>, to: &Foreign) -> Result<()> {
    let mut copies: FuturesUnordered<BoxFuture<'_, Result<()>>> = FuturesUnordered::new();
    let mut outcome = Ok(());
    for piece in pieces {
        if copies.len() >= PIECES_MAX
            && let Some(copied) = copies.next().await
        {
            outcome = outcome.and(copied);
        }
        if outcome.is_err() {
            break;
        }
        copies.push(Box::pin(give(access, piece, to.clone())));
    }
    while let Some(copied) = copies.next().await {
        outcome = outcome.and(copied);
    }
    outcome
}

async fn give(access: &DeviceAccess, (handle, range, at): Piece, to: Foreign) -> Result<()> {
    let tier = tier(access)?;
    let share = access.share(&handle)?;
    let source = match &share {
        Some(share) => {
            Source::Device { range: share.range(), offset: range.start, len: range.len() }
        }
        None => Source::Host(access.store().read_at(&handle, range).await?),
    };
    let copied = tier.within("copying to a buffer", tier.give(to, at, source)).await?;
    copied.map_err(DeviceError::public)
}
