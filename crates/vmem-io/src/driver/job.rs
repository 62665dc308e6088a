//! A call of the driver in flight: what it owns, and the kernel operations that it needs.
//!
//! Ownership, the rule that every engine stands on: a job owns its buffers, its `Keep` and its
//! bounce buffers from the call until its last operation has completed. An engine marks an
//! operation as running with [`Job::start_op`] before the kernel can know of it, and hands the
//! result of each to [`Job::complete`]. A job that is dropped while an operation runs, which only
//! a panic can bring about, leaks what it owns: leaked memory is safe, freed memory is not.
//! Called by `queued`, which plans and settles jobs, and by the engines, which run them.
//!
//! With direct I/O, offsets, lengths and memory must be aligned. What is, goes as it is; the rest
//! goes through bounce buffers. A job whose bounce buffers exceed its part of the budget runs in
//! several waves.

mod op;
mod plan;

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::channel::oneshot;
use tokio::sync::OwnedSemaphorePermit;
use vmem_core::backend::IoBuf;

use self::op::{Memory, Op};
use self::plan::{plan_read, plan_write, slices_of};
use super::direct::Alignment;
use super::memory::{
    BOUNCE_JOB_BYTES, BOUNCE_MAX, Bounce, BounceBudget, BounceShare, Region, bounce_footprint,
};
use super::{Keep, ReadPiece, WriteRun};

/// Operations of one job that run at once.
pub(super) const WINDOW: usize = 8;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Memory is not used; the length is that of the hole.
    Punch,
    /// Neither memory nor offset is used.
    Sync,
}

/// What an engine hands to the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Submission {
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Of `len` bytes, but for punches and syncs.
    pub(super) memory: Option<Region>,
}

/// What an engine does after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The operation has ended.
    Ended,
    /// Submit what is left of it.
    Again,
    /// The same, after a short while.
    Later,
}

