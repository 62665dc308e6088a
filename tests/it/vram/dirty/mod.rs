//! Versions that a device alone has: when they are written back, and how their loss is reported.
//!
//! Excluded: an older version, a copy down that nobody asked for, space that is missing when such
//! an object leaves, and a silent loss. A kernel is an upload.

mod cleaned;
mod eager;
mod moved;
mod names;
mod random;
mod refuted;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::io::AsyncReadExt;
use vmem::backend::{DeviceAccess, VramChange};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryError, WriteBack};
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, bytes, eventually, settle};

const VRAM: MemoryTier = MemoryTier::Vram;
const WAIT: Duration = Duration::from_secs(20);

struct Bench {
    vmem: VirtualMemory,
    driver: Arc<MemDriver>,
    devices: Vec<SimDevice>,
}

fn open_with(write_back: WriteBack, host: usize, vram: &[usize], wait: Duration) -> Bench {
    let devices: Vec<_> = vram.iter().map(|&bytes| SimDevice::new(bytes as u64)).collect();
    let backends = devices.iter().map(|device| Arc::new(device.clone()) as Arc<_>);
    let (vmem, driver) = support::open_below(backends, host, 64 * MIB, |config| {
        config.wait_timeout(wait).max_pinned(1.0).write_back(write_back)
    });
    Bench { vmem, driver, devices }
}

fn open(write_back: WriteBack, host: usize, vram: usize) -> Bench {
    open_with(write_back, host, &[vram], WAIT)
}

fn access(vmem: &VirtualMemory, device: usize) -> DeviceAccess {
    DeviceAccess::all(vmem).nth(device).unwrap()
}

async fn change(vmem: &VirtualMemory, handle: &VMemHandle) -> VramChange {
    access(vmem, 0).change(handle, false).await.unwrap()
}

/// What a kernel does that writes these bytes at `offset`.
async fn write_by_kernel(
    vmem: &VirtualMemory,
    device: usize,
    change: &VramChange,
    offset: usize,
    new: Vec<u8>,
) {
    let range = change.range().unwrap();
    access(vmem, device).backend().upload(range, offset, new.into()).await.unwrap();
}

async fn finish(change: VramChange) -> Result<(), VirtualMemoryError> {
    change.finish(futures::future::ready(Ok(())).boxed(), None).await
}

/// A lease that writes all of an object, and ends.
async fn run_kernel(vmem: &VirtualMemory, handle: &VMemHandle, new: Vec<u8>) {
    let change = change(vmem, handle).await;
    write_by_kernel(vmem, 0, &change, 0, new).await;
    finish(change).await.unwrap();
}

fn is_lost(error: &VirtualMemoryError) -> bool {
    matches!(error, VirtualMemoryError::Device { operation: "reading what a kernel wrote", .. })
}

async fn assert_all_back(bench: Bench, handles: Vec<VMemHandle>) {
    drop(handles);
    let stats = settle(&bench.vmem, &bench.driver).await;
    support::assert_empty(&stats, "objects that kernels wrote");
    assert_eq!(stats.vram_dirty_bytes, 0);
    bench.vmem.close().await.unwrap();
}

