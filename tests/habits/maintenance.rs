//! Scenario 43: snapshots beside commits and reads, one and several at once.
//!
//! Excluded: a commit, or a read, that stands behind a snapshot until that has ended. Noticed by
//! the pace of each beside snapshots, against its pace beside copies of as many bytes by hand,
//! taken in turn in one run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use futures::future::{FutureExt, try_join_all};
use tempfile::TempDir;
use tokio::task::JoinSet;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, is_deadline, run, succeeds, within,
};
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, bytes, check, config, open};

const SIZES: Sizes = Sizes { space: 8 * MIB, disk: 256 * MIB };
/// What a snapshot has to copy.
const NAMED: usize = 24;
const NAMED_LEN: usize = 2 * MIB;
const ROUNDS: usize = 2;
/// How long a round is at least, with snapshots and without.
const BUSY: Duration = Duration::from_millis(300);
const SNAPSHOT_HANG: Duration = Duration::from_secs(30);
/// Beside the copies by hand a snapshot takes locks for a moment, and verifies what it copies.
const SLOWER: f64 = 8.0;
const ATTEMPTS: usize = 3;

/// How many of these calls end in a second, and the longest.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    ended: usize,
    took: Duration,
    longest: Duration,
}

impl Pace {
    fn rate(&self) -> f64 {
        self.ended as f64 / self.took.as_secs_f64()
    }

    fn add(&mut self, other: Pace) {
        self.ended += other.ended;
        self.took += other.took;
        self.longest = self.longest.max(other.longest);
    }
}

/// Calls one after the other until `stop` ends.
async fn pace<F>(
    mut call: impl FnMut(usize) -> F,
    stop: impl Future<Output = ()>,
) -> Result<Pace, String>
where
    F: Future<Output = Result<(), String>>,
{
    let mut pace = Pace::default();
    let began = Instant::now();
    tokio::pin!(stop);
    let mut stopped = false;
    while !stopped {
        let call_began = Instant::now();
        let call = call(pace.ended);
        tokio::pin!(call);
        // The last one is let end.
        loop {
            tokio::select! {
                ended = &mut call => break ended?,
                () = &mut stop, if !stopped => stopped = true,
            }
        }
        pace.ended += 1;
        pace.longest = pace.longest.max(call_began.elapsed());
    }
    pace.took = began.elapsed();
    Ok(pace)
}

/// Where snapshots go: a file system in memory, if there is one, so that they leave the disk to
/// the calls beside them.
fn destination() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Takes snapshots one after the other, `count` at once; returns their number.
async fn snapshots(vmem: &VirtualMemory, count: usize) -> Result<usize, String> {
    let began = Instant::now();
    let each = (0..count).map(|_| async move {
        let mut taken = 0;
        while taken == 0 || began.elapsed() < BUSY {
            let dir = destination();
            let to = dir.path().join("snapshot");
            succeeds("snapshot", SNAPSHOT_HANG, vmem.snapshot(&to)).await?;
            taken += 1;
        }
        Ok(taken)
    });
    let taken: Result<Vec<usize>, String> = try_join_all(each).await;
    taken.map(|taken| taken.into_iter().sum())
}

/// The work of a snapshot without the store: a thread that copies as many bytes, again and again.
fn copy_by_hand(file: PathBuf, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let stop = stop.clone();
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            let dir = destination();
            std::fs::copy(&file, dir.path().join("copy")).unwrap();
        }
    })
}

