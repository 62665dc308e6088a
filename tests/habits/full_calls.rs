//! Scenario 36, the table: each call on a store whose tiers are full of live objects, VRAM too.
//!
//! Excluded: a call that waits out its timeout where nothing can make space, or that keeps a core
//! busy meanwhile. Noticed by what it answers, and when.

use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt};
use vmem::{MemoryTier, PolicyKind, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::full::{idle_costs_nothing, refused_at_once};
use crate::harness::{BOUND, CLOSE_BOUND, Threads, WAIT, assert_none, run, succeeds, within};
use crate::stores::{DISK, HOST, MIB, Place, Sizes, Store, VRAM, bytes, check, on_a_device, open};

const LEN: usize = 20_000;
const SIZES: Sizes = Sizes { space: 4 * MIB, disk: 4 * MIB };

type Ended = Result<(), VirtualMemoryError>;

/// A call about an object that is on disk, and one about an object in host memory.
fn calls(
    vmem: &VirtualMemory,
    cold: &VMemHandle,
    hot: &VMemHandle,
) -> Vec<(&'static str, BoxFuture<'static, Ended>)> {
    macro_rules! call {
        (|$vmem:ident, $cold:ident, $hot:ident| $call:expr) => {{
            let $vmem = vmem.clone();
            let $cold = cold.clone();
            let $hot = hot.clone();
            async move {
                let _both_stay = (&$cold, &$hot);
                $call.await.map(drop)
            }
            .boxed()
        }};
    }
    vec![
        ("read", call!(|vmem, cold, hot| vmem.read(&cold))),
        ("read_at", call!(|vmem, cold, hot| vmem.read_at(&cold, 5..10_000))),
        ("read_many", call!(|vmem, cold, hot| vmem.read_many(&[hot.clone(), cold.clone()]))),
        ("promote", call!(|vmem, cold, hot| vmem.promote(&cold, HOST))),
        ("pin", call!(|vmem, cold, hot| vmem.pin(&cold, HOST))),
        ("prefetch", call!(|vmem, cold, hot| vmem.prefetch(&cold, HOST))),
        ("demote", call!(|vmem, cold, hot| vmem.demote(&hot, DISK))),
        ("write", call!(|vmem, cold, hot| vmem.write(&cold, vec![1; LEN]))),
        ("write_at", call!(|vmem, cold, hot| vmem.write_at(&cold, 9, [1; 99]))),
        ("write_with", call!(|vmem, cold, hot| vmem.write_with(&cold, |to| to.fill(1)))),
        ("put", call!(|vmem, cold, hot| vmem.put(vec![3; LEN], HOST))),
        ("put on disk", call!(|vmem, cold, hot| vmem.put(vec![3; LEN], DISK))),
        ("large put", call!(|vmem, cold, hot| vmem.put(vec![3; 40 * LEN], HOST))),
        ("allocate", call!(|vmem, cold, hot| vmem.allocate(LEN, HOST))),
        ("put_named", call!(|vmem, cold, hot| vmem.put_named("a name", [3; 9_000], HOST))),
        ("flush", call!(|vmem, cold, hot| vmem.flush(&hot))),
        ("flush_all", call!(|vmem, cold, hot| vmem.flush_all())),
    ]
}

/// Fills both tiers; the objects, in the order in which they came.
async fn fill(vmem: &VirtualMemory, home: MemoryTier) -> Result<Vec<VMemHandle>, String> {
    let mut full = Vec::new();
    loop {
        let began = Instant::now();
        let put = vmem.put(bytes(full.len(), 1, LEN), home);
        match within("put", 2 * WAIT, put).await? {
            Ok(handle) => full.push(handle),
            Err(error) => return refused_at_once("put", began, &error).map(|()| full),
        }
    }
}

async fn refuses(
    vmem: &VirtualMemory,
    full: &[VMemHandle],
    hot_tier: MemoryTier,
) -> Result<(), String> {
    let is_hot = |handle: &&VMemHandle| {
        let residency = vmem.residency(handle).unwrap();
        if hot_tier == VRAM { residency.vram } else { residency.host }
    };
    // What comes home to device memory does so behind the writes.
    let began = Instant::now();
    let hot = loop {
        match full.iter().find(is_hot) {
            Some(hot) => break hot,
            None if began.elapsed() > BOUND => return Err("nothing is resident".into()),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    let cold = full.iter().find(|handle| !vmem.residency(handle).unwrap().host);
    let cold = cold.ok_or("everything is resident")?;
    let mut complaints = Vec::new();
    for (what, call) in calls(vmem, cold, hot) {
        let began = Instant::now();
        let ended = match within(what, 2 * WAIT, call).await {
            // A clean object made way.
            Ok(Ok(())) if began.elapsed() < BOUND => Ok(()),
            Ok(Ok(())) => Err(format!("{what} succeeded after {:?}", began.elapsed())),
            Ok(Err(error)) => refused_at_once(what, began, &error),
            Err(why) => Err(why),
        };
        complaints.extend(ended.err());
    }
    complaints.extend(idle_costs_nothing("after all calls").await.err());
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("; ")) }
}

#[test]
fn every_call_ends_at_once_where_host_and_disk_are_full() {
    let mut complaints = Vec::new();
    for place in [Place::Simulated, Place::Real] {
        for policy in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
            let found = run(Threads::One, move || async move {
                let store = open(place, SIZES, |builder| builder.policy(policy)).await;
                let full = fill(&store.vmem, HOST).await?;
                refuses(&store.vmem, &full, HOST).await?;
                succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
            });
            complaints.extend(found.err().map(|why| format!("{place:?}, {policy}: {why}")));
        }
    }
    assert_none(&complaints);
}

