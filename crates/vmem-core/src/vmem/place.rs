//! The calls that place objects: promote, demote, prefetch, pin, flush.
//!
//! Invariant: each of these is a request to the actor, which runs it as a task, or a task that
//! starts at once; the caller's future waits for the answer and owns nothing of the migration.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use tokio::sync::oneshot;

use super::pin::{HoldGuard, PinGuard, pin};
use super::{Result, VirtualMemory};
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::{MemoryTier, Position};
use crate::migrate::{
    self, Move, PrefetchEnd, refresh_below, request_move, request_move_behind, request_prefetch,
};
use crate::object::{Named, Object, Shared};
use crate::parcel::parcel;
use crate::tier::HoldKind;

/// Objects that `flush_all` flushes at once.
const FLUSHES_MAX: usize = 256;

impl VirtualMemory {
    /// Promotes the object to `to`. `Ok` at once if it is there already, or in a faster tier.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable`, and those of a [`read`](Self::read) that has to promote it.
    pub async fn promote(&self, handle: &VMemHandle, to: MemoryTier) -> Result<()> {
        let object = self.check(handle)?;
        self.shared.check_tier(to)?;
        match to.position() {
            Position::Device(device) => {
                object.touch();
                self.shared.plans.used(device, object.id);
                self.ask(object, Move::ToDevice(device)).await
            }
            Position::Host if !object.is_on_any_device() => {
                self.shared.check_fits_host(object.len)?;
                object.touch();
                self.ask(object, Move::ToHost).await
            }
            Position::Below(level) if !object.has_host_space() && object.is_below(level) => {
                object.touch();
                self.ask(object, Move::PromoteTo(level)).await
            }
            Position::Host | Position::Below(_) => Ok(()),
        }
    }

    /// Demotes the object to `to`. `Ok` at once if it is there already, or in a slower tier.
    /// Readers keep their bytes. An object with a name goes no further than the tier that
    /// names lead to, mostly the disk.
    ///
    /// # Errors
    ///
    /// `Pinned`, `TierFull` if the tier has no space, `Io`; the object is then where it was.
    /// `TierNotAvailable` for a tier below host memory that the store has not.
    pub async fn demote(&self, handle: &VMemHandle, to: MemoryTier) -> Result<()> {
        let object = self.check(handle)?;
        match to.position() {
            Position::Below(level) => {
                self.shared.check_tier(to)?;
                self.ask(object, Move::DemoteTo(level)).await
            }
            Position::Host if !object.devices_with_space().is_empty() => {
                self.ask(object, Move::OffDevices).await
            }
            Position::Host | Position::Device(_) => Ok(()),
        }
    }

    /// Writes the current bytes to the object's home tier; bytes that are there already cost
    /// nothing. Covers every write that completed before the call. A named object is then durable,
    /// whatever its home: its bytes and its name survive a crash of the process and a power cut.
    ///
    /// # Errors
    ///
    /// `TierFull`, `Io`; `Damaged`. After an `Io` error of a sync nothing more is made durable
    /// until the store is opened again, and every flush fails: from then on the kernel treats the
    /// unwritten pages as written. Where several stores share their names, `VersionChanged`,
    /// `NameExists` or `NameNotFound` if another one has changed what had the name: the object is
    /// without it from then on.
    pub async fn flush(&self, handle: &VMemHandle) -> Result<()> {
        let object = self.check(handle)?;
        if object.has_name() {
            return self.flush_named(object.clone()).await;
        }
        if let Some(error) = object.named.get().and_then(Named::taken) {
            return Err(error);
        }
        match object.home.position() {
            Position::Device(device) => self.ask(object, Move::ToDevice(device)).await,
            Position::Below(_) => self.ask(object, Move::Flush).await,
            Position::Host if object.is_dirty_on_device() => {
                self.ask(object, Move::WriteBack).await
            }
            Position::Host => Ok(()),
        }
    }

    /// As [`flush`](Self::flush), for every object that existed when it was called. All are tried.
    ///
    /// # Errors
    ///
    /// `NotFlushed` with the names of those that are not durable; else the first error; the number
    /// of errors is logged.
    pub async fn flush_all(&self) -> Result<()> {
        self.check_open()?;
        let named = self.flush_all_named().await;
        // The deadline is for each object; the whole has none.
        let unnamed =
            self.change(|names, deadline| flush_unnamed(names.shared.clone(), deadline)).await;
        named.and(unnamed)
    }

