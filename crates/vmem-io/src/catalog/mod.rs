//! The catalog of named objects: a redb database in one file.
//!
//! Invariant: the file appears under its name with its first commit in it, by a rename, and every later
//! change is one redb transaction: at any moment of a crash it is whole. It is read and written on
//! threads of its own. Opened with the disk tier, called by core.
//!
//! redb was chosen because it is one file, in Rust alone, transactional, checksummed page by page and
//! verified when it is opened, and lets its storage be replaced, so that power cuts can be simulated
//! below it. Of the others looked at, SQLite and LMDB bring C and no checksums, fjall many files and
//! background threads of its own.

mod rows;
mod storage;
mod tables;

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::FutureExt;
use futures::channel::oneshot;
use parking_lot::{Mutex, RwLock};
use redb::{Builder, Database, StorageBackend};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::{Answer, Catalog, CatalogChange, CatalogObject, CatalogRecord};

use self::rows::Head;
use self::storage::{Overlay, Storage};
use self::tables::{Failure, Summary};
use crate::directory::{CATALOG_FILE, Files, StoreDirectory, Tally, UNKNOWN};
use crate::driver::is_closed;
use crate::pool::Pool;
use crate::tier::Taken;

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Reads and the one commit that run at once.
const THREADS: usize = 3;

/// The name of a catalog that is being made.
const UNFINISHED: &str = "vmem.catalog.new";

/// See the module's documentation.
pub struct NameCatalog {
    inner: Arc<Inner>,
    pool: Pool,
}

struct Inner {
    /// For errors.
    path: PathBuf,
    cache_bytes: usize,
    /// None once it is closed, and of a catalog over other storage.
    files: Mutex<Option<Files>>,
    tally: Tally,
    /// None before the first commit, and after the end.
    open: RwLock<Option<Open>>,
    /// Nothing more is committed.
    poisoned: AtomicBool,
    /// Transactions that were begun.
    attempts: AtomicU64,
    /// What the head row says; whoever commits has it.
    head: Mutex<Head>,
    /// The data file, through the page cache, for snapshots.
    data: OnceLock<File>,
}

/// A database, and what it lies in.
struct Open {
    /// None after a commit that failed, until it could be opened again.
    db: Option<Database>,
    storage: Storage,
}

impl NameCatalog {
    /// Opens the catalog of a directory, if it has one, and verifies it. `cache_bytes` bounds what it keeps
    /// in memory.
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
        files.remove(UNFINISHED).map_err(io)?;
        let mut inner = Inner::new(path, cache_bytes, directory.tally());
        let mut taken = Taken::default();
        if files.has(CATALOG_FILE).map_err(io)? {
            let file = files.open(CATALOG_FILE)?;
            // It got its name with a commit in it: redb would take an empty file for a new one.
            if file.metadata().map_err(io)?.len() == 0 {
                let (path, reason) = (inner.path, "it is empty".into());
                return Err(VirtualMemoryError::Damaged { path, reason });
            }
            taken = inner.load(through(Storage::of_file(file)).map_err(io)?)?;
        }
        inner.tally.store(inner.head.get_mut().names, Ordering::Release);
        inner.files = Mutex::new(Some(files));
        Ok((Self::over_inner(inner), taken))
    }

    /// A catalog over storage of the caller's, for tests; begun if it is empty. Also says which extents
    /// it leads to.
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
                inner.install(Open { db: Some(db), storage }, head);
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

    /// Runs `work` on a thread.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Answer<T> {
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        self.pool.submit(Box::new(move |run| {
            let outcome = match run {
                Ok(()) => work(&inner),
                Err(error) if is_closed(&error) => Err(VirtualMemoryError::Closed),
                Err(error) => Err(VirtualMemoryError::io("starting a thread", error)),
            };
            // Its share goes before the answer: whoever waits for it may be closing.
            drop(inner);
            let _ = reply.send(outcome);
        }));
        async move { answer.await.unwrap_or(Err(VirtualMemoryError::Closed)) }.boxed()
    }
}

