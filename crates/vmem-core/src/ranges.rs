//! A set of numbers as disjoint ranges, from which an allocator takes and to which it gives back.
//!
//! Invariant: ranges are disjoint, not empty, and no two of them touch; both indices name the same
//! ranges, and `total` is their sum. Pure. The free pages of host memory, the free bytes of a
//! device, the free blocks of the data file and its stale bytes are such sets; each of them adds
//! its units, its budget and its way of choosing.
//!
//! Every operation costs O(log ranges), and memory grows with the number of ranges alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Which end of a range is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The low end, of the lowest range among equals.
    Low,
    /// The high end, of the highest range among equals.
    High,
}

/// Disjoint ranges that are joined as soon as they touch.
///
/// ```
/// use vmem::backend::{End, Ranges};
///
/// let mut free = Ranges::default();
/// free.add(0..100);
/// assert_eq!(free.take(10, End::Low), Some(0..10));
/// assert_eq!(free.take(10, End::High), Some(90..100));
/// free.add(0..10);
/// assert_eq!(free.longest(), Some(0..90));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Start to end.
    by_start: BTreeMap<u64, u64>,
    /// Length and start.
    by_len: BTreeSet<(u64, u64)>,
    total: u64,
}

/// The ranges at which one look for space outside of a window looks.
const LOOKS_MAX: usize = 1024;

impl Ranges {
    /// The sum of all lengths.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many ranges there are.
    pub fn count(&self) -> usize {
        self.by_start.len()
    }

    /// The longest range, the highest among equals.
    pub fn longest(&self) -> Option<Range<u64>> {
        self.by_len.last().map(|&(len, start)| start..start + len)
    }

    /// The length of the longest range; 0 without one.
    pub fn longest_len(&self) -> u64 {
        self.by_len.last().map_or(0, |&(len, _)| len)
    }

    /// The ranges by their length, the longest first.
    pub fn longest_first(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.by_len.iter().rev().map(|&(len, start)| start..start + len)
    }

    /// The ranges that start at `from` or later, in ascending order.
    pub fn starting_at(&self, from: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        self.by_start.range(from..).map(|(&start, &end)| start..end)
    }

    /// How many numbers from `start` on are in the set, without a gap.
    pub fn run_from(&self, start: u64) -> u64 {
        let before = self.by_start.range(..=start).next_back();
        before.map_or(0, |(_, &end)| end.saturating_sub(start))
    }

