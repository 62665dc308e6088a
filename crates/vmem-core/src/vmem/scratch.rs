//! Device memory that is no object's: scratch for kernels, which nothing copies down.
//!
//! Invariant: it counts as a lease for as long as it exists; a request that waits holds nothing.
//! Called by `vmem-gpu` through `backend`.

use std::sync::Arc;

use super::Result;
use super::access::DeviceAccess;
use super::lease::LEASE;
use super::pin::until_unheld;
use crate::deadline::Deadline;
use crate::device::DeviceRange;
use crate::memory_tier::MemoryTier;
use crate::object::{NO_OBJECT, Shared};
use crate::tier::{Class, HoldKind, Need};

/// Device memory without an object, free once this is dropped: after the last kernel that uses it.
#[derive(Debug)]
pub struct VramScratch {
    /// None where it has no bytes.
    range: Option<DeviceRange>,
    _charge: Option<Charge>,
}

impl VramScratch {
    /// Where it is; none where it has no bytes.
    pub fn range(&self) -> Option<&DeviceRange> {
        self.range.as_ref()
    }
}

/// Bytes that are charged as leased.
#[derive(Debug)]
struct Charge {
    shared: Arc<Shared>,
    tier: MemoryTier,
    footprint: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.shared.uncharge(self.tier, HoldKind::Lease, self.footprint);
    }
}

impl DeviceAccess {
    /// Device memory for `len` bytes, which begin as zeros. Objects that are not in use make space
    /// for it.
    ///
    /// # Errors
    ///
    /// `ExceedsCapacity` if it never could be had; `AllPinned`, `TimedOut` at the deadline;
    /// `TierNotAvailable`, `Device`, `Closed`.
    pub async fn take_scratch(&self, len: usize) -> Result<VramScratch> {
        let shared = &self.store().shared;
        let deadline = shared.deadline();
        loop {
            let taken = take(shared.clone(), self.number(), len, deadline);
            let parcel = shared.spawn_for_caller_briefly("vmem-scratch", taken);
            if let Some(scratch) = shared.answer(&parcel, &deadline, LEASE).await? {
                return Ok(scratch);
            }
            self.store().check_open()?;
        }
    }
}

/// Takes the memory; for a task.
async fn take(
    shared: Arc<Shared>,
    number: usize,
    len: usize,
    deadline: Deadline,
) -> Result<VramScratch> {
    if len == 0 {
        return Ok(VramScratch { range: None, _charge: None });
    }
    let device = shared.device(number)?;
    let tier = device.tier();
    let footprint = device.backend.footprint(len);
    let need = Need::one(len, NO_OBJECT, Class::Demand);
    loop {
        shared.check_fits_holds(tier, footprint)?;
        let range = device.state.take(&need, &deadline).await?.pop();
        if !shared.try_charge(tier, HoldKind::Lease, footprint)? {
            drop(range);
            until_unheld(&shared, tier, footprint, &deadline).await?;
            continue;
        }
        let charge = Charge { shared: shared.clone(), tier, footprint };
        if let Some(range) = &range {
            // What was there is another's.
            let zeroed = device.backend.zero(Arc::new(range.share())).await;
            zeroed.map_err(|error| device.fault(error))?;
        }
        return Ok(VramScratch { range, _charge: Some(charge) });
    }
}