impl Catalog for NameCatalog {
    fn commit(&self, changes: Vec<CatalogChange>) -> Answer<()> {
        // Before it stands in line: whoever drops the store meanwhile leaves the files.
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

    fn names(
        &self,
        prefix: Arc<str>,
        after: Option<Arc<str>>,
        limit: usize,
    ) -> Answer<Vec<(Arc<str>, CatalogRecord)>> {
        self.run(move |inner| {
            inner.read(Vec::new(), |db| tables::names(db, &prefix, after.as_deref(), limit))
        })
    }

    fn snapshot(&self, directory: PathBuf) -> Answer<()> {
        self.run(move |inner| inner.snapshot(&directory))
    }

    fn next_id(&self) -> u64 {
        self.inner.head.lock().next_id
    }

    fn close(&self) -> Answer<()> {
        self.pool.begin_close();
        self.pool.closed().map(Ok).boxed()
    }
}

impl NameCatalog {
    /// Ends it, and waits for that: its shares of the directory are gone then. Blocks.
    pub(crate) fn shut(&self) {
        self.pool.shut_down();
    }
}

impl Drop for NameCatalog {
    /// What is in flight ends on its thread, which has shares of all that it needs, the lock of the
    /// directory too; until then who opens it in this process waits.
    fn drop(&mut self) {
        if let Some(files) = &*self.inner.files.lock() {
            files.leave();
        }
        self.pool.begin_close();
    }
}

impl Inner {
    fn new(path: PathBuf, cache_bytes: usize, tally: Tally) -> Self {
        Inner {
            path,
            cache_bytes,
            files: Mutex::new(None),
            tally,
            open: RwLock::new(None),
            poisoned: AtomicBool::new(false),
            attempts: AtomicU64::new(0),
            head: Mutex::new(Head { format: rows::FORMAT, ..Head::default() }),
            data: OnceLock::new(),
        }
    }

    /// Reads; `nothing` where there is no database.
    fn read<T>(
        &self,
        nothing: T,
        work: impl FnOnce(&Database) -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        if self.is_shut() {
            // Where nothing more is committed it can still be read.
            let _ = self.open_again(&self.head.lock());
        }
        match &*self.open.read() {
            None => Ok(nothing),
            Some(Open { db: Some(db), .. }) => self.guarded("reading the catalog", || work(db)),
            Some(Open { db: None, .. }) => Err(self.shut("reading the catalog")),
        }
    }

    fn is_shut(&self) -> bool {
        self.open.read().as_ref().is_some_and(|open| open.db.is_none())
    }

    fn install(&self, open: Open, head: Head) {
        *self.head.lock() = head;
        *self.open.write() = Some(open);
    }

    /// Calls redb, which may panic over a file that somebody has changed under it.
    fn guarded<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce() -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let gave_up = |_| Err(Failure::Damaged("no database can be made of it".to_owned()));
        let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(gave_up);
        outcome.map_err(|failure| failure.public(operation, &self.path))
    }

    fn builder(&self) -> Builder {
        let mut builder = Builder::new();
        builder.set_cache_size(self.cache_bytes);
        builder
    }

    /// Verifies all of what is there, says which extents it leads to, and opens it. What is refused was only looked
    /// at: it is as it was.
    fn load(&self, storage: Storage) -> Result<Taken> {
        let verified = self.guarded("opening the catalog", || {
            let mut builder = self.builder();
            builder.set_check_integrity_on_open(true);
            let looked_at = Overlay::over(storage.clone()).map_err(Failure::Io)?;
            tables::summary(&builder.create_with_backend(looked_at)?)
        });
        let Summary { head, taken } =
            verified.map_err(|error| self.with_salvage(error, storage.clone()))?;
        let db = self.guarded("opening the catalog", || {
            Ok(self.builder().create_with_backend(storage.clone())?)
        })?;
        let block_bytes = head.block_bytes;
        self.install(Open { db: Some(db), storage }, head);
        Ok(Taken { ranges: taken, block_bytes: Some(block_bytes) })
    }

    /// Adds to `Damaged` what can still be read.
    fn with_salvage(&self, error: VirtualMemoryError, storage: Storage) -> VirtualMemoryError {
        let VirtualMemoryError::Damaged { path, reason } = error else { return error };
        let mut whole = 0_u64;
        let salvage = self.guarded("reading the catalog", || {
            let looked_at = Overlay::over(storage).map_err(Failure::Io)?;
            let db = self.builder().create_with_backend(looked_at)?;
            tables::each_object(&db, |_, _| {
                whole += 1;
                Ok(())
            })
        });
        let reason = match salvage {
            Ok(bad) => format!("{reason}; {whole} names can still be read, {} cannot", bad.len()),
            Err(_) => format!("{reason}; {whole} names could still be read"),
        };
        VirtualMemoryError::Damaged { path, reason: reason.into() }
    }

    /// Makes an empty database.
    fn begin(&self, storage: Storage, block_bytes: u32) -> Result<(Database, Head)> {
        self.guarded("making the catalog", || {
            let db = self.builder().create_with_backend(storage)?;
            let head = tables::begin(&db, block_bytes)?;
            Ok((db, head))
        })
    }

