//! The blocking driver over a file whose system calls fail, fall short, hang and panic on request.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use common::{Fault, FaultyFile, SharedFile, eventually, random_bytes, rng, watched};
use futures::FutureExt;
use futures::executor::block_on;
use rand::Rng;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{
    BlockingDriver, BlockingOptions, Driver, Keep, ReadPiece, WriteRun, is_closed,
};

const EINTR: i32 = 4;
const EIO: i32 = 5;
const EOPNOTSUPP: i32 = 95;

fn driver(
    script: impl FnMut(&'static str) -> Fault + Send + 'static,
    threads_max: usize,
    queue_max: usize,
) -> (BlockingDriver<SharedFile>, Arc<FaultyFile>) {
    let file = Arc::new(FaultyFile::new(script));
    let options = BlockingOptions { threads_max, queue_max, ..Default::default() };
    let driver = BlockingDriver::new(SharedFile(Arc::clone(&file)), options);
    (driver, file)
}

fn run(offset: u64, parts: &[&'static [u8]]) -> WriteRun {
    let parts = parts.iter().map(|part| Bytes::from_static(part)).collect();
    WriteRun { offset, parts }
}

fn piece(offset: u64, range: std::ops::Range<usize>) -> ReadPiece {
    ReadPiece { offset, range }
}

#[allow(clippy::single_range_in_vec_init, reason = "one range, and not its numbers")]
fn punch(driver: &impl Driver, range: std::ops::Range<u64>, keep: Keep) -> (Keep, io::Result<()>) {
    block_on(driver.punch(vec![range], keep))
}

fn buf(len: usize) -> IoBuf {
    IoBuf::from_vec(vec![0xee; len])
}

/// Tells when it is dropped.
struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn flag() -> (Keep, Arc<AtomicBool>) {
    let dropped = Arc::new(AtomicBool::new(false));
    (Keep::new(Flag(Arc::clone(&dropped))), dropped)
}

#[test]
fn short_and_interrupted_calls_move_every_byte() {
    let mut random = rng(3);
    let mut source = random.clone();
    let (driver, file) = driver(
        move |_| match random.random_range(0..8) {
            0 => Fault::Errno(EINTR),
            1 if random.random_bool(0.2) => Fault::None,
            _ => Fault::Short(random.random_range(1..700)),
        },
        4,
        16,
    );
    let mut expected = vec![0; 300_000];
    let mut runs = Vec::new();
    let mut at = 0;
    while at < 250_000 {
        let count = source.random_range(0..6);
        let parts: Vec<Bytes> = (0..count)
            .map(|_| {
                let len = source.random_range(0..3000);
                random_bytes(&mut source, len)
            })
            .collect();
        let run = WriteRun { offset: at as u64, parts };
        let all: Vec<u8> = run.parts.iter().flatten().copied().collect();
        expected[at..at + all.len()].copy_from_slice(&all);
        at += all.len() + source.random_range(0..2000);
        runs.push(run);
    }
    // More parts than one system call takes.
    let many: Vec<Bytes> = (0..5000_u32).map(|i| vec![i as u8; 7].into()).collect();
    let all: Vec<u8> = many.iter().flatten().copied().collect();
    expected[260_000..295_000].copy_from_slice(&all);
    runs.push(WriteRun { offset: 260_000, parts: many });
    block_on(driver.write(runs, Keep::none())).1.unwrap();
    assert_eq!(file.data.lock()[..], expected[..295_000]);

    let pieces = vec![piece(1000, 50_000..150_000), piece(200_000, 0..50_000), piece(9, 7..7)];
    let (got, _, result) = block_on(driver.read(buf(150_000), pieces, Keep::none()));
    result.unwrap();
    assert_eq!(got[50_000..], expected[1000..101_000]);
    assert_eq!(got[..50_000], expected[200_000..250_000]);
    assert!(file.calls.load(Ordering::SeqCst) > 500, "the faults happened");
}

#[test]
fn errors_keep_their_errno_and_the_driver_lives_on() {
    let fail = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fail);
    let script = move |_| match failing.load(Ordering::SeqCst) {
        true => Fault::Errno(EIO),
        false => Fault::None,
    };
    let (driver, _file) = driver(script, 2, 8);
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    let write = || block_on(driver.write(vec![run(0, &[b"abc"])], Keep::none())).1;
    let read = || block_on(driver.read(buf(3), vec![piece(0, 0..3)], Keep::none()));
    assert_eq!(errno(write()), Some(EIO));
    assert_eq!(errno(read().2), Some(EIO));
    assert_eq!(errno(block_on(driver.sync())), Some(EIO));
    assert_eq!(errno(punch(&driver, 0..4096, Keep::none()).1), Some(EIO));
    fail.store(false, Ordering::SeqCst);
    write().unwrap();
    let (got, _, result) = read();
    result.unwrap();
    assert_eq!(&got[..], b"abc");
}

#[test]
fn calls_without_progress_end() {
    let (driver, _file) = driver(|_| Fault::Errno(EINTR), 1, 8);
    let storm = block_on(driver.write(vec![run(0, &[b"a"])], Keep::none())).1;
    assert_eq!(storm.unwrap_err().kind(), io::ErrorKind::Interrupted);

    let (driver, _file) = self::driver(|_| Fault::Short(0), 1, 8);
    let zero = block_on(driver.write(vec![run(0, &[b"a"])], Keep::none())).1;
    assert_eq!(zero.unwrap_err().kind(), io::ErrorKind::WriteZero);
    // Nothing to write is no call at all.
    let empty = vec![run(0, &[b"", b""]), run(9, &[])];
    block_on(driver.write(empty, Keep::none())).1.unwrap();
    let (_, _, end) = block_on(driver.read(buf(1), vec![piece(0, 0..1)], Keep::none()));
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn impossible_requests_are_refused() {
    let (driver, _file) = driver(|_| Fault::None, 1, 8);
    let invalid = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    };
    let beyond = piece(0, 2..5);
    let (back, _, result) = block_on(driver.read(buf(4), vec![beyond], Keep::none()));
    assert_eq!(back.len(), 4, "the buffer comes back");
    invalid(result);
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = piece(0, 3..1);
    invalid(block_on(driver.read(buf(4), vec![backwards], Keep::none())).2);
    let wraps = run(u64::MAX - 1, &[b"abc"]);
    invalid(block_on(driver.write(vec![wraps], Keep::none())).1);
}

#[test]
fn a_panic_in_a_call_is_an_error_of_that_call() {
    let mut calls = 0;
    let script = move |_| {
        calls += 1;
        if calls % 2 == 1 { Fault::Panic } else { Fault::None }
    };
    let (driver, _file) = driver(script, 1, 2);
    for _ in 0..5 {
        let (keep, dropped) = flag();
        let (keep, result) = block_on(driver.write(vec![run(0, &[b"abc"])], keep));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::Other);
        assert!(!dropped.load(Ordering::SeqCst) && keep.take::<Flag>().is_some());
        let (back, _, result) = block_on(driver.read(buf(0), vec![piece(0, 0..0)], Keep::none()));
        result.unwrap();
        assert_eq!(back.len(), 0);
        block_on(driver.sync()).unwrap();
    }
    block_on(driver.close()).unwrap();
}

