//! How copies get to the driver: small ones by a kernel, many by one call, the others one by one.
//!
//! A copy engine takes microseconds for each copy: below some length these are all that counts.
//! Which copy goes which way is decided in one place, a [`Plan`], before the first call: so it is
//! known how many places in the launch queue they take.
//!
//! Invariant: copies that are in flight at once touch no bytes that another one writes, so none has
//! an order; and a copy over memory of a caller is handed in under the lock of its call, so what
//! cancels the call comes after it or keeps it away. Called by the copy streams, and by gathers.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result, sys};

use vmem_core::SwitchPoints;

use crate::batch::Listed;
use crate::call::{Call, Open};
use crate::card::{Card, told};
use crate::copy::{InFlight, Work};
use crate::pieces::{ALIGNED, PIECES_MAX, Piece, Table};

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

impl Move {
    /// From one place on the device to another.
    pub(crate) fn within(to: u64, from: u64, len: usize) -> Self {
        Move { to, from, len, way: Way::Within, direct: true }
    }
}

/// Between which memories it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
    Within,
}

/// A copy of the operation at that place of the flight.
pub(crate) type Placed = (usize, Move);

/// Which copies get to the driver by which calls.
pub(crate) struct Plan {
    /// Small ones: a launch for each table, which it has.
    launches: Vec<(Table, Vec<Placed>)>,
    /// Those of one call.
    listed: Vec<Placed>,
    /// One by one.
    single: Vec<Placed>,
    /// Likewise, and the driver waits for each: the device does not reach their memory.
    detours: Vec<Placed>,
}

impl Plan {
    /// For copies on this stream. What the driver lacks, and tables that are all in use, leave more
    /// to be done one by one.
    pub(crate) fn of(card: &Card, stream: &CudaStream, moves: Vec<Placed>) -> Plan {
        let SwitchPoints { small_max, small_min, batch_min } = card.switch_points();
        let moves = moves.into_iter().filter(|(_, one)| one.len > 0);
        let (direct, detours): (Vec<_>, Vec<_>) = moves.partition(|(_, one)| one.direct);
        let (small, mut rest): (Vec<_>, Vec<_>) =
            direct.into_iter().partition(|(_, one)| is_small(one, small_max));
        let mut launches = Vec::new();
        match card.pieces().filter(|_| small.len() >= small_min) {
            Some(kernel) => {
                let is_of_tier = Arc::ptr_eq(stream.context(), card.context().cuda());
                for placed in small.chunks(PIECES_MAX) {
                    match kernel.table(is_of_tier) {
                        Some(table) => launches.push((table, placed.to_vec())),
                        None => rest.extend(placed),
                    }
                }
            }
            None => rest.extend(small),
        }
        let takes_lists = card.batches().is_some() && takes_batches(stream);
        let (listed, single) = match takes_lists && rest.len() >= batch_min {
            true => (rest, Vec::new()),
            false => (Vec::new(), rest),
        };
        Plan { launches, listed, single, detours }
    }

    /// How many places in the launch queue of the stream it takes at most: the driver is not known
    /// to put the copies of one call into one place.
    pub(crate) fn places(&self) -> usize {
        self.launches.len() + self.listed.len() + self.single.len() + self.detours.len()
    }

    /// Leaves out the copies of what was refused.
    fn forget_refused(&mut self, flight: &InFlight) {
        let launched = self.launches.iter_mut().map(|(_, placed)| placed);
        let others = [&mut self.listed, &mut self.single, &mut self.detours];
        for placed in launched.chain(others) {
            placed.retain(|(place, _)| flight.works[*place].refused.is_none());
        }
        self.launches.retain(|(_, placed)| !placed.is_empty());
    }
}

/// Hands operations to the driver. What it refuses is noted with its operation.
pub(crate) fn issue(card: &Card, stream: &Arc<CudaStream>, flight: &mut InFlight) {
    let mut moves: Vec<Placed> = Vec::with_capacity(flight.works.len());
    for (place, issued) in flight.works.iter_mut().enumerate() {
        match issued.moves(card) {
            Ok(all) => moves.extend(all.into_iter().map(|one| (place, one))),
            Err(error) => issued.refuse(error),
        }
    }
    let plan = Plan::of(card, stream, moves);
    carry_out(plan, card, stream, flight);
}

/// Hands operations to the driver by a plan of their copies. Where it refuses a way, it is asked
/// for these copies one by one.
pub(crate) fn carry_out(
    mut plan: Plan,
    card: &Card,
    stream: &Arc<CudaStream>,
    flight: &mut InFlight,
) {
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
    plan.forget_refused(flight);
    let Plan { launches, listed, mut single, detours } = plan;
    zero(stream, flight);
    for (table, placed) in launches {
        if !launch(card, stream, flight, table, &placed) {
            single.extend(placed);
        }
    }
    if !listed.is_empty() && !in_one_call(card, stream, &listed) {
        single.extend(listed);
    }
    for (place, one) in single {
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

/// Has small ones copied by a kernel, whose table is the flight's then. False if the driver
/// refused that.
fn launch(
    card: &Card,
    stream: &Arc<CudaStream>,
    flight: &mut InFlight,
    table: Table,
    placed: &[Placed],
) -> bool {
    let Some(kernel) = card.pieces() else { return false };
    let piece = |&(_, Move { to, from, len, .. }): &Placed| Piece { to, from, len: len as u64 };
    let pieces: Vec<Piece> = placed.iter().map(piece).collect();
    // SAFETY: all of it is in the flight, or promised to stay while that has a share of its call,
    // and is reached by the device; the flight gives nothing up before its end.
    match unsafe { kernel.launch(&table, &pieces, stream) } {
        Ok(()) if vmem_core::planted!("piece-table") => true,
        Ok(()) => {
            flight.tables.push(table);
            true
        }
        Err(error) => {
            let error = told("launching the kernel for small copies", error);
            tracing::debug!(target: "vmem::gpu", %error, "they are made one by one");
            false
        }
    }
}

/// Has many copied by one call. False if the driver refused that.
fn in_one_call(card: &Card, stream: &Arc<CudaStream>, placed: &[Placed]) -> bool {
    let Some(batches) = card.batches() else { return false };
    let mut listed = Listed::default();
    placed.iter().for_each(|(_, one)| listed.push(one.to, one.from, one.len));
    // SAFETY: as for the kernel; none is empty.
    let copied = unsafe { batches.copy(listed, stream.cu_stream()) };
    if let Err(error) = copied {
        let error = told("copying many at once", error);
        tracing::debug!(target: "vmem::gpu", %error, "they are made one by one");
    }
    copied.is_ok()
}

/// The driver refuses batches on the stream that exists without being created.
fn takes_batches(stream: &CudaStream) -> bool {
    stream.cu_stream().addr() > 1
}

fn is_small(one: &Move, small_max: usize) -> bool {
    one.direct && one.len <= small_max && one.to % ALIGNED == one.from % ALIGNED
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
