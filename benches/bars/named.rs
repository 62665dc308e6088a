//! P12, flushes of named objects beside one commit for each; and what a million names cost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use redb::{Database, TableDefinition};
use tokio::runtime::{Builder, Runtime};
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryConfig};

use crate::metadata::resident_bytes;
use crate::report::{Bar, Report, Rounds};

const TASKS: u64 = 64;
const LEN: usize = 4096;
const ROUND: Duration = Duration::from_secs(2);

/// 64 tasks, each of which writes its 4 KiB object and flushes it, over and over; beside it redb
/// with one commit for each object of 4 KiB, which is what a service does that stores them there.
pub(crate) fn p12(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let vmem = runtime.block_on(open(&place.path().join("store"), 1 << 30))?;
    let peer = Database::create(place.path().join("peer.redb"))?;
    let mut ours = Rounds::default();
    let mut theirs = Rounds::default();
    let before = vmem.stats();
    for round in 0..=rounds {
        let our = flushes(&runtime, &vmem)?;
        let their = commits(&peer)?;
        if round > 0 {
            ours.0.push(our);
            theirs.0.push(their);
        }
    }
    let after = vmem.stats();
    let changes = after.named_changes - before.named_changes;
    let commits = after.commits - before.commits;
    println!(
        "P12 {changes} flushes were acknowledged by {commits} commits: {:.1} for each",
        changes as f64 / commits as f64
    );
    let rate = |rounds: &Rounds| 1e6 / rounds.median();
    println!("P12 flushes/s {:.0}, commits/s of redb alone {:.0}", rate(&ours), rate(&theirs));
    report.add(&Bar {
        id: "P12",
        what: "time of a flush, 64 tasks, named objects of 4 KiB".into(),
        unit: "us",
        ours: &ours,
        peer: "redb-commit-each",
        theirs: &theirs,
        bar: Some(0.2),
    });
    runtime.block_on(vmem.close())?;
    Ok(())
}

async fn open(path: &Path, disk: u64) -> anyhow::Result<VirtualMemory> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(path)
        .host_capacity(64 << 20)
        .disk_capacity(disk)
        .build()?;
    Ok(vmem::open(config).await?)
}

/// Microseconds for each flush.
fn flushes(runtime: &Runtime, vmem: &VirtualMemory) -> anyhow::Result<f64> {
    let done = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let vmem = vmem.clone();
            let done = done.clone();
            runtime.spawn(async move {
                let name = format!("object {task}");
                let handle = vmem.put_named(&name, vec![task as u8; LEN], MemoryTier::Host).await?;
                while began.elapsed() < ROUND {
                    let n = done.fetch_add(1, Ordering::Relaxed);
                    vmem.write(&handle, vec![n as u8; LEN]).await?;
                    vmem.flush(&handle).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        runtime.block_on(task)??;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / done.load(Ordering::Relaxed) as f64)
}

/// Microseconds for each commit.
fn commits(peer: &Database) -> anyhow::Result<f64> {
    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("objects");
    let began = Instant::now();
    let mut done = 0_u64;
    while began.elapsed() < ROUND {
        let change = peer.begin_write()?;
        change.open_table(TABLE)?.insert(done % TASKS, &[done as u8; LEN][..])?;
        change.commit()?;
        done += 1;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / done as f64)
}

/// The store that a child process is to open, and how many names it has.
const CHILD: &str = "VMEM_BENCH_NAMES_CHILD";

/// Stores that many names, and lets a process of its own open them.
pub(crate) fn million(report: &mut Report, count: u64) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let path = place.path().join("store");
    let disk = count * 512 + (64 << 20);
    let began = Instant::now();
    // In parts, so that each start verifies what the previous one has left.
    const PART: u64 = 100_000;
    for part in 0..count.div_ceil(PART) {
        let numbers = part * PART..count.min((part + 1) * PART);
        runtime.block_on(async {
            let vmem = open(&path, disk).await?;
            let puts = futures::stream::iter(numbers).map(|n| {
                let vmem = vmem.clone();
                tokio::spawn(async move {
                    let name = format!("shard {:03}/object {n:09}", n % 1000);
                    vmem.put_named(&name, n.to_le_bytes().repeat(12), MemoryTier::Disk).await
                })
            });
            let mut puts = puts.buffer_unordered(512);
            while let Some(put) = puts.next().await {
                put??;
            }
            drop(puts);
            vmem.close().await?;
            anyhow::Ok(())
        })?;
    }
    println!("names: {count} stored in {:.0} s", began.elapsed().as_secs_f64());
    let catalog = std::fs::metadata(path.join("vmem.catalog"))?.len();
    println!("names: the catalog has {catalog} bytes, {} a name", catalog / count);
    let child = std::process::Command::new(std::env::current_exe()?)
        .env(CHILD, format!("{} {count}", path.display()))
        .output()?;
    anyhow::ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    let printed = String::from_utf8(child.stdout)?;
    println!("{}", printed.trim());
    for line in printed.lines().filter_map(|line| line.strip_prefix("FIGURE ")) {
        let mut parts = line.split('|').map(str::trim);
        let what = parts.next().unwrap_or("");
        let value = parts.next().unwrap_or("nan");
        let unit = parts.next().unwrap_or("");
        let bar = parts.next().unwrap_or("0");
        report.figure("names", what, value.parse()?, unit, bar.parse()?);
    }
    Ok(())
}

/// Opens the store, if this is the child process. True if it was.
pub(crate) fn child() -> anyhow::Result<bool> {
    let Ok(half) = std::env::var(CHILD) else { return Ok(false) };
    let (path, count) = half.rsplit_once(' ').unwrap_or((&half, "1"));
    let count: u64 = count.parse()?;
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let disk = count * 512 + (64 << 20);
        let before = resident_bytes()?;
        let began = Instant::now();
        let vmem = open(Path::new(path), disk).await?;
        let opened = began.elapsed().as_secs_f64();
        let each = (resident_bytes()? - before) / count as f64;
        println!("FIGURE open with {count} names | {opened} | s | 10");
        println!(
            "FIGURE resident memory after opening, for each of {count} names | {each} | bytes | 160"
        );
        let began = Instant::now();
        let few: Vec<_> = vmem.names("shard 500/").take(100).try_collect().await?;
        let listed = began.elapsed().as_secs_f64();
        anyhow::ensure!(few.len() as u64 == 100.min(count / 1000), "100 of a prefix");
        println!("names: 100 of one prefix in {:.1} ms", listed * 1e3);
        let began = Instant::now();
        let all = vmem.names("").try_fold(0_u64, |n, _| async move { Ok(n + 1) }).await?;
        anyhow::ensure!(all == count, "{all} of {count} names");
        println!("names: all of them in {:.1} s", began.elapsed().as_secs_f64());
        let began = Instant::now();
        for entry in &few {
            let handle = vmem.open_named(&entry.name).await?;
            anyhow::ensure!(vmem.read(&handle).await?.len() == 96, "the bytes of {}", entry.name);
        }
        println!(
            "names: opened and read in {:.0} us each",
            began.elapsed().as_secs_f64() * 1e6 / few.len() as f64
        );
        vmem.close().await?;
        anyhow::Ok(())
    })?;
    Ok(true)
}
