//! Leases that change an object on its device behind a kernel that has not ended yet, so that the
//! host need not wait between two kernels that follow each other there anyway.
//!
//! Invariant: one at a time has the object. What they wrote becomes the current version once the
//! last of them has ended; the task that waits for the kernels (`migrate/kernel`) has the gate
//! until then, and takes them in their order. None begins where somebody waits for the gate, where
//! the version is to be written back by now, or after `COUNT_MAX`: so what they wrote is published
//! now and then. Begun by leases, under the lock of the object.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::{Inner, Object};
use crate::device::{DeviceAnswer, DeviceError, DeviceRange, UseEnd};
use crate::error::VirtualMemoryError;
use crate::locks::{self, Lock};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// How many others begin behind one that was pending.
const COUNT_MAX: u32 = 1024;

/// A version that a kernel writes on a device, and that is not published yet.
pub(super) struct Pending {
    pub(super) device: usize,
    /// None if each lease is published before the next.
    pub(super) successors: Option<Arc<Successors>>,
}

/// See the module's documentation.
pub(crate) struct Successors {
    state: Lock<State, { locks::SUCCESSORS }>,
    /// For the one task that takes them.
    changed: Notify,
    /// Until when others begin.
    until: Option<Instant>,
}

#[derive(Default)]
struct State {
    /// How many have begun.
    count: u32,
    /// None begins any more.
    is_closed: bool,
    /// One has the object.
    is_out: bool,
    /// The last one wrote, and gave up.
    is_abandoned: bool,
    ended: VecDeque<Successor>,
    /// Why none of them is published.
    failed: Option<VirtualMemoryError>,
}

/// One that has ended: it has written once it is ready.
pub(crate) struct Successor {
    pub(crate) ready: DeviceAnswer<std::result::Result<(), DeviceError>>,
    pub(crate) reply: oneshot::Sender<Result<()>>,
}

/// What comes next.
pub(crate) enum Next {
    Successor(Successor),
    /// One gave up what it had begun to write.
    Abandoned,
    /// None came, and none begins any more.
    None,
}

impl State {
    fn is_open(&self) -> bool {
        !(self.is_closed || self.is_out || self.is_abandoned)
    }
}

impl Successors {
    /// Of a version that is to be written back after so long, if after any time.
    pub(crate) fn new(pause: Option<Duration>) -> Arc<Self> {
        Arc::new(Successors {
            state: Lock::default(),
            changed: Notify::new(),
            until: pause.and_then(|pause| Instant::now().checked_add(pause)),
        })
    }

    fn is_open(&self) -> bool {
        self.state.lock().is_open()
    }

    /// One begins, if it may.
    fn try_begin(&self) -> bool {
        let mut state = self.state.lock();
        let is_late = self.until.is_some_and(|until| Instant::now() >= until);
        let may_begin = state.is_open() && !is_late && state.count < COUNT_MAX;
        if may_begin {
            state.is_out = true;
            state.count += 1;
        }
        may_begin
    }

    /// The one that has the object ends, without having written if there is nothing to wait for.
    /// Where it is not known where on the device that is, nothing can come behind it.
    pub(crate) fn end(&self, successor: Option<Successor>, is_known: bool) {
        let refused = {
            let mut state = self.state.lock();
            state.is_out = false;
            state.is_closed |= !is_known && !crate::planted!("successor-unknown");
            match (state.failed.clone(), successor) {
                (Some(failed), Some(successor)) => Some((successor, failed)),
                (_, successor) => {
                    state.ended.extend(successor);
                    None
                }
            }
        };
        self.changed.notify_one();
        if let Some((successor, failed)) = refused {
            drop(successor.reply.send(Err(failed)));
        }
    }

    /// The one that has the object gives it up half written.
    pub(crate) fn abandon(&self) {
        let mut state = self.state.lock();
        (state.is_out, state.is_abandoned) = (false, true);
        drop(state);
        self.changed.notify_one();
    }

    /// Whether there is none now: then none comes any more.
    pub(crate) fn are_over(&self) -> bool {
        let mut state = self.state.lock();
        let are_over = state.ended.is_empty() && !state.is_out && !state.is_abandoned;
        state.is_closed |= are_over;
        are_over
    }

    /// The next one, once it has ended. None if there is none now: then none comes any more.
    pub(crate) async fn next(&self) -> Next {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(successor) = state.ended.pop_front() {
                    return Next::Successor(successor);
                }
                if state.is_abandoned {
                    return Next::Abandoned;
                }
                if !state.is_out {
                    state.is_closed = true;
                    return Next::None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// None begins any more.
    pub(crate) fn close(&self) {
        self.state.lock().is_closed = true;
    }

    /// What comes before them has failed, and so have they.
    pub(crate) fn fail(&self, error: &VirtualMemoryError) {
        let ended = {
            let mut state = self.state.lock();
            state.is_closed = true;
            state.failed.get_or_insert_with(|| error.clone());
            std::mem::take(&mut state.ended)
        };
        for Successor { reply, .. } in ended {
            drop(reply.send(Err(error.clone())));
        }
    }
}

impl Inner {
    /// Those behind what is pending on this device, if any may be.
    fn successors(&self, device: usize) -> Option<&Arc<Successors>> {
        let pending = self.rare.pending.as_ref().filter(|pending| pending.device == device);
        pending?.successors.as_ref()
    }
}

impl Object {
    /// Whether a lease of this device may go on behind a kernel that has not ended.
    pub(crate) fn is_followed_on(&self, device: usize, writes: bool) -> bool {
        let inner = self.inner.lock();
        let is_open = inner.successors(device).is_some_and(|successors| successors.is_open());
        let is_awaited = inner.rare.line.is_some() && !crate::planted!("successors-starve");
        is_open && !(writes && is_awaited)
    }

    /// For a kernel that reads what one before it writes: the range, and what to come after. It
    /// has one more hold then. None if nothing is pending that could be followed.
    pub(crate) fn follow_on(&self, device: usize) -> Option<(DeviceRange, Vec<UseEnd>)> {
        self.shared.device(device).ok()?;
        let mut inner = self.inner.lock();
        // While one that changes it is out, its bytes are those of no version.
        inner.successors(device).filter(|successors| successors.is_open())?;
        if inner.place(device).is_none() || !inner.add_hold_again(device) {
            return None;
        }
        let range = inner.place(device)?.range.share();
        let after =
            if crate::planted!("follower-unordered") { Vec::new() } else { range.ends(true) };
        Some((range, after))
    }

    /// The same for one that changes it, alone.
    pub(crate) fn succeed_on(
        &self,
        device: usize,
    ) -> Option<(Arc<Successors>, DeviceRange, Vec<UseEnd>)> {
        self.shared.device(device).ok()?;
        let mut inner = self.inner.lock();
        if inner.rare.line.is_some() && !crate::planted!("successors-starve") {
            return None;
        }
        let successors = inner.successors(device)?.clone();
        if !inner.place(device)?.range.others_are_gone(1) || !successors.try_begin() {
            return None;
        }
        if !inner.add_hold_again(device) {
            successors.end(None, true);
            return None;
        }
        let range = inner.place(device)?.range.share();
        let after = range.ends(false);
        Some((successors, range, after))
    }
}
