//! Opening the disk tier from the pieces of a configuration.
//!
//! Invariant: an error leaves nothing behind but, at most, the directory that was asked for with
//! the lock file in it. Called by the facade.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmem_core::backend::{CHUNK_BYTES, Catalog, Durable};
use vmem_core::{Budget, IoDriver, VirtualMemoryError};

use crate::catalog::NameCatalog;
use crate::directory::StoreDirectory;
use crate::driver::{Chosen, choose};
use crate::machine::memory_limit_bytes;
use crate::tier::DiskTier;

/// A disk tier that is ready, and what was found.
#[derive(Clone, Debug)]
pub struct OpenedDisk {
    /// The tier.
    pub backend: Arc<dyn Durable>,
    /// The catalog of its named objects; closed before the tier, it too has a share of the
    /// directory's lock.
    pub catalog: Arc<dyn Catalog>,
    /// Its directory, absolute.
    pub path: PathBuf,
    /// Its budget, in bytes.
    pub capacity_bytes: u64,
    /// Whether the directory is in memory.
    pub tmpfs: bool,
    /// Which driver serves.
    pub driver: IoDriver,
    /// Whether it bypasses the page cache.
    pub direct: bool,
    /// What would have been better and was refused, each with its cause.
    pub notes: Vec<Arc<str>>,
}

/// How to open the disk tier.
#[derive(Clone, Debug)]
pub struct DiskOptions<'a> {
    /// The directory; `None` makes a private temporary one.
    pub path: Option<&'a Path>,
    /// Whether the directory may hold files of others, which are left alone.
    pub allow_foreign_files: bool,
    /// The budget. By default half of what the file system has free, and where it lies in memory
    /// (tmpfs) at most a quarter of [`memory_limit_bytes`](crate::memory_limit_bytes).
    pub capacity: Budget,
    /// The driver; that of the reactor is available inside of a tokio runtime alone.
    pub driver: IoDriver,
    /// What the catalog of names keeps of itself in memory, in bytes.
    pub catalog_cache: u64,
}

/// [`open_disk_with`] these options, and no others.
///
/// # Errors
///
/// As [`open_disk_with`].
///
/// ```
/// use vmem_core::IoDriver;
///
/// let disk = vmem_io::open_disk(None, Some(1 << 20), IoDriver::Auto, 1 << 20)?;
/// assert_eq!(disk.backend.usage().capacity_bytes, 1 << 20);
/// # futures::executor::block_on(disk.backend.close()).unwrap();
/// # Ok::<(), vmem_core::VirtualMemoryError>(())
/// ```
pub fn open_disk(
    path: Option<&Path>,
    capacity_bytes: Option<u64>,
    driver: IoDriver,
    catalog_cache: u64,
) -> Result<OpenedDisk, VirtualMemoryError> {
    open_disk_with(DiskOptions {
        path,
        allow_foreign_files: false,
        capacity: capacity_bytes.into(),
        driver,
        catalog_cache,
    })
}

