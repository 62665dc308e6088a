//! The VRAM tier of vmem: its place.
//!
//! Invariant: until the tier exists, whoever asks for VRAM is told so in a typed error, never
//! served from somewhere else. Called by the facade.

use std::sync::Arc;

use vmem_core::{GpuSelection, VirtualMemoryError};

/// Looks for a VRAM tier. There is none in this version, whatever the machine has: the text says
/// why.
///
/// # Errors
///
/// `TierNotAvailable` if a certain GPU was asked for.
///
/// ```
/// use vmem_core::GpuSelection;
///
/// let reason = vmem_gpu::probe(&GpuSelection::Auto).unwrap();
/// assert!(reason.contains("VRAM"));
/// assert!(vmem_gpu::probe(&GpuSelection::Device(0)).is_err());
/// ```
pub fn probe(selection: &GpuSelection) -> Result<Arc<str>, VirtualMemoryError> {
    let reason: Arc<str> = "this version of vmem has no VRAM tier yet".into();
    match selection {
        GpuSelection::Auto => Ok(reason),
        GpuSelection::Off => Ok("switched off by the configuration".into()),
        _ => {
            Err(VirtualMemoryError::TierNotAvailable { tier: vmem_core::MemoryTier::Vram, reason })
        }
    }
}