    /// Makes the version that was last written back the current one, if the current one is lost
    /// since only a device had it (see [`WriteBack`](crate::WriteBack)): the device was lost, or a
    /// change of what a kernel had written before failed or was abandoned. An object whose version
    /// is not lost stays as it is.
    ///
    /// That is the version that was whole below host memory, or the zeros of a new object, when the
    /// object became dirty on the device; else, if it has a name, the version that is durable.
    /// Bytes that host memory alone had are not kept for this.
    ///
    /// # Errors
    ///
    /// `Device` if none was written back: [`write`](Self::write) gives the object bytes again.
    pub async fn revert(&self, handle: &VMemHandle) -> Result<()> {
        let object = self.check(handle)?;
        self.ask(object, Move::Revert).await?;
        self.bring_home(object);
        Ok(())
    }

    async fn ask(&self, object: &Arc<Object>, what: Move) -> Result<()> {
        ask(&self.shared, object, what, &self.shared.deadline()).await
    }

    /// Begins to promote the object to `to`, at lower priority than any read, and never at the
    /// cost of what is in use. It has started when this returns; dropping the [`Prefetch`] cancels
    /// it.
    pub fn prefetch(&self, handle: &VMemHandle, to: MemoryTier) -> Prefetch {
        self.prefetch_many(std::slice::from_ref(handle), to)
    }

    /// As [`prefetch`](Self::prefetch), for several objects in this order. It ends with the error
    /// of the first that failed, after all were tried. At once come 32 of them at most, and no more
    /// bytes than `staging_capacity`, but four in any case: so the first of many large objects
    /// are there soon.
    pub fn prefetch_many(&self, handles: &[VMemHandle], to: MemoryTier) -> Prefetch {
        let objects = handles
            .iter()
            .map(|handle| {
                let object = self.check(handle)?;
                self.shared.check_tier(to)?;
                if to == MemoryTier::Host {
                    self.shared.check_fits_host(object.len)?;
                }
                Ok(object.clone())
            })
            .collect::<Result<Vec<_>>>();
        let is_below = to.level().is_none_or(|level| self.shared.evicts_from(level));
        match objects {
            Err(error) => Prefetch::ended(Err(error)),
            // Nothing is promoted to the last tier.
            Ok(_) if !is_below => Prefetch::ended(Ok(())),
            Ok(objects) => Prefetch::start(&self.shared, objects, to),
        }
    }

    /// Promotes the object to `tier` and keeps it from being demoted until the guard is dropped.
    /// Pins are counted: the object stays until the last one is dropped.
    ///
    /// ```
    /// # use vmem::{MemoryTier, VirtualMemoryConfig, VirtualMemoryError};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), vmem::VirtualMemoryError> {
    /// # let config = VirtualMemoryConfig::builder().host_capacity(1 << 20).disk_capacity(1 << 20);
    /// # let vmem = vmem::open(config.build()?).await?;
    /// let handle = vmem.put(vec![7; 4096], MemoryTier::Disk).await?;
    /// let guard = vmem.pin(&handle, MemoryTier::Host).await?;
    /// let refused = vmem.demote(&handle, MemoryTier::Disk).await;
    /// assert!(matches!(refused, Err(VirtualMemoryError::Pinned { pins: 1, .. })));
    /// drop(guard);
    /// vmem.demote(&handle, MemoryTier::Disk).await?;
    /// # vmem.close().await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`promote`](Self::promote); `AllPinned` if `max_pinned` leaves no space for it
    /// until the deadline, `ExceedsCapacity` if it never could.
    pub async fn pin(&self, handle: &VMemHandle, tier: MemoryTier) -> Result<PinGuard> {
        let object = self.check(handle)?;
        self.shared.check_tier(tier)?;
        match tier.position() {
            // Nothing leaves the last tier, nor the one that the catalog leads to.
            Position::Below(level) if !self.shared.evicts_from(level) || object.stays_in(level) => {
                return Ok(PinGuard::of_nothing(handle));
            }
            Position::Host => self.shared.check_fits_host(object.len)?,
            Position::Below(_) | Position::Device(_) => {}
        }
        object.touch();
        if let Some(held) = HoldGuard::now(handle, tier, HoldKind::Pin)? {
            return Ok(PinGuard::of(handle, held));
        }
        Box::pin(async {
            let deadline = self.shared.deadline();
            loop {
                let pinned = pin(handle.clone(), tier, deadline);
                let parcel = self.shared.spawn_for_caller_briefly("vmem-pin", pinned);
                if let Some(guard) = self.shared.answer(&parcel, &deadline, "pinning").await? {
                    return Ok(guard);
                }
                self.check_open()?;
            }
        })
        .await
    }

