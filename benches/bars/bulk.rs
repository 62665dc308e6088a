//! P16: many objects at once, by one call and by hand.
//!
//! By hand the same store does it object by object, with each of several concurrencies in the first
//! round, and with the best of them from then on. The wall time of the whole is quoted, in turns on
//! the same objects. `close` has no other way by hand than to flush each and close then. A store is
//! opened beside an index that a service would keep for itself: redb with a row for each name, read
//! as a whole into a table of names and an ordered list of extents.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use futures::stream::{StreamExt, TryStreamExt, iter};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::runtime::Builder;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds};

const LEN: usize = 1024;
/// Objects at once by hand: the best is the peer.
const AT_ONCE: [usize; 3] = [64, 512, 4096];
/// Ours takes at most this many times as long.
const BAR: f64 = 1.2;
/// Objects at once where nothing is measured.
const UNMEASURED: usize = 512;

pub(crate) fn p16(report: &mut Report, count: usize, rounds: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        flush(report, place.path(), count, rounds).await?;
        close_and_open(report, place.path(), count, rounds).await
    })
}

/// What was measured by one call and by hand, and the best concurrency by hand.
#[derive(Default)]
struct Sides {
    ours: Rounds,
    theirs: Rounds,
    /// Of the first round, by concurrency.
    tried: Vec<f64>,
}

impl Sides {
    /// How much at once by hand in this round, one after the other.
    fn by_hand(&self, round: usize) -> Vec<usize> {
        if round == 0 { AT_ONCE.to_vec() } else { vec![self.best()] }
    }

    fn best(&self) -> usize {
        let least = AT_ONCE.iter().zip(&self.tried).min_by(|a, b| a.1.total_cmp(b.1));
        least.map_or(AT_ONCE[0], |(&at_once, _)| at_once)
    }

    fn add(&mut self, round: usize, by_hand: bool, took_ms: f64) {
        match (round, by_hand) {
            (0, true) => self.tried.push(took_ms),
            (0, false) => {}
            (_, true) => self.theirs.0.push(took_ms),
            (_, false) => self.ours.0.push(took_ms),
        }
    }

    fn report(&self, report: &mut Report, what: String) {
        println!("P16 {what}: by hand {AT_ONCE:?} at once took {:.0?} ms", self.tried);
        let peer = format!("by-hand-{}-at-once", self.best());
        add(report, what, &self.ours, &peer, &self.theirs, Some(BAR));
    }
}

fn add(
    report: &mut Report,
    what: String,
    ours: &Rounds,
    peer: &str,
    theirs: &Rounds,
    bar: Option<f64>,
) {
    let id = "P16";
    let unit = "ms";
    report.add(&Bar { id, what, unit, ours, peer, theirs, bar });
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

async fn open(path: &Path, count: usize) -> anyhow::Result<VirtualMemory> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(path)
        .host_capacity((count * LEN * 2) as u64 + (64 << 20))
        .disk_capacity((count * LEN * 4) as u64 + (64 << 20));
    Ok(vmem::open(config.build()?).await?)
}

/// Leaves the bytes of every object in host memory alone. Those at home on disk are changed where
/// they are, since a write of the whole would go to disk; others are written as a whole, so that
/// what is on disk is not read for that.
async fn dirty(vmem: &VirtualMemory, handles: &[VMemHandle], round: usize) -> anyhow::Result<()> {
    let writes = iter(handles).map(|handle| async move {
        match handle.home_tier() {
            MemoryTier::Disk => vmem.write_with(handle, |bytes| bytes.fill(round as u8)).await,
            _ => vmem.write(handle, [round as u8; LEN]).await,
        }
    });
    writes.buffer_unordered(UNMEASURED).try_collect::<()>().await?;
    let dirty_bytes = vmem.stats().dirty_bytes;
    anyhow::ensure!(dirty_bytes >= (handles.len() * LEN) as u64, "{dirty_bytes} dirty bytes");
    Ok(())
}

/// Flushes each object on its own.
async fn by_hand(
    vmem: &VirtualMemory,
    handles: &[VMemHandle],
    at_once: usize,
) -> anyhow::Result<()> {
    let flushes = iter(handles).map(|handle| vmem.flush(handle));
    flushes.buffer_unordered(at_once).try_collect::<()>().await?;
    Ok(())
}

