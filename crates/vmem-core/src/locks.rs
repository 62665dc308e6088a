//! The order of the core's locks, asserted where debug assertions are on.
//!
//! A thread takes a lock only if each lock that it holds comes before that one below. So no two
//! threads wait for each other, whatever they do.
//!
//! | lock | what it guards | taken under |
//! |---|---|---|
//! | `CLOSED`, `FROZEN` | names that may leave memory, and whether any may | |
//! | `NAMED` | what an object knows of its name | the shard of the name |
//! | `ORDER` | the policy of a tier, which asks objects how they stand | |
//! | `OBJECT` | where one object is | `NAMED`, `ORDER` |
//! | `WAITERS` | the requests for space of one tier | |
//! | `PARCEL` | one result on its way to its callers | `OBJECT`, `WAITERS` |
//! | `UNCLAIMED` | the results that no caller has taken | `PARCEL` |
//! | `HOLDS`, `RESIDENTS` | what is held in a tier; what lies where on a device | |
//! | `SPANS` | small slots of host memory, and under it the pages | `OBJECT`, `WAITERS` |
//! | `COPIES`, `STAGING`, `WINDOWS` | free descriptors, pieces and windows | `OBJECT` |
//! | `CLOCK`, `SLOW` | in which stage a read is; the slowest reads | |
//! | `GATHERS` | what gathers have copied of objects that are not on a device | |
//! | `SUCCESSORS`, `USES` | leases behind a kernel; users of a range that are gone | `OBJECT` |
//!
//! Not ranked: the pages of host memory, whose lock a condition variable needs as it is; the
//! listeners of events and the check of a runtime, under which nothing is locked; and the shards of
//! the tables of objects, names and turns. Nothing of the above is taken under the pages or under
//! the table of objects; a shard of names comes first of all. Locks of backends are taken under any
//! of these, and take none of them; under the lock of a device's card the pages are.
//!
//! Invariant: `HELD` has a bit for each rank of which its thread holds a lock, but where it tried
//! two of one rank and gave one back: then a violation goes unseen, and none is made up. Guards do
//! not move between threads. Used in place of `parking_lot::Mutex` by the other modules.

#![allow(unsafe_code)]

use std::cell::Cell;

use parking_lot::lock_api;

/// A mutex with a place in the order.
pub(crate) type Lock<T, const RANK: u32> = lock_api::Mutex<Ranked<RANK>, T>;

pub(crate) const FROZEN: u32 = 0;
pub(crate) const CLOSED: u32 = 1;
pub(crate) const NAMED: u32 = 2;
pub(crate) const ORDER: u32 = 3;
pub(crate) const OBJECT: u32 = 4;
pub(crate) const WAITERS: u32 = 5;
pub(crate) const PARCEL: u32 = 6;
pub(crate) const UNCLAIMED: u32 = 7;
pub(crate) const HOLDS: u32 = 8;
pub(crate) const RESIDENTS: u32 = 9;
pub(crate) const SPANS: u32 = 10;
pub(crate) const COPIES: u32 = 11;
pub(crate) const STAGING: u32 = 12;
pub(crate) const WINDOWS: u32 = 13;
pub(crate) const CLOCK: u32 = 14;
pub(crate) const SLOW: u32 = 15;
pub(crate) const GATHERS: u32 = 16;
pub(crate) const SUCCESSORS: u32 = 17;
pub(crate) const USES: u32 = 18;

/// A lock of `parking_lot` that knows its place.
pub(crate) struct Ranked<const RANK: u32>(parking_lot::RawMutex);

thread_local! {
    static HELD: Cell<u32> = const { Cell::new(0) };
}

/// Counts a lock that this thread takes; `may_wait` if it may have to wait for another thread.
fn take(rank: u32, may_wait: bool) {
    if cfg!(debug_assertions) {
        let held = HELD.get();
        let in_order = held >> rank == 0;
        assert!(in_order || !may_wait, "lock {rank} is taken under those of {held:#b}");
        HELD.set(held | 1 << rank);
    }
}

fn release(rank: u32) {
    if cfg!(debug_assertions) {
        HELD.set(HELD.get() & !(1 << rank));
    }
}

// SAFETY: exclusion is that of the lock inside, to which each call goes through unchanged.
unsafe impl<const RANK: u32> lock_api::RawMutex for Ranked<RANK> {
    const INIT: Self = Ranked(parking_lot::RawMutex::INIT);

    type GuardMarker = <parking_lot::RawMutex as lock_api::RawMutex>::GuardMarker;

    fn lock(&self) {
        const { assert!(RANK < u32::BITS, "each rank has a bit") };
        // First, so that an order that could hang fails also where it does not.
        take(RANK, true);
        self.0.lock();
    }

    fn try_lock(&self) -> bool {
        let taken = self.0.try_lock();
        if taken {
            take(RANK, false);
        }
        taken
    }

    unsafe fn unlock(&self) {
        release(RANK);
        // SAFETY: the caller holds the lock.
        unsafe { self.0.unlock() }
    }

    fn is_locked(&self) -> bool {
        self.0.is_locked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_in_order_are_taken_and_given_back_in_any() {
        let outer = Lock::<u8, NAMED>::new(1);
        let inner = Lock::<u8, OBJECT>::new(2);
        let first = outer.lock();
        let second = inner.lock();
        drop(first);
        // The one that is still held is all that counts.
        let last = Lock::<u8, SPANS>::new(3);
        assert_eq!(*second + *last.lock(), 5);
        drop(second);
        assert_eq!(HELD.get(), 0);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "is taken under")]
    fn lock_under_one_that_comes_later_is_refused() {
        let outer = Lock::<u8, NAMED>::new(1);
        let inner = Lock::<u8, OBJECT>::new(2);
        let _second = inner.lock();
        drop(outer.lock());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "is taken under")]
    fn two_objects_are_never_locked_at_once() {
        let one = Lock::<u8, OBJECT>::new(1);
        let other = Lock::<u8, OBJECT>::new(2);
        let _first = one.lock();
        drop(other.lock());
    }

    #[test]
    fn lock_that_is_not_waited_for_may_be_tried_in_any_order() {
        let outer = Lock::<u8, NAMED>::new(1);
        let inner = Lock::<u8, OBJECT>::new(2);
        let second = inner.lock();
        assert!(outer.try_lock().is_some());
        assert!(inner.try_lock().is_none());
        drop(second);
        assert_eq!(HELD.get(), 0);
    }
}
