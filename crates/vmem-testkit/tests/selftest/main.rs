//! The test tools under test: each must do what it says, and above all refuse what is wrong.

mod cancelling;
mod catalog_suite;
mod decorators;
mod disk_suite;
mod driver_suite;
mod faults;
mod histories;
mod linearisable;
mod modelling;
mod replay;
mod simulated;
mod tiny_disk;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, Keep, ReadPiece, WriteRun};
use vmem_testkit::sim::Speed;
use vmem_testkit::{SimConfig, SimDriver};

/// The message with which `test` panics.
fn message_of<T>(test: impl FnOnce() -> T) -> String {
    let payload: Box<dyn Any + Send> = match catch_unwind(AssertUnwindSafe(test)) {
        Ok(_) => panic!("what should have been refused passed"),
        Err(payload) => payload,
    };
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => {
            payload.downcast::<&str>().map_or_else(|_| String::new(), |s| s.to_string())
        }
    }
}

fn instant_disk() -> Arc<SimDriver> {
    SimDriver::new(SimConfig::default())
}

/// A disk on which everything takes its time and queues.
fn slow_disk() -> Arc<SimDriver> {
    SimDriver::new(SimConfig {
        speed: Speed {
            read_latency: Duration::from_millis(2),
            write_latency: Duration::from_millis(3),
            sync_latency: Duration::from_millis(5),
            bytes_per_second: Some(200_000_000),
            queue_depth: 4,
        },
        ..SimConfig::default()
    })
}

fn run(offset: u64, data: &[u8]) -> Vec<WriteRun> {
    vec![WriteRun { offset, parts: vec![bytes::Bytes::copy_from_slice(data)] }]
}

fn piece(offset: u64, len: usize) -> Vec<ReadPiece> {
    vec![ReadPiece { offset, range: 0..len }]
}

fn zeros(len: usize) -> IoBuf {
    IoBuf::from_vec(vec![0; len])
}

type Answer<T> = BoxFuture<'static, T>;

/// The calls of a driver, for tests that keep nothing; they start with the call.
trait Plain: Driver {
    fn start_read(&self, buf: IoBuf, pieces: Vec<ReadPiece>) -> Answer<(IoBuf, io::Result<()>)> {
        let reading = self.read(buf, pieces, Keep::none());
        Box::pin(async move {
            let (buf, _, result) = reading.await;
            (buf, result)
        })
    }

    fn start_write(&self, runs: Vec<WriteRun>) -> Answer<io::Result<()>> {
        let writing = self.write(runs, Keep::none());
        Box::pin(async move { writing.await.1 })
    }

    fn start_punch(&self, ranges: Vec<Range<u64>>) -> Answer<io::Result<()>> {
        let punching = self.punch(ranges, Keep::none());
        Box::pin(async move { punching.await.1 })
    }
}

impl<D: Driver + ?Sized> Plain for D {}

async fn read(driver: &dyn Driver, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let (buf, result) = driver.start_read(zeros(len), piece(offset, len)).await;
    result.map(|()| buf.to_vec())
}
