//! The pages behind registered memory, as a device sees them.
//!
//! Invariant: they are those that were there when the memory was registered, whatever was done to
//! its addresses since: pages that were given back to the system and came again are others, and a
//! copy does not see those. So it is with a real device, and so it is here where the kernel has
//! io_uring, which pins buffers likewise; elsewhere copies follow the addresses. Called by the
//! streams.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use io_uring::{IoUring, opcode, types};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::raw::HostMemory;

/// Pinned pages, and a file in memory through which they are reached.
pub(crate) struct Pages {
    memory: HostMemory,
    way: Mutex<(IoUring, File)>,
}

impl Pages {
    /// Pins the pages of this memory; none if the system does not.
    pub(crate) fn pin(memory: HostMemory) -> Option<Self> {
        let ring = IoUring::new(1).ok()?;
        let buffer = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(memory.address),
            iov_len: memory.len,
        };
        // SAFETY: a caller that registers memory promises that it stays mapped until it is
        // unregistered, and this is dropped then.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.ok()?;
        let file = memfd_create("pages", MemfdFlags::CLOEXEC).ok()?;
        Some(Pages { memory, way: Mutex::new((ring, file.into())) })
    }

    /// What is in a part of them.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(crate) fn read(&self, part: HostMemory) -> io::Result<Vec<u8>> {
        let way = &mut *self.way.lock().unwrap_or_else(PoisonError::into_inner);
        self.each(part, |at, len, offset| {
            let to = types::Fd(way.1.as_raw_fd());
            let write = opcode::WriteFixed::new(to, at as *const u8, len, 0).offset(offset);
            carry_out(&mut way.0, &write.build())
        })?;
        let mut bytes = vec![0; part.len];
        way.1.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Writes to a part of them.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(crate) fn write(&self, part: HostMemory, bytes: &[u8]) -> io::Result<()> {
        let way = &mut *self.way.lock().unwrap_or_else(PoisonError::into_inner);
        way.1.write_all_at(bytes, 0)?;
        self.each(part, |at, len, offset| {
            let from = types::Fd(way.1.as_raw_fd());
            let read = opcode::ReadFixed::new(from, at as *mut u8, len, 0).offset(offset);
            carry_out(&mut way.0, &read.build())
        })
    }

    /// Goes through a part, however little is moved at a time.
    fn each(
        &self,
        part: HostMemory,
        mut step: impl FnMut(usize, u32, u64) -> io::Result<u32>,
    ) -> io::Result<()> {
        let inside = part.address >= self.memory.address
            && part.address + part.len <= self.memory.address + self.memory.len;
        assert!(inside, "a part of what was registered");
        let mut done = 0;
        while done < part.len {
            let len = u32::try_from(part.len - done).unwrap_or(u32::MAX / 2);
            match step(part.address + done, len, done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved => done += moved as usize,
            }
        }
        Ok(())
    }
}

/// Submits one operation and waits for it.
fn carry_out(ring: &mut IoUring, entry: &io_uring::squeue::Entry) -> io::Result<u32> {
    // SAFETY: the buffer is registered, and stays so: this waits for the end of the operation.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        if let Some(completion) = ring.completion().next() {
            let result = completion.result();
            return u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("memory", &self.memory).finish_non_exhaustive()
    }
}
