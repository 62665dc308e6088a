//! Scenario 42: the clock of tokio is paused, or jumps, above real I/O.
//!
//! Excluded: a timer of virtual time over real work, which makes that work late as soon as the
//! runtime is idle. Noticed by a call that ends by a deadline although it has nothing to wait for.

use std::time::Duration;

use tokio::runtime::Builder;
use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::CudaContext;
use vmem::{IoDriver, VirtualMemory, VirtualMemoryError};

use crate::calls::{Call, LEN, Subject};
use crate::harness::{CLOSE_BOUND, WAIT, assert_none, attempt};
use crate::stores::{
    DISK, HOST, KIB, MIB, Place, Sizes, Store, VRAM, bytes, check, cold, fill_host, on_a_device,
    open,
};

const SIZES: Sizes = Sizes { space: 4 * MIB, disk: 64 * MIB };
const ROUNDS: usize = 10;

/// Runs a test on a paused clock; the bound is of real time.
fn paused(
    what: &str,
    test: impl AsyncFnOnce() -> Result<(), String> + Send + 'static,
) -> Result<(), String> {
    let ended = attempt(what, 6 * WAIT, move || {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().start_paused(true).build().unwrap();
        let output = runtime.block_on(test());
        runtime.shutdown_background();
        output
    });
    ended?.map_err(|why| format!("{what}: {why}"))
}

/// Counts the errors of many calls, and names the first.
#[derive(Default)]
struct Errors {
    calls: usize,
    errors: usize,
    first: Option<String>,
}

impl Errors {
    fn see<T>(&mut self, what: &str, result: Result<T, VirtualMemoryError>) -> Option<T> {
        self.calls += 1;
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.errors += 1;
                self.first.get_or_insert_with(|| format!("{what}: {error}"));
                None
            }
        }
    }

    fn none(self) -> Result<(), String> {
        let Errors { calls, errors, first } = self;
        match first {
            None => Ok(()),
            Some(first) => Err(format!("{errors} of {calls} calls failed, first {first}")),
        }
    }
}

async fn rounds(vmem: &VirtualMemory, len: usize, errors: &mut Errors) -> Result<(), String> {
    let handle = vmem.put(bytes(1, 1, len), HOST).await.map_err(|error| error.to_string())?;
    let other = vmem.put(bytes(2, 1, len), DISK).await.map_err(|error| error.to_string())?;
    let part = len / 3..len;
    let mut buf = vec![0; len];
    for round in 0..ROUNDS {
        errors.see("demote", vmem.demote(&handle, DISK).await);
        errors.see("demote", vmem.demote(&other, DISK).await);
        if let Some(read) = errors.see("read_at", vmem.read_at(&handle, part.clone()).await) {
            check(1, &[1], part.start, &read)?;
        }
        if errors.see("read_into", vmem.read_into(&other, 0..len, &mut buf).await).is_some() {
            check(2, &[1], 0, &buf)?;
        }
        if let Some(read) = errors.see("read", vmem.read(&handle).await) {
            check(1, &[1], 0, &read)?;
        }
        let set = [handle.clone(), other.clone()];
        drop(errors.see("read_many", vmem.read_many(&set).await));
        errors.see("demote", vmem.demote(&handle, DISK).await);
        errors.see("prefetch", vmem.prefetch(&handle, HOST).await);
        drop(errors.see("pin", vmem.pin(&other, HOST).await));
        errors.see("write", vmem.write(&other, bytes(2, 1, len)).await);
        errors.see("flush", vmem.flush(&other).await);
        let name = format!("n{}", round % 3);
        drop(errors.see("put_named", vmem.put_named(&name, b"named", HOST).await));
        drop(errors.see("open_named", vmem.open_named(&name).await));
        errors.see("flush_all", vmem.flush_all().await);
    }
    Ok(())
}

async fn works(driver: IoDriver, len: usize, full: bool) -> Result<(), String> {
    let store = open(Place::Real, SIZES, |builder| builder.io_driver(driver)).await;
    let vmem = &store.vmem;
    let filled = if full { fill_host(vmem, 100, 60_000).await } else { Vec::new() };
    let mut errors = Errors::default();
    rounds(vmem, len, &mut errors).await?;
    errors.see("snapshot", vmem.snapshot(&store.dir.path().join("snapshot")).await);
    drop(filled);
    errors.see("close", vmem.clone().close().await);
    errors.none()
}

