//! Host copies: the bytes of one version of one object in object space, shared with readers.
//!
//! A [`HostCopy`] is a descriptor: a state word and the slot that holds the bytes. Descriptors are
//! *type-stable*: their memory is reused for other copies but never given back while the pool
//! lives. So a reader may follow the object's pointer, take a reader count and only then check
//! that the pointer still names the same descriptor ([`CopyCell::acquire`]); if not, it gives
//! the count back and looks again. No lock, no epoch, no shared counter.
//!
//! Invariant: the slot of a descriptor is touched mutably only by the one owner of a word
//! without readers (`word.rs`); a [`ReadGuard`] is one reader count. The guard also holds an
//! [`Anchor`], which keeps the pool (hence the descriptor) alive and is one of several, so that
//! readers on different threads do not meet on one counter.
//!
//! Called by objects, which own at most one current copy each, and by the migrations.

#![allow(unsafe_code)]

mod pool;
mod word;

/// The atomics of the word; a model checker brings its own.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

use std::cell::UnsafeCell;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use bytes::Bytes;

use crate::host::HostSlot;

pub(crate) use pool::Copies;
use pool::{Anchor, CopyPool};
use word::{Acquire, CopyWord, Detach, Release};

/// A descriptor: see the module's documentation.
pub(crate) struct HostCopy {
    word: CopyWord,
    slot: UnsafeCell<Option<HostSlot>>,
}

// SAFETY: the slot is `Send + Sync`; the word decides which thread may touch it, and how (see
// above).
unsafe impl Sync for HostCopy {}
// SAFETY: as above; nothing in a descriptor is tied to a thread.
unsafe impl Send for HostCopy {}

impl HostCopy {
    fn unused() -> Self {
        HostCopy { word: CopyWord::new(), slot: UnsafeCell::new(None) }
    }

    /// # Safety
    ///
    /// The caller holds a reader count, or owns the copy.
    unsafe fn slot(&self) -> &HostSlot {
        // SAFETY: no thread holds the slot mutably while there is a reader or another owner.
        let slot = unsafe { &*self.slot.get() };
        slot.as_ref().expect("invariant: a copy in use has its slot")
    }
}

/// A copy with one owner: filled before it is published, or taken back after the last reader.
/// Dropping it gives memory and descriptor back.
pub(crate) struct OwnedCopy {
    copy: NonNull<HostCopy>,
    pool: Arc<CopyPool>,
}

// SAFETY: an owned copy is exclusive, and a slot may move between threads.
unsafe impl Send for OwnedCopy {}
// SAFETY: a shared reference gives read access to the bytes only.
unsafe impl Sync for OwnedCopy {}

/// Follows the address of a descriptor.
///
/// # Safety
///
/// The descriptor's pool is alive for `'a`.
unsafe fn follow<'a>(copy: NonNull<HostCopy>) -> &'a HostCopy {
    // SAFETY: a pool keeps the memory of its descriptors while it lives, and a descriptor is never
    // borrowed mutably.
    unsafe { copy.as_ref() }
}

impl OwnedCopy {
    fn descriptor(&self) -> &HostCopy {
        // SAFETY: this holds the pool.
        unsafe { follow(self.copy) }
    }

    /// The place of the slot, exclusively.
    fn place(&mut self) -> &mut Option<HostSlot> {
        let place = self.descriptor().slot.get();
        // SAFETY: an owned copy has no reader and one owner, which `&mut self` makes exclusive.
        unsafe { &mut *place }
    }

    pub(crate) fn slot(&self) -> &HostSlot {
        // SAFETY: this is the owner.
        unsafe { self.descriptor().slot() }
    }

    /// Gives the slot a descriptor.
    pub(crate) fn new(copies: &Copies, slot: HostSlot) -> Self {
        let pool = copies.pool().clone();
        // A descriptor from the pool is in the unused state and this thread's alone.
        let mut owned = OwnedCopy { copy: pool.take(), pool };
        *owned.place() = Some(slot);
        owned
    }

