//! Address space from the operating system.
//!
//! Invariant: the memory of a mapping is readable, writable and initialised (with zeros, or with
//! what was written) from its creation to its drop. Pages that were given back read as zeros.
//! Memory that is registered with a device must not be given back, or the device would go on
//! transferring to pages that the process no longer sees: `pages` has such memory unregistered
//! first, and staging gives nothing back while it lives. Called by `arena` and `staging`, which
//! decide the owner of each part.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;

/// The unit of physical memory, in bytes.
pub(super) const PAGE_BYTES: usize = 4096;
/// The alignment of mappings, in bytes: a slab of this size can be registered as one.
const SLAB_BYTES: usize = 2 * 1024 * 1024;

/// A private anonymous mapping.
#[derive(Debug)]
pub(super) struct Mapping {
    raw: NonNull<u8>,
    raw_len: usize,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory; its users give each part one owner.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Address space of `len` bytes, from a slab's boundary. The kernel adds physical memory at
    /// first use.
    pub(super) fn reserve(len: usize) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
        let raw_len = len.checked_add(SLAB_BYTES).ok_or_else(too_large)?;
        let raw = map(raw_len)?;
        let past = raw.as_ptr().align_offset(SLAB_BYTES);
        // SAFETY: `past` is less than a slab, and the mapping is a slab longer than `len`.
        let base = unsafe { raw.add(past) };
        advise_all(raw, raw_len);
        Ok(Mapping { raw, raw_len, base, len })
    }

    /// The length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address of byte `at`.
    pub(super) fn at(&self, at: usize) -> NonNull<u8> {
        assert!(at <= self.len, "byte {at} of a mapping of {}", self.len);
        // SAFETY: within the mapping, or one past its end.
        unsafe { self.base.add(at) }
    }

    /// Gives the pages of this range back; they read as zeros afterwards. The caller owns them.
    /// False if they stay, with what was in them.
    #[must_use]
    pub(super) fn give_back(&self, range: Range<usize>) -> bool {
        assert!(range.start <= range.end && range.end <= self.len, "inside of the mapping");
        // The machine's pages may be larger than 4 KiB: only whole ones are discarded, since a part
        // would take its neighbours with it.
        let page = machine_page_bytes();
        if !range.start.is_multiple_of(page) || !range.end.is_multiple_of(page) {
            return false;
        }
        discard(self.at(range.start), range.len())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.raw, self.raw_len);
    }
}

#[cfg(not(miri))]
fn map(len: usize) -> io::Result<NonNull<u8>> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new anonymous mapping, at an address of the kernel's choice, aliases nothing.
    let address = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

#[cfg(not(miri))]
fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: exactly what `map` returned, and the owner is being dropped.
    let unmapped = unsafe { rustix::mm::munmap(start.as_ptr().cast(), len) };
    if let Err(error) = unmapped {
        tracing::error!(target: "vmem::host", %error, "address space was not given back");
    }
}

/// Asks for no huge pages, since a small part in use would keep a whole one, and for no copy in a
/// forked child.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_all(start: NonNull<u8>, len: usize) {
    use rustix::mm::{Advice, madvise};
    for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontFork] {
        // SAFETY: the whole of a mapping of ours; its contents and protection do not change.
        let advised = unsafe { madvise(start.as_ptr().cast(), len, advice) };
        if let Err(error) = advised {
            tracing::debug!(target: "vmem::host", %error, ?advice, "advice was not taken");
        }
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn advise_all(_start: NonNull<u8>, _len: usize) {}

#[cfg(not(miri))]
fn machine_page_bytes() -> usize {
    rustix::param::page_size()
}

#[cfg(miri)]
fn machine_page_bytes() -> usize {
    PAGE_BYTES
}

#[cfg(all(target_os = "linux", not(miri)))]
fn discard(start: NonNull<u8>, len: usize) -> bool {
    use rustix::mm::{Advice, madvise};
    // SAFETY: whole pages inside of the mapping, owned by the caller; they stay mapped, as zeros.
    let given_back = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontNeed) };
    if let Err(error) = given_back {
        tracing::warn!(target: "vmem::host", %error, "pages were not given back");
    }
    given_back.is_ok()
}

/// Elsewhere there is no call with these semantics: the pages stay, with what was in them.
#[cfg(not(all(target_os = "linux", not(miri))))]
fn discard(_start: NonNull<u8>, _len: usize) -> bool {
    false
}

#[cfg(miri)]
fn layout(len: usize) -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(len, PAGE_BYTES).expect("invariant: small under Miri")
}

#[cfg(miri)]
fn map(len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the layout is not empty: every mapping is longer than a slab.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout(len)) })
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

#[cfg(miri)]
fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: exactly what `map` returned.
    unsafe { std::alloc::dealloc(start.as_ptr(), layout(len)) };
}
