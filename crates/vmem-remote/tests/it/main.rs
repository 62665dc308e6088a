//! The remote tier, and the catalog of names, over object stores in memory, in a directory, and
//! such that misbehave.
//!
//! Invariant: what a test reads is compared with what it wrote, and at the end of each test of the
//! tier the bucket is empty.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod catalog;
mod compaction;
mod ending;
mod faults;
mod faulty;
mod following;
mod joined;
mod named;
mod open;
mod requests;
mod segments;
mod servers;
mod suite;
mod whole;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::{ObjectMeta, ObjectStore};
use vmem_core::backend::{Extent, IoBuf, ReadChunk, Tier, TierError};
use vmem_remote::{RemoteOptions, RemoteTier};
use vmem_testkit::{Pattern, Seed};

use faulty::Faulty;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// The seed of this run, printed: `VMEM_SEED` replays one.
fn seed() -> Seed {
    let seed = Seed::from_env_or(|| 11);
    println!("VMEM_SEED={}", seed.value());
    seed
}

/// Options for small segments: 256 KiB, in parts of 64 KiB.
fn small() -> RemoteOptions {
    RemoteOptions {
        segment_bytes: 256 << 10,
        part_bytes: 64 << 10,
        get_bytes: 128 << 10,
        backoff: Duration::from_millis(10),
        ..RemoteOptions::default()
    }
}

/// Options for buckets that fail, and segments of 1 MiB.
fn impatient() -> RemoteOptions {
    RemoteOptions {
        request_timeout: Duration::from_secs(2),
        total_timeout: Duration::from_secs(5),
        circuit_pause: Duration::from_millis(300),
        backoff: Duration::from_millis(5),
        segment_bytes: MIB as u64,
        tries: 9,
        ..RemoteOptions::default()
    }
}

/// A tier over a bucket in memory that the test commands.
async fn open(options: RemoteOptions) -> (Arc<RemoteTier>, Arc<Faulty>) {
    let store = Faulty::new(Arc::new(InMemory::new()));
    let tier = RemoteTier::open(store.clone(), options).await.unwrap();
    (tier, store)
}

/// The bytes of a chunk.
fn bytes(name: u64, len: usize) -> Bytes {
    Pattern::new(name, 1).bytes(0, len)
}

fn reserve(tier: &dyn Tier, payloads: &[Bytes]) -> Vec<(Extent, Bytes)> {
    let lens: Vec<u32> = payloads.iter().map(|bytes| bytes.len() as u32).collect();
    tier.reserve(&lens).unwrap().into_iter().zip(payloads.iter().cloned()).collect()
}

async fn write(tier: &dyn Tier, payloads: &[Bytes]) -> Result<Vec<Arc<Extent>>, TierError> {
    let written = tier.write(reserve(tier, payloads)).await?;
    Ok(written.into_iter().map(Arc::new).collect())
}

async fn read(tier: &dyn Tier, extents: &[Arc<Extent>]) -> Result<Vec<u8>, TierError> {
    let len: usize = extents.iter().map(|extent| extent.len() as usize).sum();
    let chunks = ReadChunk::in_sequence(extents.to_vec());
    let (buf, result) = tier.read(chunks, IoBuf::from_vec(vec![0xa5; len])).await;
    assert_eq!(buf.len(), len, "the buffer comes back");
    result.map(|()| buf.to_vec())
}

/// Objects in the bucket but for leases, and their bytes.
async fn stored(store: &dyn ObjectStore) -> (usize, u64) {
    let all = left(store).await;
    (all.len(), all.iter().map(|meta| meta.size).sum())
}

/// What is in the bucket but for leases.
async fn left(store: &dyn ObjectStore) -> Vec<ObjectMeta> {
    let all: Vec<ObjectMeta> = store.list(None).try_collect().await.unwrap();
    let is_lease = |meta: &ObjectMeta| meta.location.as_ref().contains("/instances/");
    all.into_iter().filter(|meta| !is_lease(meta)).collect()
}

/// Waits until the bucket is empty.
async fn emptied(store: &dyn ObjectStore) {
    for _ in 0..20_000 {
        if stored(store).await == (0, 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("left in the bucket: {:?}", left(store).await);
}
