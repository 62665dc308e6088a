//! Placing: promote, demote, prefetch, pin, flush.
//!
//! Invariant: each of these is a request to the actor, which runs it as a task of its own; the
//! caller's future waits for the answer and owns nothing of the migration. A pin is counted under
//! the object's gate, so that no eviction is half way when it is granted.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Result, VirtualMemory};
use crate::actor::{Move, PrefetchEnd, Request};
use crate::error::VirtualMemoryError;
use crate::events::MigrationCause;
use crate::handle::VMemHandle;
use crate::host_queue::{Class, Need};
use crate::migrate::{Fetch, fetch_into};
use crate::object::{GatePass, Object};
use crate::shared::Shared;
use crate::tier::MemoryTier;

impl VirtualMemory {
    /// Brings the object up to `to`, to stay. Already there or faster: `Ok`.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable`, and those of a [`read`](Self::read) that has to bring it up.
    pub async fn promote(&self, handle: &VMemHandle, to: MemoryTier) -> Result<()> {
        let object = self.check(handle)?;
        match to {
            MemoryTier::Vram => {
                self.shared.vram()?;
                object.touch();
                self.ask(object, Move::Raise).await
            }
            MemoryTier::Host if object.in_vram() => Ok(()),
            MemoryTier::Host => {
                self.check_fits_host(object)?;
                object.touch();
                self.ask(object, Move::Up).await
            }
            MemoryTier::Disk => Ok(()),
        }
    }

    /// Takes the object down to `to`. Already there or slower: `Ok`. Readers keep their bytes.
    ///
    /// # Errors
    ///
    /// `Pinned`, `TierFull` if the tier has no room, `Io`; the object is then where it was.
    pub async fn demote(&self, handle: &VMemHandle, to: MemoryTier) -> Result<()> {
        let object = self.check(handle)?;
        match to {
            MemoryTier::Vram => Ok(()),
            MemoryTier::Host if !object.has_vram_room() => Ok(()),
            MemoryTier::Host => self.ask(object, Move::Lower).await,
            MemoryTier::Disk => self.ask(object, Move::Down).await,
        }
    }

    /// Puts the current bytes where the object's home tier is; what is already there costs nothing.
    /// Covers every write that completed before the call. A named object is durable then, wherever its
    /// home is: its bytes and its name survive the process and the power.
    ///
    /// # Errors
    ///
    /// `TierFull`, `Io`; `Damaged`. After an `Io` error of a sync nothing more is made durable until
    /// the store is opened again, and every flush says so: what the kernel could not write it takes
    /// for written from then on.
    pub async fn flush(&self, handle: &VMemHandle) -> Result<()> {
        let object = self.check(handle)?;
        if object.has_name() {
            return self.flush_named(object.clone()).await;
        }
        match object.home {
            MemoryTier::Disk => self.ask(object, Move::Flush).await,
            MemoryTier::Vram => self.ask(object, Move::Raise).await,
            MemoryTier::Host => Ok(()),
        }
    }

    /// As [`flush`](Self::flush), for every object that was there when it was called. All are tried.
    ///
    /// # Errors
    ///
    /// `NotFlushed` with the names of those that are not durable; else the first error, and how many
    /// there were goes to the log.
    pub async fn flush_all(&self) -> Result<()> {
        self.check_open()?;
        let named = self.flush_all_named().await;
        let mut failed = 0_usize;
        let mut first_error = None;
        for object in self.shared.all() {
            let what = match object.home {
                MemoryTier::Disk if object.is_dirty() => Move::Flush,
                MemoryTier::Vram if object.len > 0 && !object.in_vram() => Move::Raise,
                _ => continue,
            };
            if object.is_dead() || object.has_name() {
                continue;
            }
            match self.ask(&object, what).await {
                // Freed meanwhile: there is nothing left to flush.
                Ok(()) | Err(VirtualMemoryError::HandleNotFound { .. }) => {}
                Err(error) => {
                    failed += 1;
                    first_error.get_or_insert(error);
                }
            }
        }
        if let Some(error) = &first_error {
            tracing::warn!(target: "vmem", failed, %error, "objects were not flushed");
        }
        named.and(first_error.map_or(Ok(()), Err))
    }

