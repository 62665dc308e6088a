//! Reads that are made slow on purpose, by each cause: the figures, the trace, the metric and the
//! page name that cause, and the page names it while the read still waits.
//!
//! Invariant: over a simulated disk, on a paused clock where the cause is not the processor's own
//! time; so the times are exact, and no test compares a time of the machine with a number.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod watched;

use std::pin::pin;
use std::time::Duration;

use futures::poll;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use vmem::{
    MemoryTier, ReadOp, ReadOptions, ReadOutcome, ReadStage, VMemHandle, VirtualMemory,
    VirtualMemoryError,
};

use watched::{KIB, MIB, Page, SLOW, Watched, bytes};

const LEN: usize = 64 * KIB;
const HOST: MemoryTier = MemoryTier::Host;
const DISK: MemoryTier = MemoryTier::Disk;

/// Objects on disk.
async fn put_all(vmem: &VirtualMemory, count: usize, len: usize) -> Vec<VMemHandle> {
    let mut handles = Vec::new();
    for object in 1..=count as u64 {
        handles.push(vmem.put(bytes(object, len), DISK).await.unwrap());
    }
    handles
}

fn read_in_a_task(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
) -> JoinHandle<Result<bytes::Bytes, VirtualMemoryError>> {
    let vmem = vmem.clone();
    let handle = handle.clone();
    tokio::spawn(async move { vmem.read(&handle).await })
}

