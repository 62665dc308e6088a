//! Named objects over real directories: what a name stands for, and what survives a restart.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use vmem::{
    MemoryTier::{self, Disk, Host},
    VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_testkit::driver_under_test;

fn config(directory: &Path) -> VirtualMemoryConfig {
    VirtualMemoryConfig::builder()
        .disk_path(directory)
        .host_capacity(4 << 20)
        .disk_capacity(16 << 20)
        .io_driver(driver_under_test())
        .build()
        .unwrap()
}

pub(super) async fn open(directory: &Path) -> VirtualMemory {
    vmem::open(config(directory)).await.unwrap()
}

pub(super) async fn listed(vmem: &VirtualMemory, prefix: &str) -> Vec<String> {
    let names = vmem.names(prefix).map_ok(|entry| entry.name.to_string());
    names.try_collect().await.unwrap()
}

pub(super) async fn is(vmem: &VirtualMemory, handle: &VMemHandle, byte: u8, len: usize) {
    let bytes = vmem.read(handle).await.unwrap();
    assert_eq!(bytes.len(), len);
    assert!(bytes.iter().all(|&found| found == byte), "not all bytes are {byte}");
}

fn disk_used(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(directory.join(vmem_io::DATA_FILE)).map_or(0, |data| data.blocks() * 512)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn named_object_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for (n, len) in [0, 1, 100, 65_536, 200_000, 1 << 20].into_iter().enumerate() {
        let home = if n % 2 == 0 { Host } else { Disk };
        let handle =
            vmem.put_named(&format!("object/{n}"), vec![n as u8; len], home).await.unwrap();
        assert_eq!(handle.name(), Some(&*format!("object/{n}")));
        is(&vmem, &handle, n as u8, len).await;
    }
    vmem.set_metadata("object/2", b"beside it").await.unwrap();
    vmem.put(vec![9; 300_000], Disk).await.unwrap();
    vmem.close().await.unwrap();

    let vmem = open(directory.path()).await;
    let entries: Vec<_> = vmem.names("object/").try_collect().await.unwrap();
    assert_eq!(entries.len(), 6);
    assert_eq!((&*entries[2].name, &entries[2].metadata[..]), ("object/2", &b"beside it"[..]));
    assert_eq!((entries[4].len, entries[4].home, entries[5].home), (200_000, Host, Disk));
    for (n, len) in [0, 1, 100, 65_536, 200_000, 1 << 20].into_iter().enumerate() {
        let handle = vmem.open_named(&format!("object/{n}")).await.unwrap();
        assert_eq!(handle.len(), len);
        is(&vmem, &handle, n as u8, len).await;
    }
    let missing = vmem.open_named("object").await;
    assert!(matches!(missing, Err(VirtualMemoryError::NameNotFound { .. })));
    vmem.close().await.unwrap();
    let verified = vmem_io::verify(directory.path()).unwrap();
    assert_eq!((verified.objects, verified.damaged.len()), (6, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replaced_renamed_removed() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let one = vmem.put_named("a", vec![1; 100_000], Host).await.unwrap();
    let two = vmem.put_named("a", [2; 50], Disk).await.unwrap();
    is(&vmem, &one, 1, 100_000).await;
    is(&vmem, &vmem.open_named("a").await.unwrap(), 2, 50).await;
    vmem.write(&one, vec![7; 100_000]).await.unwrap();
    vmem.flush(&one).await.unwrap();
    is(&vmem, &vmem.open_named("a").await.unwrap(), 2, 50).await;

    vmem.put_named("b", vec![3; 70_000], Host).await.unwrap();
    vmem.rename_named("a", "b").await.unwrap();
    assert_eq!(listed(&vmem, "").await, ["b"]);
    assert_eq!(vmem.open_named("b").await.unwrap(), two);
    assert_eq!(two.name(), Some("a"));
    vmem.rename_named("b", "b").await.unwrap();
    let lost = vmem.rename_named("a", "c").await;
    assert!(matches!(lost, Err(VirtualMemoryError::NameNotFound { .. })));

    vmem.put_named("gone", [4; 10], Host).await.unwrap();
    let gone = vmem.open_named("gone").await.unwrap();
    vmem.remove_named("gone").await.unwrap();
    is(&vmem, &gone, 4, 10).await;
    assert!(matches!(
        vmem.remove_named("gone").await,
        Err(VirtualMemoryError::NameNotFound { .. })
    ));
    drop((one, two, gone));
    vmem.close().await.unwrap();

    let vmem = open(directory.path()).await;
    assert_eq!(listed(&vmem, "").await, ["b"]);
    is(&vmem, &vmem.open_named("b").await.unwrap(), 2, 50).await;
    assert_eq!(vmem.stats().disk.used_bytes, 512);
    vmem.remove_named("b").await.unwrap();
    assert_eq!(vmem.stats().disk.used_bytes, 0);
    vmem.close().await.unwrap();
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "the lock file alone stays where nothing has a name: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_durable_from_its_first_flush() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let handle = vmem.allocate_named("flushed", 150_000, Host).await.unwrap();
    let exists = vmem.allocate_named("flushed", 1, Host).await;
    assert!(matches!(exists, Err(VirtualMemoryError::NameExists { .. })));
    vmem.flush(&handle).await.unwrap();
    vmem.write_at(&handle, 70_000, [5; 10]).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    vmem.write_at(&handle, 0, [6; 10]).await.unwrap();
    let never = vmem.allocate_named("never", 10, Disk).await.unwrap();
    vmem.write(&never, [7; 10]).await.unwrap();
    assert_eq!(listed(&vmem, "").await, ["flushed", "never"]);
    // It has no handle, and still exists.
    drop(never);
    is(&vmem, &vmem.open_named("never").await.unwrap(), 7, 10).await;
    // As a crash would leave it.
    let copy = tempfile::tempdir().unwrap();
    copy_files(directory.path(), copy.path());
    let crashed = open(copy.path()).await;
    assert_eq!(listed(&crashed, "").await, ["flushed"]);
    let found = crashed.open_named("flushed").await.unwrap();
    let bytes = crashed.read(&found).await.unwrap();
    let mut expected = vec![0; 150_000];
    expected[70_000..70_010].fill(5);
    assert!(bytes == expected, "what was flushed, and nothing that came later");
    drop((found, bytes));
    crashed.close().await.unwrap();
    // Closing makes all of it durable.
    drop(handle);
    vmem.close().await.unwrap();
    let vmem = open(directory.path()).await;
    assert_eq!(listed(&vmem, "").await, ["flushed", "never"]);
    is(&vmem, &vmem.open_named("never").await.unwrap(), 7, 10).await;
    let bytes = vmem.read(&vmem.open_named("flushed").await.unwrap()).await.unwrap();
    assert_eq!(&bytes[..10], [6; 10]);
    drop(bytes);
    vmem.close().await.unwrap();
}

fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_cannot_be_names() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    for name in ["", &"x".repeat(1025)] {
        let refused = vmem.put_named(name, [1], Host).await;
        let wrong = format!("{refused:?}");
        assert!(
            matches!(refused, Err(VirtualMemoryError::InvalidConfig { field: "name", .. })),
            "{wrong}"
        );
    }
    let longest = "\u{e9}".repeat(512);
    let odd = ["\0", "a\nb", "/../x", &longest];
    for name in odd {
        vmem.put_named(name, name, Host).await.unwrap();
    }
    let metadata = vmem.set_metadata("\0", &[0; 4097]).await;
    assert!(matches!(metadata, Err(VirtualMemoryError::InvalidConfig { field: "metadata", .. })));
    vmem.set_metadata("\0", &[1; 4096]).await.unwrap();
    let nothing = vmem.set_metadata("nothing", &[1]).await;
    assert!(matches!(nothing, Err(VirtualMemoryError::NameNotFound { .. })));
    vmem.close().await.unwrap();
    let vmem = open(directory.path()).await;
    for name in odd {
        let handle = vmem.open_named(name).await.unwrap();
        assert_eq!(vmem.read(&handle).await.unwrap(), name.as_bytes());
    }
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_listed_in_order_across_pages() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let mut expected = Vec::new();
    let mut puts = Vec::new();
    for n in 0..600 {
        let name = format!("n/{n:04}");
        expected.push(name.clone());
        if n % 3 == 0 {
            vmem.allocate_named(&name, 3, Host).await.unwrap();
        } else {
            let vmem = vmem.clone();
            puts.push(tokio::spawn(async move { vmem.put_named(&name, [1; 3], Host).await }));
        }
    }
    for put in puts {
        put.await.unwrap().unwrap();
    }
    vmem.put_named("m", [1], Host).await.unwrap();
    vmem.put_named("o", [1], Host).await.unwrap();
    assert_eq!(listed(&vmem, "n/").await, expected);
    assert_eq!(listed(&vmem, "n/05").await, expected[500..]);
    assert_eq!(listed(&vmem, "").await.len(), 602);
    assert!(listed(&vmem, "p").await.is_empty());
    vmem.close().await.unwrap();
    let vmem = open(directory.path()).await;
    assert_eq!(listed(&vmem, "n/").await, expected);
    vmem.close().await.unwrap();
}

/// Scenario 19, with names: what nothing durable leads to takes no space after a restart, however
/// the store ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_19_no_orphan_space_beside_names() {
    let directory = tempfile::tempdir().unwrap();
    let named = 8 * 40_960_u64;
    let vmem = open(directory.path()).await;
    for round in 0..10_u8 {
        let mut unnamed = Vec::new();
        for n in 0..8 {
            vmem.put_named(&format!("kept {n}"), vec![round; 40_960], Disk).await.unwrap();
            unnamed.push(vmem.put(vec![round; 900_000], Disk).await.unwrap());
        }
        assert!(vmem.stats().disk.used_bytes <= 16 << 20);
    }
    assert_eq!(vmem.stats().disk.used_bytes, named);
    let crashed = tempfile::tempdir().unwrap();
    copy_files(directory.path(), crashed.path());
    vmem.close().await.unwrap();
    let slack = 16 * 4096;
    assert!(disk_used(directory.path()) <= named + slack, "{}", disk_used(directory.path()));

    let vmem = open(crashed.path()).await;
    assert_eq!(vmem.stats().disk.used_bytes, named);
    vmem.close().await.unwrap();
    assert!(disk_used(crashed.path()) <= named + slack, "{}", disk_used(crashed.path()));

    // Dropped without close.
    let vmem = open(directory.path()).await;
    let unnamed = vmem.put(vec![1; 900_000], Disk).await.unwrap();
    drop((unnamed, vmem));
    let vmem = open(directory.path()).await;
    assert_eq!(vmem.stats().disk.used_bytes, named);
    for n in 0..8 {
        let handle = vmem.open_named(&format!("kept {n}")).await.unwrap();
        is(&vmem, &handle, 9, 40_960).await;
    }
    vmem.close().await.unwrap();
    assert!(disk_used(directory.path()) <= named + slack, "{}", disk_used(directory.path()));
}

