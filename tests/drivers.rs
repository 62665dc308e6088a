//! The suite of this package once more, over each disk driver, and where io_uring is denied.
//!
//! Invariant: the test binaries that run are those of this build: cargo itself names them. Each
//! runs in a process of its own, with the driver in `VMEM_TEST_DRIVER`; a driver that this machine
//! has not is skipped aloud. Tests that bring a simulated disk run again too, which costs little.
//! In the pass over blocking calls every store that is opened on this machine has the emulated CUDA
//! driver, and so a VRAM tier.
#![cfg(target_os = "linux")]
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Instant;

use vmem::{IoDriver, VirtualMemoryConfig, VirtualMemoryError};
use vmem_testkit::Denied;
use vmem_testkit::place::DRIVER_VARIABLE;

/// Binaries that do not run again: this one, which would run itself for ever; those that have no
/// disk; and the habits, which choose their drivers.
const NOT_AGAIN: [&str; 4] = ["vmem", "drivers", "habits", "tidy"];
/// Modules of the others that do not run again: they have no disk, or hardly any, or the catalog
/// alone, or bring their own devices, processes and drivers.
const SKIPPED: [(&str, &[&str]); 2] = [
    (
        "it",
        &[
            "cancel::drop_order::",
            "chain::",
            "documents::",
            "env::fork::",
            "env::hostile::",
            "env::memory::",
            "env::messages::",
            "env::runtime::",
            "env::snapshot::",
            "model::the_model_explains_every_read_over_a_simulated_disk",
            "names::closed::",
            "names::entries::listings::",
            "real_faults::",
            "vram::devices::",
            "vram::dirty::",
            "vram::lease_sets::",
            "vram::waiters::",
        ],
    ),
    (
        "gpu",
        &[
            "devices::",
            "dlpack::",
            "faults::",
            "gather::",
            "kernels::",
            "leases::",
            "scratch::",
            "separate::",
            "sets::",
        ],
    ),
];
/// A pass of fewer tests than this has lost some of them.
const TESTS_MIN: usize = 190;
/// The stress test is bounded by time: so long, in seconds, in each pass.
const STRESS_SECONDS: &str = "6";

/// Device memory, where there is some: every store takes three quarters of what is free.
const VRAM_BYTES: &str = "33554432";

/// The other test binaries of this package, as cargo has built them with the workspace, or builds
/// them now. For this package alone it would build them once more: with fewer features of what they
/// stand on.
fn suite() -> Vec<(String, PathBuf)> {
    let own = std::env::current_exe().unwrap();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["test", "--workspace", "--tests", "--no-run", "--message-format=json"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    // Built for a target by name, as under a sanitizer: its own folder says so.
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    if own.components().any(|part| part.as_os_str() == triple.as_str()) {
        cargo.args(["--target", &triple]);
    }
    let Output { status, stdout, stderr } = cargo.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let mut suite: Vec<(String, PathBuf)> = String::from_utf8_lossy(&stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            let is_ours =
                message["manifest_path"] == concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
            is_ours.then_some((name, message["executable"].as_str()?.into()))
        })
        .filter(|(name, _)| !NOT_AGAIN.contains(&name.as_str()))
        .collect();
    suite.sort();
    suite
}

/// Runs the whole suite with this driver, under what the calling thread is denied.
fn pass(what: &str, driver: IoDriver, suite: &[(String, PathBuf)]) {
    // The dynamic linker finds the driver as it finds a real one.
    let library = vmem_cuda_emulator::library().unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library, folder.path().join("libcuda.so")).unwrap();
    let began = Instant::now();
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, binary) in suite {
        let mut child = Command::new(binary);
        let skipped = SKIPPED.iter().filter(|(of, _)| of == name).flat_map(|(_, skipped)| *skipped);
        child.args(skipped.flat_map(|module| ["--skip", module]));
        child.env(DRIVER_VARIABLE, driver.to_string()).env("VMEM_STRESS_SECONDS", STRESS_SECONDS);
        if driver == IoDriver::Blocking {
            child.env("LD_LIBRARY_PATH", folder.path()).env("VMEM_EMULATED_MEMORY", VRAM_BYTES);
        }
        let output = child.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let result = text.lines().rev().find(|line| line.starts_with("test result"));
        println!("{what}: {name}: {}", result.unwrap_or("no result"));
        passed += result.and_then(passed_of).unwrap_or(0);
        if !output.status.success() {
            println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
            failed.push(name.clone());
        }
    }
    println!("{what}: {passed} tests in {:.0?}", began.elapsed());
    assert!(failed.is_empty(), "{what}: {failed:?} failed");
    assert!(passed >= TESTS_MIN, "{what}: the suite has shrunk to {passed} tests");
}

/// How many tests passed, by a line such as "test result: ok. 7 passed; 0 failed".
fn passed_of(result: &str) -> Option<usize> {
    let (_, after) = result.split_once(". ")?;
    after.split_once(" passed")?.0.parse().ok()
}

/// Whether this machine has the driver; if not, says why.
fn is_to_be_had(driver: IoDriver) -> bool {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = VirtualMemoryConfig::builder().io_driver(driver).disk_capacity(1 << 20);
    match runtime.block_on(vmem::open(config.build().unwrap())) {
        Ok(vmem) => {
            assert_eq!(vmem.capabilities().disk_driver, Some(driver));
            runtime.block_on(vmem.close()).unwrap();
            true
        }
        Err(VirtualMemoryError::TierNotAvailable { reason, .. }) => {
            println!("SKIPPED the suite over {driver}: {reason}");
            false
        }
        Err(error) => panic!("{driver}: {error}"),
    }
}

/// One after the other: the suite has tests that measure processor time.
#[test]
fn the_suite_passes_on_every_driver_and_without_io_uring() {
    let suite = suite();
    for driver in [IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking] {
        if is_to_be_had(driver) {
            pass(&driver.to_string(), driver, &suite);
        }
    }
    // What a thread is denied, its children are denied.
    let denied = std::thread::spawn(move || {
        if let Err(why) = (Denied::IoUring { errno: 1 }).enforce() {
            println!("SKIPPED the suite without io_uring: {why}");
            return;
        }
        assert!(!is_to_be_had(IoDriver::Reactor), "it was denied");
        assert!(!is_to_be_had(IoDriver::TokioUring), "it was denied");
        pass("io_uring denied", IoDriver::Auto, &suite);
    });
    denied.join().unwrap();
}
