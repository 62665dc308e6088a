//! A record of what was asked of a driver and when it ended.
//!
//! Invariant: steps are in the order in which they happened; the end of a call is recorded even
//! when its future was dropped. Called by tests of what is asked (how many transfers, how large,
//! how contiguous) and by those that compare two runs.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use vmem_io::driver::Driver;

use super::{After, Around, Hook, OpKind, Span};

/// A driver that records its operations.
pub type TraceDriver = Around<Trace>;

/// The hook of [`TraceDriver`].
#[derive(Debug)]
pub struct Trace {
    record: Arc<Mutex<Record>>,
    start: Instant,
}

#[derive(Debug, Default)]
struct Record {
    calls: u64,
    events: Vec<TraceEvent>,
}

/// One step of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEvent {
    /// The number of the call, from 0 in the order of the calls.
    pub call: u64,
    /// What was called.
    pub kind: OpKind,
    /// Time on tokio's clock since the recording began.
    pub at: Duration,
    /// What happened.
    pub step: TraceStep,
}

/// What happened to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceStep {
    /// It came, for these ranges of the file.
    Started(Vec<Span>),
    /// It ended; whether well.
    Ended {
        /// Whether the result was `Ok`.
        ok: bool,
    },
}

impl TraceDriver {
    /// Records what `inner` is asked for.
    pub fn new(inner: Arc<dyn Driver>) -> Arc<Self> {
        let hook = Trace { record: Arc::default(), start: Instant::now() };
        Around::with_hook(inner, hook)
    }

    /// What was recorded so far.
    pub fn events(&self) -> Vec<TraceEvent> {
        self.hook.record.lock().events.clone()
    }

    /// Takes what was recorded so far out of the record.
    pub fn take_events(&self) -> Vec<TraceEvent> {
        std::mem::take(&mut self.hook.record.lock().events)
    }

    /// The ranges that calls of this kind asked for, in order.
    pub fn spans(&self, kind: OpKind) -> Vec<Span> {
        let record = self.hook.record.lock();
        let of_kind = record.events.iter().filter(|event| event.kind == kind);
        let started = of_kind.filter_map(|event| match &event.step {
            TraceStep::Started(spans) => Some(spans.clone()),
            TraceStep::Ended { .. } => None,
        });
        started.flatten().collect()
    }
}

impl Hook for Trace {
    fn name(&self) -> &'static str {
        "trace"
    }

    fn start(&self, kind: OpKind, spans: &[Span]) -> After {
        let record = self.record.clone();
        let start = self.start;
        let call = {
            let mut record = record.lock();
            record.calls += 1;
            record.calls - 1
        };
        let event = move |step| TraceEvent { call, kind, at: start.elapsed(), step };
        record.lock().events.push(event(TraceStep::Started(spans.to_vec())));
        Box::new(move |ok| {
            record.lock().events.push(event(TraceStep::Ended { ok }));
            Box::pin(async {})
        })
    }
}
