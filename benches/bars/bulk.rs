//! P16: many objects at once, by one call and by hand.
//!
//! By hand the same store does it object by object, with each of several concurrencies; the best of
//! them is the peer. The wall time of the whole is quoted, in turns on the same objects. `close`
//! has no other way by hand than to flush each and close then.

use std::path::Path;
use std::time::Instant;

use futures::stream::{StreamExt, TryStreamExt, iter};
use tokio::runtime::Builder;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds};

const LEN: usize = 1024;
const AT_ONCE: [usize; 3] = [64, 512, 4096];

pub(crate) fn p16(report: &mut Report, count: usize, rounds: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))?;
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        flush(report, place.path(), count, rounds).await?;
        close_and_open(report, place.path(), count, rounds).await
    })
}

async fn open(path: &Path, count: usize) -> anyhow::Result<VirtualMemory> {
    let config = VirtualMemoryConfig::builder()
        .disk_path(path)
        .host_capacity((count * LEN * 2) as u64 + (64 << 20))
        .disk_capacity((count * LEN * 4) as u64 + (64 << 20));
    Ok(vmem::open(config.build()?).await?)
}

/// Objects at home on disk that only host memory has the bytes of.
async fn dirty(vmem: &VirtualMemory, handles: &[VMemHandle], round: usize) -> anyhow::Result<()> {
    for handle in handles {
        vmem.write_with(handle, |bytes| bytes.fill(round as u8)).await?;
    }
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
    let mut ours = Rounds::default();
    let mut theirs = [Rounds::default(), Rounds::default(), Rounds::default()];
    for round in 0..=rounds {
        dirty(&vmem, &handles, round).await?;
        let began = Instant::now();
        vmem.flush_all().await?;
        let all = began.elapsed().as_secs_f64() * 1e3;
        anyhow::ensure!(vmem.stats().dirty_bytes == 0, "flush_all left something");
        if round > 0 {
            ours.0.push(all);
        }
        for (at_once, side) in AT_ONCE.iter().zip(&mut theirs) {
            dirty(&vmem, &handles, round).await?;
            let began = Instant::now();
            let flushes = iter(&handles).map(|handle| vmem.flush(handle));
            flushes.buffer_unordered(*at_once).try_collect::<()>().await?;
            if round > 0 {
                side.0.push(began.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    add(report, format!("flush_all of {count} objects of {LEN} bytes"), &ours, &theirs);
    drop(handles);
    vmem.close().await?;
    Ok(())
}

/// Puts named objects, and closes: with what nobody flushed, and after each was flushed.
async fn close_and_open(
    report: &mut Report,
    place: &Path,
    count: usize,
    rounds: usize,
) -> anyhow::Result<()> {
    let path = place.join("names");
    let mut ours = Rounds::default();
    let mut opened = Rounds::default();
    let mut theirs = [Rounds::default(), Rounds::default(), Rounds::default()];
    let name = |n: usize| format!("object {n}");
    let vmem = open(&path, count).await?;
    let puts = iter(0..count).map(|n| {
        let vmem = &vmem;
        async move { vmem.put_named(&name(n), [1; LEN], MemoryTier::Host).await.map(drop) }
    });
    puts.buffer_unordered(512).try_collect::<()>().await?;
    vmem.close().await?;
    for round in 0..=rounds {
        for by_hand in 0..=AT_ONCE.len() {
            let began = Instant::now();
            let vmem = open(&path, count).await?;
            if round > 0 {
                opened.0.push(began.elapsed().as_secs_f64() * 1e3);
            }
            let mut handles = Vec::with_capacity(count);
            for n in 0..count {
                handles.push(vmem.open_named(&name(n)).await?);
            }
            dirty(&vmem, &handles, round).await?;
            let began = Instant::now();
            if let Some(at_once) = by_hand.checked_sub(1).map(|nth| AT_ONCE[nth]) {
                let flushes = iter(&handles).map(|handle| vmem.flush(handle));
                flushes.buffer_unordered(at_once).try_collect::<()>().await?;
            }
            drop(handles);
            vmem.close().await?;
            let took = began.elapsed().as_secs_f64() * 1e3;
            if round > 0 {
                by_hand.checked_sub(1).map_or(&mut ours, |nth| &mut theirs[nth]).0.push(took);
            }
        }
    }
    add(report, format!("close with {count} changed names of {LEN} bytes"), &ours, &theirs);
    println!("P16 open with {count} names: {:.0} ms", opened.median());
    Ok(())
}

/// Beside the best of the sides.
fn add(report: &mut Report, what: String, ours: &Rounds, theirs: &[Rounds; 3]) {
    let best = (0..theirs.len()).min_by(|&a, &b| theirs[a].median().total_cmp(&theirs[b].median()));
    let best = best.unwrap_or(0);
    let peer = format!("by-hand-{}-at-once", AT_ONCE[best]);
    let theirs = &theirs[best];
    report.add(&Bar {
        id: "P16",
        what,
        unit: "ms",
        ours,
        peer: peer.as_str(),
        theirs,
        bar: Some(1.2),
    });
}
