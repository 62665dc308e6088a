//! Whose request a task serves, for its traces.
//!
//! A migration follows from the span in which it was asked for, whichever task carries it out, and
//! is a child of it. A span stays open as long as its children, so what goes on by itself has a
//! span of its own, which follows from that of its asker and does not keep it open: a prefetch.
//!
//! Invariant: without a subscriber nothing is carried, and no span is touched. Carried into tasks
//! by the calls that spawn them; read by the records of migrations. Reads have their own
//! (`latency/clock.rs`).

use std::future::Future;

use tracing::Span;

use crate::memory_tier::MemoryTier;

tokio::task_local! {
    static ASKER: Option<Span>;
}

/// The span in which this was asked for, if a subscriber wants it.
pub(crate) fn current() -> Option<Span> {
    let span = Span::current();
    if span.is_disabled() {
        return ASKER.try_with(Clone::clone).ok().flatten();
    }
    Some(span)
}

/// `work`, for a task, whose result is waited for here.
pub(crate) fn awaited<F: Future>(work: F) -> impl Future<Output = F::Output> {
    ASKER.scope(current(), work)
}

/// `work`, for the task of a prefetch that is asked for here.
pub(crate) fn prefetch<F: Future>(
    objects: usize,
    to: MemoryTier,
    work: F,
) -> impl Future<Output = F::Output> {
    let span = tracing::debug_span!(
        target: "vmem::migration", parent: None, "prefetch", objects, %to
    );
    let own = (!span.is_disabled()).then(|| {
        if let Some(asker) = current() {
            span.follows_from(asker);
        }
        span
    });
    ASKER.scope(own, work)
}
