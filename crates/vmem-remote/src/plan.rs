//! Which requests reads make: chunks by segment, near ranges joined, also those of different calls.
//!
//! Invariant: each chunk is in exactly one group, and within its range; a group is of one segment
//! and no longer than asked, unless it has one chunk. Called by reads and compactions.

use std::ops::Range;

use crate::ledger::Placed;

/// A chunk that is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) placed: Placed,
    /// Which of the calls that are read together wants it.
    pub(crate) call: usize,
    /// Where in the buffer of the call it goes.
    pub(crate) to: usize,
    /// Its index in the call.
    pub(crate) chunk: usize,
}

/// What one request reads.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) segment: u64,
    pub(crate) range: Range<u64>,
    /// In the order of the segment.
    pub(crate) chunks: Vec<Wanted>,
}

impl Group {
    /// The calls that want something of it, each once.
    pub(crate) fn calls(&self) -> impl Iterator<Item = usize> + '_ {
        let mut calls: Vec<usize> = self.chunks.iter().map(|wanted| wanted.call).collect();
        calls.sort_unstable();
        calls.dedup();
        calls.into_iter()
    }

    /// Hands the parts of `bytes`, which begin at `at` of the segment, to the calls that want them,
    /// and to where they go in the buffers. What lies between chunks is left out.
    pub(crate) fn scatter(&self, at: u64, bytes: &[u8], mut put: impl FnMut(usize, usize, &[u8])) {
        let end = at + bytes.len() as u64;
        let first = self.chunks.partition_point(|wanted| wanted.placed.end() <= at);
        let touched = self.chunks[first..].iter().take_while(|wanted| wanted.placed.at < end);
        for Wanted { placed, call, to, .. } in touched {
            let from = placed.at.max(at);
            let until = placed.end().min(end);
            let part = &bytes[(from - at) as usize..(until - at) as usize];
            put(*call, to + (from - placed.at) as usize, part);
        }
    }
}

/// The requests for these chunks. Gaps of up to `gap_bytes` are read with what lies around them.
pub(crate) fn groups(mut wanted: Vec<Wanted>, gap_bytes: u64, get_bytes: u64) -> Vec<Group> {
    wanted.sort_unstable_by_key(|wanted| (wanted.placed.segment, wanted.placed.at));
    let mut groups: Vec<Group> = Vec::new();
    for wanted in wanted {
        let placed = wanted.placed;
        let end = placed.end();
        match groups.last_mut() {
            Some(group)
                if group.segment == placed.segment
                    && placed.at <= group.range.end + gap_bytes
                    && end.max(group.range.end) - group.range.start <= get_bytes =>
            {
                group.range.end = group.range.end.max(end);
                group.chunks.push(wanted);
            }
            _ => groups.push(Group {
                segment: placed.segment,
                range: placed.at..end,
                chunks: vec![wanted],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(segment: u64, at: u64, len: u32, to: usize) -> Wanted {
        Wanted { placed: Placed { segment, at, len, sum: 0 }, call: 0, to, chunk: 0 }
    }

    #[test]
    fn near_ranges_of_a_segment_are_one_request() {
        let all = vec![
            wanted(2, 0, 10, 0),
            wanted(1, 30, 10, 10),
            wanted(1, 0, 10, 20),
            wanted(1, 45, 10, 30),
            wanted(1, 15, 10, 40),
        ];
        let ranges = |gap, most| -> Vec<_> {
            let groups = groups(all.clone(), gap, most);
            groups.into_iter().map(|group| (group.segment, group.range)).collect()
        };
        assert_eq!(ranges(5, 100), [(1, 0..55), (2, 0..10)]);
        assert_eq!(ranges(4, 100), [(1, 0..10), (1, 15..25), (1, 30..40), (1, 45..55), (2, 0..10)]);
        assert_eq!(ranges(5, 40), [(1, 0..40), (1, 45..55), (2, 0..10)]);
    }

    #[test]
    fn bodies_in_pieces_reach_their_places() {
        let object: Vec<u8> = (0..100).collect();
        let chunks = vec![wanted(1, 50, 20, 0), wanted(1, 10, 15, 40), wanted(1, 50, 20, 70)];
        for piece in 1..=90 {
            let mut buf = [255; 100];
            for group in groups(chunks.clone(), 30, 100) {
                assert_eq!(group.range, 10..70);
                for at in group.range.clone().step_by(piece) {
                    let end = group.range.end.min(at + piece as u64);
                    group.scatter(at, &object[at as usize..end as usize], |_, to, bytes| {
                        buf[to..to + bytes.len()].copy_from_slice(bytes);
                    });
                }
            }
            assert_eq!(buf[..20], object[50..70]);
            assert_eq!(buf[40..55], object[10..25]);
            assert_eq!(buf[70..90], object[50..70]);
            let between = buf[20..40].iter().chain(&buf[55..70]).chain(&buf[90..]);
            assert!(between.into_iter().all(|byte| *byte == 255), "gaps are left alone");
        }
    }
}
