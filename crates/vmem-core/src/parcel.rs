//! Values that tasks set aside for callers, and that are taken back from those that do not come.
//!
//! A task that serves a caller holds a [`Delivery`], the caller's future a [`Parcel`]. What is
//! delivered lies in the parcel until the caller's future is polled, which may be never. Where the
//! value is shared and counted (bytes in object space, a piece of staging, granted space), the
//! delivery enters it into [`Unclaimed`], and a waiter for such things takes back what has lain
//! there for longer than [`GRACE`]. The caller then finds [`Unkept::Recalled`], and asks again.
//!
//! Invariant: a value leaves a parcel exactly once: by a claim, by a recall, or with the last
//! parcel. So a future that is left alone keeps nothing from others for longer than the grace. Used
//! by every call that waits.

mod unclaimed;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;

pub(crate) use unclaimed::Unclaimed;
use unclaimed::{Recall, Ticket};

use crate::latency::StageClock;
use crate::locks::{self, Lock};

/// How long a value waits for its caller while others wait for what it takes.
pub(crate) const GRACE: Duration = Duration::from_millis(20);

/// Why a parcel has no value for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unkept {
    /// The caller did not come within the grace.
    Recalled,
    /// The task ended without delivering: its runtime has gone.
    Abandoned,
}

/// What a task sets aside for a caller. If others could use something in it, it is taken back from
/// a caller that does not claim it. What only the caller can use stays, so that a future that is
/// polled rarely makes progress.
pub(crate) trait SetAside {
    fn is_shared(&self) -> bool;
}

impl SetAside for () {
    fn is_shared(&self) -> bool {
        false
    }
}

enum State<T> {
    Awaited,
    Ready(T, Option<Ticket>),
    Gone(Unkept),
}

struct Inner<T> {
    state: Lock<State<T>, { locks::PARCEL }>,
    /// Parcels that exist; once there is none there never is one again.
    receivers: AtomicUsize,
    changed: Notify,
    /// That of the read which it serves first.
    clock: Option<Arc<StageClock>>,
}

/// The receiving end. Several callers may share the value of one delivery.
pub(crate) struct Parcel<T>(Arc<Inner<T>>);

/// The sending end; one that is dropped abandons the parcel.
pub(crate) struct Delivery<T>(Arc<Inner<T>>);

/// The way to a parcel for callers that may join it.
pub(crate) struct WeakParcel<T>(Weak<Inner<T>>);

/// The two ends.
pub(crate) fn parcel<T>() -> (Delivery<T>, Parcel<T>) {
    parcel_on(None)
}

/// The two ends, where this clock measures what is delivered.
pub(crate) fn parcel_on<T>(clock: Option<Arc<StageClock>>) -> (Delivery<T>, Parcel<T>) {
    let inner = Arc::new(Inner::new(State::Awaited, clock));
    (Delivery(inner.clone()), Parcel(inner))
}

impl<T> Inner<T> {
    fn new(state: State<T>, clock: Option<Arc<StageClock>>) -> Self {
        let receivers = AtomicUsize::new(1);
        Inner { state: Lock::new(state), receivers, changed: Notify::new(), clock }
    }

    /// Replaces the state, and drops the previous one where no lock is held.
    fn replace(&self, state: State<T>) -> State<T> {
        let before = std::mem::replace(&mut *self.state.lock(), state);
        self.changed.notify_waiters();
        before
    }

    fn is_unwanted(&self) -> bool {
        self.receivers.load(Ordering::SeqCst) == 0
    }
}

impl<T: Send + 'static> Delivery<T> {
    /// Sets the value aside for the caller. With `unclaimed` it can be taken back from there.
    ///
    /// # Errors
    ///
    /// The value, if no caller wants it any more.
    pub(crate) fn deliver(self, value: T, unclaimed: Option<&Arc<Unclaimed>>) -> Result<(), T> {
        if self.0.is_unwanted() {
            return Err(value);
        }
        let ticket = unclaimed.map(|unclaimed| {
            let weak: Weak<Inner<T>> = Arc::downgrade(&self.0);
            unclaimed.enter(weak)
        });
        let before = self.0.replace(State::Ready(value, ticket));
        assert!(!matches!(before, State::Ready(..)), "a parcel has one delivery");
        // The last caller may have gone in between.
        if self.0.is_unwanted() {
            drop(self.0.replace(State::Gone(Unkept::Recalled)));
        }
        Ok(())
    }

    /// Whether every caller has gone.
    pub(crate) fn is_unwanted(&self) -> bool {
        self.0.is_unwanted()
    }

    /// Ends when every caller has gone.
    pub(crate) async fn unwanted(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.0.is_unwanted() {
                return;
            }
            changed.await;
        }
    }
}

impl<T> Drop for Delivery<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if matches!(*state, State::Awaited) {
            *state = State::Gone(Unkept::Abandoned);
            drop(state);
            self.0.changed.notify_waiters();
        }
    }
}

impl<T> Parcel<T> {
    /// A value that its caller works on a piece a poll, and that can be taken back in between.
    pub(crate) fn lend(value: T) -> Self {
        Parcel(Arc::new(Inner::new(State::Ready(value, None), None)))
    }

