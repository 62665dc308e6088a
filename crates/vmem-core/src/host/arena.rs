//! Object space: slots of memory within a hard budget.
//!
//! Invariant: a [`HostSlot`] is the only way to its bytes, and shares them with no other slot until
//! it is dropped. What live slots, the unused parts of their spans and pages kept for reuse take
//! is at most the capacity, always. Objects of up to 32 KiB share spans of their size class; larger
//! ones have whole pages: [`HostArena::footprint`] is that rounding. Called by the queue for
//! space.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::classes::{CLASSES, SMALL_MAX, class_of, slot_bytes, slot_bytes_of, span_pages};
use super::mapping::PAGE_BYTES;
use super::pages::Pages;
use super::spans::{Spans, Sparse};

/// A slot that is not in a span: it has pages of its own.
const OWN_PAGES: u32 = u32::MAX;
/// A slot without bytes.
const NO_BYTES: u32 = u32::MAX - 1;
/// Spans of other objects that were looked at and cannot be emptied, for each class, before the
/// search for a sparse one gives up.
const SPARSE_TRIES: usize = 8;

/// What is called after a slot was freed.
type FreedHook = Box<dyn Fn() + Send + Sync>;

/// See the module's documentation.
pub(crate) struct HostArena {
    pages: Pages,
    spans: [Spans; CLASSES],
    used_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    freed: OnceLock<FreedHook>,
}

/// Why there is no slot now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoSlot {
    /// By its footprint it would fit: the space lies in spans of other objects.
    pub(crate) scattered: bool,
}

impl HostArena {
    /// Object space of `capacity_bytes`, rounded down to pages.
    ///
    /// # Errors
    ///
    /// If the system refuses the address space.
    pub(crate) fn new(capacity_bytes: u64) -> io::Result<Arc<Self>> {
        Ok(Arc::new(HostArena {
            pages: Pages::new(capacity_bytes / PAGE_BYTES as u64)?,
            spans: std::array::from_fn(Spans::new),
            used_bytes: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            freed: OnceLock::new(),
        }))
    }

    /// Sets what is called, on whatever thread, after a slot was freed. Once.
    pub(crate) fn set_freed_hook(&self, hook: FreedHook) {
        let unset = self.freed.set(hook).is_ok();
        assert!(unset, "the hook is set once");
    }

    /// What an object of `len` bytes takes, in bytes, rounding included.
    #[inline]
    pub(crate) fn footprint(len: usize) -> u64 {
        match len {
            0 => 0,
            1..=SMALL_MAX => slot_bytes_of(len) as u64,
            _ => (len as u64).div_ceil(PAGE_BYTES as u64).saturating_mul(PAGE_BYTES as u64),
        }
    }

    /// Memory of `len` bytes for the object `owner`, with whatever was in it before.
    ///
    /// # Errors
    ///
    /// [`NoSlot`], at once.
    pub(crate) fn try_alloc(self: &Arc<Self>, len: usize, owner: u64) -> Result<HostSlot, NoSlot> {
        let slot = self.alloc(len, owner);
        self.tell_if_settled();
        slot
    }

    fn alloc(self: &Arc<Self>, len: usize, owner: u64) -> Result<HostSlot, NoSlot> {
        let (at, span, slot) = match len {
            0 => (0, NO_BYTES, 0),
            1..=SMALL_MAX => {
                let place = self.spans[class_of(len)].take(&self.pages, owner);
                let place = place.ok_or_else(|| self.no_slot(len))?;
                (place.at, place.span, place.slot)
            }
            _ => {
                let pages = Self::footprint(len) / PAGE_BYTES as u64;
                let run = self.pages.take(pages).ok_or_else(|| self.no_slot(len))?;
                (run.start as usize * PAGE_BYTES, OWN_PAGES, 0)
            }
        };
        Ok(self.charged(len, at, span, slot))
    }

    /// The slot that was taken at this byte, charged to the budget.
    pub(super) fn charged(
        self: &Arc<Self>,
        len: usize,
        at: usize,
        span: u32,
        slot: u32,
    ) -> HostSlot {
        let footprint = Self::footprint(len);
        let used = self.used_bytes.fetch_add(footprint, Ordering::SeqCst) + footprint;
        assert!(used <= self.capacity_bytes(), "{used} of {} bytes", self.capacity_bytes());
        self.peak_bytes.fetch_max(used, Ordering::Relaxed);
        let start = self.pages.mapping().at(at);
        HostSlot { arena: self.clone(), start, len, span, slot }
    }

    pub(super) fn spans(&self, class: usize) -> &Spans {
        &self.spans[class]
    }

    fn no_slot(&self, len: usize) -> NoSlot {
        let after = self.used_bytes().saturating_add(Self::footprint(len));
        NoSlot { scattered: after <= self.capacity_bytes() }
    }

