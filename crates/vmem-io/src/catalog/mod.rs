//! The catalog of named objects: a redb database in one file.
//!
//! Invariant: the file appears under its name with its first commit in it, by a rename, and every
//! later change is one redb transaction: at any moment of a crash it is whole. It is read and
//! written on threads of its own. Opened with the disk tier, called by core.
//!
//! redb was chosen because it is one file, in Rust alone, transactional, checksummed page by page
//! and verified when it is opened, and lets its storage be replaced, so that power cuts can be
//! simulated below it. Of the others looked at, SQLite and LMDB bring C and no checksums, fjall
//! many files and background threads of its own.

mod audit;
mod inner;
mod rows;
mod snapshot;
mod storage;
mod tables;

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::Shared;
use parking_lot::Mutex;
use redb::StorageBackend;
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord};

use self::inner::{Inner, Open, identity};
use self::storage::{Overlay, Storage};
use self::tables::Failure;
use crate::directory::{CATALOG_FILE, StoreDirectory, Tally, UNFINISHED_FILE, UNKNOWN};
use crate::driver::is_closed;
use crate::pool::Pool;
use crate::tier::Taken;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Reads and the one commit that run at once.
const THREADS: usize = 3;

/// See the module's documentation.
pub struct NameCatalog {
    inner: Arc<Inner>,
    pool: Pool,
    /// Snapshots, one after the other: they take long, and nothing short stands behind them.
    snapshots: Pool,
    /// A check that has not begun, which later callers join.
    next_check: Arc<Mutex<Option<Shared<Answer<()>>>>>,
}

impl NameCatalog {
    /// Opens the catalog of a directory, if it has one, and verifies it. `cache_bytes` bounds what
    /// it keeps in memory.
    ///
    /// # Errors
    ///
    /// [`Damaged`](VirtualMemoryError::Damaged) with what can still be read,
    /// [`UnknownFormat`](VirtualMemoryError::UnknownFormat), `Io`.
    pub(crate) fn open(directory: &StoreDirectory, cache_bytes: usize) -> Result<(Self, Taken)> {
        Self::open_through(directory, cache_bytes, Ok)
    }

    /// The same, to look at: nothing is written to the file.
    ///
    /// # Errors
    ///
    /// Those of `open`.
    pub(crate) fn look_at(directory: &StoreDirectory, cache_bytes: usize) -> Result<Self> {
        let (catalog, _) = Self::open_through(directory, cache_bytes, Overlay::over)?;
        directory.tally().store(UNKNOWN, Ordering::Release);
        Ok(catalog)
    }

    fn open_through(
        directory: &StoreDirectory,
        cache_bytes: usize,
        through: impl FnOnce(Storage) -> io::Result<Storage>,
    ) -> Result<(Self, Taken)> {
        let files = directory.files();
        let path = files.path_of(CATALOG_FILE);
        let io = |error| VirtualMemoryError::io("opening the catalog", error);
        files.remove(UNFINISHED_FILE).map_err(io)?;
        let mut inner = Inner::new(path, cache_bytes, directory.tally());
        let mut taken = Taken::default();
        if files.has(CATALOG_FILE).map_err(io)? {
            let file = files.open(CATALOG_FILE)?;
            // It got its name with a commit in it: redb would take an empty file for a new one.
            if file.metadata().map_err(io)?.len() == 0 {
                let reason = "it is empty".into();
                return Err(VirtualMemoryError::Damaged { path: inner.path, reason });
            }
            taken = inner.load(through(Storage::of_file(file)).map_err(io)?)?;
            *inner.identity.get_mut() = identity(&files);
        }
        inner.tally.store(inner.head.get_mut().names, Ordering::Release);
        inner.files = Mutex::new(Some(files));
        Ok((Self::over_inner(inner), taken))
    }

    /// A catalog over storage of the caller's, for tests; begun if it is empty. Also says which
    /// extents it leads to.
    ///
    /// # Errors
    ///
    /// [`Damaged`](VirtualMemoryError::Damaged), `Io`.
    pub fn over(storage: Arc<dyn StorageBackend>, block_bytes: u32) -> Result<(Self, Taken)> {
        let inner = Inner::new(PathBuf::from("catalog"), 1 << 20, Tally::default());
        let storage = Storage::new(storage);
        let len = storage.len().map_err(|error| VirtualMemoryError::io("the catalog", error))?;
        let taken = match len {
            0 => {
                let (db, head) = inner.begin(storage.clone(), block_bytes)?;
                inner.install(Open { db: Some(Arc::new(db)), storage }, head);
                Taken::default()
            }
            _ => inner.load(storage)?,
        };
        Ok((Self::over_inner(inner), taken))
    }

    fn over_inner(inner: Inner) -> Self {
        let inner = Arc::new(inner);
        let ending = Arc::clone(&inner);
        NameCatalog {
            inner,
            pool: Pool::new("vmem-catalog", THREADS, Box::new(move || ending.end())),
            snapshots: Pool::new("vmem-snapshot", 1, Box::new(|| {})),
            next_check: Arc::default(),
        }
    }

