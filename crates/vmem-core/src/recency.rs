//! The clock of accesses: nanoseconds since the store was opened, by which objects are ordered.
//!
//! A hit reads no clock. It takes the time that was seen last, by any thread, and one nanosecond
//! more than its own thread gave before. Whatever is not a hit looks at the clock, and so does each
//! eighth hit of a thread, which is also when a loop of hits lets others of its runtime go on.
//!
//! Invariant: the stamps of one thread grow, and no stamp lies in the future. Stamps of two threads
//! may be out of order by what has passed since either looked: seven hits at most, or whatever came
//! since of misses, writes and evictions. Called by objects, and by the policy that asks what is
//! hot.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

/// A thread looks at the clock once in this many hits.
const HITS_A_LOOK: u32 = 8;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Recency {
    opened: Instant,
    /// The time that a thread saw last.
    seen: AtomicU64,
    /// Which clock of this process it is; never 0.
    number: u64,
}

/// What a thread remembers of the clock that it used last.
struct Mine {
    number: Cell<u64>,
    stamp: Cell<u64>,
    hits: Cell<u32>,
}

thread_local! {
    static MINE: Mine =
        const { Mine { number: Cell::new(0), stamp: Cell::new(0), hits: Cell::new(0) } };
}

impl Recency {
    pub(crate) fn new() -> Self {
        static CLOCKS: AtomicU64 = AtomicU64::new(1);
        Recency {
            opened: Instant::now(),
            seen: AtomicU64::new(0),
            number: CLOCKS.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Looks at the clock: nanoseconds since the store was opened.
    pub(crate) fn now(&self) -> u64 {
        let now = self.opened.elapsed().as_nanos() as u64;
        // Another thread may have seen more; what is lost by storing less is what has passed
        // between two looks.
        if now > self.seen.load(Ordering::Relaxed) {
            self.seen.store(now, Ordering::Relaxed);
        }
        now
    }

    /// The stamp of an access now, without a look at the clock.
    pub(crate) fn stamp(&self) -> u64 {
        let seen = self.seen.load(Ordering::Relaxed);
        MINE.with(|mine| {
            let is_mine = mine.number.replace(self.number) == self.number;
            let before = if is_mine { mine.stamp.get() } else { 0 };
            let stamp = seen.max(before + 1);
            mine.stamp.set(stamp);
            stamp
        })
    }

    /// The stamp of an access now, after a look at the clock.
    pub(crate) fn fresh_stamp(&self) -> u64 {
        self.now();
        self.stamp()
    }

    /// Counts a hit of this thread, and says whether it is the turn to look at the clock and to let
    /// others go on.
    pub(crate) fn is_due(&self) -> bool {
        let hits = MINE.with(|mine| {
            let hits = mine.hits.get().wrapping_add(1);
            mine.hits.set(hits);
            hits
        });
        hits.is_multiple_of(HITS_A_LOOK)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn stamps_of_a_thread_grow_while_the_clock_stands_still() {
        let clock = Recency::new();
        let first = clock.stamp();
        let second = clock.fresh_stamp();
        let third = clock.stamp();
        assert!(first < second && second < third, "{first} {second} {third}");
    }

    #[tokio::test(start_paused = true)]
    async fn stamps_follow_the_clock_once_anybody_looks() {
        let clock = Recency::new();
        clock.stamp();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(clock.stamp() < 1000, "nobody has looked");
        assert_eq!(clock.now(), 1_000_000_000);
        assert!(clock.stamp() >= 1_000_000_000);
    }

    #[tokio::test(start_paused = true)]
    async fn clocks_of_two_stores_take_no_stamps_from_each_other() {
        let old = Recency::new();
        tokio::time::advance(Duration::from_secs(3600)).await;
        let late = old.fresh_stamp();
        let young = Recency::new();
        assert!(young.fresh_stamp() < late / 2);
        assert!(old.fresh_stamp() >= late);
    }

    #[test]
    fn each_eighth_hit_of_a_thread_is_due() {
        let clock = Recency::new();
        let due = (0..80).filter(|_| clock.is_due()).count();
        assert_eq!(due, 10);
    }
}
