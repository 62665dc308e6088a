//! The store as its users see it.
//!
//! Invariant: between polls a method holds locks and gates only through guards that its future
//! owns; so dropping the future gives everything back. Each method checks, in this order: closed, a
//! handle of ours, alive, its arguments.

mod access;
mod change;
mod entries;
mod figures;
mod gathered;
mod into;
mod lease;
mod lease_request;
mod lease_set;
mod listing;
mod miss;
mod named;
mod pin;
mod place;
mod plan;
#[cfg(feature = "metrics")]
mod publish;
mod read;
mod reader;
mod residency;
mod resize;
mod scratch;
mod timed;
mod write;
mod writer;

use std::io;
use std::sync::Arc;

use tokio::sync::watch;

pub use access::DeviceAccess;
pub use entries::{ListOptions, Listed, NamedEntry, PutMode, PutOptions};
pub use gathered::GatherCount;
pub use lease::{VramChange, VramHold, VramSet, VramShare};
pub use pin::PinGuard;
pub use place::Prefetch;
pub use plan::{PlannedPrefetch, PrefetchPlan};
pub use reader::ObjectReader;
pub use residency::Residency;
pub use scratch::VramScratch;
pub use writer::ObjectWriter;

use crate::actor::{self, Outcome};
use crate::capabilities::Capabilities;
use crate::chunk::{chunk_count, chunk_lens};
use crate::config::{Effective, VirtualMemoryConfig};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::host::{HostArena, ObjectSpace, StagingMemory};
use crate::memory_tier::MemoryTier;
use crate::names::Names;
use crate::object::{Backends, ExtentMap, Limits, Object, Shared};
use crate::requests;
use crate::runtime;
use crate::storage::Extent;
use crate::tier::{Class, Need, Refused, Space, Storage};

type Result<T> = std::result::Result<T, VirtualMemoryError>;

/// Why the gate of a new object is open.
const NEW: &str = "invariant: an object has no other user before it is announced";

/// The longest object, in bytes, however large the tiers are: 1 TiB. Its disk map then takes about
/// 2 GiB of memory; without a bound a length alone could take all memory.
pub const OBJECT_LEN_MAX: u64 = 1 << 40;

/// An open store over its tiers. Cheap to clone; dropping the last clone ends it, but only
/// [`close`](Self::close) reports errors of that.
#[derive(Clone, Debug)]
pub struct VirtualMemory {
    shared: Arc<Shared>,
    names: Arc<Names>,
    lifetime: Arc<Lifetime>,
}

/// What the clones of a store share beyond its state.
#[derive(Debug)]
struct Lifetime {
    shared: Arc<Shared>,
    config: VirtualMemoryConfig,
    capabilities: Capabilities,
    outcome: watch::Receiver<Outcome>,
}

impl Drop for Lifetime {
    fn drop(&mut self) {
        if self.shared.set_closed() {
            self.shared.storage().iter().for_each(|storage| storage.backend.leave());
        }
    }
}

