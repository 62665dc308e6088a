//! Prefetches of an order that repeats: the layers of a model, the passes over a set.
//!
//! Invariant: a plan holds no memory of a tier, and its task no store open; what it asks for are
//! prefetches, which stand behind all reads, of what comes next after the last object that was
//! used. One whose turn has come goes on by itself, since its user waits for it now. Called by
//! users; leases, gathers and promotions tell it what is used.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::place::Prefetch;
use super::{Result, VirtualMemory};
use crate::error::VirtualMemoryError;
use crate::handle::VMemHandle;
use crate::memory_tier::{MemoryTier, Position};
use crate::object::Shared;
use crate::plans::Order;
use crate::task::spawn_named;

/// Which objects are used in which order, again and again.
#[derive(Clone, Debug)]
pub struct PrefetchPlan {
    order: Vec<VMemHandle>,
    bytes_early: u64,
    to: MemoryTier,
}

impl PrefetchPlan {
    /// These objects, in this order, and then from the first on again. Of what comes next, as much
    /// is prefetched early as has `bytes_early` bytes, and at least one object. An object may come
    /// several times.
    pub fn cyclic(order: impl IntoIterator<Item = VMemHandle>, bytes_early: u64) -> Self {
        PrefetchPlan { order: order.into_iter().collect(), bytes_early, to: MemoryTier::Vram }
    }

    /// The tier that they are prefetched to. Default: the first device.
    pub fn to(mut self, tier: MemoryTier) -> Self {
        self.to = tier;
        self
    }
}

/// A plan that is carried out until this is dropped or the store is closed. Its objects are not
/// freed as long as it is carried out.
#[derive(Debug)]
#[must_use = "dropping it ends the plan"]
pub struct PlannedPrefetch {
    order: Arc<Order>,
    store: Weak<Shared>,
}

impl Drop for PlannedPrefetch {
    fn drop(&mut self) {
        if let Some(shared) = self.store.upgrade() {
            shared.plans.end(&self.order);
        }
    }
}

impl PlannedPrefetch {
    /// Says that an object is used now. A lease, a gather and a promotion to a device say so
    /// themselves; a read from host memory, which is to cost nothing, does not. An object that is
    /// not in the plan changes nothing.
    pub fn used(&self, handle: &VMemHandle) {
        self.order.used(handle.id());
    }
}

impl VirtualMemory {
    /// Prefetches objects whose order repeats, each time before its turn: what comes next after the
    /// last one that was used. It begins with the first ones.
    ///
    /// ```no_run
    /// use vmem::gpu::VramExt;
    /// use vmem::{PrefetchPlan, VMemHandle};
    ///
    /// # async fn run(
    /// #     vmem: vmem::VirtualMemory,
    /// #     layers: Vec<VMemHandle>,
    /// #     stream: std::sync::Arc<vmem::gpu::cudarc::driver::CudaStream>,
    /// # ) -> Result<(), vmem::VirtualMemoryError> {
    /// let plan = vmem.prefetch_plan(PrefetchPlan::cyclic(layers.clone(), 256 << 20))?;
    /// loop {
    ///     for layer in &layers {
    ///         let lease = vmem.device_on(layer, &stream).await?;
    ///         // ... launch the kernels of the layer ...
    ///     }
    /// #   break;
    /// }
    /// drop(plan);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// `InvalidConfig` for a plan of nothing, or to the last tier; `TierNotAvailable`;
    /// `ExceedsCapacity` for an object larger than host memory, where it is to come there;
    /// `HandleNotFound`; `Closed`.
    pub fn prefetch_plan(&self, plan: PrefetchPlan) -> Result<PlannedPrefetch> {
        let PrefetchPlan { order, bytes_early, to } = plan;
        self.check_open()?;
        self.shared.check_tier(to)?;
        let refused = |reason| Err(VirtualMemoryError::invalid_config("prefetch_plan", reason));
        if order.is_empty() {
            return refused("it has no objects");
        }
        if to.level().is_some_and(|level| !self.shared.evicts_from(level)) {
            return refused("nothing is promoted to the last tier");
        }
        for handle in &order {
            let object = self.check(handle)?;
            if to == MemoryTier::Host {
                self.shared.check_fits_host(object.len)?;
            }
        }
        let lens = order.iter().map(|handle| (handle.id(), handle.len() as u64));
        let follows = match to.position() {
            Position::Device(device) => Some(device),
            Position::Host | Position::Below(_) => None,
        };
        let follower = Arc::new(Order::new(lens, bytes_early));
        let store = Arc::downgrade(&self.shared);
        let running = run(store.clone(), order, follower.clone(), to);
        let task = spawn_named(&self.shared.runtime, "vmem-plan", running);
        self.shared.plans.add(follower.clone(), follows, task.abort_handle());
        let planned = PlannedPrefetch { order: follower, store };
        // A store that was closed meanwhile ended its plans before this one was there.
        self.check_open().map(|()| planned)
    }
}

/// Keeps the prefetches of a plan going. One that failed is asked for again at the next move.
async fn run(store: Weak<Shared>, handles: Vec<VMemHandle>, order: Arc<Order>, to: MemoryTier) {
    // By step, with the prefetch that is under way; none once that has ended well.
    let mut asked: BTreeMap<u64, Option<Prefetch>> = BTreeMap::new();
    let mut failed = BTreeSet::new();
    loop {
        let window = order.window();
        let coming = asked.split_off(&window.start);
        // Their turn has come, and somebody waits for them.
        std::mem::replace(&mut asked, coming).into_values().flatten().for_each(Prefetch::detach);
        for step in window {
            let Some(shared) = store.upgrade() else { return };
            asked.entry(step).or_insert_with(|| {
                let object = handles[order.place(step)].object().clone();
                Some(Prefetch::start(&shared, vec![object], to))
            });
        }
        let mut ends: FuturesUnordered<_> = asked
            .iter_mut()
            .filter_map(|(step, prefetch)| prefetch.as_mut().map(|running| (*step, running)))
            .map(async |(step, running)| (step, running.await))
            .collect();
        let ended = tokio::select! {
            biased;
            () = order.moved() => None,
            Some(ended) = ends.next() => Some(ended),
        };
        drop(ends);
        match ended {
            Some((step, Ok(()))) => drop(asked.insert(step, None)),
            Some((step, Err(error))) => {
                let handle = handles[order.place(step)].id();
                tracing::debug!(
                    target: "vmem::migration", handle, %error, "a planned prefetch failed"
                );
                asked.insert(step, None);
                failed.insert(step);
            }
            // It has moved.
            None => std::mem::take(&mut failed).iter().for_each(|step| drop(asked.remove(step))),
        }
    }
}
