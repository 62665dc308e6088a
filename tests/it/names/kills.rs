//! `kill -9`: what a process acknowledged of a named object is there for the next one, whole.
//!
//! Invariant: the child tells what it starts and what was acknowledged by one `write` each, so that
//! the parent knows both up to the moment of the kill. 50 kills of one store by default, and as
//! many of stores with their names in one bucket, each with an empty disk;
//! `VMEM_KILLS=1000 cargo test --release --test it names::kills -- --nocapture` for more.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use object_store::local::LocalFileSystem;
use rand::Rng;
use vmem::{VirtualMemory, VirtualMemoryConfig};
use vmem_remote::{RemoteOptions, RemoteTier};
use vmem_testkit::{Seed, driver_under_test};

use crate::support::journal::{self, Journal, May, Named, Pair, Task};
use crate::support::process::again;

const TASKS: usize = 8;
const LARGEST: usize = usize::MAX;
/// What the child is to do: where its names are, the directory, the seed, the first version, and
/// the state of each task.
const CHILD: &str = "VMEM_KILLS_CHILD";

/// Where names are, and what they lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the directory of one store after the other.
    Disk,
    /// In a bucket, which is a directory; each store has an empty disk.
    Bucket,
}

impl Place {
    fn of(name: &str) -> Self {
        let all = [Place::Disk, Place::Bucket];
        all.into_iter().find(|place| format!("{place:?}") == name).expect("the name of a place")
    }

    async fn open(self, directory: &Path) -> VirtualMemory {
        let config = VirtualMemoryConfig::builder()
            .host_capacity(4 << 20)
            .disk_capacity(64 << 20)
            .io_driver(driver_under_test());
        if self == Place::Disk {
            let config = config.disk_path(directory).build().unwrap();
            return vmem::open(config).await.unwrap();
        }
        let bucket = LocalFileSystem::new_with_prefix(directory).unwrap();
        let opened = RemoteTier::open_with_names(Arc::new(bucket), RemoteOptions::default()).await;
        let (tier, names) = opened.unwrap();
        vmem::open_over_names(config.build().unwrap(), tier, names).await.unwrap()
    }
}

fn write_pair(pair: &Pair) -> String {
    let named = |named: Named| named.map_or("-".into(), |(bytes, meta)| format!("{bytes}.{meta}"));
    format!("{}/{}", named(pair[0]), named(pair[1]))
}

fn read_pair(text: &str) -> Pair {
    let named = |text: &str| {
        let (bytes, metadata) = text.split_once('.')?;
        Some((bytes.parse().unwrap(), metadata.parse().unwrap()))
    };
    let (one, other) = text.split_once('/').unwrap();
    [named(one), named(other)]
}

/// Tells the parent.
struct Pipe;

impl Pipe {
    fn say(&self, line: &str) {
        // One call, so that no line is half there.
        std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
        std::io::stdout().flush().unwrap();
    }
}

impl Journal for Pipe {
    fn started(&self, task: usize, after: Pair) {
        self.say(&format!("\nstart {task} {}\n", write_pair(&after)));
    }

    fn acknowledged(&self, task: usize) {
        self.say(&format!("\nack {task}\n"));
    }
}

/// Changes names until it is killed.
#[test]
#[ignore = "plays the child of acknowledged_names_survive_a_kill"]
fn child_that_is_killed() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let mut order = order.split(' ');
    let place = Place::of(order.next().unwrap());
    let directory = order.next().unwrap().to_owned();
    let seed = Seed::new(order.next().unwrap().parse().unwrap());
    let version: u64 = order.next().unwrap().parse().unwrap();
    let states: Vec<Pair> = order.map(read_pair).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let vmem = place.open(Path::new(&directory)).await;
        let tasks = states.into_iter().enumerate().map(|(number, state)| {
            let vmem = vmem.clone();
            let rng = seed.fork_nth("task", number as u64).rng();
            let task = Task { number, state, version, largest: LARGEST, rng };
            tokio::spawn(async move { task.run(&vmem, &Pipe, usize::MAX).await.unwrap() })
        });
        for task in futures::future::join_all(tasks).await {
            task.unwrap();
        }
    });
}

