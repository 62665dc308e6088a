//! The conformance suites over every driver that this machine has: by direct I/O and through the
//! page cache, on one thread and on several.
//!
//! Invariant: a driver that is unavailable here is skipped aloud, never silently.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};
use vmem_core::IoDriver;
use vmem_io::DiskTier;
use vmem_io::driver::{Alignment, Driver, RingOptions, driver_over};
use vmem_testkit::Seed;
use vmem_testkit::conformance::{disk, driver};

/// A driver over a new, empty file.
fn make(
    kind: IoDriver,
    direct: bool,
    rings: usize,
    queue_max: usize,
) -> io::Result<Arc<dyn Driver>> {
    let scratch = || -> io::Result<File> { tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")) };
    let file = scratch()?;
    let alignment = match direct {
        true => Alignment::probe(&file, &scratch()?)?,
        false => Alignment::NONE,
    };
    let options = RingOptions { alignment, rings, queue_max, ..Default::default() };
    driver_over(kind, file, options)
}

fn runtime(threads: usize) -> Runtime {
    let mut builder = match threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder.worker_threads(threads.max(1)).enable_all().build().unwrap()
}

/// Calls `check` with each variant that is to be had.
fn variants(check: impl Fn(&Runtime, &dyn Fn() -> Arc<dyn Driver>)) {
    let mut tried = 0;
    for kind in [IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking] {
        for (direct, threads, rings, queue_max) in
            [(true, 2, 2, 256), (true, 1, 1, 16), (false, 2, 1, 256), (false, 1, 3, 16)]
        {
            let runtime = runtime(threads);
            let _inside = runtime.enter();
            let make = || make(kind, direct, rings, queue_max);
            if let Err(error) = make() {
                println!("SKIPPED {kind:?}, direct: {direct}: {error}");
                continue;
            }
            println!("{kind:?}, direct: {direct}, {threads} threads, {rings} rings, {queue_max}");
            let began = std::time::Instant::now();
            check(&runtime, &|| make().expect("it was to be had before"));
            println!("    in {:?}", began.elapsed());
            tried += 1;
        }
    }
    assert!(tried >= 2, "the blocking driver is to be had everywhere");
}

#[test]
fn every_driver_passes_the_driver_suite() {
    Seed::run("every_driver_passes_the_driver_suite", |seed| {
        variants(|runtime, make| runtime.block_on(driver::all(seed, async || make())));
    });
}

#[test]
fn every_driver_passes_the_disk_suite() {
    Seed::run("every_driver_passes_the_disk_suite", |seed| {
        variants(|runtime, make| {
            runtime.block_on(disk::all(seed, async || DiskTier::new(make(), 16 << 20)));
        });
    });
}
