//! The driver suite passes what is right and fails what is broken.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{
    BlockingDriver, BlockingOptions, Driver, Keep, ReadPiece, WriteRun, is_closed,
};
use vmem_testkit::conformance::driver;
use vmem_testkit::{
    DelayDriver, Fault, FaultDriver, FaultPlan, GateDriver, OpKind, Seed, SimConfig, SimDriver,
    ThrottleDriver, TraceDriver, When,
};

use crate::{Answer, instant_disk, message_of, slow_disk};

#[test]
fn simulated_disks_pass() {
    Seed::simulate("simulated_disks_pass", |seed| async move {
        driver::all(seed, async || instant_disk()).await;
        driver::all(seed, async || slow_disk()).await;
        let coarse = || SimConfig { block_bytes: 4096, ..SimConfig::default() };
        driver::all(seed, async || SimDriver::new(coarse())).await;
    });
}

#[test]
fn simulated_disks_pass_in_real_time_on_many_threads() {
    Seed::run("simulated_disks_pass_in_real_time_on_many_threads", |seed| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build();
        let suite = driver::all(seed, async || instant_disk());
        runtime.unwrap().block_on(suite);
    });
}

#[test]
fn the_blocking_driver_passes() {
    Seed::run("the_blocking_driver_passes", |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let make = async || {
            let file = tempfile::tempfile().expect("a place for temporary files");
            Arc::new(BlockingDriver::new(file, BlockingOptions::default()))
        };
        runtime.unwrap().block_on(driver::all(seed, make));
    });
}

#[test]
fn decorators_are_drivers() {
    Seed::simulate("decorators_are_drivers", |seed| async move {
        let delays = Duration::ZERO..Duration::from_millis(9);
        let delay = async || DelayDriver::new(slow_disk(), seed, delays.clone());
        driver::all(seed, async || delay().await).await;
        driver::all(seed, async || ThrottleDriver::new(instant_disk(), 100_000_000)).await;
        driver::all(seed, async || GateDriver::new(slow_disk(), &[])).await;
        driver::all(seed, async || TraceDriver::new(slow_disk())).await;
        driver::all(seed, async || FaultDriver::new(slow_disk(), seed)).await;
    });
}

/// How the suite fails on a driver.
fn failure(make: impl Fn() -> Arc<dyn Driver>) -> String {
    message_of(|| Seed::simulate("a_broken_driver", |seed| driver::all(seed, async || make())))
}

fn faulty(kind: OpKind, when: When, fault: Fault) -> String {
    failure(|| {
        let driver = FaultDriver::new(instant_disk(), Seed::new(3));
        driver.set(FaultPlan::new().on(kind, when, fault));
        driver
    })
}

#[test]
fn a_short_read_taken_for_success_fails() {
    let message = faulty(OpKind::Read, When::Nth(5), Fault::ShortRead);
    assert!(message.contains("is 0xa5 and not"), "{message}");
}

#[test]
fn bytes_from_another_offset_fail() {
    let message = faulty(OpKind::Read, When::Nth(5), Fault::MisdirectedRead);
    assert!(message.contains("a round trip"), "{message}");
}

#[test]
fn a_dropped_write_fails() {
    let message = faulty(OpKind::Write, When::Nth(9), Fault::LostWrite);
    assert!(message.contains("a round trip"), "{message}");
}

#[test]
fn a_misdirected_write_fails() {
    let message = faulty(OpKind::Write, When::Nth(9), Fault::MisdirectedWrite);
    assert!(message.contains("a round trip"), "{message}");
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    /// Starts an operation at the first poll.
    Lazy,
    /// Never frees the memory of a write.
    Leaks,
    /// Says nothing after `close`.
    HangsOnceClosed,
    /// Takes the end of the file for zeros.
    EndIsZeros,
    /// Fills the buffer between the pieces too.
    Scribbles,
    /// `close` does not wait.
    ClosesEarly,
    /// A punch does nothing.
    PunchesNothing,
    /// Panics at a range outside of the buffer.
    Panics,
    /// Drops what an operation keeps at its start.
    LosesKeep,
    /// Holds what an operation keeps for ever.
    HoardsKeep,
    /// Swaps the offsets of the first two pieces of a read.
    SwapsPieces,
}

