//! Deletion of segments that nothing uses, under instances that use others.
//!
//! Excluded: a segment that is deleted while a name leads to it, or while an instance has it; and
//! one that nobody uses and that stays.

mod model;
mod rounds;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use object_store::ObjectStore;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use vmem_core::backend::{
    CHUNK_BYTES, Catalog, CatalogChange, CatalogRecord, Durable, Extent, SEGMENT_CHUNKS,
    StoredChunk, Tier, TierError,
};
use vmem_core::{MemoryTier, VirtualMemoryError};
use vmem_remote::{BucketCatalog, OpenError, RemoteOptions, RemoteTier};
use vmem_testkit::Pattern;

use super::catalog::bucket::{Bucket, Desk, Weather};
use super::{read, write};

const GRACE: Duration = Duration::from_millis(1000);
/// Chunks are full, but for the last one of an object.
const TAIL: usize = 100;

/// Short times, in the proportions that are needed of them.
fn options() -> RemoteOptions {
    RemoteOptions {
        request_timeout: Duration::from_millis(100),
        total_timeout: Duration::from_millis(200),
        grace: GRACE,
        tries: 3,
        // No random pauses: the seed alone chooses.
        backoff: Duration::ZERO,
        circuit_failures: u32::MAX,
        circuit_pause: Duration::from_millis(20),
        ..RemoteOptions::default()
    }
}

/// What an object of this version is.
fn payload(version: u64) -> Bytes {
    let chunks = version as usize % 3;
    Pattern::new(version, 1).bytes(0, chunks * CHUNK_BYTES + TAIL)
}

fn parts(whole: &Bytes) -> Vec<Bytes> {
    let begins = (0..whole.len()).step_by(CHUNK_BYTES);
    begins.map(|at| whole.slice(at..whole.len().min(at + CHUNK_BYTES))).collect()
}

/// An object that an instance has in its hands, as core would.
#[derive(Clone, Debug)]
struct Object {
    version: u64,
    extents: Vec<Arc<Extent>>,
}

impl Object {
    fn chunks(&self) -> Vec<Option<StoredChunk>> {
        self.extents.iter().map(|extent| extent.stored()).collect()
    }

    /// What gives it a name, as this version.
    fn named(&self, name: &str, version: u64) -> Vec<CatalogChange> {
        let chunks = self.chunks();
        let record = CatalogRecord {
            id: 1,
            version,
            modified: SystemTime::UNIX_EPOCH,
            len: payload(self.version).len() as u64,
            home: MemoryTier::Remote,
            // Which bytes these are.
            metadata: Bytes::copy_from_slice(&self.version.to_le_bytes()),
        };
        assert!(chunks.len() <= SEGMENT_CHUNKS);
        let segment = CatalogChange::Segment { id: 1, segment: 0, chunks };
        vec![segment, CatalogChange::Put { name: name.into(), record }]
    }
}

/// A tier with names.
struct Instance {
    tier: Arc<RemoteTier>,
    names: Arc<BucketCatalog>,
    desk: Arc<Desk>,
}

impl Instance {
    async fn open(bucket: &Arc<Bucket>) -> Self {
        let desk = bucket.desk(SmallRng::seed_from_u64(1), Weather::default());
        Self::open_over(desk).await.unwrap()
    }

    async fn open_over(desk: Arc<Desk>) -> Result<Self, OpenError> {
        Self::open_with(desk, options()).await
    }

    async fn open_with(desk: Arc<Desk>, options: RemoteOptions) -> Result<Self, OpenError> {
        let store: Arc<dyn ObjectStore> = desk.clone();
        let (tier, names) = RemoteTier::open_with_names(store, options).await?;
        Ok(Instance { tier, names, desk })
    }

    async fn upload(&self, version: u64) -> Result<Object, TierError> {
        let extents = write(&*self.tier, &parts(&payload(version))).await?;
        Ok(Object { version, extents })
    }

    async fn put(&self, name: &str, version: u64) -> Object {
        let object = self.upload(version).await.unwrap();
        self.names.record(name.into()).await.unwrap();
        self.names.commit(object.named(name, version)).await.unwrap();
        object
    }

    /// What the name leads to.
    async fn find(&self, name: &str) -> Result<Option<Object>, VirtualMemoryError> {
        let Some(found) = self.names.find(name.into()).await? else { return Ok(None) };
        let bytes = found.record.metadata[..].try_into().unwrap();
        let version = u64::from_le_bytes(bytes);
        let lens = parts(&payload(version));
        let chunks = found.chunks.into_iter().flatten().zip(lens);
        let adopt = |(chunk, part): (StoredChunk, Bytes)| {
            Arc::new(self.tier.adopt(part.len() as u32, chunk).unwrap())
        };
        Ok(Some(Object { version, extents: chunks.map(adopt).collect() }))
    }

    /// Whether the object can be read; what is read is what was put.
    async fn check(&self, object: &Object) -> Result<(), TierError> {
        let bytes = read(&*self.tier, &object.extents).await?;
        assert!(bytes == payload(object.version), "other bytes than those of {}", object.version);
        Ok(())
    }

    async fn remove(&self, name: &str) {
        let remove = CatalogChange::Remove { name: name.into() };
        self.names.commit(vec![remove]).await.unwrap();
    }

    async fn close(self) {
        self.names.close().await.unwrap();
        self.tier.close().await.unwrap();
    }
}

/// The segments that the bucket has.
fn segments(bucket: &Bucket) -> usize {
    count(bucket, |path| path.split('/').nth(1).is_some_and(|it| it.len() == 36))
}

fn count(bucket: &Bucket, is: impl Fn(&str) -> bool) -> usize {
    bucket.paths().iter().filter(|path| is(path)).count()
}
