//! Scenario 42: runtimes that lack something, and a blocking pool that is full.
//!
//! Excluded: an environment that is probed by a panic, caught or not; a store that opens and does
//! not work; a call that waits for a thread of a pool that others occupy. Noticed by the error of
//! `open`, by the calls after it, and, in a process of its own, by a panic in its output.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use vmem::{IoDriver, VirtualMemoryError};

use crate::calls::{Call, LEN, Subject};
use crate::harness::{BOUND, CLOSE_BOUND, WAIT, assert_none, attempt, block_on, succeeds, within};
use crate::stores::{MIB, Sizes, cold, config};

const SIZES: Sizes = Sizes { space: 3 * MIB, disk: 64 * MIB };
const CHILD: &str = "VMEM_TEST_HABITS_CHILD";
const DRIVERS: [IoDriver; 4] =
    [IoDriver::Auto, IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking];

const CALLS: [Call; 16] = [
    Call::ReadAt,
    Call::Read,
    Call::ReadInto,
    Call::ReadMany,
    Call::Write,
    Call::WriteAt,
    Call::Put,
    Call::PutOnDisk,
    Call::Promote,
    Call::Pin,
    Call::Prefetch,
    Call::Demote,
    Call::PutNamed,
    Call::OpenNamed,
    Call::FlushAll,
    Call::Snapshot,
];

fn config_in(dir: &Path, driver: IoDriver) -> vmem::VirtualMemoryConfig {
    let set = |builder: vmem::VirtualMemoryConfigBuilder| {
        builder.disk_path(dir.join("store")).io_driver(driver)
    };
    config(SIZES, set).build().unwrap()
}

/// Opens a store and makes calls; the words of the error of `open`, if there is no store.
async fn opens_and_works(dir: &Path, driver: IoDriver) -> Result<Option<String>, String> {
    let vmem = match vmem::open(config_in(dir, driver)).await {
        Ok(vmem) => vmem,
        Err(error) => return Ok(Some(error.to_string())),
    };
    let objects = cold(&vmem, 0, 20, LEN).await;
    let subject = Subject { vmem: vmem.clone(), objects, dir: dir.to_owned() };
    for (n, call) in CALLS.into_iter().enumerate() {
        // The name that is opened is the one that was put.
        let i = if call == Call::OpenNamed { n - 1 } else { n };
        let got = call.start(&subject, i).await.map_err(|error| format!("{call:?}: {error}"))?;
        got.check(20)?;
    }
    drop(subject);
    vmem.close().await.map(|()| None).map_err(|error| format!("close: {error}"))
}

/// What a runtime lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Io,
    Time,
    Both,
    Runtime,
}

const LACKS: [Lacks; 4] = [Lacks::Io, Lacks::Time, Lacks::Both, Lacks::Runtime];

impl Lacks {
    fn runtime(self, workers: usize) -> Runtime {
        let mut builder = match workers {
            0 => Builder::new_current_thread(),
            _ => Builder::new_multi_thread(),
        };
        if workers > 0 {
            builder.worker_threads(workers);
        }
        match self {
            Lacks::Io => builder.enable_time(),
            Lacks::Time => builder.enable_io(),
            Lacks::Both | Lacks::Runtime => &mut builder,
        };
        builder.build().unwrap()
    }

    /// What the error of `open` must name.
    fn is_named_in(self, error: &str) -> bool {
        let error = error.to_lowercase();
        match self {
            // The machine may refuse the drivers that do not need it.
            Lacks::Io => !error.is_empty(),
            Lacks::Time | Lacks::Both => error.contains("time"),
            Lacks::Runtime => error.contains("runtime"),
        }
    }
}

/// In a child: prints the outcome for each lack and driver.
fn open_with_lacks() {
    for lacks in LACKS {
        for driver in DRIVERS {
            let workers = if driver == IoDriver::Auto { 2 } else { 0 };
            let what = format!("{lacks:?}, {driver}");
            let opened = attempt(&what, BOUND, move || {
                let dir = tempfile::tempdir().unwrap();
                let opening = opens_and_works(dir.path(), driver);
                match lacks {
                    Lacks::Runtime => block_on(opening),
                    _ => lacks.runtime(workers).block_on(opening),
                }
            });
            match opened {
                Ok(Ok(None)) => println!("FINE {what}: it works"),
                Ok(Ok(Some(error))) if lacks.is_named_in(&error) => {
                    println!("FINE {what}: {error}")
                }
                Ok(Ok(Some(error))) => println!("WRONG {what}: open says: {error}"),
                Ok(Err(why)) | Err(why) => println!("WRONG {what}: {why}"),
            }
        }
    }
    println!("END");
}

#[test]
fn runtime_that_lacks_something_is_refused_by_open_or_works() {
    if std::env::var_os(CHILD).is_some() {
        return open_with_lacks();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "runtimes::runtime_that_lacks_something_is_refused_by_open_or_works"])
        .arg("--nocapture")
        .env(CHILD, "1")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let text = text.join("\n");
    let lines = || text.lines().filter(|line| !line.contains(" did not end within "));
    let mut complaints: Vec<String> =
        text.lines().filter(|line| line.contains("WRONG")).map(str::to_owned).collect();
    // Caught or not: users see it.
    let panics = lines().filter(|line| line.contains("panicked at"));
    complaints.extend(panics.map(|line| format!("printed: {line}")));
    if !text.contains("END") {
        complaints.push(format!("the child did not end: {text}"));
    }
    assert_none(&complaints);
}

