//! R1: cold reads of an object store through the tier below the disk, beside the client's own
//! requests; and how many requests small objects take.
//!
//! The object store is one in memory that takes 5 ms for each request, so it has no bandwidth that
//! could be used up: what is measured is what the tier adds to a request, and how many it makes.
//! Both sides read the same bytes, whole, into memory of their own, in turns; each object is in the
//! bucket alone. A tier has 64 requests in flight at most, by default.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{join_all, try_join_all};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::throttle::{ThrottleConfig, ThrottledStore};
use object_store::{ObjectStoreExt, PutPayload};
use tokio::runtime::Builder;
use vmem::{GpuSelection, MemoryTier, Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_remote::{RemoteOptions, RemoteTier};

use crate::report::{Bar, Report, Rounds};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// What each request takes.
const LATENCY: Duration = Duration::from_millis(5);
/// Objects that are put, or read, at once where requests are counted.
const AT_ONCE: usize = 1024;

type Store = Arc<ThrottledStore<InMemory>>;

/// A store above a bucket.
struct Place {
    vmem: VirtualMemory,
    tier: Arc<RemoteTier>,
    bucket: Store,
}

impl Place {
    async fn open() -> anyhow::Result<Self> {
        let slow = ThrottleConfig {
            wait_get_per_call: LATENCY,
            wait_put_per_call: LATENCY,
            ..ThrottleConfig::default()
        };
        let bucket = Arc::new(ThrottledStore::new(InMemory::new(), slow));
        let tier = RemoteTier::open(bucket.clone(), RemoteOptions::default()).await?;
        let config = VirtualMemoryConfig::builder()
            .host_capacity(256 << 20)
            .disk_capacity(512 << 20)
            .promotion(Promotion::Never)
            .gpu(GpuSelection::Off)
            .build()?;
        let vmem = vmem::open_over(config, tier.clone()).await?;
        Ok(Place { vmem, tier, bucket })
    }

    /// Objects that are in the bucket alone.
    async fn put(&self, count: usize, len: usize) -> anyhow::Result<Vec<VMemHandle>> {
        let mut handles = Vec::with_capacity(count);
        for first in (0..count).step_by(AT_ONCE) {
            let some = first..count.min(first + AT_ONCE);
            let puts = some.map(|nth| self.vmem.put(bytes(nth, len), MemoryTier::Remote));
            let some = try_join_all(puts).await?;
            try_join_all(some.iter().map(|one| self.vmem.demote(one, MemoryTier::Remote))).await?;
            handles.extend(some);
        }
        Ok(handles)
    }
}

pub(crate) fn r1(report: &mut Report, quick: bool, rounds: usize) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let small = [(4 * KIB, 32, 1), (4 * KIB, 512, 32), (4 * KIB, 512, 64)];
    let cases = small.into_iter().chain([(MIB, 32, 1), (64 * MIB, 3, 1)]);
    for (len, count, deep) in cases {
        let [mut ours, mut theirs]: [Rounds; 2] = Default::default();
        runtime.block_on(cold((len, count, deep), rounds, (&mut ours, &mut theirs)))?;
        let what = format!("cold reads of {len} bytes, {deep} at once");
        let bar = Some(1.1);
        let ours = &ours;
        let theirs = &theirs;
        report.add(&Bar { id: "R1", what, unit: "ns", ours, peer: "client", theirs, bar });
    }
    runtime.block_on(requests(report, if quick { 50_000 } else { 1_000_000 }))
}

async fn cold(
    (len, count, deep): (usize, usize, usize),
    rounds: usize,
    (ours, theirs): (&mut Rounds, &mut Rounds),
) -> anyhow::Result<()> {
    let place = Place::open().await?;
    let handles = place.put(count, len).await?;
    let path = |nth: usize| Path::from(format!("plain/{nth}"));
    for nth in 0..count {
        place.bucket.put(&path(nth), PutPayload::from(bytes(nth, len))).await?;
    }
    for round in 0..=rounds {
        let began = Instant::now();
        for some in handles.chunks(deep) {
            for read in join_all(some.iter().map(|handle| place.vmem.read(handle))).await {
                let read: Bytes = read?;
                check(&read, len)?;
            }
        }
        let our = began.elapsed();
        let began = Instant::now();
        for first in (0..count).step_by(deep) {
            let paths: Vec<_> = (first..count.min(first + deep)).map(path).collect();
            let reads = paths.iter().map(|path| place.bucket.get_range(path, 0..len as u64));
            for read in join_all(reads).await {
                // The object store in memory gives out its own bytes, as no server does.
                let copied = std::hint::black_box(Vec::from(read?));
                check(&copied, len)?;
            }
        }
        let their = began.elapsed();
        if round > 0 {
            ours.0.push(our.as_nanos() as f64 / count as f64);
            theirs.0.push(their.as_nanos() as f64 / count as f64);
        }
    }
    drop(handles);
    place.vmem.close().await?;
    Ok(())
}

/// How many requests small objects take, for each million of them.
async fn requests(report: &mut Report, count: usize) -> anyhow::Result<()> {
    let place = Place::open().await?;
    let before = place.tier.stats();
    let handles = place.put(count, 4 * KIB).await?;
    let put = place.tier.stats();
    for some in handles.chunks(AT_ONCE) {
        for read in place.vmem.read_many(some).await? {
            check(&read, 4 * KIB)?;
        }
    }
    let read = place.tier.stats();
    let million = |requests: u64| requests as f64 * 1e6 / count as f64;
    let most = 1e6 / 64.0;
    let what = format!("puts for 10^6 objects of 4096 bytes, {AT_ONCE} at once, of {count}");
    report.figure("R1", &what, million(put.puts - before.puts), "requests", most);
    let what = format!("gets for 10^6 objects of 4096 bytes, in sets of {AT_ONCE}, of {count}");
    report.figure("R1", &what, million(read.gets - put.gets), "requests", most);
    drop(handles);
    place.vmem.close().await?;
    Ok(())
}

/// The bytes of an object: its number over and over.
fn bytes(nth: usize, len: usize) -> Bytes {
    std::iter::repeat_n((nth as u64).to_le_bytes(), len / 8).flatten().collect()
}

/// # Errors
///
/// If these are not the bytes of one object of this length.
fn check(bytes: &[u8], len: usize) -> anyhow::Result<()> {
    let is_one = bytes.len() == len && bytes[..8] == bytes[len - 8..];
    anyhow::ensure!(is_one, "{} bytes that are no object", bytes.len());
    Ok(())
}
