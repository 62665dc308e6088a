//! Writes that wait to be put: calls that come while a put is in flight share the next one.
//!
//! Invariant: a call is in one segment, whole; it is answered once, and its buffers and extents are
//! the task's until then. Nothing waits on a timer: the end of a put starts the next. A put whose
//! first try has failed no longer makes others wait. Called by the tier.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio_util::task::task_tracker::TaskTrackerToken;
use vmem_core::backend::{Extent, TierError};

use crate::buffers::Buffered;
use crate::inner::Inner;
use crate::write::put_segment;

/// One call of `write`.
pub(crate) struct Call {
    pub(crate) extents: Vec<Extent>,
    pub(crate) payloads: Vec<Bytes>,
    pub(crate) reply: oneshot::Sender<Result<Vec<Extent>, TierError>>,
    /// Memory of the tier's own that the payloads are in.
    pub(crate) buffered: Option<Buffered>,
    /// Counts it from the call on.
    pub(crate) token: TaskTrackerToken,
}

impl Call {
    fn bytes(&self) -> u64 {
        self.payloads.iter().map(|payload| payload.len() as u64).sum()
    }
}

/// Calls in the order in which they came, and the puts in flight.
#[derive(Default)]
pub(crate) struct Gather {
    queue: VecDeque<Call>,
    queued_bytes: u64,
    in_flight: usize,
    /// Those whose first try is under way.
    fresh: usize,
}

impl Gather {
    fn push(&mut self, call: Call) {
        self.queued_bytes += call.bytes();
        self.queue.push_back(call);
    }

    /// All calls that were not started.
    pub(crate) fn drain(&mut self) -> Vec<Call> {
        self.queued_bytes = 0;
        self.queue.drain(..).collect()
    }

    /// The calls of the next segment, if it is time for one.
    fn take(&mut self, puts: usize, gather_bytes: u64, segment_bytes: u64) -> Option<Vec<Call>> {
        let is_enough = self.fresh == 0 || self.queued_bytes >= gather_bytes;
        if self.in_flight >= puts || !is_enough {
            return None;
        }
        let mut calls = Vec::new();
        let mut bytes = 0;
        while let Some(call) = self.queue.front() {
            if !calls.is_empty() && bytes + call.bytes() > segment_bytes {
                break;
            }
            bytes += call.bytes();
            calls.extend(self.queue.pop_front());
        }
        self.queued_bytes -= bytes;
        if calls.is_empty() {
            return None;
        }
        self.in_flight += 1;
        self.fresh += 1;
        Some(calls)
    }
}

/// A put in flight.
pub(crate) struct Slot {
    inner: Arc<Inner>,
    is_fresh: parking_lot::Mutex<bool>,
}

impl Slot {
    /// Its first try has failed: others need not wait for it.
    pub(crate) fn stalled(&self) {
        if std::mem::take(&mut *self.is_fresh.lock()) {
            self.inner.gather.lock().fresh -= 1;
            self.inner.pump();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut gather = self.inner.gather.lock();
            gather.in_flight -= 1;
            gather.fresh -= usize::from(*self.is_fresh.get_mut());
        }
        self.inner.pump();
    }
}

impl Inner {
    /// Queues a call, and starts a put if it is time.
    pub(crate) fn enqueue(&self, call: Call) {
        self.gather.lock().push(call);
        self.pump();
    }

    /// Starts puts while there are calls to start them for. After a close, calls that were not
    /// started are refused.
    fn pump(&self) {
        let options = self.client.options();
        loop {
            if self.is_closed() {
                self.refuse_queued();
                return;
            }
            let taken = {
                let mut gather = self.gather.lock();
                gather.take(options.puts, options.gather_bytes(), options.segment_bytes)
            };
            let Some(calls) = taken else { return };
            let slot = Slot { inner: self.me(), is_fresh: parking_lot::Mutex::new(true) };
            let putting = put_segment(self.me(), calls, slot);
            self.tracker.spawn_on(putting, &self.runtime);
        }
    }

    /// Answers all calls that were not started.
    pub(crate) fn refuse_queued(&self) {
        let calls = self.gather.lock().drain();
        for call in calls {
            drop(call.extents);
            let _ = call.reply.send(Err(TierError::Closed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(len: usize) -> Call {
        let token = tokio_util::task::TaskTracker::new().token();
        let reply = oneshot::channel().0;
        Call {
            extents: Vec::new(),
            payloads: vec![vec![0; len].into()],
            reply,
            buffered: None,
            token,
        }
    }

    fn taken(gather: &mut Gather) -> Option<usize> {
        gather.take(3, 100, 250).map(|calls| calls.len())
    }

    #[test]
    fn calls_behind_a_put_share_the_next() {
        let mut gather = Gather::default();
        gather.push(call(10));
        assert_eq!(taken(&mut gather), Some(1), "at once");
        (0..9).for_each(|_| gather.push(call(10)));
        assert_eq!(taken(&mut gather), None, "too little for another");
        gather.push(call(10));
        assert_eq!(taken(&mut gather), Some(10));
        gather.push(call(1));
        gather.fresh = 0;
        assert_eq!(taken(&mut gather), Some(1), "those before have failed once");
        gather.push(call(1000));
        gather.fresh = 0;
        assert_eq!(taken(&mut gather), None, "no more than three");
    }

    #[test]
    fn segments_are_bounded_but_for_one_call() {
        let mut gather = Gather::default();
        [100, 100, 51, 999, 1].into_iter().for_each(|len| gather.push(call(len)));
        let lens: Vec<_> = std::iter::from_fn(|| taken(&mut gather)).collect();
        assert_eq!(lens, [2, 1, 1], "251 bytes are too many, and the fourth put is one too many");
    }
}
