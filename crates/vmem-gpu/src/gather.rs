//! Many pieces of objects, from any tier, into one device buffer of the caller.
//!
//! Pieces that the device reaches are copied on the buffer's own stream, at once; the others on a
//! stream of the tier, once they were read and the buffer's stream has come this far.
//!
//! Invariant: no two pieces of a call lie over each other in the buffer, so their order does not
//! matter; and what a call reads, holds and copies belongs to a task of the runtime, or to the
//! thread that waits for the device. Called by users.

use std::collections::HashSet;
use std::ops::Range;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use vmem_core::backend::{DeviceAccess, GatherCount};
use vmem_core::{ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::call::Foreign;
use crate::ext::{device_of, tier};
use crate::given::{Given, Source};
use crate::target::{DeviceTarget, caught_up, check_range, invalid};
use crate::watch::Answer;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Pieces of one call that are read from below host memory at once.
const READS_MAX: usize = 32;
/// What the driver gets of a call at a time: pieces, and bytes.
const GROUP_PIECES: usize = 256;
const GROUP_BYTES: usize = 8 << 20;
/// Groups of one call that are under way at once.
const GROUPS_MAX: usize = 8;

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
    let access = device_of(vmem, target.stream())?;
    if access.has_plans() {
        // Once for each object, in the order of their first pieces.
        let mut told = HashSet::new();
        let first = pieces.iter().filter(|(handle, ..)| told.insert(handle.id()));
        first.for_each(|(handle, ..)| access.tell_plans(handle));
    }
    let mut count = access.count_gather();
    let (answers, rest) = give_in_order(&access, target, pieces, count.as_mut()).await?;
    if !rest.is_empty() {
        give_apart(&access, target, rest).await?;
    }
    let copied = futures::future::try_join_all(answers);
    let copied = tier(&access)?.within("copying to a buffer", copied).await?;
    let mut copied = copied.map_err(|_| VirtualMemoryError::Closed)?.into_iter();
    copied.try_for_each(|copied| copied.map_err(|error| access.fault(error)))?;
    if let Some(count) = count {
        count.end();
    }
    Ok(())
}