    fn commit(&self, changes: &[CatalogChange]) -> Result<()> {
        let mut head = self.head.lock();
        let operation = "committing names";
        // Until it is known otherwise.
        self.tally.fetch_max(1, Ordering::AcqRel);
        if let Err(error) = self.prepare(&mut head) {
            if !self.is_shut() {
                self.tally.store(head.names, Ordering::Release);
            }
            return Err(error);
        }
        self.attempts.fetch_add(1, Ordering::AcqRel);
        let committed = match &*self.open.read() {
            Some(Open { db: Some(db), .. }) => {
                self.guarded(operation, || tables::commit(db, *head, changes))
            }
            _ => return Err(self.shut(operation)),
        };
        let error = match committed {
            Ok(new) => {
                *head = new;
                self.tally.store(head.names, Ordering::Release);
                return Ok(());
            }
            Err(error) => error,
        };
        if let Some(open) = &mut *self.open.write() {
            // Closing it may want to write, and fail again.
            let db = open.db.take();
            let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
            self.poisoned.fetch_or(open.storage.sync_failed(), Ordering::AcqRel);
        }
        // At once, so that what was not committed is known not to be.
        match self.open_again(&head) {
            Ok(()) => self.tally.store(head.names, Ordering::Release),
            Err(again) => tracing::warn!(error = %again, "the catalog is not open"),
        }
        Err(error)
    }

    /// Sees to it that there is a database to commit to.
    fn prepare(&self, head: &mut Head) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(self.shut("committing names"));
        }
        if self.open.read().is_none() {
            let files = self.files.lock().clone().ok_or(VirtualMemoryError::Closed)?;
            let (open, first) = self.make_in(&files, head.block_bytes)?;
            publish(&files)?;
            *head = first;
            *self.open.write() = Some(open);
        }
        self.open_again(head)
    }

    /// Opens the database again after a commit that failed. Unless it was a sync that did, what is there is
    /// what was there before.
    fn open_again(&self, before: &Head) -> Result<()> {
        // A snapshot that reads keeps nobody waiting.
        if !self.is_shut() {
            return Ok(());
        }
        let mut open = self.open.write();
        let Some(Open { db: shut @ None, storage }) = &mut *open else { return Ok(()) };
        let (db, head) = self.guarded("opening the catalog", || {
            let db = self.builder().create_with_backend(storage.clone())?;
            let head = tables::head(&db)?;
            Ok((db, head))
        })?;
        let unknown = storage.sync_failed() || head.commits != before.commits;
        // It can be read all the same.
        *shut = Some(db);
        if unknown {
            self.poisoned.store(true, Ordering::Release);
            return Err(self.shut("committing names"));
        }
        Ok(())
    }

    /// What those get who come when it is not open, or nothing more can be committed.
    fn shut(&self, operation: &'static str) -> VirtualMemoryError {
        let why = "a commit before it failed, and the catalog could not be opened again";
        VirtualMemoryError::io(operation, io::Error::other(why))
    }

    /// Makes an empty database in a directory, under a name that nobody takes for a catalog.
    fn make_in(&self, files: &Files, block_bytes: u32) -> Result<(Open, Head)> {
        let io = |error| VirtualMemoryError::io("making the catalog", error);
        files.remove(UNFINISHED).map_err(io)?;
        let storage = Storage::of_file(files.open(UNFINISHED)?);
        let (db, head) = self.begin(storage.clone(), block_bytes)?;
        Ok((Open { db: Some(db), storage }, head))
    }

    fn snapshot(&self, target: &Path) -> Result<()> {
        let invalid = |reason: &str| VirtualMemoryError::InvalidConfig {
            field: "directory",
            reason: format!("{} {reason}", target.display()).into(),
        };
        let (directory, data) = StoreDirectory::open(Some(target))?;
        let io = |error| VirtualMemoryError::io("writing the snapshot", error);
        let files = directory.files();
        let used = files.has(CATALOG_FILE).map_err(io)? || data.metadata().map_err(io)?.len() > 0;
        if used {
            return Err(invalid("holds a store already"));
        }
        let block_bytes = self.head.lock().block_bytes;
        let open = self.open.read();
        let (Some(Open { db, .. }), Some(source)) = (&*open, self.data.get()) else {
            return Ok(());
        };
        let db = db.as_ref().ok_or_else(|| self.shut("writing the snapshot"))?;
        let (copy, _) = self.make_in(&files, block_bytes)?;
        let Some(into) = &copy.db else { return Err(self.shut("writing the snapshot")) };
        self.guarded("writing the snapshot", || {
            tables::copy(db, into, |taken| {
                copy_bytes(source, &data, &taken)?;
                data.sync_all()
            })
        })?;
        drop(copy);
        publish(&files)?;
        directory.tally().store(UNKNOWN, Ordering::Release);
        Ok(())
    }

    /// After the last job.
    fn end(&self) {
        // Closing it writes.
        drop(self.open.write().take());
        drop(self.files.lock().take());
    }
}