    /// The bytes, exclusively.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        self.place().as_mut().expect("invariant: an owned copy has its slot").as_mut_slice()
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.slot().as_slice()
    }

    /// Space taken, in bytes.
    pub(crate) fn footprint(&self) -> u64 {
        self.slot().footprint()
    }

    /// The bytes as an old version with one reader: charged until that reader drops it, and never
    /// the current copy of an object.
    pub(crate) fn into_bytes(self, copies: &Copies) -> Bytes {
        let anchor = copies.anchor().clone();
        self.descriptor().word.publish_detached();
        let copy = self.into_raw();
        let guard = ReadGuard { copy, anchor };
        guard.anchor.add_held(guard.footprint());
        Bytes::from_owner(guard)
    }

    fn into_raw(self) -> NonNull<HostCopy> {
        let copy = self.copy;
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so the reference is moved out exactly once.
        drop(unsafe { ptr::read(&this.pool) });
        copy
    }
}

impl Drop for OwnedCopy {
    fn drop(&mut self) {
        // Afterwards the descriptor is unused.
        drop(self.place().take());
        self.pool.put(self.copy);
    }
}

impl fmt::Debug for OwnedCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedCopy").field("footprint", &self.footprint()).finish()
    }
}

/// The place in an object that names its current copy, if there is one.
///
/// Any thread may call `acquire`; every other method is for the holder of the object's gate.
#[derive(Debug)]
pub(crate) struct CopyCell(AtomicPtr<HostCopy>);

/// What a reader found in the cell.
#[derive(Debug)]
pub(crate) enum Found {
    /// A reader count on the current copy.
    Copy(ReadGuard),
    /// A copy that its owner is writing to, or evicting, right now.
    Locked,
    /// No copy.
    Nothing,
}

impl CopyCell {
    pub(crate) fn empty() -> Self {
        CopyCell(AtomicPtr::new(ptr::null_mut()))
    }

    /// Takes a reader count on the current copy. All copies of this cell come from
    /// `copies`.
    pub(crate) fn acquire(&self, copies: &Copies) -> Found {
        loop {
            let Some(copy) = NonNull::new(self.0.load(Ordering::Acquire)) else {
                return Found::Nothing;
            };
            // SAFETY: the cell only ever names descriptors of `copies`, which never gives
            // their memory back while it lives, and the caller borrows it.
            let descriptor = unsafe { follow(copy) };
            match descriptor.word.try_acquire() {
                Acquire::Held { first } => {
                    let guard = ReadGuard { copy, anchor: copies.anchor().clone() };
                    if first {
                        guard.anchor.add_held(guard.footprint());
                    }
                    if self.0.load(Ordering::Acquire) == copy.as_ptr() {
                        return Found::Copy(guard);
                    }
                    // The descriptor serves another copy by now; the guard gives the count back.
                }
                Acquire::Locked if self.0.load(Ordering::Acquire) == copy.as_ptr() => {
                    return Found::Locked;
                }
                Acquire::Gone if self.0.load(Ordering::Acquire) == copy.as_ptr() => {
                    // Between two transitions of the gate's holder: retired, not yet unnamed.
                    return Found::Locked;
                }
                Acquire::Locked | Acquire::Gone => {}
            }
        }
    }

    /// Whether the cell names a copy.
    pub(crate) fn is_some(&self) -> bool {
        !self.0.load(Ordering::Acquire).is_null()
    }

    /// Looks at the slot of the current copy, and counts as no reader. For the holder of the gate,
    /// which alone takes a copy away or publishes another.
    pub(crate) fn peek<T>(&self, look: impl FnOnce(&HostSlot) -> T) -> Option<T> {
        let copy = self.current()?;
        // SAFETY: descriptors live as long as the pool, which the object's runtime holds.
        let copy = unsafe { follow(copy) };
        // SAFETY: a current copy has its slot until the holder of the gate, which calls this, takes
        // the copy away.
        Some(look(unsafe { copy.slot() }))
    }

    /// Readers of the current copy: a hint.
    pub(crate) fn readers(&self) -> u64 {
        self.current().map_or(0, |copy| {
            // SAFETY: descriptors live as long as the pool, which the object's runtime holds.
            unsafe { follow(copy) }.word.readers()
        })
    }

    /// Makes `copy` the current one, visible to every reader that comes after. The previous copy,
    /// if any, becomes an old version.
    pub(crate) fn publish(&self, copy: OwnedCopy, copies: &Copies) {
        let copy = copy.into_raw();
        // SAFETY: descriptors live as long as the pool, which the caller holds.
        unsafe { follow(copy) }.word.publish();
        let before = self.0.swap(copy.as_ptr(), Ordering::AcqRel);
        release_current(NonNull::new(before), copies);
    }