    pub(super) async fn ask(&self, object: &Arc<Object>, what: Move) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let (asked, deadline) = (Instant::now(), self.shared.deadline());
        let object = object.clone();
        self.shared.requests.send(Request::Move { object, what, asked, deadline, reply }).await;
        answer.await.unwrap_or(Err(VirtualMemoryError::Closed))
    }

    fn check_fits_host(&self, object: &Object) -> Result<()> {
        if self.shared.fits_host(object.len) {
            Ok(())
        } else {
            Err(self.shared.exceeds_host(object.len))
        }
    }

    /// Begins to bring the object up to `to`, at lower priority than any read, and never at the cost
    /// of what is in use. It has started when this returns; dropping the [`Prefetch`] cancels it.
    pub fn prefetch(&self, handle: &VMemHandle, to: MemoryTier) -> Prefetch {
        self.prefetch_many(std::slice::from_ref(handle), to)
    }

    /// As [`prefetch`](Self::prefetch), for several objects in this order. It ends with the first
    /// error, after all were tried.
    pub fn prefetch_many(&self, handles: &[VMemHandle], to: MemoryTier) -> Prefetch {
        let objects = handles
            .iter()
            .map(|handle| {
                let object = self.check(handle)?;
                match to {
                    MemoryTier::Vram => self.shared.vram().map(|_| object.clone()),
                    MemoryTier::Host => self.check_fits_host(object).map(|()| object.clone()),
                    MemoryTier::Disk => Ok(object.clone()),
                }
            })
            .collect::<Result<Vec<_>>>();
        match objects {
            Err(error) => Prefetch::ended(Err(error)),
            Ok(_) if to == MemoryTier::Disk => Prefetch::ended(Ok(())),
            Ok(objects) => Prefetch::start(&self.shared, objects, to),
        }
    }

    /// Brings the object to `tier` and keeps it from leaving it downwards until the guard is
    /// dropped. Pins count: the object stays until the last one goes.
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
    /// Those of [`promote`](Self::promote); `AllPinned` if `max_pinned` leaves no room for it until
    /// the deadline, `ExceedsCapacity` if it never could.
    pub async fn pin(&self, handle: &VMemHandle, tier: MemoryTier) -> Result<PinGuard> {
        let object = self.check(handle)?;
        match tier {
            MemoryTier::Vram => Box::pin(self.pin_in_vram(handle)).await,
            // Nothing is below disk: there is nothing to keep it from.
            MemoryTier::Disk => Ok(PinGuard { object: None, tier, _handle: handle.clone() }),
            MemoryTier::Host => {
                self.check_fits_host(object)?;
                Box::pin(self.pin_in_host(handle)).await
            }
        }
    }

    async fn pin_in_host(&self, handle: &VMemHandle) -> Result<PinGuard> {
        let (object, tier) = (handle.object(), MemoryTier::Host);
        let (asked, deadline) = (Instant::now(), self.shared.deadline());
        object.touch();
        // The first pin of an object is charged, for as long as there is any. Whoever turns out not
        // to be the first gives the charge back.
        let (mut charge, mut asked_for) = (None, false);
        loop {
            if charge.is_none() && object.pins() == 0 {
                charge = Some(self.charge_pin(object, tier, asked, deadline).await?);
            }
            let mut room = None;
            if asked_for {
                // It came up and left again at once: this time the room is ours before the gate.
                if !object.has_host_room() {
                    let (len, owner, class) = (object.len, object.id, Class::Demand);
                    let need = Need { len, owner, class, may_spill: false };
                    room = Some(self.shared.host_room_or_error(need, deadline).await?);
                }
            } else {
                self.ask(object, Move::Up).await?;
                asked_for = true;
            }
            let pass = object.gate(deadline).await?;
            let missing = room.is_none() && object.len > 0 && !object.has_host_room();
            if missing || (charge.is_none() && object.pins() == 0) {
                continue;
            }
            let (class, cause) = (Class::Demand, MigrationCause::Promote);
            let (stay, unwanted) = (true, None);
            let job =
                Fetch { object: object.clone(), class, cause, stay, asked, deadline, unwanted };
            drop(fetch_into(&job, &pass, room).await?);
            if count_pin(&pass, tier, &mut charge) {
                return Ok(PinGuard {
                    object: Some(object.clone()),
                    tier,
                    _handle: handle.clone(),
                });
            }
        }
    }

    async fn pin_in_vram(&self, handle: &VMemHandle) -> Result<PinGuard> {
        let (object, tier) = (handle.object(), MemoryTier::Vram);
        let (asked, deadline) = (Instant::now(), self.shared.deadline());
        self.shared.vram()?;
        object.touch();
        let mut charge = None;
        loop {
            if charge.is_none() && object.vram_pins() == 0 {
                charge = Some(self.charge_pin(object, tier, asked, deadline).await?);
            }
            if !object.in_vram() {
                self.ask(object, Move::Raise).await?;
            }
            let pass = object.gate(deadline).await?;
            if object.len > 0 && !object.in_vram() {
                // It left again at once, or was written.
                drop(pass);
                if Instant::now() >= deadline {
                    let (operation, waited) = ("pinning in vram", asked.elapsed());
                    return Err(VirtualMemoryError::TimedOut { operation, waited });
                }
                continue;
            }
            if charge.is_none() && object.vram_pins() == 0 {
                continue;
            }
            if count_pin(&pass, tier, &mut charge) {
                return Ok(PinGuard {
                    object: Some(object.clone()),
                    tier,
                    _handle: handle.clone(),
                });
            }
        }
    }

    /// Brings the object to VRAM again, in the background.
    pub(super) fn refresh(&self, object: &Arc<Object>) {
        let (reply, _nobody_waits) = oneshot::channel();
        let (asked, deadline) = (Instant::now(), self.shared.deadline());
        let (object, what) = (object.clone(), Move::Refresh);
        let request = Request::Move { object, what, asked, deadline, reply };
        send_now(&self.shared, request);
    }

    /// Charges one pin, as soon as `max_pinned` allows it.
    pub(super) async fn charge_pin(
        &self,
        object: &Arc<Object>,
        tier: MemoryTier,
        asked: Instant,
        deadline: Instant,
    ) -> Result<Charge> {
        let footprint = self.shared.footprint_in(tier, object.len);
        let pins = self.shared.pins(tier)?;
        if footprint > pins.max() {
            return Err(VirtualMemoryError::ExceedsCapacity {
                tier,
                requested_bytes: footprint,
                capacity_bytes: pins.max(),
            });
        }
        loop {
            let unpinned = pins.gone();
            tokio::pin!(unpinned);
            // Before the look, so that a pin that goes in between is not missed.
            unpinned.as_mut().enable();
            self.check_open()?;
            if pins.try_charge(footprint) {
                return Ok(Charge { object: Some(object.clone()), tier });
            }
            if tokio::time::timeout_at(deadline, unpinned).await.is_err() {
                let (held_bytes, capacity_bytes) = match tier {
                    MemoryTier::Vram => (0, self.shared.vram()?.usage().capacity_bytes),
                    _ => (self.shared.copies.held_bytes(), self.shared.host_space()),
                };
                return Err(VirtualMemoryError::AllPinned {
                    tier,
                    requested_bytes: footprint,
                    pinned_bytes: pins.bytes(),
                    leased_bytes: 0,
                    held_bytes,
                    capacity_bytes,
                    waited: asked.elapsed(),
                });
            }
        }
    }
}

