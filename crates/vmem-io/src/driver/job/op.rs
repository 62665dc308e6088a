//! One operation of a job: where it has got to, and what an answer of the kernel means for it.
//!
//! Invariant: what is left of an operation begins at a block, and each failure without progress is
//! counted, so that none is tried for ever. Called by `Job`.

use std::io;
use std::ops::Range;

use bytes::Bytes;
use rustix::io::Errno;

use super::{Bounce, BounceBudget, Cargo, Kind, Region, Step, Submission};

/// Interruptions in a row, without a byte of progress, that are still taken for bad luck.
pub(super) const INTERRUPTS_MAX: u32 = 10_000;
/// The same for a kernel that is out of something; the engine waits between these.
pub(super) const SHORTAGES_MAX: u32 = 2_000;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) memory: Memory,
    /// How much of `len` is asked for: a read for alignment's sake may run into the end of the
    /// file.
    pub(super) need: u64,
    pub(super) done: u64,
    /// Of a write that needs no bounce buffer: the run, and the part of it in which the memory
    /// begins or a later one.
    pub(super) run: usize,
    pub(super) part: usize,
    /// Failures without progress.
    pub(super) interrupts: u32,
    pub(super) shortages: u32,
}

/// Where the bytes of an operation are.
#[derive(Debug)]
pub(super) enum Memory {
    None,
    Direct(Region),
    /// Written from the front of a bounce buffer.
    Gather {
        parts: Vec<Bytes>,
        bounce: Option<Bounce>,
    },
    /// Read to the front of a bounce buffer; `from..` of it belongs to `to` of the job's buffer.
    Scatter {
        from: usize,
        to: Range<usize>,
        bounce: Option<Bounce>,
    },
}

impl Op {
    pub(super) fn new(kind: Kind, offset: u64, len: u64) -> Self {
        Op {
            kind,
            offset,
            len,
            memory: Memory::None,
            need: len,
            done: 0,
            run: 0,
            part: 0,
            interrupts: 0,
            shortages: 0,
        }
    }

    pub(super) fn direct(kind: Kind, offset: u64, region: Region) -> Self {
        Op { memory: Memory::Direct(region), ..Op::new(kind, offset, region.len() as u64) }
    }

    pub(super) fn bounce_len(&self) -> Option<usize> {
        match self.memory {
            Memory::Gather { .. } | Memory::Scatter { .. } => Some(self.len as usize),
            Memory::None | Memory::Direct(_) => None,
        }
    }

    pub(super) fn equip(&mut self, budget: &BounceBudget) {
        let len = self.len as usize;
        match &mut self.memory {
            Memory::None | Memory::Direct(_) => {}
            Memory::Scatter { bounce, .. } => *bounce = Some(budget.take(len)),
            Memory::Gather { parts, bounce } => {
                let mut taken = budget.take(len);
                let mut rest = taken.bytes_mut();
                for part in parts.drain(..) {
                    let (front, back) = rest.split_at_mut(part.len());
                    front.copy_from_slice(&part);
                    rest = back;
                }
                *bounce = Some(taken);
            }
        }
    }

    pub(super) fn submission(&self) -> Submission {
        let whole = match &self.memory {
            Memory::None => None,
            Memory::Direct(region) => Some(*region),
            Memory::Gather { bounce, .. } | Memory::Scatter { bounce, .. } => {
                let bytes = bounce.as_ref().map_or(&[][..], Bounce::bytes);
                Some(Region::of(bytes).part(0..self.len as usize))
            }
        };
        Submission {
            kind: self.kind,
            offset: self.offset + self.done,
            len: self.len - self.done,
            memory: whole.map(|region| region.part(self.done as usize..self.len as usize)),
        }
    }

    pub(super) fn advance(&mut self, result: i32, align: u64) -> io::Result<Step> {
        let Ok(moved) = u64::try_from(result) else {
            return self
                .retry(io::Error::from_raw_os_error(-result), Errno::from_raw_os_error(-result));
        };
        if matches!(self.kind, Kind::Punch | Kind::Sync) {
            return Ok(Step::Ended);
        }
        let total = (self.done + moved).min(self.len);
        // What is left must start at a block again; the part of a block is moved once more.
        let whole = total - total % align;
        if total < self.need && whole > self.done {
            self.done = whole;
            (self.interrupts, self.shortages) = (0, 0);
            return Ok(Step::Again);
        }
        self.done = total;
        match self.kind {
            _ if total >= self.need => Ok(Step::Ended),
            Kind::Write => Err(io::ErrorKind::WriteZero.into()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn retry(&mut self, error: io::Error, errno: Errno) -> io::Result<Step> {
        match errno {
            // The thread that submitted it has ended: the kernel cancels what it had not begun.
            Errno::INTR | Errno::CANCELED if self.interrupts < INTERRUPTS_MAX => {
                self.interrupts += 1;
                Ok(Step::Again)
            }
            Errno::AGAIN | Errno::NOMEM | Errno::BUSY | Errno::NOBUFS
                if self.shortages < SHORTAGES_MAX =>
            {
                self.shortages += 1;
                Ok(Step::Later)
            }
            _ => Err(error),
        }
    }

    /// Gives the bounce buffer back; what was read to it goes to its place in the job's buffer.
    pub(super) fn unload(&mut self, cargo: &mut Cargo) {
        match &mut self.memory {
            Memory::None | Memory::Direct(_) => {}
            Memory::Gather { bounce, .. } => *bounce = None,
            Memory::Scatter { from, to, bounce } => {
                let Some(bounce) = bounce.take() else { return };
                let arrived = (self.done.min(self.need) as usize).saturating_sub(*from);
                let to = to.start..to.start + arrived.min(to.len());
                if let Cargo::Read(buf) = cargo
                    && let Some(target) = buf.get_mut(to)
                {
                    target.copy_from_slice(&bounce.bytes()[*from..*from + target.len()]);
                }
            }
        }
    }
}
