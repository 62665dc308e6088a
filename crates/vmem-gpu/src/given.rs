//! Pieces for memory of a caller, and which of them the device reaches by itself.
//!
//! Invariant: pieces that were found to be reached stay so until what holds them is dropped. Called
//! by gathers, and by the lane that copies for them.

use std::sync::Arc;

use bytes::Bytes;
use cudarc::driver::DriverError;
use vmem_core::backend::{DeviceRange, InUse};

use crate::call::Foreign;
use crate::card::Card;
use crate::copy::{check, up};
use crate::issue::{Move, Way};

/// Where bytes for a caller come from.
pub(crate) enum Source {
    Device { range: Arc<DeviceRange>, offset: usize, len: usize },
    Host(Bytes),
}

impl Source {
    pub(crate) fn is_on_device(&self) -> bool {
        matches!(self, Source::Device { .. })
    }
}

/// What goes to an offset of device memory of a caller.
pub(crate) struct Given {
    pub(crate) offset: usize,
    pub(crate) source: Source,
}

impl Given {
    pub(crate) fn len(&self) -> usize {
        match &self.source {
            Source::Device { len, .. } => *len,
            Source::Host(bytes) => bytes.len(),
        }
    }
}

/// Pieces for memory of a caller that the device reaches directly; their memory stays so while this
/// lives.
pub(crate) struct Reached {
    pub(crate) pieces: Vec<Given>,
    pub(crate) moves: Vec<Move>,
    pub(crate) in_use: Option<InUse>,
    /// The others.
    pub(crate) others: Vec<Given>,
}

/// Which pieces the device reaches: one look for all, which waits for nothing.
///
/// # Errors
///
/// An invalid value for one outside of its range.
pub(crate) fn reach(card: &Card, to: &Foreign, all: Vec<Given>) -> Result<Reached, DriverError> {
    let mut moves = Vec::with_capacity(all.len());
    let mut is_reached = vec![false; all.len()];
    let mut in_host: Vec<(usize, &[u8])> = Vec::with_capacity(all.len());
    for (place, piece) in all.iter().enumerate() {
        to.check(piece.offset, piece.len())?;
        match &piece.source {
            Source::Host(bytes) => in_host.push((place, bytes)),
            Source::Device { range, offset, len } => {
                check(*offset, *len, range)?;
                is_reached[place] = true;
                let from = range.address() + *offset as u64;
                let to = to.address + piece.offset as u64;
                moves.push(Move::within(to, from, *len));
            }
        }
    }
    let in_use = card.enter_reached(in_host.iter().map(|(_, bytes)| *bytes), |number, part| {
        let (place, bytes) = in_host[number];
        is_reached[place] = true;
        let at = part.start as u64;
        let from = bytes.as_ptr().expose_provenance() as u64 + at;
        let to = to.address + all[place].offset as u64 + at;
        moves.push(Move { to, from, len: part.len(), way: Way::Up, direct: true });
    });
    drop(in_host);
    let mut is_reached = is_reached.into_iter();
    let (pieces, others) = all.into_iter().partition(|_| is_reached.next() == Some(true));
    Ok(Reached { pieces, moves, in_use, others })
}

/// Copies of pieces into memory of a caller, whichever way the device reaches them.
pub(crate) fn given(
    card: &Card,
    to: &Foreign,
    pieces: &mut Vec<Given>,
    uses: &mut Vec<InUse>,
) -> Result<Vec<Move>, DriverError> {
    let Reached { pieces: reached, mut moves, in_use, others } =
        reach(card, to, std::mem::take(pieces))?;
    uses.extend(in_use);
    for Given { offset, source } in &others {
        if let Source::Host(bytes) = source {
            moves.extend(up(card, to.address + *offset as u64, bytes, uses));
        }
    }
    pieces.extend(reached.into_iter().chain(others));
    Ok(moves)
}
