//! What a power cut would leave.
//!
//! Invariant: `durable` holds what a completed sync covered and nothing else; `changes` is
//! everything since, in order. Called by the simulated driver when power cuts are simulated.

use std::ops::Range;

use rand::Rng;

use super::image::SparseImage;

/// What a disk writes as one, in bytes.
const SECTOR: u64 = 512;

#[derive(Debug)]
pub(super) struct Journal {
    durable: SparseImage,
    changes: Vec<Change>,
    next: u64,
}

#[derive(Debug)]
struct Change {
    number: u64,
    range: Range<u64>,
    // `None` is a hole.
    data: Option<Vec<u8>>,
}

impl Change {
    fn apply(&self, image: &mut SparseImage) {
        match &self.data {
            Some(data) => image.write(self.range.start, data),
            None => image.punch(self.range.clone()),
        }
    }
}

impl Journal {
    pub(super) fn new(durable: SparseImage) -> Self {
        Journal { durable, changes: Vec::new(), next: 0 }
    }

    pub(super) fn wrote(&mut self, offset: u64, data: &[u8]) {
        self.push(offset..offset + data.len() as u64, Some(data.to_vec()));
    }

    pub(super) fn punched(&mut self, range: Range<u64>) {
        self.push(range, None);
    }

    fn push(&mut self, range: Range<u64>, data: Option<Vec<u8>>) {
        let number = self.next;
        self.next += 1;
        self.changes.push(Change { number, range, data });
    }

    /// The point in the order of changes up to which a sync that is called now covers.
    pub(super) fn barrier(&self) -> u64 {
        self.next
    }

    pub(super) fn synced(&mut self, barrier: u64) {
        for change in self.changes.extract_if(.., |change| change.number < barrier) {
            change.apply(&mut self.durable);
        }
    }

    /// A sync failed: the cache forgot these changes, and no later sync brings them to disk.
    pub(super) fn sync_failed(&mut self, barrier: u64) {
        self.changes.retain(|change| change.number >= barrier);
    }

    /// Damage from outside reaches what is on the medium too.
    pub(super) fn damage(&mut self, damage: impl FnOnce(&mut SparseImage)) {
        damage(&mut self.durable);
    }

    /// One of the images that a power cut at this moment may leave: of the changes since the last
    /// sync each is kept, lost or torn between sectors. Where changes overlap, losing the later
    /// one is what writing them in the other order gives.
    pub(super) fn crash(&self, rng: &mut impl Rng) -> SparseImage {
        let mut after = self.durable.clone();
        let mut left = self.durable.clone();
        for change in &self.changes {
            change.apply(&mut after);
            let fate = rng.random_range(0..3);
            if fate == 0 {
                continue;
            }
            let first = change.range.start / SECTOR;
            let end = change.range.end.min(after.len()).div_ceil(SECTOR);
            for sector in first..end {
                if fate == 1 || rng.random() {
                    copy_sector(&after, &mut left, sector * SECTOR);
                }
            }
        }
        left
    }
}

fn copy_sector(from: &SparseImage, to: &mut SparseImage, offset: u64) {
    let len = SECTOR.min(from.len().saturating_sub(offset));
    to.write(offset, &from.read_vec(offset, len as usize));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seed;

    #[test]
    fn synced_bytes_survive_and_others_may() {
        let mut journal = Journal::new(SparseImage::default());
        journal.wrote(0, &[1; 2048]);
        journal.synced(journal.barrier());
        journal.wrote(2048, &[2; 2048]);
        journal.wrote(1024, &[3; 1024]);
        let mut kept = 0;
        let mut lost = 0;
        let mut torn = 0;
        for n in 0..200 {
            let image = journal.crash(&mut Seed::new(n).rng());
            assert_eq!(image.read_vec(0, 1024), [1; 1024]);
            let tail = image.read_vec(2048, 2048);
            for sector in tail.chunks(512) {
                assert!(sector == [2; 512] || sector == [0; 512], "a sector is torn");
            }
            match tail.iter().filter(|byte| **byte == 2).count() {
                2048 => kept += 1,
                0 => lost += 1,
                _ => torn += 1,
            }
            let middle = image.read_vec(1024, 512);
            assert!(middle == [1; 512] || middle == [3; 512]);
        }
        assert!(kept > 20 && lost > 20 && torn > 20, "{kept} {lost} {torn}");
    }

    #[test]
    fn a_failed_sync_loses_what_it_covered() {
        let mut journal = Journal::new(SparseImage::default());
        journal.wrote(0, &[1; 512]);
        journal.sync_failed(journal.barrier());
        journal.synced(journal.barrier());
        for n in 0..20 {
            assert_eq!(journal.crash(&mut Seed::new(n).rng()).read_vec(0, 1), [0]);
        }
    }
}
