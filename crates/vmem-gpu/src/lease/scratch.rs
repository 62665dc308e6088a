//! Device memory for kernels that is no object's.
//!
//! Invariant: as for a lease, the memory stays until everything has ended that was queued on its
//! stream before it was dropped; then it is free, and nothing of it was copied. Called by users.

use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};
use vmem_core::backend::{DeviceAccess, VramScratch};

use super::Result;
use super::leased::Leased;

/// Device memory that kernels on one stream use, and that nothing outlives. It begins as zeros.
#[derive(Debug)]
#[must_use = "dropping it frees the memory"]
pub struct Scratch {
    leased: Leased,
    /// None while it is being dropped.
    memory: Option<VramScratch>,
}

impl Scratch {
    pub(crate) fn new(
        access: &DeviceAccess,
        stream: &Arc<CudaStream>,
        memory: VramScratch,
    ) -> Result<Self> {
        let leased = Leased::new(access, stream, memory.range())?;
        Ok(Scratch { leased, memory: Some(memory) })
    }

    /// The bytes, for kernels on its stream.
    pub fn view(&self) -> CudaView<'_, u8> {
        self.leased.view()
    }

    /// The bytes, for kernels on its stream that write to them.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, u8> {
        self.leased.view_mut()
    }

    /// Its length, in bytes.
    pub fn len(&self) -> usize {
        self.leased.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.leased.stream
    }

    /// Where it is in device memory: a multiple of 256; 0 if it has no bytes.
    ///
    /// # Safety
    ///
    /// It is used by work on its stream alone, queued before it is dropped.
    #[allow(unsafe_code)]
    pub unsafe fn device_ptr(&self) -> u64 {
        self.leased.address
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The thread keeps the memory, whether the answer is awaited or not.
            drop(self.leased.release(Box::new(|_| Box::new(memory))));
        }
    }
}
