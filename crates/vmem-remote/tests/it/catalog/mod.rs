//! The catalog of names in a bucket: the suite, several instances, faults, and a model.
//!
//! Invariant: each test opens every instance over one table of places, since what one instance
//! writes another must find.

pub(crate) mod bucket;
mod collect;
mod damage;
mod ending;
mod follow;
mod model;
mod opening;
mod outcomes;
mod requests;
mod stale;
mod suite;
mod writers;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use parking_lot::Mutex;
use vmem_core::backend::{
    CHUNK_BYTES, Catalog, CatalogChange, CatalogObject, CatalogRecord, Run, SEGMENT_CHUNKS,
    StoredChunk,
};
use vmem_core::{MemoryTier, VirtualMemoryError};
use vmem_remote::{BucketCatalog, Place, Places, RemoteOptions, RequestError, Uuid};

use super::faulty::{Faulty, Op};

/// The places of all chunks of a test, in both directions.
#[derive(Debug, Default)]
pub(crate) struct Table {
    state: Mutex<TableState>,
}

#[derive(Debug, Default)]
struct TableState {
    places: HashMap<String, Place>,
    chunks: HashMap<Place, StoredChunk>,
}

impl Places for Table {
    /// All chunks but those at 13.
    fn place(&self, chunk: &StoredChunk) -> Option<Place> {
        if chunk.runs.first()?.offset == 13 {
            return None;
        }
        let mut state = self.state.lock();
        let segment = state.places.len() as u64;
        let len = chunk.runs.iter().map(|run| run.footprint).sum();
        let instance = Uuid::from_u128(7);
        let new = Place { instance, segment, at: segment << 20, len, sum: chunk.sum };
        let place = *state.places.entry(format!("{chunk:?}")).or_insert(new);
        state.chunks.insert(place, chunk.clone());
        Some(place)
    }

    fn enter(&self, place: Place) -> StoredChunk {
        self.state.lock().chunks[&place].clone()
    }
}

/// Options with short pauses between tries.
fn options() -> RemoteOptions {
    RemoteOptions { backoff: Duration::from_millis(10), ..RemoteOptions::default() }
}

/// A bucket in memory that the test commands, and what opens instances over it.
struct World {
    store: Arc<Faulty>,
    table: Arc<Table>,
}

impl World {
    fn new() -> Self {
        World { store: Faulty::new(Arc::new(InMemory::new())), table: Arc::default() }
    }

    async fn open(&self) -> Arc<BucketCatalog> {
        self.open_with(options()).await
    }

    async fn open_with(&self, options: RemoteOptions) -> Arc<BucketCatalog> {
        open_over(self.store.clone(), options, &self.table).await
    }

    /// The kinds of the requests since the last call.
    fn requests(&self) -> Vec<Op> {
        self.store.take_seen().into_iter().map(|(op, _)| op).collect()
    }
}

pub(crate) async fn open_over(
    store: Arc<dyn ObjectStore>,
    options: RemoteOptions,
    table: &Arc<Table>,
) -> Arc<BucketCatalog> {
    BucketCatalog::open(store, options, table.clone()).await.unwrap()
}

/// An object of this many chunks, all of which have the version in them.
fn object(id: u64, version: u64, chunks: usize) -> CatalogObject {
    let chunk = |n: usize| StoredChunk {
        runs: [Run { offset: version << 32 | (n as u64) << 12, footprint: CHUNK_BYTES as u32 }]
            .into(),
        sum: version as u32 ^ n as u32,
    };
    let record = CatalogRecord {
        id,
        version,
        modified: std::time::SystemTime::UNIX_EPOCH + Duration::from_nanos(version),
        len: (chunks * CHUNK_BYTES) as u64,
        home: MemoryTier::Remote,
        metadata: Bytes::copy_from_slice(format!("version {version}").as_bytes()),
    };
    CatalogObject { record, chunks: (0..chunks).map(|n| Some(chunk(n))).collect() }
}

/// What gives a name to an object.
fn put(name: &str, object: &CatalogObject) -> Vec<CatalogChange> {
    let id = object.record.id;
    let count = object.chunks.len().div_ceil(SEGMENT_CHUNKS).max(1);
    let segment = |segment: usize| {
        let chunks = object.chunks.iter().skip(segment * SEGMENT_CHUNKS).take(SEGMENT_CHUNKS);
        let chunks = chunks.cloned().collect();
        CatalogChange::Segment { id, segment: segment as u32, chunks }
    };
    // Before the record, as core does it.
    let mut changes: Vec<_> = (0..count).map(segment).collect();
    changes.push(CatalogChange::Put { name: name.into(), record: object.record.clone() });
    changes
}

fn remove(name: &str) -> Vec<CatalogChange> {
    vec![CatalogChange::Remove { name: name.into() }]
}

fn rename(from: &str, to: &str) -> Vec<CatalogChange> {
    vec![CatalogChange::Rename { from: from.into(), to: to.into() }]
}

/// The version of what has the name.
async fn version(catalog: &Arc<BucketCatalog>, name: &str) -> Option<u64> {
    catalog.find(name.into()).await.unwrap().map(|object| object.record.version)
}

/// What the catalog says of a request that failed.
fn cause(error: &VirtualMemoryError) -> &RequestError {
    let VirtualMemoryError::Io { source, .. } = error else { panic!("{error:?}") };
    let cause = source.get_ref().and_then(|cause| cause.downcast_ref());
    cause.unwrap_or_else(|| panic!("{error:?}"))
}

fn exists(outcome: &Result<(), VirtualMemoryError>, expected: &str) -> bool {
    matches!(outcome, Err(VirtualMemoryError::NameExists { name }) if &**name == expected)
}

/// Whether a commit was refused since the name has another version than this one.
fn changed(outcome: &Result<(), VirtualMemoryError>, from: u64, to: u64) -> bool {
    let Err(VirtualMemoryError::VersionChanged { expected, current, .. }) = outcome else {
        return false;
    };
    (*expected, *current) == (from, to)
}
