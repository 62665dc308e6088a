//! A device that is no device: memory of the heap behind a task that obeys the test, late.
//!
//! Invariant: an operation owns its buffer and its share of the range from the call until it is
//! done, in that task, whatever happens to the future; on a paused clock one seed gives one run;
//! memory that was given back is filled with garbage, so that a reader of what it did not write
//! sees it. Called by the tests of the core.
//!
//! It stands for the order and the lateness of a device, not for the rules of a driver: those are
//! the CUDA emulator's.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::sync::Notify;
use vmem_core::backend::{
    DeviceAnswer, DeviceBackend, DeviceError, DeviceRange, DeviceUsage, IoBuf, RangeLedger,
    RangeOwner, StagingMemory,
};

const UNIT: u64 = 512;
const GARBAGE: u8 = 0xEE;

/// A simulated device. Cheap to clone.
///
/// ```
/// use vmem_core::backend::DeviceBackend;
/// use vmem_testkit::SimDevice;
///
/// let device = SimDevice::new(1 << 20);
/// let range = device.reserve(100).unwrap();
/// assert_eq!(device.usage().used_bytes, 512);
/// drop(range);
/// assert_eq!(device.usage().used_bytes, 0);
/// ```
#[derive(Clone, Debug)]
pub struct SimDevice {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Mutex<Vec<u8>>,
    ledger: Mutex<RangeLedger>,
    freed: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    queue: Mutex<Queue>,
    bell: Notify,
    manners: Mutex<Option<Manners>>,
    lost: Mutex<Option<Arc<str>>>,
    /// Operations that are still to fail.
    failing: AtomicU64,
    done: AtomicU64,
}

/// How a device behaves without orders of a test.
struct Manners {
    rng: SmallRng,
    /// The longest that an operation takes.
    slowest: Duration,
    /// How often one fails.
    fails: f64,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Operations that may run; none: all.
    allowed: Option<u64>,
    /// Whether there is a task.
    served: bool,
    running: bool,
    closed: bool,
}

type Job = Box<dyn FnOnce(Result<(), DeviceError>, &Inner) + Send>;

impl SimDevice {
    /// A device with `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        let inner = Arc::new(Inner {
            memory: Mutex::new(vec![GARBAGE; capacity as usize]),
            ledger: Mutex::new(RangeLedger::new(capacity, UNIT)),
            freed: Mutex::new(None),
            queue: Mutex::default(),
            bell: Notify::new(),
            manners: Mutex::new(None),
            lost: Mutex::new(None),
            failing: AtomicU64::new(0),
            done: AtomicU64::new(0),
        });
        SimDevice { inner }
    }

    /// Lets no operation run until it is released.
    pub fn hold(&self) {
        self.inner.queue.lock().allowed = Some(0);
    }

    /// Lets `n` more operations run.
    pub fn release(&self, n: u64) {
        if let Some(allowed) = &mut self.inner.queue.lock().allowed {
            *allowed += n;
        }
        self.inner.bell.notify_one();
    }

    /// Lets all operations run again.
    pub fn release_all(&self) {
        self.inner.queue.lock().allowed = None;
        self.inner.bell.notify_one();
    }

    /// From now on operations take up to `slowest`, and fail with this probability.
    pub fn misbehave(&self, rng: SmallRng, slowest: Duration, fails: f64) {
        *self.inner.manners.lock() = Some(Manners { rng, slowest, fails });
    }

    /// The next `n` operations fail.
    pub fn fail_next(&self, n: u64) {
        self.inner.failing.store(n, Ordering::SeqCst);
    }

    /// From now on every operation fails, and the device says that it is lost.
    pub fn lose(&self) {
        *self.inner.lost.lock() = Some("it was lost".into());
        if let Some(hook) = &*self.inner.freed.lock() {
            hook();
        }
    }

    /// Operations that wait, or run.
    pub fn in_flight(&self) -> usize {
        let queue = self.inner.queue.lock();
        queue.jobs.len() + usize::from(queue.running)
    }

    /// Operations that were done.
    pub fn done(&self) -> u64 {
        self.inner.done.load(Ordering::SeqCst)
    }

    fn submit<T: Send + 'static>(
        &self,
        work: impl FnOnce(Result<(), DeviceError>, &Inner) -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |outcome, inner| drop(reply.send(work(outcome, inner))));
        let mut queue = self.inner.queue.lock();
        if queue.closed {
            drop(queue);
            job(Err(DeviceError::Closed), &self.inner);
        } else {
            queue.jobs.push_back(job);
            if !std::mem::replace(&mut queue.served, true) {
                tokio::spawn(self.inner.clone().serve());
            }
        }
        answer
    }
}

impl Inner {
    /// Runs operations until there are none.
    async fn serve(self: Arc<Self>) {
        loop {
            let may_run = {
                let mut queue = self.queue.lock();
                if queue.jobs.is_empty() {
                    queue.served = false;
                    return;
                }
                queue.allowed != Some(0)
            };
            if !may_run {
                self.bell.notified().await;
                continue;
            }
            let (delay, fails) = match &mut *self.manners.lock() {
                Some(Manners { rng, slowest, fails }) => {
                    (rng.random_range(Duration::ZERO..=*slowest), rng.random_bool(*fails))
                }
                None => (Duration::ZERO, false),
            };
            if delay.is_zero() {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(delay).await;
            }
            self.run_one(fails);
        }
    }

