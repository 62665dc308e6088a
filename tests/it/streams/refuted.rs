//! What readers and writers keep from others: memory beyond the reserve, object space, extents,
//! the end of the store.
//!
//! Invariant: each test fails without the fix that it came with. Not called by other tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use vmem::VirtualMemoryError;

use super::cause;
use crate::support::{self, DISK, HOST, KIB, MIB, bytes};

/// Many readers go on while the store closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn close_ends_many_readers_that_go_on() {
    let (vmem, driver) = support::open(4 * MIB, 256 * MIB, |builder| builder);
    let len = 16 * MIB;
    let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    driver.delay(|_| Duration::from_micros(300));
    let read = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for n in 0..16 {
        let mut reader = vmem.reader(&handle, n * 1000..).window(64 * KIB);
        let count = read.clone();
        tasks.push(tokio::spawn(async move {
            let mut buf = vec![0; 64 * KIB];
            loop {
                match reader.read(&mut buf).await {
                    Ok(0) => return Ok(()),
                    Ok(n) => count.fetch_add(n, Ordering::SeqCst),
                    Err(error) => return Err(error),
                };
            }
        }));
    }
    while read.load(Ordering::SeqCst) < 16 * MIB {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let at_close = read.load(Ordering::SeqCst);
    vmem.close().await.unwrap();
    let after = read.load(Ordering::SeqCst);
    for task in tasks {
        let error = task.await.unwrap().unwrap_err();
        assert!(matches!(cause(&error), VirtualMemoryError::Closed), "{error}");
    }
    assert!(after - at_close < 64 * MIB, "read {} more while it closed", after - at_close);
}

/// A reader of an object that is written all the time, on a disk that has space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_reader_of_a_hot_object_holds_no_object_space() {
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    driver.delay(|_| Duration::from_millis(3));
    let handle = vmem.put(bytes(1, 1, MIB), HOST).await.unwrap();
    let writing = vmem.clone();
    let object = handle.clone();
    let stop = Arc::new(AtomicUsize::new(0));
    let stopped = stop.clone();
    let task = tokio::spawn(async move {
        let mut n = 0_u8;
        while stopped.load(Ordering::SeqCst) == 0 {
            writing.write_at(&object, 0, [n; 100]).await.unwrap();
            n = n.wrapping_add(1);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut held = 0;
    let mut readers = Vec::new();
    for _ in 0..20 {
        let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
        reader.read_u8().await.unwrap();
        readers.push(reader);
        held = held.max(vmem.stats().held_bytes);
    }
    stop.store(1, Ordering::SeqCst);
    task.await.unwrap();
    let now = vmem.stats().held_bytes;
    assert!(now == 0, "{now} bytes of object space are held by readers that stand still, {held}");
}

/// A reader of an object that was never written needs none of its extents.
#[tokio::test]
async fn reader_of_an_unwritten_object_keeps_no_space_from_its_first_write() {
    let (vmem, _driver) = support::open(512 * KIB, MIB, |builder| builder);
    let handle = vmem.allocate(MIB, DISK).await.unwrap();
    let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
    assert_eq!(reader.read_u8().await.unwrap(), 0);
    let outcome = vmem.write(&handle, bytes(1, 1, MIB)).await;
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    assert!(rest.len() == MIB - 1 && rest.iter().all(|&byte| byte == 0));
    outcome.unwrap();
}

/// Small windows of one chunk count as one read of it.
#[tokio::test]
async fn one_pass_of_a_stream_promotes_nothing() {
    let (vmem, driver) = support::open(8 * MIB, 64 * MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, 4 * MIB), DISK).await.unwrap();
    let mut read = Vec::new();
    vmem.reader(&handle, ..).window(4 * KIB).read_to_end(&mut read).await.unwrap();
    support::settle(&vmem, &driver).await;
    assert!(!vmem.residency(&handle).unwrap().host);
}

/// `consume` of too much.
#[tokio::test]
async fn consume_after_a_seek_is_no_panic() {
    let (vmem, _driver) = support::open(8 * MIB, 64 * MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, MIB), HOST).await.unwrap();
    let mut reader = vmem.reader(&handle, ..);
    let some = reader.fill_buf().await.unwrap().len();
    reader.seek(std::io::SeekFrom::Start(10)).await.unwrap();
    reader.consume(some);
}