#[test]
fn every_call_ends_at_once_where_vram_host_and_disk_are_full() {
    let test = async |store: &Store| {
        let full = fill(&store.vmem, VRAM).await?;
        refuses(&store.vmem, &full, VRAM).await?;
        // An object that is in device memory alone is served from there.
        for (n, handle) in full.iter().enumerate().step_by(7) {
            let mut buf = vec![0; LEN];
            succeeds("read_into", BOUND, store.vmem.read_into(handle, 0..LEN, &mut buf)).await?;
            check(n, &[1], 0, &buf).or_else(|why| match buf.iter().all(|&byte| byte == 1) {
                // A call of the table has written it.
                true => Ok(()),
                false if buf[9..108] == [1; 99] => Ok(()),
                false => Err(why),
            })?;
        }
        drop(full);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let put = store.vmem.put(bytes(1, 1, LEN), VRAM);
        drop(succeeds("put into freed space", BOUND, put).await?);
        Ok(())
    };
    let found = run(Threads::One, move || on_a_device(2 << 20, SIZES, test));
    assert_none(&Vec::from_iter(found.err()));
}

/// Sixteen tasks retry a refused put; each gets space once objects are freed.
#[test]
fn freed_space_serves_tasks_that_retry() {
    let mut complaints = Vec::new();
    for threads in crate::harness::THREADS {
        let found = run(threads, || async {
            let store = open(Place::Simulated, SIZES, |builder| builder).await;
            let full = fill(&store.vmem, HOST).await?;
            let mut tasks = tokio::task::JoinSet::new();
            for task in 0..16_usize {
                let vmem = store.vmem.clone();
                tasks.spawn(async move {
                    let began = Instant::now();
                    loop {
                        let put = vmem.put(bytes(task, 7, LEN), HOST);
                        match within("put", 2 * WAIT, put).await? {
                            Ok(handle) => return Ok::<_, String>(handle),
                            Err(error) if !error.is_retryable() => return Err(error.to_string()),
                            Err(_) if began.elapsed() > BOUND => return Err("no space".into()),
                            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
                        }
                    }
                });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(full.into_iter().step_by(4).collect::<Vec<_>>());
            while let Some(task) = tasks.join_next().await {
                drop(task.unwrap()?);
            }
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
        });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}
