//! The VRAM tier over CUDA: memory of the device, a thread for each direction.
//!
//! Invariant: a range that is free is used by no copy and no kernel: each user of a range has a
//! share of it. Called by the core.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cudarc::driver::CudaStream;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{join_all, ready};
use parking_lot::Mutex;
use vmem_core::backend::{
    DeviceAnswer, DeviceBackend, DeviceError, DeviceRange, DeviceUsage, IoBuf, MissingPages,
    ObjectSpace, StagingMemory, UseEnd,
};

use vmem_core::{Budget, MemoryTier, SwitchPoints, VirtualMemoryError};

use crate::backlog::parts;
use crate::call::{Call, Foreign};
use crate::card::{Card, Way};
use crate::copy::Work;
use crate::given::Given;
use crate::lane::{Lane, Lost};
use crate::lend::Lent;
use crate::limit::in_real_time;
use crate::memory::{Memory, Reserved};
use crate::mover::Mover;
use crate::order::StreamEnd;
use crate::siblings::Siblings;
use crate::trial;
use crate::watch::{Answer, Keep, Watch, Watched};

/// Copies that have not ended by then, after the tier was closed, are left behind with all that
/// they own.
const LAST_COPIES: Duration = Duration::from_secs(10);

/// The VRAM tier of one device.
#[derive(Debug)]
pub struct CudaTier {
    /// `None` after the tier was closed. First, so that a thread that is bound to it drops its last
    /// share.
    card: Mutex<Option<Arc<Card>>>,
    memory: Arc<Memory>,
    /// Where memory is pages.
    mover: Option<Mover>,
    up: Lane,
    down: Lane,
    /// For copies from and to memory of callers, which wait for what those have queued.
    side: Lane,
    watch: Watch,
    lost: Lost,
    described: Arc<str>,
    settings: Settings,
}

/// What a tier is opened with, besides its device.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) switch_points: SwitchPoints,
    /// How long a call waits for what others have, or do.
    pub(crate) wait_timeout: Duration,
    /// The runtime of the store, where one opened it.
    pub(crate) runtime: Option<tokio::runtime::Handle>,
}

impl CudaTier {
    /// Takes memory on the device and starts the threads.
    ///
    /// # Errors
    ///
    /// What the driver says, in words.
    pub(crate) fn open(
        ordinal: usize,
        name: &str,
        budget: Budget,
        settings: Settings,
    ) -> Result<Arc<Self>, String> {
        let lost = Lost::default();
        let points = settings.switch_points;
        let card = Card::open(ordinal, budget, points, lost.clone(), Way::wanted())?;
        let up = Lane::start("vmem-gpu-up", card.clone())?;
        let down = Lane::start("vmem-gpu-down", card.clone())?;
        let side = Lane::start("vmem-gpu-side", card.clone())?;
        let watch = Watch::start(card.clone())?;
        let described = format!("{name} (device {ordinal}), {} bytes", card.capacity()).into();
        let memory = Memory::new(&card);
        let start = |_| Mover::start(card.clone(), memory.clone(), lost.clone());
        let mover = card.pages().map(start).transpose()?;
        let tier = Arc::new(CudaTier {
            card: Mutex::new(Some(card)),
            memory,
            mover,
            up,
            down,
            side,
            watch,
            lost,
            described,
            settings,
        });
        trial::copy(&tier)?;
        Ok(tier)
    }

    /// The context and its memory.
    ///
    /// # Errors
    ///
    /// `Closed`; `TierNotAvailable` if the device is lost.
    pub(crate) fn card(&self) -> Result<Arc<Card>, VirtualMemoryError> {
        if let Some(reason) = self.lost.get() {
            let reason = reason.clone();
            return Err(VirtualMemoryError::tier_not_available(MemoryTier::Vram, reason));
        }
        self.card.lock().clone().ok_or(VirtualMemoryError::Closed)
    }

    /// Copies bytes into memory of a caller.
    pub(crate) fn give(
        &self,
        to: Foreign,
        pieces: Vec<Given>,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        let (reply, answer) = oneshot::channel();
        self.side.submit(Work::Give { to, pieces, reply });
        answer.map(answered).boxed()
    }

    /// Copies bytes out of memory of a caller, to the front of a buffer.
    pub(crate) fn take(
        &self,
        from: Foreign,
        offset: usize,
        len: usize,
        into: IoBuf,
    ) -> DeviceAnswer<(IoBuf, Result<(), DeviceError>)> {
        let (reply, answer) = oneshot::channel();
        self.side.submit(Work::Take { from, offset, len, into, reply });
        let gone = |_| (IoBuf::from_vec(Vec::new()), Err(DeviceError::Closed));
        answer.map(move |answer| answer.unwrap_or_else(gone)).boxed()
    }

