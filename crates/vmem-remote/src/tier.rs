//! The remote tier: extents whose chunks are in segments of a bucket.
//!
//! Invariant, the ownership rule: a task of the tier's runtime owns the buffers and extents of a
//! call from the call to its end; a future holds the receiving end of the answer and nothing else.
//! Called by core through [`Tier`].

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, ready};
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use vmem_core::backend::{
    CHUNK_BYTES, Durable, Extent, IoBuf, ReadChunk, SharedOwner, StoredChunk, Tier, TierError,
    TierUsage, check_runtime,
};

use crate::buffers::Buffers;
use crate::catalog::BucketCatalog;
use crate::client::Client;
use crate::error::{OpenError, RequestError, invalid};
use crate::gather::{Call, Gather};
use crate::inner::{Inner, root_of};
use crate::lease::{Lease, keep_lease};
use crate::ledger::Ledger;
use crate::open::probe;
use crate::options::RemoteOptions;
use crate::read;
use crate::stats::RemoteStats;

type Closing = Shared<BoxFuture<'static, Result<(), TierError>>>;

/// A [`Tier`] over any object store.
///
/// ```
/// use std::sync::Arc;
/// use object_store::memory::InMemory;
/// use vmem_core::backend::{IoBuf, ReadChunk, Tier};
/// use vmem_remote::{RemoteOptions, RemoteTier};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tier = RemoteTier::open(Arc::new(InMemory::new()), RemoteOptions::default()).await?;
/// let extent = tier.reserve(&[5]).unwrap().remove(0);
/// let written = tier.write(vec![(extent, "chunk".into())]).await.unwrap();
/// let chunks = ReadChunk::in_sequence(written.into_iter().map(Arc::new));
/// let (buf, result) = tier.read(chunks, IoBuf::from_vec(vec![0; 5])).await;
/// result.unwrap();
/// assert_eq!(&buf[..], b"chunk");
/// tier.close().await.unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RemoteTier {
    inner: Arc<Inner>,
    /// The same, as its extents hold it.
    owner: SharedOwner,
    described: Arc<str>,
    closing: Mutex<Option<Closing>>,
}

impl RemoteTier {
    /// Opens a tier in a bucket, once that has put, given back and deleted a small object under
    /// the prefix, within the [timeout](RemoteOptions::request_timeout) of a request.
    ///
    /// What the tier does in the background runs on the current runtime.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: an option that cannot work, no runtime with a timer, or the cause for which
    /// the object store cannot be used. None holds a secret.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        options: RemoteOptions,
    ) -> Result<Arc<Self>, OpenError> {
        options.check()?;
        check_runtime().map_err(|_| OpenError::UnsuitableRuntime)?;
        let prefix = options.prefix()?;
        let id = Uuid::new_v4();
        let root = root_of(&prefix, id);
        let capacity = options.capacity_bytes();
        let described = format!("{capacity} bytes of an object store, below {root}");
        let ledger = Ledger::new(capacity, options.segment_bytes, options.compact_below);
        let buffers = Buffers::new(options.buffer_bytes);
        let client = Client::new(store, options, id.as_u64_pair().0);
        probe(&client, &root, id).await?;
        let inner = Arc::new_cyclic(|me| Inner {
            client,
            buffers,
            ledger: Mutex::new(ledger),
            gather: Mutex::new(Gather::default()),
            reads: Mutex::default(),
            is_tidying: AtomicBool::new(false),
            closing: CancellationToken::new(),
            tracker: TaskTracker::new(),
            runtime: Handle::current(),
            lease: Lease::new(&prefix),
            prefix,
            id,
            root,
            me: me.clone(),
        });
        // Before anything else is put.
        let leased = inner.renew().await;
        leased.map_err(|source| OpenError::Unavailable { request: "put", source })?;
        let keeping = keep_lease(Arc::downgrade(&inner), inner.closing.clone());
        inner.tracker.spawn_on(keeping, &inner.runtime);
        let owner = SharedOwner::new(inner.clone());
        Ok(Arc::new(RemoteTier {
            inner,
            owner,
            described: described.into(),
            closing: Mutex::new(None),
        }))
    }

    /// Opens a tier, and the names of the bucket that lead to what is in it: both for a store that
    /// is [opened over names](https://docs.rs/vmem/latest/vmem/fn.open_over_names.html).
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open), and of [`BucketCatalog::open`].
    pub async fn open_with_names(
        store: Arc<dyn ObjectStore>,
        options: RemoteOptions,
    ) -> Result<(Arc<Self>, Arc<BucketCatalog>), OpenError> {
        let tier = Self::open(store.clone(), options.clone()).await?;
        match BucketCatalog::open_leased(store, options, tier.inner.clone()).await {
            Ok(catalog) => Ok((tier, catalog)),
            Err(error) => {
                // Nothing was put, and the error says more than that of an end.
                let _ = tier.close().await;
                Err(error)
            }
        }
    }

    /// Requests that were made, and what lies in the bucket.
    pub fn stats(&self) -> RemoteStats {
        RemoteStats::of(&self.inner)
    }
}

