//! A driver that fails as a plan says.
//!
//! Invariant: what goes wrong follows from the seed, the plan and the order of the calls alone;
//! each fault that was really injected is counted, and none that was not. Ownership is as in any
//! driver: dropping a future changes nothing. Called by tests, around any driver.

mod plan;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem_core::backend::{Clock, IoBuf};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};

use crate::Seed;
use crate::decorate::{OpKind, owned};

pub use plan::{Fault, FaultPlan, When};
pub use rustix::io::Errno;

/// A [`Driver`] that injects the faults of a [`FaultPlan`] into another.
pub struct FaultDriver {
    inner: Arc<dyn Driver>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rng: SmallRng,
    plan: FaultPlan,
    injected: Vec<(Fault, u64)>,
}

impl FaultDriver {
    /// Nothing goes wrong until [`set`](Self::set).
    pub fn new(inner: Arc<dyn Driver>, seed: Seed) -> Arc<Self> {
        let state =
            Mutex::new(State { rng: seed.rng(), plan: FaultPlan::new(), injected: Vec::new() });
        Arc::new(FaultDriver { inner, state })
    }

    /// Follows this plan from now on; its counts start at the next operation.
    pub fn set(&self, plan: FaultPlan) {
        self.state.lock().plan = plan;
    }

    /// Nothing goes wrong from now on.
    pub fn clear(&self) {
        self.set(FaultPlan::new());
    }

    /// How often this fault was injected.
    pub fn injected(&self, fault: Fault) -> u64 {
        let state = self.state.lock();
        let count = state.injected.iter().find(|(known, _)| *known == fault);
        count.map_or(0, |(_, count)| *count)
    }

    /// How many faults were injected.
    pub fn injected_total(&self) -> u64 {
        self.state.lock().injected.iter().map(|(_, count)| count).sum()
    }

    /// Decides about the next operation; `bytes` is what it moves.
    fn draw(&self, kind: OpKind, bytes: usize) -> Option<(Fault, Dice)> {
        let state = &mut *self.state.lock();
        let fault = state.plan.next(kind, &mut state.rng)?;
        // Silent damage needs bytes that it can damage.
        let needs = match fault {
            Fault::Error(_) | Fault::ErrorAfter(_) => 0,
            _ => 1,
        };
        if bytes < needs {
            return None;
        }
        match state.injected.iter_mut().find(|(known, _)| *known == fault) {
            Some((_, count)) => *count += 1,
            None => state.injected.push((fault, 1)),
        }
        Some((fault, Dice(state.rng.random())))
    }

    fn faulty_read(
        &self,
        (fault, dice): (Fault, Dice),
        mut buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> Read {
        match fault {
            Fault::Error(errno) => Box::pin(ready((buf, keep, Err(errno.into())))),
            Fault::Garbage(errno) => {
                garble(&mut buf, &pieces, dice);
                Box::pin(ready((buf, keep, Err(errno.into()))))
            }
            Fault::ErrorAfter(errno) => {
                let reading = self.inner.read(buf, pieces, keep);
                Box::pin(async move {
                    let (buf, keep, result) = reading.await;
                    (buf, keep, result.and(Err(errno.into())))
                })
            }
            Fault::BitFlip => {
                let reading = self.inner.read(buf, pieces.clone(), keep);
                Box::pin(async move {
                    let (mut buf, keep, result) = reading.await;
                    flip_bit(&mut buf, &pieces, dice);
                    (buf, keep, result)
                })
            }
            Fault::ShortRead => {
                let left = self.cut(read_len(&pieces), dice);
                self.inner.read(buf, shortened(pieces, left), keep)
            }
            Fault::MisdirectedRead => self.misdirected_read(buf, pieces, keep, dice),
            Fault::LostWrite | Fault::MisdirectedWrite | Fault::TornWrite(_) => {
                unreachable!("a plan has no rule for {fault:?} of a read")
            }
        }
    }

    /// What lies beyond the end of the file comes as zeros: the fault is silent.
    fn misdirected_read(
        &self,
        buf: IoBuf,
        mut pieces: Vec<ReadPiece>,
        keep: Keep,
        dice: Dice,
    ) -> Read {
        for piece in &mut pieces {
            piece.offset = self.elsewhere(piece.offset, dice);
        }
        let reading = self.inner.read(buf, pieces.clone(), keep);
        Box::pin(async move {
            let (mut buf, keep, result) = reading.await;
            match result {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    pieces.iter().for_each(|piece| buf[piece.range.clone()].fill(0));
                    (buf, keep, Ok(()))
                }
                result => (buf, keep, result),
            }
        })
    }

    fn faulty_write(
        &self,
        (fault, dice): (Fault, Dice),
        mut runs: Vec<WriteRun>,
        keep: Keep,
    ) -> Unit {
        match fault {
            Fault::Error(errno) => Box::pin(ready((keep, Err(errno.into())))),
            Fault::LostWrite => Box::pin(ready((keep, Ok(())))),
            Fault::ErrorAfter(errno) => then_error(self.inner.write(runs, keep), errno),
            Fault::TornWrite(errno) => {
                let owns: Vec<Bytes> = runs.iter().flat_map(|run| run.parts.clone()).collect();
                let left = self.cut(write_len(&runs), dice);
                let writing = self.inner.write(torn(runs, left), keep);
                owned(async move {
                    let (keep, result) = writing.await;
                    drop(owns);
                    (keep, result.and(Err(errno.into())))
                })
            }
            Fault::MisdirectedWrite => {
                for run in &mut runs {
                    run.offset = self.elsewhere(run.offset, dice);
                }
                self.inner.write(runs, keep)
            }
            Fault::Garbage(_) | Fault::BitFlip | Fault::ShortRead | Fault::MisdirectedRead => {
                unreachable!("a plan has no rule for {fault:?} of a write")
            }
        }
    }