    /// The runtime for what must not wait for a caller, if there is one.
    pub(crate) fn runtime(&self) -> Option<tokio::runtime::Handle> {
        let stored = self.settings.runtime.clone();
        stored.or_else(|| tokio::runtime::Handle::try_current().ok())
    }

    /// Waits no longer than the store waits for anything.
    ///
    /// # Errors
    ///
    /// `TimedOut`.
    pub(crate) async fn within<T>(
        &self,
        operation: &'static str,
        wait: impl Future<Output = T>,
    ) -> Result<T, VirtualMemoryError> {
        let asked = std::time::Instant::now();
        in_real_time(self.settings.wait_timeout, wait)
            .await
            .ok_or_else(|| VirtualMemoryError::TimedOut { operation, waited: asked.elapsed() })
    }

    /// Keeps `keep` until everything has ended that the stream, and what was lent on it, has by
    /// now. On any thread; waits for nothing. Where the driver gives no event now, it is asked
    /// again; where it gives one, that is where the work ends.
    pub(crate) fn keep_until_passed(
        &self,
        card: &Arc<Card>,
        stream: &Arc<CudaStream>,
        mut lent: Vec<Lent>,
        keep: impl FnOnce(Option<UseEnd>) -> Keep,
    ) -> (Answer, Option<UseEnd>) {
        let marked = card.mark(stream, &mut lent);
        let unmarked = marked.as_ref().err().map(|unmarked| format!("{unmarked:?}"));
        let event = marked.ok().map(Arc::new);
        let end = event.as_ref().map(|event| StreamEnd::of(stream, event));
        let (watched, answer) = Watched::new(stream.clone(), event, lent, keep(end.clone()));
        self.watch.submit(watched, card);
        if let Some(error) = unmarked {
            // Last: a subscriber that panics takes nothing with it.
            tracing::debug!(target: "vmem::gpu", error, "a stream gives no event now");
        }
        (answer, end)
    }

    /// Ends a call over memory of a caller: what of it was not begun is not begun any more, and
    /// what the caller's stream gets from now on comes after what was.
    /// True if it was put behind something in flight.
    pub(crate) fn cancel(&self, call: &Call, card: &Card, stream: &CudaStream) -> bool {
        call.cancel(|| {
            // The last share of the stream may end here.
            let ordered = card
                .context()
                .visit(|| self.side.stream().is_none_or(|side| card.order(&side, stream)));
            ordered.unwrap_or(false)
        })
    }

    /// On the stream of copies to the device.
    fn have_copied(
        &self,
        work: impl FnOnce(oneshot::Sender<Result<(), DeviceError>>) -> Work,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        let (reply, answer) = oneshot::channel();
        self.up.submit(work(reply));
        answer.map(answered).boxed()
    }
}

impl DeviceBackend for CudaTier {
    fn reserve(&self, len: usize) -> Option<DeviceRange> {
        if self.lost.get().is_some() {
            return None;
        }
        match self.memory.reserve(len) {
            Reserved::Range(range) => Some(range),
            Reserved::After(plan) => {
                let submitted = match &self.mover {
                    Some(mover) => mover.submit(plan),
                    None => Err(plan),
                };
                if let Err(plan) = submitted {
                    self.memory.settle(plan, false);
                }
                None
            }
            Reserved::None => None,
        }
    }

    fn reserve_outside(&self, len: usize, window: &Range<u64>) -> Option<DeviceRange> {
        self.memory.reserve_outside(len, window)
    }

    fn footprint(&self, len: usize) -> u64 {
        self.memory.footprint(len)
    }

    fn free_from(&self, address: u64) -> u64 {
        self.memory.free_from(address)
    }

    fn coming_bytes(&self) -> u64 {
        self.memory.coming_bytes()
    }

    fn missing_pages(&self, footprint: u64) -> Option<MissingPages> {
        self.memory.missing_pages(footprint)
    }

    fn resizes_by(&self) -> Option<u64> {
        self.memory.page_bytes()
    }

    fn set_budget(&self, bytes: u64) {
        self.memory.set_budget(bytes);
    }

    fn budget(&self) -> u64 {
        self.memory.budget()
    }

