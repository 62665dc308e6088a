//! Reads: calls that come together share requests, whose bytes land in the callers' buffers and are
//! verified chunk by chunk.
//!
//! Invariant: a task owns buffer and extents of a call, and whatever ends the call gives the buffer
//! back, once. The segments that it reads stay in the bucket until it has ended. A request that is
//! for no caller any more ends; what is wrong with a chunk is an error of its call alone. Called by
//! the tier; compactions land their bytes the same way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::future::{join, join_all, poll_fn};
use futures::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;
use vmem_core::backend::{IoBuf, ReadChunk, Slices, TierError, crc32c};

use crate::client::Landing;
use crate::error::{RequestError, invalid};
use crate::inner::{Inner, Pins};
use crate::plan::{Group, Wanted, groups};

/// Requests that one call makes at once.
const REQUESTS: usize = 8;
/// How often the task of small calls lets others go first, at most.
const YIELDS_MAX: usize = 16;
/// A call of up to this share of what one request reads is small.
const SMALL_SHARE: u64 = 16;

/// Buffer and outcome of a read.
pub(crate) type Answer = (IoBuf, Result<(), TierError>);

/// One call of `read`.
pub(crate) struct Call {
    wanted: Vec<Wanted>,
    /// What it reads, and what keeps that, until it ends.
    kept: Mutex<Option<(Vec<ReadChunk>, Pins)>>,
    buf: Mutex<Option<IoBuf>>,
    caller: Mutex<Option<oneshot::Sender<Answer>>>,
    /// Requests that are not answered so far.
    left: AtomicUsize,
    ended: CancellationToken,
}

impl Call {
    /// Finds the chunks, and keeps their segments.
    ///
    /// # Errors
    ///
    /// The buffer, and `Io` for an extent of another tier.
    pub(crate) fn new(
        inner: &Arc<Inner>,
        chunks: Vec<ReadChunk>,
        buf: IoBuf,
    ) -> Result<(Self, oneshot::Receiver<Answer>), Answer> {
        let mut wanted = Vec::with_capacity(chunks.len());
        let mut ledger = inner.ledger.lock();
        for (chunk, ReadChunk { extent, at }) in chunks.iter().enumerate() {
            if extent.is_empty() || extent.sum().is_none() {
                continue;
            }
            let placed = ledger.find(extent.offset());
            let Some(placed) = placed.filter(|placed| placed.len == extent.len()) else {
                return Err((buf, Err(invalid("read", "an extent of another tier"))));
            };
            wanted.push(Wanted { placed, call: 0, to: *at, chunk });
        }
        let mut segments: Vec<u64> = wanted.iter().map(|wanted| wanted.placed.segment).collect();
        segments.sort_unstable();
        segments.dedup();
        segments.iter().for_each(|&id| ledger.pin(id));
        drop(ledger);
        let pins = Pins::new(Arc::clone(inner), segments);
        let (caller, answer) = oneshot::channel();
        let call = Call {
            wanted,
            kept: Mutex::new(Some((chunks, pins))),
            buf: Mutex::new(Some(buf)),
            caller: Mutex::new(Some(caller)),
            left: AtomicUsize::new(0),
            ended: CancellationToken::new(),
        };
        Ok((call, answer))
    }

    fn bytes(&self) -> u64 {
        self.wanted.iter().map(|wanted| u64::from(wanted.placed.len)).sum()
    }

    /// Answers, unless it has ended.
    fn end(&self, result: Result<(), RequestError>) {
        let caller = self.caller.lock().take();
        let buf = self.buf.lock().take();
        let kept = self.kept.lock().take();
        self.ended.cancel();
        let (Some(caller), Some(mut buf), Some((chunks, pins))) = (caller, buf, kept) else {
            return;
        };
        for ReadChunk { extent, at } in chunks.iter().filter(|one| one.extent.sum().is_none()) {
            buf[*at..*at + extent.len() as usize].fill(0);
        }
        drop((pins, chunks));
        let _ = caller.send((buf, result.map_err(|error| error.of_tier("read"))));
    }

    /// One of its requests has ended.
    fn answered(&self, result: Result<(), RequestError>) {
        let is_last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if result.is_err() || is_last {
            self.end(result);
        }
    }

    /// Ends when the call has ended, or its caller has gone.
    async fn watch(&self) {
        let gone = poll_fn(|cx: &mut Context<'_>| match &mut *self.caller.lock() {
            Some(caller) => caller.poll_closed(cx),
            None => Poll::Ready(()),
        });
        tokio::select! {
            () = gone => self.end(Err(RequestError::Abandoned)),
            () = self.ended.cancelled() => {}
        }
    }
}

impl Drop for Call {
    /// The buffer returns to its owner even if the task was dropped.
    fn drop(&mut self) {
        self.end(Err(RequestError::Abandoned));
    }
}

impl Inner {
    /// Begins a call. Small ones that come until their task runs, which it does next, are read
    /// together: what is large gains nothing by it, and has a task of its own.
    pub(crate) fn read(&self, call: Call) {
        if call.bytes() > self.client.options().get_bytes / SMALL_SHARE {
            self.tracker.spawn_on(read_together(self.me(), vec![call]), &self.runtime);
            return;
        }
        let mut queue = self.reads.lock();
        queue.push(call);
        let is_first = queue.len() == 1;
        drop(queue);
        if is_first {
            self.tracker.spawn_on(read_queued(Queued(Some(self.me()))), &self.runtime);
        }
    }
}