#[test]
fn a_dropped_future_frees_nothing_before_the_end() {
    let (driver, file) = driver(|_| Fault::None, 2, 8);
    file.hold();
    let (payload, freed) = watched(vec![7; 1000]);
    let (keep, released) = flag();
    let parts = vec![payload];
    drop(driver.write(vec![WriteRun { offset: 0, parts }], keep));
    let (read_keep, read_released) = flag();
    drop(driver.read(buf(1000), vec![piece(0, 0..1)], read_keep));
    eventually("both calls are entered", || file.entered.load(Ordering::SeqCst) == 2);
    for flag in [&freed, &released, &read_released] {
        assert!(!flag.load(Ordering::SeqCst));
    }
    file.let_go();
    for flag in [&freed, &released, &read_released] {
        eventually("freed at the end", || flag.load(Ordering::SeqCst));
    }
    assert_eq!(file.data.lock()[..], [7; 1000], "the write was done all the same");
}

#[test]
fn a_full_queue_makes_futures_wait_in_order() {
    let (driver, file) = driver(|_| Fault::None, 1, 2);
    file.hold();
    let write = |byte: &'static [u8], keep| driver.write(vec![run(0, &[byte])], keep);
    let first = write(b"1", Keep::none());
    let second = write(b"2", Keep::none());
    let (keep, dropped) = flag();
    let mut third = write(b"3", keep);
    let mut fourth = write(b"4", Keep::none());
    assert!((&mut third).now_or_never().is_none());
    assert!((&mut fourth).now_or_never().is_none());
    // A sync and a punch find their way: the tier has one each in flight.
    let sync = driver.sync();
    // It has not started, so that dropping it drops it.
    drop(third);
    assert!(dropped.load(Ordering::SeqCst));
    file.let_go();
    block_on(async {
        first.await.1.unwrap();
        second.await.1.unwrap();
        sync.await.unwrap();
        fourth.await.1.unwrap();
    });
    assert_eq!(file.data.lock()[..], *b"4");
}

#[test]
fn close_does_what_was_accepted_and_refuses_the_rest() {
    let (driver, file) = driver(|_| Fault::None, 1, 3);
    let closed_file = file.dropped();
    file.hold();
    let write = |offset| driver.write(vec![run(offset, &[b"x"])], Keep::none());
    let accepted: Vec<_> = (0..3).map(write).collect();
    let mut waiting = write(3);
    assert!((&mut waiting).now_or_never().is_none());
    let mut close = driver.close();
    assert!((&mut close).now_or_never().is_none(), "it waits");
    assert!(is_closed(&block_on(waiting).1.unwrap_err()));
    assert!(is_closed(&block_on(write(4)).1.unwrap_err()));
    assert!(is_closed(&block_on(driver.sync()).unwrap_err()));
    let (keep, dropped) = flag();
    let (keep, result) = punch(&driver, 0..9, keep);
    assert!(is_closed(&result.unwrap_err()) && !dropped.load(Ordering::SeqCst));
    drop(keep);
    file.let_go();
    block_on(close).unwrap();
    for write in accepted {
        block_on(write).1.unwrap();
    }
    assert_eq!(file.data.lock()[..], *b"xxx");
    block_on(driver.close()).unwrap();
    drop(file);
    assert!(closed_file.load(Ordering::SeqCst), "the driver let go of the file");
}

#[test]
fn punching_is_given_up_where_it_is_not_supported() {
    let (driver, file) = driver(|_| Fault::Errno(EOPNOTSUPP), 1, 3);
    for _ in 0..3 {
        let ranges = vec![0..4096, 8192..12_288];
        block_on(driver.punch(ranges, Keep::none())).1.unwrap();
    }
    assert_eq!(file.calls.load(Ordering::SeqCst), 1);
}