impl VirtualMemory {
    /// Opens a store over these backends, on the current tokio runtime. Most users call
    /// `vmem::open`, which brings the backends of this machine.
    ///
    /// # Errors
    ///
    /// `UnsuitableRuntime` outside of a tokio runtime, and in one without a timer; `InvalidConfig`
    /// if the parts of the configuration do not fit each other here; `Io` if the address space for
    /// host memory is refused.
    pub fn with_backends(config: &VirtualMemoryConfig, backends: Backends) -> Result<Self> {
        runtime::check_runtime()?;
        let limits = Limits::of(config, backends.host_capacity_bytes)?;
        let (requests, inbox) = requests::channels();
        let mut capabilities = backends.capabilities.clone();
        let no_device = capabilities.vram_reason.clone();
        let catalog = backends.catalog.clone();
        let shared = Shared::new(config, limits, backends, requests, no_device)?;
        let names = Names::start(&shared, catalog);
        for device in shared.devices() {
            capabilities.devices.push(device.backend.describe());
            let space = ObjectSpace::new(shared.host.space().arena.clone());
            device.backend.register_space(space);
            let staging = StagingMemory::new(shared.staging.clone());
            if let Err(error) = device.backend.register(staging) {
                capabilities.vram_reason = format!("staging is not registered: {error}").into();
            }
        }
        capabilities.vram = capabilities.devices.first().cloned();
        let remote = shared.storage_of(MemoryTier::Remote);
        capabilities.remote = remote.map(|remote| remote.backend.describe());
        match shared.storage()[0].backend.register(StagingMemory::new(shared.staging.clone())) {
            Ok(()) => capabilities.staging_registered = true,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(error) => {
                tracing::warn!(
                    target: "vmem::fallback", %error, "staging memory is not registered"
                );
                capabilities.disk_notes.push(format!("registered memory: {error}").into());
            }
        }
        let outcome = actor::start(names.clone(), inbox);
        let vram = shared.devices().iter().map(|device| device.backend.usage().capacity_bytes);
        let config = config.effective(Effective {
            host_bytes: shared.limits.host_capacity,
            staging_bytes: shared.limits.staging_capacity,
            stream_bytes: shared.limits.stream_capacity,
            disk_bytes: shared.storage()[0].backend.usage().capacity_bytes,
            vram_bytes: vram.collect(),
            driver: capabilities.disk_driver,
        });
        let lifetime = Lifetime { shared: shared.clone(), config, capabilities, outcome };
        Ok(VirtualMemory { shared, names, lifetime: Arc::new(lifetime) })
    }

    /// Takes space for an object of `len` bytes in its home tier, or below it under pressure. The
    /// object reads as zeros. Zero bytes are allowed; [`OBJECT_LEN_MAX`] is the most.
    ///
    /// # Errors
    ///
    /// `TierNotAvailable` for a tier that the store has not, `ExceedsCapacity` if no tier could
    /// ever hold it, `TierFull` if there is no space and eviction can make none, `Closed`.
    pub async fn allocate(&self, len: usize, home: MemoryTier) -> Result<VMemHandle> {
        self.check_open()?;
        self.shared.check_tier(home)?;
        self.check_fits_somewhere(len, home)?;
        let handle = VMemHandle::adopt(self.shared.create(len, home));
        if len > 0 {
            self.take_home_space(handle.object(), home).await?;
            self.take_device_space(handle.object()).await?;
        } else {
            self.shared.announce(handle.object());
        }
        Ok(handle)
    }

    /// [`allocate`](Self::allocate) and [`write`](Self::write) in one.
    ///
    /// # Errors
    ///
    /// Those of both; after an error there is no object.
    pub async fn put(&self, data: impl AsRef<[u8]> + Send, home: MemoryTier) -> Result<VMemHandle> {
        let handle = self.allocate(data.as_ref().len(), home).await?;
        self.write(&handle, data).await?;
        Ok(handle)
    }

    /// Frees the object: its other handles get `HandleNotFound` from now on. `Bytes` that were read
    /// stay valid. If the object has a name only this handle is dropped.
    ///
    /// # Errors
    ///
    /// `HandleNotFound` if it was freed before, or belongs to another store; `Closed`.
    pub async fn free(&self, handle: VMemHandle) -> Result<()> {
        let object = self.check(&handle)?;
        if object.has_name() {
            return Ok(());
        }
        if object.free() { Ok(()) } else { Err(object.not_found()) }
    }

    /// Another handle of the object with this number, if it is in memory. A named object may leave
    /// memory once its last handle was dropped; [`open_named`](Self::open_named) finds it again.
    pub fn handle(&self, id: u64) -> Option<VMemHandle> {
        let object = self.shared.find(id)?;
        object.try_add_handle().then(|| VMemHandle::adopt(object))
    }

    /// Ends the store: fails new and waiting calls, waits for operations in flight, makes the named
    /// objects durable, and releases the files and the directory's lock. `Bytes` stay valid.
    ///
    /// # Errors
    ///
    /// `NotFlushed` with the names of objects that were not made durable; those of closing the
    /// backends; `Closed` if it was closed before.
    pub async fn close(self) -> Result<()> {
        let first = self.shared.set_closed();
        let mut outcome = self.lifetime.outcome.clone();
        // Closed by another clone, or the runtime of the actor is gone: nothing runs any more.
        let ended = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        match ended {
            Ok(Some(outcome)) if first => outcome,
            Ok(_) | Err(_) => Err(VirtualMemoryError::Closed),
        }
    }

