//! The disk tier over real files: damage, truncation, full file systems, growth.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use common::{eventually, random_bytes, rng};
use rand::Rng;
use vmem_core::IoDriver;
use vmem_core::backend::{Durable, Extent, IoBuf, ReadChunk, TierError};
use vmem_io::{DATA_FILE, OpenedDisk, open_disk};

const CHUNK: u32 = 65536;
const MIB: u64 = 1 << 20;

struct Store {
    disk: OpenedDisk,
    file: File,
    _directory: tempfile::TempDir,
}

fn store(capacity: u64) -> Store {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let disk = open_disk(Some(&path), Some(capacity), IoDriver::Auto, 1 << 20).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path.join(DATA_FILE));
    Store { disk, file: file.unwrap(), _directory: directory }
}

async fn write(
    backend: &Arc<dyn Durable>,
    payloads: &[Bytes],
) -> Result<Vec<Arc<Extent>>, TierError> {
    let lens: Vec<u32> = payloads.iter().map(|bytes| bytes.len() as u32).collect();
    let extents = backend.reserve(&lens)?;
    let pieces = extents.into_iter().zip(payloads.iter().cloned());
    let written = backend.write(pieces.collect()).await?;
    Ok(written.into_iter().map(Arc::new).collect())
}

async fn read(backend: &Arc<dyn Durable>, extents: &[Arc<Extent>]) -> Result<Vec<u8>, TierError> {
    let len: usize = extents.iter().map(|extent| extent.len() as usize).sum();
    let buf = IoBuf::from_vec(vec![0xaa; len]);
    let (buf, result) = backend.read(ReadChunk::in_sequence(extents.to_vec()), buf).await;
    result.map(|()| buf.to_vec())
}

fn allocated(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[tokio::test]
async fn chunks_of_all_lengths_come_back() {
    let mut rng = rng(1);
    let store = store(8 * MIB);
    let backend = &store.disk.backend;
    let lens = [0, 1, 511, 512, 513, 4096, 65535, 65536, 65536, 0, 65536, 7];
    let payloads: Vec<_> = lens.map(|len| random_bytes(&mut rng, len)).into();
    let extents = write(backend, &payloads).await.unwrap();
    assert_eq!(read(backend, &extents).await.unwrap(), payloads.concat());
    // In another order, some twice, into a buffer that is longer.
    let order = [7, 3, 3, 0, 11, 8, 10, 1];
    let some: Vec<_> = order.map(|index| Arc::clone(&extents[index])).into();
    let expected: Vec<u8> = order.iter().flat_map(|&index| payloads[index].to_vec()).collect();
    let buf = IoBuf::from_vec(vec![0xaa; expected.len() + 9]);
    let (buf, result) = backend.read(ReadChunk::in_sequence(some), buf).await;
    result.unwrap();
    assert_eq!(buf[..expected.len()], expected);
    assert_eq!(buf[expected.len()..], [0xaa; 9]);
    drop(extents);
    assert_eq!(backend.usage().used_bytes, 0);
    backend.close().await.unwrap();
}

#[tokio::test]
async fn unwritten_chunk_reads_as_zeros_where_other_bytes_were() {
    let store = store(MIB);
    let backend = &store.disk.backend;
    let secret = write(backend, &[Bytes::from(vec![0x55; 65536])]).await.unwrap();
    let offset = secret[0].offset();
    drop(secret);
    let reserved: Vec<_> = backend.reserve(&[CHUNK]).unwrap().into_iter().map(Arc::new).collect();
    assert_eq!((reserved[0].offset(), reserved[0].sum()), (offset, None));
    assert_eq!(read(backend, &reserved).await.unwrap(), vec![0; 65536]);
    let mut mixed = write(backend, &[Bytes::from_static(b"abc")]).await.unwrap();
    mixed.insert(0, Arc::clone(&reserved[0]));
    assert_eq!(read(backend, &mixed).await.unwrap()[65530..], *b"\0\0\0\0\0\0abc");
    backend.close().await.unwrap();
}

#[tokio::test]
async fn every_flipped_bit_is_found_and_its_chunk_named() {
    let mut rng = rng(2);
    let store = store(8 * MIB);
    let backend = &store.disk.backend;
    let payloads = [65536, 40, 65536].map(|len| random_bytes(&mut rng, len));
    let extents = write(backend, &payloads).await.unwrap();
    for bit in 0..40 * 8 {
        let at = extents[1].offset() + bit / 8;
        let mut byte = [0];
        store.file.read_exact_at(&mut byte, at).unwrap();
        store.file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], at).unwrap();
        match read(backend, &extents).await {
            Err(TierError::Corrupt { chunk: 1, expected, actual }) => {
                assert_eq!(Some(expected), extents[1].sum());
                assert_ne!(expected, actual);
            }
            other => panic!("bit {bit}: {:?}", other.map(|_| ())),
        }
        assert_eq!(read(backend, &extents[2..]).await.unwrap(), payloads[2], "others fine");
        store.file.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(read(backend, &extents).await.unwrap(), payloads.concat());
    backend.close().await.unwrap();
}

