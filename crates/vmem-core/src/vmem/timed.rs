//! Reads that are not hits, measured from their callers' side.
//!
//! Invariant: each such read is recorded once, however it ends: with its bytes, with an error, or
//! with the drop of its future. Called by the slow paths of `read.rs`, `miss.rs` and `reader.rs`.

use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::Result;
use crate::latency::{self, ReadOp, ReadOutcome, ReadStage, SlowRead, StageClock};
use crate::memory_tier::MemoryTier;
use crate::object::Object;

/// What is read.
#[derive(Debug)]
pub(super) struct Read {
    op: ReadOp,
    /// The first one of several.
    object: Arc<Object>,
    objects: usize,
    bytes: usize,
    /// Whether it is about to be a hit, as far as can be seen.
    is_near: bool,
}

impl Read {
    /// A read of this many bytes of one object.
    pub(super) fn of(op: ReadOp, object: &Arc<Object>, bytes: usize) -> Self {
        Read { op, object: object.clone(), objects: 1, bytes, is_near: false }
    }

    /// A window of a stream; with `is_near` host memory serves it.
    pub(super) fn of_window(object: &Arc<Object>, bytes: usize, is_near: bool) -> Self {
        Read { is_near, ..Read::of(ReadOp::Stream, object, bytes) }
    }

    /// A read of several objects, of one at least.
    pub(super) fn of_many(objects: &[Arc<Object>]) -> Self {
        let bytes = objects.iter().fold(0_usize, |sum, object| sum.saturating_add(object.len));
        let object = objects.first().expect("invariant: none is a hit").clone();
        Read { objects: objects.len(), ..Read::of(ReadOp::Many, &object, bytes) }
    }

    fn name(&self) -> Option<&str> {
        self.object.named.get().and_then(|named| named.first())
    }

    /// What is read, in a few words.
    fn title(&self) -> String {
        let title = self.object.title();
        match self.objects {
            1 => title,
            more => format!("{title} and {} more", more - 1),
        }
    }

    /// None if it is left out.
    fn span(&self) -> Option<Span> {
        if self.is_near {
            // A hit has no span, and takes none from the others.
            return Some(Span::none());
        }
        self.object.shared.read_spans.span(|left_out| self.span_after(left_out))
    }

    fn span_after(&self, left_out: Option<u64>) -> Span {
        let span = tracing::debug_span!(
            target: "vmem::read",
            "read",
            op = self.op.as_str(),
            handle = self.object.id,
            name = Empty,
            objects = Some(self.objects).filter(|&objects| objects > 1),
            bytes = self.bytes,
            left_out,
            tier = Empty,
            outcome = Empty,
            joined = Empty,
            cause = Empty,
            total_us = Empty,
            space_us = Empty,
            turn_us = Empty,
            io_us = Empty,
            copy_us = Empty,
            gate_us = Empty,
            runtime_us = Empty,
        );
        if let Some(name) = self.name().filter(|_| !span.is_disabled()) {
            span.record("name", name);
        }
        span
    }
}

/// A read that is under way. Dropped before its end it was given up by its caller.
struct Reading {
    read: Read,
    clock: Arc<StageClock>,
    /// None once it was recorded, or is not to be.
    outcome: Option<ReadOutcome>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        let told = self.clock.end();
        let Some(outcome) = self.outcome.take() else { return };
        let Read { op, ref object, objects, bytes, .. } = self.read;
        let latencies = &object.shared.latencies;
        let tier = told.tier.unwrap_or(MemoryTier::Host);
        let times = told.times;
        let total = times.total();
        // A subscriber formats what it is given: nothing for a stage that the read was not in.
        let us = |stage| Some(times.of(stage).as_micros() as u64).filter(|&us| us > 0);
        let wanted = self.clock.span().filter(|span| !span.is_disabled());
        if let Some(span) = wanted {
            // At once: a subscriber looks up the span at each call.
            tracing::record_all!(
                span,
                tier = %tier,
                outcome = outcome.as_str(),
                joined = told.joined.then_some(true),
                cause = times.longest().as_str(),
                total_us = total.as_micros() as u64,
                space_us = us(ReadStage::Space),
                turn_us = us(ReadStage::Turn),
                io_us = us(ReadStage::Io),
                copy_us = us(ReadStage::Copy),
                gate_us = us(ReadStage::Gate),
                runtime_us = us(ReadStage::Runtime),
            );
        }
        let slow = || SlowRead {
            handle: object.id,
            name: self.read.name().map(Arc::from),
            objects,
            bytes,
            op,
            tier,
            times,
            outcome: outcome.clone(),
            joined: told.joined,
            ended: SystemTime::now(),
        };
        if total >= latencies.threshold {
            let read = slow();
            let cause = times.longest().as_str();
            let _entered = wanted.map(Span::enter);
            tracing::warn!(target: "vmem::read", handle = object.id, cause, "slow: {read}");
        }
        latencies.record(op, tier, &outcome, &times, slow);
    }
}

/// Carries a read out, and records it. Its span is a child of the one in which this is called,
/// whichever task runs the future.
pub(super) fn timed<T>(
    read: Read,
    work: impl Future<Output = Result<T>>,
) -> impl Future<Output = Result<T>> {
    timed_unless(read, work, |_| false)
}

/// As [`timed`], unless it turns out to be a hit.
pub(super) fn timed_unless<T>(
    read: Read,
    work: impl Future<Output = Result<T>>,
    is_hit: impl FnOnce(&T) -> bool,
) -> impl Future<Output = Result<T>> {
    let span = read.span();
    async move {
        let latencies = &read.object.shared.latencies;
        let clock = StageClock::start(latencies, span.clone(), || read.title());
        let outcome = Some(ReadOutcome::Cancelled);
        let mut reading = Reading { read, clock: clock.clone(), outcome };
        let span = span.unwrap_or_else(Span::none);
        let work = latency::on_clock(Some(clock.clone()), work).instrument(span);
        let result = clock.watch(work).await;
        reading.outcome = match &result {
            Ok(value) if is_hit(value) => None,
            Ok(_) => Some(ReadOutcome::Served),
            Err(error) => Some(ReadOutcome::Failed(error.clone())),
        };
        drop(reading);
        result
    }
}
