//! Object space as a device sees it: slabs that it registers one by one, as copies pass through
//! them.
//!
//! Invariant: while a [`Part`] with a use lives, the memory that it names stays registered. What is
//! not registered is copied by the detour of the driver: everything works without it, more slowly.
//! Called by backends of a device.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::arena::HostArena;

/// A device that can reach memory of the host directly. Called from whatever thread frees memory or
/// copies.
pub trait Registrar: fmt::Debug + Send + Sync {
    /// Makes this memory known to the device. It has physical memory, which stays until it was
    /// unregistered.
    ///
    /// # Errors
    ///
    /// The refusal of the driver: it is not known then.
    fn register(&self, address: usize, len: usize) -> io::Result<()>;

    /// Makes the device forget this memory, which no copy uses.
    ///
    /// # Errors
    ///
    /// The refusal of the driver: it may be known then, and is never given back.
    fn unregister(&self, address: usize, len: usize) -> io::Result<()>;
}

/// Object space, for a backend that registers memory with a device.
#[derive(Clone, Debug)]
pub struct ObjectSpace(Arc<HostArena>);

/// A part of a copy that crosses no registration.
#[derive(Debug)]
pub struct Part {
    /// Which bytes of the copy.
    pub range: Range<usize>,
    /// Whether the device reaches it directly.
    pub direct: bool,
    /// Kept until the copy has ended, which ever way it goes; none outside of object space.
    pub in_use: Option<InUse>,
}

/// Memory that a copy uses: it stays registered, if it is, until this is dropped.
#[derive(Debug)]
pub struct InUse {
    space: ObjectSpace,
    slabs: SmallVec<[u64; 1]>,
}

impl ObjectSpace {
    pub(crate) fn new(arena: Arc<HostArena>) -> Self {
        ObjectSpace(arena)
    }

    /// From now on slabs are registered by this device. Of several calls the first counts.
    pub fn serve(&self, registrar: Arc<dyn Registrar>) {
        let (thread, lots) = std::sync::mpsc::channel();
        let arena = Arc::downgrade(&self.0);
        // It ends with the arena, which owns the sender.
        let unregister = move || {
            for lot in lots {
                let Some(arena) = arena.upgrade() else { return };
                arena.pages().unregister_now(lot);
                arena.tell_if_settled();
            }
        };
        let started = std::thread::Builder::new().name("vmem-unregister".into()).spawn(unregister);
        match started {
            Ok(_) => self.0.pages().unregister_by(thread),
            Err(error) => {
                tracing::warn!(target: "vmem::host", %error, "memory is unregistered by its users");
            }
        }
        self.0.pages().serve(registrar);
    }

    /// Where it is; no other store has the same place as long as this lives.
    pub fn address(&self) -> usize {
        self.0.pages().mapping().at(0).as_ptr().addr()
    }

    /// The length of a slab, in bytes; 0 before `serve`.
    pub fn slab_bytes(&self) -> usize {
        self.0.pages().slab_bytes()
    }

    /// Bytes that are registered now.
    pub fn registered_bytes(&self) -> u64 {
        self.0.pages().registered_bytes()
    }

    /// As [`enter`](Self::enter) for several at once, each an address and a length, by one look
    /// that waits for nothing: those that a device reaches directly. `part` gets each part of them,
    /// with the number of its copy; the others it does not get.
    pub fn enter_registered(
        &self,
        all: &[(usize, usize)],
        mut part: impl FnMut(usize, Range<usize>),
    ) -> InUse {
        let inside: Vec<_> = all.iter().map(|&(at, len)| self.inside(at, len)).collect();
        let slabs = self.0.pages().enter_registered(&inside, |number, bytes| {
            let start = inside[number].start;
            part(number, bytes.start - start..bytes.end - start);
        });
        InUse { space: self.clone(), slabs: slabs.into() }
    }

    /// Where memory lies in object space; nothing of it if it does not.
    fn inside(&self, address: usize, len: usize) -> Range<usize> {
        let mapping = self.0.pages().mapping();
        let at = address.checked_sub(mapping.at(0).as_ptr().addr());
        match at.filter(|&at| at < mapping.len() && len <= mapping.len() - at) {
            Some(at) => at..at + len,
            None => 0..0,
        }
    }

    /// The parts of a copy from or to this memory, which is the caller's; one part if it is not in
    /// object space. Registers what was copied often enough: on a thread that may call the driver.
    pub fn enter(&self, address: usize, len: usize) -> Vec<Part> {
        let inside = self.inside(address, len);
        if inside.is_empty() {
            return vec![Part { range: 0..len, direct: false, in_use: None }];
        }
        let at = inside.start;
        let parts = self.0.pages().enter(inside);
        self.0.tell_if_settled();
        let covered: usize = parts.iter().map(|(bytes, ..)| bytes.len()).sum();
        assert!(covered == len, "the parts of a copy of {len} bytes have {covered}");
        parts
            .into_iter()
            .map(|(bytes, slab, direct)| Part {
                range: bytes.start - at..bytes.end - at,
                direct,
                in_use: slab.map(|slab| InUse { space: self.clone(), slabs: smallvec![slab] }),
            })
            .collect()
    }

    /// Has everything unregistered, by `unregister` rather than by the device's own way, for the
    /// device is going; all copies have ended. What it will not forget is never unmapped.
    pub fn retire(&self, unregister: &dyn Fn(usize, usize) -> bool) {
        if !self.0.pages().retire(unregister) {
            std::mem::forget(self.0.clone());
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.space.0.pages().leave(&self.slabs);
        self.space.0.tell_if_settled();
    }
}