    /// Whether some part of `range` is in the set.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let before = self.by_start.range(..range.end).next_back();
        !range.is_empty() && before.is_some_and(|(_, &end)| end > range.start)
    }

    /// Adds a range, which joins its neighbours.
    ///
    /// # Panics
    ///
    /// If some part of it is in the set: the ledger of the caller is wrong then.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut start = range.start;
        let mut end = range.end;
        if let Some((&before, &before_end)) = self.by_start.range(..end).next_back() {
            assert!(before_end <= start, "{range:?} was free: {before}..{before_end} is");
            if before_end == start {
                self.unlink(before, before_end);
                start = before;
            }
        }
        if let Some(&after_end) = self.by_start.get(&end) {
            self.unlink(end, after_end);
            end = after_end;
        }
        self.link(start, end);
    }

    /// Takes `len` numbers from the shortest range that has them.
    pub fn take(&mut self, len: u64, from: End) -> Option<Range<u64>> {
        let &(shortest, lowest) = self.by_len.range((len.max(1), 0)..).next()?;
        if from == End::Low {
            return Some(self.cut(lowest..lowest + shortest, lowest..lowest + len));
        }
        let equals = self.by_len.range((shortest, lowest)..=(shortest, u64::MAX));
        let highest = equals.last().map_or(lowest, |&(_, start)| start);
        let end = highest + shortest;
        Some(self.cut(highest..end, end - len..end))
    }

    /// Takes `len` numbers of which none is in `window`, from the shortest range that has them, or
    /// none if it is not among the first 1,024 of these.
    pub fn take_outside(&mut self, len: u64, from: End, window: &Range<u64>) -> Option<Range<u64>> {
        let mut long_enough = self.by_len.range((len.max(1), 0)..).take(LOOKS_MAX);
        let part = long_enough.find_map(|&(long, start)| {
            let below = start..(start + long).min(window.start);
            let above = start.max(window.end)..start + long;
            let mut parts = [below, above].into_iter();
            let part = parts.find(|part| part.start < part.end && part.end - part.start >= len);
            part.map(|part| match from {
                End::Low => part.start..part.start + len,
                End::High => part.end - len..part.end,
            })
        })?;
        let taken = self.take_exact(&part);
        assert!(taken, "a part of a range of the set");
        Some(part)
    }

    /// Takes the longest range as a whole.
    pub fn take_longest(&mut self) -> Option<Range<u64>> {
        let longest = self.longest()?;
        Some(self.cut(longest.clone(), longest))
    }

    /// Takes `range` if all of it is in the set.
    pub fn take_exact(&mut self, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let around = self.by_start.range(..=range.start).next_back();
        let Some((start, end)) = around.map(|(&start, &end)| (start, end)) else { return false };
        if end < range.end {
            return false;
        }
        self.cut(start..end, range.clone());
        true
    }

    /// Takes whatever of `range` is in the set.
    pub fn remove(&mut self, range: &Range<u64>) {
        while self.touches(range)
            && let Some((&start, &end)) = self.by_start.range(..range.end).next_back()
        {
            self.cut(start..end, start.max(range.start)..end.min(range.end));
        }
    }

    /// Takes `part` of a range `whole` of the set.
    fn cut(&mut self, whole: Range<u64>, part: Range<u64>) -> Range<u64> {
        assert!(whole.start <= part.start && part.end <= whole.end, "{part:?} is of {whole:?}");
        self.unlink(whole.start, whole.end);
        self.link(whole.start, part.start);
        self.link(part.end, whole.end);
        part
    }

    fn link(&mut self, start: u64, end: u64) {
        if start < end {
            self.by_start.insert(start, end);
            self.by_len.insert((end - start, start));
            self.total += end - start;
        }
    }

    fn unlink(&mut self, start: u64, end: u64) {
        let by_start = self.by_start.remove(&start);
        let by_len = self.by_len.remove(&(end - start, start));
        assert!(by_start == Some(end) && by_len, "both indices name the same ranges");
        self.total -= end - start;
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const UNITS: usize = 256;

    /// The same set as one flag a number.
    struct Bitmap([bool; UNITS]);

    impl Bitmap {
        fn of(&mut self, range: &Range<u64>) -> &mut [bool] {
            &mut self.0[range.start as usize..range.end as usize]
        }

        fn ranges(&self) -> Vec<Range<u64>> {
            let at = |flag: bool, from: usize| {
                self.0[from..].iter().position(|&is| is == flag).map(|len| from + len)
            };
            let starts = std::iter::successors(at(true, 0), |&start| at(true, at(false, start)?));
            let end = |start| at(false, start).unwrap_or(UNITS);
            starts.map(|start| start as u64..end(start) as u64).collect()
        }
    }

    fn step(rng: &mut SmallRng, set: &mut Ranges, map: &mut Bitmap) {
        let start = rng.random_range(0..UNITS as u64);
        let range = start..(start + rng.random_range(0..20)).min(UNITS as u64);
        let any = map.of(&range).contains(&true);
        let all = !map.of(&range).contains(&false);
        assert_eq!(set.touches(&range), any);
        match rng.random_range(0..6) {
            0..=1 if !any => {
                set.add(range.clone());
                map.of(&range).fill(true);
            }
            2 => {
                assert_eq!(set.take_exact(&range), all);
                if all {
                    map.of(&range).fill(false);
                }
            }
            3 => {
                set.remove(&range);
                map.of(&range).fill(false);
            }
            4 => {
                let len = rng.random_range(1..30);
                let end = [End::Low, End::High];
                let end = end[rng.random_range(0..2)];
                let fit = map.ranges().into_iter().filter(|run| run.end - run.start >= len);
                let rank = |run: &Range<u64>| match end {
                    End::Low => (run.end - run.start, run.start),
                    End::High => (run.end - run.start, u64::MAX - run.start),
                };
                let expected = fit.min_by_key(rank).map(|run| match end {
                    End::Low => run.start..run.start + len,
                    End::High => run.end - len..run.end,
                });
                assert_eq!(set.take(len, end), expected);
                expected.iter().for_each(|taken| map.of(taken).fill(false));
            }
            5 if rng.random_bool(0.1) => {
                let expected = map.ranges().into_iter().max_by_key(|run| run.end - run.start);
                assert_eq!(set.longest(), expected);
                assert_eq!(set.take_longest(), expected);
                expected.iter().for_each(|taken| map.of(taken).fill(false));
            }
            _ => {}
        }
    }

    #[test]
    fn ranges_agree_with_a_bitmap() {
        let given = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
        for seed in given.map_or(0..100, |seed| seed..seed + 1) {
            println!("VMEM_SEED={seed}");
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut set = Ranges::default();
            let mut map = Bitmap([false; UNITS]);
            for _ in 0..500 {
                step(&mut rng, &mut set, &mut map);
                let expected = map.ranges();
                assert_eq!(set.starting_at(0).collect::<Vec<_>>(), expected);
                assert_eq!(set.count(), expected.len());
                assert_eq!(set.by_len.len(), expected.len());
                let lens = expected.iter().map(|run| run.end - run.start);
                assert_eq!(set.total(), lens.clone().sum());
                assert_eq!(set.longest_len(), lens.max().unwrap_or(0));
            }
        }
    }

    #[test]
    fn window_is_left_whole() {
        let mut set = Ranges::default();
        for range in [0..100, 150..400, 500..530] {
            set.add(range);
        }
        assert_eq!(
            set.take_outside(30, End::Low, &(480..520)),
            Some(0..30),
            "of the shortest that has it"
        );
        assert_eq!(
            set.take_outside(10, End::Low, &(480..520)),
            Some(520..530),
            "what lies behind it"
        );
        assert_eq!(
            set.take_outside(10, End::Low, &(505..520)),
            Some(30..40),
            "a piece in front is too short"
        );
        assert_eq!(set.take_outside(200, End::High, &(160..170)), Some(200..400), "behind it");
        assert_eq!(set.take_outside(60, End::Low, &(0..400)), None);
        assert_eq!(set.total(), 380 - 30 - 10 - 10 - 200);
    }

    #[test]
    fn the_ends_of_the_numbers_are_in_reach() {
        let mut set = Ranges::default();
        set.add(0..u64::MAX);
        assert_eq!(set.take(1, End::High), Some(u64::MAX - 1..u64::MAX));
        assert_eq!(set.take(u64::MAX, End::Low), None);
        assert!(set.take_exact(&(0..u64::MAX - 1)));
        assert_eq!((set.total(), set.longest()), (0, None));
        set.add(5..5);
        assert_eq!(set.count(), 0);
    }

    #[test]
    #[should_panic(expected = "was free")]
    fn adding_twice_is_found() {
        let mut set = Ranges::default();
        set.add(10..20);
        set.add(19..30);
    }
}
