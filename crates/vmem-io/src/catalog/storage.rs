//! The file below the catalog.
//!
//! Invariant: positional I/O alone; nothing is locked here, since the directory is. Called by redb.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::StorageBackend;

/// What redb reads and writes through; remembers whether a sync failed.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    inner: Arc<dyn StorageBackend>,
    sync_failed: Arc<AtomicBool>,
}

impl Storage {
    pub(super) fn new(inner: Arc<dyn StorageBackend>) -> Self {
        Storage { inner, sync_failed: Arc::default() }
    }

    pub(super) fn of_file(file: File) -> Self {
        Self::new(Arc::new(FileStorage(file)))
    }

    pub(super) fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }
}

impl StorageBackend for Storage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let synced = self.inner.sync_data();
        self.sync_failed.fetch_or(synced.is_err(), Ordering::AcqRel);
        synced
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }
}

/// A file.
#[derive(Debug)]
struct FileStorage(File);

impl StorageBackend for FileStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}