    /// As `lend`, and it can be taken back from now on.
    pub(crate) fn set_aside(value: T, unclaimed: &Arc<Unclaimed>) -> Self
    where
        T: Send + 'static,
    {
        let lent = Parcel::lend(value);
        // If it is gone already, its caller finds that.
        let _still_there = lent.with(unclaimed, |_| ());
        lent
    }

    /// Works on a lent value; from now on it can be taken back. `None` if it was.
    pub(crate) fn with<R>(
        &self,
        unclaimed: &Arc<Unclaimed>,
        work: impl FnOnce(&mut T) -> R,
    ) -> Option<R>
    where
        T: Send + 'static,
    {
        let weak: Weak<Inner<T>> = Arc::downgrade(&self.0);
        let fresh = unclaimed.enter(weak);
        let mut state = self.0.state.lock();
        let State::Ready(value, ticket) = &mut *state else { return None };
        let before = ticket.replace(fresh);
        let result = work(value);
        drop(state);
        drop(before);
        Some(result)
    }

    /// Ends the loan. `None` if the value was taken back.
    pub(crate) fn take_back(self) -> Option<T> {
        match std::mem::replace(&mut *self.0.state.lock(), State::Gone(Unkept::Recalled)) {
            State::Ready(value, _) => Some(value),
            State::Awaited | State::Gone(_) => None,
        }
    }

    /// Takes the value, once it was delivered.
    ///
    /// # Errors
    ///
    /// Why it never will be.
    pub(crate) async fn claim(&self) -> Result<T, Unkept> {
        self.wait(|state| match std::mem::replace(state, State::Gone(Unkept::Recalled)) {
            State::Ready(value, ticket) => (value, ticket),
            State::Awaited | State::Gone(_) => unreachable!("called for a value that is there"),
        })
        .await
        .map(|(value, _ticket)| value)
    }

    /// A clone of the value, once it was delivered.
    ///
    /// # Errors
    ///
    /// Why it never will be.
    pub(crate) async fn share(&self) -> Result<T, Unkept>
    where
        T: Clone,
    {
        self.wait(|state| match state {
            State::Ready(value, _) => value.clone(),
            State::Awaited | State::Gone(_) => unreachable!("called for a value that is there"),
        })
        .await
    }

    async fn wait<R>(&self, take: impl Fn(&mut State<T>) -> R) -> Result<R, Unkept> {
        loop {
            // Before the look, so that no change in between is missed.
            let changed = self.0.changed.notified();
            {
                let mut state = self.0.state.lock();
                match &*state {
                    State::Awaited => {}
                    State::Ready(..) => return Ok(take(&mut state)),
                    State::Gone(why) => return Err(*why),
                }
            }
            changed.await;
        }
    }

    pub(crate) fn clock(&self) -> Option<&Arc<StageClock>> {
        self.0.clock.as_ref()
    }

    pub(crate) fn downgrade(&self) -> WeakParcel<T> {
        WeakParcel(Arc::downgrade(&self.0))
    }
}

impl<T> Clone for Parcel<T> {
    fn clone(&self) -> Self {
        let before = self.0.receivers.fetch_add(1, Ordering::SeqCst);
        assert!(before > 0, "once there is no parcel there never is one again");
        Parcel(self.0.clone())
    }
}

impl<T> Drop for Parcel<T> {
    fn drop(&mut self) {
        if self.0.receivers.fetch_sub(1, Ordering::SeqCst) == 1 {
            let mut state = self.0.state.lock();
            let value = match &*state {
                State::Ready(..) => std::mem::replace(&mut *state, State::Gone(Unkept::Recalled)),
                State::Awaited | State::Gone(_) => State::Gone(Unkept::Recalled),
            };
            drop(state);
            drop(value);
            self.0.changed.notify_waiters();
        }
    }
}

impl<T> WeakParcel<T> {
    /// One more parcel, unless every caller has gone or the value was taken back.
    pub(crate) fn upgrade(&self) -> Option<Parcel<T>> {
        let inner = self.0.upgrade()?;
        let more = |receivers: usize| (receivers > 0).then(|| receivers + 1);
        inner.receivers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        let parcel = Parcel(inner);
        let gone = matches!(*parcel.0.state.lock(), State::Gone(_));
        (!gone).then_some(parcel)
    }

    /// Whether this leads to the same parcel.
    pub(crate) fn is_same(&self, other: &WeakParcel<T>) -> bool {
        Weak::ptr_eq(&self.0, &other.0)
    }
}

impl<T> fmt::Debug for Parcel<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parcel").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for WeakParcel<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakParcel").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Delivery<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").finish_non_exhaustive()
    }
}

impl<T: Send> Recall for Inner<T> {
    fn recall(&self) -> bool {
        let mut state = self.state.lock();
        let value = match &*state {
            State::Ready(..) => std::mem::replace(&mut *state, State::Gone(Unkept::Recalled)),
            State::Awaited => return false,
            State::Gone(_) => return true,
        };
        drop(state);
        drop(value);
        self.changed.notify_waiters();
        true
    }
}

#[cfg(test)]
mod tests;
