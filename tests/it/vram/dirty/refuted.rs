//! What a reader of the code found: leases beside reads, pins, overwrites, and copies that fail.
//!
//! Excluded: two versions in one object, a healthy version that is reported as lost, a pin that a
//! lease undoes, and space or a timer that one failure takes away.

use std::time::Duration;

use vmem::{VirtualMemoryError, WriteBack};

use super::{access, assert_all_back, change, finish, is_lost, open, run_kernel, write_by_kernel};
use crate::support::{DISK, HOST, KIB, MIB, bytes, eventually, settle};

const LEN: usize = 200 * KIB;

#[tokio::test]
async fn overwriting_leases_that_touch_a_part_publish_zeros_around_it() {
    for write_back in [WriteBack::Eager, WriteBack::OnEvict] {
        let bench = open(write_back, 4 * MIB, MIB);
        let vmem = &bench.vmem;
        let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
        run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
        let mut change = access(vmem, 0).change(&handle, true).await.unwrap();
        change.touched(0..100).unwrap();
        write_by_kernel(vmem, 0, &change, 0, vec![7; 100]).await;
        finish(change).await.unwrap();
        let mut expected = vec![0; LEN];
        expected[..100].fill(7);
        for _ in 0..2 {
            assert!(vmem.read(&handle).await.unwrap() == expected, "{write_back:?}");
            vmem.demote(&handle, DISK).await.unwrap();
        }
        assert_all_back(bench, vec![handle]).await;
    }
}

#[tokio::test]
async fn reads_under_a_lease_wait_for_its_end() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    for version in [3, 4] {
        run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
        let change = change(vmem, &handle).await;
        let reads = (0..4).map(|way| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            tokio::spawn(async move {
                let mut buf = vec![0; LEN];
                match way {
                    0 => Ok(vmem.read(&handle).await?.to_vec()),
                    1 => Ok(vmem.read_at(&handle, 0..LEN).await?.to_vec()),
                    2 => Ok(vmem.read_many([&handle]).await?[0].to_vec()),
                    _ => vmem.read_into(&handle, 0..LEN, &mut buf).await.map(|()| buf),
                }
            })
        });
        let reads: Vec<_> = reads.collect();
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(reads.iter().all(|read| !read.is_finished()), "the lease has the only copy");
        let expected = if version == 3 {
            // Nobody has used it.
            drop(change);
            bytes(1, 2, LEN)
        } else {
            write_by_kernel(vmem, 0, &change, 0, bytes(1, version, LEN)).await;
            finish(change).await.unwrap();
            bytes(1, version, LEN)
        };
        for read in reads {
            assert!(read.await.unwrap().unwrap() == expected);
        }
    }
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn pinned_objects_stay_in_host_memory_under_leases() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let pin = vmem.pin(&handle, HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
    assert!(vmem.residency(&handle).unwrap().host);
    assert_eq!(vmem.stats().vram_dirty_bytes, 0);
    let written = vmem.write_at(&handle, 0, [1; 10]);
    tokio::time::timeout(Duration::from_secs(5), written).await.unwrap().unwrap();
    bench.devices[0].lose();
    assert!(vmem.read(&handle).await.unwrap()[10..] == bytes(1, 2, LEN)[10..]);
    drop(pin);
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn overwriting_leases_that_are_given_up_keep_the_version() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    for round in 0..12_u64 {
        run_kernel(vmem, &handle, bytes(1, 2 + round, LEN)).await;
        if round % 3 == 0 {
            drop(access(vmem, 0).change(&handle, true).await.unwrap());
        } else {
            bench.devices[0].hold();
            let used = vmem.stats().host.used_bytes;
            let device = access(vmem, 0);
            let asked = device.change(&handle, true);
            let left = tokio::time::timeout(Duration::from_millis(5 * round), asked).await;
            assert!(left.is_err(), "the device stands still");
            bench.devices[0].release_all();
            eventually("it has space below again", || {
                let stats = vmem.stats();
                stats.host.used_bytes == used || stats.disk.used_bytes >= LEN as u64
            })
            .await;
        }
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2 + round, LEN), "{round}");
    }
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn copies_that_fail_cost_no_floor() {
    let bench = open(WriteBack::OnEvict, 300 * KIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
    let used = vmem.stats().host.used_bytes;
    assert!(used >= LEN as u64);
    for _ in 0..3 {
        bench.devices[0].fail_next(1);
        let failed = vmem.read(&handle).await;
        assert!(matches!(failed, Err(VirtualMemoryError::Device { code: 719, .. })), "{failed:?}");
        assert_eq!(vmem.stats().host.used_bytes, used);
    }
    // Nothing else has space in host memory, and a read that needs it there has.
    let pin = vmem.pin(&handle, HOST).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, LEN));
    drop(pin);
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn timers_try_again_what_has_failed() {
    let bench = open(WriteBack::After(Duration::from_millis(20)), 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, LEN)).await;
    bench.devices[0].fail_next(1);
    let errors = vmem.stats().errors;
    eventually("a copy fails", || vmem.stats().errors > errors).await;
    eventually("it is written back", || vmem.stats().vram_dirty_bytes == 0).await;
    bench.devices[0].lose();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, LEN));
    assert!(!is_lost(&vmem.promote(&handle, super::VRAM).await.unwrap_err()));
    assert_all_back(bench, vec![handle]).await;
}

