//! A ring with its jobs, under a lock that one thread at a time has.
//!
//! Invariant: whatever ends in a turn is delivered once the lock is gone. Called by the reactor,
//! and by the task that drains the ring.

use std::fmt;
use std::io;
use std::thread;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::STUCK_MAX;
use super::ring::{Ring, same};
use crate::driver::RETRY_AFTER;
use crate::driver::closed_error;
use crate::driver::job::Job;

/// One ring, and what it takes to wait for it.
pub(super) struct Lane {
    pub(super) state: Mutex<State>,
    /// Rung for the task of the lane: something is to be tried again, or the lane closes.
    pub(super) kick: Notify,
    /// Rung when a closing lane has no jobs any more.
    pub(super) idle: Notify,
}

pub(super) struct State {
    /// Gone once the lane is closed.
    pub(super) ring: Option<Ring>,
    pub(super) closing: bool,
    /// Why the kernel takes nothing any more.
    pub(super) refusal: Option<io::Error>,
    /// Since when it has left something that was submitted.
    pub(super) stuck_since: Option<Instant>,
}

impl Lane {
    pub(super) fn new(ring: Ring) -> Self {
        Lane {
            state: Mutex::new(State {
                ring: Some(ring),
                closing: false,
                refusal: None,
                stuck_since: None,
            }),
            kick: Notify::new(),
            idle: Notify::new(),
        }
    }

    /// Submits a job and takes what is complete, which may be the same job.
    pub(super) fn start(&self, mut state: MutexGuard<'_, State>, job: Box<Job>) {
        if let Err(error) = state.accepts() {
            drop(state);
            return job.refuse(error);
        }
        if let Some(ring) = &mut state.ring {
            ring.insert(job);
        }
        self.turn(state);
    }

    /// Submits what is to be submitted, and takes what is complete until there is no more of
    /// either. Jobs that are over are delivered with the lock released.
    pub(super) fn turn(&self, mut state: MutexGuard<'_, State>) {
        let mut over = Vec::new();
        state.turn(&mut over);
        let kick = state.ring.as_ref().is_some_and(Ring::wants_retry);
        let idle = state.is_idle();
        drop(state);
        over.into_iter().for_each(Job::deliver);
        if kick {
            self.kick.notify_one();
        }
        if idle {
            self.idle.notify_waiters();
        }
    }

    pub(super) fn begin_close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        self.turn(state);
        self.kick.notify_one();
    }

    /// Waits until a lane that closes has no jobs, and takes its ring away.
    pub(super) async fn closed(&self) -> Option<Ring> {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if let Some(ring) = self.take_idle_ring() {
                return Some(ring);
            }
            if self.is_gone() {
                return None;
            }
            idle.await;
        }
    }

    pub(super) fn take_idle_ring(&self) -> Option<Ring> {
        let mut state = self.state.lock();
        if state.is_idle() { state.ring.take() } else { None }
    }

    /// Waits for all jobs, blocking, without the runtime; then drops the ring.
    pub(super) fn drain(&self) {
        while !self.is_gone() {
            if let Some(ring) = self.take_idle_ring() {
                drop(ring);
                break;
            }
            let mut over = Vec::new();
            let refused = {
                let mut state = self.state.lock();
                state.turn(&mut over);
                let waiting = over.is_empty() && !state.is_idle();
                let ring = state.ring.as_mut().filter(|_| waiting);
                ring.is_some_and(|ring| ring.wants_retry() || ring.submit_and_wait().is_err())
            };
            over.into_iter().for_each(Job::deliver);
            if refused {
                thread::sleep(RETRY_AFTER);
                self.retry();
            }
        }
        self.idle.notify_waiters();
    }

    pub(super) fn retry(&self) {
        let mut state = self.state.lock();
        if let Some(ring) = &mut state.ring {
            ring.unpark();
        }
        self.turn(state);
    }

    /// Whether its ring was taken away, after which there is nothing to do.
    pub(super) fn is_gone(&self) -> bool {
        self.state.lock().ring.is_none()
    }

    /// Whether its task is needed no more, and else whether something is to be tried again.
    pub(super) fn outlook(&self) -> (bool, bool) {
        let state = self.state.lock();
        let retry = state.ring.as_ref().is_some_and(Ring::wants_retry);
        (state.ring.is_none() || state.is_idle(), retry)
    }
}

impl State {
    pub(super) fn accepts(&self) -> io::Result<()> {
        match (&self.refusal, self.closing || self.ring.is_none()) {
            (_, true) => Err(closed_error()),
            (Some(refusal), false) => Err(same(refusal)),
            (None, false) => Ok(()),
        }
    }

    /// It closes, and has no jobs.
    pub(super) fn is_idle(&self) -> bool {
        self.closing && self.ring.as_ref().is_some_and(|ring| ring.jobs() == 0)
    }

    pub(super) fn turn(&mut self, over: &mut Vec<Box<Job>>) {
        let Some(ring) = &mut self.ring else { return };
        loop {
            let outcome = ring.submit();
            let more = ring.reap(over);
            if !ring.has_unsent() {
                self.stuck_since = None;
            } else if self.stuck_since.is_none() {
                self.stuck_since = Some(Instant::now());
            }
            let refusal = match (outcome, self.stuck_since) {
                (Err(refusal), _) => refusal,
                (Ok(()), Some(since)) if since.elapsed() > STUCK_MAX => {
                    io::ErrorKind::ResourceBusy.into()
                }
                (Ok(()), None) if more => continue,
                (Ok(()), _) => return,
            };
            tracing::error!(
                target: "vmem::disk", error = %refusal, "io_uring takes no more operations"
            );
            ring.give_up(&refusal, over);
            self.refusal = Some(refusal);
            return;
        }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lane = f.debug_struct("Lane");
        if let Some(state) = self.state.try_lock() {
            lane.field("ring", &state.ring).field("closing", &state.closing);
        }
        lane.finish_non_exhaustive()
    }
}