/// Counts one more pin under the gate. False if it needs a charge: the last pin went meanwhile, and its
/// charge with it.
fn count_pin(pass: &GatePass, tier: MemoryTier, charge: &mut Option<Charge>) -> bool {
    let object = pass.object();
    match charge.take() {
        Some(charge) if object.add_pin(tier, pass) => {
            charge.keep();
            true
        }
        Some(_) => true,
        None => object.try_add_pin(tier, pass),
    }
}

/// Hands a request to the actor for which nobody waits.
pub(super) fn send_now(shared: &Arc<Shared>, request: Request) {
    if let Err(request) = shared.requests.try_send(request) {
        // The queue is full: it stands in line there, and the caller does not.
        let shared = shared.clone();
        let runtime = shared.runtime.clone();
        drop(runtime.spawn(async move { shared.requests.send(request).await }));
    }
}

/// A charge against `max_pinned`, until it is kept.
pub(super) struct Charge {
    object: Option<Arc<Object>>,
    tier: MemoryTier,
}

impl Charge {
    /// The pins of the object have it now; the last one gives it back.
    fn keep(mut self) {
        self.object = None;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            object.shared.uncharge_pin(self.tier, object.len);
        }
    }
}

/// Keeps an object in its tier; dropping it unpins. It holds a handle, so a pinned object is
/// alive unless it is freed.
#[must_use = "dropping the guard unpins"]
#[derive(Debug)]
pub struct PinGuard {
    object: Option<Arc<Object>>,
    tier: MemoryTier,
    _handle: VMemHandle,
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        if object.remove_pin(self.tier) {
            object.shared.uncharge_pin(self.tier, object.len);
        }
    }
}

/// A prefetch that has started. Awaiting it tells how it ended; dropping it cancels it; detached it
/// runs on its own.
#[must_use = "dropping a prefetch cancels it; `detach` lets it run"]
#[derive(Debug)]
pub struct Prefetch {
    state: State,
}

#[derive(Debug)]
enum State {
    Ended(Result<()>),
    Running { answer: oneshot::Receiver<Result<()>>, detached: Arc<AtomicBool> },
}

impl Prefetch {
    fn ended(outcome: Result<()>) -> Self {
        Prefetch { state: State::Ended(outcome) }
    }

    fn start(shared: &Arc<Shared>, objects: Vec<Arc<Object>>, to: MemoryTier) -> Self {
        let (reply, answer) = oneshot::channel();
        let detached = Arc::new(AtomicBool::new(false));
        let end = PrefetchEnd { reply, detached: detached.clone() };
        let (asked, deadline) = (Instant::now(), shared.deadline());
        let request = Request::Prefetch { objects, to, asked, deadline, end };
        send_now(shared, request);
        Prefetch { state: State::Running { answer, detached } }
    }

    /// Lets it run on with nobody waiting for it.
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
            State::Running { answer, .. } => Pin::new(answer)
                .poll(context)
                .map(|answer| answer.unwrap_or(Err(VirtualMemoryError::Closed))),
        }
    }
}
