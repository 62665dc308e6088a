//! Which transfers move a list of chunks: adjacent extents go together.
//!
//! Invariant: every byte of every sealed chunk is moved exactly once, and nothing outside of the
//! extents is touched. Pure; called by the disk tier.

use std::ops::Range;

use bytes::Bytes;
use vmem_core::backend::{Extent, ReadChunk, Run};

use crate::driver::{ReadPiece, WriteRun};

/// What fills extents up to the block. No block is longer.
static ZEROS: [u8; 65536] = [0; 65536];

/// The runs that write these chunks, padded to their extents, in the order of the file.
pub(crate) fn write_runs(pieces: &[(Extent, Bytes)]) -> Vec<WriteRun> {
    let mut order: Vec<_> = pieces
        .iter()
        .flat_map(|(extent, payload)| {
            parts(extent, payload.len()).map(|(run, part)| (run, payload.slice(part)))
        })
        .collect();
    order.sort_by_key(|(run, _)| run.offset);
    let mut runs: Vec<WriteRun> = Vec::new();
    let mut end = None;
    for (Run { offset, footprint }, payload) in order {
        if end != Some(offset) {
            runs.push(WriteRun { offset, parts: Vec::new() });
        }
        if let Some(run) = runs.last_mut() {
            let padding = footprint as usize - payload.len();
            run.parts.push(payload);
            if padding > 0 {
                run.parts.push(Bytes::from_static(&ZEROS[..padding]));
            }
        }
        end = Some(offset + u64::from(footprint));
    }
    runs
}

/// Which bytes of a chunk of `len` bytes are in which run of its extent.
fn parts(extent: &Extent, len: usize) -> impl Iterator<Item = (Run, Range<usize>)> + '_ {
    let taking = extent.runs().filter(|run| run.footprint > 0);
    taking.scan(0, move |at, run| {
        let part = *at..len.min(*at + run.footprint as usize);
        *at = part.end;
        Some((run, part))
    })
}

/// The file ranges that the runs cover, in their order, which is that of the file.
pub(crate) fn run_ranges(runs: &[WriteRun]) -> Vec<Range<u64>> {
    runs.iter().map(|run| run.offset..run.offset + run.len()).collect()
}

/// The pieces that read the sealed ones of these chunks to their places in a buffer. Chunks that
/// are neighbours on both sides go together; only those that fill their extents have neighbours,
/// or the padding of others would land between them.
pub(crate) fn read_pieces(chunks: &[ReadChunk]) -> Vec<ReadPiece> {
    let mut pieces: Vec<ReadPiece> = Vec::new();
    let mut joinable = None;
    for ReadChunk { extent, at } in chunks {
        if extent.sum().is_none() || extent.is_empty() {
            continue;
        }
        for (run, part) in parts(extent, extent.len() as usize) {
            let range = at + part.start..at + part.end;
            let full = run.footprint as usize == range.len();
            let behind = (run.offset + u64::from(run.footprint), range.end);
            match pieces.last_mut() {
                Some(last) if joinable == Some((run.offset, range.start)) => {
                    last.range.end = range.end;
                }
                _ => pieces.push(ReadPiece { offset: run.offset, range }),
            }
            joinable = full.then_some(behind);
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmem_core::backend::{ExtentOwner, SharedOwner};

    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl ExtentOwner for Nobody {
        fn release(&self, _offset: u64, _footprint: u32) {}
    }

    fn extent(offset: u64, len: u32, sealed: bool) -> Extent {
        let footprint = len.next_multiple_of(512);
        let mut extent = Extent::new(offset, len, footprint, SharedOwner::new(Nobody));
        if sealed {
            extent.seal(0);
        }
        extent
    }

    fn chunk(offset: u64, len: u32) -> (Extent, Bytes) {
        (extent(offset, len, false), Bytes::from(vec![1; len as usize]))
    }

    #[test]
    fn adjacent_extents_are_one_run_in_any_order() {
        let runs = write_runs(&[
            chunk(4096, 700),
            chunk(0, 0),
            chunk(9216, 512),
            chunk(3072, 1024),
            chunk(5120, 100),
        ]);
        let lens: Vec<Vec<usize>> =
            runs.iter().map(|run| run.parts.iter().map(Bytes::len).collect()).collect();
        assert_eq!(lens, [vec![1024, 700, 324, 100, 412], vec![512]]);
        assert_eq!(run_ranges(&runs), [3072..5632, 9216..9728]);
        assert!(runs[0].parts[2].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn reads_join_full_chunks_alone() {
        let list = [
            extent(0, 1024, true),
            extent(1024, 600, true),
            extent(2048, 512, true),
            extent(0, 0, true),
            extent(2560, 512, true),
            extent(3072, 512, false),
            extent(3584, 512, true),
            extent(4096, 512, true),
        ];
        let pieces = read_pieces(&ReadChunk::in_sequence(list.map(Arc::new)));
        let got: Vec<_> = pieces.into_iter().map(|piece| (piece.offset, piece.range)).collect();
        let want = [(0, 0..1624), (2048, 1624..2648), (3584, 3160..4184)];
        assert_eq!(got, want);
    }
}
