//! A snapshot: what is committed at one moment, copied into a directory of its own.
//!
//! Invariant: the directory holds a whole store, or, after an error, nothing that was not there
//! before. No lock of the catalog is held while bytes are copied, and never more than
//! [`DIRTY_BYTES`] of the copy wait to be written, since a commit on the same file system waits
//! for those. Called by the catalog on a thread of its own.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use redb::Database;
use vmem_core::VirtualMemoryError;

use super::inner::{Inner, Open, identity, publish};
use super::{Result, tables};
use crate::directory::{Files, StoreDirectory};

/// So much of a copy is written before it is synced, in bytes.
const DIRTY_BYTES: u64 = 16 << 20;

const OPERATION: &str = "writing the snapshot";

impl Inner {
    /// Copies what is committed now into `target`, which is empty or does not exist.
    ///
    /// # Errors
    ///
    /// `InvalidConfig` with the field `directory` if the target cannot serve; `Unreachable` if the
    /// store's own files have gone, or those of the snapshot went meanwhile; `Damaged`, `Io`.
    pub(super) fn snapshot(&self, target: &Path) -> Result<()> {
        self.check()?;
        let (directory, data) = StoreDirectory::make(target).map_err(of_the_target)?;
        let files = directory.files();
        // A share of the database, so that commits do not wait for this.
        let db = match &*self.open.read() {
            None => None,
            Some(Open { db, .. }) => Some(db.clone().ok_or_else(|| self.shut(OPERATION))?),
        };
        if let (Some(db), Some(source)) = (db, self.data.get()) {
            let copied = self.copy(&db, source, &files, &data);
            // If it was taken down meanwhile, it is closed here.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
            copied?;
            files.check(identity(&files))?;
        }
        directory.keep();
        Ok(())
    }

    fn copy(&self, from: &Arc<Database>, source: &File, files: &Files, data: &File) -> Result<()> {
        let block_bytes = self.head.lock().block_bytes;
        let (copy, _) = self.make_in(files, block_bytes)?;
        let Some(into) = &copy.db else { return Err(self.shut(OPERATION)) };
        self.guarded(OPERATION, || {
            tables::copy(from, into, |taken| {
                copy_bytes(source, data, &taken)?;
                data.sync_all()
            })
        })?;
        drop(copy);
        publish(files)
    }
}

/// The path that cannot serve is the one that the snapshot was asked for.
fn of_the_target(error: VirtualMemoryError) -> VirtualMemoryError {
    match error {
        VirtualMemoryError::InvalidConfig { field: "disk_path", reason } => {
            VirtualMemoryError::invalid_config("directory", reason)
        }
        other => other,
    }
}

/// Makes `to` the same as `from` where these extents are; the file system shares them where it can.
fn copy_bytes(from: &File, to: &File, taken: &[(u64, u32)]) -> io::Result<()> {
    if share(from, to) {
        return Ok(());
    }
    let mut dirty = 0;
    let mut taken = taken.iter().copied().peekable();
    while let Some((start, len)) = taken.next() {
        let mut end = start + u64::from(len);
        while let Some((_, more)) = taken.next_if(|&(start, _)| start == end) {
            end += u64::from(more);
        }
        copy_range(from, to, start, end, &mut dirty)?;
    }
    Ok(())
}

/// Whether the file system now shares all of `from` with `to`.
#[cfg(target_os = "linux")]
fn share(from: &File, to: &File) -> bool {
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn share(_from: &File, _to: &File) -> bool {
    false
}

/// Copies inside of the kernel, at most `len` bytes.
#[cfg(target_os = "linux")]
fn copy_inside(from: &File, to: &File, at: u64, len: usize) -> io::Result<usize> {
    let mut off_in = at;
    let mut off_out = at;
    Ok(rustix::fs::copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), len)?)
}

#[cfg(not(target_os = "linux"))]
fn copy_inside(_from: &File, _to: &File, _at: u64, _len: usize) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

fn copy_range(from: &File, to: &File, mut at: u64, end: u64, dirty: &mut u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = Vec::new();
    while at < end {
        let len = (end - at).min(1 << 20) as usize;
        let copied = match buffer.is_empty() {
            true => copy_inside(from, to, at, len),
            false => Err(io::ErrorKind::Unsupported.into()),
        };
        let count = match copied {
            Ok(count) if count > 0 => count as u64,
            // Over the border of a file system, or of one that cannot; or the file has ended.
            _ => {
                buffer.resize(1 << 20, 0);
                match from.read_at(&mut buffer[..len], at)? {
                    // Lost already: the checksum shows that to a reader of the copy.
                    0 => return Ok(()),
                    count => {
                        to.write_all_at(&buffer[..count], at)?;
                        count as u64
                    }
                }
            }
        };
        at += count;
        *dirty += count;
        if *dirty >= DIRTY_BYTES {
            to.sync_data()?;
            *dirty = 0;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn copied_runs_are_those_of_the_source_across_syncs() {
        let from = tempfile::tempfile().unwrap();
        let to = tempfile::tempfile().unwrap();
        let len = 2 * DIRTY_BYTES + 4096;
        let byte = |at: u64| (at / 512 * 31 % 251) as u8;
        let bytes: Vec<u8> = (0..len).map(byte).collect();
        from.write_all_at(&bytes, 0).unwrap();
        let mut dirty = 0;
        let runs = [(512, DIRTY_BYTES), (DIRTY_BYTES + 1024, len)];
        for (start, end) in runs {
            copy_range(&from, &to, start, end, &mut dirty).unwrap();
            assert!(dirty < DIRTY_BYTES, "{dirty} bytes wait to be written");
        }
        let mut copied = vec![0; len as usize];
        to.read_exact_at(&mut copied, 0).unwrap();
        for (at, &copy) in copied.iter().enumerate() {
            let at = at as u64;
            let within = runs.iter().any(|&(start, end)| (start..end).contains(&at));
            assert_eq!(copy, if within { byte(at) } else { 0 }, "byte {at}");
        }
    }
}