/// Lets a child run until a moment after its first acknowledgement, and kills it. What each task
/// may have left, and how many changes were acknowledged.
fn life(
    place: Place,
    directory: &Path,
    seed: Seed,
    version: u64,
    states: &[Pair],
) -> (Vec<Vec<Pair>>, usize) {
    let states_text: Vec<_> = states.iter().map(write_pair).collect();
    let to_do = format!("{} {version} {}", seed.value(), states_text.join(" "));
    let order = format!("{place:?} {} {to_do}", directory.display());
    let mut child = again(module_path!(), "child_that_is_killed")
        .arg("--test-threads=1")
        .env(CHILD, order)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let may = May::of(states);
    let mut killer = Some(seed.fork("moment").rng().random_range(0..80));
    // A pipe ends when the child has gone, with everything in it that the child said.
    while let Some(Ok(line)) = lines.next() {
        let mut words = line.split(' ');
        match words.next() {
            Some("start") => {
                let task: usize = words.next().unwrap().parse().unwrap();
                let after = read_pair(words.next().unwrap());
                let before = *may.0.lock()[task].last().unwrap();
                let half = journal::half_renamed(before, after);
                half.filter(|_| place == Place::Bucket).inspect(|&half| may.started(task, half));
                may.started(task, after);
            }
            Some("ack") => {
                let task: usize = words.next().unwrap().parse().unwrap();
                may.acknowledged(task);
                if let Some(wait) = killer.take() {
                    let id = child.id() as i32;
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(wait));
                        let pid = rustix::process::Pid::from_raw(id).unwrap();
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    });
                }
            }
            _ => {}
        }
    }
    let status = child.wait().unwrap();
    assert!(!status.success() && status.code().is_none(), "it was killed, not: {status}");
    let acknowledged = may.acknowledged_count();
    (may.0.into_inner(), acknowledged)
}

fn kills() -> u64 {
    std::env::var("VMEM_KILLS").map_or(50, |text| text.parse().unwrap())
}

#[test]
fn acknowledged_names_survive_a_kill() {
    Seed::run("kills", |seed| {
        let kills = kills();
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let mut states: Vec<Pair> = vec![[None; 2]; TASKS];
        let mut total = 0;
        for kill in 0..kills {
            let version = kill * 1_000_000;
            let seed = seed.fork_nth("life", kill);
            let (may, acknowledged) = life(Place::Disk, directory.path(), seed, version, &states);
            total += acknowledged;
            let used = runtime.block_on(async {
                let vmem = Place::Disk.open(directory.path()).await;
                let found = journal::found(&vmem, TASKS, 512).await;
                states = journal::settle(&found, &may, LARGEST, &format!("kill {kill}"));
                let used = vmem.stats().disk.used_bytes;
                vmem.close().await.unwrap();
                used
            });
            let data = std::fs::metadata(directory.path().join(vmem_io::DATA_FILE));
            let blocks = data.map_or(0, |data| data.blocks() * 512);
            // The pages at the edges of each chunk.
            let slack = used / 8 + (TASKS as u64 * 2) * 8192;
            assert!(blocks <= used + slack, "{blocks} bytes of blocks for {used}");
            if kill % 10 == 0 {
                let verified = vmem_io::verify(directory.path()).unwrap();
                assert!(verified.damaged.is_empty(), "{:?}", verified.damaged);
            }
        }
        println!("{kills} kills, {total} acknowledged changes: none lost, none torn");
    });
}

/// Each life, and each look after it, is a store with an empty disk: what it knows it found in the
/// bucket.
#[test]
fn acknowledged_names_in_a_bucket_survive_a_kill() {
    Seed::run("bucket kills", |seed| {
        let kills = kills();
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let mut states: Vec<Pair> = vec![[None; 2]; TASKS];
        let mut total = 0;
        for kill in 0..kills {
            let version = kill * 1_000_000;
            let seed = seed.fork_nth("life", kill);
            let (may, acknowledged) = life(Place::Bucket, directory.path(), seed, version, &states);
            total += acknowledged;
            runtime.block_on(async {
                let vmem = Place::Bucket.open(directory.path()).await;
                let found = journal::found_in(&vmem, TASKS).await;
                states = journal::settle(&found, &may, LARGEST, &format!("kill {kill}"));
                vmem.close().await.unwrap();
            });
        }
        println!("{kills} kills, {total} acknowledged changes: none lost, none torn");
    });
}