#[tokio::test]
async fn leases_copy_nothing_down_before_it_is_asked_for() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, 2 * MIB);
    let vmem = &bench.vmem;
    let len = 1000 * KIB;
    let handle = vmem.put(bytes(1, 1, len), HOST).await.unwrap();
    for step in 0..1000_usize {
        let change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, step * KIB, vec![step as u8; KIB]).await;
        finish(change).await.unwrap();
    }
    let stats = vmem.stats();
    assert_eq!((stats.vram_to_host_bytes, stats.vram_dirty_bytes), (0, len as u64));
    assert!(stats.host.used_bytes < 2 * len as u64, "{stats:#?}");
    let residency = vmem.residency(&handle).unwrap();
    assert!(residency.vram && residency.dirty && !residency.host && !residency.disk);
    let read = vmem.read(&handle).await.unwrap();
    assert!(read.chunks(KIB).enumerate().all(|(step, one)| one == [step as u8; KIB]));
    let stats = vmem.stats();
    assert_eq!((stats.vram_to_host_bytes, stats.vram_dirty_bytes), (len as u64, 0));
    drop(read);
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn eager_leases_copy_what_kernels_touch() {
    let bench = open(WriteBack::Eager, 4 * MIB, 2 * MIB);
    let vmem = &bench.vmem;
    let mut expected = bytes(1, 1, 1000 * KIB);
    let handle = vmem.put(&expected, HOST).await.unwrap();
    for step in 0..1000_usize {
        let mut change = change(vmem, &handle).await;
        let new = vec![step as u8; 512];
        expected[step * KIB + 300..step * KIB + 812].copy_from_slice(&new);
        write_by_kernel(vmem, 0, &change, step * KIB + 300, new).await;
        change.touched(step * KIB + 500..step * KIB + 812).unwrap();
        change.touched(step * KIB + 300..step * KIB + 500).unwrap();
        finish(change).await.unwrap();
    }
    assert_eq!(vmem.stats().vram_to_host_bytes, 1000 * 512);
    assert!(vmem.read(&handle).await.unwrap() == expected);
    let mut over = change(vmem, &handle).await;
    let refused = over.touched(1000 * KIB - 1..1000 * KIB + 1);
    assert!(matches!(refused, Err(VirtualMemoryError::OutOfRange { .. })), "{refused:?}");
    drop(over);
    // Where host memory lacks the rest, all of it is copied.
    vmem.demote(&handle, DISK).await.unwrap();
    let mut change = change(vmem, &handle).await;
    expected[..100].fill(7);
    write_by_kernel(vmem, 0, &change, 0, vec![7; 100]).await;
    change.touched(0..100).unwrap();
    finish(change).await.unwrap();
    vmem.demote(&handle, DISK).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == expected);
    assert_all_back(bench, vec![handle]).await;
}

/// Each way to ask for bytes below the device gets those that the kernel wrote.
#[tokio::test]
async fn each_way_to_the_bytes_leads_to_what_the_kernel_wrote() {
    for len in [5000, 200 * KIB] {
        for way in 0..12 {
            let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
            let vmem = &bench.vmem;
            let home = if way % 2 == 0 { HOST } else { DISK };
            let handle = vmem.put(bytes(1, 1, len), home).await.unwrap();
            let mut expected = bytes(1, 2, len);
            run_kernel(vmem, &handle, expected.clone()).await;
            match way {
                0 => drop(vmem.read(&handle).await.unwrap()),
                1 => assert!(
                    vmem.read_at(&handle, 1000..3000).await.unwrap() == expected[1000..3000]
                ),
                2 => {
                    let mut buf = vec![0; 3000];
                    vmem.read_into(&handle, 1000..4000, &mut buf).await.unwrap();
                    assert!(buf == expected[1000..4000]);
                }
                3 => {
                    vmem.write_at(&handle, 2000, [9; 100]).await.unwrap();
                    expected[2000..2100].fill(9);
                }
                4 => {
                    expected = bytes(1, 3, len);
                    vmem.write(&handle, &expected).await.unwrap();
                }
                5 => vmem.demote(&handle, DISK).await.unwrap(),
                6 => vmem.demote(&handle, HOST).await.unwrap(),
                7 => vmem.flush(&handle).await.unwrap(),
                8 => vmem.flush_all().await.unwrap(),
                9 => drop(vmem.pin(&handle, HOST).await.unwrap()),
                10 => {
                    let mut all = Vec::new();
                    vmem.reader(&handle, ..).read_to_end(&mut all).await.unwrap();
                    assert!(all == expected);
                }
                _ => drop(vmem.read_many([&handle, &handle]).await.unwrap()),
            }
            assert!(vmem.read(&handle).await.unwrap() == expected, "way {way} of {len} bytes");
            // Nor does it come back as something else from the disk.
            vmem.demote(&handle, DISK).await.unwrap();
            assert_eq!(vmem.residency(&handle).unwrap().current_tier(), Some(DISK), "way {way}");
            assert!(vmem.read(&handle).await.unwrap() == expected, "way {way} from disk");
            assert_all_back(bench, vec![handle]).await;
        }
    }
}

