//! The directory of a store: who may use it, and the data file in it.
//!
//! Invariant: one [`StoreDirectory`] per directory exists at a time, over all processes: it holds a
//! lock on the lock file, and gives it back after everything else. Nothing is truncated or removed
//! that vmem did not make. Called when a store is opened.
//!
//! What the data file holds is worth as much as the catalog of names beside it: where the catalog names
//! nothing, both go with the store, and what a dead process left is truncated. In a private temporary
//! directory the data file has no name at all once it is open, so that not even a killed process leaves
//! its bytes behind.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, fcntl_getfl, fcntl_setfl, openat};
use rustix::io::Errno;
use tempfile::TempDir;
use vmem_core::VirtualMemoryError;

use crate::lock::Lock;

/// The name of the data file.
pub const DATA_FILE: &str = "vmem.data";

/// The name of the lock file. It holds the number of the process that has, or last had, the store
/// open, and stays when the store is closed: removing it would let two processes hold "the" lock.
pub const LOCK_FILE: &str = "vmem.lock";

/// The name of the catalog of names, which is there while anything has a name.
pub const CATALOG_FILE: &str = "vmem.catalog";

/// How many names the catalog has, for who decides whether the files stay; `UNKNOWN` keeps them.
pub(crate) type Tally = Arc<AtomicU64>;

/// A [`Tally`] of a catalog that nobody has read yet.
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
    named: Option<(u64, u64)>,
    tally: Tally,
    temporary: Option<TempDir>,
    /// Last, so that the lock goes last.
    files: Files,
}

/// The files of a directory, and a share of its lock: it is given back when the last share goes.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    path: PathBuf,
    directory: Arc<File>,
    lock: Arc<Lock>,
}

impl Files {
    /// The path of the file of this name.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens the file of this name, or makes it, as this store's own.
    pub(crate) fn open(&self, name: &str) -> Result<File, VirtualMemoryError> {
        open_own(&self.path, &self.directory, name)
    }

