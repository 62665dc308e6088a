//! A disk in memory that the test commands: it waits, fails or stands still on command.
//!
//! Invariant: an operation owns what it was given until it has completed, whatever happens to its
//! future, and checks that no other code touches it meanwhile: memory that is being read into is
//! poisoned at submission and must still be so at completion, and what is being written must still
//! have the bytes that it had. Called by the scenario tests, below the real disk tier.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use vmem::backend::{Clock, IoBuf};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun, closed_error};

const POISON: u8 = 0xDB;

/// A kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
}

type Faults = Box<dyn FnMut(Op, &Range<u64>) -> Option<io::Error> + Send>;
type Delays = Box<dyn FnMut(Op) -> Duration + Send>;

/// See the module's documentation.
pub(crate) struct MemDriver {
    core: Arc<Core>,
}

struct Core {
    image: Mutex<Vec<u8>>,
    faults: Mutex<Option<Faults>>,
    delays: Mutex<Option<Delays>>,
    gate: watch::Sender<bool>,
    in_flight: AtomicUsize,
    reads: AtomicU64,
    writes: AtomicU64,
    /// The memory of an operation in flight was touched.
    trespassed: AtomicBool,
    closed: AtomicBool,
}

/// Counts one operation until it has given back what it owned.
struct InFlight(Arc<Core>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

impl MemDriver {
    pub(crate) fn new() -> Arc<Self> {
        let core = Arc::new(Core {
            image: Mutex::default(),
            faults: Mutex::new(None),
            delays: Mutex::new(None),
            gate: watch::channel(true).0,
            in_flight: AtomicUsize::new(0),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            trespassed: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        Arc::new(MemDriver { core })
    }

    /// Operations that have not given back yet what they own.
    pub(crate) fn in_flight(&self) -> usize {
        self.core.in_flight.load(Ordering::SeqCst)
    }

    /// Reads so far.
    pub(crate) fn reads(&self) -> u64 {
        self.core.reads.load(Ordering::SeqCst)
    }

    /// Writes so far.
    pub(crate) fn writes(&self) -> u64 {
        self.core.writes.load(Ordering::SeqCst)
    }

    /// Holds every operation back, the ones in flight too, until [`go_on`](Self::go_on).
    pub(crate) fn stand_still(&self) {
        self.core.gate.send_replace(false);
    }

    pub(crate) fn go_on(&self) {
        self.core.gate.send_replace(true);
    }

    /// Asks `faults` about every transfer.
    pub(crate) fn fail(
        &self,
        faults: impl FnMut(Op, &Range<u64>) -> Option<io::Error> + Send + 'static,
    ) {
        *self.core.faults.lock() = Some(Box::new(faults));
    }

    /// No more faults.
    pub(crate) fn heal(&self) {
        *self.core.faults.lock() = None;
    }

    /// How long each operation takes.
    pub(crate) fn delay(&self, delays: impl FnMut(Op) -> Duration + Send + 'static) {
        *self.core.delays.lock() = Some(Box::new(delays));
    }

    /// Where these bytes begin on disk.
    pub(crate) fn find(&self, bytes: &[u8]) -> Option<u64> {
        let image = self.core.image.lock();
        let block = 512;
        (0..image.len())
            .step_by(block)
            .find(|&at| image[at..].starts_with(bytes))
            .map(|at| at as u64)
    }

    /// Flips a bit on disk.
    pub(crate) fn flip(&self, offset: u64) {
        self.core.image.lock()[offset as usize] ^= 0x10;
    }

    /// Panics if memory of an operation in flight was touched.
    pub(crate) fn assert_untouched(&self) {
        let trespassed = self.core.trespassed.load(Ordering::SeqCst);
        assert!(!trespassed, "memory of an operation in flight was written to by other code");
    }
}

impl Core {
    fn begin(self: &Arc<Self>, op: Op) -> io::Result<InFlight> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(closed_error());
        }
        match op {
            Op::Read => self.reads.fetch_add(1, Ordering::SeqCst),
            Op::Write => self.writes.fetch_add(1, Ordering::SeqCst),
        };
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Ok(InFlight(self.clone()))
    }

    /// What an operation does before it takes effect.
    async fn wait(&self, op: Op) {
        let delay = self.delays.lock().as_mut().map(|delays| delays(op));
        match delay {
            Some(delay) if !delay.is_zero() => tokio::time::sleep(delay).await,
            _ => tokio::task::yield_now().await,
        }
        let mut gate = self.gate.subscribe();
        // An error would mean that the driver is gone, and this holds it.
        drop(gate.wait_for(|open| *open).await);
    }

    fn fault(&self, op: Op, range: &Range<u64>) -> io::Result<()> {
        let fault = self.faults.lock().as_mut().and_then(|faults| faults(op, range));
        fault.map_or(Ok(()), Err)
    }

    fn fill(&self, buf: &mut IoBuf, pieces: &[ReadPiece]) -> io::Result<()> {
        for piece in pieces {
            if buf[piece.range.clone()].iter().any(|&byte| byte != POISON) {
                self.trespassed.store(true, Ordering::SeqCst);
            }
        }
        for piece in pieces {
            let range = piece.offset..piece.offset + piece.range.len() as u64;
            self.fault(Op::Read, &range)?;
            let image = self.image.lock();
            let Some(bytes) = image.get(range.start as usize..range.end as usize) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            buf[piece.range.clone()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn store(&self, runs: &[WriteRun], before: &[Vec<u8>]) -> io::Result<()> {
        for (run, before) in runs.iter().zip(before) {
            if run.parts.concat() != *before {
                self.trespassed.store(true, Ordering::SeqCst);
            }
        }
        for (run, bytes) in runs.iter().zip(before) {
            self.fault(Op::Write, &(run.offset..run.offset + run.len()))?;
            let start = run.offset as usize;
            let end = run.offset as usize + bytes.len();
            let mut image = self.image.lock();
            if image.len() < end {
                image.resize(end, 0);
            }
            image[start..end].copy_from_slice(bytes);
        }
        Ok(())
    }
}

impl Driver for MemDriver {
    fn read(
        &self,
        mut buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        let core = self.core.clone();
        let in_flight = match core.begin(Op::Read) {
            Ok(in_flight) => in_flight,
            Err(closed) => return std::future::ready((buf, keep, Err(closed))).boxed(),
        };
        for piece in &pieces {
            buf[piece.range.clone()].fill(POISON);
        }
        let (reply, answer) = oneshot::channel();
        drop(tokio::spawn(async move {
            core.wait(Op::Read).await;
            let result = core.fill(&mut buf, &pieces);
            drop(reply.send((buf, keep, result)));
            drop(in_flight);
        }));
        answer.map(|answer| answer.expect("the operation ends")).boxed()
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let core = self.core.clone();
        let in_flight = match core.begin(Op::Write) {
            Ok(in_flight) => in_flight,
            Err(closed) => return std::future::ready((keep, Err(closed))).boxed(),
        };
        let before: Vec<_> = runs.iter().map(|run| run.parts.concat()).collect();
        let (reply, answer) = oneshot::channel();
        drop(tokio::spawn(async move {
            core.wait(Op::Write).await;
            let result = core.store(&runs, &before);
            drop(runs);
            drop(reply.send((keep, result)));
            drop(in_flight);
        }));
        answer.map(|answer| answer.expect("the operation ends")).boxed()
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let mut image = self.core.image.lock();
        for range in ranges {
            let end = image.len().min(range.end as usize);
            if let Some(bytes) = image.get_mut(range.start as usize..end) {
                bytes.fill(0);
            }
        }
        std::future::ready((keep, Ok(()))).boxed()
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    fn clock(&self) -> Clock {
        Clock::Runtime
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        let core = self.core.clone();
        core.closed.store(true, Ordering::SeqCst);
        async move {
            while core.in_flight.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        }
        .boxed()
    }

    fn buffers_writes(&self) -> bool {
        false
    }

    fn block_bytes(&self) -> u32 {
        512
    }

    fn describe(&self) -> Arc<str> {
        "memory, as the test commands".into()
    }
}

impl fmt::Debug for MemDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemDriver").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