/// Has the pieces that the device reaches copied on the buffer's own stream, so that nothing waits
/// for what that does now. Returns their answers, and the other pieces. Counts the pieces that the
/// device does not have. Between polls it holds nothing.
async fn give_in_order(
    access: &DeviceAccess,
    target: &DeviceTarget<'_>,
    pieces: &[Gathered<'_>],
    mut count: Option<&mut GatherCount<'_>>,
) -> Result<(Vec<Answer>, Vec<Piece>)> {
    let tier = tier(access)?;
    let mut answers = Vec::new();
    let mut rest = Vec::new();
    for (number, group) in pieces.chunks(GROUP_PIECES).enumerate() {
        if number > 0 {
            // Others get a turn.
            tokio::task::yield_now().await;
        }
        let mut there = Vec::with_capacity(group.len());
        for piece in group.iter().filter(|(_, range, _)| !range.is_empty()) {
            let given = at_hand(access, piece.0, &piece.1, piece.2)?;
            let is_there = given.as_ref().is_some_and(|given| given.source.is_on_device());
            if let (Some(count), false) = (&mut count, is_there) {
                count.add(piece.0, piece.1.len());
            }
            match given {
                Some(given) => there.push(given),
                None => rest.push(owned(piece)),
            }
        }
        let given = target.give_in_order(tier, &tier.card()?, there);
        let (answer, others) = given.map_err(|error| access.fault(error))?;
        answers.extend(answer);
        for given in others {
            // No two pieces have the same place.
            let is_its = |piece: &&Gathered<'_>| piece.2 == given.offset && !piece.1.is_empty();
            rest.extend(group.iter().find(is_its).map(owned));
        }
    }
    Ok((answers, rest))
}

fn owned((handle, range, offset): &Gathered<'_>) -> Piece {
    ((*handle).clone(), range.clone(), *offset)
}

/// Has pieces read, and copied on a stream of the tier once the buffer's has come this far.
async fn give_apart(
    access: &DeviceAccess,
    target: &DeviceTarget<'_>,
    pieces: Vec<Piece>,
) -> Result<()> {
    let stream = target.stream();
    let work = |access: DeviceAccess, to: Foreign| {
        let stream = stream.clone();
        async move {
            if !vmem_core::planted!("gather-order") {
                caught_up(&access, &stream).await?;
            }
            // The task keeps no stream of the user's alive.
            drop(stream);
            give_all(&access, pieces, &to).await
        }
    };
    target.run(access, work).await
}

/// Pieces that lie over each other have no order.
fn check_disjoint(pieces: &[Gathered<'_>]) -> Result<()> {
    if pieces.is_sorted_by(|first, then| first.2 + first.1.len() <= then.2) {
        return Ok(());
    }
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
    let mut giving = Giving { access, to, group: Vec::new(), bytes: 0, copies: Copies::new() };
    let mut reads: FuturesUnordered<BoxFuture<'_, Result<Given>>> = FuturesUnordered::new();
    let mut outcome = Ok(());
    for piece in pieces {
        let there = match at_hand(access, &piece.0, &piece.1, piece.2) {
            Ok(Some(given)) => giving.add(given).await,
            Ok(None) => {
                reads.push(Box::pin(read(access, piece)));
                match reads.len() < READS_MAX {
                    true => Ok(()),
                    false => giving.next(&mut reads).await,
                }
            }
            Err(error) => Err(error),
        };
        outcome = outcome.and(there);
        if outcome.is_err() {
            break;
        }
    }
    while outcome.is_ok() && !reads.is_empty() {
        outcome = giving.next(&mut reads).await;
    }
    // What is not begun is not begun any more; the copies end first, whatever came of the reads.
    drop(reads);
    let copied = giving.end(outcome.is_ok()).await;
    outcome.and(copied)
}

/// Copies that are under way.
type Copies<'a> = FuturesUnordered<BoxFuture<'a, Result<()>>>;

/// The pieces of a call on their way to the buffer, in groups.
struct Giving<'a> {
    access: &'a DeviceAccess,
    to: &'a Foreign,
    group: Vec<Given>,
    bytes: usize,
    copies: Copies<'a>,
}

impl<'a> Giving<'a> {
    async fn add(&mut self, given: Given) -> Result<()> {
        self.bytes += given.len();
        self.group.push(given);
        if self.group.len() >= GROUP_PIECES || self.bytes >= GROUP_BYTES {
            self.send()?;
        }
        while self.copies.len() >= GROUPS_MAX {
            self.copies.next().await.transpose()?;
        }
        Ok(())
    }

    /// The next of the reads. While it is waited for, what there is goes on.
    async fn next<R>(&mut self, reads: &mut FuturesUnordered<R>) -> Result<()>
    where
        R: Future<Output = Result<Given>>,
    {
        let read = match futures::poll!(reads.next()) {
            std::task::Poll::Ready(read) => read,
            std::task::Poll::Pending => {
                self.send()?;
                reads.next().await
            }
        };
        match read {
            Some(read) => self.add(read?).await,
            None => Ok(()),
        }
    }

    /// Hands the group to the driver.
    fn send(&mut self) -> Result<()> {
        if self.group.is_empty() {
            return Ok(());
        }
        self.bytes = 0;
        let tier = tier(self.access)?;
        let copied = tier.give(self.to.clone(), std::mem::take(&mut self.group));
        let access = self.access;
        self.copies.push(Box::pin(async move {
            let copied = tier.within("copying to a buffer", copied).await?;
            copied.map_err(|error| access.fault(error))
        }));
        Ok(())
    }

    /// Waits for what is under way; before that sends what is left, if that is wanted.
    async fn end(&mut self, is_wanted: bool) -> Result<()> {
        let mut outcome = if is_wanted { self.send() } else { Ok(()) };
        while let Some(copied) = self.copies.next().await {
            outcome = outcome.and(copied);
        }
        outcome
    }
}

/// A piece that the device or host memory has.
fn at_hand(
    access: &DeviceAccess,
    handle: &VMemHandle,
    range: &Range<usize>,
    offset: usize,
) -> Result<Option<Given>> {
    if let Some(share) = access.share(handle)? {
        let source = Source::Device { range: share.range(), offset: range.start, len: range.len() };
        return Ok(Some(Given { offset, source }));
    }
    let there = access.store().try_read(handle);
    Ok(there.map(|bytes| Given { offset, source: Source::Host(bytes.slice(range.clone())) }))
}

async fn read(access: &DeviceAccess, (handle, range, offset): Piece) -> Result<Given> {
    // A copy elsewhere in host memory would be none that the device reaches.
    let options = ReadOptions::new().range(range).copy_small(0);
    let bytes = access.store().read_with(&handle, options).await?;
    Ok(Given { offset, source: Source::Host(bytes) })
}
