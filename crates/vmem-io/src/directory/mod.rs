//! The directory of a store: the right to use it, and the data file in it.
//!
//! Invariant: one [`StoreDirectory`] per directory exists at a time, over all processes: it holds a
//! lock on the lock file, and gives it back after everything else. Nothing is truncated or removed
//! that vmem did not make. Called when a store is opened.
//!
//! What the data file holds is worth as much as the catalog of names beside it: where the catalog
//! names nothing, both go with the store, and what a dead process left is truncated. In a private
//! temporary directory the data file has no name at all once it is open, so that not even a killed
//! process leaves its bytes behind.

mod files;
mod kind;
mod leftovers;
mod owner;
mod place;

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::AtFlags;
use rustix::io::Errno;
use tempfile::TempDir;
use vmem_core::VirtualMemoryError;

pub(crate) use files::{Files, Identity};
use files::{refused, unusable};

use crate::process::Origin;

/// The name of the data file.
pub const DATA_FILE: &str = "vmem.data";

/// The name of the lock file. It holds the number of the process that has, or last had, the store
/// open, and stays when the store is closed: removing it would let two processes hold "the" lock.
pub const LOCK_FILE: &str = "vmem.lock";

/// The file name of the catalog of names, which exists while anything has a name.
pub const CATALOG_FILE: &str = "vmem.catalog";

/// The name of a catalog that is being made.
pub(crate) const UNFINISHED_FILE: &str = "vmem.catalog.new";

/// How many names the catalog has, which decides whether the files stay; `UNKNOWN` keeps them.
pub(crate) type Tally = Arc<AtomicU64>;

/// A [`Tally`] of a catalog that was not read yet.
pub(crate) const UNKNOWN: u64 = u64::MAX;

/// A directory that this store alone uses, with the files in it readable by its user alone.
///
/// ```
/// use vmem_io::StoreDirectory;
///
/// let (directory, _data) = StoreDirectory::open(None)?;
/// let path = directory.path().to_owned();
/// assert!(path.exists());
/// directory.close()?;
/// assert!(!path.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StoreDirectory {
    tmpfs: bool,
    /// Device and inode of the data file while it has its name.
    named: Option<Identity>,
    tally: Tally,
    temporary: Option<TempDir>,
    origin: Origin,
    /// Last, so that the lock goes last.
    files: Files,
}

impl StoreDirectory {
    /// Takes the directory, and returns it with its data file, unchanged. `None` makes a private
    /// temporary directory, removed when this is closed or dropped; a path that does not exist is
    /// created, mode 0700.
    ///
    /// # Errors
    ///
    /// [`InUse`](VirtualMemoryError::InUse) if another store has it, in this process or another; a
    /// store of this process that was dropped is waited for, while its last operations end;
    /// [`InvalidConfig`](VirtualMemoryError::InvalidConfig), which names the path, if it cannot
    /// serve; [`Io`](VirtualMemoryError::Io) for what is not the fault of the path.
    pub fn open(path: Option<&Path>) -> Result<(Self, File), VirtualMemoryError> {
        Self::open_beside(path, false)
    }

    /// [`open`](Self::open), and where `foreign` is true beside files of others too.
    pub(crate) fn open_beside(
        path: Option<&Path>,
        foreign: bool,
    ) -> Result<(Self, File), VirtualMemoryError> {
        let temporary = path.is_none().then(place::temporary).transpose()?;
        let path = match (path, &temporary) {
            (Some(path), _) => {
                let (path, made) = place::create(path)?;
                made.keep();
                if !foreign {
                    place::check_foreign(&path)?;
                }
                path
            }
            (None, Some(temporary)) => temporary.path().to_owned(),
            (None, None) => std::env::temp_dir(),
        };
        let (files, used_before) = Self::lock(path, temporary.is_some())?;
        Self::take(files, used_before, temporary)
    }

