//! Readers: the bytes that they give, whatever happens to the object, and what they keep from
//! others.

use std::io::SeekFrom;
use std::time::Duration;

use futures::{FutureExt, StreamExt, TryStreamExt};
use rand::Rng;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::Seed;

use super::{cause, open_in};
use crate::support::{self, DISK, HOST, KIB, MIB, Op, bytes};

async fn whole(vmem: &VirtualMemory, handle: &VMemHandle) -> Vec<u8> {
    let mut all = Vec::new();
    vmem.reader(handle, ..).read_to_end(&mut all).await.unwrap();
    all
}

/// Every size beside a border, from each tier, with windows of each size.
#[tokio::test]
async fn reader_gives_all_bytes_from_each_tier() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open_in(directory.path(), 8 * MIB, 64 * MIB).await;
    let sizes = [0, 1, 4095, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 300 * KIB, 3 * MIB + 17];
    for (object, len) in (1..).zip(sizes) {
        let expected = bytes(object, 1, len);
        let handle = vmem.put(&expected, HOST).await.unwrap();
        for place in ["dirty in host memory", "in both", "on disk"] {
            assert!(whole(&vmem, &handle).await == expected, "{len} bytes {place}");
            for window in [1, 10 * KIB, 64 * KIB, 100 * KIB, 8 * MIB] {
                let from = len / 3;
                let reader = vmem.reader(&handle, from..).window(window);
                assert_eq!(reader.remaining(), len - from);
                let parts: Vec<_> = reader.into_stream().try_collect().await.unwrap();
                assert!(parts.iter().all(|part| !part.is_empty()));
                assert!(parts.concat() == expected[from..], "{len} bytes {place}, {window}");
            }
            match place {
                "in both" => vmem.demote(&handle, DISK).await.unwrap(),
                _ => vmem.flush(&handle).await.unwrap(),
            }
        }
        let unwritten = vmem.allocate(len, DISK).await.unwrap();
        assert!(whole(&vmem, &unwritten).await == bytes(object, 0, len));
        let unwritten = vmem.allocate(len, HOST).await.unwrap();
        assert!(whole(&vmem, &unwritten).await == bytes(object, 0, len));
    }
    assert_eq!(vmem.stats().stream_bytes, 0);
    vmem.close().await.unwrap();
}

/// Against a cursor over the same bytes: reads, seeks and parts of the buffer, at random.
#[tokio::test]
async fn random_steps_of_a_reader_equal_those_of_a_cursor() {
    let seed = Seed::from_env_or(|| 11);
    let _guard = seed.guard("random_steps_of_a_reader");
    let mut rng = seed.rng();
    let (vmem, _driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    for object in 1..=30 {
        let len = rng.random_range(1..600 * KIB);
        let expected = bytes(object, 1, len);
        let home = if rng.random_bool(0.5) { HOST } else { DISK };
        let handle = vmem.put(&expected, home).await.unwrap();
        let start = rng.random_range(0..=len);
        let end = rng.random_range(start..=len);
        let mut cursor = std::io::Cursor::new(&expected[start..end]);
        let mut reader = vmem.reader(&handle, start..end).window(rng.random_range(1..200 * KIB));
        for _ in 0..100 {
            match rng.random_range(0..4) {
                0 => {
                    let mut ours = vec![0; rng.random_range(0..100 * KIB)];
                    let mut theirs = ours.clone();
                    let read = reader.read(&mut ours).await.unwrap();
                    cursor.read_exact(&mut theirs[..read]).await.unwrap();
                    assert!(ours == theirs);
                    let left = (end - start).saturating_sub(cursor.position() as usize);
                    assert!(read > 0 || ours.is_empty() || left == 0, "short before the end");
                }
                1 => {
                    let ours = reader.fill_buf().await.unwrap();
                    let amount = rng.random_range(0..=ours.len());
                    let mut theirs = vec![0; amount];
                    cursor.read_exact(&mut theirs).await.unwrap();
                    assert!(ours[..amount] == theirs);
                    reader.consume(amount);
                }
                2 => {
                    let len = (end - start) as i64;
                    let to = match rng.random_range(0..3) {
                        0 => SeekFrom::Start(rng.random_range(0..=len + 9) as u64),
                        1 => SeekFrom::End(rng.random_range(-len..=9)),
                        _ => SeekFrom::Current(rng.random_range(-9..=100 * KIB as i64)),
                    };
                    let ours = reader.seek(to).await.map_err(|error| error.kind());
                    assert_eq!(ours, cursor.seek(to).await.map_err(|error| error.kind()));
                }
                _ if rng.random_bool(0.2) => drop(vmem.demote(&handle, DISK).await),
                _ => assert!(vmem.read(&handle).await.unwrap() == expected),
            }
        }
    }
    vmem.close().await.unwrap();
}

/// Written in place, written anew, replaced below, freed: the reader goes on in the version it
/// began with.
#[tokio::test]
async fn reader_gives_one_version_whatever_becomes_of_the_object() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open_in(directory.path(), 8 * MIB, 64 * MIB).await;
    let len = 2 * MIB;
    for home in [HOST, DISK] {
        for change in ["in place", "whole", "below", "freed", "evicted"] {
            let first = bytes(1, 1, len);
            let handle = vmem.put(&first, home).await.unwrap();
            let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
            let mut read = vec![0; 1000];
            reader.read_exact(&mut read).await.unwrap();
            match change {
                "in place" => vmem.write_at(&handle, len - 100, [7; 100]).await.unwrap(),
                "whole" => vmem.write(&handle, bytes(1, 2, len)).await.unwrap(),
                "below" => {
                    vmem.write(&handle, bytes(1, 2, len)).await.unwrap();
                    vmem.demote(&handle, DISK).await.unwrap();
                }
                "freed" => vmem.free(handle.clone()).await.unwrap(),
                _ => vmem.demote(&handle, DISK).await.unwrap(),
            }
            reader.read_to_end(&mut read).await.unwrap();
            assert!(read == first, "home {home}, {change}");
            reader.rewind().await.unwrap();
            let mut again = Vec::new();
            reader.read_to_end(&mut again).await.unwrap();
            assert!(again == first, "home {home}, {change}, again");
        }
    }
    vmem.close().await.unwrap();
}

