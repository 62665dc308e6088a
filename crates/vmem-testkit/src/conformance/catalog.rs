//! The suite of the catalog of names.
//!
//! Invariant: as of the whole module. A factory gives an empty catalog for each check. Called by
//! the tests of each implementation.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rand::Rng;
use rand::rngs::SmallRng;
use vmem_core::backend::{
    CHUNK_BYTES, Catalog, CatalogChange, CatalogObject, CatalogRecord, METADATA_LEN_MAX, Run,
    SEGMENT_CHUNKS, StoredChunk,
};
use vmem_core::{MemoryTier, VirtualMemoryError};

use super::{assert_ok, within};
use crate::Seed;

/// Names of every shape that matters; order and bounds are those of their bytes.
const NAMES: [&str; 9] = ["a", "a/", "a/b", "a/b/c", "a0", "b", "\u{7f}", "\u{e9}", "\u{ffff}x"];
const BLOCK: u64 = 512;

/// Every check.
pub async fn all<C: Catalog>(seed: Seed, make: impl AsyncFn() -> Arc<C>) {
    rows_come_back(&*make().await).await;
    changes_of_a_record_keep_its_chunks(&*make().await).await;
    renamed_records_stay_the_same(&*make().await).await;
    commits_are_whole(&*make().await).await;
    listings_equal_a_model(seed, &*make().await).await;
    closed_catalogs_refuse(&*make().await).await;
}

/// Versions, numbers and bounds of names, each in a commit of its own.
struct Writer {
    rng: SmallRng,
    next: u64,
}

impl Writer {
    fn new(seed: Seed) -> Self {
        Writer { rng: seed.fork("catalog").rng(), next: 1 }
    }

    fn number(&mut self) -> u64 {
        self.next += self.rng.random_range(1..5);
        self.next
    }

    /// An object with this many chunks, some of them zeros, some in pieces.
    fn object(&mut self, chunks: usize) -> CatalogObject {
        let id = self.number();
        let run = |block: u64| Run { offset: block * BLOCK, footprint: CHUNK_BYTES as u32 };
        // None overlap.
        let place = |n: usize| id << 32 | (n as u64) << 8;
        let chunk = |n: usize| match (n + id as usize) % 4 {
            0 => None,
            1 => {
                let pieces = [run(place(n)), run(1 << 24 | place(n))];
                Some(StoredChunk { runs: pieces.into_iter().collect(), sum: n as u32 })
            }
            _ => Some(StoredChunk { runs: [run(place(n))].into(), sum: !(n as u32) }),
        };
        let chunks: Vec<_> = (0..chunks).map(chunk).collect();
        let home = [MemoryTier::Vram, MemoryTier::Host, MemoryTier::Disk][id as usize % 3];
        let metadata = [0, 1, 300, METADATA_LEN_MAX][id as usize % 4];
        let record = CatalogRecord {
            id,
            version: self.number(),
            modified: SystemTime::UNIX_EPOCH + Duration::new(id << 20, 999_999_999 - id as u32),
            len: (chunks.len() * CHUNK_BYTES) as u64,
            home,
            metadata: Bytes::from(vec![id as u8; metadata]),
        };
        CatalogObject { record, chunks }
    }
}

/// What gives a name to an object.
fn put(name: &str, object: &CatalogObject) -> Vec<CatalogChange> {
    let id = object.record.id;
    let mut changes = vec![CatalogChange::Put { name: name.into(), record: object.record.clone() }];
    let count = object.chunks.len().div_ceil(SEGMENT_CHUNKS).max(1);
    for segment in 0..count {
        let chunks = object.chunks.iter().skip(segment * SEGMENT_CHUNKS).take(SEGMENT_CHUNKS);
        let chunks = chunks.cloned().collect();
        changes.push(CatalogChange::Segment { id, segment: segment as u32, chunks });
    }
    changes
}

async fn commit(catalog: &dyn Catalog, changes: Vec<CatalogChange>) {
    assert_ok("a commit", within("a commit", catalog.commit(changes)).await);
}

