//! What is tried before a tier serves: copies up and down.
//!
//! Invariant: it leaves no memory taken, and waits for its copies. Called by the tier as it opens,
//! on a thread that may wait.

use std::sync::Arc;

use futures::executor::block_on;
use vmem_core::backend::{DeviceBackend, DeviceError, IoBuf};

use crate::tier::CudaTier;

/// What is copied to see whether copying works, in bytes.
const TRIAL_BYTES: usize = 4096;

/// Copies some bytes up and down again: where memory is pages, across the border of two.
///
/// # Errors
///
/// What went wrong, in words.
pub(crate) fn copy(tier: &CudaTier) -> Result<(), String> {
    let refused = |error: DeviceError| format!("a trial copy failed: {error}");
    let border = tier.resizes_by().map_or(0, |bytes| bytes as usize - TRIAL_BYTES / 2);
    let range = tier.reserve(border + TRIAL_BYTES).ok_or("a trial found no memory")?;
    let range = Arc::new(range);
    let bytes: Vec<u8> = (0..TRIAL_BYTES).map(|at| (at % 251) as u8 ^ 0x5a).collect();
    block_on(tier.upload(range.clone(), border, bytes.clone().into())).map_err(refused)?;
    let back = IoBuf::from_vec(vec![0; TRIAL_BYTES]);
    let (back, outcome) = block_on(tier.download(range.clone(), border, TRIAL_BYTES, back, 0));
    outcome.map_err(refused)?;
    if back[..] != bytes[..] {
        return Err("a trial copy came back with other bytes".to_owned());
    }
    block_on(tier.zero(range)).map_err(refused)
}
