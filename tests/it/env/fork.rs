//! A process forks while it has a store, and the child drops its copy.
//!
//! Mechanism: the child's destructors joined threads that it does not have, drained rings whose
//! memory it did not inherit, unlocked the lock file that it shares, and removed the files. Effect:
//! it hung or died by a signal, and the parent's store was open to others. Fix: what was made in
//! another process gives nothing back.
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "it forks")]

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use vmem::{GpuSelection, IoDriver, MemoryTier, VirtualMemoryConfig, VirtualMemoryError};

use crate::support::process::again;

const CASE: &str = "VMEM_TEST_FORK";
/// Generous, since a child that hangs does so for ever.
const HANGS_AFTER: Duration = Duration::from_secs(60);

fn config(driver: IoDriver, path: &Path) -> VirtualMemoryConfig {
    let builder = VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_capacity(16 << 20);
    builder.io_driver(driver).disk_path(path).gpu(GpuSelection::Off).build().unwrap()
}

/// Runs `work` in a forked child. `Ok` if it exited normally.
fn in_a_fork(work: impl FnOnce()) -> Result<(), String> {
    // SAFETY: the child runs destructors alone and ends by `_exit`; no thread of this process holds
    // a lock that they take, for the store is idle and the runtime has no threads of its own.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        work();
        // SAFETY: ends the process and nothing else.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    let started = Instant::now();
    loop {
        // SAFETY: `status` is ours, and the child is.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        match ended {
            _ if ended == pid && status == 0 => return Ok(()),
            _ if ended == pid => return Err(format!("it ended with status {status:#x}")),
            0 if started.elapsed() < HANGS_AFTER => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                // SAFETY: the child is ours and has not been waited for.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                return Err("it hangs".to_owned());
            }
        }
    }
}

fn play(driver: IoDriver, runtime: Runtime) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("store");
    let opened = runtime.block_on(vmem::open(config(driver, &path)));
    let vmem = match opened {
        Err(VirtualMemoryError::TierNotAvailable { reason, .. }) => {
            return println!("SKIPPED {driver}: {reason}");
        }
        opened => opened.unwrap(),
    };
    let (named, object) = runtime.block_on(async {
        let named = vmem.put_named("kept", vec![3; 200_000], MemoryTier::Host).await.unwrap();
        let object = vmem.put(vec![4; 200_000], MemoryTier::Disk).await.unwrap();
        (named, object)
    });
    let copy = (vmem.clone(), named.clone(), object.clone());
    // The child drops its copies of the last owners. The runtime is one: it has the store's tasks.
    let outcome = {
        let mine = Some((vmem, named, object, runtime));
        let mut child = Some(mine);
        let outcome = in_a_fork(|| drop((child.take(), copy)));
        (outcome, child)
    };
    let (outcome, Some(Some((vmem, named, object, runtime)))) = outcome else {
        unreachable!("the child took its copy")
    };
    assert_eq!(outcome, Ok(()), "{driver}");
    runtime.block_on(async {
        let second = vmem::open(config(driver, &path)).await;
        assert!(matches!(second, Err(VirtualMemoryError::InUse { .. })), "{second:?}");
        assert!(vmem.read(&object).await.unwrap().iter().all(|&byte| byte == 4));
        vmem.demote(&named, MemoryTier::Disk).await.unwrap();
        assert!(vmem.read(&named).await.unwrap().iter().all(|&byte| byte == 3));
        vmem.put_named("later", b"5", MemoryTier::Host).await.unwrap();
        drop((named, object));
        vmem.close().await.unwrap();
        let again = vmem::open(config(driver, &path)).await.unwrap();
        for name in ["kept", "later"] {
            again.open_named(name).await.unwrap();
        }
        again.close().await.unwrap();
    });
}

/// Plays the child of the test below; alone it does nothing.
#[test]
fn process_that_forks() {
    let Ok(driver) = std::env::var(CASE) else { return };
    play(driver.parse().unwrap(), Builder::new_current_thread().enable_all().build().unwrap());
    println!("reached the end");
}

#[test]
fn a_forked_child_drops_its_copy_and_leaves_the_parent_alone() {
    for driver in [IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking] {
        let output = again(module_path!(), "process_that_forks")
            .arg("--test-threads=1")
            .env(CASE, driver.to_string())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        let done = told.contains("reached the end") || told.contains("SKIPPED");
        assert!(output.status.success() && done, "{driver}: {told}\n{failed}");
    }
}
