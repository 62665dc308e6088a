//! How copies get to the driver: small ones by a kernel, many by one call, the others one by one.
//!
//! A copy engine takes microseconds for each copy: below some length these are all that counts.
//!
//! Invariant: copies that are in flight at once touch no bytes that another one writes, so none has
//! an order; and a copy over memory of a caller is handed in under the lock of its call, so what
//! cancels the call comes after it or keeps it away. Called by the copy streams, and by gathers.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result, sys};

use crate::batch::Listed;
use crate::call::{Call, Open};
use crate::card::{Card, told};
use crate::copy::{InFlight, Work};
use crate::pieces::{ALIGNED, PIECES_MAX, Piece};

/// Copies that are longer go to a copy engine, in bytes.
const SMALL_MAX: usize = 32 << 10;
/// Fewer small copies are quicker one by one.
const SMALL_MIN: usize = 4;
/// The same of copies in one call.
const BATCH_MIN: usize = 2;

/// A copy, as the driver takes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) len: usize,
    pub(crate) way: Way,
    /// Whether the device reaches both sides itself.
    pub(crate) direct: bool,
}

/// Between which memories it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
    Within,
}

/// A copy of the operation at that place of the flight.
type Placed = (usize, Move);

/// Hands operations to the driver. What it refuses is noted with its operation.
pub(crate) fn issue(card: &Card, stream: &Arc<CudaStream>, flight: &mut InFlight) {
    let mut moves: Vec<Placed> = Vec::with_capacity(flight.works.len());
    for (place, issued) in flight.works.iter_mut().enumerate() {
        match issued.moves(card) {
            Ok(all) => moves.extend(all.into_iter().map(|one| (place, one))),
            Err(error) => issued.refuse(error),
        }
    }
    let mut calls: Vec<Arc<Call>> = Vec::new();
    for call in flight.works.iter().filter_map(|issued| issued.call()) {
        // Mostly there is one.
        if !calls.iter().any(|known| Arc::ptr_eq(known, call)) {
            calls.push(call.clone());
        }
    }
    let mut open: Vec<Open<'_>> = calls.iter().map(Open::of).collect();
    for issued in flight.works.iter_mut().filter(|issued| issued.refused.is_none()) {
        let Some(call) = issued.call() else { continue };
        let mut its = open.iter_mut().filter(|open| open.is_of(call));
        match its.next().map(Open::begin) {
            Some(Ok(entered)) => issued.entered = Some(entered),
            Some(Err(error)) => issued.refuse(error),
            None => {}
        }
    }
    moves.retain(|(place, one)| one.len > 0 && flight.works[*place].refused.is_none());
    zero(stream, flight);
    let rest = by_kernel(card, stream, flight, moves);
    let rest = in_one_call(card, stream, rest);
    let (direct, detours): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, one)| one.direct);
    for (place, one) in direct {
        if let Err(error) = copy(stream, one) {
            flight.works[place].refuse(error);
        }
    }
    drop(open);
    for (place, one) in detours {
        // The driver waits for it: so the call can be cancelled between two.
        let open = flight.works[place].call().map(Open::of);
        let may_begin = open.as_ref().map_or(Ok(()), Open::check);
        if let Err(error) = may_begin.and_then(|()| copy(stream, one)) {
            drop(open);
            flight.works[place].refuse(error);
        }
    }
}

fn zero(stream: &Arc<CudaStream>, flight: &mut InFlight) {
    for issued in &mut flight.works {
        let Work::Zero { range, .. } = &issued.work else { continue };
        // SAFETY: the range is the operation's until it has ended: it is in the flight, which gives
        // nothing up before.
        let zeroed =
            unsafe { result::memset_d8_async(range.address(), 0, range.len(), stream.cu_stream()) };
        if let Err(error) = zeroed {
            issued.refuse(error);
        }
    }
}