    /// What the disk tier turned out to be; before anything else.
    pub(crate) fn set_disk(&self, data: File, block_bytes: u32) {
        let _ = self.inner.data.set(data);
        let mut head = self.inner.head.lock();
        if head.block_bytes == 0 {
            head.block_bytes = block_bytes;
        }
    }

    /// What extents are rounded to, if that is settled, in bytes.
    pub(crate) fn block_bytes(&self) -> Option<u32> {
        Some(self.inner.head.lock().block_bytes).filter(|&bytes| bytes > 0)
    }

    /// Every object whose rows are whole; and the names of the others.
    pub(crate) fn each_object(
        &self,
        mut each: impl FnMut(&str, CatalogObject) -> io::Result<()>,
    ) -> Result<Vec<String>> {
        self.inner.read(Vec::new(), |db| {
            tables::each_object(db, |name, object| each(name, object).map_err(Failure::Io))
        })
    }

    /// Runs `work`, which is short, on a thread.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Answer<T> {
        self.run_on(&self.pool, work)
    }

    fn run_on<T: Send + 'static>(
        &self,
        pool: &Pool,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Answer<T> {
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        pool.submit(Box::new(move |run| {
            let outcome = match run {
                Ok(()) => work(&inner),
                Err(error) if is_closed(&error) => Err(VirtualMemoryError::Closed),
                Err(error) => Err(VirtualMemoryError::io("starting a thread", error)),
            };
            // Its share is dropped before the answer, since the waiter may be closing.
            drop(inner);
            let _ = reply.send(outcome);
        }));
        async move { answer.await.unwrap_or(Err(VirtualMemoryError::Closed)) }.boxed()
    }
}

impl Catalog for NameCatalog {
    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        // Before it is queued: a store that is dropped meanwhile leaves the files.
        self.inner.tally.fetch_max(1, Ordering::AcqRel);
        self.run(move |inner| inner.commit(&changes))
    }

    fn attempts(&self) -> u64 {
        self.inner.attempts.load(Ordering::Acquire)
    }

    fn is_poisoned(&self) -> bool {
        self.inner.poisoned.load(Ordering::Acquire)
    }

    fn is_shut(&self) -> bool {
        self.inner.is_shut()
    }

    fn find(&self, name: Arc<str>) -> Answer<Option<CatalogObject>> {
        self.run(move |inner| inner.read(None, |db| tables::find(db, &name)))
    }

    fn record(&self, name: Arc<str>) -> Answer<Option<CatalogRecord>> {
        self.run(move |inner| inner.read(None, |db| tables::record(db, &name)))
    }

    fn names(
        &self,
        prefix: Arc<str>,
        from: Bound<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>> {
        self.run(move |inner| {
            let from = from.as_ref().map(|from| &**from);
            inner.read(Vec::new(), |db| tables::names(db, &prefix, from, limit))
        })
    }

    fn time(&self) -> SystemTime {
        SystemTime::now()
    }

    fn snapshot(&self, directory: PathBuf) -> Answer<()> {
        self.run_on(&self.snapshots, move |inner| inner.snapshot(&directory))
    }

    fn next_id(&self) -> u64 {
        self.inner.head.lock().next_id
    }

    fn check(&self) -> Answer<()> {
        let mut next = self.next_check.lock();
        // One that has ended without being begun was refused.
        if let Some(check) = next.as_ref().filter(|check| check.peek().is_none()) {
            return check.clone().boxed();
        }
        let begun = Arc::clone(&self.next_check);
        let check = self.run(move |inner| {
            begun.lock().take();
            inner.check()
        });
        let check = check.shared();
        *next = Some(check.clone());
        check.boxed()
    }

    fn close(&self) -> Answer<()> {
        self.snapshots.begin_close();
        self.pool.begin_close();
        let snapshots = self.snapshots.closed();
        let pool = self.pool.closed();
        let inner = Arc::clone(&self.inner);
        async move {
            snapshots.await;
            pool.await;
            inner.ended.lock().clone().map_or(Ok(()), Err)
        }
        .boxed()
    }
}

impl NameCatalog {
    /// Ends it, and waits for that: its shares of the directory are gone then. Blocks.
    pub(crate) fn shut(&self) {
        self.snapshots.shut_down();
        self.pool.shut_down();
    }
}

impl Drop for NameCatalog {
    /// What is in flight ends on its thread, which has shares of all that it needs, the lock of the
    /// directory too; until then an opener in this process waits.
    fn drop(&mut self) {
        if let Some(files) = &*self.inner.files.lock() {
            files.leave();
        }
        // In a forked child these do nothing, and keep what the parent will end.
        self.snapshots.begin_close();
        self.pool.begin_close();
    }
}

impl std::fmt::Debug for NameCatalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NameCatalog")
            .field("path", &self.inner.path)
            .field("head", &*self.inner.head.lock())
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
