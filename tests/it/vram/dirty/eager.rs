//! Copies of what kernels wrote that fail, that nobody needs, and that a pin waits for.
//!
//! Excluded: what a kernel wrote is lost because it could not be copied, and a copy of what nobody
//! can read any more.

use futures::channel::oneshot;
use vmem::backend::DeviceError;

use super::*;

const LEN: usize = 200 * KIB;

#[tokio::test]
async fn copies_that_fail_are_tried_again() {
    let bench = open(WriteBack::Eager, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    for touched in [None, Some(1000..5000)] {
        let mut change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, 1000, vec![7; 4000]).await;
        if let Some(touched) = touched {
            change.touched(touched).unwrap();
        }
        bench.devices[0].fail_next(2);
        finish(change).await.unwrap();
        assert_eq!(vmem.stats().vram_dirty_bytes, 0, "host memory has it");
    }
    bench.devices[0].lose();
    let mut expected = bytes(1, 1, LEN);
    expected[1000..5000].fill(7);
    assert!(vmem.read(&handle).await.unwrap() == expected);
    assert_all_back(bench, vec![handle]).await;
}

/// With a host pin too, which keeps a copy in host memory as soon as there can be one.
#[tokio::test]
async fn version_that_cannot_be_copied_yet_stays_on_the_device() {
    for (is_pinned, is_awaited) in [(false, true), (false, false), (true, true)] {
        let bench = open(WriteBack::Eager, 4 * MIB, MIB);
        let vmem = &bench.vmem;
        let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
        let pin = if is_pinned { Some(vmem.pin(&handle, HOST).await.unwrap()) } else { None };
        for version in 2..4 {
            let mut change = change(vmem, &handle).await;
            write_by_kernel(vmem, 0, &change, 0, bytes(1, version, 5000)).await;
            change.touched(0..5000).unwrap();
            bench.devices[0].fail_next(u64::MAX);
            let finished = change.finish(futures::future::ready(Ok(())).boxed(), None);
            if is_awaited {
                finished.await.unwrap();
            } else {
                drop(finished);
            }
            eventually("a device alone has it", || vmem.stats().vram_dirty_bytes == LEN as u64)
                .await;
            let failed = vmem.read(&handle).await.unwrap_err();
            assert!(matches!(failed, VirtualMemoryError::Device { code: 719, .. }), "{failed:?}");
            bench.devices[0].fail_next(0);
        }
        eventually("it is written back", || vmem.stats().vram_dirty_bytes == 0).await;
        bench.devices[0].lose();
        let mut expected = bytes(1, 1, LEN);
        expected[..5000].copy_from_slice(&bytes(1, 3, 5000));
        assert!(vmem.read(&handle).await.unwrap() == expected, "{is_pinned} {is_awaited}");
        drop(pin);
        assert_all_back(bench, vec![handle]).await;
    }
}

/// Mechanism: a version that could not be copied down was changed where it lay. Effect: a change
/// that failed lost it, where each is to be written back. Fix: a lease copies it first.
#[tokio::test]
async fn version_that_could_not_be_copied_is_copied_before_it_is_changed() {
    for write_back in [WriteBack::Eager, WriteBack::OnEvict] {
        let bench = open(write_back, 4 * MIB, MIB);
        let vmem = &bench.vmem;
        let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
        // What is pinned is written back with each lease, whatever the policy.
        let is_lazy = write_back != WriteBack::Eager;
        let pin = if is_lazy { Some(vmem.pin(&handle, HOST).await.unwrap()) } else { None };
        let first = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &first, 0, bytes(1, 2, LEN)).await;
        bench.devices[0].fail_next(u64::MAX);
        finish(first).await.unwrap();
        let refused = access(vmem, 0).change(&handle, false).await.unwrap_err();
        assert!(matches!(refused, VirtualMemoryError::Device { code: 719, .. }), "{refused:?}");
        // It is tried as often as at the end of a lease.
        bench.devices[0].fail_next(2);
        let second = change(vmem, &handle).await;
        assert_eq!(vmem.stats().vram_dirty_bytes, 0, "it is below");
        write_by_kernel(vmem, 0, &second, 0, bytes(1, 3, LEN)).await;
        let failed = futures::future::ready(Err(DeviceError::Closed)).boxed();
        second.finish(failed, None).await.unwrap_err();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, LEN));
        drop(pin);
        assert_all_back(bench, vec![handle]).await;
    }
}

