//! Figures of slow reads that another read, an error or a hit changes.
//!
//! Invariant: over a simulated disk and on a paused clock, so the times are exact. That figures,
//! traces, metrics and the page name each cause is tested in `crates/vmem-dashboard/tests/causes`.
//! Not called by other tests.

use std::sync::Arc;
use std::time::Duration;

use vmem::{Promotion, ReadOp, ReadOutcome, ReadStage, SlowRead, VMemHandle, VirtualMemory};
use vmem_testkit::sim::{SimConfig, SimDriver, Speed};

use crate::support::{self, DISK, HOST, KIB, MIB, bytes, eventually, put_all};

const LEN: usize = 64 * KIB;
const SLOW: Duration = Duration::from_millis(100);

/// A disk that takes this long for each read.
fn disk(read_latency: Duration) -> Arc<SimDriver> {
    let speed = Speed { read_latency, queue_depth: 1024, ..Speed::default() };
    SimDriver::new(SimConfig { speed, ..SimConfig::default() })
}

/// A store over it, which promotes only when asked to.
fn open(space: usize, read_latency: Duration) -> VirtualMemory {
    support::over(disk(read_latency), space, 64 * MIB as u64, |builder| {
        builder.promotion(Promotion::Never).wait_timeout(20 * SLOW)
    })
}

/// The slowest read; it was of this object, and this was its cause.
fn slowest(vmem: &VirtualMemory, handle: &VMemHandle, cause: ReadStage) -> SlowRead {
    let reads = vmem.stats().slow_reads();
    let slowest = reads.first().expect("a read was slow").clone();
    assert_eq!((slowest.handle, slowest.cause()), (handle.id(), cause), "{slowest}");
    slowest
}

fn read_in_a_task(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
) -> tokio::task::JoinHandle<Result<bytes::Bytes, vmem::VirtualMemoryError>> {
    let vmem = vmem.clone();
    let handle = handle.clone();
    tokio::spawn(async move { vmem.read(&handle).await })
}

/// No read is under way.
fn assert_idle(vmem: &VirtualMemory) {
    let stats = vmem.stats();
    let now = ReadStage::ALL.map(|stage| stats.reads_in(stage));
    assert_eq!(now, [0; 6], "reads that have ended count no more");
}

#[tokio::test(start_paused = true)]
async fn joined_read_has_the_times_since_it_joined() {
    let vmem = open(16 * LEN, SLOW);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let first = read_in_a_task(&vmem, &handle);
    tokio::time::sleep(SLOW / 4).await;
    let second = read_in_a_task(&vmem, &handle);
    tokio::time::sleep(SLOW / 4).await;
    assert_eq!(vmem.stats().reads_in(ReadStage::Io), 2);
    // The fetch goes on for the one that joined.
    first.abort();
    second.await.unwrap().unwrap();
    let stats = vmem.stats();
    let reads = stats.slow_reads();
    let joined = reads.iter().find(|read| read.joined).expect("the second joined");
    assert_eq!((joined.cause(), joined.tier), (ReadStage::Io, DISK));
    let io = joined.times.of(ReadStage::Io);
    assert!(io > SLOW / 2 && io < SLOW, "{joined}");
    let own = reads.iter().find(|read| !read.joined).expect("the first was given up");
    assert!(matches!(own.outcome, ReadOutcome::Cancelled), "{own}");
    assert_eq!(own.cause(), ReadStage::Io);
    assert_eq!((stats.reads_cancelled, stats.reads_failed), (1, 0));
    assert_eq!(stats.latency(ReadOp::Whole, DISK).count(), 1, "of those that got their bytes");
    assert_idle(&vmem);
}

#[tokio::test(start_paused = true)]
async fn read_that_fails_says_where_it_waited() {
    let vmem = open(2 * LEN, Duration::ZERO);
    let handles = put_all(&vmem, 3, LEN, DISK).await;
    let held = vmem.read_many(&handles[..2]).await.unwrap();
    vmem.read(&handles[2]).await.unwrap_err();
    let read = slowest(&vmem, &handles[2], ReadStage::Space);
    assert!(matches!(read.outcome, ReadOutcome::Failed(_)), "{read}");
    assert_eq!(vmem.stats().reads_failed, 1);
    drop(held);
    eventually("nothing waits", || vmem.stats().waiters == 0).await;
    assert_idle(&vmem);
}

#[tokio::test]
async fn hits_are_not_measured() {
    let vmem = open(MIB, Duration::ZERO);
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    let empty = vmem.put([], HOST).await.unwrap();
    for _ in 0..100 {
        vmem.read(&handle).await.unwrap();
        vmem.read_at(&handle, 0..LEN / 2).await.unwrap();
        vmem.read(&empty).await.unwrap();
    }
    let mut stream = vmem.reader(&handle, ..);
    let mut all = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut all).await.unwrap();
    let stats = vmem.stats();
    assert!(stats.host.hits >= 200);
    assert!(stats.slow_reads().is_empty(), "{:?}", stats.slow_reads());
    assert!(ReadOp::ALL.into_iter().all(|op| stats.latency(op, HOST).count() == 0));
}