    /// Takes a directory that is empty or does not exist, for a store that may still fail to come
    /// to be: until it is [kept](NewDirectory::keep) everything that was made is removed again.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and `InvalidConfig` for a directory that holds anything.
    pub(crate) fn make(path: &Path) -> Result<(NewDirectory, File), VirtualMemoryError> {
        let (path, made) = place::create(path)?;
        place::check_empty(&path)?;
        let (files, used_before) = Self::lock(path, false)?;
        let taken = Self::take(files.clone(), used_before, None);
        if taken.is_err() && !used_before {
            remove_own(&files);
        }
        let (store, data) = taken?;
        Ok((NewDirectory { store, made: Some(made) }, data))
    }

    /// Locks the directory, and says whether it was one of a store before.
    fn lock(path: PathBuf, temporary: bool) -> Result<(Files, bool), VirtualMemoryError> {
        let directory = File::open(&path).map_err(|error| refused(&path, error))?;
        let (lock, used_before) = owner::take_lock(&path, &directory, temporary)?;
        let directory = Arc::new(directory);
        let lock = Arc::new(lock);
        let user = rustix::process::geteuid().as_raw();
        Ok((Files { path, directory, lock, data: None, user }, used_before))
    }

    fn take(
        mut files: Files,
        used_before: bool,
        temporary: Option<TempDir>,
    ) -> Result<(Self, File), VirtualMemoryError> {
        let data = open_data(&files, used_before)?;
        let refused = |error| refused(&files.path, error);
        if temporary.is_none() {
            // Durable contents of files are worth nothing without durable names of the files. Where
            // a file system cannot do that, names are as durable as it makes them.
            if let Err(error) = files.directory.sync_all() {
                let path = files.path.display();
                tracing::debug!(target: "vmem::disk", %path, %error, "the directory is not synced");
            }
        }
        let status = data.metadata().map_err(refused)?;
        let identity = (status.dev(), status.ino());
        let names = if files.has(CATALOG_FILE).map_err(refused)? { UNKNOWN } else { 0 };
        let tmpfs = kind::is_tmpfs(&files.directory).map_err(refused)?;
        files.data = temporary.is_none().then_some(identity);
        let mut store = StoreDirectory {
            tmpfs,
            named: Some(identity),
            tally: Arc::new(AtomicU64::new(names)),
            temporary,
            origin: Origin::here(),
            files,
        };
        if store.temporary.is_some() {
            store.remove_data().map_err(|error| files::refused(store.path(), error))?;
        }
        Ok((store, data))
    }

    /// Where it is, absolute.
    pub fn path(&self) -> &Path {
        &self.files.path
    }

    /// A share of its files, and of its lock.
    pub(crate) fn files(&self) -> Files {
        self.files.clone()
    }

    /// Whether its catalog has names, as far as is known.
    pub(crate) fn has_names(&self) -> bool {
        self.tally.load(Ordering::Acquire) > 0
    }

    /// Whether this is the copy that a forked child has: the store is its parent's.
    fn is_inherited(&self) -> bool {
        self.origin.is_inherited()
    }

    /// How many names its catalog has.
    pub(crate) fn tally(&self) -> Tally {
        Arc::clone(&self.tally)
    }

    /// Whether it is in memory, so that what is stored there takes RAM and not disk.
    pub fn is_tmpfs(&self) -> bool {
        self.tmpfs
    }

    /// Whether a process serves the file system.
    pub(crate) fn is_fuse(&self) -> bool {
        kind::is_fuse(&self.files.directory).is_ok_and(|is| is)
    }

    /// What the file system has free for this user, in bytes.
    ///
    /// # Errors
    ///
    /// [`Io`](VirtualMemoryError::Io) if it does not say.
    pub fn free_bytes(&self) -> Result<u64, VirtualMemoryError> {
        let status = rustix::fs::fstatvfs(&*self.files.directory);
        let status = status.map_err(|errno| refused(self.path(), errno.into()))?;
        Ok(status.f_bavail.saturating_mul(status.f_frsize))
    }

    /// An empty file without a name, for trials.
    ///
    /// # Errors
    ///
    /// The refusal of the operating system.
    pub(crate) fn scratch(&self) -> io::Result<File> {
        tempfile::tempfile_in(self.path())
    }

