//! The gate of an object: one change of its residency at a time.
//!
//! Invariant: only the holder of the [`GatePass`] writes to the object, publishes or takes away one
//! of its copies, or frees what it owns. The last pass of an object that was freed meanwhile gives
//! back all that it owns, so freeing needs no runtime and no wait.
//!
//! Tasks of the runtime stand in line ([`Object::gate`]): a pass that is dropped goes to the first
//! of them. A caller's future takes the gate only if it is open ([`Object::gate_if_open`]), gives
//! it back before its poll ends, and otherwise waits for [`Object::gate_opened`], which gives it no
//! pass: so a future that is left alone keeps no other task from the object. Called by every
//! operation but a read.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Notify, oneshot};

use super::Object;
use crate::deadline::{Deadline, Late};
use crate::error::VirtualMemoryError;
use crate::latency::{self, ReadStage};

/// The waiters for the gate.
#[derive(Default)]
pub(super) struct Line {
    /// A pass travels through the channel, so that a task that is dropped on the way hands it on.
    tasks: VecDeque<oneshot::Sender<GatePass>>,
    /// Rung for every caller's future when no task wants the gate.
    opened: Option<Arc<Notify>>,
}

/// The right to change an object.
#[must_use]
#[derive(Debug)]
pub(crate) struct GatePass {
    /// Empty once the right was handed on.
    object: Option<Arc<Object>>,
    /// Whether the evictor is woken when the gate opens. Not by the evictor's own passes: it would
    /// wake itself for ever.
    rings: bool,
    /// Whether the object is offered for leaving memory when the gate opens. Not if this pass was
    /// taken to check that.
    offers: bool,
}

impl GatePass {
    fn to(object: &Arc<Object>) -> Self {
        GatePass { object: Some(object.clone()), rings: true, offers: true }
    }

    pub(crate) fn object(&self) -> &Arc<Object> {
        self.object.as_ref().expect("invariant: only a pass that is being dropped is empty")
    }
}

impl Object {
    /// The pass, if it is free and the object is alive; for the evictor.
    pub(crate) fn try_gate_quietly(self: &Arc<Self>) -> Option<GatePass> {
        let mut pass = self.try_gate()?;
        pass.rings = false;
        Some(pass)
    }

    /// The pass, if it is free and the object is alive; for the check whether it can leave memory.
    pub(crate) fn try_gate_to_leave(self: &Arc<Self>) -> Option<GatePass> {
        let mut pass = self.try_gate_quietly()?;
        pass.offers = false;
        Some(pass)
    }

    /// The pass, if it is free and the object is alive.
    pub(crate) fn try_gate(self: &Arc<Self>) -> Option<GatePass> {
        if self.is_dead() {
            return None;
        }
        self.try_gate_dead_or_alive()
    }

    /// The pass, if it is free.
    pub(super) fn try_gate_dead_or_alive(self: &Arc<Self>) -> Option<GatePass> {
        let inner = self.inner.lock();
        if self.is_changing() {
            return None;
        }
        assert!(inner.rare.line.is_none(), "nobody stands in line for an open gate");
        self.gate_taken.store(true, Ordering::SeqCst);
        drop(inner);
        Some(GatePass::to(self))
    }

    /// The pass, if it is free; for a caller's future, which gives it back before its poll ends.
    ///
    /// # Errors
    ///
    /// `HandleNotFound` if the object was freed.
    pub(crate) fn gate_if_open(self: &Arc<Self>) -> Result<Option<GatePass>, VirtualMemoryError> {
        if self.is_dead() {
            return Err(self.not_found());
        }
        Ok(self.try_gate())
    }

    /// Waits until the gate is open, or was for a moment.
    ///
    /// # Errors
    ///
    /// `HandleNotFound` if the object was freed, `TimedOut` at the deadline.
    pub(crate) async fn gate_opened(&self, deadline: &Deadline) -> Result<(), VirtualMemoryError> {
        let opened = {
            let mut inner = self.inner.lock();
            if self.is_dead() {
                return Err(self.not_found());
            }
            if !self.is_changing() {
                return Ok(());
            }
            let opened = inner.rare.change(|rare| {
                rare.line.get_or_insert_default().opened.get_or_insert_default().clone()
            });
            // Under the lock: no opening after this one is missed.
            opened.notified_owned()
        };
        let _stage = latency::enter(ReadStage::Gate);
        deadline.bound(opened).await.map_err(|Late| gate_late(deadline))
    }

    /// The pass, in turn; for a task of the runtime, which is always polled.
    ///
    /// # Errors
    ///
    /// `HandleNotFound` if the object was freed, `TimedOut` at the deadline.
    pub(crate) async fn gate(
        self: &Arc<Self>,
        deadline: &Deadline,
    ) -> Result<GatePass, VirtualMemoryError> {
        let turn = {
            let mut inner = self.inner.lock();
            if self.is_dead() {
                return Err(self.not_found());
            }
            if !self.is_changing() {
                assert!(inner.rare.line.is_none(), "nobody stands in line for an open gate");
                self.gate_taken.store(true, Ordering::SeqCst);
                return Ok(GatePass::to(self));
            }
            let (sender, turn) = oneshot::channel();
            inner.rare.change(|rare| rare.line.get_or_insert_default().tasks.push_back(sender));
            turn
        };
        let _stage = latency::enter(ReadStage::Gate);
        match deadline.bound(turn).await {
            Ok(Ok(pass)) if self.is_dead() => {
                drop(pass);
                Err(self.not_found())
            }
            Ok(Ok(pass)) => Ok(pass),
            Ok(Err(_)) => Err(self.not_found()),
            Err(Late) => Err(gate_late(deadline)),
        }
    }
}

fn gate_late(deadline: &Deadline) -> VirtualMemoryError {
    deadline.error("waiting for another change of the object")
}

impl Drop for GatePass {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        loop {
            let Some(next) = object.next_in_line(self.rings, self.offers) else { return };
            match next.send(GatePass::to(&object)) {
                Ok(()) => return,
                // This waiter has left: the pass goes to the next one.
                Err(mut returned) => drop(returned.object.take()),
            }
        }
    }
}

impl Object {
    /// The waiter that gets the gate next. Without one the gate opens, or, if the object was freed,
    /// everything that it owns is given back, and the gate stays shut.
    fn next_in_line(
        self: &Arc<Self>,
        rings: bool,
        offers: bool,
    ) -> Option<oneshot::Sender<GatePass>> {
        let mut inner = self.inner.lock();
        assert!(self.is_changing(), "only its holder hands the gate on");
        let line = inner.rare.get_mut().and_then(|rare| rare.line.as_mut());
        if let Some(next) = line.and_then(|line| line.tasks.pop_front()) {
            return Some(next);
        }
        let opened = inner.rare.change(|rare| rare.line.take()).and_then(|line| line.opened);
        if self.is_dead() {
            drop(inner);
            self.reclaim();
        } else {
            self.gate_taken.store(false, Ordering::SeqCst);
            drop(inner);
            if rings {
                // What was being changed can be evicted now.
                self.shared.space_was_freed();
            }
            if offers {
                // The copy that kept it in memory may have gone.
                self.offer_if_closed();
            }
        }
        if let Some(opened) = opened {
            opened.notify_waiters();
        }
        None
    }
}