/// Where the free space is in pieces smaller than a chunk, chunks are taken apart, and found again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_in_pieces_are_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let mut small = Vec::new();
    while let Ok(handle) = vmem.put(vec![1; 32_768], Disk).await {
        small.push(handle);
    }
    let mut nth = 0;
    small.retain(|_| {
        nth += 1;
        nth % 2 == 0
    });
    let pattern: Vec<u8> = (0..1_000_000_u32).map(|n| (n / 251) as u8).collect();
    let handle = vmem.put_named("in pieces", &pattern, Disk).await.unwrap();
    vmem.write_at(&handle, 500_000, [7; 1000]).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    drop((small, handle));
    let snapshot = tempfile::tempdir().unwrap();
    vmem.snapshot(snapshot.path()).await.unwrap();
    vmem.close().await.unwrap();
    for path in [directory.path(), snapshot.path()] {
        assert_eq!(vmem_io::verify(path).unwrap().objects, 1);
        let vmem = open(path).await;
        let handle = vmem.open_named("in pieces").await.unwrap();
        let bytes = vmem.read(&handle).await.unwrap();
        assert!(bytes[..500_000] == pattern[..500_000] && bytes[501_000..] == pattern[501_000..]);
        assert_eq!(bytes[500_000..501_000], [7; 1000]);
        drop((handle, bytes));
        vmem.remove_named("in pieces").await.unwrap();
        assert_eq!(vmem.stats().disk.used_bytes, 0);
        vmem.close().await.unwrap();
    }
}

