//! Scenarios of a disk that fails, fills and grows.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rand::Rng;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_io::{DATA_FILE, LOCK_FILE};
use vmem_testkit::{
    Errno, Fault, FaultDriver, FaultPlan, OpKind, Seed, SimConfig, SimDriver, When,
};

use crate::support::process::{CHILD_DIR, child};
use crate::support::{self, DISK, HOST, KIB, MIB, assert_empty, bytes, settle};
use crate::support::{eventually, over, quiet, real_config};

const LEN: usize = 64 * KIB;

async fn check(vmem: &VirtualMemory, objects: &[(u64, VMemHandle)]) {
    for (object, handle) in objects {
        let mut read = vec![0xEE; handle.len()];
        vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
        assert!(read == bytes(*object, 1, read.len()), "object {object}");
    }
}

// ---- 31: registered memory and memory that is given back
// ------------------------------------------

/// Excluded: memory that is given back to the system while it is registered with io_uring, after
/// which a transfer says success and the reader sees zeros. Object space is committed and given
/// back all the time, while large reads and writes pass through the registered staging memory
/// beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_31_memory_is_given_back_beside_registered_reads() {
    let dir = tempfile::tempdir().unwrap();
    let config = VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .disk_path(dir.path())
        .host_capacity(12 * MIB as u64)
        .staging_capacity(4 * MIB as u64)
        .disk_capacity(256 * MIB as u64);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    match vmem.capabilities().staging_registered {
        true => println!("with {}", vmem.capabilities().disk),
        false => println!("SKIPPED registered memory: {}", vmem.capabilities()),
    }
    let mut large = Vec::new();
    for object in 1..=8 {
        let handle = vmem.allocate(4 * MIB + 777 * object as usize, DISK).await.unwrap();
        vmem.write(&handle, bytes(object, 1, handle.len())).await.unwrap();
        large.push((object, handle));
    }
    let large = Arc::new(large);
    let readers = (0..3).map(|salt: usize| {
        let vmem = vmem.clone();
        let large = large.clone();
        tokio::spawn(async move {
            for round in 0..40 {
                let (object, handle) = &large[(round * 3 + salt) % large.len()];
                let from = round * 65_537 % MIB;
                let mut read = vec![0xEE; 2 * MIB];
                let range = from..from + read.len();
                vmem.read_into(handle, range.clone(), &mut read).await.unwrap();
                assert!(read == bytes(*object, 1, handle.len())[range], "object {object}");
            }
        })
    });
    let churn = {
        let vmem = vmem.clone();
        tokio::spawn(async move {
            for round in 0..300_u64 {
                let len = [900, 40_000, 300_000, 1_500_000][round as usize % 4];
                let mut held = Vec::new();
                for object in 0..4 {
                    let data = bytes(round * 4 + object + 1, 1, len);
                    held.push((vmem.put(&data, HOST).await.unwrap(), data));
                }
                for (handle, data) in held {
                    assert!(vmem.read(&handle).await.unwrap() == data, "round {round}");
                }
            }
        })
    };
    for task in readers {
        task.await.unwrap();
    }
    churn.await.unwrap();
    drop(large);
    vmem.close().await.unwrap();
}

// ---- 18: the disk refuses while objects are demoted
// ---------------------------------------------------

/// Excluded: one refused write that fails, or stalls, unrelated calls; a victim that is lost while
/// it is written back. Every write of the run is once the one that fails.
#[tokio::test(start_paused = true)]
async fn scenario_18_one_failed_write_is_noticed_by_nobody() {
    for (nth, errno) in (1..=12).zip([Errno::IO, Errno::NOSPC].into_iter().cycle()) {
        let disk = SimDriver::new(SimConfig::default());
        let faults = FaultDriver::new(disk, Seed::new(nth));
        let vmem = over(faults.clone(), 8 * LEN, 64 * MIB as u64, |b| b);
        faults.set(FaultPlan::new().on(OpKind::Write, When::Nth(nth), Fault::Error(errno)));
        let mut objects = Vec::new();
        for object in 1..=40 {
            // Allocated first: what a failed write of its own does is another question.
            let handle = vmem.put(bytes(object, 1, LEN), HOST).await;
            let handle = handle.unwrap_or_else(|e| panic!("{errno} at write {nth}: {e:?}"));
            objects.push((object, handle));
        }
        quiet(&vmem).await;
        assert_eq!(faults.injected_total(), 1, "the fault was met");
        assert!(vmem.stats().errors > 0, "and counted");
        check(&vmem, &objects).await;
        drop(objects);
        assert_empty(&quiet(&vmem).await, "a failed write");
    }
}