    /// Promotes an object to its home device, or where it is held, again, in the background.
    pub(super) fn bring_home(&self, object: &Arc<Object>) {
        refresh(object);
    }
}

/// Promotes an object to its home device, and where it is held, in the background.
pub(super) fn refresh(object: &Arc<Object>) {
    if object.len == 0 {
        return;
    }
    refresh_below(object);
    for device in object.devices_to_refresh() {
        request_move_behind(object, Move::Refresh(MemoryTier::of_device(device as u8)));
    }
}

/// Has the actor move an object, and waits for the end.
pub(super) async fn ask(
    shared: &Arc<Shared>,
    object: &Arc<Object>,
    what: Move,
    deadline: &Deadline,
) -> Result<()> {
    let (reply, parcel) = parcel();
    request_move(object, what, *deadline, reply);
    shared.answer(&parcel, deadline, "moving an object").await.map(drop)
}

/// Flushes every object without a name that is not where its home is; all are tried.
async fn flush_unnamed(shared: Arc<Shared>, deadline: Deadline) -> Result<()> {
    let mut to_disk = Vec::new();
    let mut to_home = Vec::new();
    for object in shared.all().into_iter().filter(|object| !object.has_name()) {
        match object.home.position() {
            Position::Below(0) if object.is_dirty() => to_disk.push(object),
            Position::Below(level) if object.len > 0 && !object.is_stored_in(level) => {
                to_home.push((object, Move::Flush));
            }
            Position::Device(device) if object.len > 0 && !object.is_on(device) => {
                to_home.push((object, Move::ToDevice(device)));
            }
            Position::Host if object.is_dirty_on_device() => {
                to_home.push((object, Move::WriteBack));
            }
            _ => {}
        }
    }
    let (mut failed, first_error) = migrate::flush_many(&shared, to_disk, &deadline).await;
    let mut first_error = first_error.map(|error| shared.refused(error));
    let moves = to_home.into_iter().map(|(object, what)| {
        let shared = shared.clone();
        async move {
            // Each deadline starts when the flush of its object does.
            let deadline = shared.deadline();
            ask(&shared, &object, what, &deadline).await
        }
    });
    let mut moves = futures::stream::iter(moves).buffer_unordered(FLUSHES_MAX);
    while let Some(outcome) = moves.next().await {
        match outcome {
            // Freed meanwhile: there is nothing left to flush.
            Ok(()) | Err(VirtualMemoryError::HandleNotFound { .. }) => {}
            Err(error) => {
                failed += 1;
                first_error.get_or_insert(error);
            }
        }
    }
    if let Some(error) = &first_error {
        tracing::warn!(target: "vmem::migration", failed, %error, "objects were not flushed");
    }
    first_error.map_or(Ok(()), Err)
}

/// A prefetch that has started. Awaiting it tells how it ended; dropping it cancels it; detached it
/// runs on its own.
#[must_use = "dropping a prefetch cancels it; `detach` lets it run"]
pub struct Prefetch {
    state: State,
}

impl std::fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ended = matches!(self.state, State::Ended(_));
        f.debug_struct("Prefetch").field("ended", &ended).finish_non_exhaustive()
    }
}

enum State {
    Ended(Result<()>),
    Running { answer: BoxFuture<'static, Result<()>>, detached: Arc<AtomicBool> },
}

impl Prefetch {
    fn ended(outcome: Result<()>) -> Self {
        Prefetch { state: State::Ended(outcome) }
    }

    pub(super) fn start(shared: &Arc<Shared>, objects: Vec<Arc<Object>>, to: MemoryTier) -> Self {
        let (reply, answer) = oneshot::channel();
        let detached = Arc::new(AtomicBool::new(false));
        let end = PrefetchEnd { reply, detached: detached.clone() };
        let deadline = shared.deadline();
        request_prefetch(shared, objects, to, deadline, end);
        let answer = async move {
            match deadline.bound_answer(answer).await {
                Ok(answer) => answer.unwrap_or(Err(VirtualMemoryError::Closed)),
                Err(Late) => Err(deadline.error("prefetching")),
            }
        };
        let answer = answer.boxed();
        Prefetch { state: State::Running { answer, detached } }
    }

    /// Lets it run on without this future.
    pub fn detach(self) {
        if let State::Running { detached, .. } = &self.state {
            detached.store(true, Ordering::SeqCst);
        }
    }
}

impl Future for Prefetch {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.state {
            State::Ended(outcome) => Poll::Ready(outcome.clone()),
            State::Running { answer, .. } => answer.as_mut().poll(context),
        }
    }
}