    fn grow(&self, bytes: u64) -> DeviceAnswer<Result<u64, DeviceError>> {
        let grown = self.mover.as_ref().map(|mover| mover.take_more(bytes));
        grown.unwrap_or_else(|| ready(Ok(0)).boxed())
    }

    fn shrink(
        &self,
        bytes: u64,
        range: Option<DeviceRange>,
    ) -> DeviceAnswer<Result<u64, DeviceError>> {
        let given = |mover: &Mover| mover.give_back(self.memory.let_leave(bytes, range));
        self.mover.as_ref().map_or_else(|| ready(Ok(0)).boxed(), given)
    }

    fn upload(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        self.have_copied(|reply| Work::Upload { to, offset, bytes, reply })
    }

    fn upload_behind(
        &self,
        to: Arc<DeviceRange>,
        offset: usize,
        bytes: Bytes,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        let submit = |(at, bytes)| {
            let (reply, answer) = oneshot::channel();
            let offset = offset + at;
            self.up.submit_behind(Work::Upload { to: to.clone(), offset, bytes, reply });
            answer.map(answered)
        };
        // The error comes once all have ended.
        let all = join_all(parts(&bytes).map(submit).collect::<Vec<_>>());
        all.map(|ended| ended.into_iter().collect()).boxed()
    }

    fn zero(&self, range: Arc<DeviceRange>) -> DeviceAnswer<Result<(), DeviceError>> {
        self.have_copied(|reply| Work::Zero { range, reply })
    }

    fn copy_within(
        &self,
        from: Arc<DeviceRange>,
        to: Arc<DeviceRange>,
    ) -> DeviceAnswer<Result<(), DeviceError>> {
        self.have_copied(|reply| Work::Within { from, to, reply })
    }

    fn download(
        &self,
        from: Arc<DeviceRange>,
        offset: usize,
        len: usize,
        into: IoBuf,
        at: usize,
    ) -> DeviceAnswer<(IoBuf, Result<(), DeviceError>)> {
        let (reply, answer) = oneshot::channel();
        self.down.submit(Work::Download { from, offset, len, into, at, reply });
        let gone = |_| (IoBuf::from_vec(Vec::new()), Err(DeviceError::Closed));
        answer.map(move |answer| answer.unwrap_or_else(gone)).boxed()
    }

    fn register(&self, memory: StagingMemory) -> io::Result<()> {
        let card = self.card.lock().clone().ok_or(io::ErrorKind::NotConnected)?;
        let siblings = card.siblings().get().ok_or(io::ErrorKind::NotConnected)?.clone();
        // The thread belongs to the caller that opens the store, and keeps its context.
        let registering = std::thread::spawn(move || {
            card.context().bind().and_then(|()| siblings.register(memory)).map_err(|error| {
                io::Error::other(crate::card::told("registering staging memory", error))
            })
        });
        registering.join().unwrap_or_else(|_| Err(io::Error::other("the driver panicked")))
    }

    fn register_space(&self, space: ObjectSpace) {
        if let Some(card) = &*self.card.lock() {
            card.siblings().get_or_init(|| Siblings::join(space, card.context()));
        }
    }

    fn set_freed_hook(&self, hook: Box<dyn Fn() + Send + Sync>) {
        self.lost.tell(hook);
    }

    fn usage(&self) -> DeviceUsage {
        self.memory.usage()
    }

    fn lost(&self) -> Option<Arc<str>> {
        self.lost.get().cloned()
    }

    fn describe(&self) -> Arc<str> {
        self.described.clone()
    }

    fn close(&self) -> DeviceAnswer<Result<(), DeviceError>> {
        self.card.lock().take();
        self.up.close();
        self.down.close();
        self.side.close();
        self.watch.close();
        let lanes = futures::future::join3(self.up.ended(), self.down.ended(), self.side.ended());
        let moved = self.mover.as_ref().map(|mover| {
            mover.close();
            mover.ended()
        });
        let ended = futures::future::join3(lanes, self.watch.ended(), join_all(moved));
        async move {
            let in_time = in_real_time(LAST_COPIES, ended).await;
            in_time.map(drop).ok_or_else(|| DeviceError::Failed {
                operation: "closing the device",
                code: 0,
                message: "copies have not ended; what they use is never freed".into(),
            })
        }
        .boxed()
    }
}

fn answered(answer: Result<Result<(), DeviceError>, oneshot::Canceled>) -> Result<(), DeviceError> {
    answer.unwrap_or(Err(DeviceError::Closed))
}
