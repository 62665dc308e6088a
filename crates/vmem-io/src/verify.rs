//! Reading everything that a closed store has a name for, and comparing it with its checksums.
//!
//! Invariant: changes nothing, and goes on past what is damaged. Called by users, off line.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use vmem_core::VirtualMemoryError;
use vmem_core::backend::{CHUNK_BYTES, CatalogObject, Run, crc32c};

use crate::catalog::NameCatalog;
use crate::directory::{StoreDirectory, UNKNOWN};

/// What [`verify`] found.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Objects that are whole.
    pub objects: u64,
    /// What they hold, in bytes.
    pub bytes: u64,
    /// The names of those that are not, each with what is wrong.
    pub damaged: Vec<(String, String)>,
}

/// Reads every named object of the store in this directory, which no process has open, and compares
/// it with its checksums. Blocks until it is done.
///
/// # Errors
///
/// [`InUse`](VirtualMemoryError::InUse); [`InvalidConfig`](VirtualMemoryError::InvalidConfig) if
/// there is no store; [`Damaged`](VirtualMemoryError::Damaged) if the catalog itself is, with how
/// many names of it can be read; `Io`.
///
/// ```
/// let directory = tempfile::tempdir()?;
/// assert!(vmem_io::verify(&directory.path().join("nothing")).is_err());
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn verify(path: &Path) -> Result<Verified, VirtualMemoryError> {
    if !path.join(crate::LOCK_FILE).is_file() {
        let reason = format!("{} holds no store", path.display());
        return Err(VirtualMemoryError::invalid_config("disk_path", reason));
    }
    let (directory, data) = StoreDirectory::open(Some(path))?;
    directory.tally().store(UNKNOWN, Ordering::Release);
    let catalog = NameCatalog::look_at(&directory, 8 << 20)?;
    let mut verified = Verified::default();
    let unreadable = catalog.each_object(|name, object| {
        match read(&data, &object)? {
            None => {
                verified.objects += 1;
                verified.bytes += object.record.len;
            }
            Some(chunk) => {
                let why = format!("chunk {chunk} is not what was written");
                verified.damaged.push((name.to_owned(), why));
            }
        }
        Ok(())
    });
    // The next opener of the directory, in another process too, finds it free.
    catalog.shut();
    let unreadable = unreadable?;
    let why = "its rows in the catalog are not what was written";
    verified.damaged.extend(unreadable.into_iter().map(|name| (name, why.to_owned())));
    Ok(verified)
}

/// The first chunk that is damaged.
fn read(data: &File, object: &CatalogObject) -> io::Result<Option<usize>> {
    let mut buffer = vec![0; CHUNK_BYTES];
    for (index, chunk) in object.chunks.iter().enumerate() {
        let Some(chunk) = chunk else { continue };
        let start = (index * CHUNK_BYTES) as u64;
        let len = (object.record.len - start).min(CHUNK_BYTES as u64) as usize;
        match read_runs(data, &mut buffer[..len], &chunk.runs) {
            Ok(()) if crc32c(&buffer[..len]) == chunk.sum => {}
            Ok(()) => return Ok(Some(index)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(index)),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn read_runs(data: &File, mut chunk: &mut [u8], runs: &[Run]) -> io::Result<()> {
    for run in runs {
        let part = chunk.len().min(run.footprint as usize);
        let (now, later) = std::mem::take(&mut chunk).split_at_mut(part);
        data.read_exact_at(now, run.offset)?;
        chunk = later;
    }
    Ok(())
}
