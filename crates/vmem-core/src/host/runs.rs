//! Free runs of numbered units.
//!
//! Invariant: runs are disjoint, not empty, and no two of them touch; both indices name the same
//! runs. Memory grows with the number of free runs, not with what is in use. Pure; called by
//! `pages`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A set of free units, by run.
#[derive(Debug, Default)]
pub(super) struct FreeRuns {
    by_start: BTreeMap<u64, u64>,
    by_len: BTreeSet<(u64, u64)>,
    total: u64,
}

impl FreeRuns {
    /// Units in all runs.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Units in the longest run.
    pub(super) fn longest(&self) -> u64 {
        self.by_len.last().map_or(0, |&(len, _)| len)
    }

    /// Frees a run; it joins its neighbours.
    pub(super) fn add(&mut self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        self.total += run.end - run.start;
        let (mut start, mut end) = (run.start, run.end);
        if let Some((&before, &before_end)) = self.by_start.range(..=start).next_back() {
            assert!(before_end <= start, "freed what was free: {run:?}");
            if before_end == start {
                self.unlink(before, before_end);
                start = before;
            }
        }
        if let Some((&after, &after_end)) = self.by_start.range(start..).next() {
            assert!(after >= end, "freed what was free: {run:?}");
            if after == end {
                self.unlink(after, after_end);
                end = after_end;
            }
        }
        self.by_start.insert(start, end);
        self.by_len.insert((end - start, start));
    }

    /// Takes `len` units from the shortest run that has them.
    pub(super) fn take(&mut self, len: u64) -> Option<Range<u64>> {
        let &(_, start) = self.by_len.range((len, 0)..).next()?;
        let end = self.by_start[&start];
        self.unlink(start, end);
        self.total -= len;
        let taken = start..start + len;
        if taken.end < end {
            self.by_start.insert(taken.end, end);
            self.by_len.insert((end - taken.end, taken.end));
        }
        Some(taken)
    }

    /// Takes the longest run, at most `len` units of it.
    pub(super) fn take_longest(&mut self, len: u64) -> Option<Range<u64>> {
        self.take(self.longest().min(len)).filter(|run| !run.is_empty())
    }

    /// Whether any of these units is free.
    pub(super) fn touches(&self, units: &Range<u64>) -> bool {
        let before = self.by_start.range(..units.end).next_back();
        before.is_some_and(|(_, &end)| end > units.start)
    }

    /// Takes these units, if all of them are free.
    pub(super) fn take_these(&mut self, units: &Range<u64>) -> bool {
        let Some((&start, &end)) = self.by_start.range(..=units.start).next_back() else {
            return false;
        };
        if end < units.end {
            return false;
        }
        self.unlink(start, end);
        self.total -= end - start;
        self.add(start..units.start);
        self.add(units.end..end);
        true
    }

    fn unlink(&mut self, start: u64, end: u64) {
        let by_start = self.by_start.remove(&start);
        let by_len = self.by_len.remove(&(end - start, start));
        assert!(by_start == Some(end) && by_len, "both indices name the same runs");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn equals_a_map_of_units() {
        const UNITS: usize = 256;
        for seed in 0..50 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut runs = FreeRuns::default();
            runs.add(0..UNITS as u64);
            let mut free = [true; UNITS];
            let mut taken: Vec<Range<u64>> = Vec::new();
            for _ in 0..500 {
                if rng.random_bool(0.5) {
                    let len = rng.random_range(1..20);
                    let fits = free.split(|free| !free).any(|run| run.len() as u64 >= len);
                    let run = runs.take(len);
                    assert_eq!(run.is_some(), fits, "seed {seed}");
                    if let Some(run) = run {
                        assert_eq!(run.end - run.start, len);
                        for unit in run.clone() {
                            assert!(std::mem::replace(&mut free[unit as usize], false));
                        }
                        taken.push(run);
                    }
                } else if !taken.is_empty() {
                    let run = taken.swap_remove(rng.random_range(0..taken.len()));
                    free[run.start as usize..run.end as usize].fill(true);
                    runs.add(run);
                }
                let start = rng.random_range(0..UNITS - 8);
                let units = start..start + rng.random_range(1..8);
                let range = units.start as u64..units.end as u64;
                let part = &mut free[units];
                assert_eq!(runs.touches(&range), part.contains(&true), "seed {seed}");
                let all = !part.contains(&false);
                assert_eq!(runs.take_these(&range), all, "seed {seed}");
                if all {
                    part.fill(false);
                    taken.push(range);
                }
                let longest = free.split(|free| !free).map(<[bool]>::len).max();
                assert_eq!(Some(runs.longest() as usize), longest, "seed {seed}");
                assert_eq!(runs.total() as usize, free.iter().filter(|free| **free).count());
            }
        }
    }
}