/// Scenario 34: the flush ends, and covers what was complete when it was called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_34_a_thousand_writers_while_it_is_flushed() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path()).await;
    let handle = vmem.allocate_named("contended", 1000 * 100, Host).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writers: Vec<_> = (0..1000_usize)
        .map(|n| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut version = 0_u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    version += 1;
                    vmem.write_at(&handle, n * 100, version.to_le_bytes()).await.unwrap();
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..20 {
        let complete = vmem.read(&handle).await.unwrap();
        vmem.flush(&handle).await.unwrap();
        let crashed = tempfile::tempdir().unwrap();
        copy_files(directory.path(), crashed.path());
        let store = open(crashed.path()).await;
        let found = store.open_named("contended").await.unwrap();
        let durable = store.read(&found).await.unwrap();
        for n in 0..1000 {
            let version =
                |bytes: &[u8]| u64::from_le_bytes(bytes[n * 100..n * 100 + 8].try_into().unwrap());
            assert!(version(&durable) >= version(&complete), "writer {n}");
        }
        drop((found, durable));
        store.close().await.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    vmem.close().await.unwrap();
}

/// A large write that was begun and is no longer polled keeps no other call from the object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_left_alone_keeps_no_flush_waiting() {
    let config = VirtualMemoryConfig::builder().host_capacity(32 << 20).disk_capacity(64 << 20);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let len = 8 << 20;
    let handle = vmem.put_named("a", vec![1; len], MemoryTier::Host).await.unwrap();
    let data = vec![2; len];
    let mut write = Box::pin(vmem.write(&handle, &data));
    assert!(futures::poll!(&mut write).is_pending());
    let hang = Duration::from_secs(20);
    for _ in 0..4 {
        tokio::time::timeout(hang, vmem.flush(&handle)).await.expect("it flushes").unwrap();
    }
    write.await.unwrap();
    assert!(vmem.read(&handle).await.unwrap().iter().all(|byte| *byte == 2));
    drop(handle);
    vmem.close().await.unwrap();
}