/// Opens the disk tier. The calls that this makes block for a moment.
///
/// # Errors
///
/// Those of [`StoreDirectory::open`], and [`InvalidConfig`](VirtualMemoryError::InvalidConfig) for
/// a budget that holds not one full chunk (64 KiB);
/// [`TierNotAvailable`](VirtualMemoryError::TierNotAvailable) for a driver that was asked for and
/// is unavailable.
pub fn open_disk_with(options: DiskOptions<'_>) -> Result<OpenedDisk, VirtualMemoryError> {
    let DiskOptions { path, allow_foreign_files, capacity, driver, catalog_cache } = options;
    let (directory, data) = StoreDirectory::open_beside(path, allow_foreign_files)?;
    let (catalog, taken) =
        NameCatalog::open(&directory, usize::try_from(catalog_cache).unwrap_or(usize::MAX))?;
    let io = |error| VirtualMemoryError::io("reclaiming the data file", error);
    // What is behind the last extent that something leads to was unnamed.
    if data.metadata().map_err(io)?.len() > taken.end() {
        data.set_len(taken.end()).map_err(io)?;
    }
    let capacity_bytes = match capacity.bytes() {
        Some(bytes) => bytes,
        None => {
            let memory = directory.is_tmpfs().then(memory_limit_bytes);
            budget_bytes(capacity, directory.free_bytes()?, taken.bytes(), memory)?
        }
    };
    if capacity_bytes < CHUNK_BYTES as u64 {
        let reason = format!("{capacity_bytes} bytes hold not one chunk of {CHUNK_BYTES}");
        return Err(VirtualMemoryError::invalid_config("disk_capacity", reason));
    }
    if directory.is_tmpfs() {
        let path = directory.path().display();
        tracing::warn!(
            target: "vmem::disk", %path, "the disk tier is in memory: it takes RAM, not disk"
        );
    }
    let buffered = reopened(&data).map_err(io)?;
    let block = catalog.block_bytes();
    let Chosen { driver, kind, direct, notes } = choose(driver, data, &directory, block)?;
    catalog.set_disk(buffered, driver.block_bytes());
    Ok(OpenedDisk {
        path: directory.path().to_owned(),
        tmpfs: directory.is_tmpfs(),
        backend: DiskTier::with_taken(driver, capacity_bytes, &taken, Some(directory))?,
        catalog: Arc::new(catalog),
        capacity_bytes,
        driver: kind,
        direct,
        notes,
    })
}

/// The budget of a store that was not given one in bytes. A percentage is of free and taken
/// space together, of files in memory no more than this process may have of that.
fn budget_bytes(
    budget: Budget,
    free: u64,
    taken: u64,
    memory: Option<u64>,
) -> Result<u64, VirtualMemoryError> {
    let whole = free.saturating_add(taken).min(memory.unwrap_or(u64::MAX));
    budget.resolve("disk_capacity", whole, || default_capacity(free, taken, memory))
}

/// The budget of a store that was given none: it leaves others half of what is free, and, where the
/// files lie in memory, takes a quarter of what this process may have of that. What has a name is
/// there already and always fits.
fn default_capacity(free: u64, taken: u64, memory: Option<u64>) -> u64 {
    let half = free.saturating_add(taken) / 2;
    half.min(memory.map_or(u64::MAX, |limit| limit / 4)).max(taken)
}

/// The file again, opened anew: what is set for the one, such as direct I/O, is not for the other.
fn reopened(data: &File) -> io::Result<File> {
    let descriptors = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
    File::open(format!("{descriptors}/{}", data.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_budget_leaves_space_for_others_and_memory_for_the_process() {
        let gib = |n: u64| n << 30;
        assert_eq!(default_capacity(gib(100), 0, None), gib(50));
        assert_eq!(default_capacity(gib(60), gib(40), None), gib(50));
        assert_eq!(default_capacity(gib(10), gib(90), None), gib(90), "what has a name fits");
        // The file system is larger than what the process's control group allows.
        assert_eq!(default_capacity(gib(24), 0, Some(gib(2))), gib(2) / 4);
        assert_eq!(default_capacity(gib(24), gib(1), Some(gib(2))), gib(1));
        assert_eq!(default_capacity(0, 0, None), 0);
    }

    #[test]
    fn a_percentage_is_of_what_this_store_could_have() {
        let gib = |n: u64| n << 30;
        let quarter =
            |free, taken, memory| budget_bytes(Budget::Percent(25.0), free, taken, memory).unwrap();
        assert_eq!(quarter(gib(100), 0, None), gib(25));
        assert_eq!(quarter(gib(60), gib(40), None), gib(25), "closing and opening changes nothing");
        assert_eq!(quarter(gib(100), 0, Some(gib(8))), gib(2), "files in memory");
        assert_eq!(budget_bytes(Budget::Default, gib(100), 0, None).unwrap(), gib(50));
        let unknown = budget_bytes(Budget::Percent(25.0), 0, 0, None).unwrap_err();
        assert!(matches!(
            unknown,
            VirtualMemoryError::InvalidConfig { field: "disk_capacity", .. }
        ));
    }
}