/// A region of the disk refuses every write, a tenth of the others fail too: writers get a typed
/// error or none, what was accepted is readable all the time, and when the cause goes everything
/// can move.
#[test]
fn scenario_18_a_disk_that_fails_now_and_then() {
    for errno in [Errno::IO, Errno::NOSPC] {
        Seed::simulate("scenario_18", async |seed| {
            let mut rng = seed.fork("sizes").rng();
            let disk = SimDriver::new(SimConfig::default());
            let faults = FaultDriver::new(disk.clone(), seed.fork("faults"));
            let vmem = over(faults.clone(), 8 * LEN, 64 * MIB as u64, |b| b);
            let torn = Fault::TornWrite(errno);
            faults.set(
                FaultPlan::new().on(OpKind::Write, When::Chance(0.1), Fault::Error(errno)).on(
                    OpKind::Write,
                    When::Chance(0.1),
                    torn,
                ),
            );
            let mut objects = Vec::new();
            let mut refused = 0;
            for object in 1..=400 {
                let home = if rng.random_bool(0.7) { HOST } else { DISK };
                match vmem.put(bytes(object, 1, rng.random_range(1..2 * LEN)), home).await {
                    Ok(handle) => objects.push((object, handle)),
                    Err(VirtualMemoryError::TierFull { .. } | VirtualMemoryError::Io { .. }) => {
                        refused += 1;
                    }
                    Err(error) => panic!("{error:?}"),
                }
                if object % 40 == 0 {
                    check(&vmem, &objects).await;
                }
            }
            println!("{} accepted, {refused} refused", objects.len());
            assert!(refused > 0 && objects.len() > 200);
            for (_, handle) in &objects {
                // It goes, or stays where it was.
                if vmem.demote(handle, DISK).await.is_err() {
                    assert!(vmem.residency(handle).unwrap().host);
                }
            }
            check(&vmem, &objects).await;
            faults.clear();
            for (_, handle) in &objects {
                vmem.demote(handle, DISK).await.unwrap();
                let residency = vmem.residency(handle).unwrap();
                assert!(residency.disk && !residency.host && !residency.dirty, "{residency:?}");
            }
            check(&vmem, &objects).await;
            // A whole write over each, so that no place of a failed write is out of use for ever.
            objects.clear();
            let all = vmem.put(vec![7; 60 * MIB], DISK).await.unwrap();
            drop(all);
            assert_empty(&quiet(&vmem).await, "faults");
        });
    }
}

/// The budget of the disk is full, without any error of a device: what is in host memory stays
/// there, readers and in-place writers go on, one that needs space gets an error, and a free lets
/// it in.
#[tokio::test(start_paused = true)]
async fn scenario_18_a_full_budget() {
    let (vmem, driver) = support::open(8 * LEN, 8 * LEN, |b| b.watermarks(0.98, 1.0));
    let mut objects = Vec::new();
    let refused = loop {
        let object = objects.len() as u64 + 1;
        match vmem.put(bytes(object, 1, LEN), HOST).await {
            Ok(handle) => objects.push((object, handle)),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, VirtualMemoryError::TierFull { tier: DISK, .. }), "{refused:?}");
    assert!(objects.len() >= 15, "both tiers are full: {}", objects.len());
    check(&vmem, &objects).await;
    for (object, handle) in &objects {
        if vmem.residency(handle).unwrap().host {
            vmem.write_at(handle, 5, &bytes(*object, 1, LEN)[5..9]).await.unwrap();
        }
    }
    for _ in 0..20 {
        objects.remove(0);
        let object = 100 + objects.len() as u64;
        objects.push((object, vmem.put(bytes(object, 1, LEN), HOST).await.unwrap()));
        check(&vmem, &objects).await;
    }
    drop(objects);
    assert_empty(&settle(&vmem, &driver).await, "a full budget");
}

// ---- 19: growth
// -----------------------------------------------------------------------------------

const HOST_BYTES: usize = 2 * MIB;
const DISK_BYTES: usize = 16 * MIB;

/// Length and allocated bytes of the data file; none if it has no name.
fn file(dir: &Path) -> Option<(u64, u64)> {
    let status = std::fs::metadata(dir.join(DATA_FILE)).ok()?;
    Some((status.len(), status.blocks() * 512))
}

fn assert_bounded(dir: &Path) {
    let (len, blocks) = file(dir).unwrap();
    assert!(len <= DISK_BYTES as u64, "{len} bytes long");
    // The file system may count its own blocks for where the extents are.
    assert!(blocks <= DISK_BYTES as u64 + 64 * 1024, "{blocks} bytes allocated");
}