#[tokio::test]
async fn objects_leave_a_full_device_for_where_there_is_space() {
    // Host memory has space for few, and what leases keep there goes to disk.
    let bench = open(WriteBack::OnEvict, 600 * KIB, MIB);
    let vmem = &bench.vmem;
    let len = 100 * KIB;
    let mut handles = Vec::new();
    for object in 1..=30_u64 {
        let handle = vmem.put(bytes(object, 1, len), DISK).await.unwrap();
        run_kernel(vmem, &handle, bytes(object, 2, len)).await;
        handles.push(handle);
        assert!(vmem.stats().vram.used_bytes <= MIB as u64);
    }
    // Held bytes fill host memory: then objects leave through staging.
    let held = vmem.put(bytes(99, 1, 500 * KIB), HOST).await.unwrap();
    let held_bytes = vmem.read(&held).await.unwrap();
    for (object, handle) in (1_u64..).zip(&handles) {
        run_kernel(vmem, handle, bytes(object, 3, len)).await;
    }
    drop(held_bytes);
    for (object, handle) in (1_u64..).zip(&handles) {
        assert!(vmem.read(handle).await.unwrap() == bytes(object, 3, len), "object {object}");
    }
    handles.push(held);
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn after_a_while_objects_are_written_down() {
    let bench = open(WriteBack::After(Duration::from_millis(30)), 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 9000), HOST).await.unwrap();
    for version in 2..=4 {
        run_kernel(vmem, &handle, bytes(1, version, 9000)).await;
        eventually("it is written back", || vmem.stats().vram_dirty_bytes == 0).await;
        let residency = vmem.residency(&handle).unwrap();
        assert!(residency.vram && residency.host, "{residency:?}");
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, version, 9000));
    }
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn lost_versions_are_told_until_they_are_reverted_or_written() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let on_disk = vmem.put(bytes(1, 1, 9000), DISK).await.unwrap();
    vmem.demote(&on_disk, DISK).await.unwrap();
    let in_host = vmem.put(bytes(2, 1, 9000), HOST).await.unwrap();
    let unwritten = vmem.allocate(9000, HOST).await.unwrap();
    let rewritten = vmem.put(bytes(4, 1, 9000), HOST).await.unwrap();
    let read = vmem.put(bytes(5, 1, 9000), HOST).await.unwrap();
    for (object, handle) in (1..).zip([&on_disk, &in_host, &unwritten, &rewritten, &read]) {
        run_kernel(vmem, handle, bytes(object, 2, 9000)).await;
    }
    vmem.revert(&on_disk).await.unwrap();
    assert!(vmem.read_at(&on_disk, 0..9000).await.unwrap() == bytes(1, 2, 9000), "not lost");
    run_kernel(vmem, &on_disk, bytes(1, 2, 9000)).await;
    drop(vmem.read(&read).await.unwrap());
    bench.devices[0].lose();
    for handle in [&on_disk, &in_host, &unwritten, &rewritten] {
        let refused = [
            vmem.read(handle).await.unwrap_err(),
            vmem.read_at(handle, 10..20).await.unwrap_err(),
            vmem.read_into(handle, 10..20, &mut [0; 10]).await.unwrap_err(),
            vmem.write_at(handle, 10, [1; 10]).await.unwrap_err(),
            vmem.flush_all().await.unwrap_err(),
            vmem.demote(handle, DISK).await.unwrap_err(),
            vmem.read_many([handle]).await.unwrap_err(),
            vmem.pin(handle, HOST).await.unwrap_err(),
        ];
        for error in refused {
            assert!(is_lost(&error), "{error:?}");
        }
        let streamed = vmem.reader(handle, ..).read_to_end(&mut Vec::new()).await;
        assert!(streamed.is_err());
    }
    assert!(vmem.read(&read).await.unwrap() == bytes(5, 2, 9000), "it was written back");
    let error = vmem.revert(&in_host).await.unwrap_err();
    assert!(is_lost(&error) && error.to_string().contains("no version"), "{error}");
    vmem.write(&in_host, bytes(2, 3, 9000)).await.unwrap();
    assert!(vmem.read(&in_host).await.unwrap() == bytes(2, 3, 9000));
    vmem.write(&rewritten, bytes(4, 3, 9000)).await.unwrap();
    assert!(vmem.read(&rewritten).await.unwrap() == bytes(4, 3, 9000));
    vmem.revert(&unwritten).await.unwrap();
    assert!(vmem.read(&unwritten).await.unwrap() == [0; 9000][..]);
    assert_all_back(bench, vec![on_disk, in_host, unwritten, rewritten, read]).await;
}