fn drivers() -> Vec<IoDriver> {
    let runtime = crate::harness::Threads::One.runtime();
    let dir = tempfile::tempdir().unwrap();
    let is_there = |driver: &IoDriver| {
        let real = || vmem_testkit::real_driver(*driver, dir.path()).is_ok();
        runtime.block_on(async { real() })
    };
    let all = [IoDriver::Auto, IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking];
    all.into_iter().filter(is_there).collect()
}

#[test]
fn calls_over_real_files_are_not_late_on_a_paused_clock() {
    let mut complaints = Vec::new();
    for driver in drivers() {
        for len in [3_000, 300_000, MIB] {
            for full in [false, true] {
                let what = format!("{driver}, {len} bytes, host full: {full}");
                let ended = paused(&what, async move || works(driver, len, full).await);
                complaints.extend(ended.err());
            }
        }
    }
    assert_none(&complaints);
}

/// The clock jumps by an hour while calls are under way.
#[test]
fn calls_over_real_files_are_not_late_where_the_clock_jumps() {
    let mut complaints = Vec::new();
    for driver in drivers() {
        let calls = [Call::Read, Call::ReadAt, Call::ReadInto, Call::ReadMany, Call::WriteAt];
        let more = [Call::PutOnDisk, Call::Promote, Call::Pin, Call::PutNamed, Call::FlushAll];
        for call in calls.into_iter().chain(more) {
            let what = format!("{driver}, {call:?}");
            let ended = paused(&what, async move || {
                tokio::time::resume();
                let store = open(Place::Real, SIZES, |builder| builder.io_driver(driver)).await;
                let objects = cold(&store.vmem, 0, 8, LEN).await;
                tokio::time::pause();
                let dir = store.dir.path().to_owned();
                let subject = Subject { vmem: store.vmem.clone(), objects, dir };
                for n in 0..4 {
                    let mut future = call.start(&subject, n);
                    let early = futures::future::poll_immediate(&mut future).await;
                    tokio::time::advance(Duration::from_secs(3_600)).await;
                    let got = match early {
                        Some(got) => got,
                        None => future.await,
                    };
                    got.map_err(|error| format!("call {n}: {error}"))?.check(8)?;
                }
                drop(subject);
                store.vmem.clone().close().await.map_err(|error| format!("close: {error}"))
            });
            complaints.extend(ended.err());
        }
    }
    assert_none(&complaints);
}

/// The clock is paused in the middle of the life of a store.
#[test]
fn calls_are_not_late_where_the_clock_is_paused_later() {
    let ended = attempt("the test", CLOSE_BOUND, || {
        let runtime = crate::harness::Threads::One.runtime();
        runtime.block_on(async {
            let store = open(Place::Real, SIZES, |builder| builder).await;
            let mut errors = Errors::default();
            rounds(&store.vmem, 200_000, &mut errors).await?;
            tokio::time::pause();
            rounds(&store.vmem, 200_000, &mut errors).await?;
            tokio::time::resume();
            rounds(&store.vmem, 200_000, &mut errors).await?;
            errors.see("close", store.vmem.clone().close().await);
            errors.none()
        })
    });
    assert_none(&Vec::from_iter(ended.and_then(|ended| ended).err()));
}

/// Copies to a device take real time, not that of the clock.
#[test]
fn device_calls_are_not_late_on_a_paused_clock() {
    let ended = paused("a device", async || on_a_device(4 << 20, SIZES, on_a_paused_clock).await);
    assert_none(&Vec::from_iter(ended.err()));
}

async fn on_a_paused_clock(store: &Store) -> Result<(), String> {
    let vmem = &store.vmem;
    let len = 200 * KIB;
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let mut errors = Errors::default();
    let put = vmem.put(bytes(1, 1, len), HOST).await;
    let handle = put.map_err(|error| error.to_string())?;
    for _ in 0..ROUNDS {
        errors.see("demote", vmem.demote(&handle, DISK).await);
        errors.see("promote", vmem.promote(&handle, VRAM).await);
        drop(errors.see("device_on", vmem.device_on(&handle, &stream).await));
        drop(errors.see("pin", vmem.pin(&handle, VRAM).await));
        drop(errors.see("device_mut_on", vmem.device_mut_on(&handle, &stream).await));
        if let Some(read) = errors.see("read", vmem.read(&handle).await) {
            check(1, &[1], 0, &read)?;
        }
        errors.see("demote to host", vmem.demote(&handle, HOST).await);
    }
    errors.see("close", vmem.clone().close().await);
    errors.none()
}
