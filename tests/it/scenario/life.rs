//! Scenarios of the beginning and the end of a store, of its handles, and of odd arguments, over
//! the real driver.

use std::path::Path;
use std::time::Duration;

use vmem::{
    MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig,
    VirtualMemoryConfigBuilder, VirtualMemoryError,
};

use crate::support::{DISK, HOST, MIB};

fn small() -> VirtualMemoryConfigBuilder {
    VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(4 * MIB as u64)
        .disk_capacity(64 * MIB as u64)
        .wait_timeout(Duration::from_secs(5))
}

pub(super) async fn open() -> VirtualMemory {
    vmem::open(small().build().unwrap()).await.unwrap()
}

async fn open_in(path: &Path) -> Result<VirtualMemory, VirtualMemoryError> {
    vmem::open(small().disk_path(path).build().unwrap()).await
}

/// Compiles only if the futures of every public method can be spawned from anywhere.
#[allow(dead_code)]
fn every_future_is_send(vmem: VirtualMemory, handle: VMemHandle) {
    fn send<T: Send>(_: T) {}
    let mut buf = [0_u8; 4];
    send(vmem::open(small().build().unwrap()));
    send(vmem.allocate(1, HOST));
    send(vmem.put([1_u8], HOST));
    send(vmem.free(handle.clone()));
    send(vmem.read(&handle));
    send(vmem.read_at(&handle, 0..1));
    send(vmem.read_into(&handle, 0..4, &mut buf));
    send(vmem.read_with(&handle, ReadOptions::new()));
    send(vmem.read_many(std::slice::from_ref(&handle)));
    send(vmem.write(&handle, [1_u8]));
    send(vmem.write_at(&handle, 0, [1_u8]));
    send(vmem.write_with(&handle, |_| {}));
    send(vmem.promote(&handle, HOST));
    send(vmem.demote(&handle, DISK));
    send(vmem.prefetch(&handle, HOST));
    send(vmem.pin(&handle, HOST));
    send(vmem.flush(&handle));
    send(vmem.flush_all());
    send(vmem.migrations());
    send(vmem.close());
}

/// Excluded: a shutdown that hangs, loses a call, or blocks a worker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_24_close_during_a_thousand_operations() {
    let vmem = open().await;
    let mut handles = Vec::new();
    for n in 0..64_u8 {
        handles.push(vmem.put(vec![n; 40_000], HOST).await.unwrap());
    }
    let operations: Vec<_> = (0..1000_usize)
        .map(|n| {
            let vmem = vmem.clone();
            let handle = handles[n % 64].clone();
            tokio::spawn(async move {
                match n % 5 {
                    0 => vmem.write(&handle, vec![n as u8; 40_000]).await,
                    1 => vmem.demote(&handle, DISK).await,
                    2 => vmem.promote(&handle, HOST).await,
                    3 => vmem.put(vec![1; 10_000], DISK).await.map(drop),
                    _ => vmem.read(&handle).await.map(drop),
                }
            })
        })
        .collect();
    tokio::task::yield_now().await;
    let other = vmem.clone();
    let held = vmem.read(&handles[0]).await.ok();
    vmem.close().await.unwrap();
    for operation in operations {
        match operation.await.unwrap() {
            Ok(()) | Err(VirtualMemoryError::Closed) => {}
            Err(error) => panic!("neither done nor closed: {error:?}"),
        }
    }
    // Bytes stay valid; calls get `Closed`, and so does a second close.
    assert!(held.is_none_or(|bytes| bytes.len() == 40_000));
    assert!(matches!(other.read(&handles[0]).await, Err(VirtualMemoryError::Closed)));
    assert!(matches!(other.prefetch(&handles[0], HOST).await, Err(VirtualMemoryError::Closed)));
    assert!(matches!(other.close().await, Err(VirtualMemoryError::Closed)));
}

/// The runtime goes first; then the handles, and the bytes, on a thread that has none.
#[test]
fn scenario_24_the_runtime_is_dropped_without_close() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (vmem, handles, bytes) = runtime.block_on(async {
        let vmem = open_in(directory.path()).await.unwrap();
        let mut handles = Vec::new();
        for n in 0..200_u8 {
            handles.push(vmem.put(vec![n; 50_000], HOST).await.unwrap());
        }
        let bytes = vmem.read(&handles[199]).await.unwrap();
        for handle in &handles {
            vmem.prefetch(handle, HOST).detach();
        }
        (vmem, handles, bytes)
    });
    drop(runtime);
    assert!(bytes.iter().all(|&byte| byte == 199));
    drop(handles);
    drop(vmem);
    assert!(bytes.iter().all(|&byte| byte == 199));
    drop(bytes);
    // The directory is free again, and nothing but the lock file is left in it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let again = open_in(directory.path()).await.unwrap();
        assert_eq!(again.stats().disk.used_bytes, 0);
        again.close().await.unwrap();
    });
}

