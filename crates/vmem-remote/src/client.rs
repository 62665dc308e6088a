//! Requests to the object store: bounded in number and time, and tried again.
//!
//! Invariant: each request ends within the total timeout once it has its turn, for which it
//! waits no longer than that, but for a listing, which goes on while entries arrive; and no error
//! of the object store leaves this module but as a [`RequestError`]. Called by the tasks of the
//! tier and of the catalog.

mod small;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutPayload};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use crate::circuit::Circuit;
use crate::error::RequestError;
use crate::options::RemoteOptions;

/// Parts of one segment that are sent at once.
const PARTS: usize = 4;
/// The longest pause between two tries.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Requests since the tier was opened.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) puts: AtomicU64,
    pub(crate) gets: AtomicU64,
    pub(crate) deletes: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// An object store and how it is used.
#[derive(Debug)]
pub(crate) struct Client {
    store: Arc<dyn ObjectStore>,
    options: RemoteOptions,
    circuit: Circuit,
    permits: Semaphore,
    jitter: Mutex<SmallRng>,
    pub(crate) counts: Counts,
}

/// What takes a body, piece by piece, and judges it at the end.
pub(crate) trait Landing: Send + Sync {
    /// These bytes of the object begin at `at`. After a failure they come again.
    fn take(&self, at: u64, bytes: &[u8]);

    /// Whether all that came is what was put.
    fn verify(&self) -> impl Future<Output = Result<(), RequestError>> + Send;
}