/// What one writer has beyond the reserve.
#[tokio::test(start_paused = true)]
async fn writer_has_no_more_than_its_least_beyond_the_reserve() {
    let (vmem, driver) =
        support::open(4 * MIB, 64 * MIB, |builder| builder.stream_capacity(64 * KIB as u64));
    driver.stand_still();
    let mut writers = Vec::new();
    for _ in 0..10 {
        let vmem = vmem.clone();
        let mut writing = Box::pin(async move {
            let mut writer = vmem.writer(DISK);
            writer.write_all(&bytes(1, 1, 4 * MIB)).await
        });
        for _ in 0..20 {
            assert!((&mut writing).now_or_never().is_none());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        writers.push(writing);
    }
    let used = vmem.stats().stream_bytes;
    driver.go_on();
    drop(writers);
    assert!(used <= (64 + 10 * 64) * KIB as u64, "{} KiB", used / 1024);
}

/// What one reader has beyond the reserve.
#[tokio::test(start_paused = true)]
async fn reader_has_no_more_than_its_least_beyond_the_reserve() {
    let (vmem, _driver) =
        support::open(4 * MIB, 64 * MIB, |builder| builder.stream_capacity(64 * KIB as u64));
    let handle = vmem.put(bytes(1, 1, 2 * MIB), DISK).await.unwrap();
    let mut readers = Vec::new();
    for _ in 0..100 {
        let mut reader = vmem.reader(&handle, ..);
        reader.read_u8().await.unwrap();
        readers.push(reader);
    }
    let used = vmem.stats().stream_bytes;
    drop(readers);
    assert!(used <= (64 + 100 * 4) * KIB as u64, "{} KiB", used / 1024);
}

/// The first window of a writer is what was asked for.
#[tokio::test]
async fn window_of_a_writer_counts_from_the_first() {
    let (vmem, _driver) =
        support::open(8 * MIB, 64 * MIB, |builder| builder.stream_capacity(64 << 20));
    let mut writer = vmem.writer(HOST).window(4 * MIB);
    writer.write_all(&bytes(1, 1, MIB)).await.unwrap();
    let handle = writer.commit().await.unwrap();
    let residency = vmem.residency(&handle).unwrap();
    let mut writer = vmem.writer(HOST).window(64 * KIB);
    writer.write_all(&[1]).await.unwrap();
    assert_eq!(vmem.stats().stream_bytes, 64 * KIB as u64);
    drop(writer);
    assert!(residency.host, "what fits in one window is put into its home tier");
}

/// Polled by an executor that is not tokio.
#[test]
fn streams_work_outside_the_runtime() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (vmem, _driver) =
        runtime.block_on(async { support::open(4 * MIB, 64 * MIB, |builder| builder) });
    futures::executor::block_on(async {
        let mut writer = vmem.writer(DISK).window(64 * KIB);
        writer.write_all(&bytes(1, 1, MIB + 5)).await.unwrap();
        let handle = writer.commit().await.unwrap();
        let mut read = Vec::new();
        vmem.reader(&handle, ..).read_to_end(&mut read).await.unwrap();
        assert!(read == bytes(1, 1, MIB + 5));
    });
}

/// One poll of a writer copies no more than others can wait for.
#[tokio::test]
async fn polls_of_streams_copy_in_steps() {
    let (vmem, _driver) =
        support::open(8 * MIB, 640 * MIB, |builder| builder.stream_capacity(1 << 30));
    let mut writer = vmem.writer(DISK).window(64 * MIB);
    writer.write_all(&bytes(1, 1, MIB)).await.unwrap();
    let taken = writer.write(&bytes(1, 1, 32 * MIB)).await.unwrap();
    assert!(taken <= 256 * KIB);
}
