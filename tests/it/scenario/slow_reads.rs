//! Reads that are made slow on purpose, by each cause: the figures name that cause.
//!
//! Invariant: over a simulated disk, on a paused clock where the cause is not the processor's own
//! time; so the times are exact, and no test compares a time of the machine with a number.

use std::sync::Arc;
use std::time::Duration;

use vmem::{
    MemoryTier, Promotion, ReadOp, ReadOptions, ReadOutcome, ReadStage, SlowRead, VMemHandle,
    VirtualMemory,
};
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
async fn slow_disk_is_named_io_by_each_kind_of_read() {
    let vmem = open(16 * LEN, SLOW);
    let handles = put_all(&vmem, 5, LEN, DISK).await;
    let mut buf = vec![0; 100];
    vmem.read(&handles[0]).await.unwrap();
    vmem.read_at(&handles[1], 5..5000).await.unwrap();
    vmem.read_into(&handles[2], 7..107, &mut buf).await.unwrap();
    vmem.read_many(&handles[3..4]).await.unwrap();
    let mut stream = vmem.reader(&handles[4], ..);
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut buf).await.unwrap();

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
    assert_idle(&vmem);
}

#[tokio::test(start_paused = true)]
async fn full_memory_is_named_space() {
    let vmem = open(2 * LEN, Duration::from_millis(1));
    let handles = put_all(&vmem, 3, LEN, DISK).await;
    let held = vmem.read_many(&handles[..2]).await.unwrap();
    let waits = read_in_a_task(&vmem, &handles[2]);
    tokio::time::sleep(SLOW).await;
    assert_eq!(vmem.stats().reads_in(ReadStage::Space), 1, "it waits, and the figures say why");
    drop(held);
    waits.await.unwrap().unwrap();
    let read = slowest(&vmem, &handles[2], ReadStage::Space);
    assert!(read.times.of(ReadStage::Space) >= SLOW, "{read}");
    assert!(read.times.of(ReadStage::Io) >= Duration::from_millis(1), "{read}");
    assert_idle(&vmem);
}

#[tokio::test(start_paused = true)]
async fn busy_link_is_named_turn() {
    let vmem = open(4 * MIB, SLOW);
    let handles = put_all(&vmem, 256, 4 * KIB, DISK).await;
    let reads: Vec<_> = handles.iter().map(|handle| read_in_a_task(&vmem, handle)).collect();
    tokio::time::sleep(SLOW / 2).await;
    let stats = vmem.stats();
    let now = [ReadStage::Io, ReadStage::Turn].map(|stage| stats.reads_in(stage));
    assert!(now[0] > 0 && now[1] >= now[0] && now[0] + now[1] == 256, "{now:?} of 256 reads");
    for read in reads {
        read.await.unwrap().unwrap();
    }
    // The link takes reads in order, some at a time: those of the last turn took longest.
    let read = vmem.stats().slow_reads().remove(0);
    assert_eq!(read.cause(), ReadStage::Turn, "{read}");
    assert_eq!(read.times.of(ReadStage::Io), SLOW, "{read}");
    assert!(read.times.of(ReadStage::Turn) >= 2 * SLOW, "{read}");
    assert_eq!(vmem.stats().latency(ReadOp::Whole, DISK).count(), 256);
    assert_idle(&vmem);
}

#[tokio::test(start_paused = true)]
async fn change_that_is_under_way_is_named_gate() {
    let vmem = open(16 * LEN, SLOW);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let promotion = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handle.clone();
        async move { vmem.promote(&handle, HOST).await }
    });
    tokio::time::sleep(SLOW / 10).await;
    // It is to stay too, so the promotion must end first.
    vmem.read_with(&handle, ReadOptions::new().promote(true)).await.unwrap();
    let read = slowest(&vmem, &handle, ReadStage::Gate);
    assert_eq!(read.times.of(ReadStage::Io), Duration::ZERO, "{read}");
    assert_eq!(read.tier, MemoryTier::Host, "by then the promotion had loaded it");
    promotion.await.unwrap().unwrap();
    assert_idle(&vmem);
}

#[tokio::test]
async fn large_copy_is_named_copy() {
    let vmem = open(80 * MIB, Duration::ZERO);
    let handle = vmem.put(vec![7; 64 * MIB], HOST).await.unwrap();
    let mut buf = vec![0; 64 * MIB];
    vmem.read_into(&handle, 0..64 * MIB, &mut buf).await.unwrap();
    assert!(buf.iter().all(|&byte| byte == 7));
    let read = slowest(&vmem, &handle, ReadStage::Copy);
    assert_eq!((read.op, read.tier), (ReadOp::Into, HOST));
    assert_idle(&vmem);
}

#[tokio::test]
async fn busy_runtime_is_named_runtime() {
    let vmem = open(MIB, Duration::ZERO);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let read = read_in_a_task(&vmem, &handle);
    // The only thread goes to this one between the caller of the read and the task that serves it.
    let blocks = tokio::spawn(async { std::thread::sleep(3 * SLOW) });
    read.await.unwrap().unwrap();
    blocks.await.unwrap();
    let read = slowest(&vmem, &handle, ReadStage::Runtime);
    assert!(read.times.of(ReadStage::Runtime) >= 3 * SLOW, "{read}");
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