    fn unit(
        &self,
        kind: OpKind,
        start: impl FnOnce(&dyn Driver) -> BoxFuture<'static, io::Result<()>>,
    ) -> BoxFuture<'static, io::Result<()>> {
        match self.draw(kind, 0) {
            Some((Fault::Error(errno), _)) => Box::pin(ready(Err(errno.into()))),
            Some((Fault::ErrorAfter(errno), _)) => {
                let operation = start(&*self.inner);
                Box::pin(async move { operation.await.and(Err(errno.into())) })
            }
            _ => start(&*self.inner),
        }
    }

    /// Where a transfer of `len` bytes breaks off: before its end, between two blocks.
    fn cut(&self, len: usize, dice: Dice) -> usize {
        let block = self.inner.block_bytes().max(1) as usize;
        dice.below(len) / block * block
    }

    /// Another offset, some blocks before where there is space, else behind.
    fn elsewhere(&self, offset: u64, dice: Dice) -> u64 {
        let shift = u64::from(self.inner.block_bytes()) * (1 + dice.0 % 8);
        offset.checked_sub(shift).unwrap_or(offset.saturating_add(shift))
    }
}

type Read = BoxFuture<'static, (IoBuf, Keep, io::Result<()>)>;
type Unit = BoxFuture<'static, (Keep, io::Result<()>)>;

fn then_error(operation: Unit, errno: Errno) -> Unit {
    Box::pin(async move {
        let (keep, result) = operation.await;
        (keep, result.and(Err(errno.into())))
    })
}

/// A random number that decides where a fault strikes.
#[derive(Clone, Copy, Debug)]
struct Dice(u64);

impl Dice {
    fn below(self, bound: usize) -> usize {
        (self.0 % (bound.max(1) as u64)) as usize
    }
}

fn read_len(pieces: &[ReadPiece]) -> usize {
    pieces.iter().map(|piece| piece.range.len()).sum()
}

fn write_len(runs: &[WriteRun]) -> usize {
    runs.iter().flat_map(|run| &run.parts).map(Bytes::len).sum()
}

fn garble(buf: &mut IoBuf, pieces: &[ReadPiece], dice: Dice) {
    let garbage = crate::model::Pattern::new(dice.0, 0);
    for piece in pieces {
        if let Some(bytes) = buf.get_mut(piece.range.clone()) {
            garbage.fill(piece.offset, bytes);
        }
    }
}

fn flip_bit(buf: &mut IoBuf, pieces: &[ReadPiece], dice: Dice) {
    let mut byte = dice.below(read_len(pieces));
    for piece in pieces {
        if byte < piece.range.len() {
            if let Some(byte) = buf.get_mut(piece.range.start + byte) {
                *byte ^= 1 << (dice.0 >> 61);
            }
            return;
        }
        byte -= piece.range.len();
    }
}

/// The first `left` bytes of what was asked for.
fn shortened(mut pieces: Vec<ReadPiece>, mut left: usize) -> Vec<ReadPiece> {
    for piece in &mut pieces {
        let take = piece.range.len().min(left);
        piece.range.end = piece.range.start + take;
        left -= take;
    }
    pieces
}

/// The first `left` bytes of what was to be written.
fn torn(mut runs: Vec<WriteRun>, mut left: usize) -> Vec<WriteRun> {
    for part in runs.iter_mut().flat_map(|run| &mut run.parts) {
        let take = part.len().min(left);
        part.truncate(take);
        left -= take;
    }
    runs.retain(|run| run.parts.iter().any(|part| !part.is_empty()));
    runs
}

impl Driver for FaultDriver {
    fn read(&self, buf: IoBuf, pieces: Vec<ReadPiece>, keep: Keep) -> Read {
        match self.draw(OpKind::Read, read_len(&pieces)) {
            Some(fault) => self.faulty_read(fault, buf, pieces, keep),
            None => self.inner.read(buf, pieces, keep),
        }
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> Unit {
        match self.draw(OpKind::Write, write_len(&runs)) {
            Some(fault) => self.faulty_write(fault, runs, keep),
            None => self.inner.write(runs, keep),
        }
    }

    fn punch(&self, ranges: Vec<Range<u64>>, keep: Keep) -> Unit {
        match self.draw(OpKind::Punch, 0) {
            Some((Fault::Error(errno), _)) => Box::pin(ready((keep, Err(errno.into())))),
            Some((Fault::ErrorAfter(errno), _)) => {
                then_error(self.inner.punch(ranges, keep), errno)
            }
            _ => self.inner.punch(ranges, keep),
        }
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        self.unit(OpKind::Sync, |inner| inner.sync())
    }

    fn clock(&self) -> Clock {
        self.inner.clock()
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        self.unit(OpKind::Close, |inner| inner.close())
    }

    fn buffers_writes(&self) -> bool {
        self.inner.buffers_writes()
    }

    fn block_bytes(&self) -> u32 {
        self.inner.block_bytes()
    }

    fn describe(&self) -> Arc<str> {
        format!("faults over {}", self.inner.describe()).into()
    }
}

impl fmt::Debug for FaultDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultDriver")
            .field("inner", &self.inner)
            .field("state", &self.state)
            .finish()
    }
}
