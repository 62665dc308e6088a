//! A device: its context, and the memory of the tier.
//!
//! Invariant: device memory is freed only after the last use of it, or in a context that is proven
//! dead. Of the unsafe code that touches the driver this is the part for memory of the device; that
//! for memory of the host is in `siblings`, that for order in `event`, that for copies in `copy`.
//! Called by all of the crate.

#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use vmem_core::backend::DeviceError;
use vmem_core::{Budget, SwitchPoints};

use crate::batch::Batches;
use crate::context::{Context, relax_capture};
use crate::event::EventPool;
use crate::lane::Lost;
use crate::mapped::Mapped;
use crate::pieces::Pieces;
use crate::queued::{Queued, Streams};
use crate::siblings::Siblings;

/// How memory is taken: with the value `separate` each object has an allocation of its own, for
/// checkers of memory; with `block` all is one block.
const ALLOCATIONS: &str = "VMEM_GPU_ALLOCATIONS";
/// Where objects begin is a multiple of this, in bytes.
pub(crate) const UNIT: u64 = 512;
/// A tier smaller than this is none, in bytes.
const CAPACITY_MIN: u64 = 4 << 20;

/// What the driver said, in words.
pub(crate) fn told(what: &str, error: DriverError) -> String {
    format!("{what}: {} ({})", message(error), error.0 as i32)
}

fn message(error: DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|_| "an error without a name".into())
}

/// The error of an operation.
pub(crate) fn failed(operation: &'static str, error: DriverError) -> DeviceError {
    DeviceError::Failed { operation, code: error.0 as i32, message: message(error).into() }
}

/// One device of the machine, as the driver lists them.
pub(crate) struct Listed {
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    pub(crate) uuid: String,
}

/// The devices that there are.
///
/// # Errors
///
/// What the driver says, in words.
pub(crate) fn list() -> Result<Vec<Listed>, String> {
    result::init().map_err(|error| told("the CUDA driver does not start", error))?;
    let count = result::device::get_count().map_err(|error| told("counting devices", error))?;
    let one = |ordinal: i32| {
        let device = result::device::get(ordinal)?;
        let name = result::device::get_name(device)?;
        let uuid = result::device::get_uuid(device)?;
        let hex: Vec<String> =
            uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
        let uuid = [0..4, 4..6, 6..8, 8..10, 10..16].map(|part| hex[part].concat()).join("-");
        Ok(Listed { ordinal: ordinal as usize, name, uuid: format!("GPU-{uuid}") })
    };
    (0..count).map(one).collect::<Result<_, _>>().map_err(|error| told("asking a device", error))
}

/// Takes `wanted` bytes of a device that has `all`, or less if others are faster, but `least`; and
/// how many that are. None if there are fewer.
///
/// # Errors
///
/// What the driver says, in words.
fn take(
    context: &CudaContext,
    way: Way,
    mut wanted: u64,
    least: u64,
    all: u64,
) -> Result<Option<(Taken, u64)>, String> {
    if way == Way::Pages {
        match Mapped::open(context, wanted, least, all) {
            Ok(None) => {}
            Ok(Some(pages)) => {
                let bytes = pages.count() * pages.page_bytes();
                return Ok(Some((Taken::Pages(pages), bytes)));
            }
            Err(error) => tracing::warn!(
                target: "vmem::fallback", error = %told("taking device memory as pages", error),
                "device memory is one block"
            ),
        }
    }
    while wanted >= least {
        let block = match way {
            Way::Separate => Ok(Taken::Separate),
            Way::Pages | Way::Block => {
                // SAFETY: the memory is plain bytes, and no byte is read before it is written.
                unsafe { result::malloc_sync(wanted as usize) }.map(Taken::Block)
            }
        };
        match block {
            Ok(taken) => return Ok(Some((taken, wanted))),
            // Others took some meanwhile, or it lies in pieces.
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                wanted = wanted / 8 * 7 / UNIT * UNIT;
            }
            Err(error) => return Err(told("allocating device memory", error)),
        }
    }
    Ok(None)
}

/// How the memory of a device is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// As pages, where the device has such a thing; else as one block.
    Pages,
    Block,
    /// An allocation for each object, for checkers of memory: they see where each one ends. Slow,
    /// for each waits for the device.
    Separate,
}

impl Way {
    /// What the environment says.
    pub(crate) fn wanted() -> Self {
        match std::env::var(ALLOCATIONS).as_deref() {
            Ok("separate") => Way::Separate,
            Ok("block") => Way::Block,
            _ => Way::Pages,
        }
    }
}

/// The memory that was taken.
#[derive(Debug)]
enum Taken {
    Pages(Mapped),
    /// Where it begins.
    Block(u64),
    /// Nothing before there are objects.
    Separate,
}

/// The context of the tier and the memory that it has. It is freed when the last of its streams has
/// ended.
#[derive(Debug)]
pub(crate) struct Card {
    context: Arc<Context>,
    memory: Taken,
    capacity: u64,
    events: Arc<EventPool>,
    /// For small copies, and for many at once; none where the driver has no such thing.
    pieces: Option<Pieces>,
    batches: Option<Batches>,
    switch_points: SwitchPoints,
    /// What the streams of users hold.
    streams: Arc<Streams>,
    siblings: OnceLock<Arc<Siblings>>,
}