    /// Whether there is something of this name.
    pub(crate) fn has(&self, name: &str) -> io::Result<bool> {
        match rustix::fs::statat(&*self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes the file of this name, if there is one.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&*self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Says that its shares go when nothing is in flight any more, for which who opens it then waits.
    pub(crate) fn leave(&self) {
        self.lock.leave();
    }

    /// Gives a file its final name, durably: it was synced before.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat(&*self.directory, from, &*self.directory, to)?;
        self.directory.sync_all()
    }
}

impl StoreDirectory {
    /// Takes the directory, and returns it with its data file as it is there. `None` makes a
    /// private temporary directory, removed when this is closed or dropped; a path that does not
    /// exist is created, mode 0700.
    ///
    /// # Errors
    ///
    /// [`InUse`](VirtualMemoryError::InUse) if somebody has it, in this process or another; a
    /// store of this process that was dropped is waited for, while its last operations end;
    /// [`InvalidConfig`](VirtualMemoryError::InvalidConfig), which names the path, if it cannot serve;
    /// [`Io`](VirtualMemoryError::Io) for what is not the fault of the path.
    pub fn open(path: Option<&Path>) -> Result<(Self, File), VirtualMemoryError> {
        let (path, temporary) = match path {
            None => {
                let temporary = temporary()?;
                (temporary.path().to_owned(), Some(temporary))
            }
            Some(path) => (create(path)?, None),
        };
        let directory = File::open(&path).map_err(|error| refused(&path, error))?;
        let (lock, used_before) = take_lock(&path, &directory)?;
        let files = Files { path, directory: Arc::new(directory), lock: Arc::new(lock) };
        let refused = |error| refused(&files.path, error);
        let data = open_data(&files, used_before)?;
        if temporary.is_none() {
            // What becomes durable in the files is worth nothing without their names. Where a file system cannot do that,
            // names are as durable as it makes them.
            if let Err(error) = files.directory.sync_all() {
                tracing::debug!(path = %files.path.display(), %error, "the directory is not synced");
            }
        }
        let status = data.metadata().map_err(refused)?;
        let names = if files.has(CATALOG_FILE).map_err(refused)? { UNKNOWN } else { 0 };
        let mut store = StoreDirectory {
            tmpfs: is_tmpfs(&files.directory).map_err(refused)?,
            named: Some((status.dev(), status.ino())),
            tally: Arc::new(AtomicU64::new(names)),
            temporary,
            files: files.clone(),
        };
        if store.temporary.is_some() {
            store.remove_data().map_err(refused)?;
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
        const FUSE: i64 = 0x6573_5546;
        kind_of(&self.files.directory).is_ok_and(|kind| kind == FUSE)
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

    /// Says that it goes when nothing is in flight any more, for which [`open`](Self::open) then waits.
    pub(crate) fn leave(&self) {
        self.files.leave();
    }

    /// Gives everything back: the data file and the catalog, unless something has a name; a temporary
    /// directory; and last the lock. Dropping it does the same, without a word where it fails.
    ///
    /// # Errors
    ///
    /// The first refusal of the operating system; the rest is still tried.
    pub fn close(mut self) -> io::Result<()> {
        let unnamed = self.remove_data();
        let removed = self.temporary.take().map_or(Ok(()), TempDir::close);
        unnamed.and(removed)
    }

    /// Removes the names of the data file, if that is still the file which was opened, and of the
    /// catalog, unless that has names.
    pub(crate) fn remove_data(&mut self) -> io::Result<()> {
        if self.temporary.is_none() && self.has_names() {
            return Ok(());
        }
        let Some(identity) = self.named.take() else {
            return Ok(());
        };
        match rustix::fs::statat(&*self.files.directory, DATA_FILE, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) if (status.st_dev, status.st_ino) == identity => {
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
        if let Err(error) = self.remove_data() {
            tracing::warn!(path = %self.path().display(), %error, "the data file stays");
        }
    }
}

fn temporary() -> Result<TempDir, VirtualMemoryError> {
    tempfile::Builder::new()
        .prefix("vmem-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()
        .map_err(|error| refused(&std::env::temp_dir(), error))
}

/// Makes the directory where there is none; returns its absolute path.
fn create(path: &Path) -> Result<PathBuf, VirtualMemoryError> {
    let missing = path.ancestors().take_while(|part| !part.is_dir()).count();
    if missing > 0 {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
        created.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => unusable(path, "is not a directory"),
            _ => refused(path, error),
        })?;
    }
    let path = fs::canonicalize(path).map_err(|error| refused(path, error))?;
    // What is stored in it must not be lost with it.
    for parent in path.ancestors().skip(1).take(missing) {
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(|error| refused(parent, error))?;
    }
    Ok(path)
}

/// Locks the lock file and writes our process into it. Also returns whether it named one before.
fn take_lock(path: &Path, directory: &File) -> Result<(Lock, bool), VirtualMemoryError> {
    let file = open_own(path, directory, LOCK_FILE)?;
    let io = |error| refused(&path.join(LOCK_FILE), error);
    let lock = Lock::take(file).map_err(|(file, error)| match error {
        TryLockError::WouldBlock => VirtualMemoryError::InUse {
            path: path.to_owned(),
            pid: read_start(&file).ok().and_then(|text| pid_in(&text)),
        },
        TryLockError::Error(error) => io(error),
    })?;
    let file = lock.file();
    let text = read_start(file).map_err(io)?;
    let used_before = pid_in(&text).is_some();
    if !used_before && !text.is_empty() {
        return Err(unusable(&path.join(LOCK_FILE), "is not a lock file of vmem"));
    }
    let pid = format!("{}\n", std::process::id());
    file.set_permissions(Permissions::from_mode(0o600))
        .and_then(|()| file.write_all_at(pid.as_bytes(), 0))
        .and_then(|()| file.set_len(pid.len() as u64))
        // Before there is a data file: after a power cut it is this file that says whose that is.
        .and_then(|()| file.sync_all())
        .map_err(io)?;
    Ok((lock, used_before))
}

/// The process in a lock file. Behind its line may be the rest of a longer one, where whoever wrote it was killed before
/// he cut that off.
fn pid_in(text: &str) -> Option<u32> {
    text.lines().next()?.trim().parse().ok()
}

/// The first bytes of a file, as text. Zeros around it are what a power cut leaves of bytes that
/// were not on the disk yet.
fn read_start(file: &File) -> io::Result<String> {
    let mut text = Vec::new();
    file.take(64).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim_matches('\0').to_owned())
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

/// Opens a file of the store, or makes it: 0600, no symbolic link, nobody else's.
fn open_own(path: &Path, directory: &File, name: &str) -> Result<File, VirtualMemoryError> {
    let full = path.join(name);
    let flags = OFlags::RDWR
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::CLOEXEC
        | OFlags::NONBLOCK
        | OFlags::NOCTTY;
    let file = openat(directory, name, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(file.map_err(|errno| match errno {
        Errno::LOOP => unusable(&full, "is a symbolic link"),
        errno => refused(&full, errno.into()),
    })?);
    let status = file.metadata().map_err(|error| refused(&full, error))?;
    if !status.is_file() {
        return Err(unusable(&full, "is not a regular file"));
    }
    if status.nlink() > 1 {
        return Err(unusable(&full, "has another name elsewhere (a hard link)"));
    }
    if status.uid() != rustix::process::geteuid().as_raw() {
        return Err(unusable(&full, "belongs to another user"));
    }
    // It kept us from waiting for the other end of a pipe. Of a file it would tell io_uring that its
    // file system never blocks; one that does then blocks the task that submits.
    let flags = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    flags.map_err(|errno| refused(&full, errno.into()))?;
    Ok(file)
}

#[cfg(target_os = "linux")]
fn is_tmpfs(directory: &File) -> io::Result<bool> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    Ok([TMPFS, RAMFS].contains(&kind_of(directory)?))
}

/// The number by which Linux knows the kind of the file system.
#[cfg(target_os = "linux")]
fn kind_of(directory: &File) -> io::Result<i64> {
    Ok(rustix::fs::fstatfs(directory)?.f_type as i64)
}

#[cfg(not(target_os = "linux"))]
fn kind_of(_directory: &File) -> io::Result<i64> {
    Ok(0)
}

#[cfg(not(target_os = "linux"))]
fn is_tmpfs(_directory: &File) -> io::Result<bool> {
    Ok(false)
}

/// The path is at fault.
fn unusable(path: &Path, why: &str) -> VirtualMemoryError {
    VirtualMemoryError::InvalidConfig {
        field: "disk_path",
        reason: format!("{} {why}", path.display()).into(),
    }
}

/// The operating system refused something at the path.
fn refused(path: &Path, error: io::Error) -> VirtualMemoryError {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound
        | Kind::NotADirectory
        | Kind::IsADirectory
        | Kind::PermissionDenied
        | Kind::ReadOnlyFilesystem
        | Kind::InvalidFilename
        | Kind::InvalidInput => unusable(path, &format!("cannot be used: {error}")),
        _ => {
            tracing::warn!(path = %path.display(), %error, "the store directory fails");
            VirtualMemoryError::io("opening the store directory", error)
        }
    }
}