#[tokio::test]
async fn timers_of_lost_versions_end() {
    let bench = open(WriteBack::After(Duration::from_millis(1)), 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let mut handles = Vec::new();
    let mut changes = Vec::new();
    for object in 1..=4 {
        let handle = vmem.put(bytes(object, 1, 9000), HOST).await.unwrap();
        let change = change(vmem, &handle).await;
        write_by_kernel(vmem, 0, &change, 0, bytes(object, 2, 9000)).await;
        changes.push(change);
        handles.push(handle);
    }
    let metrics = tokio::runtime::Handle::current().metrics();
    settle(vmem, &bench.driver).await;
    let tasks = metrics.num_alive_tasks();
    bench.devices[0].hold();
    for change in changes {
        finish(change).await.unwrap();
    }
    eventually("the timers run", || metrics.num_alive_tasks() > tasks).await;
    bench.devices[0].lose();
    bench.devices[0].release_all();
    eventually("the timers end", || metrics.num_alive_tasks() <= tasks).await;
    for handle in &handles {
        assert!(is_lost(&vmem.read(handle).await.unwrap_err()));
    }
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn pauses_without_end_are_no_times() {
    let bench = open(WriteBack::After(Duration::MAX), 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let handle = vmem.put(bytes(1, 1, 9000), HOST).await.unwrap();
    run_kernel(vmem, &handle, bytes(1, 2, 9000)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(vmem.stats().vram_dirty_bytes, 9000);
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, 9000));
    assert_all_back(bench, vec![handle]).await;
}

/// Nothing on the device can be copied, and a request waits for its memory.
#[tokio::test]
async fn device_that_copies_nothing_keeps_no_core_busy() {
    let bench = open(WriteBack::OnEvict, 4 * MIB, MIB);
    let vmem = &bench.vmem;
    let mut handles = Vec::new();
    for object in 1..=5 {
        let handle = vmem.put(bytes(object, 1, LEN), HOST).await.unwrap();
        run_kernel(vmem, &handle, bytes(object, 2, LEN)).await;
        handles.push(handle);
    }
    bench.devices[0].fail_next(u64::MAX);
    let other = vmem.put(bytes(9, 1, LEN), HOST).await.unwrap();
    let refused = vmem.promote(&other, super::VRAM).await;
    assert!(matches!(refused, Err(VirtualMemoryError::TierFull { .. })), "{refused:?}");
    let errors = vmem.stats().errors;
    assert!(errors < 100, "{errors} copies were tried for one request");
    bench.devices[0].fail_next(0);
    for (object, handle) in (1..).zip(&handles) {
        assert!(vmem.read(handle).await.unwrap() == bytes(object, 2, LEN));
    }
    handles.push(other);
    assert_all_back(bench, handles).await;
}
