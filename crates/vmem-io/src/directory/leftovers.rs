//! Temporary directories whose processes were killed before they could remove them.
//!
//! Invariant: a directory is removed only if its process is proven dead: its lock file was marked
//! as a temporary store's with the lock held, the lock is free, and the file system is one whose
//! locks every process that sees it shares. It holds nothing but files of a store's. Called when a
//! temporary directory is made.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, unlinkat};

use super::LOCK_FILE;
use super::kind::has_local_locks;
use super::owner::{is_temporary, read_start};
use super::place::{OWN_FILES, PREFIX};

/// Candidates that are looked at when a store opens; the next one goes on.
const LOOKS_MAX: usize = 256;

/// What `tempfile` puts behind the prefix, in letters and digits.
const RANDOM_LEN: usize = 6;

/// Removes what dead processes left in `parent`. What cannot be removed stays.
pub(super) fn remove(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    for name in names.filter(|name| is_candidate(name)).take(LOOKS_MAX) {
        let path = parent.join(name);
        match remove_dead(&path) {
            Ok(true) => {
                tracing::info!(
                    target: "vmem::disk", path = %path.display(), "removed a dead temporary store"
                )
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(
                    target: "vmem::disk", path = %path.display(), %error,
                    "a temporary store is left alone"
                );
            }
        }
    }
}

fn is_candidate(name: &OsStr) -> bool {
    let random = name.as_bytes().strip_prefix(PREFIX.as_bytes());
    random.is_some_and(|random| {
        random.len() == RANDOM_LEN && random.iter().all(u8::is_ascii_alphanumeric)
    })
}

/// Removes the directory if its process is dead; says whether it did.
fn remove_dead(path: &Path) -> io::Result<bool> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mode = Mode::empty();
    let directory = File::from(openat(CWD, path, flags | OFlags::DIRECTORY, mode)?);
    let ours = directory.metadata()?.uid() == rustix::process::geteuid().as_raw();
    if !ours || !has_local_locks(&directory)? {
        return Ok(false);
    }
    let lock = File::from(openat(&directory, LOCK_FILE, flags | OFlags::RDWR, mode)?);
    if !lock.metadata()?.is_file() || lock.try_lock().is_err() {
        return Ok(false);
    }
    // A process that made the directory and has not locked it yet has not marked it yet either.
    if !is_temporary(&read_start(&lock)?) || !holds_own_files(path)? {
        return Ok(false);
    }
    // The lock file is the last of them, and is held until the directory has gone.
    for name in OWN_FILES {
        match unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    fs::remove_dir(path)?;
    Ok(true)
}

fn holds_own_files(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        if !OWN_FILES.iter().any(|own| name == *own) {
            return Ok(false);
        }
    }
    Ok(true)
}