    /// Runs `write` on the bytes of the current copy, if there is one without readers. A panic in
    /// `write` is the caller's bug: nothing in the runtime panics there.
    pub(crate) fn write_in_place(&self, write: impl FnOnce(&mut [u8])) -> bool {
        let Some(copy) = self.current() else { return false };
        // SAFETY: descriptors live as long as the pool, which the object's runtime holds.
        let descriptor = unsafe { follow(copy) };
        if !descriptor.word.try_lock() {
            return false;
        }
        let place = descriptor.slot.get();
        // SAFETY: locked: no reader, and this thread is the one owner until `unlock`.
        let slot = unsafe { &mut *place };
        write(slot.as_mut().expect("invariant: a current copy has its slot").as_mut_slice());
        descriptor.word.unlock();
        true
    }

    /// Takes the current copy away, if it has no reader.
    pub(crate) fn take_idle(&self, copies: &Copies) -> Option<OwnedCopy> {
        let copy = self.current()?;
        // SAFETY: descriptors live as long as the pool, which the caller holds.
        let descriptor = unsafe { follow(copy) };
        if !descriptor.word.try_lock() {
            return None;
        }
        self.0.store(ptr::null_mut(), Ordering::Release);
        descriptor.word.retire();
        Some(OwnedCopy { copy, pool: copies.pool().clone() })
    }

    /// Takes the current copy away: at once if it has no reader, else it stays as an old version
    /// until the last reader drops it.
    pub(crate) fn detach(&self, copies: &Copies) {
        let before = self.0.swap(ptr::null_mut(), Ordering::AcqRel);
        release_current(NonNull::new(before), copies);
    }

    fn current(&self) -> Option<NonNull<HostCopy>> {
        NonNull::new(self.0.load(Ordering::Acquire))
    }
}

/// Turns a copy that a cell no longer names into an old version.
fn release_current(copy: Option<NonNull<HostCopy>>, copies: &Copies) {
    let Some(copy) = copy else { return };
    // SAFETY: descriptors live as long as the pool, which the caller holds.
    match unsafe { follow(copy) }.word.detach() {
        Detach::Owned => drop(OwnedCopy { copy, pool: copies.pool().clone() }),
        Detach::Held => {}
    }
}

/// One reader count: the bytes of a version, unchanged for as long as it lives.
pub(crate) struct ReadGuard {
    copy: NonNull<HostCopy>,
    anchor: Arc<Anchor>,
}

// SAFETY: a guard gives shared access to bytes that do not change.
unsafe impl Send for ReadGuard {}
// SAFETY: as above.
unsafe impl Sync for ReadGuard {}

impl ReadGuard {
    /// Whether there are other readers of this version; a hint.
    pub(crate) fn is_shared(&self) -> bool {
        // SAFETY: the guard is a reader count, and the anchor keeps the descriptor alive.
        unsafe { follow(self.copy) }.word.readers() > 1
    }

    /// Space that the version takes, in bytes.
    pub(crate) fn footprint(&self) -> u64 {
        // SAFETY: the guard is a reader count, and the anchor keeps the descriptor alive.
        let descriptor = unsafe { follow(self.copy) };
        // SAFETY: as above.
        unsafe { descriptor.slot() }.footprint()
    }

    /// Counts a read that host memory served.
    pub(crate) fn count_hit(&self) {
        self.anchor.count_hit();
    }

    /// Another count on the same version.
    pub(crate) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for ReadGuard {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the guard is a reader count, and the anchor keeps the descriptor alive.
        let descriptor = unsafe { follow(self.copy) };
        // SAFETY: as above.
        unsafe { descriptor.slot() }.as_slice()
    }
}

impl Drop for ReadGuard {
    fn drop(&mut self) {
        let footprint = self.footprint();
        // SAFETY: the anchor keeps the descriptor's memory alive, whichever thread owns it
        // afterwards.
        let released = unsafe { follow(self.copy) }.word.release();
        match released {
            Release::Shared => {}
            Release::Idle => self.anchor.released(footprint),
            Release::LastOfDetached => {
                let pool = self.anchor.pool();
                drop(OwnedCopy { copy: self.copy, pool });
                self.anchor.released(footprint);
            }
        }
    }
}

impl fmt::Debug for ReadGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadGuard").field("len", &self.as_ref().len()).finish()
    }
}

#[cfg(test)]
mod tests;
