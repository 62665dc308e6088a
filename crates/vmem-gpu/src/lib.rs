//! The VRAM tier of vmem, over CUDA through cudarc.
//!
//! Invariant: opening never panics and never fails for want of a GPU: what is not there is a
//! reason. Called by the facade.
//!
//! # Layout
//!
//! - `probe`: whether there is a driver with everything that is needed, found out without calling
//!   it.
//! - `card`: the context and its memory; whether it is dead.
//! - `reach`: memory of the host that the device reaches directly; `siblings`: the cards that share
//!   it.
//! - `event`: how far streams have come, and which follows which; `notices`: what is woken then.
//! - `copy`: copies and the ownership of what they touch; `call`: those over memory of a user.
//! - `issue`: which of them the driver gets how: by a kernel of ours (`pieces`), many in one call
//!   (`batch`), or one by one.
//! - `lane`: a thread for each direction, which hands copies to the driver and waits for their
//!   events; `backlog`: what waits for it, in two classes.
//! - `watch`: a thread that waits for the kernels of users.
//! - `gather`, `scatter`: copies between objects and one device buffer of the user, a `target`;
//!   `given`: the pieces on their way there; `apart`: what of a call does not wait for its caller;
//!   `owner`: what keeps a buffer that was handed over.
//! - `ext`, `lease`, `set`: objects for kernels, on streams of the user, one or several; `lend`: as
//!   slices of cudarc's.
//! - `adopt`: streams of other libraries.
//! - `dlpack`, behind the feature of that name: a lease as a tensor of PyTorch and others, and a
//!   tensor of theirs as a target.
//! - `tier`: the ledger of device memory, and what the core calls.

mod adopt;
mod apart;
mod backlog;
mod batch;
mod borrowed;
mod call;
mod card;
mod context;
mod copy;
#[cfg(feature = "dlpack")]
pub mod dlpack;
mod event;
mod ext;
mod gather;
mod given;
mod issue;
mod lane;
mod lease;
mod lend;
mod limit;
mod line;
mod mapped;
mod memory;
mod mover;
mod notices;
mod order;
mod owner;
mod paged;
mod pieces;
mod probe;
mod queued;
mod reach;
mod scatter;
mod set;
mod siblings;
mod target;
mod tier;
mod trial;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use vmem_core::backend::DeviceBackend;
use vmem_core::{Budget, GpuSelection, MemoryTier, SwitchPoints, VirtualMemoryError};

pub use crate::adopt::adopt_stream;
use crate::card::Listed;
pub use crate::ext::VramExt;
pub use crate::gather::Gathered;
pub use crate::lease::{DeviceLease, DeviceLeaseMut, Scratch};
pub use crate::scatter::Scattered;
pub use crate::set::{DeviceSet, DeviceSetRequest};
pub use crate::target::DeviceTarget;
pub use crate::tier::CudaTier;
use crate::tier::Settings;

/// What was found.
#[derive(Debug)]
pub struct Opened {
    /// The tier, if there is one.
    pub device: Option<Arc<dyn DeviceBackend>>,
    /// Why there is none; empty if there is.
    pub reason: Arc<str>,
}

/// How long calls wait by default, as for a store.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens the VRAM tier, if the machine has a device for it: `capacity` bytes of its memory, or
/// three quarters of what is free. Blocks while the driver starts.
///
/// # Errors
///
/// `TierNotAvailable` with the reason, if a certain GPU was asked for.
///
/// ```
/// use vmem::GpuSelection;
///
/// let opened = vmem_gpu::open_device(&GpuSelection::Off, None).unwrap();
/// assert!(opened.device.is_none());
/// assert!(opened.reason.contains("configuration"));
/// ```
pub fn open_device(
    selection: &GpuSelection,
    capacity: Option<u64>,
) -> Result<Opened, VirtualMemoryError> {
    let points = SwitchPoints::default();
    open_device_within(selection, capacity.into(), points, WAIT_TIMEOUT)
}

/// As [`open_device`], for a store whose copies go the way that `switch_points` says, and of which
/// no call waits longer than `wait_timeout` for others.
/// Within a tokio runtime, that is where the work goes on that must not wait for a caller.
///
/// # Errors
///
/// As [`open_device`].
pub fn open_device_within(
    selection: &GpuSelection,
    budget: Budget,
    switch_points: SwitchPoints,
    wait_timeout: Duration,
) -> Result<Opened, VirtualMemoryError> {
    if *selection == GpuSelection::Off {
        return Ok(Opened { device: None, reason: "switched off by the configuration".into() });
    }
    let selected = selection.clone();
    let runtime = tokio::runtime::Handle::try_current().ok();
    let settings = Settings { switch_points, wait_timeout, runtime };
    // A thread of its own, so that the caller's current context does not change.
    let opening = std::thread::spawn(move || find_and_open(&selected, budget, settings));
    let opened = opening.join().unwrap_or_else(|_| Err("the CUDA driver panicked".to_owned()));
    match (opened, selection) {
        (Ok(tier), _) => Ok(Opened { device: Some(tier), reason: "".into() }),
        (Err(reason), GpuSelection::Auto) => Ok(Opened { device: None, reason: reason.into() }),
        (Err(reason), _) => Err(VirtualMemoryError::tier_not_available(MemoryTier::Vram, reason)),
    }
}

fn find_and_open(
    selection: &GpuSelection,
    budget: Budget,
    settings: Settings,
) -> Result<Arc<CudaTier>, String> {
    probe::find_driver()?;
    let devices = probe::guarded(card::list)?;
    let Listed { ordinal, name, .. } = select(&devices, selection)?;
    let ordinal = *ordinal;
    let name = name.clone();
    probe::guarded(move || CudaTier::open(ordinal, &name, budget, settings))
}

fn select<'a>(devices: &'a [Listed], selection: &GpuSelection) -> Result<&'a Listed, String> {
    let there = || {
        let list = devices.iter().map(|device| format!("{} {}", device.ordinal, device.uuid));
        list.collect::<Vec<_>>().join(", ")
    };
    match selection {
        GpuSelection::Device(ordinal) => devices
            .get(*ordinal)
            .ok_or_else(|| format!("there is no device {ordinal}, but: {}", there())),
        GpuSelection::Uuid(uuid) => devices
            .iter()
            .find(|device| device.uuid.eq_ignore_ascii_case(uuid))
            .ok_or_else(|| format!("there is no device {uuid}, but: {}", there())),
        _ => devices.first().ok_or_else(|| "the CUDA driver lists no device".to_owned()),
    }
}
