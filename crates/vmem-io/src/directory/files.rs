//! The files of a store directory: opened relative to it, as the store's own, and checked later.
//!
//! Invariant: no file is opened through a link, and none that belongs to another user or has a name
//! elsewhere. What [`Files::check`] accepts can be opened again at its path. Called by
//! `StoreDirectory` and by the catalog.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, Stat, accessat, fcntl_getfl, fcntl_setfl};
use rustix::fs::{openat, statat};
use rustix::io::Errno;
use vmem_core::VirtualMemoryError;

use super::{CATALOG_FILE, DATA_FILE, LOCK_FILE};
use crate::lock::Lock;

/// Device and inode: which file it is, whatever its name.
pub(crate) type Identity = (u64, u64);

/// Which file this is the status of. The types differ from system to system.
#[allow(clippy::unnecessary_cast, reason = "the device is signed where it is not Linux")]
pub(super) fn identity_of(status: &Stat) -> Identity {
    (status.st_dev as u64, status.st_ino as u64)
}

/// The files of a directory, and a share of its lock: it is given back when the last share goes.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(super) path: PathBuf,
    pub(super) directory: Arc<File>,
    pub(super) lock: Arc<Lock>,
    /// The data file; `None` in a temporary directory, which is never opened again.
    pub(super) data: Option<Identity>,
    /// The user that opened it.
    pub(super) user: u32,
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
        match statat(&*self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
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

    /// Announces that its shares are dropped once nothing is in flight; an opener then waits for
    /// that.
    pub(crate) fn leave(&self) {
        self.lock.leave();
    }

    /// Gives a file its final name, durably: it was synced before.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat(&*self.directory, from, &*self.directory, to)?;
        self.directory.sync_all()
    }

    /// Checks that opening the path would find this store: the directory, the lock, the data and,
    /// if there is one, this catalog. A few system calls; nothing is opened.
    ///
    /// A process that has become another user since it opened the store cannot tell what the user
    /// that opens it again may do: only which files they are counts then, as far as it can see.
    ///
    /// # Errors
    ///
    /// [`Unreachable`](VirtualMemoryError::Unreachable) with what is missing, replaced or refused.
    pub(crate) fn check(&self, catalog: Option<Identity>) -> Result<(), VirtualMemoryError> {
        let Some(data) = self.data else { return Ok(()) };
        let unreachable = |reason: String| VirtualMemoryError::Unreachable {
            path: self.path.clone(),
            reason: reason.into(),
        };
        let directory = self.directory.metadata();
        let directory = directory.map_err(|error| unreachable(error.to_string()))?;
        self.check_directory((directory.dev(), directory.ino()))
            .map_err(|why| unreachable(format!("the directory {why}")))?;
        let lock = self.lock.identity();
        let files = [(LOCK_FILE, lock), (DATA_FILE, Some(data)), (CATALOG_FILE, catalog)];
        for (name, identity) in files {
            let Some(identity) = identity else { continue };
            self.check_file(name, identity).map_err(|why| unreachable(format!("{name} {why}")))?;
        }
        Ok(())
    }

    fn check_directory(&self, identity: Identity) -> Result<(), String> {
        let judges = self.judges_access();
        let found = match statat(CWD, &self.path, AtFlags::empty()) {
            Err(Errno::ACCESS) if !judges => return Ok(()),
            found => found.map_err(missing)?,
        };
        same(&found, identity)?;
        match judges {
            true => {
                let whole = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
                allowed(CWD, &self.path, whole)
            }
            false => Ok(()),
        }
    }

    /// What `open_own` would say of the file of this name.
    fn check_file(&self, name: &str, identity: Identity) -> Result<(), String> {
        let judges = self.judges_access();
        let found = match statat(&*self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::ACCESS) if !judges => return Ok(()),
            found => found.map_err(missing)?,
        };
        same(&found, identity)?;
        if found.st_nlink > 1 {
            return Err("has another name elsewhere (a hard link)".to_owned());
        }
        if found.st_uid != self.user {
            return Err("belongs to another user".to_owned());
        }
        match judges {
            true => allowed(&*self.directory, Path::new(name), Access::READ_OK | Access::WRITE_OK),
            false => Ok(()),
        }
    }

    /// Whether this process is still the user that opened the store.
    fn judges_access(&self) -> bool {
        self.user == rustix::process::geteuid().as_raw()
    }
}

fn missing(errno: Errno) -> String {
    match errno {
        Errno::NOENT => "was removed".to_owned(),
        errno => format!("cannot be found: {}", io::Error::from(errno)),
    }
}

fn same(found: &Stat, identity: Identity) -> Result<(), String> {
    match identity_of(found) == identity {
        true => Ok(()),
        false => Err("was replaced".to_owned()),
    }
}

fn allowed(at: impl std::os::fd::AsFd, path: &Path, access: Access) -> Result<(), String> {
    accessat(at, path, access, AtFlags::EACCESS)
        .map_err(|errno| format!("cannot be opened again: {}", io::Error::from(errno)))
}

/// Opens a file of the store, or makes it: 0600, no symbolic link, no other owner.
pub(super) fn open_own(
    path: &Path,
    directory: &File,
    name: &str,
) -> Result<File, VirtualMemoryError> {
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
    // It kept us from waiting for the other end of a pipe. Of a file it would tell io_uring that
    // its file system never blocks; one that does then blocks the task that submits.
    let flags = fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    flags.map_err(|errno| refused(&full, errno.into()))?;
    Ok(file)
}

/// The path is at fault.
pub(super) fn unusable(path: &Path, why: &str) -> VirtualMemoryError {
    VirtualMemoryError::invalid_config("disk_path", format!("{} {why}", path.display()))
}

/// The operating system refused something at the path.
pub(super) fn refused(path: &Path, error: io::Error) -> VirtualMemoryError {
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
            tracing::warn!(
                target: "vmem::disk", path = %path.display(), %error, "the store directory fails"
            );
            VirtualMemoryError::io("opening the store directory", error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::StoreDirectory;

    /// Mechanism: a service opens its store as root and becomes another user then. What only root
    /// may open was taken for lost.
    #[test]
    fn files_of_another_user_are_judged_by_the_user_that_opened_them() {
        let place = tempfile::tempdir().unwrap();
        let (store, _data) = StoreDirectory::open(Some(place.path())).unwrap();
        let mut files = store.files();
        files.check(None).unwrap();
        files.user += 1;
        let reason = files.check(None).unwrap_err().to_string();
        assert!(reason.contains("belongs to another user"), "{reason}");
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIPPED files that were given away: only root can");
        }
        for name in [super::LOCK_FILE, super::DATA_FILE] {
            std::os::unix::fs::chown(files.path_of(name), Some(files.user), None).unwrap();
        }
        files.check(None).unwrap();
        std::fs::remove_file(files.path_of(super::DATA_FILE)).unwrap();
        assert!(files.check(None).is_err(), "which files they are still counts");
    }
}
