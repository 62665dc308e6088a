//! What readers hold of host memory, and the reads that come after them: `max_held`.
//!
//! Excluded: slow readers that leave nothing to others; a large read that waits for ever, or that
//! keeps something while it waits; a burst of reads that all start before the first of them holds
//! anything.

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::join_all;
use vmem::{ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::support::{self, DISK, HOST, KIB, MIB, bytes, put_all, settle};

const LEN: usize = MIB;
/// No test waits so long unless something hangs.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

/// A store of 16 MiB of which readers may hold a half, with objects that are resident, or on disk.
async fn store(resident: bool, count: usize) -> (VirtualMemory, Vec<VMemHandle>) {
    let (vmem, driver) = support::open(16 * MIB, 256 * MIB, |b| b.max_held(0.5).wait_timeout(LONG));
    let handles = put_all(&vmem, count, LEN, if resident { HOST } else { DISK }).await;
    settle(&vmem, &driver).await;
    assert!(!resident || count <= 16, "they fit");
    (vmem, handles)
}

/// As many reads at once as there are objects; each keeps what it gets. Those that had an answer
/// within a while, and how many still wait.
async fn burst(vmem: &VirtualMemory, handles: &[VMemHandle]) -> (Vec<Bytes>, usize) {
    let reads = handles.iter().map(|handle| {
        let vmem = vmem.clone();
        let handle = handle.clone();
        tokio::spawn(async move { vmem.read(&handle).await })
    });
    let reads: Vec<_> = reads.collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut kept = Vec::new();
    let mut waiting = 0;
    for read in reads {
        match read.is_finished() {
            true => kept.push(read.await.unwrap().unwrap()),
            false => {
                read.abort();
                drop(read.await);
                waiting += 1;
            }
        }
    }
    (kept, waiting)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_at_once_hold_no_more_than_they_may() {
    for (resident, count) in [(true, 14), (false, 40)] {
        let (vmem, handles) = store(resident, count).await;
        let (kept, waiting) = burst(&vmem, &handles).await;
        let held = vmem.stats().held_bytes as usize;
        // On each thread one may pass that finds its object resident.
        assert!(held <= 8 * MIB + 2 * LEN, "resident {resident}: {held} bytes are held");
        assert!(kept.len() >= 8 && waiting > 0, "{} kept, {waiting} wait", kept.len());
        // Others have space: what is small, what is written, what is copied.
        let put = vmem.put(bytes(99, 1, 2 * LEN), DISK).await.unwrap();
        let small = vmem.put(bytes(98, 1, 64 * KIB), HOST).await.unwrap();
        assert_eq!(vmem.read(&small).await.unwrap(), bytes(98, 1, 64 * KIB));
        let mut into = vec![0; 2 * LEN];
        vmem.read_into(&put, 0..2 * LEN, &mut into).await.unwrap();
        assert_eq!(into, bytes(99, 1, 2 * LEN));
        // Once they let go the rest comes.
        drop(kept);
        let part = async |handle| vmem.read_at(handle, 0..70 * KIB).await.map(|part| part.len());
        let all = tokio::time::timeout(LONG, join_all(handles.iter().map(part))).await.unwrap();
        for part in all {
            assert_eq!(part.unwrap(), 70 * KIB, "resident {resident}");
        }
        vmem.close().await.unwrap();
    }
}

/// Reads these objects and keeps them.
async fn keep(vmem: &VirtualMemory, handles: &[VMemHandle]) -> Vec<Bytes> {
    join_all(handles.iter().map(async |handle| vmem.read(handle).await.unwrap())).await
}

/// Each way to read more than 64 KiB of an object, and how many bytes it gave.
async fn read_large(
    vmem: &VirtualMemory,
    way: usize,
    handle: &VMemHandle,
    timeout: Duration,
) -> Result<usize, VirtualMemoryError> {
    let options = ReadOptions::new().timeout(timeout);
    match way {
        0 => vmem.read_with(handle, options).await.map(|bytes| bytes.len()),
        1 => vmem.read_with(handle, options.promote(false)).await.map(|bytes| bytes.len()),
        2 => vmem.read_with(handle, options.range(5..5 + 65 * KIB)).await.map(|bytes| bytes.len()),
        _ => vmem.read_many([handle]).await.map(|all| all[0].len()),
    }
}

#[tokio::test]
async fn a_large_read_waits_until_readers_let_go_and_keeps_nothing_meanwhile() {
    for resident in [true, false] {
        let (vmem, handles) = store(resident, 12).await;
        let mut kept = keep(&vmem, &handles[..8]).await;
        assert_eq!(vmem.stats().held_bytes as usize, 8 * LEN);
        let next = &handles[8];
        assert!(vmem.try_read(next).is_none(), "resident {resident}");
        for way in 0..3 {
            let read = read_large(&vmem, way, next, SHORT).await;
            let Err(VirtualMemoryError::AllPinned { held_bytes, waited, .. }) = read else {
                panic!("resident {resident}, way {way}: {read:?}");
            };
            assert_eq!((held_bytes as usize, waited >= SHORT), (8 * LEN, true));
        }
        if resident {
            // What a reader holds already is shared at once.
            assert_eq!(keep(&vmem, &handles[..1]).await[0], kept[0]);
        }
        for way in 0..4 {
            let mut read = Box::pin(read_large(&vmem, way, next, LONG));
            let early = tokio::time::timeout(SHORT, &mut read).await;
            assert!(early.is_err(), "resident {resident}, way {way}: {early:?}");
            assert_eq!(vmem.stats().held_bytes as usize, 8 * LEN);
            drop(kept.pop());
            let len = tokio::time::timeout(LONG, read).await.unwrap().unwrap();
            assert_eq!(len, if way == 2 { 65 * KIB } else { LEN });
            kept.extend(keep(&vmem, &handles[7..8]).await);
        }
        drop(kept);
        assert_eq!(vmem.stats().held_bytes, 0);
        vmem.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_small_part_of_a_large_object_is_copied_once_readers_hold_all() {
    for resident in [true, false] {
        let (vmem, handles) = store(resident, 12).await;
        let kept = keep(&vmem, &handles[..8]).await;
        let parts = handles.iter().map(async |handle| vmem.read_at(handle, 9..64 * KIB).await);
        let parts: Vec<_> = join_all(parts).await.into_iter().map(Result::unwrap).collect();
        for (object, part) in (1..).zip(&parts) {
            assert_eq!(part, &bytes(object, 1, LEN)[9..64 * KIB], "resident {resident}");
        }
        assert_eq!(vmem.stats().held_bytes as usize, 8 * LEN, "resident {resident}");
        drop((kept, parts));
        assert_eq!(vmem.stats().held_bytes, 0);
        vmem.close().await.unwrap();
    }
}

#[tokio::test]
async fn large_reads_that_are_polled_once_and_left_alone_delay_nobody() {
    for resident in [true, false] {
        let (vmem, handles) = store(resident, 12).await;
        let kept = keep(&vmem, &handles[..8]).await;
        let ways = 0..4_usize;
        let left: Vec<_> =
            ways.clone().map(|way| read_large(&vmem, way, &handles[8], LONG)).collect();
        let mut left: Vec<_> = left.into_iter().map(Box::pin).collect();
        for read in &mut left {
            assert!(read.as_mut().now_or_never().is_none(), "resident {resident}");
        }
        drop(kept);
        for way in ways {
            for handle in &handles {
                let read = read_large(&vmem, way, handle, LONG);
                assert!(tokio::time::timeout(LONG / 4, read).await.unwrap().is_ok());
            }
        }
        drop(left);
        vmem.close().await.unwrap();
    }
}

#[tokio::test]
async fn an_object_of_more_than_readers_may_hold_is_read_and_held_alone() {
    let (vmem, driver) =
        support::open(16 * MIB, 256 * MIB, |b| b.max_held(0.25).wait_timeout(LONG));
    let handles = put_all(&vmem, 3, 6 * MIB, DISK).await;
    settle(&vmem, &driver).await;
    for (object, handle) in (1..).zip(&handles) {
        assert_eq!(vmem.read(handle).await.unwrap(), bytes(object, 1, 6 * MIB));
    }
    let kept = vmem.read(&handles[0]).await.unwrap();
    let next = vmem.read_with(&handles[1], ReadOptions::new().timeout(SHORT)).await;
    assert!(matches!(next, Err(VirtualMemoryError::AllPinned { .. })), "{next:?}");
    drop(kept);
    assert_eq!(vmem.read(&handles[1]).await.unwrap(), bytes(2, 1, 6 * MIB));
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn a_store_that_closes_refuses_large_reads_that_wait() {
    let (vmem, handles) = store(false, 12).await;
    let kept = keep(&vmem, &handles[..8]).await;
    let wait = |way: usize| {
        let vmem = vmem.clone();
        let handle = handles[8 + way].clone();
        tokio::spawn(async move { read_large(&vmem, way, &handle, LONG).await })
    };
    let waiting: Vec<_> = (0..4).map(wait).collect();
    tokio::time::sleep(SHORT).await;
    assert!(waiting.iter().all(|read| !read.is_finished()));
    vmem.close().await.unwrap();
    for read in waiting {
        let read = tokio::time::timeout(LONG / 4, read).await.unwrap().unwrap();
        assert!(matches!(read, Err(VirtualMemoryError::Closed)), "{read:?}");
    }
    drop(kept);
}
