//! The text of a lock file: which process has, or last had, the store open.
//!
//! Invariant: it is written with the lock held alone, before there is anything else in the
//! directory. A second line marks a temporary store, which is not to be opened again. Called by
//! `StoreDirectory`, and by the search for leftovers.

use std::fs::{File, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, statat, unlinkat};
use vmem_core::VirtualMemoryError;

use super::LOCK_FILE;
use super::files::{identity_of, open_own, refused, unusable};
use crate::lock::Lock;

/// How often a lock file is opened again that was removed while it was being locked.
const ATTEMPTS: usize = 8;

/// The second line of the lock file of a temporary store.
const TEMPORARY: &str = "temporary";

/// Locks the lock file and writes our process into it. Also returns whether it named a process
/// before.
pub(super) fn take_lock(
    path: &Path,
    directory: &File,
    temporary: bool,
) -> Result<(Lock, bool), VirtualMemoryError> {
    let io = |error| refused(&path.join(LOCK_FILE), error);
    let lock = lock(path, directory)?;
    let file = lock.file();
    let text = read_start(file).map_err(io)?;
    let used_before = pid_in(&text).is_some();
    if !used_before && !text.is_empty() {
        return Err(unusable(&path.join(LOCK_FILE), "is not a lock file of vmem"));
    }
    let pid = std::process::id();
    let ours = if temporary { format!("{pid}\n{TEMPORARY}\n") } else { format!("{pid}\n") };
    // Else the mark might outlive the crash of a store that is none.
    let unmarked = if is_temporary(&text) { file.set_len(0) } else { Ok(()) };
    let written = unmarked
        .and_then(|()| file.set_permissions(Permissions::from_mode(0o600)))
        .and_then(|()| file.write_all_at(ours.as_bytes(), 0))
        .and_then(|()| file.set_len(ours.len() as u64))
        // Before there is a data file: after a power cut it is this file that says whose that is.
        .and_then(|()| file.sync_all());
    if let Err(error) = written {
        if !used_before {
            let _ = unlinkat(directory, LOCK_FILE, AtFlags::empty());
        }
        return Err(io(error));
    }
    Ok((lock, used_before))
}

/// Locks the lock file that has its name, which it may lose just before.
fn lock(path: &Path, directory: &File) -> Result<Lock, VirtualMemoryError> {
    for _ in 0..ATTEMPTS {
        let lock = Lock::take(open_own(path, directory, LOCK_FILE)?);
        let lock = lock.map_err(|(file, error)| match error {
            TryLockError::WouldBlock => in_use(path, &file),
            TryLockError::Error(error) => refused(&path.join(LOCK_FILE), error),
        })?;
        let found = statat(directory, LOCK_FILE, AtFlags::SYMLINK_NOFOLLOW).ok();
        if found.map(|found| identity_of(&found)) == lock.identity() {
            return Ok(lock);
        }
    }
    Err(VirtualMemoryError::InUse { path: path.to_owned(), pid: None })
}

/// Checks that no process has the store open; changes nothing.
pub(super) fn check_free(path: &Path) -> Result<(), VirtualMemoryError> {
    let name = path.join(LOCK_FILE);
    // Whatever it is, opening it must not wait.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(&name, flags, Mode::empty());
    let file = File::from(file.map_err(|errno| refused(&name, errno.into()))?);
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(in_use(path, &file)),
        Err(TryLockError::Error(error)) => Err(refused(&name, error)),
    }
}

fn in_use(path: &Path, lock: &File) -> VirtualMemoryError {
    let pid = read_start(lock).ok().and_then(|text| pid_in(&text));
    VirtualMemoryError::InUse { path: path.to_owned(), pid }
}

/// The process in a lock file. Behind its line may be the rest of a longer one, where its writer
/// was killed before it cut that off.
pub(super) fn pid_in(text: &str) -> Option<u32> {
    text.lines().next()?.trim().parse().ok()
}

/// Whether the lock file is that of a temporary store.
pub(super) fn is_temporary(text: &str) -> bool {
    pid_in(text).is_some() && text.lines().nth(1) == Some(TEMPORARY)
}

/// The first bytes of a file, as text. Zeros around it are what a power cut leaves of bytes that
/// were not on the disk yet.
pub(super) fn read_start(file: &File) -> io::Result<String> {
    let mut text = Vec::new();
    file.take(64).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim_matches('\0').to_owned())
}
