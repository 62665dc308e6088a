//! The state word of a host copy: is it valid, is it locked, was it detached, how many readers.
//!
//! ```text
//!   63      62       61        60..32   31..0
//!   VALID   LOCKED   DETACHED  unused   readers
//! ```
//!
//! | state             | meaning                                            | leaves by |
//! |-------------------|----------------------------------------------------|-----------|
//! | `0`               | unused: in the pool, or private to one owner       | `publish` |
//! | `VALID + n`       | the object's current copy, `n` readers | `try_lock` (n = 0), `detach` |
//! | `VALID + LOCKED`  | one owner alone: an in-place write, or an eviction | `unlock`, `retire` |
//! | `DETACHED + n`    | an old version that `n > 0` readers still hold     | the last `release` |
//!
//! Invariant: memory is written or given back only in a state without readers, and a state without
//! readers that is not `VALID` belongs to exactly one thread: the one that made the transition into
//! it. Readers may call `try_acquire` and `release` at any time, even on a word that serves another
//! object by then (copies are type-stable, see `pool.rs`); every other transition is made by the
//! holder of the object's gate. All orderings that pair "I wait, is it held?" with "I released,
//! is there a waiter?" are `SeqCst`.
//!
//! Called by `copy/mod.rs` alone. Model-checked by `tests/model_word.rs`, which includes this file
//! with the atomics of loom.

use super::sync::{AtomicU64, Ordering};

const VALID: u64 = 1 << 63;
const LOCKED: u64 = 1 << 62;
const DETACHED: u64 = 1 << 61;
const READERS: u64 = (1 << 32) - 1;
/// More readers of one copy than this are refused rather than allowed to overflow.
const READERS_MAX: u64 = READERS / 2;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct CopyWord(AtomicU64);

/// What `try_acquire` found.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquire {
    /// The caller is a reader now; `first` if there was none before.
    Held { first: bool },
    /// One owner has it alone for a moment: ask again after that.
    Locked,
    /// It is not the current copy of an object.
    Gone,
}

/// What the departure of a reader left behind.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// Other readers remain.
    Shared,
    /// No reader remains of a copy that is still current.
    Idle,
    /// No reader remains of an old version: the caller owns the copy now and gives it back.
    LastOfDetached,
}

/// What `detach` left behind.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detach {
    /// There was no reader: the caller owns the copy now and gives it back.
    Owned,
    /// The last reader will give it back.
    Held,
}

impl CopyWord {
    pub(crate) fn new() -> Self {
        CopyWord(AtomicU64::new(0))
    }

    /// One owner -> current copy. What was written before is visible to every later reader.
    pub(crate) fn publish(&self) {
        let before = self.0.swap(VALID, Ordering::SeqCst);
        assert!(before == 0, "published from the unused state, not from {before:#x}");
    }

    /// One owner -> an old version with the caller as its only reader.
    pub(crate) fn publish_detached(&self) {
        let before = self.0.swap(DETACHED | 1, Ordering::SeqCst);
        assert!(before == 0, "published from the unused state, not from {before:#x}");
    }

    /// Takes a reader count, if this is a current copy: check and hold in one step.
    pub(crate) fn try_acquire(&self) -> Acquire {
        // `Acquire` even where the answer is no: the caller looks at the object's cell next, and
        // must not find the value from before this word changed.
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            if word & VALID == 0 {
                return Acquire::Gone;
            }
            if word & LOCKED != 0 || word & READERS >= READERS_MAX {
                return Acquire::Locked;
            }
            match self.0.compare_exchange_weak(word, word + 1, Ordering::SeqCst, Ordering::Acquire)
            {
                Ok(_) => return Acquire::Held { first: word & READERS == 0 },
                Err(seen) => word = seen,
            }
        }
    }

    /// Gives a reader count back.
    pub(crate) fn release(&self) -> Release {
        let before = self.0.fetch_sub(1, Ordering::SeqCst);
        assert!(before & READERS > 0, "released more often than acquired");
        if before & READERS > 1 {
            return Release::Shared;
        }
        if before & DETACHED == 0 {
            return Release::Idle;
        }
        // A detached copy gets no new reader, so this thread alone can see it at zero.
        self.0.store(0, Ordering::SeqCst);
        Release::LastOfDetached
    }

    /// Current copy without readers -> the caller's alone. False if there are readers, or if it is
    /// not current.
    pub(crate) fn try_lock(&self) -> bool {
        self.0.compare_exchange(VALID, VALID | LOCKED, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Ends `try_lock`: current again, with what was written.
    pub(crate) fn unlock(&self) {
        let before = self.0.swap(VALID, Ordering::SeqCst);
        assert!(before == VALID | LOCKED, "unlocked what was locked, not {before:#x}");
    }

    /// Ends `try_lock`: the copy is no object's any more, and the caller owns it.
    pub(crate) fn retire(&self) {
        let before = self.0.swap(0, Ordering::SeqCst);
        assert!(before == VALID | LOCKED, "retired what was locked, not {before:#x}");
    }

    /// Current copy -> old version.
    pub(crate) fn detach(&self) -> Detach {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            assert!(word & (VALID | LOCKED) == VALID, "detached a current copy, not {word:#x}");
            let readers = word & READERS;
            let next = if readers == 0 { 0 } else { DETACHED | readers };
            match self.0.compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) if readers == 0 => return Detach::Owned,
                Ok(_) => return Detach::Held,
                Err(seen) => word = seen,
            }
        }
    }

    /// Readers now, of the current copy or of an old version; a hint.
    pub(crate) fn readers(&self) -> u64 {
        self.0.load(Ordering::SeqCst) & READERS
    }
}
