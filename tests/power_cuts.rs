//! Simulated power cuts: what was acknowledged of a named object is there after any of them, whole.
//!
//! Invariant: each image is what a disk may hold after a cut (`vmem_testkit::tape`), and what it must hold is
//! known from what was started and what was acknowledged before that moment. 600 images by default;
//! `VMEM_IMAGES=10000 cargo test --release --test power_cuts` for more.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem::backend::Backends;
use vmem::{
    Capabilities, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{Seed, Tape, TapeDriver, TapeStorage};

const TASKS: usize = 6;
const OPERATIONS: usize = 12;
const DISK: u64 = 8 << 20;
const LENS: [usize; 4] = [0, 700, 65_536, 150_000];

/// What one name stands for: a version of the bytes, and one of the metadata.
type Named = Option<(u64, u64)>;
/// What the two names of a task stand for.
type Pair = [Named; 2];

/// A change of the two names of one task, between these positions of the tape.
#[derive(Clone, Copy, Debug)]
struct Change {
    task: usize,
    after: Pair,
    started: usize,
    /// None until it was acknowledged.
    acknowledged: Option<usize>,
}

fn name(task: usize, which: usize) -> String {
    format!("task {task}/{}", ["one", "other"][which])
}

fn bytes_of(task: usize, version: u64) -> Vec<u8> {
    let len = LENS[version as usize % LENS.len()];
    let word =
        |at: usize| (task as u64) << 48 ^ version << 24 ^ (at as u64).wrapping_mul(0x9e37_79b9);
    (0..len).map(|at| (word(at / 8) >> (at % 8 * 8)) as u8).collect()
}

fn open(tape: &Arc<Tape>, buffered: bool) -> Result<VirtualMemory, VirtualMemoryError> {
    let storage = Arc::new(TapeStorage(tape.clone()));
    let (catalog, taken) = NameCatalog::over(storage, 512)?;
    let config = VirtualMemoryConfig::builder()
        .host_capacity(512 << 10)
        .staging_capacity(128 << 10)
        .wait_timeout(Duration::from_secs(20))
        .build()?;
    let backends = Backends {
        host_capacity_bytes: 512 << 10,
        disk: DiskTier::with_taken(TapeDriver::new(tape, buffered), DISK, &taken, None)?,
        catalog: Some(Arc::new(catalog)),
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&config, backends)
}

/// One task changes its two names.
async fn change_names(
    vmem: VirtualMemory,
    task: usize,
    mut rng: SmallRng,
    tape: Arc<Tape>,
    history: Arc<Mutex<Vec<Change>>>,
    mut state: Pair,
    mut version: u64,
) {
    for _ in 0..OPERATIONS {
        let which = rng.random_range(0..2);
        let (own, other) = (name(task, which), name(task, 1 - which));
        let home = if rng.random_bool(0.5) { MemoryTier::Host } else { MemoryTier::Disk };
        version += 1;
        let mut after = state;
        let operation = match state[which] {
            None => 0,
            Some(_) => rng.random_range(0..6),
        };
        // What does not change what is durable, before the change that does.
        let mut written: Option<VMemHandle> = None;
        match operation {
            0 | 1 => after[which] = Some((version, 0)),
            2 => {
                let (before, metadata) = state[which].unwrap();
                // The length stays.
                version += (before % 4 + 4 - version % 4) % 4;
                after[which] = Some((version, metadata));
            }
            3 => after[which] = state[which].map(|(bytes, _)| (bytes, version)),
            4 => {
                after[1 - which] = state[which];
                after[which] = None;
            }
            _ => after[which] = None,
        }
        let nth = {
            let mut history = history.lock();
            let started = tape.position();
            history.push(Change { task, after, started, acknowledged: None });
            history.len() - 1
        };
        match operation {
            0 | 1 => {
                drop(vmem.put_named(&own, bytes_of(task, version), home).await.unwrap());
            }
            2 => {
                let handle = vmem.open_named(&own).await.unwrap();
                vmem.write(&handle, bytes_of(task, version)).await.unwrap();
                vmem.flush(&handle).await.unwrap();
                written = Some(handle);
            }
            3 => vmem.set_metadata(&own, &version.to_le_bytes()).await.unwrap(),
            4 => vmem.rename_named(&own, &other).await.unwrap(),
            _ => vmem.remove_named(&own).await.unwrap(),
        }
        history.lock()[nth].acknowledged = Some(tape.position());
        state = after;
        drop(written);
        // Beside it, what is never named.
        if rng.random_bool(0.3) {
            drop(vmem.put(bytes_of(task, 3), MemoryTier::Disk).await.unwrap());
        }
    }
}

/// What the names of each task may stand for if the power is cut here.
fn allowed(history: &[Change], first: &[Pair], position: usize) -> Vec<Vec<Pair>> {
    (0..TASKS)
        .map(|task| {
            let mut may = vec![first[task]];
            for change in history.iter().filter(|change| change.task == task) {
                if change.acknowledged.is_some_and(|at| at <= position) {
                    may = vec![change.after];
                } else if change.started <= position {
                    may.push(change.after);
                }
            }
            may
        })
        .collect()
}

/// Opens what is left, and says what the names stand for.
async fn recovered(image: Image, buffered: bool) -> Vec<Pair> {
    let vmem = open(&Tape::of(image), buffered).unwrap();
    let entries: Vec<_> = vmem.names("").try_collect().await.unwrap();
    let mut found = vec![[None; 2]; TASKS];
    let mut footprint = 0;
    for entry in entries {
        let (task, which) = (0..TASKS)
            .flat_map(|task| [(task, 0), (task, 1)])
            .find(|&(task, which)| *entry.name == *name(task, which))
            .unwrap();
        let handle = vmem.open_named(&entry.name).await.unwrap();
        let bytes = vmem.read(&handle).await.unwrap();
        footprint += bytes.len().next_multiple_of(512) as u64;
        let metadata = match entry.metadata.len() {
            0 => 0,
            _ => u64::from_le_bytes(entry.metadata[..].try_into().unwrap()),
        };
        // Which version it is, or that it is none.
        let version = (0..400).find(|&version| bytes[..] == bytes_of(task, version)[..]);
        assert!(version.is_some(), "{} is torn", entry.name);
        found[task][which] = version.map(|version| (version, metadata));
    }
    assert_eq!(vmem.stats().disk.used_bytes, footprint, "space that nothing leads to");
    found
}

/// Empty objects are all the same.
fn same(one: &Pair, other: &Pair, task: usize) -> bool {
    let bytes = |named: Named| named.map(|(version, metadata)| (bytes_of(task, version), metadata));
    one.map(bytes) == other.map(bytes)
}

async fn history(seed: Seed, buffered: bool, images: usize) -> (usize, usize) {
    let mut rng = seed.rng();
    let blank = Tape::of(Image::default());
    drop(open(&blank, buffered).unwrap());
    let tape = Tape::of(blank.image());
    let vmem = open(&tape, buffered).unwrap();
    let changes = Arc::new(Mutex::new(Vec::new()));
    let tasks = (0..TASKS).map(|task| {
        let rng = seed.fork_nth("task", task as u64).rng();
        let (vmem, tape, changes) = (vmem.clone(), tape.clone(), changes.clone());
        tokio::spawn(change_names(vmem, task, rng, tape, changes, [None; 2], 0))
    });
    for task in futures::future::join_all(tasks).await {
        task.unwrap();
    }
    vmem.close().await.unwrap();
    let changes = changes.lock().clone();
    let first = vec![[None; 2]; TASKS];
    let mut acknowledged = 0;
    for _ in 0..images {
        let position = rng.random_range(0..=tape.position());
        let found = recovered(tape.cut(position, &mut rng), buffered).await;
        let may = allowed(&changes, &first, position);
        for task in 0..TASKS {
            let right = may[task].iter().any(|pair| same(pair, &found[task], task));
            assert!(
                right,
                "task {task} at {position}: found {:?}, allowed {:?}",
                found[task], may[task]
            );
        }
        acknowledged += changes
            .iter()
            .filter(|change| change.acknowledged.is_some_and(|at| at <= position))
            .count();
    }
    (images, acknowledged)
}

#[test]
fn what_was_acknowledged_survives_any_cut() {
    Seed::run("power cuts", |seed| {
        let wanted = std::env::var("VMEM_IMAGES").map_or(600, |text| text.parse().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut images, mut acknowledged) = (0, 0);
        for nth in 0.. {
            if images >= wanted {
                break;
            }
            let run = history(seed.fork_nth("history", nth), nth % 2 == 0, 60);
            let (made, checked) = runtime.block_on(run);
            (images, acknowledged) = (images + made, acknowledged + checked);
        }
        println!("{images} images, {acknowledged} acknowledged changes: none lost, none torn");
    });
}