/// 400 peers that read the start and then nothing: they keep no object space, and windows within
/// the reserve.
#[tokio::test]
async fn peers_who_do_not_read_keep_nothing_from_others() {
    const PEERS: usize = 400;
    let (vmem, _driver) =
        support::open(4 * MIB, 64 * MIB, |builder| builder.stream_capacity(1 << 20));
    let len = MIB;
    let mut handles = Vec::new();
    for object in 1..=3 {
        handles.push(vmem.put(bytes(object, 1, len), HOST).await.unwrap());
    }
    let mut readers = Vec::new();
    for peer in 0..PEERS {
        let mut reader = vmem.reader(&handles[peer % 3], ..);
        assert_eq!(reader.read_u8().await.unwrap(), bytes(1 + peer as u64 % 3, 1, 1)[0]);
        readers.push(reader);
    }
    let stats = vmem.stats();
    assert_eq!(stats.held_bytes, 0, "of object space");
    // The window that is read: none is filled early where the reserve is full.
    let least = (PEERS * 4 * KIB) as u64;
    assert!(stats.stream_bytes <= (1 << 20) + least, "{} bytes", stats.stream_bytes);
    // All of object space is free for others, at once.
    let large = vmem.put(bytes(9, 1, 3 * MIB), HOST).await.unwrap();
    assert!(vmem.read(&large).await.unwrap() == bytes(9, 1, 3 * MIB));
    // And other peers are served.
    assert!(whole(&vmem, &large).await == bytes(9, 1, 3 * MIB));
    for (peer, mut reader) in readers.into_iter().enumerate().step_by(40) {
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).await.unwrap();
        assert!(rest == bytes(1 + peer as u64 % 3, 1, len)[1..]);
    }
    drop((handles, large));
    assert_eq!(vmem.stats().stream_bytes, 0);
    vmem.close().await.unwrap();
}