#[tokio::test]
async fn reverting_gives_the_version_that_was_on_disk() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 200 * KIB), DISK).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, 200 * KIB)).await;
    run_kernel(vmem, &handle, bytes(1, 3, 200 * KIB)).await;
    bench.devices[0].lose();
    assert!(is_lost(&vmem.read(&handle).await.unwrap_err()));
    vmem.revert(&handle).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 200 * KIB));
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn changes_over_what_a_device_alone_has_are_kept_or_lost_and_never_half() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 9000), DISK).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, 9000)).await;
    // Nobody knew where it is, so nobody has written to it.
    drop(change(vmem, &handle).await);
    assert_eq!(vmem.stats().vram_dirty_bytes, 9000);
    assert!(vmem.read_at(&handle, 0..9000).await.unwrap() == bytes(1, 2, 9000));
    vmem.write(&handle, bytes(1, 3, 9000)).await.unwrap();
    vmem.flush(&handle).await.unwrap();

    for is_failed in [false, true] {
        run_kernel(vmem, &handle, bytes(1, 4, 9000)).await;
        let change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, 0, vec![1; 100]).await;
        if is_failed {
            let failed = vmem::backend::DeviceError::Closed;
            change.finish(futures::future::ready(Err(failed)).boxed(), None).await.unwrap_err();
        } else {
            drop(change);
        }
        assert!(is_lost(&vmem.read(&handle).await.unwrap_err()));
        vmem.revert(&handle).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 3, 9000));
    }
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn passing_errors_of_a_device_lose_nothing_that_it_alone_has() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 200 * KIB), DISK).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, 200 * KIB)).await;
    for _ in 0..3 {
        bench.devices[0].fail_next(1);
        let error = vmem.read(&handle).await.unwrap_err();
        assert!(matches!(error, VirtualMemoryError::Device { code: 719, .. }), "{error:?}");
        bench.devices[0].fail_next(1);
        vmem.demote(&handle, DISK).await.unwrap_err();
    }
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, 200 * KIB));
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn copies_on_a_sibling_are_of_the_version_that_the_kernel_wrote() {
    let bench = open_with(WriteBack::OnEvict, 4 * MIB, &[MIB, MIB], WAIT);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 200 * KIB), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, 200 * KIB)).await;
    vmem.promote(&handle, MemoryTier::of_device(1)).await.unwrap();
    assert_eq!(vmem.stats().vram_dirty_bytes, 200 << 10, "no tier below has it");
    // A kernel fails over the copy of the first: the second still has that version.
    let change = change(vmem, &handle).await;
    write_by_kernel(vmem, 0, &change, 0, vec![1; 100]).await;
    drop(change);
    assert!(vmem.read_at(&handle, 0..1000).await.unwrap() == bytes(1, 2, 200 * KIB)[..1000]);
    let change = access(vmem, 1).change(&handle, false).await.unwrap();
    write_by_kernel(vmem, 1, &change, 0, bytes(1, 3, 200 * KIB)).await;
    finish(change).await.unwrap();
    bench.devices[0].lose();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 3, 200 * KIB));
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn pieces_of_two_versions_are_never_read_as_one() {
    let bench = open(WriteBack::OnEvict, 800 * KIB, MIB);
    let vmem = &bench.vmem;
    let len = 300 * KIB;
    let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, len)).await;
    // Held bytes fill host memory, and a waiter has what lies aside taken back.
    let held = vmem.put(bytes(2, 1, 700 * KIB), HOST).await.unwrap();
    let held_bytes = vmem.read(&held).await.unwrap();
    let other = vmem.put(bytes(3, 1, 200 * KIB), DISK).await.unwrap();
    let waiter = tokio::spawn({
        let vmem = vmem.clone();
        let other = other.clone();
        async move { vmem.pin(&other, HOST).await.map(drop) }
    });
    let mut buf = vec![0; len];
    let mut read = Box::pin(vmem.read_into(&handle, 0..len, &mut buf));
    for version in 3..12 {
        let is_over = futures::poll!(read.as_mut()).is_ready();
        assert!(!is_over, "it was to be read in pieces");
        tokio::time::sleep(Duration::from_millis(50)).await;
        run_kernel(vmem, &handle, bytes(1, version, len)).await;
    }
    read.await.unwrap();
    assert!(buf == bytes(1, 11, len), "the last version, whole");
    drop(held_bytes);
    waiter.await.unwrap().unwrap();
    assert_all_back(bench, vec![handle, held, other]).await;
}
