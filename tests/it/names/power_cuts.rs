//! Simulated power cuts: what was acknowledged of a named object is there after any of them, whole.
//!
//! Invariant: each image is what a disk may hold after a cut (`vmem_testkit::tape`), and what it
//! must hold is known from what was started and what was acknowledged before that moment. 600
//! images by default;
//! `VMEM_IMAGES=10000 cargo test --release --test it names::power_cuts -- --nocapture` for more.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use vmem::backend::{Backends, Remote};
use vmem::{Capabilities, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{ClosedNames, Seed, Tape, TapeDriver, TapeStorage};

use crate::support::MemDriver;
use crate::support::journal::{self, Journal, Pair, Task};

const TASKS: usize = 6;
const OPERATIONS: usize = 12;
const DISK: u64 = 8 << 20;
const LARGEST: usize = 200_000;

/// A change of the two names of one task, between these positions of the tape.
#[derive(Clone, Copy, Debug)]
struct Change {
    task: usize,
    after: Pair,
    started: usize,
    /// None until it was acknowledged.
    acknowledged: Option<usize>,
}

struct History {
    tape: Arc<Tape>,
    changes: Mutex<Vec<Change>>,
}

impl Journal for History {
    fn started(&self, task: usize, after: Pair) {
        let mut changes = self.changes.lock();
        let started = self.tape.position();
        changes.push(Change { task, after, started, acknowledged: None });
    }

    fn acknowledged(&self, task: usize) {
        let mut changes = self.changes.lock();
        let last = changes.iter_mut().rev().find(|change| change.task == task);
        last.unwrap().acknowledged = Some(self.tape.position());
    }
}

/// What is on the tape: the disk, or a tier below a disk that is lost with the power.
#[derive(Clone, Copy, Debug)]
struct Way {
    is_below: bool,
    is_buffered: bool,
}

/// What a disk above the tape has, in bytes: less than all names together.
const CACHE: u64 = 512 << 10;

fn open(tape: &Arc<Tape>, way: Way) -> Result<VirtualMemory, VirtualMemoryError> {
    let storage = Arc::new(TapeStorage(tape.clone()));
    let (catalog, taken) = NameCatalog::over(storage, 512)?;
    let config = VirtualMemoryConfig::builder()
        .host_capacity(1 << 20)
        .staging_capacity(128 << 10)
        .wait_timeout(Duration::from_secs(20))
        .build()?;
    let driver = TapeDriver::new(tape, way.is_buffered);
    let durable = DiskTier::with_taken(driver, DISK, &taken, None)?;
    let cache = || DiskTier::new(MemDriver::new(), CACHE);
    let (disk, remote) = match way.is_below {
        true => (cache(), Some(Remote::Named(durable))),
        false => (durable, None),
    };
    let backends = Backends {
        remote,
        host_capacity_bytes: 1 << 20,
        disk,
        // Closed names leave memory at once, and are found again by the next change.
        catalog: Some(Arc::new(ClosedNames(Arc::new(catalog), 0))),
        devices: Vec::new(),
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&config, backends)
}

/// What the names of a task may stand for if the power is cut here.
fn allowed(changes: &[Change], task: usize, position: usize) -> Vec<Pair> {
    let mut may = vec![[None; 2]];
    for change in changes.iter().filter(|change| change.task == task) {
        if change.acknowledged.is_some_and(|at| at <= position) {
            may = vec![change.after];
        } else if change.started <= position {
            may.push(change.after);
        }
    }
    may
}

/// Lets tasks change names, and cuts the power at many moments. How many acknowledged changes were
/// due.
async fn history(seed: Seed, way: Way, images: usize) -> usize {
    let mut rng = seed.rng();
    let blank = Tape::of(Image::default());
    open(&blank, way).unwrap().close().await.unwrap();
    let tape = Tape::of(blank.image());
    let vmem = open(&tape, way).unwrap();
    let history = Arc::new(History { tape: tape.clone(), changes: Mutex::default() });
    let tasks = (0..TASKS).map(|number| {
        let rng = seed.fork_nth("task", number as u64).rng();
        let task = Task { number, state: [None; 2], version: 0, largest: LARGEST, rng };
        let vmem = vmem.clone();
        let history = history.clone();
        tokio::spawn(async move { task.run(&vmem, &*history, OPERATIONS).await.unwrap() })
    });
    for task in futures::future::join_all(tasks).await {
        task.unwrap();
    }
    vmem.close().await.unwrap();
    let changes = history.changes.lock().clone();
    let mut due = 0;
    for _ in 0..images {
        let position = rng.random_range(0..=tape.position());
        let vmem = open(&Tape::of(tape.cut(position, &mut rng)), way).unwrap();
        let found = journal::found(&vmem, TASKS, 512).await;
        let may: Vec<_> = (0..TASKS).map(|task| allowed(&changes, task, position)).collect();
        journal::settle(&found, &may, LARGEST, &format!("at {position}"));
        let before = |change: &&Change| change.acknowledged.is_some_and(|at| at <= position);
        due += changes.iter().filter(before).count();
    }
    due
}

#[test]
fn acknowledged_names_survive_any_cut() {
    const IMAGES: usize = 60;
    Seed::run("power cuts", |seed| {
        let wanted = std::env::var("VMEM_IMAGES").map_or(600, |text| text.parse().unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut images = 0;
        let mut due = 0;
        for nth in 0.. {
            if images >= wanted {
                break;
            }
            let way = Way { is_below: nth % 2 == 1, is_buffered: nth / 2 % 2 == 0 };
            let run = history(seed.fork_nth("history", nth), way, IMAGES);
            due += runtime.block_on(run);
            images += IMAGES;
        }
        println!("{images} images, {due} acknowledged changes: none lost, none torn");
    });
}