/// Writes `total` bytes through the store in random sizes, keeping it about two thirds full.
async fn write_through(vmem: &VirtualMemory, dir: &Path, total: usize) -> Vec<(u64, VMemHandle)> {
    let mut rng = support::seed().pipe(Seed::new).rng();
    let mut live = Vec::new();
    let mut written = 0;
    let mut bytes_live = 0;
    let mut object = 0_u64;
    while written < total {
        object += 1;
        let len = 1 << rng.random_range(9..20);
        let len = rng.random_range(len / 2..=len);
        while bytes_live + len > DISK_BYTES * 2 / 3 {
            let (_, gone): (u64, VMemHandle) = live.swap_remove(rng.random_range(0..live.len()));
            bytes_live -= gone.len();
        }
        let home = if rng.random_bool(0.5) { HOST } else { DISK };
        live.push((object, vmem.put(bytes(object, 1, len), home).await.unwrap()));
        written += len;
        bytes_live += len;
        if object.is_multiple_of(64) {
            assert_bounded(dir);
            let stats = vmem.stats();
            assert!(stats.disk.used_bytes <= DISK_BYTES as u64, "{stats:?}");
        }
    }
    live
}

trait Pipe: Sized {
    fn pipe<T>(self, f: impl FnOnce(Self) -> T) -> T {
        f(self)
    }
}

impl<T> Pipe for T {}

/// Nothing of a store is left but its lock file.
fn nothing_left(dir: &Path) -> bool {
    let names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.iter().all(|name| name == LOCK_FILE)
}

/// Excluded: a file that grows with what passes through it and not with what it holds; space that
/// is never freed. Noticed by what the file system says of the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_19_ten_times_the_capacity_then_close() {
    let dir = tempfile::tempdir().unwrap();
    let vmem = vmem::open(real_config(dir.path(), HOST_BYTES, DISK_BYTES)).await.unwrap();
    let live = write_through(&vmem, dir.path(), 10 * DISK_BYTES).await;
    assert_bounded(dir.path());
    check(&vmem, &live).await;
    drop(live);
    let stats = quiet(&vmem).await;
    assert_empty(&stats, "ten times the capacity");
    // What is free goes back to the file system over time, all but a batch that is not full yet.
    eventually("the blocks are given back", || file(dir.path()).unwrap().1 <= 9 * MIB as u64).await;
    let handle = vmem.put(bytes(1, 1, 300_000), DISK).await.unwrap();
    vmem.close().await.unwrap();
    assert!(nothing_left(dir.path()));
    drop(handle);
    assert!(nothing_left(dir.path()));
}

/// The store, its handles and its runtime are dropped in different orders, without `close`.
#[test]
fn scenario_19_dropped_without_close() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for order in ["store, handles", "handles, store", "runtime first"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let outer = runtime();
        let (vmem, live) = outer.block_on(async {
            let vmem = vmem::open(real_config(path, HOST_BYTES, DISK_BYTES)).await.unwrap();
            let live = write_through(&vmem, path, DISK_BYTES).await;
            (vmem, live)
        });
        match order {
            "store, handles" => {
                drop(vmem);
                drop(live);
                drop(outer);
            }
            "handles, store" => {
                drop(live);
                drop(vmem);
                drop(outer);
            }
            _ => {
                drop(outer);
                drop(vmem);
                drop(live);
            }
        }
        runtime().block_on(async {
            eventually(&format!("nothing is left after {order}"), || nothing_left(path)).await;
            let again = vmem::open(real_config(path, HOST_BYTES, DISK_BYTES)).await;
            again.unwrap_or_else(|e| panic!("{order}: {e:?}")).close().await.unwrap();
        });
    }
}

/// The child of the next test: fills the store, says so, and waits for its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "plays the child of scenario_19_killed"]
async fn child_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let vmem = vmem::open(real_config(dir.as_ref(), HOST_BYTES, DISK_BYTES)).await.unwrap();
    let live = write_through(&vmem, dir.as_ref(), DISK_BYTES).await;
    println!("\nfilled with {} objects", live.len());
    loop {
        drop(vmem.put(vec![1; 300_000], DISK).await.unwrap());
    }
}

/// Excluded: a directory that stays locked, or space that stays taken, after `kill -9`. While the
/// child lives its number is in the error; once it is dead the directory opens, and is empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_19_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = child(module_path!(), "child_that_is_killed", dir.path());
    let out = BufReader::new(process.stdout.take().unwrap());
    let filled = out.lines().map(Result::unwrap).find(|line| line.starts_with("filled with"));
    assert!(filled.is_some(), "the child ended early");
    let config = || real_config(dir.path(), HOST_BYTES, DISK_BYTES);
    match vmem::open(config()).await {
        Err(VirtualMemoryError::InUse { pid, path }) => {
            assert_eq!(pid, Some(process.id()));
            assert_eq!(path, std::fs::canonicalize(dir.path()).unwrap());
        }
        other => panic!("{other:?}"),
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(file(dir.path()).unwrap().1 > MIB as u64, "it left something behind");
    let vmem = vmem::open(config()).await.unwrap();
    assert_eq!(file(dir.path()), Some((0, 0)), "and that is gone");
    assert_eq!(vmem.stats().disk.used_bytes, 0);
    let live = write_through(&vmem, dir.path(), DISK_BYTES).await;
    check(&vmem, &live).await;
    vmem.close().await.unwrap();
    assert!(nothing_left(dir.path()));
}