    /// Footprint of all live slots, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::SeqCst)
    }

    /// The largest that `used_bytes` ever was.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that a device reaches directly.
    pub(crate) fn registered_bytes(&self) -> u64 {
        self.pages.registered_bytes()
    }

    /// The budget, in bytes.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.pages.capacity() * PAGE_BYTES as u64
    }

    /// The longest object, in bytes, that would get a slot now.
    pub(crate) fn largest_free_bytes(&self) -> u64 {
        let pages = self.pages.free_in_one_run();
        let run = pages * PAGE_BYTES as u64;
        if run > SMALL_MAX as u64 {
            return run;
        }
        let fits =
            |class: &usize| span_pages(*class) <= pages || self.spans[*class].has_free_slot();
        (0..CLASSES).rev().find(fits).map_or(0, |class| slot_bytes(class) as u64)
    }

    /// A span that is worth emptying: it gives many pages for few live bytes, and none of its
    /// owners is one to `skip`. `skip` is called with no lock held.
    pub(crate) fn sparsest_span(&self, skip: &dyn Fn(u64) -> bool) -> Option<SparseSpan> {
        let per_class = self.spans.iter().enumerate().filter_map(|(class, spans)| {
            let mut fixed = Vec::new();
            for _ in 0..SPARSE_TRIES {
                let sparse = spans.sparsest(&fixed)?;
                if !sparse.owners.iter().any(|&owner| skip(owner)) {
                    return Some((class, sparse));
                }
                fixed.push(sparse.owners);
            }
            None
        });
        let (class, Sparse { span, owners, .. }) =
            per_class.min_by_key(|(_, sparse)| sparse.live_bytes / sparse.pages)?;
        Some(SparseSpan { class, span, owners })
    }

    fn free(&self, slot: &HostSlot) {
        self.take_back(slot);
        if slot.span != NO_BYTES {
            self.tell_freed();
        }
    }

    fn take_back(&self, slot: &HostSlot) {
        let footprint = slot.footprint();
        let before = self.used_bytes.fetch_sub(footprint, Ordering::SeqCst);
        assert!(before >= footprint, "the ledger never falls below zero");
        match slot.span {
            NO_BYTES => {}
            OWN_PAGES => {
                let base = self.pages.mapping().at(0).as_ptr() as usize;
                let page = ((slot.start.as_ptr() as usize - base) / PAGE_BYTES) as u64;
                self.pages.put(page..page + footprint / PAGE_BYTES as u64);
            }
            span => self.spans[class_of(slot.len)].put(&self.pages, span, slot.slot),
        }
    }

    /// A request that found no space may find some now: slabs or their copies have ended.
    pub(super) fn tell_if_settled(&self) {
        if self.pages.has_settled() {
            self.tell_freed();
        }
    }

    /// Something may have become free.
    pub(super) fn tell_freed(&self) {
        if let Some(freed) = self.freed.get() {
            freed();
        }
    }

    pub(super) fn pages(&self) -> &Pages {
        &self.pages
    }
}

impl fmt::Debug for HostArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostArena")
            .field("used_bytes", &self.used_bytes())
            .field("capacity_bytes", &self.capacity_bytes())
            .finish_non_exhaustive()
    }
}

/// Exclusive memory in object space; dropping it frees it.
pub(crate) struct HostSlot {
    arena: Arc<HostArena>,
    start: NonNull<u8>,
    len: usize,
    span: u32,
    slot: u32,
}

// SAFETY: a slot is exclusive memory, tied to no thread.
unsafe impl Send for HostSlot {}
// SAFETY: a shared reference gives read access only.
unsafe impl Sync for HostSlot {}

impl HostSlot {
    /// Space taken, in bytes.
    pub(crate) fn footprint(&self) -> u64 {
        HostArena::footprint(self.len)
    }

    /// Gives back a slot that was taken on trial, without calling the hook.
    pub(crate) fn put_back(self) {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so the reference is moved out exactly once.
        let arena = unsafe { ptr::read(&this.arena) };
        arena.take_back(&this);
    }

    /// Whether it is in this span of a class.
    pub(super) fn is_in(&self, class: usize, span: u32) -> bool {
        let is_small = (1..=SMALL_MAX).contains(&self.len);
        is_small && class_of(self.len) == class && self.span == span
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the slot owns these bytes of a mapping, which are initialised (`mapping.rs`) and
        // live as long as the arena that it holds.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A span with few live slots.
#[derive(Debug)]
pub(crate) struct SparseSpan {
    class: usize,
    span: u32,
    /// Of its live slots; an owner may have its current slot elsewhere, while a reader keeps an old
    /// one here.
    pub(crate) owners: Vec<u64>,
}

impl SparseSpan {
    /// Whether this slot is in the span.
    pub(crate) fn holds(&self, slot: &HostSlot) -> bool {
        slot.is_in(self.class, self.span)
    }
}

impl Drop for HostSlot {
    fn drop(&mut self) {
        self.arena.free(self);
    }
}

impl fmt::Debug for HostSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostSlot").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