impl Client {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, options: RemoteOptions, seed: u64) -> Self {
        Client {
            store,
            circuit: Circuit::new(options.circuit_failures, options.circuit_pause),
            permits: Semaphore::new(options.requests),
            jitter: Mutex::new(SmallRng::seed_from_u64(seed)),
            counts: Counts::default(),
            options,
        }
    }

    pub(crate) fn options(&self) -> &RemoteOptions {
        &self.options
    }

    pub(crate) fn is_circuit_open(&self) -> bool {
        self.circuit.is_open()
    }

    /// Puts an object of these pieces; `stalled` is called when a try has failed.
    pub(crate) async fn put(
        &self,
        path: &Path,
        pieces: &[Bytes],
        stalled: impl Fn(&RequestError) + Sync,
    ) -> Result<(), RequestError> {
        let len: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if len > self.options.part_bytes {
            let parts = parts(pieces, self.options.part_bytes as usize);
            let upload = |limit| self.upload(path, &parts, limit).boxed();
            return self.request(upload, stalled).await;
        }
        let put = |limit| {
            self.counts.puts.fetch_add(1, Ordering::Relaxed);
            let payload = PutPayload::from_iter(pieces.iter().cloned());
            let put = async move { self.store.put(path, payload).await };
            within(limit, put).map_ok(drop).boxed()
        };
        self.request(put, stalled).await
    }

    /// One try of an upload in parts.
    async fn upload(
        &self,
        path: &Path,
        parts: &[PutPayload],
        limit: Duration,
    ) -> Result<(), RequestError> {
        self.counts.puts.fetch_add(parts.len() as u64, Ordering::Relaxed);
        let mut upload = within(limit, self.store.put_multipart(path)).await?;
        // Parts are numbered in the order in which they are made.
        let sending: Vec<_> = parts.iter().map(|part| upload.put_part(part.clone())).collect();
        let sent = stream::iter(sending).buffer_unordered(PARTS).try_collect::<()>();
        let sent = within(limit, sent).await;
        let ended = match sent {
            Ok(()) => within(limit, upload.complete()).await.map(drop),
            Err(error) => Err(error),
        };
        if ended.is_err() {
            // What this leaves behind is up to the rules of the bucket.
            let _ = within(limit, upload.abort()).await;
        }
        ended
    }

    /// Reads a range of an object into `landing`.
    pub(crate) async fn get(
        &self,
        path: &Path,
        range: Range<u64>,
        landing: &impl Landing,
    ) -> Result<(), RequestError> {
        let one = |limit| {
            self.counts.gets.fetch_add(1, Ordering::Relaxed);
            let get = self.get_once(path, range.clone(), landing);
            let late = move |_| Err(RequestError::TimedOut { waited: limit });
            async move { timeout(limit, get).await.unwrap_or_else(late) }.boxed()
        };
        self.request(one, |_| ()).await
    }

    async fn get_once(
        &self,
        path: &Path,
        range: Range<u64>,
        landing: &impl Landing,
    ) -> Result<(), RequestError> {
        let expected_bytes = range.end - range.start;
        let options = GetOptions::new().with_range(Some(range.clone()));
        let answer = self.store.get_opts(path, options).await.map_err(of)?;
        if answer.range != range {
            let actual_bytes = answer.range.end.saturating_sub(answer.range.start);
            return Err(RequestError::Length { expected_bytes, actual_bytes });
        }
        let mut body = answer.into_stream();
        let mut actual_bytes = 0;
        while let Some(piece) = body.try_next().await.map_err(of)? {
            let at = range.start + actual_bytes;
            actual_bytes += piece.len() as u64;
            if actual_bytes > expected_bytes {
                return Err(RequestError::Length { expected_bytes, actual_bytes });
            }
            landing.take(at, &piece);
        }
        if actual_bytes < expected_bytes {
            return Err(RequestError::Length { expected_bytes, actual_bytes });
        }
        landing.verify().await
    }

    /// Deletes objects; those that do not exist are deleted already.
    pub(crate) async fn delete(&self, paths: &[Path]) -> Result<(), RequestError> {
        let delete = |limit| {
            self.counts.deletes.fetch_add(1, Ordering::Relaxed);
            let paths = stream::iter(paths.to_vec()).map(Ok).boxed();
            let outcomes = self.store.delete_stream(paths);
            // The others go on, whatever became of one.
            let first = outcomes.fold(Ok(()), |first, outcome| {
                let is_gone = matches!(outcome, Ok(_) | Err(object_store::Error::NotFound { .. }));
                ready(if is_gone { first } else { first.and(outcome.map(drop)) })
            });
            within(limit, first).boxed()
        };
        self.request(delete, |_| ()).await
    }

    /// All objects below a path.
    pub(crate) async fn list(&self, below: &Path) -> Result<Vec<Path>, RequestError> {
        let list = |limit| {
            let found = self.store.list(Some(below)).map_ok(|meta| meta.location);
            within(limit, found.try_collect()).boxed()
        };
        self.request(list, |_| ()).await
    }

    /// Makes a request until it succeeds, its failure is final, or its time is up. `one` makes a
    /// try that takes no longer than it is given.
    async fn request<'a, T>(
        &'a self,
        one: impl Fn(Duration) -> BoxFuture<'a, Result<T, RequestError>> + Sync,
        stalled: impl Fn(&RequestError) + Sync,
    ) -> Result<T, RequestError> {
        let total = self.options.total_timeout;
        let mut began = None;
        let mut backoff = self.options.backoff;
        let mut tries = 0;
        let mut last = RequestError::Abandoned;
        loop {
            // A wait for others says nothing of the object store, and takes no time of the request.
            let late = |_| RequestError::TimedOut { waited: total };
            let permit = timeout(total, self.permits.acquire()).await.map_err(late)?;
            let began = *began.get_or_insert_with(Instant::now);
            let open = |retry_after| RequestError::CircuitOpen { retry_after };
            let pass = self.circuit.admit().map_err(open)?;
            let left = total.saturating_sub(began.elapsed());
            let error = match one(self.options.request_timeout.min(left)).await {
                Ok(value) => {
                    pass.succeeded();
                    return Ok(value);
                }
                Err(error) => error,
            };
            drop(permit);
            if error.is_of_store() {
                pass.failed();
            } else {
                pass.succeeded();
            }
            let is_failure = error != RequestError::Exists;
            self.counts.failed.fetch_add(is_failure.into(), Ordering::Relaxed);
            stalled(&error);
            tries += 1;
            let pause = backoff.mul_f64(1.0 - self.jitter.lock().random_range(0.0..0.5));
            // The same wrong bytes twice are damage in the bucket, and not on the way.
            let is_lasting = matches!(error, RequestError::Altered { .. }) && error == last;
            let is_last = tries >= self.options.tries || is_lasting;
            let is_late = began.elapsed() + pause >= total;
            if !error.is_transient() || is_last || is_late {
                return Err(error);
            }
            tracing::debug!(target: "vmem::remote", %error, tries, "tries again");
            sleep(pause).await;
            last = error;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
}

fn of(error: object_store::Error) -> RequestError {
    RequestError::of(&error)
}

/// Awaits an answer of the store for no longer than this.
async fn within<T>(
    limit: Duration,
    request: impl Future<Output = object_store::Result<T>>,
) -> Result<T, RequestError> {
    match timeout(limit, request).await {
        Ok(answer) => answer.map_err(of),
        Err(_) => Err(RequestError::TimedOut { waited: limit }),
    }
}

/// The pieces cut into parts of this many bytes, but for the last one.
fn parts(pieces: &[Bytes], part_bytes: usize) -> Vec<PutPayload> {
    let mut parts = Vec::new();
    let mut part: Vec<Bytes> = Vec::new();
    let mut filled = 0;
    for piece in pieces {
        let mut piece = piece.clone();
        while !piece.is_empty() {
            let taken = piece.split_to(piece.len().min(part_bytes - filled));
            filled += taken.len();
            part.push(taken);
            if filled == part_bytes {
                parts.push(PutPayload::from_iter(part.drain(..)));
                filled = 0;
            }
        }
    }
    if !part.is_empty() {
        parts.push(PutPayload::from_iter(part));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_one_size_but_the_last() {
        let whole: Bytes = (0..100_u8).collect::<Vec<_>>().into();
        let pieces = [whole.slice(..10), whole.slice(10..70), Bytes::new(), whole.slice(70..)];
        let parts = parts(&pieces, 32);
        let lens: Vec<_> = parts.iter().map(PutPayload::content_length).collect();
        assert_eq!(lens, [32, 32, 32, 4]);
        let joined: Vec<u8> = parts.iter().flatten().flatten().copied().collect();
        assert_eq!(joined, whole);
    }
}
