//! Stores that follow the names of a bucket while another store changes them.
//!
//! Excluded: a change that is never seen; a handle whose bytes change; a change of a store's own
//! that goes with its name unsaid; and a bucket that is gone, for good or for a while, that delays
//! what is in memory. Waited for are events: no test knows how long one takes.

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryError};
use vmem_remote::RemoteOptions;

use super::faulty::{Fault, Faulty};
use super::named::open_with;
use super::{KIB, bytes, impatient};

const LEN: usize = 100 * KIB;
const HANGS: Duration = Duration::from_secs(60);

async fn open(bucket: &Arc<Faulty>, follow: Option<Duration>) -> VirtualMemory {
    let bucket: Arc<dyn ObjectStore> = bucket.clone();
    open_with(bucket, 8 << 20, RemoteOptions { follow, ..impatient() }).await
}

/// A store that writes, and one that follows.
async fn pair() -> (VirtualMemory, VirtualMemory, Arc<Faulty>) {
    let bucket = Faulty::new(Arc::new(InMemory::new()));
    let writer = open(&bucket, None).await;
    let reader = open(&bucket, Some(Duration::from_millis(20))).await;
    (writer, reader, bucket)
}

/// Opens the name until it has these bytes, or none.
async fn until(vmem: &VirtualMemory, name: &str, expected: Option<&[u8]>) {
    let come = async {
        loop {
            match vmem.open_named(name).await {
                Ok(handle) => {
                    let read = vmem.read(&handle).await.unwrap();
                    if expected.is_some_and(|expected| read == expected) {
                        return;
                    }
                }
                Err(VirtualMemoryError::NameNotFound { .. }) if expected.is_none() => return,
                Err(error) => panic!("{name}: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(HANGS, come).await.unwrap_or_else(|_| panic!("{name} is not followed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_names_are_seen_by_stores_that_follow() {
    let (writer, reader, _bucket) = pair().await;
    let mine = writer.put_named("n", bytes(1, LEN), MemoryTier::Host).await.unwrap();
    let old = reader.open_named("n").await.unwrap();
    assert!(reader.read(&old).await.unwrap() == bytes(1, LEN));
    for round in 2..6 {
        writer.write(&mine, bytes(round, LEN)).await.unwrap();
        writer.flush(&mine).await.unwrap();
        until(&reader, "n", Some(&bytes(round, LEN))).await;
    }
    // A handle is of one version. Its bytes are durable, but not under the name.
    reader.demote(&old, MemoryTier::Disk).await.unwrap();
    assert!(reader.read(&old).await.unwrap() == bytes(1, LEN));
    let flushed = reader.flush(&old).await.unwrap_err();
    assert!(matches!(flushed, VirtualMemoryError::VersionChanged { .. }), "{flushed:?}");
    writer.rename_named("n", "m").await.unwrap();
    until(&reader, "n", None).await;
    until(&reader, "m", Some(&bytes(5, LEN))).await;
    writer.remove_named("m").await.unwrap();
    until(&reader, "m", None).await;
    // A store that follows may write.
    reader.put_named("n", bytes(9, LEN), MemoryTier::Disk).await.unwrap();
    until(&writer, "n", Some(&bytes(9, LEN))).await;
    drop((mine, old));
    reader.close().await.unwrap();
    writer.close().await.unwrap();
}

/// A store that does not follow learns of it at its own flush alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_are_not_durable_keep_their_name() {
    let (writer, reader, _bucket) = pair().await;
    for name in ["changed", "other"] {
        writer.put_named(name, bytes(1, LEN), MemoryTier::Host).await.unwrap();
    }
    let changed = reader.open_named("changed").await.unwrap();
    until(&reader, "other", Some(&bytes(1, LEN))).await;
    reader.write_at(&changed, 70_000, &[1; 10]).await.unwrap();
    let mut own = bytes(1, LEN).to_vec();
    own[70_000..70_010].fill(1);
    for round in 2..5 {
        for name in ["changed", "other"] {
            let handle = writer.open_named(name).await.unwrap();
            writer.write(&handle, bytes(round, LEN)).await.unwrap();
            writer.flush(&handle).await.unwrap();
        }
        // By then it was looked at as well.
        until(&reader, "other", Some(&bytes(round, LEN))).await;
        let handle = reader.open_named("changed").await.unwrap();
        assert!(reader.read(&handle).await.unwrap() == own);
        reader.demote(&handle, MemoryTier::Disk).await.unwrap();
    }
    let lost = reader.close().await.unwrap_err();
    let VirtualMemoryError::NotFlushed { names, source } = lost else { panic!("{lost:?}") };
    assert_eq!(names, ["changed".into()]);
    assert!(matches!(*source, VirtualMemoryError::VersionChanged { .. }), "{source:?}");
    drop(changed);
    writer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bucket_that_is_gone_delays_nothing_in_memory() {
    let (writer, reader, bucket) = pair().await;
    let mine = writer.put_named("n", bytes(1, LEN), MemoryTier::Host).await.unwrap();
    let old = reader.open_named("n").await.unwrap();
    reader.promote(&old, MemoryTier::Host).await.unwrap();
    let before = bucket.hit();
    bucket.fail(|_| Some(Fault::Silent));
    while bucket.hit() == before {
        let handle = reader.open_named("n").await.unwrap();
        let read = tokio::time::timeout(HANGS, reader.read(&handle)).await;
        assert!(read.expect("it needs no bucket").unwrap() == bytes(1, LEN));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    bucket.fail(|_| Some(Fault::Refused));
    writer.write(&mine, bytes(2, LEN)).await.unwrap();
    writer.flush(&mine).await.unwrap_err();
    bucket.heal();
    let flushed = async {
        while writer.flush(&mine).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(HANGS, flushed).await.expect("the bucket is back");
    until(&reader, "n", Some(&bytes(2, LEN))).await;
    drop((mine, old));
    reader.close().await.unwrap();
    // Nothing follows for a store that has ended.
    bucket.take_seen();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bucket.take_seen(), []);
    writer.close().await.unwrap();
}