/// What the name stands for is this, whichever way it is looked up.
async fn stands_for(catalog: &dyn Catalog, name: &str, expected: Option<&CatalogObject>) {
    let found = within("find", catalog.find(name.into())).await;
    assert_eq!(assert_ok("find", found).as_ref(), expected, "the object of {name:?}");
    let record = within("record", catalog.record(name.into())).await;
    let expected = expected.map(|object| &object.record);
    assert_eq!(assert_ok("record", record).as_ref(), expected, "the record of {name:?}");
}

/// Every field of a record, and every chunk, is found again; no number is given that was used.
pub async fn rows_come_back(catalog: &dyn Catalog) {
    let mut writer = Writer::new(Seed::new(1));
    let mut objects = Vec::new();
    for (nth, name) in NAMES.into_iter().enumerate() {
        let chunks = [0, 1, 3, SEGMENT_CHUNKS, SEGMENT_CHUNKS + 1][nth % 5];
        let object = writer.object(chunks);
        commit(catalog, put(name, &object)).await;
        let last = object.record.id.max(object.record.version);
        assert!(catalog.next_id() > last, "next_id is {}, {last} was used", catalog.next_id());
        objects.push((name, object));
    }
    for (name, object) in &objects {
        stands_for(catalog, name, Some(object)).await;
    }
    stands_for(catalog, "a/b/", None).await;
}

/// A new record of the same object leaves its chunks, also beside new ones; one of another object
/// ends it.
pub async fn changes_of_a_record_keep_its_chunks(catalog: &dyn Catalog) {
    let mut writer = Writer::new(Seed::new(2));
    let mut object = writer.object(SEGMENT_CHUNKS + 2);
    commit(catalog, put("a", &object)).await;
    object.record.version = writer.number();
    object.record.modified += Duration::from_nanos(1);
    object.record.metadata = Bytes::from_static(b"other");
    let record = object.record.clone();
    commit(catalog, vec![CatalogChange::Put { name: "a".into(), record }]).await;
    stands_for(catalog, "a", Some(&object)).await;
    object.chunks[SEGMENT_CHUNKS] = None;
    object.record.version = writer.number();
    let changes = put("a", &object);
    // Without the first segment, which has not changed.
    let changes = changes
        .into_iter()
        .filter(|change| !matches!(change, CatalogChange::Segment { segment: 0, .. }));
    commit(catalog, changes.collect()).await;
    stands_for(catalog, "a", Some(&object)).await;
    let another = writer.object(1);
    commit(catalog, put("a", &another)).await;
    stands_for(catalog, "a", Some(&another)).await;
}

/// A rename moves number, version and time with the rest, and takes the name from what had it.
pub async fn renamed_records_stay_the_same(catalog: &dyn Catalog) {
    let mut writer = Writer::new(Seed::new(3));
    let one = writer.object(3);
    let other = writer.object(2);
    commit(catalog, put("from", &one)).await;
    commit(catalog, put("to", &other)).await;
    let rename = CatalogChange::Rename { from: "from".into(), to: "to".into() };
    commit(catalog, vec![rename]).await;
    stands_for(catalog, "from", None).await;
    stands_for(catalog, "to", Some(&one)).await;
    commit(catalog, vec![CatalogChange::Remove { name: "to".into() }]).await;
    stands_for(catalog, "to", None).await;
}

/// A commit that fails at its last change leaves nothing, and the next one succeeds.
pub async fn commits_are_whole(catalog: &dyn Catalog) {
    let mut writer = Writer::new(Seed::new(4));
    let kept = writer.object(2);
    let never = writer.object(1);
    commit(catalog, put("kept", &kept)).await;
    let mut changes = put("never", &never);
    changes.push(CatalogChange::Rename { from: "kept".into(), to: "moved".into() });
    changes.push(CatalogChange::Remove { name: "missing".into() });
    let attempts = catalog.attempts();
    let failed = within("a commit that fails", catalog.commit(changes)).await;
    assert!(failed.is_err(), "a name that nothing has was removed");
    assert!(!catalog.is_poisoned() && !catalog.is_shut(), "it is known what was committed");
    assert!(catalog.attempts() > attempts, "a commit that has begun is counted");
    stands_for(catalog, "kept", Some(&kept)).await;
    stands_for(catalog, "never", None).await;
    stands_for(catalog, "moved", None).await;
    commit(catalog, put("never", &never)).await;
    stands_for(catalog, "never", Some(&never)).await;
}

