//! A catalog of names in the object store itself, with one winner of each change of a name.
//!
//! Invariant: a *generation* of a name, the object `<prefix>/names/<name in hex>/<number>`, is
//! created once and never changed; the one with the greatest number says what the name stands for.
//! Called by core through [`Catalog`], once a store opens over it.
//!
//! # Why there is one winner
//!
//! A commit of a name creates the generation behind the newest that it knows, by a conditional
//! create: of two writers with the same knowledge one finds that the object exists, reads it, and
//! loses. It wins nevertheless if the token in it is that of its own attempt: an earlier try had
//! succeeded, and its answer was lost.
//!
//! Generations that were superseded are deleted, so a create on old knowledge could succeed where a
//! generation was deleted. That needs these steps: generation `n` is the newest when the writer
//! looks; others create `n + 1` and `n + 2` after that; `n + 1` is deleted once `n + 2` is in the
//! bucket for longer than the grace; and only then the writer creates `n + 1`. So more than the
//! grace lies between its look and its create. A commit whose look, or last commit, began more than
//! half the grace ago looks again; and what it does then takes at most twice the total timeout of a
//! request, which is at most the other half. Clocks of writers and of the object store need to run
//! at the same rate, not to agree.
//!
//! A listing may be stale in the same way: what it shows as the newest is still there if it is not
//! older than half the grace, and the generations behind it are asked for one by one; a look-up
//! that itself takes longer than half the grace begins again.
//!
//! # What is not known of a commit
//!
//! A put whose answers were all lost leaves its name *unknown*, and so does one that was made for a
//! commit that failed at another name. The next call that uses the name looks it up first. What
//! turns out to be of this instance's making it may go on from; what others have made since it was
//! last shown the name refuses a commit, until `find` or `record` has shown that.
//!
//! # Layout
//!
//! `places`: chunks as all processes know them; `paths` and `body`: objects of the bucket;
//! `generations`: what is known of each name; `lookup`: finding the newest; `changes`, `commit` and
//! `attempt`: making the next; `listing`: pages of names; `follow`: what others have changed;
//! `collect`: deletion of generations; `segments`: and of what they led to.

mod attempt;
mod body;
mod changes;
mod collect;
mod commit;
mod follow;
mod generations;
mod inner;
mod listing;
mod lookup;
mod paths;
mod places;
mod segments;

use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::ready;
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{
    Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord, check_runtime,
};

pub use places::{Place, Places};
pub use segments::CollectedSegments;

use crate::client::Client;
use crate::error::{OpenError, RequestError};
use crate::inner as tier;
use crate::lease::LeasePaths;
use crate::open::probe_create;
use crate::options::RemoteOptions;
use changes::Changes;
use inner::Inner;
use paths::Paths;

/// A [`Catalog`] whose names are in an object store that several instances share.
///
/// ```
/// use std::sync::Arc;
/// use vmem_core::backend::{Catalog, Run, StoredChunk};
/// use vmem_remote::object_store::memory::InMemory;
/// use vmem_remote::{BucketCatalog, Place, Places, RemoteOptions, Uuid};
///
/// /// One segment, in which chunks are where the tier says.
/// #[derive(Debug)]
/// struct OneSegment(Uuid);
///
/// impl Places for OneSegment {
///     fn place(&self, chunk: &StoredChunk) -> Option<Place> {
///         let run = chunk.runs.first()?;
///         let at = run.offset;
///         Some(Place { instance: self.0, segment: 0, at, len: run.footprint, sum: chunk.sum })
///     }
///
///     fn enter(&self, place: Place) -> StoredChunk {
///         let runs = [Run { offset: place.at, footprint: place.len }].into();
///         StoredChunk { runs, sum: place.sum }
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = Arc::new(InMemory::new());
/// let places = Arc::new(OneSegment(Uuid::from_u128(7)));
/// let catalog = BucketCatalog::open(bucket, RemoteOptions::default(), places).await?;
/// assert!(catalog.find("weights/step-100".into()).await?.is_none());
/// catalog.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BucketCatalog {
    inner: Arc<Inner>,
}