#[tokio::test]
async fn freed_objects_are_not_copied() {
    let bench = open(WriteBack::Eager, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    for is_overwritten in [false, true] {
        let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
        let change = access(vmem, 0).change(&handle, is_overwritten).await.unwrap();
        write_by_kernel(vmem, 0, &change, 0, bytes(1, 2, LEN)).await;
        let (written, kernel) = oneshot::channel();
        let finished = change.finish(async { kernel.await.unwrap() }.boxed(), None);
        drop(handle);
        let done = bench.devices[0].done();
        written.send(Ok(())).unwrap();
        finished.await.unwrap();
        settle(vmem, &bench.driver).await;
        assert_eq!(bench.devices[0].done(), done, "nobody can read it");
        assert_eq!(vmem.stats().vram_to_host_bytes, 0);
    }
    assert_all_back(bench, Vec::new()).await;
}

/// The copy goes into the space that the object has on disk.
#[tokio::test]
async fn copies_to_disk_that_fail_cost_no_space_there() {
    let bench = open(WriteBack::OnEvict, 300 * KIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
    let other = vmem.put(bytes(2, 1, LEN), DISK).await.unwrap();
    let before = vmem.stats().disk.used_bytes;
    let pin = vmem.pin(&other, HOST).await.unwrap();
    let with_space = before + LEN as u64;
    eventually("its space is on disk", || vmem.stats().disk.used_bytes >= with_space).await;
    for _ in 0..3 {
        bench.devices[0].fail_next(1);
        vmem.demote(&handle, DISK).await.unwrap_err();
        assert!(vmem.stats().disk.used_bytes >= with_space, "it has space there again");
        assert_eq!(vmem.stats().vram_dirty_bytes, LEN as u64);
    }
    vmem.demote(&handle, DISK).await.unwrap();
    drop(pin);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, LEN));
    assert_all_back(bench, vec![handle, other]).await;
}

/// The lease took no space for its version, since the object had some.
#[tokio::test]
async fn pins_that_wait_for_a_lease_have_a_copy_in_host_memory() {
    for write_back in [WriteBack::OnEvict, WriteBack::After(Duration::from_secs(600))] {
        let bench = open(write_back, 4 * MIB, MIB);
        let vmem = &bench.vmem;
        let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
        run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
        let change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, 0, bytes(1, 3, LEN)).await;
        let pinning = vmem.pin(&handle, HOST);
        let mut pinning = Box::pin(pinning);
        assert!(futures::poll!(pinning.as_mut()).is_pending(), "the lease has it");
        tokio::time::sleep(Duration::from_millis(20)).await;
        finish(change).await.unwrap();
        let pin = pinning.await.unwrap();
        bench.devices[0].lose();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 3, LEN));
        drop(pin);
        assert_all_back(bench, vec![handle]).await;
    }
}

/// Mechanism: an object has one timer, and that of the version before slept for as long as the
/// policy says. Effect: a pinned object whose copy failed had none in host memory for all that
/// time. Fix: a timer is woken when its object is due earlier.
#[tokio::test]
async fn copies_that_fail_are_tried_again_soon_beside_a_timer_that_sleeps() {
    let bench = open(WriteBack::After(Duration::from_secs(600)), 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
    let pin = vmem.pin(&handle, HOST).await.unwrap();
    for version in 3..5 {
        let change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, 0, bytes(1, version, LEN)).await;
        bench.devices[0].fail_next(u64::MAX);
        finish(change).await.unwrap();
        assert_eq!(vmem.stats().vram_dirty_bytes, LEN as u64);
        let failed = vmem.read(&handle).await.unwrap_err();
        assert!(matches!(failed, VirtualMemoryError::Device { code: 719, .. }), "{failed:?}");
        bench.devices[0].fail_next(0);
        eventually("it is written back", || vmem.stats().vram_dirty_bytes == 0).await;
    }
    bench.devices[0].lose();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 4, LEN));
    drop(pin);
    assert_all_back(bench, vec![handle]).await;
}