    /// The directory in words.
    pub fn describe(&self) -> String {
        let kind = match (&self.temporary, self.tmpfs) {
            (Some(_), false) => "private temporary directory ",
            (Some(_), true) => "private temporary directory in memory (tmpfs) ",
            (None, false) => "",
            (None, true) => "in memory (tmpfs) ",
        };
        format!("{kind}{}", self.path().display())
    }

    /// Says that it goes when nothing is in flight any more, for which [`open`](Self::open) then
    /// waits.
    pub(crate) fn leave(&self) {
        self.files.leave();
    }

    /// Gives everything back: the data file and the catalog, unless something has a name; a
    /// temporary directory; and last the lock. Dropping it does the same, without a word where it
    /// fails.
    ///
    /// # Errors
    ///
    /// The first refusal of the operating system; the rest is still tried.
    pub fn close(mut self) -> io::Result<()> {
        if self.is_inherited() {
            return Ok(());
        }
        let unnamed = self.remove_data();
        let removed = match self.temporary.take().map_or(Ok(()), TempDir::close) {
            // It was removed before.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        };
        unnamed.and(removed)
    }

    /// Removes the names of the data file, if that is still the file which was opened, and of the
    /// catalog, unless that has names.
    pub(crate) fn remove_data(&mut self) -> io::Result<()> {
        let stays = self.temporary.is_none() && self.has_names();
        if stays || self.is_inherited() {
            return Ok(());
        }
        let Some(identity) = self.named.take() else {
            return Ok(());
        };
        match rustix::fs::statat(&*self.files.directory, DATA_FILE, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) if files::identity_of(&status) == identity => {
                // What leads to the data goes first.
                self.files.remove(CATALOG_FILE)?;
                self.files.remove(DATA_FILE)
            }
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for StoreDirectory {
    fn drop(&mut self) {
        if self.is_inherited() {
            if let Some(temporary) = &mut self.temporary {
                temporary.disable_cleanup(true);
            }
            return;
        }
        if let Err(error) = self.remove_data() {
            tracing::warn!(
                target: "vmem::disk", path = %self.path().display(), %error, "the data file stays"
            );
        }
    }
}

/// The directory of a store that is being made.
#[derive(Debug)]
pub(crate) struct NewDirectory {
    store: StoreDirectory,
    /// None once it is kept.
    made: Option<place::Made>,
}

impl NewDirectory {
    /// Its files.
    pub(crate) fn files(&self) -> Files {
        self.store.files()
    }

    /// The store is whole: its files stay.
    pub(crate) fn keep(mut self) {
        self.store.tally.store(UNKNOWN, Ordering::Release);
        if let Some(made) = self.made.take() {
            made.keep();
        }
    }
}

impl Drop for NewDirectory {
    /// The lock is held meanwhile, so that no other store has them.
    fn drop(&mut self) {
        if self.made.is_none() || self.store.is_inherited() {
            return;
        }
        remove_own(&self.store.files);
    }
}

/// Removes what was made in a directory that was empty, with its lock held.
fn remove_own(files: &Files) {
    for name in place::OWN_FILES {
        if let Err(error) = files.remove(name) {
            let path = files.path_of(name);
            tracing::warn!(
                target: "vmem::disk", path = %path.display(), %error,
                "a part of an unfinished store stays"
            );
        }
    }
}

/// Opens the data file.
fn open_data(files: &Files, used_before: bool) -> Result<File, VirtualMemoryError> {
    let data = files.open(DATA_FILE)?;
    let name = files.path_of(DATA_FILE);
    let status = data.metadata().map_err(|error| refused(&name, error))?;
    if status.len() > 0 && !used_before {
        let why = "holds data, but no store was ever open here: move it away";
        return Err(unusable(&name, why));
    }
    let private = data.set_permissions(Permissions::from_mode(0o600));
    private.map_err(|error| refused(&name, error))?;
    Ok(data)
}
