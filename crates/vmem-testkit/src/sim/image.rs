//! The bytes of a simulated file.
//!
//! Invariant: a page holds zeros wherever nothing was written, and beyond the end of the file, so
//! that growing the file again never brings old bytes back. Called by the simulated driver, and by
//! tests that look at, or damage, what is stored.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Unit in which the image keeps memory, in bytes.
const PAGE: u64 = 64 * 1024;

/// Unit in which the file system gives out space, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// A sparse file in memory. Clones share what neither has changed since.
#[derive(Clone, Default)]
pub struct SparseImage {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

#[derive(Clone)]
struct Page {
    bytes: Arc<Vec<u8>>,
    // One bit for each block that takes space.
    blocks: u16,
}

impl SparseImage {
    /// A file of `len` bytes, all of them a hole.
    pub fn with_len(len: u64) -> Self {
        SparseImage { pages: BTreeMap::new(), len }
    }

    /// The length of the file, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Space that the file takes, in bytes: its blocks that are no hole.
    pub fn allocated_bytes(&self) -> u64 {
        let blocks = self.pages.values().map(|page| u64::from(page.blocks.count_ones()));
        blocks.sum::<u64>() * BLOCK_BYTES
    }

    /// Copies from `offset` into `buf`; holes and what is beyond the end are zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        for (page, within, range) in spans(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(held) => {
                    let from = &held.bytes[within..within + range.len()];
                    buf[range].copy_from_slice(from);
                }
                None => buf[range].fill(0),
            }
        }
    }

    /// The bytes from `offset` on; holes and what is beyond the end are zeros.
    pub fn read_vec(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Stores `data` at `offset`, making the file longer where it ends before.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, range) in spans(offset, data.len()) {
            let held = self.pages.entry(page).or_insert_with(Page::empty);
            held.blocks |= Page::mask(within, within + range.len());
            Arc::make_mut(&mut held.bytes)[within..within + range.len()]
                .copy_from_slice(&data[range]);
        }
        if !data.is_empty() {
            self.len = self.len.max(offset + data.len() as u64);
        }
    }

    /// Makes a hole: the range reads as zeros, and blocks that are wholly inside take no space.
    pub fn punch(&mut self, range: Range<u64>) {
        let end = range.end.min(self.pages_end());
        let first = range.start / PAGE;
        let inside: Vec<u64> = self.pages.range(first..).map(|(page, _)| *page).collect();
        for page in inside {
            let start = range.start.max(page * PAGE);
            let stop = end.min((page + 1) * PAGE);
            if start >= stop {
                continue;
            }
            let from = (start - page * PAGE) as usize;
            let to = (stop - page * PAGE) as usize;
            if let Some(held) = self.pages.get_mut(&page) {
                Arc::make_mut(&mut held.bytes)[from..to].fill(0);
                held.blocks &= !Page::inner_mask(from, to);
                if held.blocks == 0 {
                    self.pages.remove(&page);
                }
            }
        }
    }

    /// Sets the length, in bytes; what is cut off is gone, what is added reads as zeros.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let whole = len.next_multiple_of(BLOCK_BYTES);
            self.punch(len..whole);
            self.punch(whole..u64::MAX);
        }
        self.len = len;
    }

    /// Inverts bit `bit` (0 to 7) of the byte at `offset`.
    pub fn flip_bit(&mut self, offset: u64, bit: u8) {
        let byte = self.read_vec(offset, 1)[0] ^ (1 << (bit & 7));
        self.write(offset, &[byte]);
    }

    /// How many of `len` bytes from `offset` can be written while `free_bytes` of new space can be
    /// taken, and how much space those take.
    pub(super) fn fitting(&self, offset: u64, len: usize, free_bytes: u64) -> (usize, u64) {
        let mut taken = 0;
        for (page, within, range) in spans(offset, len) {
            let held = self.pages.get(&page).map_or(0, |held| held.blocks);
            let wanted = Page::mask(within, within + range.len()) & !held;
            for block in 0..PAGE / BLOCK_BYTES {
                if wanted & (1 << block) == 0 {
                    continue;
                }
                if taken + BLOCK_BYTES > free_bytes {
                    let start = page * PAGE + block * BLOCK_BYTES;
                    return (start.saturating_sub(offset) as usize, taken);
                }
                taken += BLOCK_BYTES;
            }
        }
        (len, taken)
    }

    fn pages_end(&self) -> u64 {
        self.pages.last_key_value().map_or(0, |(page, _)| (page + 1) * PAGE)
    }
}

impl Page {
    fn empty() -> Self {
        Page { bytes: Arc::new(vec![0; PAGE as usize]), blocks: 0 }
    }

    /// Blocks that the bytes `from..to` of the page touch.
    fn mask(from: usize, to: usize) -> u16 {
        let block = BLOCK_BYTES as usize;
        Page::bits(from / block, to.div_ceil(block))
    }

    /// Blocks that are wholly inside of `from..to`.
    fn inner_mask(from: usize, to: usize) -> u16 {
        let block = BLOCK_BYTES as usize;
        Page::bits(from.div_ceil(block), to / block)
    }

    fn bits(first: usize, end: usize) -> u16 {
        (first..end).fold(0, |mask, block| mask | 1 << block)
    }
}

/// Cuts `len` bytes from `offset` at pages: (page, offset within it, range of the caller's bytes).
fn spans(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let take = (PAGE as usize - within).min(len - done);
        let range = done..done + take;
        done += take;
        Some((at / PAGE, within, range))
    })
}

impl fmt::Debug for SparseImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SparseImage")
            .field("len", &self.len)
            .field("allocated_bytes", &self.allocated_bytes())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_bytes_are_read_across_pages() {
        let mut image = SparseImage::default();
        let data: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8 + 1).collect();
        image.write(65_000, &data);
        assert_eq!(image.len(), 265_000);
        assert_eq!(image.read_vec(65_000, data.len()), data);
        assert_eq!(image.read_vec(64_990, 10), [0; 10]);
        assert_eq!(image.read_vec(265_000, 10), [0; 10]);
    }

    #[test]
    fn holes_take_no_space_and_read_as_zeros() {
        let mut image = SparseImage::default();
        image.write(0, &[7; 3 * 4096]);
        assert_eq!(image.allocated_bytes(), 3 * 4096);
        image.punch(100..2 * 4096 + 1);
        assert_eq!(image.allocated_bytes(), 2 * 4096);
        assert_eq!(image.read_vec(99, 2), [7, 0]);
        assert_eq!(image.read_vec(2 * 4096, 2), [0, 7]);
        image.punch(0..u64::MAX);
        assert_eq!((image.allocated_bytes(), image.len()), (0, 3 * 4096));
    }

    #[test]
    fn a_cut_tail_does_not_come_back() {
        let mut image = SparseImage::default();
        image.write(0, &[7; 10_000]);
        image.set_len(5_000);
        image.set_len(10_000);
        assert_eq!(image.read_vec(4_999, 2), [7, 0]);
        assert_eq!(image.read_vec(9_000, 4), [0; 4]);
        assert_eq!(image.allocated_bytes(), 2 * 4096);
    }

    #[test]
    fn space_bounds_what_fits() {
        let mut image = SparseImage::default();
        image.write(4096, &[1; 4096]);
        assert_eq!(image.fitting(0, 3 * 4096, 4096), (2 * 4096, 4096));
        assert_eq!(image.fitting(100, 3 * 4096, 0), (0, 0));
        assert_eq!(image.fitting(4096, 4096, 0), (4096, 0));
        assert_eq!(image.fitting(4000, 200, 4096), (200, 4096));
    }
}