/// Takes every thread of the blocking pool until it is dropped.
struct Full {
    release: Vec<std::sync::mpsc::Sender<()>>,
}

impl Full {
    async fn fill(threads: usize) -> Self {
        let mut release = Vec::new();
        for _ in 0..threads {
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            let (taken, is_taken) = tokio::sync::oneshot::channel();
            drop(tokio::task::spawn_blocking(move || {
                let _ = taken.send(());
                // Ends with the sender.
                let _gone = receiver.recv();
            }));
            is_taken.await.unwrap();
            release.push(sender);
        }
        Full { release }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        self.release.clear();
    }
}

fn with_a_small_pool<T: Send + 'static>(
    what: &str,
    workers: usize,
    test: impl AsyncFnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    attempt(what, 4 * WAIT, move || {
        let mut builder = match workers {
            0 => Builder::new_current_thread(),
            _ => Builder::new_multi_thread(),
        };
        if workers > 0 {
            builder.worker_threads(workers);
        }
        let runtime = builder.enable_all().max_blocking_threads(2).build().unwrap();
        let output = runtime.block_on(test());
        runtime.shutdown_timeout(Duration::from_secs(1));
        output
    })
}

#[test]
fn store_works_while_the_blocking_pool_is_full() {
    let mut complaints = Vec::new();
    for driver in DRIVERS {
        for workers in [0, 2] {
            let what = format!("{driver}, {workers} workers");
            let ended = with_a_small_pool(&what, workers, async move || {
                let dir = tempfile::tempdir().unwrap();
                let vmem = match vmem::open(config_in(dir.path(), driver)).await {
                    Ok(vmem) => vmem,
                    // This machine has no such driver.
                    Err(VirtualMemoryError::TierNotAvailable { .. }) => return Ok(()),
                    Err(error) => return Err(error.to_string()),
                };
                let objects = cold(&vmem, 0, 20, LEN).await;
                let dir = dir.path().to_owned();
                let subject = Subject { vmem: vmem.clone(), objects, dir };
                let full = Full::fill(2).await;
                for (n, call) in CALLS.into_iter().enumerate() {
                    let i = if call == Call::OpenNamed { n - 1 } else { n };
                    let what = format!("{call:?}");
                    let call = succeeds(&what, BOUND, call.start(&subject, i));
                    call.await?.check(20)?;
                }
                drop(subject);
                let closed = succeeds("close", CLOSE_BOUND, vmem.close()).await;
                drop(full);
                closed
            });
            let ended = ended.and_then(|ended| ended);
            complaints.extend(ended.err().map(|why| format!("{what}: {why}")));
        }
    }
    assert_none(&complaints);
}

/// `open` itself: it has a store or an error within its bound, not only when the pool has a thread.
#[test]
fn open_ends_while_the_blocking_pool_is_full() {
    let mut complaints = Vec::new();
    for driver in DRIVERS {
        for workers in [0, 2] {
            let what = format!("{driver}, {workers} workers");
            let ended = with_a_small_pool(&what, workers, async move || {
                let dir = tempfile::tempdir().unwrap();
                let full = Full::fill(2).await;
                let opened = within("open", BOUND, vmem::open(config_in(dir.path(), driver))).await;
                drop(full);
                match opened? {
                    Ok(vmem) => succeeds("close", CLOSE_BOUND, vmem.close()).await,
                    Err(_typed) => Ok(()),
                }
            });
            let ended = ended.and_then(|ended| ended);
            complaints.extend(ended.err().map(|why| format!("{what}: {why}")));
        }
    }
    assert_none(&complaints);
}

/// `Bytes`, guards, prefetches, handles and the store are dropped on threads of no runtime.
#[test]
fn last_shares_may_be_dropped_on_any_thread() {
    let mut complaints = Vec::new();
    for driver in DRIVERS {
        let what = format!("{driver}");
        let ended = attempt(&what, CLOSE_BOUND, move || {
            let runtime = crate::harness::Threads::Two.runtime();
            let dir = tempfile::tempdir().unwrap();
            let Ok(vmem) = runtime.block_on(vmem::open(config_in(dir.path(), driver))) else {
                return;
            };
            let objects = runtime.block_on(cold(&vmem, 0, 4, LEN));
            let shares = runtime.block_on(async {
                let read = vmem.read(&objects[0]).await.unwrap();
                let pin = vmem.pin(&objects[1], crate::stores::HOST).await.unwrap();
                (read, pin, vmem.prefetch(&objects[2], crate::stores::HOST))
            });
            let kept = vmem.clone();
            let listing = vmem.names("");
            std::thread::spawn(move || drop((shares, listing, objects, vmem))).join().unwrap();
            runtime.shutdown_background();
            drop(kept);
        });
        complaints.extend(ended.err());
    }
    assert_none(&complaints);
}
