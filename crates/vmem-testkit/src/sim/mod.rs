//! A disk in memory, on tokio's clock.
//!
//! Invariant: as with a real driver, an operation starts at the call, owns its buffers until it
//! ends and ends whatever happens to the future. On a paused clock a run costs no time and replays.
//! tokio's timer ticks in milliseconds: the device itself is exact to the nanosecond, so that rates
//! come out right, but the news of a completion comes at the next tick. Called by tests, under the
//! disk tier and under the decorators.

mod device;
mod image;
mod journal;
mod state;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use futures::channel::oneshot;
use futures::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use rand::Rng;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use vmem_core::backend::{Clock, IoBuf};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun, closed_error};

use state::{Call, Reply, State, Work};

pub use device::Speed;
pub use image::{BLOCK_BYTES, SparseImage};

/// What kind of disk is simulated.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// The alignment that the driver asks for, in bytes; it accepts any.
    pub block_bytes: u32,
    /// Length of the file at the start, in bytes.
    pub len_bytes: u64,
    /// Space that the file may still take before `ENOSPC`; `None` is without limit.
    pub free_bytes: Option<u64>,
    /// Whether the driver says that only a sync makes a write safe.
    pub buffers_writes: bool,
    /// How fast it is.
    pub speed: Speed,
    /// Whether unsynced writes are remembered for [`SimDriver::crash_image`], at the cost of a
    /// copy of each.
    pub power_cuts: bool,
}

impl Default for SimConfig {
    /// An empty file, without limits, on a device that takes no time.
    fn default() -> Self {
        SimConfig {
            block_bytes: 512,
            len_bytes: 0,
            free_bytes: None,
            buffers_writes: true,
            speed: Speed::default(),
            power_cuts: false,
        }
    }
}

/// What a simulated disk has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimStats {
    /// Calls of `read`.
    pub reads: u64,
    /// Calls of `write`.
    pub writes: u64,
    /// Calls of `punch`.
    pub punches: u64,
    /// Calls of `sync`.
    pub syncs: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Space that punches gave back, in bytes.
    pub punched_bytes: u64,
    /// Calls that have not ended.
    pub in_flight: u64,
    /// The most calls that were in flight at once.
    pub max_in_flight: u64,
    /// The most operations (pieces, runs) that the device served at once.
    pub max_in_service: u64,
}

/// A [`Driver`] over memory, with a device that takes time.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// use vmem_io::driver::{Driver, Keep, WriteRun};
/// use vmem_testkit::{SimConfig, SimDriver};
///
/// let disk = SimDriver::new(SimConfig::default());
/// let run = WriteRun { offset: 3, parts: vec!["ab".into(), "c".into()] };
/// disk.write(vec![run], Keep::none()).await.1.unwrap();
/// assert_eq!(disk.peek(2, 4), b"\0abc");
/// # });
/// ```
pub struct SimDriver {
    shared: Arc<Shared>,
    block_bytes: u32,
    buffers_writes: bool,
}

struct Shared {
    state: Mutex<State>,
    submitted: Notify,
}

impl SimDriver {
    /// A disk with a new file.
    pub fn new(config: SimConfig) -> Arc<Self> {
        let image = SparseImage::with_len(config.len_bytes);
        SimDriver::with_image(config, image)
    }

    /// A disk whose file is `image`; `len_bytes` of the configuration is not looked at.
    pub fn with_image(config: SimConfig, image: SparseImage) -> Arc<Self> {
        Arc::new(SimDriver {
            block_bytes: config.block_bytes,
            buffers_writes: config.buffers_writes,
            shared: Arc::new(Shared {
                state: Mutex::new(State::new(config, image)),
                submitted: Notify::new(),
            }),
        })
    }

    /// How much more space the file may take from now on, in bytes; `None` is without limit. What
    /// a punch gives back is added.
    pub fn set_free_bytes(&self, free_bytes: Option<u64>) {
        self.shared.state.lock().free_bytes = free_bytes;
    }

    /// Makes the device faster or slower; operations in service feel the bandwidth at once.
    pub fn set_speed(&self, speed: Speed) {
        self.shared.state.lock().device.set_speed(speed, Instant::now());
        self.shared.submitted.notify_one();
    }

    /// The next `count` syncs fail with `EIO`, and what they would have covered is lost at a power
    /// cut even if a later sync succeeds.
    pub fn fail_syncs(&self, count: u32) {
        self.shared.state.lock().syncs_to_fail = count;
    }

    /// What it has done.
    pub fn stats(&self) -> SimStats {
        self.shared.state.lock().stats
    }

    /// The current contents of the file.
    pub fn image(&self) -> SparseImage {
        self.shared.state.lock().image.clone()
    }

