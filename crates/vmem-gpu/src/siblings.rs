//! Host memory that the cards of one store reach directly, whichever of them had it registered.
//!
//! Invariant: what is registered stays mapped, with all its pages, until it was unregistered. It is
//! registered once, in a context that stays until the last of the cards has gone, and unregistered
//! in one that lives, as long as there is one. The cards own it together: so what is registered
//! when the last one goes, after its copies, is unregistered then. Called by `tier` and `reach`.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock, Weak};

use cudarc::driver::{DriverError, sys};
use parking_lot::Mutex;
use vmem_core::backend::{ObjectSpace, Registrar, StagingMemory};

use crate::card::told;
use crate::context::Context;

/// Those of each store, by where its object space is.
static STORES: Mutex<BTreeMap<usize, Weak<Siblings>>> = Mutex::new(BTreeMap::new());

/// What the cards of one store share.
#[derive(Debug)]
pub(crate) struct Siblings {
    space: ObjectSpace,
    /// Once it is registered.
    staging: OnceLock<StagingMemory>,
    contexts: Mutex<Vec<Arc<Context>>>,
}

impl Siblings {
    /// Those of the store with this object space, which a card joins. From the first one on, slabs
    /// are registered as copies pass through them.
    pub(crate) fn join(space: ObjectSpace, context: &Arc<Context>) -> Arc<Self> {
        let mut stores = STORES.lock();
        stores.retain(|_, siblings| siblings.strong_count() > 0);
        let known = stores.get(&space.address()).and_then(Weak::upgrade);
        let siblings =
            known.filter(|_| !vmem_core::planted!("gpu-siblings")).unwrap_or_else(|| {
                let contexts = Mutex::default();
                let first = Arc::new(Siblings { space, staging: OnceLock::new(), contexts });
                stores.insert(first.space.address(), Arc::downgrade(&first));
                first.space.serve(Arc::new(Slabs(Arc::downgrade(&first))));
                first
            });
        siblings.contexts.lock().push(context.clone());
        siblings
    }

    /// Has the devices reach staging directly, unless they do. On a thread that is bound.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(crate) fn register(&self, memory: StagingMemory) -> Result<(), DriverError> {
        let _one_at_a_time = self.contexts.lock();
        if self.staging.get().is_none() {
            pin(memory.address(), memory.len())?;
            let _ = self.staging.set(memory);
        }
        Ok(())
    }

    /// Object space, some slabs of which are registered.
    pub(crate) fn space(&self) -> &ObjectSpace {
        &self.space
    }

    /// Whether memory is part of staging, which is registered in one piece.
    pub(crate) fn is_staging(&self, memory: &[u8]) -> bool {
        self.staging.get().is_some_and(|staging| {
            let at = memory.as_ptr().addr().checked_sub(staging.address());
            at.is_some_and(|at| at < staging.len() && memory.len() <= staging.len() - at)
        })
    }

    /// Works in the first context that lives. None if there is none.
    fn visit(&self, work: impl Fn() -> Result<(), DriverError>) -> Option<Result<(), DriverError>> {
        let contexts = self.contexts.lock().clone();
        for context in contexts.iter().filter(|context| context.lost().is_none()) {
            match context.visit(&work).and_then(|done| done) {
                // A dead context takes no more part, whatever it says.
                Err(_) if context.is_dead() => {}
                done => return Some(done),
            }
        }
        None
    }

    /// Has the driver forget memory that no copy uses.
    ///
    /// # Errors
    ///
    /// What it says: a context that lives may know it still.
    fn forget(&self, address: usize) -> Result<(), DriverError> {
        self.visit(|| unpin(address)).unwrap_or(Ok(()))
    }
}

impl Drop for Siblings {
    /// With the last card; all copies have ended.
    fn drop(&mut self) {
        if let Some(memory) = self.staging.take()
            && let Err(error) = self.forget(memory.address())
        {
            let error = told("unregistering staging memory", error);
            tracing::warn!(target: "vmem::gpu", %error, "it is never unmapped");
            std::mem::forget(memory);
        }
        self.space.retire(&|address, _| self.forget(address).is_ok());
    }
}

/// What registers slabs of object space. It keeps no card: the last one has everything unregistered
/// when it goes.
#[derive(Debug)]
struct Slabs(Weak<Siblings>);

impl Slabs {
    fn siblings(&self) -> io::Result<Arc<Siblings>> {
        self.0.upgrade().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Registrar for Slabs {
    fn register(&self, address: usize, len: usize) -> io::Result<()> {
        let registered = self.siblings()?.visit(|| pin(address, len));
        let registered = registered.ok_or(io::ErrorKind::NotConnected)?;
        registered.map_err(|error| io::Error::other(told("registering memory", error)))
    }

    fn unregister(&self, address: usize, _len: usize) -> io::Result<()> {
        let forgotten = self.siblings()?.forget(address);
        forgotten.map_err(|error| io::Error::other(told("unregistering memory", error)))
    }
}

/// Has the devices know memory of the host that stays mapped, with all its pages, until `unpin`.
fn pin(address: usize, len: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the callers have staging, which stays as it is while it lives, and slabs of object
    // space, of which no page is given back before `unpin`.
    unsafe { sys::cuMemHostRegister_v2(address, len, sys::CU_MEMHOSTREGISTER_PORTABLE) }.result()
}

/// Has the devices forget memory that no copy uses.
fn unpin(address: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: it was registered, and no copy uses it any more: that is counted.
    match unsafe { sys::cuMemHostUnregister(address) }.result() {
        // Another thread was quicker, or its context has gone.
        Err(DriverError(sys::CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)) => Ok(()),
        unregistered => unregistered,
    }
}
