//! Kernels that read what was copied, so that it can be compared, and one that changes it.
//!
//! Invariant: a kernel has ended before what it wrote is read. Called by the bars.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaStream, result, sys};
use vmem::gpu::{DeviceLease, DeviceLeaseMut, VramExt};
use vmem::{VMemHandle, VirtualMemory};

use crate::user::{DeviceMemory, Pinned, User};

/// What a kernel reads.
pub(in crate::bars) enum Source<'a> {
    Lease(&'a DeviceLease),
    Memory { memory: &'a DeviceMemory, at: usize, len: usize },
}

/// Where kernels put what they read, on a stream of their own.
pub(in crate::bars) struct Sink {
    scratch: DeviceMemory,
    samples: DeviceMemory,
    stream: Arc<CudaStream>,
}

/// What is kept of each object that a kernel read, in bytes.
const SAMPLE: usize = 1024;

impl Sink {
    /// For objects of at most `len` bytes, of which `count` are read before they are compared.
    pub(in crate::bars) fn new(
        user: &User,
        len: usize,
        count: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<Self> {
        let scratch = user.allocate(len)?;
        let samples = user.allocate(count * SAMPLE)?;
        Ok(Sink { scratch, samples, stream: stream.clone() })
    }

    pub(in crate::bars) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Which part of an object the sample in this slot is.
    fn sampled(slot: usize, len: usize) -> Range<usize> {
        let start = (slot * 7919 * 16) % (len - SAMPLE.min(len) + 1);
        start..start + SAMPLE.min(len)
    }

    /// Queues a kernel that reads all of it, one that keeps a part of what was read, and one that
    /// takes so long.
    pub(in crate::bars) fn read(
        &self,
        user: &User,
        source: &Source<'_>,
        slot: usize,
        work: Duration,
    ) -> Result<()> {
        let (from, len) = match source {
            Source::Lease(lease) => {
                ensure!(Arc::ptr_eq(lease.stream(), &self.stream), "a lease of another stream");
                // SAFETY: it is read on the stream of the lease, which is borrowed.
                (unsafe { lease.device_ptr() }, lease.len())
            }
            Source::Memory { memory, at, len } => {
                ensure!(at + len <= memory.len, "outside of device memory");
                (memory.address + *at as u64, *len)
            }
        };
        ensure!(len <= self.scratch.len, "longer than the scratch memory");
        let sample = Self::sampled(slot, len);
        ensure!((slot + 1) * SAMPLE <= self.samples.len, "more than were to be read");
        // SAFETY: what is read stays while its lease does, which is ended behind it on this stream,
        // or until its memory is freed, which waits; what is written is the sink's own.
        unsafe { user.copy(self.scratch.address, from, len, &self.stream) }?;
        let to = self.samples.address + (slot * SAMPLE) as u64;
        let from = self.scratch.address + sample.start as u64;
        // SAFETY: as above.
        unsafe { user.copy(to, from, sample.len(), &self.stream) }?;
        if work.is_zero() { Ok(()) } else { user.spin(work, &self.stream) }
    }

    /// Nothing was read: what is kept from here on was read from here on.
    pub(in crate::bars) fn forget(&self) -> Result<()> {
        let to = self.samples.address;
        let len = self.samples.len;
        let stream = self.stream.cu_stream();
        self.stream.context().bind_to_thread()?;
        // SAFETY: the sink's own memory, on its own stream.
        unsafe { result::memset_d8_async(to, 0, len, stream) }.context("clearing samples")
    }

    /// What was kept, by slots, with the part of the object that it is.
    pub(in crate::bars) fn samples(
        &self,
        count: usize,
        len: usize,
    ) -> Result<Vec<(Range<usize>, Vec<u8>)>> {
        let all = self.samples.read(&self.stream)?;
        let slots = all.chunks(SAMPLE).take(count).enumerate();
        Ok(slots
            .map(|(slot, bytes)| {
                let part = Self::sampled(slot, len);
                let bytes = bytes[..part.len()].to_vec();
                (part, bytes)
            })
            .collect())
    }
}

/// Adds to each byte of an object that is leased for it.
pub(in crate::bars) fn add(user: &User, lease: &mut DeviceLeaseMut, value: u8) -> Result<()> {
    // SAFETY: it is used on the stream of the lease, before that is dropped.
    let at = unsafe { lease.device_ptr() };
    // SAFETY: as above, and alone.
    unsafe { user.add(at, lease.len(), value, lease.stream()) }
}

/// Takes what is in device memory down, to compare it.
pub(in crate::bars) struct Reader {
    into: Pinned,
    stream: Arc<CudaStream>,
}

impl Reader {
    /// Of objects of at most `len` bytes.
    pub(in crate::bars) fn new(user: &User, len: usize) -> Result<Self> {
        Ok(Reader { into: user.pinned(len)?, stream: user.context.new_stream()? })
    }

    /// An object as device memory has it.
    pub(in crate::bars) async fn object(
        &mut self,
        vmem: &VirtualMemory,
        handle: &VMemHandle,
    ) -> Result<&[u8]> {
        ensure!(vmem.residency(handle)?.vram, "it is not in device memory");
        self.leased(vmem, handle).await
    }

    /// An object as device memory has it, promoted to it first if it is elsewhere.
    pub(in crate::bars) async fn leased(
        &mut self,
        vmem: &VirtualMemory,
        handle: &VMemHandle,
    ) -> Result<&[u8]> {
        let lease = vmem.device_on(handle, &self.stream).await.context("a lease")?;
        ensure!(lease.len() <= self.into.len(), "longer than what reads it");
        self.stream.context().bind_to_thread()?;
        // SAFETY: it is read on the stream of the lease, before that is dropped.
        let from = unsafe { lease.device_ptr() };
        let into = self.into.address();
        let stream = self.stream.cu_stream();
        // SAFETY: the memory is this type's, which waits below.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(into.cast(), from, lease.len(), stream) };
        let waited = self.stream.synchronize();
        copied.result().context("reading an object")?;
        waited.context("reading an object")?;
        Ok(&self.into.bytes()[..lease.len()])
    }
}