impl BucketCatalog {
    /// Opens the names below `<prefix>/names/` of a bucket, once the object store has shown, within
    /// the [timeout](RemoteOptions::request_timeout) of a request, that it does conditional
    /// creates.
    ///
    /// Of the options it uses those of requests, the prefix, and the
    /// [grace](RemoteOptions::grace). Numbers of objects and versions begin with the nanoseconds
    /// since 1970: they are unique as long as no two instances are opened within as many
    /// nanoseconds as the first of them gives numbers. What it does in the background runs on the
    /// current runtime.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: an option that cannot work, no runtime with a timer,
    /// [`NoConditionalCreate`](OpenError::NoConditionalCreate), or the cause for which the object
    /// store cannot be used. None holds a secret.
    pub async fn open(
        store: Arc<dyn ObjectStore>,
        options: RemoteOptions,
        places: Arc<dyn Places>,
    ) -> Result<Arc<Self>, OpenError> {
        Self::open_over(store, options, places, None).await
    }

    /// The same over a tier, whose lease keeps what the names lead to.
    pub(crate) async fn open_leased(
        store: Arc<dyn ObjectStore>,
        options: RemoteOptions,
        tier: Arc<tier::Inner>,
    ) -> Result<Arc<Self>, OpenError> {
        Self::open_over(store, options, tier.clone(), Some(tier)).await
    }

    async fn open_over(
        store: Arc<dyn ObjectStore>,
        options: RemoteOptions,
        places: Arc<dyn Places>,
        tier: Option<Arc<tier::Inner>>,
    ) -> Result<Arc<Self>, OpenError> {
        options.check()?;
        check_runtime().map_err(|_| OpenError::UnsuitableRuntime)?;
        let prefix = options.prefix()?;
        let paths = Paths::new(&prefix);
        let client = Client::new(store, options, Uuid::new_v4().as_u64_pair().0);
        probe_create(&client, &paths.probe()).await?;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first_id = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let collect = client.options().collect;
        let catalog = BucketCatalog {
            inner: Arc::new(Inner {
                client,
                leases: LeasePaths::new(&prefix),
                prefix,
                paths,
                places,
                generations: Mutex::default(),
                next_id: AtomicU64::new(first_id),
                attempts: AtomicU64::new(0),
                listed: follow::Listed::default(),
                tier,
                closing: CancellationToken::new(),
                tracker: TaskTracker::new(),
                runtime: Handle::current(),
            }),
        };
        if let Some(every) = collect {
            let collecting = collect::keep_collecting(Arc::downgrade(&catalog.inner), every);
            catalog.inner.tracker.spawn(collecting);
        }
        Ok(Arc::new(catalog))
    }

    /// Deletes the generations that others have superseded for longer than four times the
    /// [grace](RemoteOptions::grace), by the clock of the object store; returns how many. Several
    /// instances may do so at once. Nothing else deletes them.
    ///
    /// # Errors
    ///
    /// `Io`; what was deleted until then is deleted. `Closed`.
    pub async fn collect(&self) -> Result<u64, VirtualMemoryError> {
        self.answer(collect::collect).await
    }

    /// Deletes segments of all instances to which no name leads, superseded generations included,
    /// and that no instance uses: what names led to before [`collect`](Self::collect) has deleted
    /// their generations, and what processes left behind that were killed. Several instances may
    /// do so at once.
    ///
    /// Each instance is asked which of them it uses, and answers when it renews its lease, each
    /// quarter of the [grace](RemoteOptions::grace). So this takes about the grace; or six times
    /// that, while the lease of an instance that was killed runs out. A catalog that is closed
    /// ends it, with `Closed`. Of a name each generation is read, so this takes a request for each
    /// version that the bucket has; and the names have to be listed in less than three quarters of
    /// the grace.
    ///
    /// # Errors
    ///
    /// `Io`, also if an instance does not answer within eight times the grace, or if the object
    /// store lists too slowly; `Damaged` and `UnknownFormat` of a name or a lease, since what that
    /// leads to is not known. Nothing was deleted then, or a part of what may be. `Closed`.
    pub async fn collect_segments(&self) -> Result<CollectedSegments, VirtualMemoryError> {
        self.answer(|inner| async move {
            let closing = inner.closing.clone();
            let collected = closing.run_until_cancelled(segments::collect_segments(inner)).await;
            collected.unwrap_or(Err(VirtualMemoryError::Closed))
        })
        .await
    }

