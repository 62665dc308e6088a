//! The drivers that there are, stores over them, and how a test of this file runs.
//!
//! Invariant: a driver that is unavailable is left out aloud, and the blocking one never is.
//! Called by every test here.

use std::fmt::Display;
use std::future::Future;
use std::io::Write;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use vmem::{IoDriver, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_testkit::Seed;

use super::fuse::{FaultyFs, Opens};
use super::place::own_mounts;
use crate::support::{DISK, HOST, KIB, STAGING, bytes};

const DRIVERS: [IoDriver; 3] = [IoDriver::Blocking, IoDriver::Reactor, IoDriver::TokioUring];

/// Whatever has not ended by then hangs.
const HANGS: Duration = Duration::from_secs(240);

/// Says, past the capture of the test harness, that something was not checked.
pub(crate) fn skipped(what: impl Display, why: impl Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {what}: {why}");
}

/// Runs a test on a thread that has its own mounts, or says why that cannot be.
pub(crate) fn test(name: &'static str, body: fn(Seed)) {
    let (done, ended) = channel::<()>();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
        match own_mounts() {
            Ok(()) => Seed::run(name, body),
            Err(why) => skipped(name, why),
        }
        drop(done);
    });
    let thread = thread.unwrap();
    if ended.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
        panic!("{name} hangs");
    }
    thread.join().unwrap_or_else(|panic| resume_unwind(panic));
}

/// Runs the body on a runtime of the calling thread, whose mounts its threads see.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap().block_on(future)
}

/// A store in `dir` with `space` bytes of object space; none if this driver is unavailable.
pub(crate) async fn open(dir: &Path, driver: IoDriver, space: usize) -> Option<VirtualMemory> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(dir)
        .host_capacity((space + STAGING) as u64)
        .staging_capacity(STAGING as u64)
        .disk_capacity(64 << 20)
        .io_driver(driver)
        .wait_timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    match vmem::open(config).await {
        Ok(vmem) => {
            println!("{driver:?}: {}", vmem.capabilities().disk);
            Some(vmem)
        }
        Err(VirtualMemoryError::TierNotAvailable { reason, .. })
            if driver != IoDriver::Blocking =>
        {
            skipped(format_args!("{driver:?}"), reason);
            None
        }
        Err(error) => panic!("{driver:?}: {error:?}"),
    }
}

/// Runs a test over every driver, each on a faulty file system of its own.
///
/// io_uring (Linux 6.18) itself continues a short transfer before the driver hears of it, and over
/// FUSE goes wrong: the rest goes to the offset of the beginning, since FUSE does not move the
/// position of a file that its server has opened for direct I/O (`FOPEN_DIRECT_IO`). One
/// submission, several requests with one offset, and success: no driver can see that. Of other
/// files a short answer is no short transfer. So the rings get a file system that leaves direct I/O
/// to them, and nothing short; how they resume is tested against a kernel that the test plays.
pub(crate) fn over_fuse<F: Future<Output = ()>>(
    name: &'static str,
    opens: Opens,
    seed: Seed,
    space: usize,
    body: impl Fn(VirtualMemory, Arc<FaultyFs>, Seed) -> F,
) {
    for driver in DRIVERS {
        let opens = match (driver, opens) {
            (IoDriver::Reactor | IoDriver::TokioUring, Opens::Direct) => Opens::Cached,
            _ => opens,
        };
        if !on_fuse(name, driver, opens, seed, space, &body) {
            return;
        }
    }
}

/// Runs a test over one driver on a faulty file system. False if there are none.
pub(crate) fn on_fuse<F: Future<Output = ()>>(
    name: &'static str,
    driver: IoDriver,
    opens: Opens,
    seed: Seed,
    space: usize,
    body: impl Fn(VirtualMemory, Arc<FaultyFs>, Seed) -> F,
) -> bool {
    let faulty = match FaultyFs::mount(opens, seed.fork("faults")) {
        Ok(faulty) => Arc::new(faulty),
        Err(why) => {
            skipped(name, why);
            return false;
        }
    };
    block_on(async {
        if let Some(vmem) = open(faulty.path(), driver, space).await {
            body(vmem, faulty.clone(), seed).await;
        }
    });
    assert_eq!(faulty.misaligned(), 0, "{driver:?}: direct I/O goes in whole blocks");
    println!("{driver:?}, {opens:?}: {}", faulty.summary());
    true
}

