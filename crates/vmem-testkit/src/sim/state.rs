//! What a simulated disk is doing.
//!
//! Invariant: a call is in `calls` from its submission until its last operation has ended, and the
//! buffers are in it, without another owner. A transfer takes effect in two steps, its first half
//! when it starts and the rest when it ends, so that operations that overlap in time and space
//! tear each other as they may on a disk. Used by the simulated driver alone, under its lock.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::time::Duration;

use futures::channel::oneshot;
use rustix::io::Errno;
use tokio::time::Instant;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Keep, ReadPiece, WriteRun};

use super::device::{Device, Event, Job};
use super::image::SparseImage;
use super::journal::Journal;
use super::{SimConfig, SimStats};

#[derive(Debug)]
pub(super) struct State {
    pub(super) device: Device,
    pub(super) image: SparseImage,
    pub(super) journal: Option<Journal>,
    pub(super) free_bytes: Option<u64>,
    pub(super) syncs_to_fail: u32,
    pub(super) stats: SimStats,
    pub(super) closed: bool,
    pub(super) closers: Vec<oneshot::Sender<()>>,
    pub(super) pumping: bool,
    operations: BTreeMap<u64, (u64, Work)>,
    calls: BTreeMap<u64, Call>,
    next_id: u64,
}

/// One operation of the device.
#[derive(Debug)]
pub(super) enum Work {
    Read(ReadPiece),
    Write(WriteRun),
    Punch(Range<u64>),
    Sync {
        barrier: u64,
    },
    /// A call with nothing to do, or that was refused, still takes its turn.
    Nothing,
}

/// One call of the driver's user.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) buf: Option<IoBuf>,
    pub(super) keep: Keep,
    pub(super) error: Option<io::Error>,
    pub(super) reply: Reply,
    left: usize,
    // Kept until the call ends, though the bytes are copied earlier: a real driver would.
    done: Vec<Work>,
}

#[derive(Debug)]
pub(super) enum Reply {
    Read(oneshot::Sender<(IoBuf, Keep, io::Result<()>)>),
    Unit(oneshot::Sender<(Keep, io::Result<()>)>),
}

impl Call {
    pub(super) fn new(
        buf: Option<IoBuf>,
        keep: Keep,
        error: Option<io::Error>,
        reply: Reply,
    ) -> Self {
        Call { buf, keep, error, reply, left: 0, done: Vec::new() }
    }

    /// Tells the caller, if it still listens, and gives up what the call owned.
    pub(super) fn finish(self) {
        let result = self.error.map_or(Ok(()), Err);
        match (self.reply, self.buf) {
            (Reply::Read(reply), Some(buf)) => drop(reply.send((buf, self.keep, result))),
            (Reply::Unit(reply), _) => drop(reply.send((self.keep, result))),
            (Reply::Read(_), None) => unreachable!("a read owns a buffer until it ends"),
        }
    }
}

impl State {
    pub(super) fn new(config: SimConfig, image: SparseImage) -> Self {
        State {
            device: Device::new(config.speed, Instant::now()),
            journal: config.power_cuts.then(|| Journal::new(image.clone())),
            image,
            free_bytes: config.free_bytes,
            syncs_to_fail: 0,
            stats: SimStats::default(),
            closed: false,
            closers: Vec::new(),
            pumping: false,
            operations: BTreeMap::new(),
            calls: BTreeMap::new(),
            next_id: 0,
        }
    }

    /// Starts a call; its operations go to the device in order.
    pub(super) fn submit(&mut self, mut call: Call, mut work: Vec<Work>, now: Instant) {
        if call.error.is_some() || work.is_empty() {
            work = vec![Work::Nothing];
        }
        call.left = work.len();
        let id = self.id();
        self.calls.insert(id, call);
        self.stats.in_flight = self.calls.len() as u64;
        self.stats.max_in_flight = self.stats.max_in_flight.max(self.stats.in_flight);
        for work in work {
            let operation = self.id();
            let (latency, bytes) = self.cost(&work);
            self.operations.insert(operation, (id, work));
            let job = Job { id: operation, latency, bytes };
            self.device.submit(job, now);
        }
        let in_service = self.device.in_service() as u64;
        self.stats.max_in_service = self.stats.max_in_service.max(in_service);
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn cost(&self, work: &Work) -> (Duration, u64) {
        let speed = self.device.speed();
        match work {
            Work::Read(piece) => (speed.read_latency, piece.range.len() as u64),
            Work::Write(run) => (speed.write_latency, run.len()),
            Work::Punch(_) => (speed.write_latency, 0),
            Work::Sync { .. } => (speed.sync_latency, 0),
            Work::Nothing => (Duration::ZERO, 0),
        }
    }

    /// Does what the device has done by now; the calls that ended are to be finished by the
    /// caller once the lock is released.
    #[must_use]
    pub(super) fn pump(&mut self, now: Instant) -> Vec<Call> {
        self.device.advance(now);
        let mut ended = Vec::new();
        while let Some(event) = self.device.take_event() {
            match event {
                Event::Started(id) => self.begin(id),
                Event::Ended(id) => ended.extend(self.end(id)),
            }
        }
        ended
    }

    /// Whether no call is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    fn begin(&mut self, id: u64) {
        let Some((call_id, work)) = self.operations.remove(&id) else {
            return;
        };
        self.transfer(call_id, &work, true);
        self.operations.insert(id, (call_id, work));
    }

