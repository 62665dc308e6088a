//! The model beside a store that is right, or wrong, stepped at random.

use std::ops::Range;

use bytes::Bytes;
use rand::Rng;
use vmem_testkit::model::{ReadToken, WriteToken};
use vmem_testkit::{Model, Seed, Settles, Violation};

/// A true store, stepped at random: calls start, take effect and end in any order, some are
/// abandoned. The model must accept all of it, and refuse what a store with a bug shows.
struct Simulation {
    model: Model,
    bytes: Vec<u8>,
    before: Vec<u8>,
    writes: Vec<(Option<WriteToken>, Range<usize>, Bytes, bool)>,
    reads: Vec<(ReadToken, Option<Vec<u8>>)>,
}

impl Simulation {
    fn new(seed: Seed, settles: Settles, len: usize) -> Self {
        let model = Model::with_settles(seed, settles);
        model.create(1, len);
        Simulation {
            model,
            bytes: vec![0; len],
            before: vec![0; len],
            writes: Vec::new(),
            reads: Vec::new(),
        }
    }

    /// One step; `Err` is what the model says.
    fn step(&mut self, rng: &mut impl Rng, settles: Settles) -> Result<(), Violation> {
        match rng.random_range(0..10) {
            0 | 1 if self.open_writes() < 5 => self.begin_write(rng, settles),
            2 if self.reads.len() < 5 => self.reads.push((self.model.begin_read(1), None)),
            3 | 4 if !self.writes.is_empty() => {
                let at = rng.random_range(0..self.writes.len());
                self.apply(at);
            }
            5 | 6 if !self.writes.is_empty() => {
                let at = rng.random_range(0..self.writes.len());
                self.end_write(at, rng.random_bool(0.3), settles);
            }
            7 if !self.reads.is_empty() => {
                let at = rng.random_range(0..self.reads.len());
                self.reads[at].1.get_or_insert(self.bytes.clone());
            }
            8 | 9 if !self.reads.is_empty() => {
                let (read, seen) = self.reads.swap_remove(rng.random_range(0..self.reads.len()));
                if let Some(bytes) = seen {
                    read.check(&bytes)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn open_writes(&self) -> usize {
        self.writes.iter().filter(|write| write.0.is_some()).count()
    }

    fn begin_write(&mut self, rng: &mut impl Rng, settles: Settles) {
        if settles == Settles::BeforeNextWrite {
            // What was abandoned before gives up when the next one starts.
            self.writes.retain(|write| write.0.is_some());
        }
        if self.writes.len() > 10 {
            // Some of what was abandoned is never applied.
            self.writes.retain(|write| write.0.is_some() || rng.random());
        }
        let len = self.bytes.len();
        let range = match rng.random_bool(0.5) {
            true => 0..len,
            false => {
                let from = rng.random_range(0..len);
                from..rng.random_range(from..=len)
            }
        };
        let write = self.model.begin_write_at(1, range.clone());
        let bytes = write.bytes();
        self.writes.push((Some(write), range, bytes, false));
    }

    fn apply(&mut self, at: usize) {
        let (_, range, bytes, applied) = &mut self.writes[at];
        if !*applied {
            *applied = true;
            self.before = self.bytes.clone();
            self.bytes[range.clone()].copy_from_slice(bytes);
        }
    }

    fn end_write(&mut self, at: usize, abandon: bool, settles: Settles) {
        if abandon {
            self.writes[at].0 = None;
            if settles == Settles::AtDrop {
                self.writes.swap_remove(at);
            }
        } else if self.writes[at].0.is_some() {
            self.apply(at);
            if let (Some(write), ..) = self.writes.swap_remove(at) {
                write.commit();
            }
        }
    }
}

#[test]
fn every_true_history_is_accepted() {
    Seed::run("every_true_history_is_accepted", |seed| {
        for settles in [Settles::AtDrop, Settles::BeforeNextWrite, Settles::Whenever] {
            for round in 0..150 {
                let seed = seed.fork_nth("round", round);
                let mut rng = seed.rng();
                let len = [1, 5, 64, 1000][round as usize % 4];
                let mut simulation = Simulation::new(seed, settles, len);
                for step in 0..400 {
                    let outcome = simulation.step(&mut rng, settles);
                    assert_eq!(outcome, Ok(()), "{settles:?}, round {round}, step {step}");
                }
            }
        }
    });
}

#[test]
fn a_store_that_forgets_a_write_is_found_out() {
    Seed::run("a_store_that_forgets_a_write_is_found_out", |seed| {
        let mut found = 0;
        for round in 0..100 {
            let seed = seed.fork_nth("round", round);
            let mut rng = seed.rng();
            let settles = Settles::BeforeNextWrite;
            let mut simulation = Simulation::new(seed, settles, 256);
            let refused = (0..2000).any(|_| {
                // Now and then the last write is undone, as a lost update would do.
                if rng.random_bool(0.05) {
                    simulation.bytes = simulation.before.clone();
                }
                simulation.step(&mut rng, settles).is_err()
            });
            found += u32::from(refused);
        }
        assert!(found > 90, "{found} of 100 histories with lost updates were refused");
    });
}
