//! Where a store may be: making its directory, and refusing one that holds other files.
//!
//! Invariant: a directory with anything in it that vmem did not make is taken only if it holds a
//! store, which a lock file shows. If opening the store fails, what was made for it is removed
//! again. Called by `StoreDirectory`.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmem_core::VirtualMemoryError;

use super::files::{refused, unusable};
use super::{CATALOG_FILE, DATA_FILE, LOCK_FILE, UNFINISHED_FILE, leftovers, owner};

/// How the name of a private temporary directory starts.
pub(super) const PREFIX: &str = "vmem-";

/// Everything that a store makes in its directory.
pub(super) const OWN_FILES: [&str; 4] = [CATALOG_FILE, UNFINISHED_FILE, DATA_FILE, LOCK_FILE];

/// Directories that were made, the deepest first; they are removed again unless they are kept.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            // A directory that is in use by now stays, and so do those above it.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Makes a private temporary directory, after removing those that dead processes left.
pub(super) fn temporary() -> Result<TempDir, VirtualMemoryError> {
    let parent = std::env::temp_dir();
    leftovers::remove(&parent);
    tempfile::Builder::new()
        .prefix(PREFIX)
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(&parent)
        .map_err(|error| refused(&parent, error))
}

/// Makes the directory where there is none; returns its absolute path, and what was made.
pub(super) fn create(path: &Path) -> Result<(PathBuf, Made), VirtualMemoryError> {
    let missing: Vec<_> = path.ancestors().take_while(|part| !part.is_dir()).collect();
    let made = Made(missing.iter().map(|&part| part.to_owned()).collect());
    if !missing.is_empty() {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
        created.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => unusable(path, "is not a directory"),
            _ => refused(path, error),
        })?;
    }
    let path = fs::canonicalize(path).map_err(|error| refused(path, error))?;
    // What is stored in it must not be lost with it.
    for parent in path.ancestors().skip(1).take(missing.len()) {
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(|error| refused(parent, error))?;
    }
    Ok((path, made))
}

/// Refuses a directory that holds something and no store.
pub(super) fn check_foreign(path: &Path) -> Result<(), VirtualMemoryError> {
    let mut store = false;
    let mut foreign = None;
    let listed = each_entry(path, |name| {
        store |= name == LOCK_FILE;
        if !OWN_FILES.iter().any(|own| name == *own) {
            foreign = Some(name.to_owned());
        }
    });
    match listed {
        // A file system need not be able to list what it holds; then this is unknown.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
        listed => listed.map_err(|error| refused(path, error))?,
    }
    match foreign {
        Some(name) if !store => {
            let name = name.to_string_lossy();
            let why = format!(
                "holds {name:?} and no store: name an empty directory or one that does not exist, \
                 or set allow_foreign_files"
            );
            Err(unusable(path, &why))
        }
        _ => Ok(()),
    }
}

/// Refuses a directory that holds anything.
pub(super) fn check_empty(path: &Path) -> Result<(), VirtualMemoryError> {
    let mut store = false;
    let mut found = None;
    each_entry(path, |name| {
        store |= name == LOCK_FILE;
        found = Some(name.to_owned());
    })
    .map_err(|error| refused(path, error))?;
    match found {
        None => Ok(()),
        Some(_) if store => {
            owner::check_free(path)?;
            Err(unusable(path, "holds a store already"))
        }
        Some(name) => {
            let why = format!("is not empty: it holds {:?}", name.to_string_lossy());
            Err(unusable(path, &why))
        }
    }
}

/// Calls `each` for what is in a directory, but for what a new file system is born with.
fn each_entry(path: &Path, mut each: impl FnMut(&OsStr)) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        if name != "lost+found" {
            each(&name);
        }
    }
    Ok(())
}
