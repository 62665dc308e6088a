//! The extent allocator: which blocks of the data file are free, and the budget.
//!
//! Invariant: the free runs and `used` make up the file exactly; what is used never exceeds the
//! capacity. Called by the disk tier under its lock.
//!
//! Fragmentation: whatever is free in blocks is found, in the last resort by taking a chunk apart.
//! Three rules keep long runs long. Each request takes the shortest run that holds it. Requests
//! shorter than a full chunk take the high end of their run, and the highest of equal runs, while
//! longer ones take the low end, so that short-lived small chunks do not end up between large ones.
//! And a request that no single run holds is spread: first in order over the longest runs, and if
//! that fails longest chunk first, each into the shortest run that holds it. Only what does not fit
//! so, because free runs are shorter than chunks, goes in pieces, the longest first.

use smallvec::smallvec;
use vmem_core::backend::{CHUNK_BYTES, End, Ranges, Run, Runs, TierUsage};

/// The free runs and the ledger of one data file. Counts in blocks, speaks bytes.
#[derive(Debug)]
pub(crate) struct Space {
    block: u64,
    /// How many may be used.
    capacity: u64,
    /// How many there are: more than the capacity only where that was larger once.
    end: u64,
    peak: u64,
    extents: u64,
    free: Ranges,
}

/// A request that does not fit, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoSpace {
    /// What was asked for, rounding included.
    pub(crate) requested_bytes: u64,
    /// What is free: less than that.
    pub(crate) free_bytes: u64,
}

impl Space {
    /// All of `capacity_bytes` free, less what does not fill a block.
    pub(crate) fn new(capacity_bytes: u64, block_bytes: u32) -> Self {
        assert!(block_bytes.is_power_of_two(), "a block is a power of two");
        let block = u64::from(block_bytes);
        let mut space = Space {
            block,
            capacity: capacity_bytes / block,
            end: capacity_bytes / block,
            peak: 0,
            extents: 0,
            free: Ranges::default(),
        };
        space.free.add(0..space.end);
        space
    }

    /// The same, but for these extents, which are in the order of the file and do not overlap:
    /// offset and footprint in bytes. Where they lie beyond the capacity, so does what is free
    /// between them; what may be used is the capacity all the same.
    ///
    /// # Errors
    ///
    /// How many bytes they take, if that is more than the capacity.
    pub(crate) fn with_taken(
        capacity_bytes: u64,
        block_bytes: u32,
        taken: &[(u64, u32)],
    ) -> Result<Self, u64> {
        let mut space = Space::new(0, block_bytes);
        let block = space.block;
        let bytes: u64 = taken.iter().map(|&(_, footprint)| u64::from(footprint)).sum();
        space.capacity = capacity_bytes / block;
        if bytes / block > space.capacity {
            return Err(bytes);
        }
        let mut free_from = 0;
        for &(offset, footprint) in taken {
            let start = offset / block;
            let len = u64::from(footprint) / block;
            assert!(free_from <= start, "extents do not overlap");
            space.free.add(free_from..start);
            free_from = start + len;
        }
        space.end = space.capacity.max(free_from);
        space.free.add(free_from..space.end);
        space.peak = space.used();
        space.extents = taken.len() as u64;
        Ok(space)
    }

    /// What a chunk of `len` bytes takes, in bytes. An empty chunk takes nothing.
    pub(crate) fn footprint(&self, len: u32) -> u64 {
        u64::from(len).div_ceil(self.block) * self.block
    }

    /// The runs in which chunks of these lengths go: all of them, or nothing is taken.
    pub(crate) fn reserve(&mut self, lens: &[u32]) -> Result<Vec<Runs>, NoSpace> {
        let blocks: Vec<u64> = lens.iter().map(|&len| self.footprint(len) / self.block).collect();
        let total: u64 = blocks.iter().sum();
        let no_space = NoSpace {
            requested_bytes: total.saturating_mul(self.block),
            free_bytes: (self.capacity - self.used()) * self.block,
        };
        if total > self.capacity - self.used() {
            return Err(no_space);
        }
        let whole = self
            .contiguous(&blocks, total)
            .or_else(|| self.spread_in_order(&blocks))
            .or_else(|| self.spread_longest_first(&blocks));
        let placed: Vec<Runs> = match whole {
            Some(starts) => {
                let places = starts.into_iter().zip(blocks);
                places.map(|(start, len)| smallvec![self.run(start, len)]).collect()
            }
            None => blocks.into_iter().map(|len| self.in_pieces(len)).collect(),
        };
        self.extents += placed.iter().map(|runs| runs.len() as u64).sum::<u64>();
        self.peak = self.peak.max(self.used());
        assert!(self.peak <= self.capacity, "the disk budget holds");
        Ok(placed)
    }

