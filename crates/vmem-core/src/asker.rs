//! Whose request a task serves, for its traces.
//!
//! A migration follows from the span in which it was asked for, whichever task carries it out, and
//! is a child of it. A span stays open as long as its children, so what goes on by itself has a
//! span of its own, which follows from that of its asker and does not keep it open: a prefetch.
//!
//! Invariant: without a subscriber nothing is carried, and no span is touched. What a read or a
//! prefetch without a span moves has none either (`span_rate.rs`). Carried into tasks by the calls
//! that spawn them; read by the records of migrations. Reads have their own (`latency/clock.rs`).

use std::future::Future;

use tracing::Span;

use crate::latency::{self, Trace};
use crate::memory_tier::MemoryTier;
use crate::span_rate::SpanRate;

tokio::task_local! {
    static ASKER: Asker;
}

/// Which request something is done for.
#[derive(Clone, Debug)]
pub(crate) enum Asker {
    /// A read with this span.
    Read(Span),
    /// A prefetch with this span.
    Prefetch(Span),
    /// A read or a prefetch whose span was left out.
    LeftOut,
    /// A call in this span of its caller.
    Call(Span),
    /// None, or one without a span.
    Nobody,
}

/// Which request this is done for.
pub(crate) fn current() -> Asker {
    match latency::trace() {
        Trace::Read(span) => return Asker::Read(span),
        Trace::LeftOut => return Asker::LeftOut,
        Trace::Own => {}
    }
    // Before the span of the task, which some subscribers have.
    match ASKER.try_with(Clone::clone) {
        Ok(Asker::Nobody) | Err(_) => {}
        Ok(asker) => return asker,
    }
    let span = Span::current();
    if span.is_disabled() { Asker::Nobody } else { Asker::Call(span) }
}

/// `work`, for a task, whose result is waited for here.
pub(crate) fn awaited<F: Future>(work: F) -> impl Future<Output = F::Output> {
    ASKER.scope(current(), work)
}

/// `work`, for the task of a prefetch that is asked for here.
pub(crate) fn prefetch<F: Future>(
    spans: &SpanRate,
    objects: usize,
    to: MemoryTier,
    work: F,
) -> impl Future<Output = F::Output> + use<F> {
    let span = spans.span(|left_out| {
        tracing::debug_span!(
            target: "vmem::migration", parent: None, "prefetch", objects, %to, left_out
        )
    });
    let own = match span {
        None => Asker::LeftOut,
        Some(span) if span.is_disabled() => Asker::Nobody,
        Some(span) => {
            if let Asker::Read(asker) | Asker::Prefetch(asker) | Asker::Call(asker) = current() {
                span.follows_from(asker);
            }
            Asker::Prefetch(span)
        }
    };
    ASKER.scope(own, work)
}