    // ---- Checks ------------------------------------------------------------------------------

    fn check_open(&self) -> Result<()> {
        if self.shared.is_closed() { Err(VirtualMemoryError::Closed) } else { Ok(()) }
    }

    /// The object of a handle of ours.
    fn check<'a>(&self, handle: &'a VMemHandle) -> Result<&'a Arc<Object>> {
        self.check_open()?;
        let object = handle.object();
        if !handle.belongs_to(&self.shared) || object.is_dead() {
            return Err(object.not_found());
        }
        Ok(object)
    }

    fn check_fits_somewhere(&self, len: usize, home: MemoryTier) -> Result<()> {
        let home_level = home.level();
        let in_host = if home_level.is_none() { self.shared.host_capacity_bytes() } else { 0 };
        let in_host = in_host.min(OBJECT_LEN_MAX);
        let storage = &self.shared.storage()[home_level.unwrap_or(0)..];
        let capacity = |one: &Storage| one.state.space().capacity_bytes().min(OBJECT_LEN_MAX);
        let below = storage.iter().map(|one| (one.tier(), capacity(one)));
        let fits_host = HostArena::footprint(len) <= in_host;
        if fits_host || below.clone().any(|(_, capacity_bytes)| len as u64 <= capacity_bytes) {
            return Ok(());
        }
        let (tier, capacity_bytes) = std::iter::once((MemoryTier::Host, in_host))
            .chain(below)
            .max_by_key(|&(_, capacity_bytes)| capacity_bytes)
            .unwrap_or((home, 0));
        let requested_bytes = len as u64;
        Err(VirtualMemoryError::ExceedsCapacity { tier, requested_bytes, capacity_bytes })
    }

    // ---- Space ----------------------------------------------------------------------------------

    /// Takes device memory for a new object that lives there, if some is free or objects that are
    /// not in use can be evicted for it.
    async fn take_device_space(&self, object: &Arc<Object>) -> Result<()> {
        let Some(number) = object.home.device() else { return Ok(()) };
        let deadline = self.shared.deadline();
        let state = &self.shared.device(number)?.state;
        let need = Need::one(object.len, object.id, Class::Demand).or_spill();
        if state.check_fits(state.queue.footprint(&need)).is_err() {
            return Ok(());
        }
        let Ok(mut space) = state.queue.take(&need, &deadline).await else { return Ok(()) };
        // A caller that found the object by its number may have been faster, or be changing it.
        if let Some(pass) = object.gate_if_open()?
            && !object.has_space_on(number)
            && let Some(space) = space.pop()
        {
            object.set_space_on(&pass, number, space, false);
        }
        Ok(())
    }

    /// Takes the footprint of a new object, in its home tier or below it.
    async fn take_home_space(&self, object: &Arc<Object>, home: MemoryTier) -> Result<()> {
        if home.level().is_none() && self.shared.fits_host(object.len) {
            let need = Need::one(object.len, object.id, Class::Demand).or_spill();
            match self.shared.host_space(&need, &self.shared.deadline()).await {
                Ok(space) => {
                    let pass = object.try_gate().expect(NEW);
                    // With the gate held, so that a caller that finds it now changes it after this.
                    self.shared.announce(object);
                    object.set_spare(&pass, space);
                    return Ok(());
                }
                Err(Refused::Error(error @ VirtualMemoryError::Closed)) => return Err(error),
                // All is held or pinned, or there is no space to evict to: the tier below may still
                // have some.
                Err(_) => {}
            }
        }
        let lens = chunk_lens(object.len, 0..chunk_count(object.len));
        let deadline = self.shared.deadline();
        let reserved = self.shared.reserve_soon(object.home_level(), &lens, &deadline).await;
        let extents = reserved.map_err(|error| self.shared.tier_error(object.id, error))?;
        self.announce_on_disk(object, extents);
        Ok(())
    }

    /// Lets others find a new object that has these extents.
    fn announce_on_disk(&self, object: &Arc<Object>, extents: Vec<Extent>) {
        let pass = object.try_gate().expect(NEW);
        self.shared.announce(object);
        object.with_extents(&pass, |map, _| *map = ExtentMap::of(extents));
    }
}