impl Card {
    /// Takes memory on a device: its budget, or three quarters of what is free; less if others
    /// are faster. Called on a thread of ours, which it binds to the context.
    ///
    /// # Errors
    ///
    /// What the driver says, in words.
    pub(crate) fn open(
        ordinal: usize,
        budget: Budget,
        switch_points: SwitchPoints,
        lost: Lost,
        way: Way,
    ) -> Result<Arc<Self>, String> {
        let context =
            CudaContext::new(ordinal).map_err(|error| told("opening a context", error))?;
        // SAFETY: no slice of cudarc's is ever made in this context object, so nothing relies on it
        // to track the use of one. With it, the first stream would synchronise the whole context.
        unsafe { context.disable_event_tracking() };
        relax_capture().map_err(|error| told("exchanging the capture mode", error))?;
        let (free, all) =
            result::mem_get_info().map_err(|error| told("asking for memory", error))?;
        let three_quarters = || free as u64 / 4 * 3;
        let wanted = budget.resolve("vram_capacity", free as u64, three_quarters);
        let wanted = wanted.map_err(|error| error.to_string())?.min(free as u64) / UNIT * UNIT;
        let events = EventPool::new(context.clone());
        events.prepare();
        let asked = budget.bytes().or(budget.percent().map(|_| wanted));
        let least = CAPACITY_MIN.min(asked.unwrap_or(u64::MAX)) / UNIT * UNIT;
        let (memory, capacity) = take(&context, way, wanted, least.max(UNIT), all as u64)?
            .ok_or_else(|| format!("the device has {free} bytes free, which is too little"))?;
        Ok(Arc::new(Card {
            pieces: Pieces::load(&context),
            context: Arc::new(Context::new(context, lost)),
            memory,
            capacity,
            events,
            batches: Batches::find(),
            switch_points,
            streams: Arc::default(),
            siblings: OnceLock::new(),
        }))
    }

    /// Whether a stream belongs to this context.
    pub(crate) fn has(&self, stream: &CudaStream) -> bool {
        stream.context().cu_ctx() == self.context.cuda().cu_ctx()
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Where events come from.
    pub(crate) fn events(&self) -> &Arc<EventPool> {
        &self.events
    }

    /// Which device it is, as the driver counts them.
    #[cfg(feature = "dlpack")]
    pub(crate) fn ordinal(&self) -> usize {
        self.context.cuda().ordinal()
    }

    /// An allocation for one object; none if there is no memory.
    pub(crate) fn allocate(&self, len: usize) -> Option<u64> {
        // SAFETY: as for the block.
        self.context.visit(|| unsafe { result::malloc_sync(len) }).and_then(|address| address).ok()
    }

    /// Frees memory that `allocate` made and that is not used any more.
    pub(crate) fn free_one(&self, address: u64) {
        // SAFETY: its one caller is the end of the range that had it.
        let freed =
            self.context.visit(|| unsafe { result::free_sync(address) }).and_then(|freed| freed);
        if let Err(error) = freed {
            tracing::warn!(
                target: "vmem::gpu", error = %told("freeing device memory", error), "refused"
            );
        }
    }

    /// The first address of the memory; 0 where each object has an allocation of its own.
    pub(crate) fn base(&self) -> u64 {
        match &self.memory {
            Taken::Pages(pages) => pages.base(),
            Taken::Block(base) => *base,
            Taken::Separate => 0,
        }
    }

    /// The memory, where it is pages.
    pub(crate) fn pages(&self) -> Option<&Mapped> {
        match &self.memory {
            Taken::Pages(pages) => Some(pages),
            Taken::Block(_) | Taken::Separate => None,
        }
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The host memory that it shares with the other cards of its store, once it is known.
    pub(crate) fn siblings(&self) -> &OnceLock<Arc<Siblings>> {
        &self.siblings
    }

    /// The kernel for small copies, if there is one.
    pub(crate) fn pieces(&self) -> Option<&Pieces> {
        self.pieces.as_ref()
    }

    /// Counts calls on a stream of a user; none if it holds too many.
    pub(crate) fn try_queue(&self, stream: &CudaStream, calls: usize) -> Option<Queued> {
        self.streams.try_queue(stream, calls)
    }

    /// From when on copies go another way.
    pub(crate) fn switch_points(&self) -> SwitchPoints {
        self.switch_points
    }

    /// The driver's copies of many pieces in one call, if it has them.
    pub(crate) fn batches(&self) -> Option<Batches> {
        self.batches
    }
}

impl Drop for Card {
    /// With the last stream or the last lease; all copies have ended.
    fn drop(&mut self) {
        let pieces = self.pieces.take();
        let memory = std::mem::replace(&mut self.memory, Taken::Separate);
        let freed = self.context.visit(|| {
            let unloaded = pieces.map_or(Ok(()), Pieces::unload);
            let freed = match memory {
                Taken::Pages(pages) => pages.free(),
                // SAFETY: it was allocated once, is freed here alone, and no copy uses it any more;
                // the driver waits for kernels.
                Taken::Block(base) => unsafe { result::free_sync(base) },
                Taken::Separate => Ok(()),
            };
            freed.and(unloaded)
        });
        if let Err(error) = freed.and_then(|freed| freed)
            && !self.context.is_dead()
        {
            tracing::warn!(
                target: "vmem::gpu", error = %told("freeing device memory", error), "refused"
            );
        }
    }
}