async fn flush(
    report: &mut Report,
    place: &Path,
    count: usize,
    rounds: usize,
) -> anyhow::Result<()> {
    let vmem = open(&place.join("flush"), count).await?;
    let mut handles = Vec::with_capacity(count);
    for _ in 0..count {
        handles.push(vmem.allocate(LEN, MemoryTier::Disk).await?);
    }
    let mut sides = Sides::default();
    for round in 0..=rounds {
        dirty(&vmem, &handles, round).await?;
        let began = Instant::now();
        vmem.flush_all().await?;
        sides.add(round, false, ms(began));
        anyhow::ensure!(vmem.stats().dirty_bytes == 0, "flush_all left something");
        for at_once in sides.by_hand(round) {
            dirty(&vmem, &handles, round).await?;
            let began = Instant::now();
            by_hand(&vmem, &handles, at_once).await?;
            sides.add(round, true, ms(began));
        }
    }
    sides.report(report, format!("flush_all of {count} objects of {LEN} bytes"));
    drop(handles);
    vmem.close().await?;
    Ok(())
}

fn name(n: usize) -> String {
    format!("object {n}")
}

/// Puts named objects, and closes: with unflushed objects, and after each was flushed.
async fn close_and_open(
    report: &mut Report,
    place: &Path,
    count: usize,
    rounds: usize,
) -> anyhow::Result<()> {
    let path = place.join("names");
    let vmem = open(&path, count).await?;
    let puts = iter(0..count).map(|n| {
        let vmem = &vmem;
        async move { vmem.put_named(&name(n), [1; LEN], MemoryTier::Host).await.map(drop) }
    });
    puts.buffer_unordered(UNMEASURED).try_collect::<()>().await?;
    vmem.close().await?;
    let index = Index::with(place.join("index.redb"), count)?;
    let mut closed = Sides::default();
    let mut opened = <[Rounds; 3]>::default();
    for round in 0..=rounds {
        let mut turns = vec![None];
        turns.extend(closed.by_hand(round).into_iter().map(Some));
        for at_once in turns {
            let began = Instant::now();
            let vmem = open(&path, count).await?;
            let ours = ms(began);
            let theirs = [index.open(count, false)?, index.open(count, true)?];
            if round > 0 {
                for (side, took) in opened.iter_mut().zip([ours, theirs[0], theirs[1]]) {
                    side.0.push(took);
                }
            }
            let name = |n| {
                let vmem = &vmem;
                async move { vmem.open_named(&name(n)).await }
            };
            let handles = iter(0..count).map(name).buffer_unordered(UNMEASURED);
            let handles: Vec<_> = handles.try_collect().await?;
            dirty(&vmem, &handles, round).await?;
            let began = Instant::now();
            if let Some(at_once) = at_once {
                by_hand(&vmem, &handles, at_once).await?;
            }
            drop(handles);
            vmem.close().await?;
            closed.add(round, at_once.is_some(), ms(began));
        }
    }
    closed.report(report, format!("close with {count} changed names of {LEN} bytes"));
    let [ours, plain, verified] = &opened;
    let what = format!("open with {count} names");
    add(report, what.clone(), ours, "redb-index-by-hand", plain, Some(BAR));
    add(report, what, ours, "the-same-verified", verified, None);
    Ok(())
}

const ROWS: TableDefinition<'_, &str, (u64, u32, u32)> = TableDefinition::new("objects");

/// What a service would keep for itself: where the object of each name is.
struct Index {
    path: PathBuf,
}

impl Index {
    fn with(path: PathBuf, count: usize) -> anyhow::Result<Self> {
        let database = Database::create(&path)?;
        let change = database.begin_write()?;
        let mut rows = change.open_table(ROWS)?;
        for n in 0..count {
            rows.insert(name(n).as_str(), ((n * LEN) as u64, LEN as u32, n as u32))?;
        }
        drop(rows);
        change.commit()?;
        Ok(Index { path })
    }

    /// Milliseconds until it knows every name and every extent, with the checksums of the file
    /// verified first or not.
    fn open(&self, count: usize, verified: bool) -> anyhow::Result<f64> {
        let began = Instant::now();
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(verified);
        let database = builder.open(&self.path)?;
        let rows = database.begin_read()?.open_table(ROWS)?;
        let mut names = HashMap::with_capacity(count);
        let mut extents = Vec::with_capacity(count);
        for row in rows.iter()? {
            let (name, place) = row?;
            let (offset, len, sum) = place.value();
            names.insert(name.value().to_owned(), (offset, len, sum));
            extents.push((offset, len));
        }
        extents.sort_unstable();
        let took = ms(began);
        anyhow::ensure!(extents.windows(2).all(|two| two[0].0 + LEN as u64 == two[1].0), "extents");
        let last = names.get(&name(count - 1)).context("the last name")?;
        anyhow::ensure!(names.len() == count && last.2 as usize == count - 1, "names");
        Ok(took)
    }
}
