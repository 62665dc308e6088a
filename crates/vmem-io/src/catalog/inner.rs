//! The database behind the catalog: opened, committed to, opened again after a failure.
//!
//! Invariant: a commit is reported as made only if the files were where the store was opened both
//! before and after it. A long read has a share of the database and holds no lock, so a commit that
//! fails takes the database away from it rather than wait. Called by the catalog on its threads.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use redb::{Builder, Database};
use vmem_core::VirtualMemoryError;
use vmem_core::backend::CatalogChange;

use super::Result;
use super::audit::{Summary, summary};
use super::rows::{self, Head};
use super::storage::{Overlay, Storage};
use super::tables::{self, Failure};
use crate::directory::{CATALOG_FILE, Files, Identity, Tally, UNFINISHED_FILE};
use crate::tier::Taken;

pub(super) struct Inner {
    /// For errors.
    pub(super) path: PathBuf,
    pub(super) cache_bytes: usize,
    /// None once it is closed, and of a catalog over other storage.
    pub(super) files: Mutex<Option<Files>>,
    pub(super) tally: Tally,
    /// None before the first commit, and after the end.
    pub(super) open: RwLock<Option<Open>>,
    /// Nothing more is committed.
    pub(super) poisoned: AtomicBool,
    /// Transactions that were begun.
    pub(super) attempts: AtomicU64,
    /// The contents of the head row, locked by a commit.
    pub(super) head: Mutex<Head>,
    /// The data file, through the page cache, for snapshots.
    pub(super) data: OnceLock<File>,
    /// Which file the catalog is, once it has its name.
    pub(super) identity: Mutex<Option<Identity>>,
    /// What the end of it said.
    pub(super) ended: Mutex<Option<VirtualMemoryError>>,
}

/// A database, and what it lies in.
pub(super) struct Open {
    /// None after a commit that failed, until it could be opened again.
    pub(super) db: Option<Arc<Database>>,
    pub(super) storage: Storage,
}

