//! The writer and the reader.
//!
//! Invariant: what the writer has written in a round is acknowledged, so it is in the bucket,
//! before the next round begins; the name `end` says which round was the last. Called by `main` in
//! a process of its own each.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryError};

use crate::{Options, bucket, version};

/// Between two rounds of the writer.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two looks of a reader at all names.
const LOOK: Duration = Duration::from_millis(10);
/// Between two looks at whether there is an end.
const LOOK_FOR_END: Duration = Duration::from_millis(500);
/// How long after the last round a reader may take.
const LATE: Duration = Duration::from_secs(60);
/// The name that says which round was the last.
const END: &str = "end";

fn name(nth: u64) -> String {
    format!("object/{nth}")
}

/// Writes a version of each name, round by round.
///
/// # Errors
///
/// Those of the store.
pub(crate) async fn write(options: &Options) -> Result<()> {
    let vmem = bucket::open(options, None).await?;
    let len = usize::try_from(options.bytes)?;
    let mut handles = Vec::new();
    for nth in 0..options.names {
        let first = version::bytes(0, len);
        handles.push(vmem.put_named(&name(nth), first, MemoryTier::Host).await?);
    }
    let ends = Instant::now() + Duration::from_secs(options.seconds);
    let mut round = 0;
    let mut took = Vec::new();
    while Instant::now() < ends {
        round += 1;
        let began = Instant::now();
        let vmem = &vmem;
        let writes = handles.iter().map(|handle| async move {
            vmem.write(handle, version::bytes(round, len)).await?;
            vmem.flush(handle).await
        });
        try_join_all(writes).await?;
        took.push(began.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    vmem.put_named(END, round.to_le_bytes(), MemoryTier::Host).await?;
    println!(
        "writer: {} versions of {} names, {} bytes each, in {round} rounds of {}",
        (round + 1) * options.names,
        options.names,
        options.bytes,
        spread(took),
    );
    drop(handles);
    vmem.close().await?;
    Ok(())
}

/// Reads all names over and over, until it has seen the last version of each.
///
/// # Errors
///
/// Those of the store; a version that is not whole, goes back, or does not come.
pub(crate) async fn follow(options: &Options) -> Result<()> {
    let vmem = bucket::open(options, Some(Duration::from_millis(options.follow_ms))).await?;
    let limit = Instant::now() + Duration::from_secs(options.seconds) + LATE;
    let mut seen: Vec<Option<u64>> = vec![None; usize::try_from(options.names)?];
    let mut late = Vec::new();
    let mut reads = 0_u64;
    let mut looked_for_end = Instant::now();
    let mut last = None;
    while last.is_none() || seen.iter().any(|seen| *seen != last) {
        ensure!(Instant::now() < limit, "the last version, {last:?}, was not seen: {seen:?}");
        for (nth, seen) in (0..).zip(&mut seen) {
            let Some(bytes) = read(&vmem, &name(nth)).await? else { continue };
            reads += 1;
            let (number, age) = version::check(&bytes)?;
            ensure!(*seen <= Some(number), "version {number} after {seen:?}");
            if *seen < Some(number) {
                late.push(age);
                *seen = Some(number);
            }
        }
        if last.is_none() && looked_for_end.elapsed() > LOOK_FOR_END {
            looked_for_end = Instant::now();
            let end = read(&vmem, END).await?;
            last = end.and_then(|end| Some(u64::from_le_bytes(end[..].try_into().ok()?)));
        }
        tokio::time::sleep(LOOK).await;
    }
    println!(
        "reader: {reads} reads, all whole; {} new versions, seen {} after the call that wrote them",
        late.len(),
        spread(late),
    );
    vmem.close().await?;
    Ok(())
}

/// What has the name now, if anything has.
async fn read(vmem: &VirtualMemory, name: &str) -> Result<Option<Bytes>> {
    let handle = match vmem.open_named(name).await {
        Err(VirtualMemoryError::NameNotFound { .. }) => return Ok(None),
        handle => handle?,
    };
    Ok(Some(vmem.read(&handle).await?))
}

/// The median and the greatest of these.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    match (times.get(times.len() / 2), times.last()) {
        (Some(median), Some(most)) => format!("{median:.1?} (at most {most:.1?})"),
        _ => "-".to_owned(),
    }
}