/// Has the small ones copied by a kernel, if there are enough. Returns the others.
fn by_kernel(
    card: &Card,
    stream: &Arc<CudaStream>,
    flight: &mut InFlight,
    moves: Vec<Placed>,
) -> Vec<Placed> {
    let Some(kernel) = card.pieces() else { return moves };
    let (small, mut rest): (Vec<_>, Vec<_>) = moves.into_iter().partition(|(_, one)| is_small(one));
    if small.len() < SMALL_MIN {
        rest.extend(small);
        return rest;
    }
    for placed in small.chunks(PIECES_MAX) {
        let piece = |&(_, Move { to, from, len, .. }): &Placed| Piece { to, from, len: len as u64 };
        let pieces: Vec<Piece> = placed.iter().map(piece).collect();
        let is_of_tier = Arc::ptr_eq(stream.context(), card.context());
        // SAFETY: all of it is in the flight, or promised to stay while that has a share of its
        // call, and is reached by the device; the flight gives nothing up before its end.
        match unsafe { kernel.copy(&pieces, stream, is_of_tier) } {
            Ok(_too_early) if vmem_core::planted!("piece-table") => {}
            Ok(table) => flight.tables.push(table),
            Err(error) => {
                let error = told("launching the kernel for small copies", error);
                tracing::debug!(target: "vmem::gpu", %error, "they are made one by one");
                rest.extend(placed);
            }
        }
    }
    rest
}

/// Has many copied by one call. Returns the others.
fn in_one_call(card: &Card, stream: &Arc<CudaStream>, moves: Vec<Placed>) -> Vec<Placed> {
    let Some(batches) = card.batches().filter(|_| takes_batches(stream)) else { return moves };
    let (direct, mut rest): (Vec<_>, Vec<_>) = moves.into_iter().partition(|(_, one)| one.direct);
    if direct.len() < BATCH_MIN {
        rest.extend(direct);
        return rest;
    }
    let mut listed = Listed::default();
    direct.iter().for_each(|(_, one)| listed.push(one.to, one.from, one.len));
    // SAFETY: as for the kernel; none is empty.
    if let Err(error) = unsafe { batches.copy(listed, stream.cu_stream()) } {
        let error = told("copying many at once", error);
        tracing::debug!(target: "vmem::gpu", %error, "they are made one by one");
        rest.extend(direct);
    }
    rest
}

/// The driver refuses batches on the stream that exists without being created.
fn takes_batches(stream: &CudaStream) -> bool {
    stream.cu_stream().addr() > 1
}

fn is_small(one: &Move) -> bool {
    one.direct && one.len <= SMALL_MAX && one.to % ALIGNED == one.from % ALIGNED
}

/// How many calls of the driver these copies take, about.
pub(crate) fn calls_of(card: &Card, stream: &CudaStream, moves: &[Move]) -> usize {
    let small = moves.iter().filter(|one| is_small(one)).count();
    let by_kernel = if card.pieces().is_some() && small >= SMALL_MIN { small } else { 0 };
    let rest = moves.len() - by_kernel;
    let one_call = card.batches().is_some() && takes_batches(stream);
    by_kernel.div_ceil(PIECES_MAX) + if one_call { rest.min(1) } else { rest }
}

fn copy(stream: &Arc<CudaStream>, one: Move) -> Result<(), DriverError> {
    let Move { to, from, len, way, .. } = one;
    let stream = stream.cu_stream();
    // What is read and written is the operation's until it has ended, or is promised to stay while
    // it has a share of its call: all is in the flight, which gives nothing up before. The
    // provenance of memory of the host was exposed.
    match way {
        Way::Up => {
            let from = std::ptr::with_exposed_provenance(from as usize);
            // SAFETY: as said above.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, len, stream) }.result()
        }
        Way::Down => {
            let to = std::ptr::with_exposed_provenance_mut(to as usize);
            // SAFETY: as said above.
            unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, len, stream) }.result()
        }
        // SAFETY: as said above.
        Way::Within => unsafe { result::memcpy_dtod_async(to, from, len, stream) },
    }
}
