//! Memory of the host that the device reaches directly.
//!
//! Invariant: what is registered stays mapped, with all its pages, until it was unregistered; and
//! while a copy uses a slab, that stays registered. Called by the lanes and by gathers.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};

use cudarc::driver::{DriverError, sys};
use vmem_core::backend::{InUse, ObjectSpace, Part, Registrar};

use crate::card::{Card, told};
use crate::siblings;

impl Card {
    /// Registers slabs of this memory from now on, as copies pass through them.
    pub(crate) fn serve(self: &Arc<Self>, space: ObjectSpace) {
        if self.space().set(space.clone()).is_ok() {
            space.serve(Arc::new(Slabs(Arc::downgrade(self), self.store().clone())));
        }
    }

    /// Begins copies of those that the device reaches directly, by one look. `part` gets each part
    /// of them, with the number of its copy.
    pub(crate) fn enter_reached<'a>(
        &self,
        memory: impl Iterator<Item = &'a [u8]>,
        part: impl FnMut(usize, Range<usize>),
    ) -> Option<InUse> {
        let places: Vec<_> = memory.map(|one| (one.as_ptr().addr(), one.len())).collect();
        self.space().get().map(|space| space.enter_registered(&places, part))
    }

    /// Memory of the host by what the device reaches directly. On a thread that is bound.
    pub(crate) fn parts(&self, memory: &[u8]) -> Vec<Part> {
        if self.is_staging(memory) {
            return vec![Part { range: 0..memory.len(), direct: true, in_use: None }];
        }
        match self.space().get().filter(|_| !vmem_core::planted!("copy-across-slabs")) {
            Some(space) => space.enter(memory.as_ptr().addr(), memory.len()),
            None => vec![Part { range: 0..memory.len(), direct: false, in_use: None }],
        }
    }

    /// Whether memory is part of staging, which is registered in one piece.
    fn is_staging(&self, memory: &[u8]) -> bool {
        let staging = self.staging().lock();
        let start = memory.as_ptr().addr();
        staging.as_ref().is_some_and(|staging| {
            let end = staging.address() + staging.len();
            (staging.address()..end).contains(&start) && memory.len() <= end - start
        })
    }
}

/// What registers slabs of object space: the first card of the store, or, once that is lost or has
/// gone, another one. It keeps no card alive: the last one has everything unregistered when it
/// goes.
#[derive(Debug)]
struct Slabs(Weak<Card>, Arc<OnceLock<usize>>);

impl Slabs {
    /// Works in the first context that lives. None if there is none.
    fn visit(&self, work: impl Fn() -> Result<(), DriverError>) -> Option<Result<(), DriverError>> {
        let first = self.0.upgrade().filter(|card| card.lost().is_none());
        let others = || {
            let store = self.1.get().filter(|_| !vmem_core::planted!("gpu-siblings"));
            store.map(|&store| siblings::living(store)).unwrap_or_default()
        };
        for card in first.into_iter().chain(others()) {
            match card.visit(&work).and_then(|done| done) {
                // A dead context takes no more part, whatever it says.
                Err(_) if card.is_dead() => {}
                done => return Some(done),
            }
        }
        None
    }
}

impl Registrar for Slabs {
    fn register(&self, address: usize, len: usize) -> io::Result<()> {
        let registered = self.visit(|| pin(address, len)).ok_or(io::ErrorKind::NotConnected)?;
        registered.map_err(|error| io::Error::other(told("registering memory", error)))
    }

    fn unregister(&self, address: usize, _len: usize) -> io::Result<()> {
        match self.visit(|| unpin(address)) {
            Some(Err(error)) => Err(io::Error::other(told("unregistering memory", error))),
            Some(Ok(())) => Ok(()),
            // All that knew it are dead.
            None if self.0.upgrade().is_some() => Ok(()),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// Has the device know memory of the host that stays mapped, with all its pages, until `unpin`.
pub(crate) fn pin(address: usize, len: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the callers have staging, which stays as it is while it lives, and slabs of object
    // space, of which no page is given back before `unpin`.
    unsafe { sys::cuMemHostRegister_v2(address, len, sys::CU_MEMHOSTREGISTER_PORTABLE) }.result()
}

/// Has the device forget memory that no copy uses.
pub(crate) fn unpin(address: usize) -> Result<(), DriverError> {
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: it was registered, and no copy uses it any more: that is counted.
    match unsafe { sys::cuMemHostUnregister(address) }.result() {
        // Another thread was quicker.
        Err(DriverError(sys::CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)) => Ok(()),
        unregistered => unregistered,
    }
}