/// The seed's P9 and P10: two stores over one directory, and a second life of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p9_one_directory_one_store() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open_in(directory.path()).await.unwrap();
    let handle = vmem.put([7; 100], DISK).await.unwrap();
    match open_in(directory.path()).await {
        Err(VirtualMemoryError::InUse { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    assert_eq!(vmem.read(&handle).await.unwrap()[..], [7; 100]);
    vmem.close().await.unwrap();
    open_in(directory.path()).await.unwrap().close().await.unwrap();
}

/// The seed's P8: a handle of one store says nothing to another; a freed one says nothing to its
/// own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p8_handles_are_of_one_store() {
    let one = open().await;
    let two = open().await;
    let mine = one.put([1; 8], HOST).await.unwrap();
    let theirs = two.put([2; 8], HOST).await.unwrap();
    assert_eq!(mine.id(), theirs.id(), "numbers are of a store");
    assert_ne!(mine, theirs);
    let id = mine.id();
    for refused in [
        one.read(&theirs).await.err(),
        one.write(&theirs, [0; 8]).await.err(),
        one.residency(&theirs).err(),
        one.free(theirs.clone()).await.err(),
        one.prefetch(&theirs, HOST).await.err(),
    ] {
        let wrong = format!("{refused:?}");
        assert!(matches!(refused, Some(VirtualMemoryError::HandleNotFound { .. })), "{wrong}");
    }
    assert_eq!(two.read(&theirs).await.unwrap()[..], [2; 8]);
    // A second handle by number is the same object; freeing it leaves the first one with nothing.
    let same = one.handle(id).unwrap();
    assert_eq!(same, mine);
    one.free(same).await.unwrap();
    assert!(one.handle(id).is_none());
    assert!(matches!(one.read(&mine).await, Err(VirtualMemoryError::HandleNotFound { .. })));
    assert!(matches!(one.free(mine).await, Err(VirtualMemoryError::HandleNotFound { .. })));
    // The last handle that goes frees the object.
    let id = theirs.id();
    let clone = theirs.clone();
    drop(theirs);
    assert!(two.handle(id).is_some());
    drop(clone);
    assert!(two.handle(id).is_none());
    assert_eq!(two.stats().objects, 0);
}

/// The seed's P2, P3, P4 and P18: moving to and fro, overwriting what is nearly all of a tier,
/// asking for too much, and many tasks that allocate at once: the ledger stays right and nothing is
/// evicted in vain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p2_p3_p4_p18_the_ledger() {
    let vmem = open().await;
    let handle = vmem.put(vec![1; 100_000], HOST).await.unwrap();
    let used = vmem.stats().host.used_bytes;
    for _ in 0..50 {
        vmem.demote(&handle, DISK).await.unwrap();
        assert_eq!(vmem.stats().host.used_bytes, 0);
        vmem.promote(&handle, HOST).await.unwrap();
        assert_eq!(vmem.stats().host.used_bytes, used);
    }
    let most = vmem.stats().host.capacity_bytes as usize;
    let large = vmem.put(vec![1; most * 3 / 4], HOST).await.unwrap();
    for n in 2..5_u8 {
        vmem.write(&large, vec![n; most * 3 / 4]).await.unwrap();
    }
    let resident = vmem.stats().host.objects;
    for impossible in [80 * MIB, usize::MAX / 2, usize::MAX] {
        for home in [HOST, DISK] {
            let refused = vmem.allocate(impossible, home).await;
            assert!(
                matches!(refused, Err(VirtualMemoryError::ExceedsCapacity { .. })),
                "{refused:?}"
            );
        }
    }
    assert_eq!(vmem.stats().host.objects, resident, "nothing was evicted for what can never fit");
    drop((handle, large));
    let allocators: Vec<_> = (0..8)
        .map(|_| {
            let vmem = vmem.clone();
            tokio::spawn(async move {
                for _ in 0..500 {
                    let handle = vmem.put([9; 2000], HOST).await.expect("pressure is no error");
                    std::mem::forget(handle.clone());
                    drop(vmem.free(handle).await);
                }
            })
        })
        .collect();
    for allocator in allocators {
        allocator.await.unwrap();
    }
    assert_eq!(vmem.stats().host.used_bytes, 0);
    vmem.close().await.unwrap();
}

/// The seed's P11: one panic inside a caller's closure poisons nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p11_a_panic_of_the_caller() {
    let vmem = open().await;
    let handle = vmem.put([3; 500], HOST).await.unwrap();
    let fresh = vmem.allocate(500, HOST).await.unwrap();
    for handle in [handle.clone(), fresh.clone()] {
        let vmem = vmem.clone();
        let panics = tokio::spawn(async move {
            vmem.write_with(&handle, |bytes| {
                bytes[0] = 1;
                panic!("in the caller's closure");
            })
            .await
        });
        assert!(panics.await.unwrap_err().is_panic());
    }
    assert_eq!(vmem.read(&handle).await.unwrap()[..], [3; 500]);
    assert_eq!(vmem.read(&fresh).await.unwrap()[..], [0; 500]);
    vmem.write(&handle, [4; 500]).await.unwrap();
    vmem.close().await.unwrap();
}