/// As [`over_fuse`], for requests that are not answered for a while. io_uring submits to a FUSE
/// file at once, because that has a `poll`, and waits for the answer in the call: over FUSE the
/// reactor driver holds the task that submits, and the tests of slowness would stand still with it.
pub(crate) fn over_fuse_that_waits<F: Future<Output = ()>>(
    name: &'static str,
    seed: Seed,
    space: usize,
    body: impl Fn(VirtualMemory, Arc<FaultyFs>, Seed) -> F,
) {
    skipped(
        format_args!("{name} over Reactor"),
        "io_uring waits for FUSE in the call; see `throttled`",
    );
    for (driver, opens) in
        [(IoDriver::Blocking, Opens::Direct), (IoDriver::TokioUring, Opens::Cached)]
    {
        on_fuse(name, driver, opens, seed, space, &body);
    }
}

/// Runs a test over every driver in this directory, one after the other.
pub(crate) fn over_dir<F: Future<Output = ()>>(
    dir: &Path,
    space: usize,
    body: impl Fn(VirtualMemory) -> F,
) {
    for driver in DRIVERS {
        block_on(async {
            if let Some(vmem) = open(dir, driver, space).await {
                body(vmem).await;
            }
        });
    }
}

/// All drivers that this build has, for tests that need a new place for each.
pub(crate) fn drivers() -> impl Iterator<Item = IoDriver> {
    let lacks =
        |driver: &IoDriver| *driver == IoDriver::TokioUring && cfg!(not(feature = "tokio-uring"));
    DRIVERS.into_iter().filter(move |driver| !lacks(driver))
}

/// An object and the number that its bytes follow from.
pub(crate) type Known = (u64, VMemHandle);

/// The length of these objects.
pub(super) const LEN: usize = 100_000;

/// `count` objects from number `from` on; on disk alone if they are to be `cold`.
pub(super) async fn put(vmem: &VirtualMemory, from: u64, count: u64, cold: bool) -> Vec<Known> {
    let mut objects = Vec::new();
    for object in from..from + count {
        let handle = vmem.put(bytes(object, 1, LEN), HOST).await.unwrap();
        if cold {
            vmem.demote(&handle, DISK).await.unwrap();
        }
        objects.push((object, handle));
    }
    objects
}

/// Every object has its bytes, wherever they are; reads straight from the tier that has them.
pub(crate) async fn check(vmem: &VirtualMemory, objects: &[Known]) {
    for (object, handle) in objects {
        let mut read = vec![0xEE; handle.len()];
        vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
        assert_same(&read, *object);
    }
}

/// Panics with the first position that differs, and not with megabytes.
pub(crate) fn assert_same(read: &[u8], object: u64) {
    let differs = bytes(object, 1, read.len()).iter().zip(read).position(|(a, b)| a != b);
    assert_eq!(differs, None, "object {object}: wrong from this byte on");
}

/// The errno that an error carries.
pub(crate) fn errno(error: &VirtualMemoryError) -> Option<i32> {
    match error {
        VirtualMemoryError::Io { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

/// Lengths around every boundary: byte, sector, page, chunk, request.
pub(crate) fn odd_lengths() -> Vec<usize> {
    let edges = [512, 4 * KIB, 64 * KIB, 128 * KIB, 1024 * KIB];
    let near = edges.into_iter().flat_map(|edge| [edge - 1, edge, edge + 1]);
    [1, 2, 511].into_iter().chain(near).chain([100_000, 300_001]).collect()
}
