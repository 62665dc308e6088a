//! The allocator against a naive model: one byte per block.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const CHUNK: u32 = CHUNK_BYTES as u32;

fn seed(default: u64) -> u64 {
    std::env::var("VMEM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The same space as a bitmap, searched by brute force.
struct Model {
    block: u64,
    taken: Vec<bool>,
    extents: Vec<(u64, u32)>,
}

impl Model {
    fn used(&self) -> u64 {
        self.taken.iter().filter(|&&taken| taken).count() as u64 * self.block
    }

    fn runs(&self) -> Vec<u64> {
        let mut runs = vec![0];
        for &taken in &self.taken {
            match taken {
                true => runs.push(0),
                false => *runs.last_mut().unwrap() += self.block,
            }
        }
        runs
    }

    fn mark(&mut self, offset: u64, footprint: u64, value: bool) {
        let first = offset / self.block;
        for index in first..first + footprint / self.block {
            assert_ne!(self.taken[index as usize], value, "overlap at {offset}");
            self.taken[index as usize] = value;
        }
    }

    fn agree(&self, space: &Space) {
        let usage = space.usage();
        assert_eq!(usage.used_bytes, self.used());
        assert!(usage.used_bytes <= usage.capacity_bytes && usage.used_bytes <= usage.peak_bytes);
        assert_eq!(usage.extents, self.extents.len() as u64);
        let runs = self.runs();
        assert_eq!(usage.largest_free_bytes, *runs.iter().max().unwrap());
        // Complete coalescing: as many runs as the bitmap shows.
        let count = runs.iter().filter(|&&len| len > 0).count();
        assert_eq!(space.free.count(), count);
    }
}

fn random_lens(rng: &mut SmallRng) -> Vec<u32> {
    match rng.random_range(0..4) {
        0 => vec![rng.random_range(0..2048)],
        1 => (0..rng.random_range(1..6)).map(|_| rng.random_range(0..=CHUNK)).collect(),
        2 => {
            let mut lens = vec![CHUNK; rng.random_range(1..8)];
            lens.push(rng.random_range(0..=CHUNK));
            lens
        }
        _ => vec![rng.random_range(1..=CHUNK)],
    }
}

fn step_reserve(space: &mut Space, model: &mut Model, lens: &[u32]) {
    let total: u64 = lens.iter().map(|&len| space.footprint(len)).sum();
    let free = space.usage().capacity_bytes - model.used();
    let runs = model.runs();
    match space.reserve(lens) {
        Ok(placed) => {
            assert!(total <= free);
            assert_eq!(placed.len(), lens.len());
            let mut next = None;
            let fits_one = runs.iter().any(|&run| run >= total);
            for (pieces, &len) in placed.iter().zip(lens) {
                let footprint = space.footprint(len);
                let sum: u64 = pieces.iter().map(|run| u64::from(run.footprint)).sum();
                assert_eq!(sum, footprint, "its runs are what it takes");
                for run in pieces {
                    if footprint == 0 {
                        assert_eq!((run.offset, pieces.len()), (0, 1));
                    } else {
                        model.mark(run.offset, run.footprint.into(), true);
                        if fits_one {
                            let due = next.unwrap_or(run.offset);
                            assert_eq!(
                                (due, pieces.len()),
                                (run.offset, 1),
                                "contiguous where it fits"
                            );
                        }
                        next = Some(run.offset + u64::from(run.footprint));
                    }
                    model.extents.push((run.offset, run.footprint));
                }
            }
        }
        Err(no) => {
            assert_eq!((no.requested_bytes, no.free_bytes), (total, free));
            assert!(total > free, "{lens:?} would have fitted");
        }
    }
}

/// Where chunks go that are not taken apart.
fn starts_of(space: &mut Space, lens: &[u32]) -> Result<Vec<u64>, NoSpace> {
    let placed = space.reserve(lens)?;
    assert!(placed.iter().all(|runs| runs.len() == 1), "{placed:?}");
    Ok(placed.iter().map(|runs| runs[0].offset).collect())
}

#[test]
fn agrees_with_a_bitmap() {
    let seed = seed(0x5eed);
    eprintln!("VMEM_SEED={seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for block in [512, 4096] {
        let capacity = 4 * 1024 * 1024 + 17;
        let mut space = Space::new(capacity, block);
        let mut model = Model {
            block: u64::from(block),
            taken: vec![false; (capacity / u64::from(block)) as usize],
            extents: Vec::new(),
        };
        for round in 0..3_000 {
            // Waves: mostly filling, then mostly draining.
            if rng.random_bool(if round / 300 % 2 == 0 { 0.7 } else { 0.35 }) {
                let lens = random_lens(&mut rng);
                step_reserve(&mut space, &mut model, &lens);
            } else if !model.extents.is_empty() {
                let index = rng.random_range(0..model.extents.len());
                let (offset, footprint) = model.extents.swap_remove(index);
                model.mark(offset, u64::from(footprint), false);
                space.release(offset, footprint);
            }
            model.agree(&space);
        }
        for (offset, footprint) in model.extents.drain(..) {
            space.release(offset, footprint);
        }
        let usage = space.usage();
        assert_eq!((usage.used_bytes, usage.extents), (0, 0));
        assert_eq!(usage.largest_free_bytes, usage.capacity_bytes);
        assert_eq!(space.free.count(), 1);
    }
}

#[test]
fn all_or_nothing() {
    let mut space = Space::new(4 * 65536, 512);
    assert!(space.reserve(&[CHUNK; 5]).is_err());
    assert_eq!(space.usage(), Space::new(4 * 65536, 512).usage());
    let starts = starts_of(&mut space, &[CHUNK; 4]).unwrap();
    assert_eq!(starts, [0, 65536, 131_072, 196_608]);
    let full = space.reserve(&[1]).unwrap_err();
    assert_eq!((full.requested_bytes, full.free_bytes), (512, 0));
    assert_eq!(starts_of(&mut space, &[0, 0]), Ok(vec![0, 0]), "nothing always fits");
}

#[test]
fn chunks_scatter_over_the_holes() {
    let mut space = Space::new(8 * 65536, 512);
    let starts = starts_of(&mut space, &[CHUNK; 8]).unwrap();
    for index in [1, 3, 6] {
        space.release(starts[index], CHUNK);
    }
    let mut again = starts_of(&mut space, &[CHUNK, CHUNK, 100]).unwrap();
    again.sort_unstable();
    assert_eq!(again, [starts[1], starts[3], starts[6]]);
}

#[test]
fn the_order_of_the_chunks_does_not_decide() {
    // Free: a run of 64 KiB and one of 48 KiB. In order, the 40 KiB chunk would break the first.
    let mut space = Space::new(65536 + 512 + 49152, 512);
    let wall = 65536;
    let taken = starts_of(&mut space, &[CHUNK, 512, 49152]).unwrap();
    space.release(taken[0], CHUNK);
    space.release(taken[2], 49152);
    assert_eq!(taken[1], wall);
    let starts = starts_of(&mut space, &[40960, CHUNK]).unwrap();
    assert_eq!(starts[1], 0);
    assert!(starts[0] > wall);
}

#[test]
fn small_chunks_keep_away_from_large_ones() {
    let mut space = Space::new(1024 * 1024, 512);
    let large = starts_of(&mut space, &[CHUNK, CHUNK]).unwrap();
    let small = starts_of(&mut space, &[700]).unwrap();
    assert_eq!(large, [0, 65536]);
    assert_eq!(small, [1024 * 1024 - 1024]);
}

#[test]
#[should_panic(expected = "was free")]
fn a_double_release_is_caught() {
    let mut space = Space::new(1024 * 1024, 512);
    let starts = starts_of(&mut space, &[512, 512]).unwrap();
    space.release(starts[0], 512);
    space.release(starts[0], 512);
}

#[test]
fn odd_capacities_are_rounded_to_blocks() {
    assert_eq!(Space::new(511, 512).usage(), TierUsage::default());
    assert!(Space::new(0, 512).reserve(&[1]).is_err());
    assert_eq!(Space::new(1023, 512).usage().capacity_bytes, 512);
    let huge = starts_of(&mut Space::new(u64::MAX, 4096), &[CHUNK; 3]).unwrap();
    assert_eq!(huge, [0, 65536, 131_072]);
}

#[test]
fn a_chunk_is_taken_apart_where_nothing_else_is_left() {
    let mut space = Space::new(8 * 65536, 512);
    let small = starts_of(&mut space, &[32768; 16]).unwrap();
    for &start in small.iter().step_by(2) {
        space.release(start, 32768);
    }
    let placed = space.reserve(&[CHUNK, CHUNK, 40_000]).unwrap();
    assert!(placed.iter().all(|runs| runs.len() == 2), "{placed:?}");
    assert_eq!(space.usage().used_bytes, 8 * 32768 + 2 * 65536 + 40_448);
    let no = space.reserve(&[CHUNK, 30_000]).unwrap_err();
    assert_eq!((no.requested_bytes, no.free_bytes), (65536 + 30_208, 4 * 32768 - 65536 + 25_088));
}
