//! Direct I/O: whether a file takes it, and with which alignment.
//!
//! Invariant: what [`Alignment::probe`] answers was proven by writing to the file's file system and
//! reading it back. Called when the store opens.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::BounceBudget;

/// What offsets, lengths and memory must be multiples of, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of offsets and lengths: a power of two.
    pub(crate) offset: u32,
    /// Of addresses: a power of two.
    pub(crate) memory: u32,
}

/// What devices ask for, best first, in bytes.
const CANDIDATES: [u32; 2] = [512, 4096];

impl Alignment {
    /// Through the page cache: anything goes.
    pub const NONE: Alignment = Alignment { offset: 1, memory: 1 };

    /// Whether it is that of direct I/O.
    pub fn is_direct(self) -> bool {
        self != Self::NONE
    }

    /// What extents should be rounded to, in bytes.
    pub(crate) fn block_bytes(self) -> u32 {
        self.offset.max(512)
    }

    /// Turns direct I/O on for `file`, and proves it by operations on `scratch`, an empty file of
    /// the same file system without another user. On an error `file` is as it was.
    ///
    /// # Errors
    ///
    /// Where the file system refuses direct I/O, or accepts it and then moves other bytes.
    ///
    /// ```
    /// use vmem_io::driver::Alignment;
    ///
    /// // Some file systems refuse; the others give an alignment.
    /// if let Ok(alignment) = Alignment::probe(&tempfile::tempfile()?, &tempfile::tempfile()?) {
    ///     assert!(alignment.is_direct());
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn probe(file: &File, scratch: &File) -> io::Result<Self> {
        set_direct(scratch, true)?;
        let mut refusal = io::Error::from(io::ErrorKind::Unsupported);
        for candidate in CANDIDATES {
            match round_trip(scratch, candidate as usize) {
                Ok(()) => {
                    set_direct(file, true)?;
                    return Ok(Alignment { offset: candidate, memory: candidate });
                }
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }
}

/// Writes blocks whose offset, length and address are multiples of `align` and of nothing larger,
/// and reads them back.
fn round_trip(scratch: &File, align: usize) -> io::Result<()> {
    let mut bounce = BounceBudget::new().take(16 * align);
    let at = align..4 * align;
    let len = 3 * align;
    let pattern: Vec<u8> = (0..len).map(|n| (n % 251) as u8 ^ 0x5a).collect();
    let bytes = bounce.bytes_mut();
    bytes[at.clone()].copy_from_slice(&pattern);
    let written = scratch.write_at(&bytes[at.clone()], align as u64)?;
    bytes[at.clone()].fill(0);
    let read = scratch.read_at(&mut bytes[at.clone()], align as u64)?;
    match written == len && read == len && bytes[at] == pattern[..] {
        true => Ok(()),
        false => Err(io::Error::other("direct I/O gave other bytes back than were written")),
    }
}

/// Sets or clears `O_DIRECT` on an open file.
#[cfg(target_os = "linux")]
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, if on { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT })?)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn set_direct(_file: &File, _on: bool) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