    /// Answers with what a task of the runtime finds out, which goes on if nobody awaits it.
    fn answer<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        // Before the look at whether it is closed, so that a close waits for this task or this
        // sees the close.
        let token = self.inner.tracker.token();
        if self.inner.closing.is_cancelled() {
            return ready(Err(VirtualMemoryError::Closed)).boxed();
        }
        let work = work(self.inner.clone());
        let (reply, answer) = oneshot::channel();
        drop(self.inner.runtime.spawn(async move {
            let _ = reply.send(work.await);
            drop(token);
        }));
        let abandoned = |_| Err(RequestError::Abandoned.of_catalog("catalog"));
        async move { answer.await.unwrap_or_else(abandoned) }.boxed()
    }

    /// Answers a question about one name.
    fn answer_name<T, F>(
        &self,
        name: Arc<str>,
        work: impl FnOnce(Arc<Inner>, Arc<str>) -> F,
    ) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VirtualMemoryError>> + Send + 'static,
    {
        match self.inner.paths.check(&name) {
            Ok(()) => self.answer(|inner| work(inner, name)),
            Err(error) => ready(Err(error)).boxed(),
        }
    }
}

impl Catalog for BucketCatalog {
    /// Puts one object for each name that changes; a rename puts two.
    ///
    /// A commit of one name is whole. One of several names is checked as a whole, and its names are
    /// put beside each other: after a crash or a lost race some may have changed, which are unknown
    /// then, so that the catalog [is shut](Catalog::is_shut) until they were looked up. A rename
    /// creates the new name before it removes the old one: after a crash between the two both lead
    /// to the object.
    ///
    /// # Errors
    ///
    /// `NameExists`, `VersionChanged` or `NameNotFound` if another instance has changed a name
    /// since this one was shown it; `find` or `record` shows it again. `Damaged` and
    /// `UnknownFormat` of a name that changes; `InvalidConfig` for a name that is too long for a
    /// key; `Io`.
    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        match Changes::new(changes, &*self.inner.places, &self.inner.paths) {
            Ok(changes) => match self.inner.hold(changes.given()) {
                Ok(given) => self.answer(|inner| {
                    inner.attempts.fetch_add(1, Ordering::SeqCst);
                    commit::commit(inner, changes, given)
                }),
                Err(error) => ready(Err(error)).boxed(),
            },
            Err(error) => ready(Err(error)).boxed(),
        }
    }

    /// Each name has a winner of its own.
    fn shares_commits(&self) -> bool {
        false
    }

    fn attempts(&self) -> u64 {
        self.inner.attempts.load(Ordering::SeqCst)
    }

    fn is_poisoned(&self) -> bool {
        false
    }

    fn is_shut(&self) -> bool {
        self.inner.generations.lock().has_unknown()
    }

    fn find(&self, name: Arc<str>) -> Answer<Option<CatalogObject>> {
        self.answer_name(name, |inner, name| async move {
            inner.leased("find").await?;
            let body = inner.find(&name).await?;
            let Some(object) = body.and_then(|body| body.object) else { return Ok(None) };
            inner.check_lease("find")?;
            let chunks = object.places.into_iter();
            let chunks = chunks.map(|place| place.map(|place| inner.places.enter(place)));
            Ok(Some(CatalogObject { record: object.record, chunks: chunks.collect() }))
        })
    }

    fn record(&self, name: Arc<str>) -> Answer<Option<CatalogRecord>> {
        self.answer_name(name, |inner, name| async move {
            let body = inner.find(&name).await?;
            Ok(body.and_then(|body| body.object).map(|object| object.record))
        })
    }

    fn names(
        &self,
        prefix: Arc<str>,
        from: Bound<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>> {
        self.answer(|inner| listing::names(inner, prefix, from, limit))
    }

    fn follow_every(&self) -> Option<Duration> {
        self.inner.client.options().follow
    }

    /// Gets one object for each name, or lists all names if that takes fewer requests.
    fn changed(&self, names: Vec<(Arc<str>, u64)>) -> Answer<Vec<VirtualMemoryError>> {
        self.answer(|inner| follow::changed(inner, names))
    }

    fn time(&self) -> SystemTime {
        SystemTime::now()
    }

    fn snapshot(&self, _directory: PathBuf) -> Answer<()> {
        let reason = "names that are in a bucket cannot be copied to a directory";
        ready(Err(VirtualMemoryError::invalid_config("directory", reason))).boxed()
    }

    fn next_id(&self) -> u64 {
        self.inner.next_id.load(Ordering::SeqCst)
    }

    fn close(&self) -> Answer<()> {
        self.inner.closing.cancel();
        self.inner.tracker.close();
        let inner = self.inner.clone();
        async move {
            inner.tracker.wait().await;
            Ok(())
        }
        .boxed()
    }
}
