//! A user's own memory, on the device and pinned on the host.
//!
//! Invariant: it is freed in the context that it was taken in, by its only owner. Taken from
//! `User`.

#![allow(unsafe_code)]

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::pages::Pages;

/// Device memory of the user.
pub(crate) struct DeviceMemory {
    pub(crate) address: u64,
    pub(crate) len: usize,
    /// What it consists of, if that is pages.
    pub(super) pages: Option<Pages>,
    pub(super) context: Arc<CudaContext>,
}

impl DeviceMemory {
    /// What is in it after what was queued on the stream.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn read(&self, stream: &CudaStream) -> Result<Vec<u8>> {
        self.context.bind_to_thread()?;
        let mut bytes = vec![0; self.len];
        // SAFETY: the vector is alive until the stream was waited for below.
        let copied =
            unsafe { result::memcpy_dtoh_async(&mut bytes, self.address, stream.cu_stream()) };
        let waited = stream.synchronize();
        copied.context("reading device memory")?;
        waited.context("reading device memory")?;
        Ok(bytes)
    }

    /// Makes these its first bytes, and waits.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn write(&self, bytes: &[u8], stream: &CudaStream) -> Result<()> {
        ensure!(bytes.len() <= self.len, "more bytes than there is memory");
        self.context.bind_to_thread()?;
        // SAFETY: the source is alive until the stream was waited for below.
        let copied = unsafe { result::memcpy_htod_async(self.address, bytes, stream.cu_stream()) };
        let waited = stream.synchronize();
        copied.context("writing device memory")?;
        waited.context("writing device memory")
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.pages.is_some() {
            return;
        }
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated once; the driver waits for what uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Host memory that the device reaches directly.
pub(crate) struct Pinned {
    pub(super) address: *mut u8,
    pub(super) len: usize,
    /// Mapped and registered, not allocated by the driver.
    pub(super) mapped: bool,
    pub(super) context: Arc<CudaContext>,
}

// SAFETY: the memory has no other owner, and the driver frees it on any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Where it is, for copies that are waited for before it is looked at.
    pub(crate) fn address(&self) -> *mut u8 {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: that long, initialised, and this type's own.
        unsafe { std::slice::from_raw_parts(self.address, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        if !self.mapped {
            // SAFETY: allocated once, and its user waits for copies before dropping it.
            let _ = unsafe { result::free_host(self.address.cast()) };
            return;
        }
        // SAFETY: registered once, and its user waits for copies before dropping it.
        let forgotten = unsafe { sys::cuMemHostUnregister(self.address.cast()) }.result();
        if forgotten.is_ok() {
            // SAFETY: mapped once, that long, and the device knows it no more.
            unsafe { libc::munmap(self.address.cast(), self.len) };
        }
    }
}
