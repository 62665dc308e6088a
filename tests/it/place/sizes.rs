//! Odd sizes, for every operation and both home tiers; and that every public future can be spawned.

use std::ops::Range;

use vmem::{MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::{SimConfig, SimDriver};

use crate::support::{self, DISK, HOST, MIB, assert_empty, bytes, settle};

const SPACE: usize = 2 * MIB;
const DISK_BYTES: usize = 16 * MIB;

const LENS: [usize; 14] = [
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    32 * 1024 + 1,
    65_535,
    65_536,
    65_537,
    SPACE,
    SPACE - 4096,
];

fn exceeds<T: std::fmt::Debug>(what: &str, outcome: Result<T, VirtualMemoryError>) {
    match outcome {
        Err(VirtualMemoryError::ExceedsCapacity { requested_bytes, capacity_bytes, .. }) => {
            assert!(requested_bytes > capacity_bytes, "{what}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

fn out_of_range<T: std::fmt::Debug>(what: &str, outcome: Result<T, VirtualMemoryError>) {
    assert!(matches!(outcome, Err(VirtualMemoryError::OutOfRange { .. })), "{what}: {outcome:?}");
}

/// Ranges of an object that are allowed, and that matter.
fn ranges(len: usize) -> Vec<Range<usize>> {
    let mut ranges = vec![0..len, 0..0, len..len, len / 2..len, 0..len / 2];
    if len > 1 {
        ranges.extend([1..len - 1, len - 1..len, 0..1]);
    }
    ranges
}

/// Reads the object in every way.
async fn check(vmem: &VirtualMemory, handle: &VMemHandle, expected: &[u8]) {
    let resident = expected.len() <= SPACE;
    if resident {
        assert!(vmem.read(handle).await.unwrap() == expected);
        let twice = [handle.clone(), handle.clone()];
        for bytes in vmem.read_many(&twice).await.unwrap() {
            assert!(bytes == expected);
        }
    } else {
        exceeds("read", vmem.read(handle).await);
        exceeds("read_many", vmem.read_many(std::slice::from_ref(handle)).await);
    }
    for range in ranges(expected.len()) {
        let part = &expected[range.clone()];
        if part.len() <= SPACE {
            assert!(vmem.read_at(handle, range.clone()).await.unwrap() == part);
            let options = ReadOptions::new().range(range.clone()).promote(false);
            assert!(vmem.read_with(handle, options).await.unwrap() == part);
        } else {
            exceeds("read_at", vmem.read_at(handle, range.clone()).await);
        }
        let mut buf = vec![0xEE; part.len()];
        vmem.read_into(handle, range, &mut buf).await.unwrap();
        assert!(buf == part);
    }
}

/// Ranges and lengths that no object has.
async fn refuse(vmem: &VirtualMemory, handle: &VMemHandle) {
    let len = handle.len();
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    let bad = [0..len + 1, len + 1..len + 1, 5..3, 0..usize::MAX, usize::MAX..usize::MAX];
    for range in bad {
        out_of_range("read_at", vmem.read_at(handle, range.clone()).await);
        out_of_range("read_into", vmem.read_into(handle, range.clone(), &mut []).await);
        let options = ReadOptions::new().range(range);
        out_of_range("read_with", vmem.read_with(handle, options).await);
    }
    for offset in [len, len + 1, usize::MAX, usize::MAX - 1] {
        out_of_range("write_at", vmem.write_at(handle, offset, [1, 2, 3]).await);
    }
    for offset in [len + 1, usize::MAX] {
        out_of_range("write_at nothing", vmem.write_at(handle, offset, []).await);
    }
    let mismatch = |outcome| match outcome {
        Err(VirtualMemoryError::SizeMismatch { expected, actual, .. }) => {
            assert!(expected != actual);
        }
        other => panic!("{other:?}"),
    };
    mismatch(vmem.write(handle, vec![0; len + 1]).await);
    mismatch(vmem.read_into(handle, 0..len, &mut vec![0; len + 1]).await);
    if len > 0 {
        mismatch(vmem.write(handle, vec![0; len - 1]).await);
        mismatch(vmem.read_into(handle, 0..len, &mut []).await);
    }
}

/// Every operation on one object of this length.
async fn every_operation(vmem: &VirtualMemory, len: usize, home: MemoryTier) {
    let handle = vmem.allocate(len, home).await.unwrap();
    assert_eq!((handle.len(), handle.is_empty(), handle.home_tier()), (len, len == 0, home));
    let resident = len <= SPACE;
    check(vmem, &handle, &vec![0; len]).await;
    let mut expected = bytes(1, 1, len);
    vmem.write(&handle, &expected).await.unwrap();
    check(vmem, &handle, &expected).await;
    vmem.demote(&handle, DISK).await.unwrap();
    check(vmem, &handle, &expected).await;
    for (nth, range) in ranges(len).into_iter().enumerate() {
        let part = bytes(2, 2 + nth as u64, range.len());
        vmem.write_at(&handle, range.start, &part).await.unwrap();
        expected[range].copy_from_slice(&part);
        check(vmem, &handle, &expected).await;
        if nth % 2 == 0 {
            vmem.demote(&handle, DISK).await.unwrap();
        }
    }
    refuse(vmem, &handle).await;
    let promoted = vmem.promote(&handle, HOST).await;
    let prefetched = vmem.prefetch(&handle, HOST).await;
    let pinned = vmem.pin(&handle, HOST).await.map(drop);
    if resident {
        promoted.unwrap();
        prefetched.unwrap();
        // `max_pinned` is less than the tier.
        if len <= SPACE / 2 {
            pinned.unwrap();
        } else {
            exceeds("pin", pinned);
        }
    } else {
        exceeds("promote", promoted);
        exceeds("prefetch", prefetched);
        exceeds("pin", pinned);
    }
    vmem.flush(&handle).await.unwrap();
    check(vmem, &handle, &expected).await;
    let fill = |buf: &mut [u8]| buf.fill(7);
    let built = vmem.write_with(&handle, fill).await;
    if resident {
        built.unwrap();
        expected.fill(7);
    } else {
        exceeds("write_with", built);
    }
    check(vmem, &handle, &expected).await;
    vmem.flush_all().await.unwrap();
    vmem.free(handle).await.unwrap();
}

/// Excluded: off-by-one at the bounds of blocks, pages, classes and chunks; bytes of another object
/// that show through; a panic or an abort for a size that cannot be. Noticed by comparing every
/// byte after every operation, and by the type of every error.
#[tokio::test(start_paused = true)]
async fn odd_sizes_every_operation() {
    let (vmem, driver) = support::open(SPACE, DISK_BYTES, |b| b);
    for home in [HOST, DISK] {
        for len in LENS.into_iter().chain([SPACE + 1, SPACE + 65_537]) {
            every_operation(&vmem, len, home).await;
        }
    }
    driver.assert_untouched();
    assert_empty(&settle(&vmem, &driver).await, "odd sizes");
}

/// The same over the driver of this machine, for the lengths at the bounds of a block and a chunk.
#[tokio::test]
async fn odd_sizes_on_a_real_disk() {
    let dir = tempfile::tempdir().unwrap();
    let config = vmem::VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .disk_path(dir.path())
        .host_capacity((SPACE + support::STAGING) as u64)
        .staging_capacity(support::STAGING as u64)
        .disk_capacity(DISK_BYTES as u64)
        .build();
    let vmem = vmem::open(config.unwrap()).await.unwrap();
    for home in [HOST, DISK] {
        for len in [0, 1, 511, 4097, 65_535, 65_537, SPACE + 1] {
            every_operation(&vmem, len, home).await;
        }
    }
    assert_empty(&support::quiet(&vmem).await, "odd sizes");
    vmem.close().await.unwrap();
}

/// Excluded: an impossible request that evicts everything before it fails, that waits for its
/// deadline, overflows or aborts. Noticed by the clock, which must not move, and by which objects
/// are resident.
#[tokio::test(start_paused = true)]
async fn sizes_that_can_never_fit() {
    let (vmem, driver) = support::open(SPACE, DISK_BYTES, |b| b);
    let warm = support::put_all(&vmem, 8, MIB / 8, HOST).await;
    settle(&vmem, &driver).await;
    let asked = tokio::time::Instant::now();
    let huge = [
        DISK_BYTES + 1,
        DISK_BYTES + 512,
        1 << 46,
        1 << 62,
        isize::MAX as usize,
        usize::MAX - 4096,
        usize::MAX - 511,
        usize::MAX,
    ];
    for len in huge {
        for home in [HOST, DISK] {
            exceeds("allocate", vmem.allocate(len, home).await);
        }
        let vram = vmem.allocate(len, MemoryTier::Vram).await;
        assert!(matches!(vram, Err(VirtualMemoryError::TierNotAvailable { .. })), "{vram:?}");
    }
    assert_eq!(asked.elapsed(), std::time::Duration::ZERO, "at once");
    for handle in &warm {
        assert!(vmem.residency(handle).unwrap().host, "nothing was evicted for it");
    }
    // Exactly everything that the disk has, and then one byte more.
    let all = vmem.allocate(DISK_BYTES, DISK).await.unwrap();
    let full = vmem.allocate(1, DISK).await;
    assert!(matches!(full, Err(VirtualMemoryError::TierFull { .. })), "{full:?}");
    drop(all);
    drop(vmem.allocate(1, DISK).await.unwrap());
    drop(warm);
    assert_empty(&settle(&vmem, &driver).await, "impossible sizes");
}

/// Excluded: a store whose configured disk is as large as can be said, and an object that is nearly
/// so: its list of chunks alone would need more memory than there is, and the process aborts.
#[tokio::test(start_paused = true)]
async fn sizes_that_fit_a_disk_without_end() {
    let disk = SimDriver::new(SimConfig::default());
    let vmem = support::over(disk, SPACE, i64::MAX as u64, |b| b);
    for len in [isize::MAX as usize - 65_536, 1 << 62, 1 << 56] {
        for home in [HOST, DISK] {
            let outcome = vmem.allocate(len, home).await;
            assert!(outcome.is_err(), "{len} in {home}: {outcome:?}");
        }
    }
    let handle = vmem.put([1, 2, 3], DISK).await.unwrap();
    assert_eq!(&vmem.read(&handle).await.unwrap()[..], [1, 2, 3]);
}

fn spawnable<F>(future: F) -> F
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    future
}

/// Every public future is `Send` and can be spawned with its arguments moved in; the names that
/// callers hold are `Send`, `Sync` and free of lifetimes.
#[tokio::test(start_paused = true)]
async fn every_public_future_can_be_spawned() {
    fn shared<T: Send + Sync + Clone + 'static>(_: &T) {}
    fn sent<T: Send + 'static>(value: T) -> T {
        value
    }
    let (vmem, _driver) = support::open(SPACE, DISK_BYTES, |b| b);
    let handle = tokio::spawn({
        let vmem = vmem.clone();
        spawnable(async move { vmem.put(vec![5; 9], HOST).await })
    })
    .await
    .unwrap()
    .unwrap();
    shared(&vmem);
    shared(&handle);
    shared(&VirtualMemoryError::Closed);
    drop(sent(vmem.migrations()));
    sent(vmem.prefetch(&handle, HOST)).detach();
    drop(sent(vmem.pin(&handle, HOST).await.unwrap()));
    let every = spawnable(async move {
        let v = &vmem;
        let h = &handle;
        let many = [h.clone()];
        drop(v.allocate(9, DISK).await?);
        v.write(h, vec![1; 9]).await?;
        v.write_at(h, 3, [2; 3]).await?;
        v.write_with(h, |buf| buf.fill(4)).await?;
        drop(v.read(h).await?);
        drop(v.read_at(h, 1..2).await?);
        v.read_into(h, 0..3, &mut [0; 3]).await?;
        drop(v.read_with(h, ReadOptions::new()).await?);
        drop(v.read_many(&many).await?);
        v.promote(h, HOST).await?;
        v.demote(h, DISK).await?;
        v.prefetch_many(&many, HOST).await?;
        drop(v.pin(h, HOST).await?);
        v.flush(h).await?;
        v.flush_all().await?;
        v.free(handle.clone()).await?;
        vmem.close().await
    });
    tokio::spawn(every).await.unwrap().unwrap();
    drop(spawnable(vmem::open(support::config(SPACE, |b| b))));
}