#[tokio::test(start_paused = true)]
async fn slow_disk_is_named_io() {
    let watched = Watched::open(16 * LEN, SLOW);
    let vmem = &watched.vmem;
    let handle = vmem.put(bytes(1, LEN), DISK).await.unwrap();
    let waits = read_in_a_task(vmem, &handle);
    tokio::time::sleep(SLOW / 2).await;
    assert_eq!(watched.now_in(ReadStage::Io).await, 1, "it waits, and the page says for what");
    assert_eq!(waits.await.unwrap().unwrap(), bytes(1, LEN));
    let read = watched.slowest(&handle, ReadStage::Io).await;
    assert_eq!(read.times.of(ReadStage::Io), SLOW, "{read}");
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn slow_disk_is_named_io_by_each_kind_of_read() {
    let watched = Watched::open(16 * LEN, SLOW);
    let vmem = &watched.vmem;
    let handles = put_all(vmem, 5, LEN).await;
    let mut buf = vec![0; 100];
    vmem.read(&handles[0]).await.unwrap();
    vmem.read_at(&handles[1], 5..5000).await.unwrap();
    vmem.read_into(&handles[2], 7..107, &mut buf).await.unwrap();
    vmem.read_many(&handles[3..4]).await.unwrap();
    vmem.reader(&handles[4], ..).read_exact(&mut buf).await.unwrap();

    let stats = vmem.stats();
    let mut reads = stats.slow_reads();
    reads.sort_by_key(|read| read.handle);
    assert_eq!(reads.iter().map(|read| read.op).collect::<Vec<_>>(), ReadOp::ALL);
    for (read, handle) in reads.iter().zip(&handles) {
        assert_eq!((read.handle, read.tier, read.cause()), (handle.id(), DISK, ReadStage::Io));
        assert_eq!(read.times.of(ReadStage::Io), SLOW, "{read}");
        assert!(matches!(read.outcome, ReadOutcome::Served), "{read}");
        let histogram = stats.latency(read.op, DISK);
        assert_eq!(histogram.count(), 1);
        assert!(histogram.quantile(0.5).unwrap() >= SLOW);
        assert_eq!(stats.latency(read.op, HOST).count(), 0);
    }
    let asked: Vec<_> = reads.iter().map(|read| read.bytes).collect();
    assert_eq!(asked[..4], [LEN, 4995, 100, LEN], "and of the stream, a window");
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn full_memory_is_named_space() {
    let watched = Watched::open(2 * LEN, Duration::from_millis(1));
    let vmem = &watched.vmem;
    let handles = put_all(vmem, 3, LEN).await;
    let held = vmem.read_many(&handles[..2]).await.unwrap();
    let waits = read_in_a_task(vmem, &handles[2]);
    tokio::time::sleep(SLOW).await;
    assert_eq!(vmem.stats().reads_in(ReadStage::Space), 1, "it waits, and the figures say why");
    assert_eq!(watched.now_in(ReadStage::Space).await, 1, "and the page");
    drop(held);
    waits.await.unwrap().unwrap();
    let read = watched.slowest(&handles[2], ReadStage::Space).await;
    assert!(read.times.of(ReadStage::Space) >= SLOW, "{read}");
    assert!(read.times.of(ReadStage::Io) >= Duration::from_millis(1), "{read}");
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn busy_link_is_named_turn() {
    let watched = Watched::open(4 * MIB, SLOW);
    let vmem = &watched.vmem;
    let handles = put_all(vmem, 256, 4 * KIB).await;
    let reads: Vec<_> = handles.iter().map(|handle| read_in_a_task(vmem, handle)).collect();
    tokio::time::sleep(SLOW / 2).await;
    let stats = vmem.stats();
    let now = [ReadStage::Io, ReadStage::Turn].map(|stage| stats.reads_in(stage));
    assert!(now[0] > 0 && now[1] >= now[0] && now[0] + now[1] == 256, "{now:?} of 256 reads");
    assert_eq!(watched.now_in(ReadStage::Io).await, now[0]);
    assert_eq!(watched.now_in(ReadStage::Turn).await, now[1]);
    for read in reads {
        read.await.unwrap().unwrap();
    }
    // The link takes reads in order, some at a time: those of the last turn took longest.
    let last = vmem.stats().slow_reads().remove(0);
    let last = handles.iter().find(|handle| handle.id() == last.handle).unwrap();
    let read = watched.slowest(last, ReadStage::Turn).await;
    assert_eq!(read.times.of(ReadStage::Io), SLOW, "{read}");
    assert!(read.times.of(ReadStage::Turn) >= 2 * SLOW, "{read}");
    assert_eq!(vmem.stats().latency(ReadOp::Whole, DISK).count(), 256);
    watched.assert_idle().await;
}

/// They are migrations, which the actor starts.
#[tokio::test(start_paused = true)]
async fn crowd_before_the_actor_is_named_turn() {
    let watched = Watched::open(16 * MIB, SLOW);
    let vmem = &watched.vmem;
    let handles = put_all(vmem, 1024, 4 * KIB).await;
    let reads = handles.iter().map(|handle| {
        let read = vmem.read_with(handle, ReadOptions::new().promote(true));
        async move { read.await.unwrap() }
    });
    let all = futures::future::join_all(reads);
    let looks = async {
        tokio::time::sleep(SLOW / 2).await;
        watched.now_in(ReadStage::Turn).await
    };
    let (_, waiting) = futures::join!(all, looks);
    assert!(waiting > 512, "{waiting} of 1024 wait for their turn");
    let last = vmem.stats().slow_reads().remove(0);
    let last = handles.iter().find(|handle| handle.id() == last.handle).unwrap();
    let read = watched.slowest(last, ReadStage::Turn).await;
    assert!(read.times.of(ReadStage::Turn) >= 2 * SLOW, "{read}");
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn page_says_who_keeps_memory_and_what_was_refused() {
    let watched = Watched::open(4 * LEN, Duration::from_millis(1));
    let vmem = &watched.vmem;
    let pinned = vmem.put(bytes(1, LEN), HOST).await.unwrap();
    let shown = watched.shown().await;
    assert_eq!((&shown["holders"], &shown["incidents"]), (&json!([]), &json!([])));
    let pin = vmem.pin(&pinned, HOST).await.unwrap();
    let handles = put_all(vmem, 4, LEN).await;
    let held = vmem.read_many(&handles[..3]).await.unwrap();
    // Nothing of what is in memory may leave it.
    let error = vmem.read(&handles[3]).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::AllPinned { .. }), "{error}");

    let shown = watched.shown().await;
    let footprint = vmem.stats().pinned_bytes;
    let holder = json!({
        "handle": pinned.id(), "name": null, "tier": "host", "kind": "pin", "bytes": footprint,
    });
    assert_eq!(shown["holders"], json!([holder]));
    let incident = &shown["incidents"][0];
    assert_eq!((&incident["kind"], &incident["tier"]), (&json!("refusal"), &json!("host")));
    assert_eq!(incident["error"], error.to_string());
    let host = shown["tiers"].as_array().unwrap().iter().find(|tier| tier["tier"] == "host");
    assert_eq!(host.unwrap()["refusals"], 1);
    assert_eq!(vmem.tier_stats(HOST).refusals, 1);
    drop((pin, held));
    assert_eq!(watched.shown().await["holders"], json!([]));
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn change_that_is_under_way_is_named_gate() {
    let watched = Watched::open(16 * LEN, SLOW);
    let vmem = &watched.vmem;
    let handle = vmem.put(bytes(1, LEN), DISK).await.unwrap();
    let promotion = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handle.clone();
        async move { vmem.promote(&handle, HOST).await }
    });
    tokio::time::sleep(SLOW / 10).await;
    // It is to stay too, so the promotion must end first.
    let mut waits = pin!(vmem.read_with(&handle, ReadOptions::new().promote(true)));
    assert!(poll!(&mut waits).is_pending());
    tokio::time::sleep(SLOW / 10).await;
    assert_eq!(watched.now_in(ReadStage::Gate).await, 1, "it waits, and the page says for what");
    waits.await.unwrap();
    let read = watched.slowest(&handle, ReadStage::Gate).await;
    assert_eq!(read.times.of(ReadStage::Io), Duration::ZERO, "{read}");
    assert_eq!(read.tier, MemoryTier::Host, "by then the promotion had loaded it");
    promotion.await.unwrap().unwrap();
    watched.assert_idle().await;
}

#[tokio::test]
async fn large_copy_is_named_copy() {
    let watched = Watched::open(80 * MIB, Duration::ZERO);
    let vmem = &watched.vmem;
    let handle = vmem.put(vec![7; 64 * MIB], HOST).await.unwrap();
    let mut buf = vec![0; 64 * MIB];
    vmem.read_into(&handle, 0..64 * MIB, &mut buf).await.unwrap();
    assert!(buf.iter().all(|&byte| byte == 7));
    let read = watched.slowest(&handle, ReadStage::Copy).await;
    assert_eq!((read.op, read.tier), (ReadOp::Into, HOST));
    watched.assert_idle().await;
}

/// The copy takes the thread of its caller, so another thread has the page.
#[tokio::test]
async fn copy_that_is_under_way_is_shown_as_copy() {
    let watched = Watched::open(80 * MIB, Duration::ZERO);
    let vmem = &watched.vmem;
    let handle = vmem.put(vec![7; 64 * MIB], HOST).await.unwrap();
    let mut buf = vec![0; 64 * MIB];
    let asks = std::thread::spawn({
        let vmem = vmem.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let shown = async move {
            let page = Page::of(&vmem);
            while page.now_in(ReadStage::Copy).await == 0 {}
        };
        move || runtime.block_on(shown)
    });
    // As often as it takes for the two threads to run at once; it hangs if the page never says it.
    while !asks.is_finished() {
        vmem.read_into(&handle, 0..64 * MIB, &mut buf).await.unwrap();
    }
    asks.join().unwrap();
    watched.assert_idle().await;
}

#[tokio::test]
async fn busy_runtime_is_named_runtime() {
    let watched = Watched::open(MIB, Duration::ZERO);
    let vmem = &watched.vmem;
    let handle = vmem.put(bytes(1, LEN), DISK).await.unwrap();
    let read = read_in_a_task(vmem, &handle);
    // The only thread goes to this one between the caller of the read and the task that serves it.
    let blocks = tokio::spawn(async { std::thread::sleep(3 * SLOW) });
    read.await.unwrap().unwrap();
    blocks.await.unwrap();
    let read = watched.slowest(&handle, ReadStage::Runtime).await;
    assert!(read.times.of(ReadStage::Runtime) >= 3 * SLOW, "{read}");
    watched.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn caller_that_does_not_poll_is_named_runtime() {
    let watched = Watched::open(MIB, Duration::from_millis(1));
    let vmem = &watched.vmem;
    let handle = vmem.put(bytes(1, LEN), DISK).await.unwrap();
    let mut read = pin!(vmem.read(&handle));
    assert!(poll!(&mut read).is_pending());
    // Its bytes are there long before this ends.
    tokio::time::sleep(SLOW).await;
    assert_eq!(watched.now_in(ReadStage::Runtime).await, 1, "only its caller is missing");
    read.await.unwrap();
    let read = watched.slowest(&handle, ReadStage::Runtime).await;
    assert!(read.times.of(ReadStage::Runtime) >= SLOW / 2, "{read}");
    watched.assert_idle().await;
}