    fn end(&mut self, id: u64) -> Option<Call> {
        let (call_id, work) = self.operations.remove(&id)?;
        self.transfer(call_id, &work, false);
        let call = self.calls.get_mut(&call_id)?;
        call.done.push(work);
        call.left -= 1;
        if call.left > 0 {
            return None;
        }
        let call = self.calls.remove(&call_id);
        self.stats.in_flight = self.calls.len() as u64;
        call
    }

    /// Moves the first or the second half of an operation's bytes.
    fn transfer(&mut self, call_id: u64, work: &Work, first: bool) {
        let outcome = match work {
            Work::Read(piece) => self.transfer_in(call_id, piece, first),
            Work::Write(run) => self.transfer_out(run, first),
            Work::Punch(range) if !first => {
                self.punch(range.clone());
                Ok(())
            }
            Work::Sync { barrier } if !first => self.sync(*barrier),
            Work::Punch(_) | Work::Sync { .. } | Work::Nothing => Ok(()),
        };
        if let (Err(error), Some(call)) = (outcome, self.calls.get_mut(&call_id)) {
            call.error.get_or_insert(error);
        }
    }

    fn transfer_in(&mut self, call_id: u64, piece: &ReadPiece, first: bool) -> io::Result<()> {
        let half = half(piece.range.len(), first);
        let offset = piece.offset + half.start as u64;
        let there = self.image.len().saturating_sub(offset);
        let take = half.len().min(usize::try_from(there).unwrap_or(usize::MAX));
        let into = piece.range.start + half.start;
        let call = self.calls.get_mut(&call_id);
        if let Some(buf) = call.and_then(|call| call.buf.as_mut()) {
            self.image.read(offset, &mut buf[into..into + take]);
        }
        self.stats.read_bytes += take as u64;
        if take < half.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn transfer_out(&mut self, run: &WriteRun, first: bool) -> io::Result<()> {
        let half = half(run.len() as usize, first);
        let mut at = 0;
        let mut outcome = Ok(());
        for part in &run.parts {
            let from = half.start.clamp(at, at + part.len());
            let to = half.end.clamp(at, at + part.len());
            if outcome.is_ok() && from < to {
                outcome = self.store(run.offset + from as u64, &part[from - at..to - at]);
            }
            at += part.len();
        }
        outcome
    }

    fn store(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut fits = data.len();
        if let Some(free) = self.free_bytes {
            let (fitting, taken) = self.image.fitting(offset, data.len(), free);
            self.free_bytes = Some(free - taken);
            fits = fitting;
        }
        self.image.write(offset, &data[..fits]);
        if let Some(journal) = &mut self.journal {
            journal.wrote(offset, &data[..fits]);
        }
        self.stats.written_bytes += fits as u64;
        if fits < data.len() {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    fn punch(&mut self, range: Range<u64>) {
        let before = self.image.allocated_bytes();
        self.image.punch(range.clone());
        let given_back = before - self.image.allocated_bytes();
        self.stats.punched_bytes += given_back;
        self.free_bytes = self.free_bytes.map(|free| free.saturating_add(given_back));
        if let Some(journal) = &mut self.journal {
            journal.punched(range);
        }
    }

    fn sync(&mut self, barrier: u64) -> io::Result<()> {
        let fails = self.syncs_to_fail > 0;
        self.syncs_to_fail = self.syncs_to_fail.saturating_sub(1);
        if let Some(journal) = &mut self.journal {
            match fails {
                true => journal.sync_failed(barrier),
                false => journal.synced(barrier),
            }
        }
        if fails { Err(Errno::IO.into()) } else { Ok(()) }
    }
}

/// The half of `len` bytes that moves at the start, or at the end, of an operation.
fn half(len: usize, first: bool) -> Range<usize> {
    let middle = (len / 2).next_multiple_of(512).min(len);
    if first { 0..middle } else { middle..len }
}