/// Random names under random changes: pages from any bound are those of an ordered map.
pub async fn listings_equal_a_model(seed: Seed, catalog: &dyn Catalog) {
    let mut writer = Writer::new(seed);
    let mut model: BTreeMap<Arc<str>, CatalogRecord> = BTreeMap::new();
    for _ in 0..200 {
        let name = random_name(&mut writer.rng);
        if model.contains_key(&name) && writer.rng.random_bool(0.5) {
            model.remove(&name);
            commit(catalog, vec![CatalogChange::Remove { name }]).await;
        } else {
            let object = writer.object(1);
            commit(catalog, put(&name, &object)).await;
            model.insert(name, object.record);
        }
        let prefix: Arc<str> = NAMES[writer.rng.random_range(0..NAMES.len())].into();
        let prefix = if writer.rng.random_bool(0.3) { "".into() } else { prefix };
        let bound = random_name(&mut writer.rng);
        let from = match writer.rng.random_range(0..3) {
            0 => Bound::Unbounded,
            1 => Bound::Included(bound),
            _ => Bound::Excluded(bound),
        };
        let limit = [0, 1, 3, 1000][writer.rng.random_range(0..4)];
        let page = within("names", catalog.names(prefix.clone(), from.clone(), limit)).await;
        let range = model.range((from.clone(), Bound::Unbounded));
        let expected = range.filter(|(name, _)| name.starts_with(&*prefix)).take(limit);
        let expected: Vec<_> = expected.map(|(name, it)| (name.clone(), it.clone())).collect();
        assert_eq!(assert_ok("names", page), expected, "{limit} from {from:?} of {prefix:?}");
    }
}

fn random_name(rng: &mut SmallRng) -> Arc<str> {
    let parts = rng.random_range(1..3);
    (0..parts).map(|_| NAMES[rng.random_range(0..NAMES.len())]).collect::<String>().into()
}

/// After the end every call says so.
pub async fn closed_catalogs_refuse(catalog: &dyn Catalog) {
    let mut writer = Writer::new(Seed::new(5));
    let object = writer.object(1);
    commit(catalog, put("a", &object)).await;
    assert_ok("close", within("close", catalog.close()).await);
    let refused = [
        within("a commit", catalog.commit(put("b", &object))).await.err(),
        within("find", catalog.find("a".into())).await.err(),
        within("record", catalog.record("a".into())).await.err(),
        within("names", catalog.names("".into(), Bound::Unbounded, 1)).await.err(),
    ];
    for error in refused {
        assert!(matches!(error, Some(VirtualMemoryError::Closed)), "after close: {error:?}");
    }
}

/// What was committed is found by `reopen` after a close, every field of it, and no number is given
/// again. Not part of [`all`], since it needs to open the same catalog twice.
pub async fn survives_a_restart<C: Catalog>(first: Arc<C>, reopen: impl AsyncFnOnce() -> Arc<C>) {
    let mut writer = Writer::new(Seed::new(6));
    let one = writer.object(SEGMENT_CHUNKS + 1);
    let two = writer.object(0);
    commit(&*first, put("one", &one)).await;
    commit(&*first, put("two", &two)).await;
    let gone = writer.object(1);
    commit(&*first, put("gone", &gone)).await;
    commit(&*first, vec![CatalogChange::Remove { name: "gone".into() }]).await;
    let next_id = first.next_id();
    assert_ok("close", within("close", first.close()).await);
    drop(first);
    let again = reopen().await;
    stands_for(&*again, "one", Some(&one)).await;
    stands_for(&*again, "two", Some(&two)).await;
    stands_for(&*again, "gone", None).await;
    assert!(again.next_id() >= next_id, "a number of something that is gone is given again");
}
