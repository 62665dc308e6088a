//! Writers: what they make, and that they leave nothing otherwise.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Duration;

use futures::FutureExt;
use rand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmem::{MemoryTier, PutMode, PutOptions, VirtualMemoryError};
use vmem_testkit::Seed;

use super::{cause, open_in};
use crate::support::process::again;
use crate::support::{self, DISK, HOST, KIB, MIB, Op, bytes};

#[tokio::test]
async fn writer_makes_an_object_of_any_length() {
    let seed = Seed::from_env_or(|| 11);
    let _guard = seed.guard("writer_makes_an_object");
    let mut rng = seed.rng();
    let directory = tempfile::tempdir().unwrap();
    let vmem = open_in(directory.path(), 8 * MIB, 64 * MIB).await;
    let sizes = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 256 * KIB, 700 * KIB, 11 * MIB + 5];
    for (object, len) in (1..).zip(sizes) {
        for home in [HOST, DISK] {
            let expected = bytes(object, 1, len);
            let mut writer = vmem.writer(home).window(rng.random_range(1..2 * MIB));
            let mut left = &expected[..];
            while !left.is_empty() {
                let amount = rng.random_range(1..=left.len().min(200 * KIB));
                writer.write_all(&left[..amount]).await.unwrap();
                left = &left[amount..];
                if rng.random_bool(0.1) {
                    writer.flush().await.unwrap();
                }
            }
            assert_eq!(writer.len(), len as u64);
            let handle = writer.commit().await.unwrap();
            assert_eq!((handle.len(), handle.home_tier()), (len, home));
            let mut read = vec![0; len];
            vmem.read_into(&handle, 0..len, &mut read).await.unwrap();
            assert!(read == expected, "{len} bytes in {home}");
            // It is an object as any other.
            if len > 0 {
                vmem.write_at(&handle, len - 1, [7]).await.unwrap();
                assert_eq!(&vmem.read_at(&handle, len - 1..len).await.unwrap()[..], [7]);
            }
        }
    }
    let stats = vmem.stats();
    assert_eq!((stats.stream_bytes, stats.objects), (0, 0));
    assert!(stats.disk.used_bytes == 0 && stats.host.used_bytes == 0, "{stats:#?}");
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn named_writer_replaces_bytes_and_metadata_at_its_commit() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open_in(directory.path(), 4 * MIB, 64 * MIB).await;
    let options = |metadata: &'static str| PutOptions::new(DISK).metadata(metadata);
    for len in [100, MIB] {
        let mut first = vmem.writer_named("name", options("one"));
        first.write_all(&bytes(1, 1, len)).await.unwrap();
        drop(first.commit().await.unwrap());
        let mut second = vmem.writer_named("name", options("two"));
        second.write_all(&bytes(1, 2, len)).await.unwrap();
        second.flush().await.unwrap();
        let (before, entry) = vmem.open_entry("name").await.unwrap();
        assert_eq!(entry.metadata, "one");
        second.commit().await.unwrap();
        let (after, entry) = vmem.open_entry("name").await.unwrap();
        assert_eq!(entry.metadata, "two");
        assert!(vmem.read(&before).await.unwrap() == bytes(1, 1, len));
        assert!(vmem.read(&after).await.unwrap() == bytes(1, 2, len));
    }
    let seen = vmem.entry("name").await.unwrap().version;
    let mut create = vmem.writer_named("name", options("three").mode(PutMode::Create));
    let error = create.write_all(&[1]).await.unwrap_err();
    assert!(matches!(cause(&error), VirtualMemoryError::NameExists { .. }), "{error}");
    let mut late = vmem.writer_named("name", options("four").mode(PutMode::Update(seen)));
    late.write_all(&bytes(1, 4, MIB)).await.unwrap();
    vmem.put_named_with("name", b"between", options("between")).await.unwrap();
    let error = late.commit().await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::VersionChanged { .. }), "{error}");
    vmem.close().await.unwrap();

    let vmem = open_in(directory.path(), 4 * MIB, 64 * MIB).await;
    let (handle, entry) = vmem.open_entry("name").await.unwrap();
    assert_eq!(
        (&vmem.read(&handle).await.unwrap()[..], &entry.metadata[..]),
        (&b"between"[..], &b"between"[..])
    );
    drop(handle);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn bad_input_of_a_writer_is_refused_by_its_first_write_and_ever_after() {
    let (vmem, _driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    let mut writer = vmem.writer(MemoryTier::Vram);
    for _ in 0..2 {
        let error = writer.write_all(&[1]).await.unwrap_err();
        assert!(matches!(cause(&error), VirtualMemoryError::TierNotAvailable { .. }), "{error}");
    }
    assert!(matches!(writer.commit().await, Err(VirtualMemoryError::TierNotAvailable { .. })));
    let long = PutOptions::new(DISK).metadata(vec![0; 5000]);
    for (name, options) in [("", PutOptions::default()), ("name", long)] {
        let error = vmem.writer_named(name, options).write_all(&[1]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::Other, "{error}");
    }
    let mut writer = vmem.writer(DISK);
    writer.write_all(&[1]).await.unwrap();
    writer.shutdown().await.unwrap();
    let error = writer.write_all(&[1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(writer.commit().await.unwrap().len(), 1);
    let late = vmem.writer(DISK);
    vmem.close().await.unwrap();
    assert!(matches!(late.commit().await, Err(VirtualMemoryError::Closed)));
}

/// What did not fit is not there, what was taken for it is free again, and the writer says so ever
/// after.
#[tokio::test]
async fn full_disk_ends_a_writer_and_gives_back_what_it_took() {
    let (vmem, driver) = support::open(4 * MIB, 4 * MIB, |builder| builder);
    let other = vmem.put(bytes(1, 1, 2 * MIB), DISK).await.unwrap();
    let used = vmem.stats().disk.used_bytes;
    let mut writer = vmem.writer(DISK);
    let error = writer.write_all(&bytes(2, 1, 3 * MIB)).await;
    let error = match error {
        Err(error) => error,
        Ok(()) => writer.flush().await.unwrap_err(),
    };
    assert!(matches!(cause(&error), VirtualMemoryError::TierFull { .. }), "{error}");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    support::settle(&vmem, &driver).await;
    assert_eq!(vmem.stats().disk.used_bytes, used);
    let again = writer.write_all(&[1]).await.unwrap_err();
    assert!(matches!(cause(&again), VirtualMemoryError::TierFull { .. }), "{again}");
    assert!(matches!(writer.commit().await, Err(VirtualMemoryError::TierFull { .. })));
    let mut too_long = vmem.writer(DISK);
    let error = too_long.write_all(&bytes(2, 1, 5 * MIB)).await.unwrap_err();
    let cause = cause(&error);
    assert!(
        matches!(
            cause,
            VirtualMemoryError::TierFull { .. } | VirtualMemoryError::ExceedsCapacity { .. }
        ),
        "{error}"
    );
    drop(too_long);
    assert!(vmem.read(&other).await.unwrap() == bytes(1, 1, 2 * MIB));
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn failed_write_ends_a_writer() {
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    let mut writer = vmem.writer(DISK).window(64 * KIB);
    driver.fail(|op, _| (op == Op::Write).then(|| std::io::Error::from_raw_os_error(5)));
    let error = writer.write_all(&bytes(1, 1, 2 * MIB)).await.unwrap_err();
    assert!(matches!(cause(&error), VirtualMemoryError::Io { .. }), "{error}");
    driver.heal();
    assert!(matches!(writer.commit().await, Err(VirtualMemoryError::Io { .. })));
    support::settle(&vmem, &driver).await;
    support::assert_empty(&vmem.stats(), "a writer that failed");
    vmem.close().await.unwrap();
}

/// At each number of polls, of the writes and of the commit.
#[tokio::test(start_paused = true)]
async fn dropped_writer_leaves_nothing() {
    let (vmem, driver) = support::open(4 * MIB, 64 * MIB, |builder| builder);
    driver.delay(|_| Duration::from_micros(700));
    for polls in 0..60 {
        let vmem_of_writer = vmem.clone();
        let mut writing = Box::pin(async move {
            let mut writer = vmem_of_writer.writer(DISK).window(64 * KIB);
            writer.write_all(&bytes(1, 1, MIB + 9)).await.unwrap();
            writer.commit().await.map(drop)
        });
        for _ in 0..polls {
            if futures::poll!(&mut writing).is_ready() {
                break;
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        drop(writing);
        support::settle(&vmem, &driver).await;
        let stats = vmem.stats();
        support::assert_empty(&stats, "a dropped writer");
        assert_eq!(stats.stream_bytes, 0);
    }
    driver.assert_untouched();
    vmem.close().await.unwrap();
}

/// Uploads that stand still, and one whose future is not polled: others are not delayed, and
/// `close` ends.
#[tokio::test(start_paused = true)]
async fn uploads_that_stand_still_delay_nobody() {
    let (vmem, driver) =
        support::open(4 * MIB, 64 * MIB, |builder| builder.stream_capacity(1 << 20));
    driver.delay(|_| Duration::from_millis(2));
    let mut uploads = Vec::new();
    for _ in 0..100 {
        let mut writer = vmem.writer(DISK);
        writer.write_all(&[7; 100]).await.unwrap();
        uploads.push(writer);
    }
    assert!(vmem.stats().stream_bytes <= (1 << 20) + 100 * 64 * KIB as u64);
    let mut kept = Box::pin(async {
        let mut writer = vmem.writer(DISK).window(64 * KIB);
        writer.write_all(&bytes(2, 1, 4 * MIB)).await
    });
    assert!((&mut kept).now_or_never().is_none());
    let mut writer = vmem.writer(HOST);
    writer.write_all(&bytes(1, 1, 6 * MIB)).await.unwrap();
    let handle = writer.commit().await.unwrap();
    let mut read = Vec::new();
    vmem.reader(&handle, ..).read_to_end(&mut read).await.unwrap();
    assert!(read == bytes(1, 1, 6 * MIB));
    for upload in uploads {
        assert_eq!(upload.commit().await.unwrap().len(), 100);
    }
    kept.await.unwrap();
    drop(handle);
    vmem.close().await.unwrap();
}

/// More than there is memory, through a store on a real disk: copied from one object to another.
#[tokio::test]
async fn streams_pass_more_than_memory_holds() {
    let directory = tempfile::tempdir().unwrap();
    let host = 2 * MIB;
    let len = 24 * MIB;
    let vmem = open_in(directory.path(), host, 64 * MIB).await;
    let mut writer = vmem.writer(HOST);
    for part in 0..24 {
        writer.write_all(&bytes(part, 1, MIB)).await.unwrap();
    }
    let from = writer.commit().await.unwrap();
    let mut reader = vmem.reader(&from, ..);
    let mut writer = vmem.writer_named("copy", PutOptions::new(DISK));
    let copied = tokio::io::copy_buf(&mut reader, &mut writer).await.unwrap();
    assert_eq!(copied, len as u64);
    let to = writer.commit().await.unwrap();
    for part in 0..24 {
        let start = part as usize * MIB;
        let mut read = vec![0; MIB];
        vmem.read_into(&to, start..start + MIB, &mut read).await.unwrap();
        assert!(read == bytes(part, 1, MIB));
    }
    let stats = vmem.stats();
    assert!(stats.host.peak_bytes <= stats.host.capacity_bytes);
    assert!(stats.host.peak_bytes < host as u64);
    drop((from, to, reader));
    vmem.close().await.unwrap();
}

/// What the child is to do, and where.
const CHILD: &str = "VMEM_STREAMS_CHILD";

/// Uploads for ever, and tells of each commit.
#[test]
#[ignore = "plays the child of killed_uploads_leave_nothing"]
fn child_that_is_killed() {
    let Ok(directory) = std::env::var(CHILD) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let vmem = open_in(directory.as_ref(), 2 * MIB, 32 * MIB).await;
        for nth in 0_u64.. {
            let options = PutOptions::new(DISK).metadata(nth.to_le_bytes().to_vec());
            let mut writer = vmem.writer_named("upload", options);
            writer.write_all(&bytes(1, nth, 3 * MIB)).await.unwrap();
            drop(writer.commit().await.unwrap());
            std::io::stdout().lock().write_all(format!("\ndone {nth}\n").as_bytes()).unwrap();
        }
    });
}

#[tokio::test]
async fn killed_uploads_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for kill in 0..4_u64 {
        let mut child = again(module_path!(), "child_that_is_killed")
            .env(CHILD, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        // Read from until it is killed: it does not end otherwise.
        let mut dones = lines.filter_map(|line| line.strip_prefix("done ")?.parse::<u64>().ok());
        let seen = dones.by_ref().take(2 + kill as usize).last().unwrap();
        tokio::time::sleep(Duration::from_millis(3 * kill)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let seen = dones.last().unwrap_or(seen);
        let vmem = open_in(directory.path(), 2 * MIB, 32 * MIB).await;
        let (handle, entry) = vmem.open_entry("upload").await.unwrap();
        let nth = u64::from_le_bytes(entry.metadata[..].try_into().unwrap());
        assert!(nth >= seen, "{nth} is older than {seen}, which was acknowledged");
        let mut read = Vec::new();
        vmem.reader(&handle, ..).read_to_end(&mut read).await.unwrap();
        assert!(read == bytes(1, nth, 3 * MIB), "bytes and metadata of one upload");
        let used = vmem.stats().disk.used_bytes;
        assert!(used < 4 * MIB as u64, "{used} bytes on disk for one upload of 3 MiB");
        vmem.remove_named("upload").await.unwrap();
        drop(handle);
        assert_eq!(vmem.stats().disk.used_bytes, 0);
        vmem.close().await.unwrap();
    }
}