/// The calls in the queue, which are answered if the task never runs.
struct Queued(Option<Arc<Inner>>);

impl Drop for Queued {
    fn drop(&mut self) {
        if let Some(inner) = &self.0 {
            let calls = std::mem::take(&mut *inner.reads.lock());
            drop(calls);
        }
    }
}

async fn read_queued(mut queued: Queued) {
    if let Some(inner) = &queued.0 {
        // While calls come, the others of what is ready to run here make theirs.
        let mut before = 0;
        for _ in 0..YIELDS_MAX {
            let now = inner.reads.lock().len();
            if now == before {
                break;
            }
            before = now;
            yield_now().await;
        }
    }
    let Some(inner) = queued.0.take() else { return };
    let calls = std::mem::take(&mut *inner.reads.lock());
    read_together(inner, calls).await;
}

async fn read_together(inner: Arc<Inner>, mut calls: Vec<Call>) {
    calls.retain(|call| call.caller.lock().as_ref().is_some_and(|caller| !caller.is_closed()));
    let options = inner.client.options();
    let wanted = calls.iter().enumerate().flat_map(|(nth, call)| {
        call.wanted.iter().map(move |&wanted| Wanted { call: nth, ..wanted })
    });
    let groups = groups(wanted.collect(), options.gap_bytes, options.get_bytes);
    for nth in groups.iter().flat_map(Group::calls) {
        *calls[nth].left.get_mut() += 1;
    }
    let calls = Calls(calls);
    let without = calls.0.iter().filter(|call| call.left.load(Ordering::Relaxed) == 0);
    without.for_each(|call| call.end(Ok(())));
    let at_once = REQUESTS.max(calls.0.len());
    let gets: Vec<_> = groups.iter().map(|group| calls.get(&inner, group).boxed()).collect();
    let reading = stream::iter(gets).buffer_unordered(at_once).collect::<()>();
    join(reading, join_all(calls.0.iter().map(Call::watch))).await;
}

/// Calls that are read together.
struct Calls(Vec<Call>);

impl Calls {
    /// Reads a group, and answers the calls for which it was the last.
    async fn get(&self, inner: &Inner, group: &Group) {
        let calls: Vec<usize> = group.calls().collect();
        let gone = async {
            for &nth in &calls {
                self.0[nth].ended.cancelled().await;
            }
        };
        let fetched = tokio::select! {
            biased;
            fetched = fetch(inner, group, self) => fetched,
            () = gone => return,
        };
        for &nth in &calls {
            let of_call = match &fetched {
                Err(RequestError::Altered { .. }) => {
                    let chunks = group.chunks.iter().filter(|wanted| wanted.call == nth);
                    verify(chunks, self).await
                }
                fetched => fetched.clone(),
            };
            self.0[nth].answered(of_call);
        }
    }
}

/// Where the bytes of requests go.
pub(crate) trait Buffers: Sync {
    /// Does something with the buffer of a call; nothing if the call has ended.
    fn with<R>(&self, call: usize, act: impl FnOnce(&mut [u8]) -> R) -> Option<R>;
}

impl Buffers for Calls {
    fn with<R>(&self, call: usize, act: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        self.0[call].buf.lock().as_mut().map(|buf| act(buf))
    }
}

impl Buffers for Mutex<Vec<u8>> {
    fn with<R>(&self, _: usize, act: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        Some(act(&mut self.lock()))
    }
}

/// Reads a group into its buffers.
pub(crate) async fn fetch(
    inner: &Inner,
    group: &Group,
    buffers: &impl Buffers,
) -> Result<(), RequestError> {
    let path = inner.path(group.segment);
    inner.client.get(&path, group.range.clone(), &Chunks { group, buffers }).await
}

/// The chunks of a group on their way into buffers.
struct Chunks<'a, B> {
    group: &'a Group,
    buffers: &'a B,
}

impl<B: Buffers> Landing for Chunks<'_, B> {
    fn take(&self, at: u64, bytes: &[u8]) {
        self.group.scatter(at, bytes, |call, to, part| {
            self.buffers.with(call, |buf| buf[to..to + part.len()].copy_from_slice(part));
        });
    }

    async fn verify(&self) -> Result<(), RequestError> {
        verify(self.group.chunks.iter(), self.buffers).await
    }
}

/// Whether these chunks are what was put; those of calls that have ended count as such.
async fn verify(
    chunks: impl Iterator<Item = &Wanted>,
    buffers: &impl Buffers,
) -> Result<(), RequestError> {
    let mut slices = Slices::default();
    for &Wanted { placed, call, to, chunk } in chunks {
        slices.took(placed.len as usize).await;
        let actual = buffers.with(call, |buf| crc32c(&buf[to..to + placed.len as usize]));
        let expected = placed.sum;
        match actual {
            Some(actual) if actual != expected => {
                return Err(RequestError::Altered { expected, actual, chunk });
            }
            _ => {}
        }
    }
    Ok(())
}
