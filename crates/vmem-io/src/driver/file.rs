//! Positional system calls, and what turns them into whole transfers.
//!
//! Invariant: a transfer moves every byte or returns an error that says why; the file position is
//! never used. Called on the threads of the blocking driver.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{ReadPiece, WriteRun};

/// As many parts as one system call takes; the common `IOV_MAX`.
const PARTS_MAX: usize = 1024;

/// So many interruptions in a row, without a byte of progress, are a fault and not bad luck.
const INTERRUPTS_MAX: u32 = 1 << 16;

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

/// Fills every piece, in order.
pub(super) fn read_pieces<F: PositionalFile + ?Sized>(
    file: &F,
    buf: &mut [u8],
    pieces: &[ReadPiece],
) -> io::Result<()> {
    for piece in pieces {
        let target = buf.get_mut(piece.range.clone()).ok_or_else(outside)?;
        let mut done = 0;
        while done < target.len() {
            let at = piece.offset.checked_add(done as u64).ok_or_else(outside)?;
            match persist(|| file.read_at(&mut target[done..], at))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => done += count.min(target.len() - done),
            }
        }
    }
    Ok(())
}

/// Writes every run, in order.
pub(super) fn write_runs<F: PositionalFile + ?Sized>(
    file: &F,
    runs: &[WriteRun],
) -> io::Result<()> {
    for run in runs {
        run.offset.checked_add(run.len()).ok_or_else(outside)?;
        let mut at = run.offset;
        for parts in run.parts.chunks(PARTS_MAX) {
            let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            at += write_parts(file, &mut slices, at)?;
        }
    }
    Ok(())
}

/// Writes all of at most [`PARTS_MAX`] parts; returns how many bytes they were.
fn write_parts<F: PositionalFile + ?Sized>(
    file: &F,
    mut parts: &mut [IoSlice<'_>],
    offset: u64,
) -> io::Result<u64> {
    let mut left: usize = parts.iter().map(|part| part.len()).sum();
    let mut done = 0;
    // Also drops the empty parts in front, so that no call is made for nothing.
    IoSlice::advance_slices(&mut parts, 0);
    while left > 0 {
        let count = persist(|| file.write_vectored_at(parts, offset + done))?.min(left);
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut parts, count);
        done += count as u64;
        left -= count;
    }
    Ok(done)
}

/// Repeats a call that signals interrupt.
pub(super) fn persist<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut interrupts = 0;
    loop {
        match call() {
            Err(error)
                if error.kind() == io::ErrorKind::Interrupted && interrupts < INTERRUPTS_MAX =>
            {
                interrupts += 1;
            }
            other => return other,
        }
    }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a transfer outside of its buffer or file")
}