#[tokio::test]
async fn a_truncated_file_damages_what_it_lost_and_nothing_else() {
    let mut rng = rng(4);
    let store = store(8 * MIB);
    let backend = &store.disk.backend;
    let payloads: Vec<_> = (0..4).map(|_| random_bytes(&mut rng, 65536)).collect();
    let extents = write(backend, &payloads).await.unwrap();
    store.file.set_len(extents[2].offset() + 100).unwrap();
    match read(backend, &extents).await {
        Err(TierError::Corrupt { chunk, expected, actual }) => {
            assert_eq!((chunk, Some(expected), actual), (2, extents[2].sum(), 0));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
    assert_eq!(read(backend, &extents[..2]).await.unwrap(), payloads[..2].concat());
    backend.close().await.unwrap();
}

#[tokio::test]
async fn bad_calls_are_refused() {
    let store = store(MIB);
    let backend = &store.disk.backend;
    let invalid = |error: TierError| {
        let TierError::Io { source, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::InvalidInput);
    };
    invalid(backend.reserve(&[CHUNK + 1]).unwrap_err());
    let extent = backend.reserve(&[10]).unwrap().remove(0);
    let longer = Bytes::from_static(b"eleven bytes");
    invalid(backend.write(vec![(extent, longer)]).await.unwrap_err());
    assert_eq!(backend.usage().extents, 0, "given back all the same");
    let extents = write(backend, &[Bytes::from_static(b"abc")]).await.unwrap();
    let (buf, result) =
        backend.read(ReadChunk::in_sequence(extents), IoBuf::from_vec(vec![0; 2])).await;
    assert_eq!(buf.len(), 2);
    invalid(result.unwrap_err());
    let full = backend.reserve(&[CHUNK; 17]).unwrap_err();
    assert!(matches!(full, TierError::Full { free_bytes: 1_048_576, source: None, .. }));
    backend.close().await.unwrap();
}

#[tokio::test]
async fn after_close_everything_is_closed_and_the_files_are_gone() {
    let store = store(MIB);
    let backend = &store.disk.backend;
    let extents = write(backend, &[Bytes::from_static(b"abc")]).await.unwrap();
    let reserved = backend.reserve(&[3]).unwrap().remove(0);
    backend.close().await.unwrap();
    backend.close().await.unwrap();
    assert!(matches!(read(backend, &extents).await, Err(TierError::Closed)));
    assert!(matches!(backend.reserve(&[1]), Err(TierError::Closed)));
    let late = backend.write(vec![(reserved, Bytes::from_static(b"abc"))]).await;
    assert!(matches!(late, Err(TierError::Closed)));
    assert!(!store.disk.path.join(DATA_FILE).exists());
    drop(extents);
    assert_eq!(backend.usage().used_bytes, 0);
    // The lock went, although backend and catalog are still there.
    store.disk.catalog.close().await.unwrap();
    let again = open_disk(Some(&store.disk.path), Some(MIB), IoDriver::Auto, 1 << 20).unwrap();
    again.backend.close().await.unwrap();
}

#[tokio::test]
async fn ten_times_the_capacity_goes_through() {
    const CAPACITY: u64 = 8 * MIB;
    let mut rng = rng(5);
    let store = store(CAPACITY);
    let backend = &store.disk.backend;
    let mut live: Vec<(Vec<Arc<Extent>>, Vec<u8>)> = Vec::new();
    let mut written = 0;
    while written < 10 * CAPACITY {
        let payloads: Vec<_> = (0..rng.random_range(1..20))
            .map(|_| {
                let full = rng.random_bool(0.6);
                let len = if full { CHUNK } else { rng.random_range(0..CHUNK) };
                random_bytes(&mut rng, len as usize)
            })
            .collect();
        match write(backend, &payloads).await {
            Ok(extents) => {
                live.push((extents, payloads.concat()));
                written += live.last().unwrap().1.len() as u64;
            }
            Err(TierError::Full { source: None, .. }) => {
                let (extents, content) = live.swap_remove(rng.random_range(0..live.len()));
                assert!(read(backend, &extents).await.unwrap() == content);
            }
            Err(error) => panic!("{error:?}"),
        }
        assert!(store.file.metadata().unwrap().len() <= CAPACITY);
        // The file system may keep a block or two for its own lists.
        assert!(allocated(&store.file) <= CAPACITY + 64 * 1024);
    }
    for (extents, content) in live.drain(..) {
        assert!(read(backend, &extents).await.unwrap() == content);
    }
    let usage = backend.usage();
    assert_eq!((usage.used_bytes, usage.largest_free_bytes), (0, CAPACITY));
    assert!(usage.peak_bytes <= CAPACITY);
    backend.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_shrinks_when_objects_go() {
    let store = store(32 * MIB);
    let backend = &store.disk.backend;
    let payloads = vec![Bytes::from(vec![1; 65536]); 512];
    let mut extents = write(backend, &payloads).await.unwrap();
    assert!(allocated(&store.file) >= 32 * MIB);
    let kept = extents.split_off(500);
    drop(extents);
    // Less than a batch may stay, and what is kept.
    eventually("the holes are punched", || allocated(&store.file) < 6 * MIB);
    assert_eq!(read(backend, &kept).await.unwrap(), payloads[..12].concat());
    backend.close().await.unwrap();
}

/// A file system of a given size, unmounted on drop.
struct Mounted(PathBuf, #[allow(dead_code)] tempfile::TempDir);

impl Mounted {
    fn new(options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("SKIPPED: mounting a tmpfs is not permitted here");
        }
        mounted.then(|| Mounted(path, directory))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_file_system_is_reported_and_recovers() {
    let Some(mount) = Mounted::new("size=4m") else {
        return;
    };
    let other = mount.0.join("other");
    std::fs::write(&other, vec![1; 2 << 20]).unwrap();
    let disk =
        open_disk(Some(&mount.0.join("store")), Some(64 * MIB), IoDriver::Auto, 1 << 20).unwrap();
    assert!(disk.tmpfs && disk.backend.describe().contains("tmpfs"));
    let backend = &disk.backend;
    let payload = [Bytes::from(vec![3; 65536])];
    let mut live = Vec::new();
    let error = loop {
        match write(backend, &payload).await {
            Ok(extents) => live.push(extents),
            Err(error) => break error,
        }
        assert!(live.len() < 32, "what is left holds no more");
    };
    let TierError::Full { free_bytes, source, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(source.unwrap().raw_os_error(), Some(28));
    let used = live.len() as u64 * 65536;
    assert_eq!(free_bytes, 64 * MIB - used);
    assert_eq!(backend.usage().used_bytes, used, "nothing leaked");
    for extents in &live {
        assert_eq!(read(backend, extents).await.unwrap(), payload[0], "older chunks are fine");
    }
    // Space is made here: far less than a batch of punches, but the file system is full.
    let freed = live.len() / 2;
    live.truncate(live.len() - freed);
    for _ in 0..freed {
        match write(backend, &payload).await {
            Ok(extents) => live.push(extents),
            Err(TierError::Full { .. }) => {
                live.push(write(backend, &payload).await.expect("the retry finds space"));
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    for extents in &live {
        assert_eq!(read(backend, extents).await.unwrap(), payload[0]);
    }
    // Space is freed outside of the store.
    std::fs::remove_file(other).unwrap();
    for _ in 0..24 {
        live.push(write(backend, &payload).await.unwrap());
    }
    assert_eq!(backend.usage().used_bytes, live.len() as u64 * 65536);
    backend.close().await.unwrap();
}

#[tokio::test]
async fn a_file_system_for_reading_only_is_refused_by_name() {
    let Some(mount) = Mounted::new("ro,size=1m") else {
        return;
    };
    let error =
        open_disk(Some(&mount.0), Some(MIB), IoDriver::Auto, 1 << 20).unwrap_err().to_string();
    assert!(error.contains(mount.0.to_str().unwrap()), "{error}");
    assert!(error.contains("Read-only"), "{error}");
}