/// What the caller gets back, and what must not be freed before that.
#[derive(Debug)]
enum Cargo {
    Read(IoBuf),
    Write { runs: Vec<WriteRun> },
    Punch { refused: Arc<AtomicBool> },
    Sync,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Job {
    cargo: Cargo,
    keep: Keep,
    /// In the order in which they start; what has ended stays, until the job is settled.
    ops: Vec<Op>,
    /// The ops of this wave end here.
    wave_end: usize,
    next: usize,
    running: usize,
    error: Option<io::Error>,
    align: Alignment,
    bounce_share: Option<BounceShare>,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    reply: Option<oneshot::Sender<Box<Job>>>,
}

impl Job {
    fn new(cargo: Cargo, keep: Keep, align: Alignment, planned: io::Result<Vec<Op>>) -> Box<Self> {
        let (ops, error) = match planned {
            Ok(ops) => (ops, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        Box::new(Job {
            cargo,
            keep,
            ops,
            wave_end: 0,
            next: 0,
            running: 0,
            error,
            align,
            bounce_share: None,
            permit: None,
            reply: None,
        })
    }

    /// Reads `pieces` of the file into `buf`.
    pub(super) fn read(
        mut buf: IoBuf,
        pieces: &[ReadPiece],
        keep: Keep,
        align: Alignment,
    ) -> Box<Self> {
        let mut ops = Vec::with_capacity(pieces.len());
        let planned =
            pieces.iter().try_for_each(|piece| plan_read(&mut ops, &mut buf, piece, align));
        Job::new(Cargo::Read(buf), keep, align, planned.map(|()| ops))
    }

    /// Writes `runs` to the file.
    pub(super) fn write(runs: Vec<WriteRun>, keep: Keep, align: Alignment) -> Box<Self> {
        let mut ops = Vec::with_capacity(runs.len());
        let mut numbered = runs.iter().enumerate();
        let planned =
            numbered.try_for_each(|(number, run)| plan_write(&mut ops, number, run, align));
        Job::new(Cargo::Write { runs }, keep, align, planned.map(|()| ops))
    }

    /// Punches holes, unless the file system has refused that before.
    pub(super) fn punch(ranges: &[Range<u64>], keep: Keep, refused: Arc<AtomicBool>) -> Box<Self> {
        let ops = match refused.load(Ordering::Relaxed) {
            true => Vec::new(),
            false => {
                let wanted = ranges.iter().filter(|range| !range.is_empty());
                let hole = |r: &Range<u64>| Op::new(Kind::Punch, r.start, r.end - r.start);
                wanted.map(hole).collect()
            }
        };
        Job::new(Cargo::Punch { refused }, keep, Alignment::NONE, Ok(ops))
    }

    pub(super) fn sync() -> Box<Self> {
        let ops = vec![Op::new(Kind::Sync, 0, 0)];
        Job::new(Cargo::Sync, Keep::none(), Alignment::NONE, Ok(ops))
    }

    /// Sets the next wave out: what its bounce buffers take, in bytes.
    pub(super) fn plan_wave(&mut self) -> usize {
        let mut bytes = 0;
        self.wave_end = self.next;
        for op in &self.ops[self.next..] {
            let more = op.bounce_len().map_or(0, bounce_footprint);
            if bytes > 0 && bytes + more > BOUNCE_JOB_BYTES {
                break;
            }
            bytes += more;
            self.wave_end += 1;
        }
        bytes
    }

    /// Gives the wave its bounce buffers, filled with what is to be written.
    pub(super) fn equip(&mut self, budget: &BounceBudget, share: Option<BounceShare>) {
        for op in &mut self.ops[self.next..self.wave_end] {
            op.equip(budget);
        }
        self.bounce_share = share;
    }

    /// Where the job goes when its wave is over.
    pub(super) fn reply_to(&mut self) -> oneshot::Receiver<Box<Job>> {
        let (sender, receiver) = oneshot::channel();
        self.reply = Some(sender);
        receiver
    }

    /// Whether an operation may run beside those that do.
    pub(super) fn can_start(&self) -> bool {
        self.next < self.wave_end && self.running < WINDOW && self.error.is_none()
    }

    /// The next operation that may run, which counts as running from now on.
    pub(super) fn start_op(&mut self) -> Option<usize> {
        self.can_start().then(|| {
            self.running += 1;
            self.next += 1;
            self.next - 1
        })
    }

    /// Whether any of its operations runs.
    pub(super) fn is_running(&self) -> bool {
        self.running > 0
    }

    /// Whether nothing of its wave runs or may be started.
    pub(super) fn wave_is_over(&self) -> bool {
        self.running == 0 && (self.next == self.wave_end || self.error.is_some())
    }

    /// Whether it has ended, good or bad.
    pub(super) fn is_settled(&self) -> bool {
        self.running == 0 && (self.next == self.ops.len() || self.error.is_some())
    }

    /// What is left of an operation.
    pub(super) fn submission(&self, op: usize) -> Submission {
        self.ops[op].submission()
    }

    /// What is left of a read, as memory: for engines whose calls return when they are done.
    pub(super) fn target(&mut self, op: usize) -> &mut [u8] {
        let op = &mut self.ops[op];
        let left = op.done as usize..op.len as usize;
        match (&mut op.memory, &mut self.cargo) {
            (Memory::Scatter { bounce: Some(bounce), .. }, _) => &mut bounce.bytes_mut()[left],
            (Memory::Direct(region), Cargo::Read(buf)) => {
                let start = region.address() - Region::of(buf).address();
                &mut buf[start + left.start..start + left.end]
            }
            _ => &mut [],
        }
    }

    /// What is left of a write, or the front of it, as memory.
    pub(super) fn sources(&self, op: usize) -> Vec<IoSlice<'_>> {
        let op = &self.ops[op];
        match (&op.memory, &self.cargo) {
            (Memory::Gather { bounce: Some(bounce), .. }, _) => {
                vec![IoSlice::new(&bounce.bytes()[op.done as usize..op.len as usize])]
            }
            (Memory::Direct(region), Cargo::Write { runs }) => {
                let left = region.part(op.done as usize..op.len as usize);
                slices_of(left, runs[op.run].parts.iter().skip(op.part))
            }
            _ => Vec::new(),
        }
    }

    /// The kernel answered: a count, or an errno below zero.
    pub(super) fn complete(&mut self, op: usize, result: i32) -> Step {
        let step =
            self.ops[op].advance(result, u64::from(self.align.offset)).unwrap_or_else(|error| {
                self.note(error);
                Step::Ended
            });
        if step == Step::Ended {
            self.running -= 1;
        }
        step
    }

    /// An operation never got to the kernel, or is given up between two attempts.
    pub(super) fn fail(&mut self, error: io::Error) {
        self.running -= 1;
        self.note(error);
    }

    fn note(&mut self, error: io::Error) {
        if let Cargo::Punch { refused } = &self.cargo
            && error.kind() == io::ErrorKind::Unsupported
        {
            refused.store(true, Ordering::Relaxed);
            self.next = self.ops.len();
            self.wave_end = self.ops.len();
            return;
        }
        self.error.get_or_insert(error);
    }

    /// Ends a job of which nothing runs with an error.
    pub(super) fn refuse(mut self: Box<Self>, error: io::Error) {
        self.error.get_or_insert(error);
        self.deliver();
    }

    /// Ends a job that no engine has.
    pub(super) fn refused(mut self: Box<Self>, error: io::Error) -> Box<Self> {
        self.error.get_or_insert(error);
        self
    }

    /// Ends the wave: copies what it read to its place, gives back what it borrowed, and hands the
    /// job to its waiter; without one, drops what the job owns, now that nothing runs. Called with
    /// no lock held.
    pub(super) fn deliver(mut self: Box<Self>) {
        debug_assert!(self.running == 0, "delivered while it runs");
        self.unload();
        self.permit = None;
        if let Some(reply) = self.reply.take() {
            drop(reply.send(self));
        }
    }

    fn unload(&mut self) {
        for op in &mut self.ops[..self.wave_end] {
            op.unload(&mut self.cargo);
        }
        self.bounce_share = None;
    }

    /// The result of a settled job, with what it owned.
    pub(super) fn into_result(mut self) -> (Option<IoBuf>, Keep, io::Result<()>) {
        let keep = std::mem::replace(&mut self.keep, Keep::none());
        let buf = match std::mem::replace(&mut self.cargo, Cargo::Sync) {
            Cargo::Read(buf) => Some(buf),
            _ => None,
        };
        (buf, keep, self.error.take().map_or(Ok(()), Err))
    }
}

/// Runs a job of each kind by `run`, on an empty file, and looks at what comes back.
///
/// # Errors
///
/// What was refused, or that other bytes came back than were written.
pub(super) fn prove(
    align: Alignment,
    mut run: impl FnMut(Box<Job>) -> io::Result<Box<Job>>,
) -> io::Result<()> {
    const LEN: usize = 8192;
    let budget = BounceBudget::new();
    let mut finish = |mut job: Box<Job>| {
        job.plan_wave();
        job.equip(&budget, None);
        let mut job = run(job)?;
        // A job that came without a reply was not delivered.
        job.unload();
        let (buf, _, result) = job.into_result();
        result.map(|()| buf)
    };
    let pattern: Vec<u8> = (0..LEN).map(|n| (n % 253) as u8 ^ 0xa5).collect();
    let whole = ReadPiece { offset: 0, range: 0..LEN };
    let runs = vec![WriteRun { offset: 0, parts: vec![pattern.clone().into()] }];
    finish(Job::write(runs, Keep::none(), align))?;
    let buf = IoBuf::from_vec(vec![0; LEN]);
    let read = finish(Job::read(buf, &[whole], Keep::none(), align))?;
    let hole = std::slice::from_ref(&(0..4096));
    finish(Job::punch(hole, Keep::none(), Arc::default()))?;
    finish(Job::sync())?;
    match read {
        Some(read) if read[..] == pattern[..] => Ok(()),
        _ => Err(io::Error::other("other bytes came back than were written")),
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.running == 0 {
            return;
        }
        tracing::error!(
            target: "vmem::disk", running = self.running,
            "the kernel still has a job: its memory is leaked"
        );
        std::mem::forget(std::mem::replace(&mut self.cargo, Cargo::Sync));
        std::mem::forget(std::mem::replace(&mut self.keep, Keep::none()));
        std::mem::forget(std::mem::take(&mut self.ops));
        std::mem::forget(self.bounce_share.take());
    }
}

#[cfg(test)]
mod tests;