impl Inner {
    pub(super) fn new(path: PathBuf, cache_bytes: usize, tally: Tally) -> Self {
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
            identity: Mutex::new(None),
            ended: Mutex::new(None),
        }
    }

    /// Reads; `nothing` where there is no database.
    pub(super) fn read<T>(
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

    pub(super) fn is_shut(&self) -> bool {
        self.open.read().as_ref().is_some_and(|open| open.db.is_none())
    }

    pub(super) fn install(&self, open: Open, head: Head) {
        *self.head.lock() = head;
        *self.open.write() = Some(open);
    }

    /// Calls redb, which may panic if its file was changed from outside.
    pub(super) fn guarded<T>(
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

    /// Verifies the whole catalog, says which extents it leads to, and opens it. What is refused
    /// was only looked at: it is as it was.
    pub(super) fn load(&self, storage: Storage) -> Result<Taken> {
        let verified = self.guarded("opening the catalog", || {
            let mut builder = self.builder();
            builder.set_check_integrity_on_open(true);
            let looked_at = Overlay::over(storage.clone()).map_err(Failure::Io)?;
            summary(&builder.create_with_backend(looked_at)?)
        });
        let Summary { head, taken } =
            verified.map_err(|error| self.with_salvage(error, storage.clone()))?;
        let db = self.guarded("opening the catalog", || {
            Ok(self.builder().create_with_backend(storage.clone())?)
        })?;
        let block_bytes = head.block_bytes;
        self.install(Open { db: Some(Arc::new(db)), storage }, head);
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
    pub(super) fn begin(&self, storage: Storage, block_bytes: u32) -> Result<(Database, Head)> {
        self.guarded("making the catalog", || {
            let db = self.builder().create_with_backend(storage)?;
            let head = tables::begin(&db, block_bytes)?;
            Ok((db, head))
        })
    }

    pub(super) fn commit(&self, changes: &[CatalogChange]) -> Result<()> {
        let mut head = self.head.lock();
        let operation = "committing names";
        // Until it is known otherwise.
        self.tally.fetch_max(1, Ordering::AcqRel);
        if let Err(error) = self.check().and_then(|()| self.prepare(&mut head)) {
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
                // It is in a file, but perhaps not in one that can be found again.
                return self.check().inspect_err(|_| self.poisoned.store(true, Ordering::Release));
            }
            Err(error) => error,
        };
        if let Some(open) = &mut *self.open.write() {
            open.take_down();
            self.poisoned.fetch_or(open.storage.sync_failed(), Ordering::AcqRel);
        }
        // At once, so that what was not committed is known not to be.
        match self.open_again(&head) {
            Ok(()) => self.tally.store(head.names, Ordering::Release),
            Err(again) => {
                tracing::warn!(target: "vmem::names", error = %again, "the catalog is not open")
            }
        }
        Err(error)
    }

    /// Makes the database, or opens it again, where there is none to commit to.
    fn prepare(&self, head: &mut Head) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(self.shut("committing names"));
        }
        if self.open.read().is_none() {
            let files = self.files.lock().clone().ok_or(VirtualMemoryError::Closed)?;
            let (open, first) = self.make_in(&files, head.block_bytes)?;
            publish(&files)?;
            *self.identity.lock() = identity(&files);
            *head = first;
            *self.open.write() = Some(open);
        }
        self.open_again(head)
    }

    /// Opens the database again after a commit that failed. Unless it was a sync that did,
    /// its contents are those of before.
    fn open_again(&self, before: &Head) -> Result<()> {
        // A snapshot that reads delays no other call.
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
        // It can still be read.
        *shut = Some(Arc::new(db));
        if unknown {
            self.poisoned.store(true, Ordering::Release);
            return Err(self.shut("committing names"));
        }
        Ok(())
    }

    /// The error for calls while it is not open, or once nothing more can be committed.
    pub(super) fn shut(&self, operation: &'static str) -> VirtualMemoryError {
        let why = "a commit before it failed, and the catalog could not be opened again";
        VirtualMemoryError::io(operation, io::Error::other(why))
    }

    /// Makes an empty database in a directory, under a name that is not that of a catalog.
    pub(super) fn make_in(&self, files: &Files, block_bytes: u32) -> Result<(Open, Head)> {
        let io = |error| VirtualMemoryError::io("making the catalog", error);
        files.remove(UNFINISHED_FILE).map_err(io)?;
        let storage = Storage::of_file(files.open(UNFINISHED_FILE)?);
        let (db, head) = self.begin(storage.clone(), block_bytes)?;
        Ok((Open { db: Some(Arc::new(db)), storage }, head))
    }

    /// Checks that what is durable here can be opened again.
    ///
    /// # Errors
    ///
    /// [`Unreachable`](VirtualMemoryError::Unreachable).
    pub(super) fn check(&self) -> Result<()> {
        if self.tally.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let files = self.files.lock().clone();
        files.map_or(Ok(()), |files| files.check(*self.identity.lock()))
    }

    /// After the last job.
    pub(super) fn end(&self) {
        // Closing it writes.
        drop(self.open.write().take());
        if let Err(error) = self.check() {
            tracing::error!(
                target: "vmem::names", path = %self.path.display(), %error,
                "what has a name is lost"
            );
            *self.ended.lock() = Some(error);
        }
        drop(self.files.lock().take());
    }
}

impl Open {
    /// Takes the database away after a failure. Closing it may want to write, and fail again; where
    /// a snapshot still reads it, what it does from now on is refused, so that it cannot write
    /// over what is committed later, nor read it.
    fn take_down(&mut self) {
        let Some(db) = self.db.take() else { return };
        match Arc::try_unwrap(db) {
            Ok(db) => drop(catch_unwind(AssertUnwindSafe(|| drop(db)))),
            Err(shared) => {
                self.storage = self.storage.replaced();
                drop(shared);
            }
        }
    }
}

/// Which file the catalog of this directory is.
pub(super) fn identity(files: &Files) -> Option<Identity> {
    let status = std::fs::symlink_metadata(files.path_of(CATALOG_FILE)).ok()?;
    Some((status.dev(), status.ino()))
}

/// A catalog that was made gets its name.
pub(super) fn publish(files: &Files) -> Result<()> {
    let io = |error| VirtualMemoryError::io("making the catalog", error);
    files.rename(UNFINISHED_FILE, CATALOG_FILE).map_err(io)
}
