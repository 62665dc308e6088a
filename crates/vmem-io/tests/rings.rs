//! The io_uring drivers with operations that stay in flight for as long as the test likes: on a
//! pipe, a read ends when the test writes, and a write when it reads.
//!
//! Invariant: what the kernel may still touch is owned, even if futures, the runtime and the driver
//! were dropped, in this order. Freed memory is poisoned, so that the kernel would send poison if
//! it were freed too early. A driver that is unavailable here is skipped aloud.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use common::eventually;
use futures::FutureExt;
use futures::executor::block_on;
use tokio::runtime::{Builder, Runtime};
use vmem_core::IoDriver;
use vmem_core::backend::IoBuf;
use vmem_io::driver::{Driver, Keep, ReadPiece, RingOptions, WriteRun, driver_over, is_closed};

const BOTH: [IoDriver; 2] = [IoDriver::Reactor, IoDriver::TokioUring];

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A driver over a file that is really a pipe. `None` where io_uring is unavailable.
fn driver(
    kind: IoDriver,
    runtime: &Runtime,
    fd: OwnedFd,
    queue_max: usize,
) -> Option<Arc<dyn Driver>> {
    let _inside = runtime.enter();
    let options = RingOptions { queue_max, ..Default::default() };
    let made = driver_over(kind, File::from(fd), options);
    match made {
        Ok(driver) => Some(driver),
        Err(error) => {
            println!("SKIPPED {kind:?}: {error}");
            None
        }
    }
}

/// Bytes that turn to poison when they are let go, and tell.
struct Poisoned {
    bytes: Box<[u8]>,
    gone: Arc<AtomicBool>,
}

impl AsRef<[u8]> for Poisoned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Poisoned {
    fn drop(&mut self) {
        self.bytes.fill(0xdd);
        self.gone.store(true, Ordering::SeqCst);
    }
}

fn poisoned(byte: u8, len: usize) -> (Bytes, Arc<AtomicBool>) {
    let gone = Arc::new(AtomicBool::new(false));
    let owner = Poisoned { bytes: vec![byte; len].into(), gone: Arc::clone(&gone) };
    (Bytes::from_owner(owner), gone)
}

/// A keep that tells when it is let go.
fn keep() -> (Keep, Arc<AtomicBool>) {
    let (bytes, gone) = poisoned(0, 1);
    (Keep::new(bytes), gone)
}

fn read(
    driver: &dyn Driver,
    len: usize,
    keep: Keep,
) -> futures::future::BoxFuture<'static, (IoBuf, Keep, io::Result<()>)> {
    let buf = IoBuf::from_vec(vec![0xee; len]);
    driver.read(buf, vec![ReadPiece { offset: 0, range: 0..len }], keep)
}

/// Nothing has ended by now, though there was time.
fn still_owned(what: &str, gone: &AtomicBool) {
    thread::sleep(Duration::from_millis(100));
    assert!(!gone.load(Ordering::SeqCst), "{what}: let go while the kernel has it");
}

#[test]
fn futures_then_the_runtime_then_the_driver_are_dropped_under_writes() {
    // More than a pipe holds, so that the write stays in flight until it is read.
    const LEN: usize = 1 << 20;
    for kind in BOTH {
        let runtime = runtime();
        let (mut reader, writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &runtime, writer.into(), 16) else { continue };
        let (bytes, gone) = poisoned(7, LEN);
        let (keep, released) = keep();
        let mut writing = driver.write(vec![WriteRun { offset: 0, parts: vec![bytes] }], keep);
        assert!((&mut writing).now_or_never().is_none());
        drop(writing);
        still_owned("the future was dropped", &gone);
        drop(runtime);
        still_owned("the runtime was dropped", &gone);
        let dropping = thread::spawn(move || drop(driver));
        still_owned("the driver is being dropped", &gone);
        still_owned("the same", &released);
        let mut got = vec![0; LEN];
        reader.read_exact(&mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == 7), "{kind:?}: poison was written");
        dropping.join().unwrap();
        eventually("all is let go", || {
            gone.load(Ordering::SeqCst) && released.load(Ordering::SeqCst)
        });
    }
}

#[test]
fn futures_then_the_runtime_then_the_driver_are_dropped_under_reads() {
    for kind in BOTH {
        let runtime = runtime();
        let (reader, mut writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &runtime, reader.into(), 16) else { continue };
        let mut kept = Vec::new();
        for _ in 0..4 {
            let (keep, released) = keep();
            let mut reading = read(&*driver, 5000, keep);
            assert!((&mut reading).now_or_never().is_none());
            kept.push(released);
        }
        for released in &kept {
            still_owned("the futures were dropped", released);
        }
        drop(runtime);
        still_owned("the runtime was dropped", &kept[0]);
        let dropping = thread::spawn(move || drop(driver));
        still_owned("the driver is being dropped", &kept[0]);
        // Short reads on the way: the kernel hands out what comes.
        for _ in 0..200 {
            writer.write_all(&[9; 100]).unwrap();
        }
        dropping.join().unwrap();
        for released in &kept {
            eventually("it is let go", || released.load(Ordering::SeqCst));
        }
    }
}