/// What only host memory has goes to disk for a reader; where the disk is full it is held, and read
/// all the same.
#[tokio::test]
async fn full_disk_does_not_end_a_reader_of_a_dirty_object() {
    let (vmem, _driver) = support::open(4 * MIB, 512 * KIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, MIB), HOST).await.unwrap();
    let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
    assert_eq!(reader.read_u8().await.unwrap(), bytes(1, 1, 1)[0]);
    vmem.write(&handle, bytes(1, 2, MIB)).await.unwrap();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    assert!(rest == bytes(1, 1, MIB)[1..]);
    drop(reader);
    assert!(whole(&vmem, &handle).await == bytes(1, 2, MIB));
    assert_eq!(vmem.stats().held_bytes, 0);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn errors_of_a_reader_name_their_cause_and_pass() {
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, MIB), DISK).await.unwrap();
    for range in [0..MIB + 1, MIB + 1..MIB + 2] {
        let error = vmem.reader(&handle, range).read_u8().await.unwrap_err();
        assert!(matches!(cause(&error), VirtualMemoryError::OutOfRange { .. }), "{error}");
    }
    let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
    let error = reader.seek(SeekFrom::Current(-1)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert_eq!(reader.read_u8().await.unwrap(), bytes(1, 1, 1)[0]);
    support::settle(&vmem, &driver).await;
    driver.fail(|op, _| (op == Op::Read).then(|| std::io::Error::from_raw_os_error(5)));
    let mut read = Vec::new();
    let error = reader.read_to_end(&mut read).await.unwrap_err();
    assert!(matches!(cause(&error), VirtualMemoryError::Io { .. }), "{error}");
    driver.heal();
    // It goes on where it was.
    reader.read_to_end(&mut read).await.unwrap();
    assert!(read == bytes(1, 1, MIB)[1..]);
    let freed = vmem.put([1; 9], HOST).await.unwrap();
    vmem.free(freed.clone()).await.unwrap();
    let error = vmem.reader(&freed, ..).read_u8().await.unwrap_err();
    assert!(matches!(cause(&error), VirtualMemoryError::HandleNotFound { .. }), "{error}");
    let late = vmem.reader(&handle, ..);
    vmem.close().await.unwrap();
    let error = late.into_stream().next().await.unwrap().unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Closed), "{error}");
}

/// A disk that stands still makes a reader late, and a reader that is left alone delays no other.
#[tokio::test(start_paused = true)]
async fn reader_has_a_deadline_and_delays_nobody() {
    let wait = Duration::from_secs(3);
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder.wait_timeout(wait));
    let handle = vmem.put(bytes(1, 1, MIB), DISK).await.unwrap();
    let mut left_alone = vmem.reader(&handle, ..);
    assert!(left_alone.read_u8().now_or_never().is_none());
    driver.stand_still();
    let error = vmem.reader(&handle, ..).read_u8().await.unwrap_err();
    assert!(matches!(cause(&error), VirtualMemoryError::TimedOut { .. }), "{error}");
    driver.go_on();
    assert!(whole(&vmem, &handle).await == bytes(1, 1, MIB));
    // It comes for its bytes when it likes.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut read = Vec::new();
    left_alone.read_to_end(&mut read).await.unwrap();
    assert!(read == bytes(1, 1, MIB));
    let still_open = vmem.reader(&handle, ..).window(64 * KIB);
    let mut still_open = Box::pin(still_open.into_stream());
    still_open.next().await.unwrap().unwrap();
    vmem.close().await.unwrap();
}

/// Dropped after each number of polls, its windows and extents go back.
#[tokio::test(start_paused = true)]
async fn dropped_reader_leaves_nothing() {
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    for home in [HOST, DISK] {
        for polls in 0..40 {
            let handle = vmem.put(bytes(1, 1, MIB), home).await.unwrap();
            let mut reader = vmem.reader(&handle, ..).window(64 * KIB);
            let mut read = Vec::new();
            let mut reading = Box::pin(reader.read_to_end(&mut read));
            for _ in 0..polls {
                if futures::poll!(&mut reading).is_ready() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(reading);
            drop((reader, handle));
            support::settle(&vmem, &driver).await;
            let stats = vmem.stats();
            support::assert_empty(&stats, "a dropped reader");
            assert_eq!(stats.stream_bytes, 0);
        }
    }
    driver.assert_untouched();
    vmem.close().await.unwrap();
}

/// Once the rule says so a stream promotes its object: then it costs the disk nothing.
#[tokio::test]
async fn streams_warm_their_object() {
    let (vmem, driver) = support::open(8 * MIB, 64 * MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, MIB), DISK).await.unwrap();
    for _ in 0..3 {
        assert!(whole(&vmem, &handle).await == bytes(1, 1, MIB));
        support::settle(&vmem, &driver).await;
    }
    assert!(vmem.residency(&handle).unwrap().host, "it was promoted");
    let reads = driver.reads();
    assert!(whole(&vmem, &handle).await == bytes(1, 1, MIB));
    assert_eq!(driver.reads(), reads);
    vmem.close().await.unwrap();
}