async fn beside(what: What, count: usize) -> Result<(), String> {
    let store = open(Place::Real, SIZES, |builder| builder).await;
    let vmem = &store.vmem;
    for n in 0..NAMED {
        drop(vmem.put_named(&format!("large {n}"), bytes(n, 1, NAMED_LEN), DISK).await.unwrap());
    }
    let handle = vmem.put(bytes(500, 1, 4 * MIB), HOST).await.unwrap();
    vmem.demote(&handle, DISK).await.unwrap();
    let file = store.dir.path().join("copied");
    std::fs::write(&file, vec![1; NAMED * NAMED_LEN]).unwrap();
    let call = |n: usize| what.call(vmem, &handle, n).boxed();
    let mut quiet = Pace::default();
    let mut busy = Pace::default();
    let mut taken = 0;
    for _ in 0..ROUNDS {
        let stop = Arc::new(AtomicBool::new(false));
        let copies: Vec<_> = (0..count).map(|_| copy_by_hand(file.clone(), &stop)).collect();
        quiet.add(pace(call, tokio::time::sleep(BUSY)).await?);
        stop.store(true, Ordering::Relaxed);
        copies.into_iter().for_each(|copy| copy.join().unwrap());
        let mut ended = Ok(0);
        let round = pace(call, async { ended = snapshots(vmem, count).await });
        busy.add(round.await?);
        taken += ended?;
    }
    println!("{what:?} beside {count}: {quiet:?} by hand, {busy:?} in {taken} snapshots");
    let quiet = quiet.rate();
    let busy = busy.rate();
    if busy * SLOWER < quiet {
        return Err(format!("{busy:.1} a second, {quiet:.1} beside as many copies by hand"));
    }
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

/// What goes on beside snapshots.
#[derive(Clone, Copy, Debug)]
enum What {
    Commit,
    Flush,
    ColdRead,
    Write,
}

impl What {
    async fn call(self, vmem: &VirtualMemory, handle: &VMemHandle, n: usize) -> Result<(), String> {
        match self {
            What::Commit => {
                let name = format!("small {}", n % 7);
                let put = vmem.put_named(&name, [n as u8; 3_000], HOST);
                drop(succeeds("put_named", BOUND * 2, put.boxed()).await?);
            }
            What::Flush => {
                let name = format!("flushed {}", n % 3);
                let put = async {
                    let handle = match vmem.open_named(&name).await {
                        Ok(handle) => handle,
                        Err(_) => vmem.allocate_named(&name, 3_000, HOST).await?,
                    };
                    vmem.write(&handle, [n as u8; 3_000]).await?;
                    vmem.flush(&handle).await
                };
                succeeds("write and flush", BOUND * 2, put.boxed()).await?;
            }
            What::ColdRead => {
                let mut buf = vec![0; 64 * KIB];
                let at = n * 64 * KIB % (4 * MIB);
                let read = vmem.read_into(handle, at..at + 64 * KIB, &mut buf);
                succeeds("read_into", BOUND * 2, read).await?;
                check(500, &[1], at, &buf)?;
            }
            What::Write => {
                let put = vmem.put(bytes(n, 1, 100_000), DISK);
                drop(succeeds("put on disk", BOUND * 2, put).await?);
            }
        }
        Ok(())
    }
}

fn keeps_its_pace(what: What) {
    let mut complaints = Vec::new();
    for count in [1, 4] {
        // A burst of other work on this machine may slow one side alone, and not every time.
        let mut found = None;
        for _ in 0..ATTEMPTS {
            found = run(Threads::Two, move || beside(what, count)).err();
            if found.is_none() {
                break;
            }
        }
        complaints.extend(found.map(|why| format!("{what:?}, {count} at once: {why}")));
    }
    assert_none(&complaints);
}

#[test]
fn commits_keep_their_pace_beside_snapshots() {
    keeps_its_pace(What::Commit);
}

#[test]
fn flushes_keep_their_pace_beside_snapshots() {
    keeps_its_pace(What::Flush);
}

#[test]
fn cold_reads_keep_their_pace_beside_snapshots() {
    keeps_its_pace(What::ColdRead);
}

#[test]
fn writes_keep_their_pace_beside_snapshots() {
    keeps_its_pace(What::Write);
}

/// Snapshots that are asked for at once, more than any pool has threads.
const AT_ONCE: usize = 9;

/// Asks for nine snapshots, then makes the call; returns how many of them had ended before it did.
async fn ended_before(vmem: &VirtualMemory, call: &str) -> Result<usize, String> {
    let mut snapshots = JoinSet::new();
    let ended = Arc::new(AtomicUsize::new(0));
    for _ in 0..AT_ONCE {
        let vmem = vmem.clone();
        let ended = ended.clone();
        snapshots.spawn(async move {
            let dir = destination();
            let taken = vmem.snapshot(&dir.path().join("snapshot")).await;
            ended.fetch_add(1, Ordering::SeqCst);
            taken
        });
    }
    tokio::time::sleep(Duration::from_millis(3)).await;
    let short = async {
        match call {
            "put_named" => drop(vmem.put_named("short", b"bytes", HOST).await?),
            "set_metadata" => vmem.set_metadata("short", b"metadata").await?,
            "rename_named" => vmem.rename_named("short", "renamed").await?,
            "open_named" => drop(vmem.open_named("renamed").await?),
            "names" => drop(vmem.names("ren").try_collect::<Vec<_>>().await?),
            "remove_named" => vmem.remove_named("renamed").await?,
            other => unreachable!("{other} is not in the table"),
        }
        Ok(())
    };
    succeeds(call, SNAPSHOT_HANG, short.boxed()).await?;
    let before = ended.load(Ordering::SeqCst);
    while let Some(taken) = within("a snapshot", SNAPSHOT_HANG, snapshots.join_next()).await? {
        taken.unwrap().map_err(|error| format!("a snapshot: {error}"))?;
    }
    Ok(before)
}

/// A short job does not queue behind long ones: the order of their ends tells, not the time.
#[test]
fn short_calls_pass_snapshots_that_queue() {
    let mut complaints = Vec::new();
    for threads in THREADS {
        let found = run(threads, || async {
            let store = open(Place::Real, SIZES, |builder| builder).await;
            for n in 0..NAMED {
                let name = format!("large {n}");
                let put = store.vmem.put_named(&name, bytes(n, 1, NAMED_LEN / 2), DISK);
                drop(put.await.unwrap());
            }
            let calls = [
                "put_named",
                "set_metadata",
                "rename_named",
                "open_named",
                "names",
                "remove_named",
            ];
            for call in calls {
                let before = ended_before(&store.vmem, call).await?;
                println!("{before} of {AT_ONCE} snapshots ended before {call}");
                if before > AT_ONCE / 2 {
                    return Err(format!("{call} waited for {before} of {AT_ONCE} snapshots"));
                }
            }
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
        });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}

/// A snapshot is one moment of the store, whatever is committed meanwhile; each opens.
#[test]
fn snapshots_taken_beside_commits_open_as_one_moment() {
    let found = run(Threads::Two, || async {
        let store = open(Place::Real, SIZES, |builder| builder).await;
        let vmem = store.vmem.clone();
        for n in 0..6 {
            drop(
                vmem.put_named(&format!("large {n}"), bytes(n, 1, NAMED_LEN), DISK).await.unwrap(),
            );
        }
        let committing = {
            let vmem = vmem.clone();
            tokio::spawn(async move {
                for n in 0_u64.. {
                    // The second is never behind the first by more than one.
                    for name in ["first", "second"] {
                        match vmem.put_named(name, n.to_le_bytes(), HOST).await {
                            Ok(_) => {}
                            Err(error) if is_deadline(&error) => return,
                            Err(vmem::VirtualMemoryError::Closed) => return,
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(30)).await;
        for round in 0..3 {
            let both = [0, 1].map(|n| {
                let to = store.dir.path().join(format!("snapshot {round} {n}"));
                let vmem = &vmem;
                async move { succeeds("snapshot", SNAPSHOT_HANG, vmem.snapshot(&to)).await }
            });
            try_join_all(both).await?;
        }
        succeeds("close", CLOSE_BOUND, vmem.close()).await?;
        within("the commits", BOUND, committing).await?.unwrap();
        for round in 0..3 {
            let at = store.dir.path().join(format!("snapshot {round} 1"));
            opens(config(SIZES, |builder| builder.disk_path(at)).build().unwrap()).await?;
        }
        Ok(())
    });
    assert_none(&Vec::from_iter(found.err()));
}

async fn opens(config: VirtualMemoryConfig) -> Result<(), String> {
    let vmem = succeeds("opening a snapshot", BOUND * 3, vmem::open(config)).await?;
    let mut numbers = Vec::new();
    for name in ["first", "second"] {
        let handle = succeeds(name, BOUND, vmem.open_named(name)).await?;
        let read = succeeds(name, BOUND, vmem.read(&handle)).await?;
        numbers.push(u64::from_le_bytes(read[..].try_into().unwrap()));
    }
    if !(numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1) {
        return Err(format!("a snapshot has {numbers:?}"));
    }
    let handle = succeeds("a large one", BOUND, vmem.open_named("large 3")).await?;
    let mut buf = vec![0; NAMED_LEN];
    succeeds("a large one", BOUND, vmem.read_into(&handle, 0..NAMED_LEN, &mut buf)).await?;
    check(3, &[1], 0, &buf)?;
    drop(handle);
    succeeds("close", CLOSE_BOUND, vmem.close()).await
}