#[test]
fn a_future_outlives_the_runtime_of_its_driver() {
    for kind in BOTH {
        let first = runtime();
        let (reader, mut writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &first, reader.into(), 16) else { continue };
        let reading = read(&*driver, 3, Keep::none());
        drop(first);
        writer.write_all(b"abc").unwrap();
        let (buf, _, result) = block_on(reading);
        result.unwrap();
        assert_eq!(&buf[..], b"abc");
        let late = read(&*driver, 3, Keep::none());
        // Where that one was refused, the other end is closed.
        let _ = writer.write_all(b"def");
        // The reactor driver needs its runtime and says so; the other one goes on.
        let (buf, _, result) = block_on(late);
        match kind {
            IoDriver::Reactor => assert!(is_closed(&result.unwrap_err()) && buf.len() == 3),
            _ => assert_eq!((result.is_ok(), &buf[..]), (true, &b"def"[..])),
        }
    }
}

#[test]
fn a_thread_that_ends_takes_no_operation_along() {
    for kind in BOTH {
        let runtime = runtime();
        let (reader, mut writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &runtime, reader.into(), 16) else { continue };
        // The kernel cancels what a thread that ends had submitted.
        let reading =
            thread::scope(|scope| scope.spawn(|| read(&*driver, 4, Keep::none())).join().unwrap());
        thread::sleep(Duration::from_millis(50));
        writer.write_all(b"late").unwrap();
        let (buf, _, result) = block_on(reading);
        result.unwrap();
        assert_eq!(&buf[..], b"late");
    }
}

#[test]
fn a_full_queue_makes_futures_wait_in_order() {
    for kind in BOTH {
        let runtime = runtime();
        let (reader, mut writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &runtime, reader.into(), 1) else { continue };
        let mut readings: Vec<_> = (0..6).map(|_| read(&*driver, 1, Keep::none())).collect();
        for reading in &mut readings {
            assert!(reading.now_or_never().is_none(), "nothing is there to be read");
        }
        // An operation that has not started is dropped with its future.
        let (keep, released) = keep();
        let waiting = read(&*driver, 1, keep);
        drop(waiting);
        assert!(released.load(Ordering::SeqCst), "it had not started");
        for (nth, reading) in readings.into_iter().enumerate() {
            writer.write_all(&[nth as u8]).unwrap();
            let (buf, _, result) = block_on(reading);
            result.unwrap();
            assert_eq!(buf[0] as usize, nth, "{kind:?}: out of turn");
        }
    }
}

#[test]
fn close_waits_for_what_is_in_flight_and_refuses_the_rest() {
    for kind in BOTH {
        let runtime = runtime();
        let (reader, mut writer) = io::pipe().unwrap();
        let Some(driver) = driver(kind, &runtime, reader.into(), 1) else { continue };
        let running = read(&*driver, 2, Keep::none());
        let waiting = read(&*driver, 2, Keep::none());
        let mut closing = driver.close();
        assert!((&mut closing).now_or_never().is_none(), "a read is in flight");
        let (_, _, refused) = block_on(waiting);
        assert!(is_closed(&refused.unwrap_err()));
        writer.write_all(b"ok").unwrap();
        block_on(closing).unwrap();
        let (buf, _, result) = block_on(running);
        result.unwrap();
        assert_eq!(&buf[..], b"ok");
        // The file is closed, and so is the other end of the pipe.
        assert_eq!(writer.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}

/// How many descriptors, and threads, this process has.
fn counted() -> (usize, usize) {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// Runs alone, in a child process, so that other tests do not count.
#[test]
fn nothing_is_left_after_close_or_drop() {
    const ALONE: &str = "VMEM_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "nothing_is_left_after_close_or_drop", "--nocapture"]);
        let output = child.env(ALONE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        print!("{text}");
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("1 passed"));
        return;
    }
    for kind in BOTH {
        let runtime = runtime();
        // The threads of the runtime run once it has done something.
        runtime.block_on(async { tokio::spawn(async {}).await.unwrap() });
        thread::sleep(Duration::from_millis(50));
        let before = counted();
        for round in 0..4 {
            let fd = OwnedFd::from(tempfile::tempfile().unwrap());
            let Some(driver) = driver(kind, &runtime, fd, 16) else { break };
            let run = || WriteRun { offset: 0, parts: vec![vec![1; 9000].into()] };
            for _ in 0..20 {
                block_on(driver.write(vec![run()], Keep::none())).1.unwrap();
                block_on(driver.sync()).unwrap();
            }
            assert_ne!(counted(), before, "it has rings, and a file");
            if round % 2 == 0 {
                block_on(driver.close()).unwrap();
                assert_eq!(counted().0, before.0, "{kind:?}: descriptors after close");
            }
            drop(driver);
            // The kernel's own workers of a ring end a little later than the ring.
            eventually("nothing is left", || counted() == before);
        }
    }
}