    fn run_one(&self, fails: bool) {
        let job = {
            let mut queue = self.queue.lock();
            if let Some(allowed) = &mut queue.allowed {
                // It may have been held meanwhile.
                let Some(left) = allowed.checked_sub(1) else { return };
                *allowed = left;
            }
            queue.running = true;
            queue.jobs.pop_front()
        };
        let left = |left: u64| left.checked_sub(1);
        let told = || self.failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok();
        let outcome = match self.lost.lock().clone() {
            Some(reason) => Err(DeviceError::Lost(reason)),
            None if fails || told() => Err(DeviceError::Failed {
                operation: "a copy",
                code: 719,
                message: "as the test asked".into(),
            }),
            None => Ok(()),
        };
        if let Some(job) = job {
            job(outcome, self);
            self.done.fetch_add(1, Ordering::SeqCst);
        }
        self.queue.lock().running = false;
    }
}

impl RangeOwner for Inner {
    fn release(&self, address: u64, footprint: u64) {
        let at = address as usize..(address + footprint) as usize;
        self.memory.lock()[at].fill(GARBAGE);
        self.ledger.lock().give_back(address, footprint);
    }
}

impl DeviceBackend for SimDevice {
    fn reserve(&self, len: usize) -> Option<DeviceRange> {
        let (address, footprint) = self.inner.ledger.lock().take(len)?;
        Some(DeviceRange::new(address, len, footprint, self.inner.clone()))
    }

    fn reserve_outside(&self, len: usize, window: &Range<u64>) -> Option<DeviceRange> {
        let (address, footprint) = self.inner.ledger.lock().take_outside(len, window)?;
        Some(DeviceRange::new(address, len, footprint, self.inner.clone()))
    }

    fn footprint(&self, len: usize) -> u64 {
        self.inner.ledger.lock().footprint(len)
    }

    fn free_from(&self, address: u64) -> u64 {
        self.inner.ledger.lock().free_from(address)
    }

    fn upload(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        let answer = self.submit(move |outcome, inner| {
            assert!(offset + bytes.len() <= to.len(), "a copy stays within its range");
            if outcome.is_ok() {
                let start = to.address() as usize + offset;
                inner.memory.lock()[start..start + bytes.len()].copy_from_slice(&bytes);
            }
            drop((bytes, to));
            outcome
        });
        async move { answer.await.unwrap_or(Err(DeviceError::Closed)) }.boxed()
    }

    fn copy_within(
        &self,
        from: Arc<DeviceRange>,
        to: Arc<DeviceRange>,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        let answer = self.submit(move |outcome, inner| {
            if outcome.is_ok() {
                let source = from.address() as usize..from.address() as usize + from.len();
                inner.memory.lock().copy_within(source, to.address() as usize);
            }
            drop((from, to));
            outcome
        });
        async move { answer.await.unwrap_or(Err(DeviceError::Closed)) }.boxed()
    }

    fn zero(&self, range: Arc<DeviceRange>) -> DeviceAnswer<Result<(), DeviceError>> {
        let zeros = Bytes::from(vec![0; range.len()]);
        self.upload(range, 0, zeros)
    }

    fn download(
        &self,
        from: Arc<DeviceRange>,
        offset: usize,
        len: usize,
        mut into: IoBuf,
        at: usize,
    ) -> DeviceAnswer<(IoBuf, Result<(), DeviceError>)> {
        let answer = self.submit(move |outcome, inner| {
            assert!(offset + len <= from.len(), "a copy stays within its range");
            if outcome.is_ok() {
                let start = from.address() as usize + offset;
                into[at..at + len].copy_from_slice(&inner.memory.lock()[start..start + len]);
            } else {
                into[at..at + len].fill(GARBAGE);
            }
            drop(from);
            (into, outcome)
        });
        let reason = "the task answers everything, unless its runtime has gone";
        async move { answer.await.expect(reason) }.boxed()
    }

    fn register(&self, _memory: StagingMemory) -> io::Result<()> {
        Ok(())
    }

    fn set_freed_hook(&self, hook: Box<dyn Fn() + Send + Sync>) {
        *self.inner.freed.lock() = Some(hook);
    }

    fn usage(&self) -> DeviceUsage {
        self.inner.ledger.lock().usage()
    }

    fn lost(&self) -> Option<Arc<str>> {
        self.inner.lost.lock().clone()
    }

    fn describe(&self) -> Arc<str> {
        "simulated".into()
    }

    fn close(&self) -> DeviceAnswer<Result<(), DeviceError>> {
        self.inner.queue.lock().closed = true;
        let inner = self.inner.clone();
        async move {
            let busy = || {
                let queue = inner.queue.lock();
                queue.running || !queue.jobs.is_empty()
            };
            while busy() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        }
        .boxed()
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDevice").field("usage", &self.ledger.lock().usage()).finish()
    }
}
