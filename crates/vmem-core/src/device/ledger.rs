//! Which ranges of a device's memory are free.
//!
//! Invariant: the free ranges are disjoint, never touch each other, and together with what is used make up the
//! memory exactly. Called by backends under a lock of theirs.
//!
//! A request takes the shortest free range that holds it, the low end of it if it is long, the high end if it
//! is short, so that short ones do not end up between long ones. Taking and giving back cost
//! O(log ranges). What is free but lies in pieces serves nobody: whoever asks makes others leave until
//! a range is long enough, which ends at the latest when all have left that can.

use std::collections::{BTreeMap, BTreeSet};

use super::DeviceUsage;

/// Requests below this length, in bytes, take the high end of a range.
const SHORT_BYTES: u64 = 64 * 1024;

/// The free ranges of one memory, in bytes from its start.
///
/// ```
/// use vmem_core::backend::RangeLedger;
///
/// let mut ledger = RangeLedger::new(1 << 20, 512);
/// let (offset, footprint) = ledger.take(700).unwrap();
/// assert_eq!(footprint, 1024);
/// assert_eq!(ledger.usage().used_bytes, 1024);
/// ledger.give_back(offset, footprint);
/// assert_eq!(ledger.usage().largest_free_bytes, 1 << 20);
/// ```
#[derive(Debug)]
pub struct RangeLedger {
    unit: u64,
    capacity: u64,
    used: u64,
    peak: u64,
    /// Start of each free range, to its length.
    by_start: BTreeMap<u64, u64>,
    /// (length, start) of each free range.
    by_len: BTreeSet<(u64, u64)>,
}

impl RangeLedger {
    /// All of `capacity` bytes free, less what does not fill a `unit`; offsets and footprints are multiples of
    /// that.
    ///
    /// # Panics
    ///
    /// If `unit` is no power of two.
    pub fn new(capacity: u64, unit: u64) -> Self {
        assert!(unit.is_power_of_two(), "a unit is a power of two");
        let capacity = capacity / unit * unit;
        let mut ledger = RangeLedger {
            unit,
            capacity,
            used: 0,
            peak: 0,
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
        };
        if capacity > 0 {
            ledger.insert(0, capacity);
        }
        ledger
    }

    /// What `len` bytes take, rounding included, in bytes.
    pub fn footprint(&self, len: usize) -> u64 {
        (len as u64).max(1).checked_next_multiple_of(self.unit).unwrap_or(u64::MAX)
    }

    /// Takes memory for `len` bytes: its offset and its footprint.
    pub fn take(&mut self, len: usize) -> Option<(u64, u64)> {
        let footprint = self.footprint(len);
        let &(free, start) = self.by_len.range((footprint, 0)..).next()?;
        self.remove(start, free);
        let rest = free - footprint;
        let offset = match footprint < SHORT_BYTES {
            true => {
                self.insert(start, rest);
                start + rest
            }
            false => {
                self.insert(start + footprint, rest);
                start
            }
        };
        self.used += footprint;
        assert!(self.used <= self.capacity, "a budget is never exceeded");
        self.peak = self.peak.max(self.used);
        Some((offset, footprint))
    }

    /// Gives back what `take` returned.
    ///
    /// # Panics
    ///
    /// If it was not taken: the ledger is wrong then.
    pub fn give_back(&mut self, offset: u64, footprint: u64) {
        let end = offset + footprint;
        assert!(end <= self.capacity && footprint <= self.used, "what is given back was taken");
        let before = self.by_start.range(..end).next_back().map(|(&start, &len)| (start, len));
        assert!(
            before.is_none_or(|(start, len)| start + len <= offset),
            "what is given back was taken"
        );
        let (mut start, mut len) = (offset, footprint);
        if let Some((left, left_len)) = before.filter(|&(start, len)| start + len == offset) {
            self.remove(left, left_len);
            (start, len) = (left, len + left_len);
        }
        if let Some(&right_len) = self.by_start.get(&end) {
            self.remove(end, right_len);
            len += right_len;
        }
        self.insert(start, len);
        self.used -= footprint;
    }

    /// The figures, now.
    pub fn usage(&self) -> DeviceUsage {
        DeviceUsage {
            used_bytes: self.used,
            capacity_bytes: self.capacity,
            peak_bytes: self.peak,
            largest_free_bytes: self.by_len.last().map_or(0, |&(len, _)| len),
        }
    }

    fn insert(&mut self, start: u64, len: u64) {
        if len > 0 {
            self.by_start.insert(start, len);
            self.by_len.insert((len, start));
        }
    }

    fn remove(&mut self, start: u64, len: u64) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_disjoint_and_all_comes_back() {
        let mut ledger = RangeLedger::new(1 << 20, 512);
        let mut random = 7_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        let mut taken: Vec<(u64, u64)> = Vec::new();
        let mut refused = 0;
        for _ in 0..20_000 {
            if next(2) == 0 && !taken.is_empty() {
                let (offset, footprint) = taken.swap_remove(next(taken.len() as u64) as usize);
                ledger.give_back(offset, footprint);
            } else {
                let longest = if next(4) == 0 { 200_000 } else { 3000 };
                let len = 1 + next(longest) as usize;
                match ledger.take(len) {
                    Some(range) => taken.push(range),
                    None => {
                        refused += 1;
                        assert!(ledger.usage().largest_free_bytes < ledger.footprint(len));
                    }
                }
            }
            let used: u64 = taken.iter().map(|range| range.1).sum();
            assert_eq!(ledger.usage().used_bytes, used);
            let mut sorted = taken.clone();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
        }
        assert!(refused > 100, "it was full now and then");
        for (offset, footprint) in taken {
            ledger.give_back(offset, footprint);
        }
        assert_eq!(ledger.usage().largest_free_bytes, 1 << 20);
        assert_eq!(ledger.take(usize::MAX), None);
    }

    #[test]
    #[should_panic(expected = "was taken")]
    fn giving_back_twice_is_found() {
        let mut ledger = RangeLedger::new(4096, 512);
        let (offset, footprint) = ledger.take(10).unwrap();
        let _other = ledger.take(10).unwrap();
        ledger.give_back(offset, footprint);
        ledger.give_back(offset, footprint);
    }
}