/// The seed's P16 and P17: while objects move, their one writer reads what it wrote, and no reader
/// finds that a live object is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scenario_26_p16_p17_moving_loses_no_write() {
    let vmem = open().await;
    let handle = vmem.put([0; 3000], HOST).await.unwrap();
    let mover = {
        let vmem = vmem.clone();
        let handle = handle.clone();
        tokio::spawn(async move {
            for _ in 0..300 {
                vmem.demote(&handle, DISK).await.unwrap();
                vmem.promote(&handle, HOST).await.unwrap();
            }
        })
    };
    let mut version = 0_u8;
    while !mover.is_finished() {
        version = version.wrapping_add(1);
        vmem.write(&handle, [version; 3000]).await.unwrap();
        assert_eq!(vmem.read(&handle).await.unwrap()[..], [version; 3000]);
    }
    mover.await.unwrap();
    vmem.close().await.unwrap();
}

/// The sizes at which something changes: nothing, one byte, around a sector, a page, a small object
/// and a chunk, in both home tiers, through every way of reading and writing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_of_odd_sizes_keep_their_bytes() {
    let vmem = open().await;
    for len in [0, 1, 511, 512, 4095, 4096, 4097, 32_768, 32_769, 65_535, 65_536, 65_537, 300_000] {
        for home in [HOST, DISK] {
            let handle = vmem.allocate(len, home).await.unwrap();
            assert_eq!(
                (handle.len(), handle.is_empty(), handle.home_tier()),
                (len, len == 0, home)
            );
            assert!(vmem.read(&handle).await.unwrap().iter().all(|&byte| byte == 0), "zeros");
            let data: Vec<u8> = (0..len).map(|at| (at * 31 + len) as u8).collect();
            vmem.write(&handle, &data).await.unwrap();
            for tier in [DISK, HOST] {
                vmem.demote(&handle, tier).await.unwrap();
                vmem.promote(&handle, tier).await.unwrap();
                assert!(vmem.read(&handle).await.unwrap() == data, "{len} {home} in {tier}");
                let mut buf = vec![0; len / 2];
                vmem.read_into(&handle, len - len / 2..len, &mut buf).await.unwrap();
                assert!(buf == data[len - len / 2..]);
                assert!(vmem.read_at(&handle, len / 3..len).await.unwrap() == data[len / 3..]);
            }
            vmem.write_at(&handle, len / 2, &data[..len - len / 2]).await.unwrap();
            let mut expected = data.clone();
            expected[len / 2..].copy_from_slice(&data[..len - len / 2]);
            assert!(vmem.read(&handle).await.unwrap() == expected);
            vmem.write_with(&handle, |bytes| bytes.copy_from_slice(&data)).await.unwrap();
            assert!(vmem.read_many(&[handle.clone(), handle.clone()]).await.unwrap()[1] == data);
            let pin = vmem.pin(&handle, HOST).await.unwrap();
            drop(pin);
            vmem.flush(&handle).await.unwrap();
        }
    }
    let handle = vmem.put([1; 10], HOST).await.unwrap();
    let refused = [
        vmem.read_at(&handle, 3..11).await.err(),
        #[expect(clippy::reversed_empty_ranges)]
        vmem.read_at(&handle, 7..3).await.err(),
        vmem.read_at(&handle, usize::MAX..usize::MAX).await.err(),
        vmem.write_at(&handle, 5, [0; 6]).await.err(),
        vmem.write_at(&handle, usize::MAX, [0; 6]).await.err(),
    ];
    for error in refused {
        assert!(matches!(error, Some(VirtualMemoryError::OutOfRange { len: 10, .. })), "{error:?}");
    }
    let wrong = [
        vmem.write(&handle, [0; 9]).await.err(),
        vmem.read_into(&handle, 0..4, &mut [0; 3]).await.err(),
    ];
    for error in wrong {
        assert!(matches!(error, Some(VirtualMemoryError::SizeMismatch { .. })), "{error:?}");
    }
    vmem.close().await.unwrap();
}

/// VRAM is refused everywhere, with a reason, and never served from somewhere else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vram_is_not_available() {
    let config = small().gpu(vmem::GpuSelection::Off).build().unwrap();
    let vmem = vmem::open(config).await.unwrap();
    let handle = vmem.put([1; 10], HOST).await.unwrap();
    let refused = [
        vmem.allocate(1, MemoryTier::Vram).await.err(),
        vmem.put([1], MemoryTier::Vram).await.err(),
        vmem.promote(&handle, MemoryTier::Vram).await.err(),
        vmem.prefetch(&handle, MemoryTier::Vram).await.err(),
        vmem.pin(&handle, MemoryTier::Vram).await.err(),
    ];
    for error in refused {
        match error {
            Some(VirtualMemoryError::TierNotAvailable { reason, .. }) => {
                assert!(!reason.is_empty())
            }
            other => panic!("{other:?}"),
        }
    }
    vmem.close().await.unwrap();
}
