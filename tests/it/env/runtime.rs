//! Runtimes that lack something (scenario 42).
//!
//! Mechanism: the runtime was found out by its panics, some of them in tasks of the store. Effect:
//! `open` said `Ok`, tasks died, later calls said that the store was closed, and panics that were
//! caught were printed. Fix: `open` asks first, in silence, and says what is missing and what to
//! do.
//!
//! Invariant: each child prints to standard error nothing that speaks of a panic.
#![cfg(target_os = "linux")]

use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use vmem::{
    GpuSelection, IoDriver, MemoryTier, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_core::Capabilities;
use vmem_core::backend::Backends;
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

use crate::support::MemDriver;
use crate::support::process::{again, alone};

const CASE: &str = "VMEM_TEST_RUNTIME";
const DRIVERS: [IoDriver; 4] =
    [IoDriver::Auto, IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking];

fn config(driver: IoDriver) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_capacity(16 << 20);
    builder.io_driver(driver).gpu(GpuSelection::Off).build().unwrap()
}

/// Opens, moves an object to disk and back, closes.
async fn works(driver: IoDriver) -> Result<(), VirtualMemoryError> {
    let vmem = vmem::open(config(driver)).await?;
    let handle = vmem.put(vec![5; 300_000], MemoryTier::Host).await?;
    vmem.demote(&handle, MemoryTier::Disk).await?;
    assert!(vmem.read(&handle).await?.iter().all(|&byte| byte == 5));
    drop(handle);
    vmem.close().await
}

#[track_caller]
fn assert_unsuitable(outcome: Result<(), VirtualMemoryError>, lacks: &str, does: &str) {
    match outcome {
        Err(error @ VirtualMemoryError::UnsuitableRuntime { .. }) => {
            let text = error.to_string();
            assert!(text.contains(lacks) && text.contains(does), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

fn runtime(set: impl FnOnce(&mut Builder) -> &mut Builder) -> Runtime {
    set(Builder::new_multi_thread().worker_threads(1)).build().unwrap()
}

fn play(case: &str) {
    match case {
        "no runtime" => {
            let outcome = futures::executor::block_on(works(IoDriver::Auto));
            assert_unsuitable(outcome, "not inside of a tokio runtime", "block_on");
        }
        "no timer" | "nothing" => {
            let io = case == "no timer";
            let multi = runtime(|builder| if io { builder.enable_io() } else { builder });
            let single = Builder::new_current_thread().build().unwrap();
            for runtime in [multi, single] {
                for driver in DRIVERS {
                    let outcome = runtime.block_on(works(driver));
                    assert_unsuitable(outcome, "has no timer", "enable_time");
                }
            }
        }
        "no I/O driver" => {
            let runtime = runtime(Builder::enable_time);
            for driver in DRIVERS {
                match (driver, runtime.block_on(works(driver))) {
                    (
                        IoDriver::Reactor,
                        Err(VirtualMemoryError::TierNotAvailable { reason, .. }),
                    ) => {
                        // Or io_uring is denied, which is found out before.
                        let says = reason.contains("enable_io") || reason.contains("io_uring");
                        assert!(says, "{reason}");
                    }
                    (IoDriver::TokioUring, Err(VirtualMemoryError::TierNotAvailable { .. })) => {}
                    (IoDriver::Reactor, other) => panic!("{other:?}"),
                    (_, outcome) => outcome.unwrap(),
                }
            }
        }
        _ => panic!("no case {case}"),
    }
}

/// Plays the child of the tests below; alone it does nothing.
#[test]
fn child_in_a_runtime() {
    let Ok(case) = std::env::var(CASE) else { return };
    play(&case);
    println!("reached the end");
}

fn visit(case: &str) {
    let output = again(module_path!(), "child_in_a_runtime").env(CASE, case).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("reached the end"), "{case}: {failed}");
    assert!(!failed.contains("panic"), "{case} reports: {failed}");
}

#[test]
fn open_outside_of_a_runtime_is_an_error() {
    visit("no runtime");
}

#[test]
fn open_without_a_timer_is_an_error_with_the_remedy() {
    visit("no timer");
    visit("nothing");
}

#[test]
fn a_store_without_an_io_driver_falls_back_in_silence() {
    visit("no I/O driver");
}

/// Also where the hook was set after a store had been opened: it is the same afterwards.
#[test]
fn a_probe_leaves_the_panic_hook_as_it_was() {
    alone(module_path!(), "a_probe_leaves_the_panic_hook_as_it_was", look_at_the_panic_hook);
}

fn look_at_the_panic_hook() {
    let (told, heard) = mpsc::channel();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let _ = told.send(panic.to_string());
        before(panic);
    }));
    let runtime = Builder::new_current_thread().build().unwrap();
    for _ in 0..3 {
        let outcome = runtime.block_on(works(IoDriver::Auto));
        assert_unsuitable(outcome, "has no timer", "enable_all");
    }
    assert!(heard.try_iter().all(|panic| !panic.contains("timers are disabled")));
    let panicked = std::thread::spawn(|| panic!("expected by the test")).join();
    assert!(panicked.is_err() && heard.try_iter().any(|panic| panic.contains("expected by")));
}

/// Mechanism: `open` ran on the runtime's pool for blocking calls. Effect: it never ended where
/// that was full. Fix: a thread of its own.
#[test]
fn open_does_not_wait_for_the_blocking_pool() {
    let runtime = runtime(|builder| builder.enable_all().max_blocking_threads(1));
    let (let_go, gate) = mpsc::channel::<()>();
    let taken = runtime.spawn_blocking(move || gate.recv());
    let opened = runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), works(IoDriver::Auto)).await
    });
    drop(let_go);
    opened.expect("it waits for a thread").unwrap();
    let _ = runtime.block_on(taken);
}

/// A program that brings its own backends gets the same answer as one that opens a directory.
#[test]
fn backends_outside_of_a_suitable_runtime_are_refused() {
    let make = || {
        let device = Arc::new(SimDevice::new(1 << 20)) as Arc<_>;
        let backends = Backends {
            remote: None,
            host_capacity_bytes: 4 << 20,
            disk: DiskTier::new(MemDriver::new(), 1 << 20),
            catalog: None,
            devices: vec![device],
            capabilities: Capabilities::new("memory".into(), "".into()),
        };
        VirtualMemory::with_backends(&config(IoDriver::Auto), backends).map(drop)
    };
    assert_unsuitable(make(), "not inside of a tokio runtime", "block_on");
    let untimed = runtime(|builder| builder.enable_io());
    assert_unsuitable(untimed.block_on(async { make() }), "has no timer", "enable_time");
}
