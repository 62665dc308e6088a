//! Free ranges that still have blocks of the file system behind them, to be punched in batches.
//!
//! Invariant: the ranges hold only bytes that no extent owns: a range leaves when it is reserved
//! again. Called by the disk tier under its lock.
//!
//! Only whole pages are punched: punching a part of one would write zeros instead of freeing
//! anything. What is left at the edges waits until its neighbours are free too.

use std::ops::Range;

use vmem_core::backend::Ranges;

/// This many bytes must be stale before a batch is worth a system call.
pub(crate) const BATCH_BYTES: u64 = 4 * 1024 * 1024;

/// The block of common file systems: smaller holes free nothing.
const PAGE_BYTES: u64 = 4096;

/// Limits of one batch, so that it does not hold the lock of the file for long.
const BATCH_BYTES_MAX: u64 = 64 * 1024 * 1024;
const BATCH_RANGES_MAX: usize = 1024;

/// The stale ranges, in bytes.
#[derive(Debug)]
pub(crate) struct Stale {
    ranges: Ranges,
    /// How many bytes start the next batch: more than one batch where edges are all there is.
    trigger: u64,
    /// Where the next search begins.
    cursor: u64,
}

/// What a search found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Batch {
    /// Punch these; they are no longer in the set.
    Punch(Vec<Range<u64>>),
    /// Nothing in this part of the set: search on.
    Later,
    /// Too little to be worth it.
    Nothing,
}

impl Stale {
    pub(crate) fn new() -> Self {
        Stale { ranges: Ranges::default(), trigger: BATCH_BYTES, cursor: 0 }
    }

    /// An extent was freed.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        self.ranges.add(range);
    }

    /// An extent was reserved: whatever of it is stale is so no more.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        self.ranges.remove(&range);
        self.trigger = self.trigger.min(self.ranges.total() + BATCH_BYTES);
    }

    /// Makes the next batch due, however little is stale: space is short.
    pub(crate) fn hurry(&mut self) {
        self.trigger = 0;
        self.cursor = 0;
    }

    /// Takes the next batch out of the set.
    pub(crate) fn take_batch(&mut self) -> Batch {
        if self.ranges.total() < self.trigger {
            return Batch::Nothing;
        }
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut end_reached = true;
        for (seen, Range { start, end }) in self.ranges.starting_at(self.cursor).enumerate() {
            if seen == BATCH_RANGES_MAX || bytes >= BATCH_BYTES_MAX {
                end_reached = false;
                break;
            }
            let first = start.next_multiple_of(PAGE_BYTES);
            let last = end - end % PAGE_BYTES;
            self.cursor = end;
            if first < last {
                let cut = last.min(first + (BATCH_BYTES_MAX - bytes));
                bytes += cut - first;
                batch.push(first..cut);
                if cut < last {
                    self.cursor = cut;
                    end_reached = false;
                    break;
                }
            }
        }
        let before = self.ranges.total();
        batch.iter().for_each(|range| self.ranges.remove(range));
        assert!(before - self.ranges.total() == bytes, "a batch leaves the set, and no more");
        self.trigger = BATCH_BYTES;
        if end_reached {
            // What a complete search left behind are edges; they must not start the next one.
            self.cursor = 0;
            self.trigger += self.ranges.total();
        }
        match (batch.is_empty(), end_reached) {
            (false, _) => Batch::Punch(batch),
            (true, false) => Batch::Later,
            (true, true) => Batch::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn agrees_with_a_bitmap() {
        let seed = std::env::var("VMEM_SEED").map_or(11, |text| text.parse().unwrap());
        eprintln!("VMEM_SEED={seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut stale = Stale::new();
        let mut model = vec![false; 32 * 1024];
        for _ in 0..4_000 {
            let start = rng.random_range(0..model.len() - 300);
            let end = start + rng.random_range(0..300);
            let range = start as u64 * 512..end as u64 * 512;
            if rng.random_bool(0.6) && !model[start..end].contains(&true) {
                model[start..end].fill(true);
                stale.add(range);
            } else {
                model[start..end].fill(false);
                stale.remove(range);
            }
            if rng.random_bool(0.01)
                && let Batch::Punch(batch) = stale.take_batch()
            {
                for range in batch {
                    assert!(range.start % PAGE_BYTES == 0 && range.end % PAGE_BYTES == 0);
                    let blocks = (range.start / 512) as usize..(range.end / 512) as usize;
                    assert!(!model[blocks.clone()].contains(&false), "only stale ranges");
                    model[blocks].fill(false);
                }
            }
            let bytes = model.iter().filter(|&&is| is).count() as u64 * 512;
            assert_eq!(stale.ranges.total(), bytes);
        }
    }

    #[test]
    fn edges_alone_do_not_start_batches() {
        let mut stale = Stale::new();
        // Half a page each: nothing of it can be punched.
        for index in 0..4 * 1024 {
            stale.add(index * 8192..index * 8192 + 2048);
        }
        let mut searches = 0;
        while stale.take_batch() == Batch::Later {
            searches += 1;
        }
        assert!((1..=4).contains(&searches), "{searches}");
        assert_eq!(stale.take_batch(), Batch::Nothing);
        assert!(stale.trigger > stale.ranges.total(), "asleep until more is freed");
        let far = 1 << 40..(1 << 40) + BATCH_BYTES;
        stale.add(far.clone());
        while stale.cursor < 4 * 1024 * 8192 - 8192 {
            assert_eq!(stale.take_batch(), Batch::Later);
        }
        assert_eq!(stale.take_batch(), Batch::Punch(Vec::from([far])));
    }

    #[test]
    fn a_large_range_goes_in_several_batches() {
        let mut stale = Stale::new();
        stale.add(0..3 * BATCH_BYTES_MAX);
        for _ in 0..3 {
            let Batch::Punch(batch) = stale.take_batch() else {
                panic!("more to punch");
            };
            let bytes: u64 = batch.iter().map(|range| range.end - range.start).sum();
            assert_eq!(bytes, BATCH_BYTES_MAX);
        }
        assert_eq!((stale.ranges.total(), stale.take_batch()), (0, Batch::Nothing));
    }
}
