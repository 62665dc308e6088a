//! Names as users of object stores know them: versions, conditional puts, listings, adoption.
//!
//! Invariant: bytes, metadata and version of a name are one state of it, even if it changes
//! meanwhile.

mod listings;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use futures::TryStreamExt;
use futures::future::join_all;
use vmem::{
    ListOptions,
    MemoryTier::{self, Disk, Host},
    PutMode, PutOptions, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_testkit::driver_under_test;

async fn open(directory: &Path) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .disk_path(directory)
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .io_driver(driver_under_test());
    vmem::open(config.build().unwrap()).await.unwrap()
}

fn create(home: MemoryTier) -> PutOptions {
    PutOptions::new(home).mode(PutMode::Create)
}

fn update(version: u64) -> PutOptions {
    PutOptions::default().mode(PutMode::Update(version))
}

/// Bytes and metadata of one state.
fn pair(n: u64) -> (Vec<u8>, Vec<u8>) {
    (n.to_le_bytes().repeat(1 + n as usize % 50), n.to_le_bytes().to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn opened_entries_are_never_a_mixed_pair() {
    const READERS: usize = 4;
    const READS: usize = 25_000;
    const PUTS: u64 = 500;
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    vmem.put_named_with("pair", pair(0).0, PutOptions::new(Disk).metadata(pair(0).1))
        .await
        .unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writer = {
        let vmem = vmem.clone();
        let ended = ended.clone();
        let written = written.clone();
        tokio::spawn(async move {
            let mut n = 0;
            while !ended.load(Ordering::SeqCst) {
                n = written.fetch_add(1, Ordering::SeqCst) + 1;
                let home = if n % 3 == 0 { Host } else { Disk };
                let (bytes, metadata) = pair(n);
                let options = PutOptions::new(home).metadata(metadata);
                vmem.put_named_with("pair", bytes, options).await.unwrap();
            }
            n
        })
    };
    let readers = (0..READERS).map(|_| {
        let vmem = vmem.clone();
        let written = written.clone();
        tokio::spawn(async move {
            let mut last = 0;
            let mut reads = 0;
            while reads < READS || written.load(Ordering::SeqCst) < PUTS {
                reads += 1;
                let (handle, entry) = vmem.open_entry("pair").await.unwrap();
                let bytes = vmem.read(&handle).await.unwrap();
                let n = u64::from_le_bytes(entry.metadata[..].try_into().unwrap());
                assert!(bytes == pair(n).0, "metadata of {n}, bytes of {:?}", &bytes[..8]);
                assert_eq!(entry.len, bytes.len() as u64);
                assert!(entry.version >= last, "version {} after {last}", entry.version);
                last = entry.version;
            }
            reads
        })
    });
    let mut reads = 0;
    for reader in join_all(readers).await {
        reads += reader.unwrap();
    }
    ended.store(true, Ordering::SeqCst);
    let written = writer.await.unwrap();
    println!("{reads} reads beside {written} puts, none mixed");
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_raced_by_sixteen_tasks_has_one_winner() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for round in 0..30 {
        let name = format!("round {round}");
        let tasks = (0..16_u64).map(|n| {
            let vmem = vmem.clone();
            let name = name.clone();
            tokio::spawn(async move {
                let (bytes, metadata) = pair(n);
                let options = create(if n % 2 == 0 { Host } else { Disk }).metadata(metadata);
                (n, vmem.put_named_with(&name, bytes, options).await)
            })
        });
        let mut winners = Vec::new();
        for outcome in join_all(tasks).await {
            match outcome.unwrap() {
                (n, Ok(_)) => winners.push(n),
                (_, Err(VirtualMemoryError::NameExists { name: exists })) => {
                    assert_eq!(*exists, *name);
                }
                (n, Err(error)) => panic!("{n}: {error:?}"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        let (handle, entry) = vmem.open_entry(&name).await.unwrap();
        assert_eq!(entry.metadata, pair(winners[0]).1);
        assert_eq!(vmem.read(&handle).await.unwrap(), pair(winners[0]).0);
    }
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_raced_by_sixteen_tasks_lose_none() {
    const EACH: u64 = 20;
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    vmem.put_named("counter", 0_u64.to_le_bytes(), Disk).await.unwrap();
    let tasks = (0..16).map(|_| {
        let vmem = vmem.clone();
        tokio::spawn(async move {
            let mut refused = 0;
            for _ in 0..EACH {
                loop {
                    let (handle, entry) = vmem.open_entry("counter").await.unwrap();
                    let bytes = vmem.read(&handle).await.unwrap();
                    let count = u64::from_le_bytes(bytes[..].try_into().unwrap()) + 1;
                    let put = vmem.put_named_with(
                        "counter",
                        count.to_le_bytes(),
                        update(entry.version).metadata(count.to_string()),
                    );
                    match put.await {
                        Ok(_) => break,
                        Err(VirtualMemoryError::VersionChanged { expected, current, .. }) => {
                            assert_eq!(expected, entry.version);
                            assert!(current > expected);
                            refused += 1;
                        }
                        Err(error) => panic!("{error:?}"),
                    }
                }
            }
            refused
        })
    });
    let mut refused = 0;
    for task in join_all(tasks).await {
        refused += task.unwrap();
    }
    println!("{} updates, {refused} refused", 16 * EACH);
    let (handle, entry) = vmem.open_entry("counter").await.unwrap();
    assert_eq!(vmem.read(&handle).await.unwrap()[..], (16 * EACH).to_le_bytes());
    assert_eq!(entry.metadata, (16 * EACH).to_string());
    drop(handle);
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_over_an_unflushed_write_is_refused_and_keeps_it() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let handle = vmem.put_named("a", [1; 10], Host).await.unwrap();
    let seen = vmem.entry("a").await.unwrap();
    vmem.write(&handle, [2; 10]).await.unwrap();
    let refused = vmem.put_named_with("a", [3; 10], update(seen.version)).await;
    let Err(VirtualMemoryError::VersionChanged { name, expected, current }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((&*name, expected), ("a", seen.version));
    let now = vmem.entry("a").await.unwrap();
    assert_eq!(now.version, current);
    assert_eq!(vmem.read(&vmem.open_named("a").await.unwrap()).await.unwrap()[..], [2; 10]);
    vmem.put_named_with("a", [3; 10], update(current)).await.unwrap();
    let missing = vmem.put_named_with("b", [3; 10], update(current)).await;
    assert!(matches!(missing, Err(VirtualMemoryError::NameNotFound { .. })), "{missing:?}");
    drop(handle);
    vmem.close().await.unwrap();
    assert_eq!(vmem_io::verify(directory.path()).unwrap().objects, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_state_has_a_version_of_its_own_which_a_rename_and_a_restart_keep() {
    let directory = tempfile::tempdir().unwrap();
    let begun = SystemTime::now();
    let vmem = open(directory.path()).await;
    let mut versions = HashSet::new();
    let mut last = begun;
    let mut fresh = |entry: &vmem::NamedEntry| {
        assert!(versions.insert(entry.version), "{entry:?}: a version of another state");
        assert!(entry.modified >= last && entry.modified <= SystemTime::now(), "{entry:?}");
        last = entry.modified;
    };
    let handle = vmem.put_named("a", [1; 100], Host).await.unwrap();
    fresh(&vmem.entry("a").await.unwrap());
    vmem.set_metadata("a", b"m").await.unwrap();
    fresh(&vmem.entry("a").await.unwrap());
    vmem.write(&handle, [2; 100]).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    let flushed = vmem.entry("a").await.unwrap();
    fresh(&flushed);
    vmem.flush(&handle).await.unwrap();
    assert_eq!(vmem.entry("a").await.unwrap(), flushed, "nothing was to be flushed");
    let other = vmem.allocate_named("b", 10, Disk).await.unwrap();
    fresh(&vmem.entry("b").await.unwrap());
    vmem.flush(&other).await.unwrap();
    fresh(&vmem.entry("b").await.unwrap());
    vmem.rename_named("a", "b").await.unwrap();
    let renamed = vmem.entry("b").await.unwrap();
    assert_eq!((renamed.version, renamed.modified), (flushed.version, flushed.modified));
    assert_eq!(renamed.metadata, "m");
    drop((handle, other));
    vmem.close().await.unwrap();

    let vmem = open(directory.path()).await;
    assert_eq!(vmem.entry("b").await.unwrap(), renamed);
    vmem.put_named("b", [3; 10], Disk).await.unwrap();
    fresh(&vmem.entry("b").await.unwrap());
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_bring_no_object_into_memory() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for n in 0..50_u64 {
        let (bytes, metadata) = pair(n);
        let options = PutOptions::new(Disk).metadata(metadata);
        vmem.put_named_with(&format!("{n}"), bytes, options).await.unwrap();
    }
    vmem.close().await.unwrap();
    let vmem = open(directory.path()).await;
    for n in 0..50_u64 {
        let entry = vmem.entry(&format!("{n}")).await.unwrap();
        assert_eq!((entry.len, &entry.metadata[..]), (pair(n).0.len() as u64, &pair(n).1[..]));
        assert_eq!((entry.home, &*entry.name), (Disk, &*format!("{n}")));
    }
    let entries: Vec<_> = vmem.names("").try_collect().await.unwrap();
    assert_eq!(entries.len(), 50);
    let stats = vmem.stats();
    assert_eq!((stats.names_in_memory, stats.objects, stats.metadata_bytes), (0, 0, 0));
    let missing = vmem.entry("missing").await;
    assert!(matches!(missing, Err(VirtualMemoryError::NameNotFound { .. })), "{missing:?}");
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adopted_objects_have_their_name_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let handle = vmem.put(vec![7; 100_000], Host).await.unwrap();
    assert_eq!(handle.name(), None);
    vmem.put_named("taken", [1], Disk).await.unwrap();
    let taken = vmem.adopt(&handle, "taken").await;
    assert!(matches!(taken, Err(VirtualMemoryError::NameExists { .. })), "{taken:?}");
    assert_eq!(handle.name(), None);
    let long = vmem.adopt(&handle, &"x".repeat(1025)).await;
    assert!(matches!(long, Err(VirtualMemoryError::InvalidConfig { field: "name", .. })));

    // Two at once: one of them gives it its name.
    let (one, other) = tokio::join!(vmem.adopt(&handle, "one"), vmem.adopt(&handle, "other"));
    let (name, refused) = if one.is_ok() { ("one", other) } else { ("other", one) };
    let Err(VirtualMemoryError::AlreadyNamed { handle: of, name: has }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((of, &*has, handle.name()), (handle.id(), name, Some(name)));
    // The object itself, not a copy of it.
    assert_eq!(vmem.open_named(name).await.unwrap(), handle);
    drop(handle);
    vmem.close().await.unwrap();

    let vmem = open(directory.path()).await;
    assert_eq!(vmem.read(&vmem.open_named(name).await.unwrap()).await.unwrap(), vec![7; 100_000]);
    // One that has lost its name can get another one.
    let old = vmem.open_named(name).await.unwrap();
    vmem.put_named(name, [2], Disk).await.unwrap();
    vmem.adopt(&old, "old").await.unwrap();
    let freed = vmem.put([1], Disk).await.unwrap();
    vmem.free(freed.clone()).await.unwrap();
    let gone = vmem.adopt(&freed, "freed").await;
    assert!(matches!(gone, Err(VirtualMemoryError::HandleNotFound { .. })), "{gone:?}");
    drop(old);
    vmem.close().await.unwrap();
    let verified = vmem_io::verify(directory.path()).unwrap();
    assert_eq!((verified.objects, verified.damaged.len()), (3, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_removed_at_once_are_gone_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let names: Vec<String> = (0..600).map(|n| format!("object {n}")).collect();
    let puts = names.iter().map(|name| vmem.put_named(name, [1; 100], Disk));
    assert!(join_all(puts).await.iter().all(Result::is_ok));
    let invalid = vmem.remove_many(&["object 0", ""]).await;
    assert!(matches!(invalid, Err(VirtualMemoryError::InvalidConfig { field: "name", .. })));
    assert!(vmem.entry("object 0").await.is_ok(), "nothing was removed");
    let kept = vmem.open_named("object 7").await.unwrap();
    let mut many: Vec<&str> = names[..500].iter().map(|name| &**name).collect();
    many.extend(["missing", "object 3"]);
    let commits = vmem.stats().commits;
    assert_eq!(vmem.remove_many(&many).await.unwrap(), 500);
    let commits = vmem.stats().commits - commits;
    assert!(commits < 250, "500 removals took {commits} commits");
    assert_eq!(vmem.remove_many::<String>(&[]).await.unwrap(), 0);
    assert_eq!(vmem.read(&kept).await.unwrap()[..], [1; 100]);
    drop(kept);
    assert_eq!(vmem.stats().disk.used_bytes, 100 * 512);
    vmem.close().await.unwrap();
    let vmem = open(directory.path()).await;
    assert_eq!(vmem.names("").try_collect::<Vec<_>>().await.unwrap().len(), 100);
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn puts_that_are_refused_leave_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    vmem.put_named("a", [1; 100], Disk).await.unwrap();
    let before = (vmem.stats().disk.used_bytes, vmem.stats().objects);
    let large = PutOptions::new(Disk).metadata(vec![0; 4097]);
    let refused = [
        vmem.put_named_with("b", [2; 100], large).await.err(),
        vmem.put_named_with("a", [2; 100], create(Disk)).await.err(),
        vmem.put_named_with("a", [2; 100], update(u64::MAX)).await.err(),
        vmem.put_named_with("b", [2; 100], update(0)).await.err(),
        vmem.put_named_with("", [2; 100], create(Host)).await.err(),
    ];
    let kinds = refused.map(|error| format!("{error:?}"));
    let expected = ["metadata", "NameExists", "VersionChanged", "NameNotFound", "name"];
    for (kind, expected) in kinds.iter().zip(expected) {
        assert!(kind.contains(expected), "{kind}");
    }
    let empty = vmem.names_with(ListOptions::new().delimiter("")).try_collect::<Vec<_>>().await;
    assert!(matches!(empty, Err(VirtualMemoryError::InvalidConfig { field: "delimiter", .. })));
    assert_eq!((vmem.stats().disk.used_bytes, vmem.stats().objects), before);
    let largest = PutOptions::new(Disk).metadata(vec![9; 4096]);
    vmem.put_named_with("b", [2; 100], largest).await.unwrap();
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renames_on_a_condition_that_fails_change_no_name() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for name in ["from", "to"] {
        vmem.put_named(name, name, Disk).await.unwrap();
    }
    let from = vmem.entry("from").await.unwrap();
    let to = vmem.entry("to").await.unwrap();
    let refused = [
        vmem.rename_named_with("from", "to", PutMode::Create).await.err(),
        vmem.rename_named_with("from", "from", PutMode::Create).await.err(),
        vmem.rename_named_with("from", "to", PutMode::Update(from.version)).await.err(),
        vmem.rename_named_with("from", "free", PutMode::Update(from.version)).await.err(),
        vmem.rename_named_with("missing", "to", PutMode::Overwrite).await.err(),
        vmem.rename_named_with("missing", "missing", PutMode::Create).await.err(),
    ];
    let kinds = refused.map(|error| format!("{error:?}"));
    let expected = ["Exists", "Exists", "VersionChanged", "NotFound", "NotFound", "NotFound"];
    for (kind, expected) in kinds.iter().zip(expected) {
        assert!(kind.contains(expected), "{kind}");
    }
    assert_eq!(vmem.entry("from").await.unwrap(), from);
    assert_eq!(vmem.entry("to").await.unwrap(), to);
    // What was written and not flushed is another version, which the caller has not seen.
    let handle = vmem.open_named("to").await.unwrap();
    vmem.write(&handle, b"tO").await.unwrap();
    let unseen = vmem.rename_named_with("from", "to", PutMode::Update(to.version)).await;
    assert!(matches!(unseen, Err(VirtualMemoryError::VersionChanged { .. })), "{unseen:?}");
    let seen = vmem.entry("to").await.unwrap().version;
    vmem.rename_named_with("from", "to", PutMode::Update(seen)).await.unwrap();
    vmem.rename_named_with("to", "free", PutMode::Create).await.unwrap();
    assert_eq!(vmem.entry("free").await.unwrap().version, from.version);
    vmem.close().await.unwrap();
}
