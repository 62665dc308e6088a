//! The lock on a directory, and the wait for one that is about to be given back.
//!
//! Invariant: a store that is dropped without being closed keeps its lock until what has a name is
//! durable and the kernel has done with its last operation: until then its files are written to. No
//! destructor waits for that; an opener of the directory in the same process does, for a bounded
//! time. Called by `StoreDirectory`.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::directory::Identity;
use crate::process::Origin;

/// How long an opener waits for a store of this process that is leaving.
const LEAVING_WAIT_MAX: Duration = Duration::from_secs(10);

/// Device and inode of the lock files whose stores have been dropped.
static LEAVING: Mutex<Vec<Identity>> = Mutex::new(Vec::new());

/// Rung when one of them has been unlocked.
static LEFT: Condvar = Condvar::new();

/// A lock that is held. It is given back by name and not by closing the file alone: a child that
/// another thread is just starting shares the open file, and with it the lock, until it executes.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    leaving: OnceLock<Identity>,
    origin: Origin,
}

impl Lock {
    /// Locks the file; blocks only where a store of this process is leaving it.
    ///
    /// # Errors
    ///
    /// As `File::try_lock`, with the file.
    pub(crate) fn take(file: File) -> Result<Self, (File, TryLockError)> {
        let deadline = Instant::now() + LEAVING_WAIT_MAX;
        let id = identity(&file);
        let mut leaving = LEAVING.lock();
        loop {
            let error = match file.try_lock() {
                Ok(()) => {
                    return Ok(Lock { file, leaving: OnceLock::new(), origin: Origin::here() });
                }
                Err(error) => error,
            };
            // A leaving store unlocks before it is taken from the list, so none is missed here.
            let hope = matches!(error, TryLockError::WouldBlock)
                && id.is_some_and(|id| leaving.contains(&id));
            if !hope || LEFT.wait_until(&mut leaving, deadline).timed_out() {
                return Err((file, error));
            }
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Which file it is.
    pub(crate) fn identity(&self) -> Option<Identity> {
        identity(&self.file)
    }

    /// Its store was dropped: it goes when nothing is in flight any more.
    pub(crate) fn leave(&self) {
        if let Some(id) = identity(&self.file)
            && self.leaving.set(id).is_ok()
        {
            LEAVING.lock().push(id);
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A forked child shares the open file too, and would unlock it for its parent.
        if self.origin.is_inherited() {
            return;
        }
        let _ = self.file.unlock();
        if let Some(id) = self.leaving.get() {
            LEAVING.lock().retain(|other| other != id);
            LEFT.notify_all();
        }
    }
}

fn identity(file: &File) -> Option<Identity> {
    let status = file.metadata().ok()?;
    Some((status.dev(), status.ino()))
}
