//! A read: requests by segment, straight into the caller's buffer, verified chunk by chunk.
//!
//! Invariant: the task owns buffer and extents, and whatever ends it gives the buffer back. The
//! segments that it reads stay in the bucket until it has ended. A read that nobody awaits ends.
//! Called by the tier; compactions land their bytes the same way.

use std::ops::DerefMut;
use std::sync::Arc;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use vmem_core::backend::{IoBuf, ReadChunk, Slices, TierError, crc32c};

use crate::client::Landing;
use crate::error::{RequestError, invalid};
use crate::inner::{Inner, Pins};
use crate::plan::{Group, Wanted, groups};

/// Requests that one call makes at once.
const REQUESTS: usize = 8;

/// Buffer and outcome of a read.
pub(crate) type Answer = (IoBuf, Result<(), TierError>);

/// The buffer of a read, and its caller.
pub(crate) struct Reply {
    buf: Mutex<Option<IoBuf>>,
    caller: Option<oneshot::Sender<Answer>>,
}

impl Reply {
    pub(crate) fn new(buf: IoBuf) -> (Self, oneshot::Receiver<Answer>) {
        let (caller, answer) = oneshot::channel();
        (Reply { buf: Mutex::new(Some(buf)), caller: Some(caller) }, answer)
    }

    fn send(&mut self, result: Result<(), TierError>) {
        let buf = self.buf.get_mut().take();
        if let (Some(buf), Some(caller)) = (buf, self.caller.take()) {
            let _ = caller.send((buf, result));
        }
    }
}

impl Drop for Reply {
    /// The buffer returns to its owner even if the task was dropped.
    fn drop(&mut self) {
        self.send(Err(RequestError::Abandoned.of_tier("read")));
    }
}

/// What a read fetches.
pub(crate) struct Plan {
    chunks: Vec<ReadChunk>,
    groups: Vec<Group>,
    pins: Pins,
}

impl Plan {
    /// Finds the chunks, and keeps their segments.
    pub(crate) fn new(inner: &Arc<Inner>, chunks: Vec<ReadChunk>) -> Result<Self, TierError> {
        let options = inner.client.options();
        let mut wanted = Vec::with_capacity(chunks.len());
        let mut ledger = inner.ledger.lock();
        for (chunk, ReadChunk { extent, at }) in chunks.iter().enumerate() {
            if extent.is_empty() || extent.sum().is_none() {
                continue;
            }
            let placed = ledger.find(extent.offset());
            let placed = placed.filter(|placed| placed.len == extent.len());
            let placed = placed.ok_or_else(|| invalid("read", "an extent of another tier"))?;
            wanted.push(Wanted { placed, to: *at, chunk });
        }
        let groups = groups(wanted, options.gap_bytes, options.get_bytes);
        let segments: Vec<u64> = groups.iter().map(|group| group.segment).collect();
        segments.iter().for_each(|&id| ledger.pin(id));
        drop(ledger);
        Ok(Plan { chunks, groups, pins: Pins::new(Arc::clone(inner), segments) })
    }
}

/// Reads what is planned, and answers.
pub(crate) async fn read(inner: Arc<Inner>, plan: Plan, mut reply: Reply) {
    let Plan { chunks, groups, pins } = plan;
    let Reply { buf, caller } = &mut reply;
    let Some(caller) = caller else { return };
    let reading = async {
        fetch(&inner, &groups, buf).await?;
        let mut buf = buf.lock();
        for ReadChunk { extent, at } in chunks.iter().filter(|one| one.extent.sum().is_none()) {
            bytes_of(&mut buf)[*at..*at + extent.len() as usize].fill(0);
        }
        Ok(())
    };
    let result = tokio::select! {
        biased;
        result = reading => result,
        () = caller.closed() => return,
    };
    drop(pins);
    drop(chunks);
    reply.send(result.map_err(|error: RequestError| error.of_tier("read")));
}

/// Reads these groups into a buffer.
pub(crate) async fn fetch<B>(
    inner: &Inner,
    groups: &[Group],
    buf: &Mutex<Option<B>>,
) -> Result<(), RequestError>
where
    B: DerefMut<Target = [u8]> + Send,
{
    let gets: Vec<_> = groups.iter().map(|group| get(inner, group, buf).boxed()).collect();
    stream::iter(gets).buffer_unordered(REQUESTS).try_collect().await
}

async fn get<B>(inner: &Inner, group: &Group, buf: &Mutex<Option<B>>) -> Result<(), RequestError>
where
    B: DerefMut<Target = [u8]> + Send,
{
    let path = inner.path(group.segment);
    inner.client.get(&path, group.range.clone(), &Chunks { group, buf }).await
}

fn bytes_of<B: DerefMut<Target = [u8]>>(buf: &mut Option<B>) -> &mut [u8] {
    buf.as_mut().expect("it is taken when the read has ended")
}

/// The chunks of a group on their way into a buffer.
struct Chunks<'a, B> {
    group: &'a Group,
    /// The requests of one read run in one task, so that none ever waits for it.
    buf: &'a Mutex<Option<B>>,
}

impl<B: DerefMut<Target = [u8]> + Send> Landing for Chunks<'_, B> {
    fn take(&self, at: u64, bytes: &[u8]) {
        let mut buf = self.buf.lock();
        let buf = bytes_of(&mut buf);
        self.group.scatter(at, bytes, |to, part| buf[to..to + part.len()].copy_from_slice(part));
    }

    async fn verify(&self) -> Result<(), RequestError> {
        let mut slices = Slices::default();
        for Wanted { placed, to, chunk } in &self.group.chunks {
            slices.took(placed.len as usize).await;
            let actual = {
                let mut buf = self.buf.lock();
                crc32c(&bytes_of(&mut buf)[*to..*to + placed.len as usize])
            };
            let expected = placed.sum;
            if actual != expected {
                return Err(RequestError::Altered { expected, actual, chunk: *chunk });
            }
        }
        Ok(())
    }
}
