//! Decorators that change when a driver's completions arrive, or tell what was asked of it.
//!
//! Invariant: as a driver must, [`Around`] owns the buffers of an operation from the call to the
//! completion that its user sees, in a task of its own, so that dropping the future frees nothing
//! early. It is to be called inside of a runtime; outside of one an operation still starts, but
//! its completion is seen only while the future is polled. Called by tests, around any driver.

mod delay;
mod gate;
mod throttle;
mod trace;

use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use vmem_core::backend::{Clock, IoBuf};
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};

pub use delay::{Delay, DelayDriver};
pub use gate::{Gate, GateDriver};
pub use throttle::{Throttle, ThrottleDriver};
pub use trace::{Trace, TraceDriver, TraceEvent, TraceStep};

/// The methods of a driver that do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpKind {
    /// `Driver::read`.
    Read,
    /// `Driver::write`.
    Write,
    /// `Driver::punch`.
    Punch,
    /// `Driver::sync`.
    Sync,
    /// `Driver::close`.
    Close,
}

impl OpKind {
    /// All of them.
    pub const ALL: [OpKind; 5] =
        [OpKind::Read, OpKind::Write, OpKind::Punch, OpKind::Sync, OpKind::Close];
}

/// A range of the file that a call touches, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where in the file.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// What happens between the end of an operation and the completion that the caller sees; its
/// argument says whether the operation succeeded.
pub type After = Box<dyn FnOnce(bool) -> BoxFuture<'static, ()> + Send>;

/// What a decorator does at the start of each call and before each completion.
pub trait Hook: fmt::Debug + Send + Sync + 'static {
    /// The name of the decorator.
    fn name(&self) -> &'static str;

    /// Called in the order of the calls, before the operation is handed down.
    fn start(&self, kind: OpKind, spans: &[Span]) -> After;
}

/// A driver with a [`Hook`] around every operation.
#[derive(Debug)]
pub struct Around<H> {
    inner: Arc<dyn Driver>,
    hook: H,
    flight: Arc<Flight>,
}

impl<H: Hook> Around<H> {
    /// Puts `hook` around `inner`.
    pub fn with_hook(inner: Arc<dyn Driver>, hook: H) -> Arc<Self> {
        Arc::new(Around { inner, hook, flight: Arc::default() })
    }

    /// Runs an operation that has started already; `owns` lives until its completion.
    fn run<T: Send + 'static>(
        &self,
        after: After,
        operation: BoxFuture<'static, T>,
        succeeded: fn(&T) -> bool,
        owns: impl Send + 'static,
    ) -> BoxFuture<'static, T> {
        let aboard = Flight::board(&self.flight);
        owned(async move {
            let output = operation.await;
            after(succeeded(&output)).await;
            drop(owns);
            drop(aboard);
            output
        })
    }
}

/// Counts the calls whose completion has not reached the caller, so that `close` can wait.
#[derive(Debug, Default)]
struct Flight {
    calls: AtomicUsize,
    landed: Notify,
}

impl Flight {
    fn board(flight: &Arc<Flight>) -> Aboard {
        flight.calls.fetch_add(1, Ordering::AcqRel);
        Aboard(flight.clone())
    }

    async fn land(&self) {
        loop {
            let landed = self.landed.notified();
            if self.calls.load(Ordering::Acquire) == 0 {
                return;
            }
            landed.await;
        }
    }
}

struct Aboard(Arc<Flight>);

impl Drop for Aboard {
    fn drop(&mut self) {
        if self.0.calls.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.landed.notify_waiters();
        }
    }
}

impl<H: Hook> Driver for Around<H> {
    fn read(
        &self,
        buf: IoBuf,
        pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
        let after = self.hook.start(OpKind::Read, &read_spans(&pieces));
        let reading = self.inner.read(buf, pieces, keep);
        self.run(after, reading, |(_, _, result)| result.is_ok(), ())
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let after = self.hook.start(OpKind::Write, &write_spans(&runs));
        let owns: Vec<Bytes> = runs.iter().flat_map(|run| run.parts.clone()).collect();
        let writing = self.inner.write(runs, keep);
        self.run(after, writing, |(_, result)| result.is_ok(), owns)
    }

    fn punch(
        &self,
        ranges: Vec<Range<u64>>,
        keep: Keep,
    ) -> BoxFuture<'static, (Keep, io::Result<()>)> {
        let spans = ranges
            .iter()
            .map(|range| Span { offset: range.start, len: range.end.saturating_sub(range.start) });
        let after = self.hook.start(OpKind::Punch, &spans.collect::<Vec<_>>());
        let punching = self.inner.punch(ranges, keep);
        self.run(after, punching, |(_, result)| result.is_ok(), ())
    }

    fn sync(&self) -> BoxFuture<'static, io::Result<()>> {
        let after = self.hook.start(OpKind::Sync, &[]);
        self.run(after, self.inner.sync(), Result::is_ok, ())
    }

    fn clock(&self) -> Clock {
        self.inner.clock()
    }

    fn close(&self) -> BoxFuture<'static, io::Result<()>> {
        let after = self.hook.start(OpKind::Close, &[]);
        let closing = self.inner.close();
        let flight = self.flight.clone();
        owned(async move {
            let result = closing.await;
            flight.land().await;
            after(result.is_ok()).await;
            result
        })
    }

    fn buffers_writes(&self) -> bool {
        self.inner.buffers_writes()
    }

    fn block_bytes(&self) -> u32 {
        self.inner.block_bytes()
    }

    fn describe(&self) -> Arc<str> {
        format!("{} over {}", self.hook.name(), self.inner.describe()).into()
    }
}

/// Runs `work` to its end, even if the future is dropped.
pub(crate) fn owned<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> BoxFuture<'static, T> {
    let Ok(runtime) = Handle::try_current() else {
        return Box::pin(work);
    };
    let task = runtime.spawn(work);
    Box::pin(async move {
        match task.await {
            Ok(output) => output,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => panic!("the runtime under the driver was shut down with a call in flight"),
        }
    })
}

fn read_spans(pieces: &[ReadPiece]) -> Vec<Span> {
    let span = |piece: &ReadPiece| Span { offset: piece.offset, len: piece.range.len() as u64 };
    pieces.iter().map(span).collect()
}

fn write_spans(runs: &[WriteRun]) -> Vec<Span> {
    let span = |run: &WriteRun| Span { offset: run.offset, len: run.len() };
    runs.iter().map(span).collect()
}