/// A catalog that was made gets its name.
fn publish(files: &Files) -> Result<()> {
    let io = |error| VirtualMemoryError::io("making the catalog", error);
    files.rename(UNFINISHED, CATALOG_FILE).map_err(io)
}

/// Makes `to` the same as `from` where these extents are; the file system shares them where it can.
fn copy_bytes(from: &File, to: &File, taken: &[(u64, u32)]) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let mut taken = taken.iter().copied().peekable();
    while let Some((start, len)) = taken.next() {
        let mut end = start + u64::from(len);
        while let Some((_, more)) = taken.next_if(|&(start, _)| start == end) {
            end += u64::from(more);
        }
        copy_range(from, to, start, end)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = Vec::new();
    while at < end {
        let (mut off_in, mut off_out) = (at, at);
        let len = (end - at).min(1 << 20) as usize;
        let copied = match buffer.is_empty() {
            true => {
                rustix::fs::copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), len)
            }
            false => Err(rustix::io::Errno::OPNOTSUPP),
        };
        at += match copied {
            Ok(count) if count > 0 => count as u64,
            // Over the border of a file system, or of one that cannot; or the file has ended.
            _ => {
                buffer.resize(1 << 20, 0);
                match from.read_at(&mut buffer[..len], at)? {
                    // Lost already: whoever reads the copy is told by its checksum.
                    0 => return Ok(()),
                    count => {
                        to.write_all_at(&buffer[..count], at)?;
                        count as u64
                    }
                }
            }
        };
    }
    Ok(())
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
mod tests {
    use std::fs;

    use bytes::Bytes;
    use futures::executor::block_on;
    use vmem_core::MemoryTier;

    use super::*;

    #[test]
    fn a_catalog_of_another_version_is_refused_and_left_as_it_is() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(CATALOG_FILE);
        {
            let db = Database::create(&path).unwrap();
            tables::begin(&db, 512).unwrap();
            tables::set_head(&db, Head { format: 1, block_bytes: 512, ..Head::default() });
            // As a crash leaves it: opening it would write.
            fs::copy(&path, place.path().join("copy")).unwrap();
        }
        fs::rename(place.path().join("copy"), &path).unwrap();
        let written = fs::read(&path).unwrap();
        for _ in 0..2 {
            let (directory, data) = StoreDirectory::open(Some(place.path())).unwrap();
            drop(data);
            let error = NameCatalog::open(&directory, 1 << 20).err();
            let Some(VirtualMemoryError::UnknownFormat { path: of, found: 1, known: 0 }) = error
            else {
                panic!("{error:?}")
            };
            assert_eq!(of, directory.path().join(CATALOG_FILE));
            let error = NameCatalog::look_at(&directory, 1 << 20).err();
            assert!(matches!(error, Some(VirtualMemoryError::UnknownFormat { found: 1, .. })));
        }
        assert!(fs::read(&path).unwrap() == written, "what is not understood is not touched");
    }

    #[test]
    fn a_snapshot_that_reads_keeps_no_commit_waiting() {
        let place = tempfile::tempdir().unwrap();
        let (directory, _data) = StoreDirectory::open(Some(place.path())).unwrap();
        let (catalog, _) = NameCatalog::open(&directory, 1 << 20).unwrap();
        catalog.set_disk(tempfile::tempfile().unwrap(), 512);
        let record =
            CatalogRecord { id: 0, len: 0, home: MemoryTier::Disk, metadata: Bytes::new() };
        let put = |name: &str| {
            let (name, record) = (name.into(), record.clone());
            let segment = CatalogChange::Segment { id: 0, segment: 0, chunks: Vec::new() };
            vec![CatalogChange::Put { name, record }, segment]
        };
        block_on(catalog.commit(put("a"))).unwrap();
        let reading = catalog.inner.open.read();
        let (done, is_done) = std::sync::mpsc::channel();
        let committing = catalog.commit(put("a"));
        std::thread::spawn(move || done.send(block_on(committing)));
        is_done.recv_timeout(std::time::Duration::from_secs(20)).expect("it waits").unwrap();
        drop(reading);
        assert_eq!(catalog.attempts(), 2);
    }
}
