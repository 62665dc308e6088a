//! The clock of accesses: nanoseconds since the store was opened, by which objects are ordered.
//!
//! A hit reads no clock. It takes the time that was seen last, by any thread, and at least one
//! nanosecond more than its own thread gave before. Whatever is not a hit looks at the clock, and
//! so do each eighth hit of a thread and its first one in another store.
//!
//! Invariant: the stamps of a thread that uses one store grow. A stamp is late by what has passed
//! since the last look of any thread: by seven hits of its own thread at most, so by a second only
//! where a thread hits less than eight times in it, and the store does nothing else meanwhile. What
//! is hit so rarely counts as idle. Called by objects, and by the policy that asks what is hot.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

/// A thread looks at the clock once in this many hits.
const HITS_A_LOOK: u32 = 8;
/// A thread lets others of its runtime go on once in this many calls, if it has had its share.
const CALLS_A_TURN: u32 = 8;

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
    calls: Cell<u32>,
}

thread_local! {
    static MINE: Mine = const {
        Mine {
            number: Cell::new(0),
            stamp: Cell::new(0),
            hits: Cell::new(0),
            calls: Cell::new(0),
        }
    };
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

    /// The stamp of a hit now, mostly without a look at the clock.
    pub(crate) fn stamp_of_hit(&self) -> u64 {
        MINE.with(|mine| {
            if is_nth(HITS_A_LOOK, &mine.hits) || mine.number.get() != self.number {
                self.now();
            }
            self.next(mine)
        })
    }

    /// The stamp of an access now, after a look at the clock.
    pub(crate) fn fresh_stamp(&self) -> u64 {
        self.now();
        MINE.with(|mine| self.next(mine))
    }

    fn next(&self, mine: &Mine) -> u64 {
        let is_mine = mine.number.replace(self.number) == self.number;
        let before = if is_mine { mine.stamp.get() } else { 0 };
        let stamp = self.seen.load(Ordering::Relaxed).max(before + 1);
        mine.stamp.set(stamp);
        stamp
    }
}

/// Counts a call of this thread, and says whether it is the turn to let others of its runtime go
/// on: tokio's budget is 128 at each poll, so a loop of hits goes on for a thousand at most.
pub(crate) fn is_turn() -> bool {
    MINE.with(|mine| is_nth(CALLS_A_TURN, &mine.calls))
}

/// Counts one more, and says whether it is the last of `n`.
fn is_nth(n: u32, count: &Cell<u32>) -> bool {
    count.set(count.get().wrapping_add(1));
    count.get().is_multiple_of(n)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn stamps_of_a_thread_grow_while_the_clock_stands_still() {
        let clock = Recency::new();
        let stamps = [clock.stamp_of_hit(), clock.fresh_stamp(), clock.stamp_of_hit()];
        assert!(stamps.is_sorted_by(|one, two| one < two), "{stamps:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn stamps_of_hits_follow_the_clock_within_eight() {
        let clock = Recency::new();
        clock.stamp_of_hit();
        tokio::time::advance(Duration::from_secs(1)).await;
        let late = (0..8).take_while(|_| clock.stamp_of_hit() < 1_000_000_000).count();
        assert!(late < 8, "eight hits without a look");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(clock.now(), 2_000_000_000);
        assert!(clock.stamp_of_hit() >= 2_000_000_000, "another look serves too");
    }

    /// A thread that hits two stores in turns looks at the clock for each.
    #[tokio::test(start_paused = true)]
    async fn stores_that_are_hit_in_turns_have_the_time() {
        let old = Recency::new();
        tokio::time::advance(Duration::from_secs(3600)).await;
        let young = Recency::new();
        for _ in 0..20 {
            assert!(old.stamp_of_hit() >= 3_600_000_000_000);
            assert!(young.stamp_of_hit() < 1_000_000);
        }
    }

    #[test]
    fn each_eighth_call_of_a_thread_is_a_turn() {
        assert_eq!((0..80).filter(|_| is_turn()).count(), 10);
    }
}