    /// The bytes from `offset` on, past the queue of the device; zeros where there are none.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        self.shared.state.lock().image.read_vec(offset, len)
    }

    /// Damages the file, past the queue of the device.
    pub fn damage(&self, damage: impl Fn(&mut SparseImage)) {
        let mut state = self.shared.state.lock();
        damage(&mut state.image);
        if let Some(journal) = &mut state.journal {
            journal.damage(damage);
        }
    }

    /// One of the files that a power cut now may leave: what no sync covered is, write by write,
    /// there, not there, or torn at 512 bytes.
    ///
    /// # Panics
    ///
    /// When the configuration did not ask for `power_cuts`.
    pub fn crash_image(&self, rng: &mut impl Rng) -> SparseImage {
        let state = self.shared.state.lock();
        let journal = state.journal.as_ref();
        journal.expect("crash_image needs SimConfig::power_cuts").crash(rng)
    }

    fn submit_read(&self, buf: IoBuf, pieces: Vec<ReadPiece>, keep: Keep, reply: Reply) {
        let legal = pieces.iter().all(|piece| {
            let range = &piece.range;
            range.start <= range.end
                && range.end <= buf.len()
                && in_file(piece.offset, range.len() as u64)
        });
        let mut state = self.shared.state.lock();
        state.stats.reads += 1;
        let error = refusal(&state, legal);
        let work = pieces.into_iter().map(Work::Read).collect();
        self.submit(state, Call::new(Some(buf), keep, error, reply), work);
    }

    fn submit_unit(
        &self,
        legal: bool,
        keep: Keep,
        prepare: impl FnOnce(&mut State) -> Vec<Work>,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let (reply, answer) = oneshot::channel();
        let mut state = self.shared.state.lock();
        let error = refusal(&state, legal);
        let work = prepare(&mut state);
        self.submit(state, Call::new(None, keep, error, Reply::Unit(reply)), work);
        Box::pin(async move { answer.await.unwrap_or_else(|_| (Keep::none(), Err(gone()))) })
    }

    /// Without a runtime the call waits in the queue until one comes that has it.
    fn submit(&self, mut state: MutexGuard<'_, State>, call: Call, work: Vec<Work>) {
        let runtime = Handle::try_current();
        state.submit(call, work, Instant::now());
        self.shared.submitted.notify_one();
        if let Ok(runtime) = runtime
            && !state.pumping
        {
            state.pumping = true;
            // A runtime that is shutting down drops the task at once, and the pump takes the lock.
            drop(state);
            let pump = Pump { shared: self.shared.clone(), ended: false };
            runtime.spawn(pump.run());
        }
    }
}

fn refusal(state: &State, legal: bool) -> Option<io::Error> {
    match (state.closed, legal) {
        (true, _) => Some(closed_error()),
        (false, false) => Some(io::ErrorKind::InvalidInput.into()),
        (false, true) => None,
    }
}

fn in_file(offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok())
}

fn gone() -> io::Error {
    io::Error::other("the simulated disk was dropped with the call in flight")
}

impl Driver for SimDriver {
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        let (reply, answer) = oneshot::channel();
        self.submit_read(buf, pieces, keep, Reply::Read(reply));
        Box::pin(async move {
            let lost = |_| (IoBuf::from_vec(Vec::new()), Keep::none(), Err(gone()));
            answer.await.unwrap_or_else(lost)
        })
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let legal = runs.iter().all(|run| in_file(run.offset, run.len()));
        self.submit_unit(legal, keep, |state| {
            state.stats.writes += 1;
            runs.into_iter().map(Work::Write).collect()
        })
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let legal = ranges.iter().all(|range| range.start <= range.end);
        self.submit_unit(legal, keep, |state| {
            state.stats.punches += 1;
            ranges.into_iter().map(Work::Punch).collect()
        })
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        let syncing = self.submit_unit(true, Keep::none(), |state| {
            state.stats.syncs += 1;
            let barrier = state.journal.as_ref().map_or(0, |journal| journal.barrier());
            vec![Work::Sync { barrier }]
        });
        Box::pin(async move { syncing.await.1 })
    }

    fn clock(&self) -> Clock {
        Clock::Runtime
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        let mut state = self.shared.state.lock();
        state.closed = true;
        if state.is_idle() {
            return Box::pin(async { Ok(()) });
        }
        let (closer, closed) = oneshot::channel();
        state.closers.push(closer);
        drop(state);
        Box::pin(async move { closed.await.map_err(|_| gone()) })
    }

    fn buffers_writes(&self) -> bool {
        self.buffers_writes
    }

    fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    fn describe(&self) -> Arc<str> {
        "simulated disk".into()
    }
}

impl fmt::Debug for SimDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDriver").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The task that lets time pass for the device; it lives while calls are in flight.
struct Pump {
    shared: Arc<Shared>,
    ended: bool,
}

impl Pump {
    async fn run(mut self) {
        loop {
            let (ended, closers, next) = self.turn();
            ended.into_iter().for_each(Call::finish);
            for closer in closers {
                let _nobody_waits = closer.send(());
            }
            let Some(next) = next else {
                return;
            };
            tokio::select! {
                biased;
                () = self.shared.submitted.notified() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    fn turn(&mut self) -> (Vec<Call>, Vec<oneshot::Sender<()>>, Option<Instant>) {
        let mut state = self.shared.state.lock();
        let ended = state.pump(Instant::now());
        let mut closers = Vec::new();
        if state.is_idle() {
            state.pumping = false;
            self.ended = true;
            closers = std::mem::take(&mut state.closers);
        }
        let next = state.device.next_event();
        (ended, closers, next)
    }
}

impl Drop for Pump {
    /// Lets a later call start another pump where the runtime was dropped under this one.
    fn drop(&mut self) {
        if !self.ended {
            self.shared.state.lock().pumping = false;
        }
    }
}