#[derive(Debug)]
struct Broken {
    inner: Arc<SimDriver>,
    bug: Bug,
    closed: Mutex<bool>,
    leaked: Mutex<Vec<Bytes>>,
    hoard: Mutex<Vec<Keep>>,
}

impl Broken {
    fn lazily<T: Send + 'static>(
        &self,
        start: impl FnOnce(&SimDriver) -> Answer<T> + Send + 'static,
    ) -> Answer<T> {
        let inner = self.inner.clone();
        let hangs = self.bug == Bug::HangsOnceClosed && *self.closed.lock();
        match self.bug {
            _ if hangs => Box::pin(std::future::pending()),
            Bug::Lazy => Box::pin(async move { start(&inner).await }),
            _ => start(&inner),
        }
    }
}

impl Driver for Broken {
    fn read(
        &self,
        mut buf: IoBuf,
        mut pieces: Vec<ReadPiece>,
        keep: Keep,
    ) -> Answer<(IoBuf, Keep, io::Result<()>)> {
        match self.bug {
            Bug::Panics => pieces.iter().for_each(|piece| assert!(piece.range.end <= buf.len())),
            Bug::Scribbles if pieces.len() > 1 => buf.fill(0),
            Bug::SwapsPieces if pieces.len() > 1 => {
                let first = pieces[0].offset;
                pieces[0].offset = std::mem::replace(&mut pieces[1].offset, first);
            }
            _ => {}
        }
        let forgives = self.bug == Bug::EndIsZeros;
        let reading = self.lazily(move |inner| inner.read(buf, pieces, keep));
        Box::pin(async move {
            match reading.await {
                (buf, keep, Err(error)) if forgives && !is_closed(&error) => (buf, keep, Ok(())),
                other => other,
            }
        })
    }

    fn write(&self, runs: Vec<WriteRun>, keep: Keep) -> Answer<(Keep, io::Result<()>)> {
        if self.bug == Bug::Leaks {
            self.leaked.lock().extend(runs.iter().flat_map(|run| run.parts.clone()));
        }
        if self.bug == Bug::LosesKeep {
            drop(keep);
            return self.lazily(|inner| inner.write(runs, Keep::none()));
        }
        if self.bug == Bug::HoardsKeep {
            self.hoard.lock().push(keep);
            return self.lazily(|inner| inner.write(runs, Keep::none()));
        }
        self.lazily(|inner| inner.write(runs, keep))
    }

    fn punch(&self, ranges: Vec<Range<u64>>, keep: Keep) -> Answer<(Keep, io::Result<()>)> {
        match self.bug {
            Bug::PunchesNothing => Box::pin(std::future::ready((keep, Ok(())))),
            _ => self.lazily(|inner| inner.punch(ranges, keep)),
        }
    }

    fn sync(&self) -> Answer<io::Result<()>> {
        self.lazily(|inner| inner.sync())
    }

    fn close(&self) -> Answer<io::Result<()>> {
        *self.closed.lock() = true;
        let closing = self.inner.close();
        match self.bug {
            Bug::ClosesEarly => Box::pin(std::future::ready(Ok(()))),
            _ => closing,
        }
    }

    fn block_bytes(&self) -> u32 {
        self.inner.block_bytes()
    }

    fn describe(&self) -> Arc<str> {
        "broken".into()
    }
}

#[test]
fn every_planted_bug_fails() {
    let bugs = [
        (Bug::Lazy, "dropped unpolled"),
        (Bug::Leaks, "memory of a write is let go"),
        (Bug::HangsOnceClosed, "no end after"),
        (Bug::EndIsZeros, "UnexpectedEof"),
        (Bug::Scribbles, "the buffer between pieces"),
        (Bug::ClosesEarly, "close did not wait"),
        (Bug::PunchesNothing, "a file with holes"),
        (Bug::Panics, "piece.range.end <= buf.len()"),
        (Bug::SwapsPieces, "a piece"),
        (Bug::LosesKeep, "a write let go of what it was to keep"),
        (Bug::HoardsKeep, "a write gave something else back"),
    ];
    for (bug, symptom) in bugs {
        let message = failure(|| {
            Arc::new(Broken {
                inner: slow_disk(),
                bug,
                closed: Mutex::new(false),
                leaked: Mutex::default(),
                hoard: Mutex::default(),
            })
        });
        assert!(message.contains(symptom), "{bug:?}: {message}");
    }
}