    fn run(&self, start: u64, len: u64) -> Run {
        Run { offset: start * self.block, footprint: (len * self.block) as u32 }
    }

    /// A chunk in as few runs as there are; there is space for it.
    fn in_pieces(&mut self, len: u64) -> Runs {
        if len == 0 {
            return smallvec![self.run(0, 0)];
        }
        let mut runs = Runs::new();
        let mut left = len;
        while left > 0 {
            let whole = self.take_best(left).map(|start| start..start + left);
            let run = whole.unwrap_or_else(|| {
                let longest = self.free.take_longest();
                longest.expect("invariant: what is asked for is free")
            });
            let taken = run.end - run.start;
            runs.push(self.run(run.start, taken));
            left -= taken;
        }
        runs
    }

    /// Where the last block ends, in bytes.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.end * self.block
    }

    /// Gives back one run of an extent: `footprint` bytes at `offset`.
    pub(crate) fn release(&mut self, offset: u64, footprint: u32) {
        let footprint = u64::from(footprint);
        assert!(self.extents > 0, "an extent is released once");
        self.extents -= 1;
        if footprint > 0 {
            assert!(
                offset.is_multiple_of(self.block) && footprint.is_multiple_of(self.block),
                "extents consist of whole blocks"
            );
            self.give(offset / self.block, footprint / self.block);
        }
    }

    /// The numbers of the tier.
    pub(crate) fn usage(&self) -> TierUsage {
        TierUsage {
            capacity_bytes: self.capacity * self.block,
            used_bytes: self.used() * self.block,
            peak_bytes: self.peak * self.block,
            largest_free_bytes: self.free.longest_len() * self.block,
            extents: self.extents,
        }
    }

    fn used(&self) -> u64 {
        self.end - self.free.total()
    }

    /// One run for all chunks, in order.
    fn contiguous(&mut self, blocks: &[u64], total: u64) -> Option<Vec<u64>> {
        if total == 0 {
            return Some(vec![0; blocks.len()]);
        }
        let start = self.take_best(total)?;
        let mut starts = Vec::with_capacity(blocks.len());
        place(blocks, start, &mut starts);
        Some(starts)
    }

    /// The longest run takes as many of the next chunks as it holds, then the next longest.
    fn spread_in_order(&mut self, blocks: &[u64]) -> Option<Vec<u64>> {
        let mut starts = Vec::with_capacity(blocks.len());
        while starts.len() < blocks.len() {
            let rest = &blocks[starts.len()..];
            let longest = self.free.longest().unwrap_or(0..0);
            let (count, sum) = prefix_within(rest, longest.end - longest.start);
            if count == 0 {
                self.undo(blocks, &starts);
                return None;
            }
            let taken = self.free.take_exact(&(longest.start..longest.start + sum));
            assert!(taken, "a run holds what is taken");
            place(&rest[..count], longest.start, &mut starts);
        }
        Some(starts)
    }

    /// Longest chunk first, each into the shortest run that holds it.
    fn spread_longest_first(&mut self, blocks: &[u64]) -> Option<Vec<u64>> {
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(blocks[index]));
        let mut starts = vec![0; blocks.len()];
        for (done, &index) in order.iter().enumerate() {
            if blocks[index] == 0 {
                break;
            }
            let Some(start) = self.take_best(blocks[index]) else {
                for &taken in &order[..done] {
                    self.give(starts[taken], blocks[taken]);
                }
                return None;
            };
            starts[index] = start;
        }
        Some(starts)
    }

    fn undo(&mut self, blocks: &[u64], starts: &[u64]) {
        starts.iter().zip(blocks).for_each(|(&start, &len)| self.give(start, len));
    }

    /// Takes `len` blocks from the shortest run that holds them.
    fn take_best(&mut self, len: u64) -> Option<u64> {
        let is_long = len * self.block >= CHUNK_BYTES as u64;
        let run = self.free.take(len, if is_long { End::Low } else { End::High });
        run.map(|run| run.start)
    }

    /// Makes `len` blocks at `start` free.
    fn give(&mut self, start: u64, len: u64) {
        assert!(start + len <= self.end, "an extent lies in the file");
        self.free.add(start..start + len);
    }
}

/// Pushes the starts of chunks that lie one after the other from `start`; empty ones are at 0.
fn place(blocks: &[u64], mut start: u64, starts: &mut Vec<u64>) {
    for &len in blocks {
        starts.push(if len == 0 { 0 } else { start });
        start += len;
    }
}

/// How many of the first chunks fit into `limit` blocks, and how many blocks they take.
fn prefix_within(blocks: &[u64], limit: u64) -> (usize, u64) {
    let mut sum = 0;
    for (count, &len) in blocks.iter().enumerate() {
        if sum + len > limit {
            return (count, sum);
        }
        sum += len;
    }
    (blocks.len(), sum)
}

#[cfg(test)]
mod tests;