impl Tier for RemoteTier {
    fn reserve(&self, lens: &[u32]) -> Result<Vec<Extent>, TierError> {
        self.inner.check_open()?;
        if lens.iter().any(|&len| len as usize > CHUNK_BYTES) {
            return Err(invalid("reserve", "a chunk is longer than 64 KiB"));
        }
        let offsets = self.inner.ledger.lock().reserve(lens)?;
        let places = offsets.into_iter().zip(lens);
        Ok(places.map(|(at, &len)| Extent::new(at, len, len, self.owner.clone())).collect())
    }

    fn write(
        &self,
        pieces: Vec<(Extent, Bytes)>,
    ) -> BoxFuture<'static, Result<Vec<Extent>, TierError>> {
        if let Err(error) = self.inner.check_write(&pieces) {
            return ready(Err(error)).boxed();
        }
        let (extents, mut payloads): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let buffered = self.inner.buffers.copy(&mut payloads);
        let (reply, answer) = oneshot::channel();
        let token = self.inner.tracker.token();
        self.inner.enqueue(Call { extents, payloads, reply, buffered, token });
        let abandoned = |_| Err(RequestError::Abandoned.of_tier("write"));
        async move { answer.await.unwrap_or_else(abandoned) }.boxed()
    }

    fn read(
        &self,
        chunks: Vec<ReadChunk>,
        buf: IoBuf,
    ) -> BoxFuture<'static, (IoBuf, Result<(), TierError>)> {
        if let Err(error) = self.inner.check_read(&chunks, &buf) {
            return ready((buf, Err(error))).boxed();
        }
        let (call, answer) = match read::Call::new(&self.inner, chunks, buf) {
            Ok(made) => made,
            Err(refused) => return ready(refused).boxed(),
        };
        self.inner.read(call);
        async move { answer.await.expect("the end of the task, whatever it is, answers") }.boxed()
    }

    fn footprint(&self, len: u32) -> u64 {
        len.into()
    }

    fn usage(&self) -> TierUsage {
        self.inner.ledger.lock().usage()
    }

    fn describe(&self) -> Arc<str> {
        Arc::clone(&self.described)
    }

    /// Refuses what comes after, waits for what is in flight, and deletes what the tier has put,
    /// but for segments to which names lead, or led.
    fn close(&self) -> BoxFuture<'static, Result<(), TierError>> {
        self.inner.closing.cancel();
        self.inner.refuse_queued();
        let mut closing = self.closing.lock();
        let closing = closing.get_or_insert_with(|| {
            let (done, closed) = oneshot::channel();
            let inner = Arc::clone(&self.inner);
            // A task of its own: a close that was begun ends, whatever becomes of its future.
            self.inner.runtime.spawn(async move {
                inner.tracker.close();
                inner.tracker.wait().await;
                let _ = done.send(inner.end().await);
            });
            let abandoned = |_| Err(RequestError::Abandoned.of_tier("close"));
            async move { closed.await.unwrap_or_else(abandoned) }.boxed().shared()
        });
        closing.clone().boxed()
    }
}

impl Durable for RemoteTier {
    /// A write is answered once it is in the bucket.
    fn sync(&self) -> BoxFuture<'static, Result<(), TierError>> {
        ready(Ok(())).boxed()
    }

    fn adopt(&self, len: u32, chunk: StoredChunk) -> Result<Extent, TierError> {
        self.inner.check_open()?;
        let offset = chunk.runs.first().map_or(0, |run| run.offset);
        let mut ledger = self.inner.ledger.lock();
        let placed = ledger.find(offset);
        if placed.is_none_or(|placed| (placed.len, placed.sum) != (len, chunk.sum)) {
            return Err(invalid("adopt", "a chunk that is not where its name leads"));
        }
        ledger.adopted(offset);
        drop(ledger);
        let mut extent = Extent::new(offset, len, len, self.owner.clone());
        extent.seal(chunk.sum);
        extent.keep();
        Ok(extent)
    }
}

impl Inner {
    /// Deletes what nobody needs any more, and then the lease.
    async fn end(&self) -> Result<(), TierError> {
        self.delete_all().await?;
        self.give_lease_back().await.map_err(|error| error.of_tier("delete"))
    }

    /// Deletes what this instance has put, also what it does not know of, but for segments with
    /// names.
    async fn delete_all(&self) -> Result<(), TierError> {
        let delete = async {
            let mut left = self.client.list(&self.root).await?;
            let named = self.ledger.lock().seal();
            let named: HashSet<_> = named.into_iter().map(|segment| self.path(segment)).collect();
            left.retain(|path| !named.contains(path) || vmem_core::planted!("named-deleted"));
            for paths in left.chunks(1000) {
                self.client.delete(paths).await?;
            }
            Ok(())
        };
        delete.await.map_err(|error: RequestError| error.of_tier("delete"))
    }
}
