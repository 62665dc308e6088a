//! The system calls of the blocking driver.
//!
//! Invariant: the file position is never used. Called on the threads of the blocking driver.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The system calls that the blocking driver makes on its file. Every call may be short, may be
/// interrupted and may fail: the driver resumes, retries and reports.
pub trait PositionalFile: fmt::Debug + Send + Sync + 'static {
    /// Reads at most `buf.len()` bytes from `offset`; zero is the end of the file.
    ///
    /// # Errors
    ///
    /// The errno of the call.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes at most these parts, one after the other from `offset`.
    ///
    /// # Errors
    ///
    /// The errno of the call.
    fn write_vectored_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Puts the data on stable storage.
    ///
    /// # Errors
    ///
    /// The errno of the call.
    fn sync(&self) -> io::Result<()>;

    /// Gives the space behind a range of bytes back, the length of the file unchanged.
    ///
    /// # Errors
    ///
    /// `Unsupported` where the file system cannot, else the errno of the call.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// The length of the file, in bytes.
    ///
    /// # Errors
    ///
    /// The errno of the call.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    ///
    /// # Errors
    ///
    /// The errno of the call.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

impl PositionalFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn write_vectored_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pwritev(self, parts, offset)?)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    #[cfg(target_os = "linux")]
    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let len = range.end - range.start;
        Ok(rustix::fs::fallocate(self, flags, range.start, len)?)
    }

    #[cfg(not(target_os = "linux"))]
    fn punch(&self, _range: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}
