//! Leases of several objects, taken all at once, beside others that want the same.
//!
//! Excluded: a range that goes to another object of the set, a stale copy on a sibling, a busy core
//! while a kernel or a budget is waited for, a set that can never fit and waits nevertheless, and
//! copies of one set, or of several, that wait for each other. Noticed by the lengths of ranges, by
//! the processor time of the thread, by the errors, and by what a device that stands still has.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use vmem::backend::{Backends, DeviceAccess};
use vmem::{
    Capabilities, MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder,
    VirtualMemoryError,
};
use vmem_io::DiskTier;
use vmem_testkit::{SimDevice, thread_cpu};

use crate::support::{self, HOST, KIB, MIB, MemDriver, STAGING, config};

const VRAM: MemoryTier = MemoryTier::Vram;
/// A core that is busy for half of the time is busy.
const WATCHED: Duration = Duration::from_millis(400);

fn open(host: usize, vram: &[usize], wait: Duration) -> (VirtualMemory, Vec<SimDevice>) {
    let devices: Vec<_> = vram.iter().map(|&bytes| SimDevice::new(bytes as u64)).collect();
    let backends = devices.iter().map(|device| Arc::new(device.clone()) as Arc<_>);
    let set = |b: VirtualMemoryConfigBuilder| b.max_pinned(1.0).wait_timeout(wait);
    let (vmem, _) = support::open_below(backends, host, 64 * MIB, set);
    (vmem, devices)
}

fn access(vmem: &VirtualMemory, device: usize) -> DeviceAccess {
    DeviceAccess::all(vmem).nth(device).unwrap()
}

/// On a runtime of one thread, which is the one of the test: what runs beside it does not count.
async fn assert_idle(what: &str) {
    let before = thread_cpu();
    tokio::time::sleep(WATCHED).await;
    let busy = thread_cpu() - before;
    assert!(busy < WATCHED / 2, "{what}: busy for {busy:?} of {WATCHED:?}");
}

/// One object of a set is promoted by another task while the set waits for space.
async fn ranges_fit(set: fn(&VMemHandle, &VMemHandle) -> Vec<VMemHandle>, promoted_first: bool) {
    let (vmem, _devices) = open(8 * MIB, &[576 * KIB], Duration::from_secs(20));
    let in_the_way = vmem.put(vec![1; 320 * KIB], HOST).await.unwrap();
    let large = vmem.put(vec![2; 256 * KIB], HOST).await.unwrap();
    let small = vmem.put(vec![3; 64 * KIB], HOST).await.unwrap();
    let hold = access(&vmem, 0).hold(&in_the_way).await.unwrap();
    let device = access(&vmem, 0);
    let asked = set(&large, &small);
    let waiting =
        tokio::spawn(async move { device.set(&asked, &[]).await.map(|set| (set, asked)) });
    while vmem.stats().waiters == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let other = if promoted_first { &large } else { &small };
    vmem.promote(other, VRAM).await.unwrap();
    drop(hold);
    let (set, asked) = waiting.await.unwrap().unwrap();
    for (hold, handle) in set.reads.iter().zip(&asked) {
        assert_eq!(hold.range().unwrap().len(), handle.len(), "a range of another object");
    }
    drop(set);
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_object_of_a_set_has_a_range_of_its_own() {
    let large_first = |large: &VMemHandle, small: &VMemHandle| vec![large.clone(), small.clone()];
    let small_first = |large: &VMemHandle, small: &VMemHandle| vec![small.clone(), large.clone()];
    ranges_fit(large_first, true).await;
    ranges_fit(large_first, false).await;
    ranges_fit(small_first, true).await;
    ranges_fit(small_first, false).await;
}

#[tokio::test]
async fn no_sibling_shares_the_version_before_one_that_is_pending() {
    let (vmem, _devices) = open(8 * MIB, &[MIB, MIB], Duration::from_secs(20));
    let handle = vmem.put(vec![1; 64 * KIB], HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    vmem.promote(&handle, MemoryTier::of_device(1)).await.unwrap();
    let change = access(&vmem, 0).change(&handle, false).await.unwrap();
    let (ended, kernel) = tokio::sync::oneshot::channel::<()>();
    let ready = async move {
        let _ = kernel.await;
        Ok(())
    };
    let finished = tokio::spawn(change.finish(ready.boxed(), None));
    assert!(access(&vmem, 1).share(&handle).unwrap().is_none(), "the previous version");
    assert!(!vmem.residency(&handle).unwrap().is_in(MemoryTier::of_device(1)));
    ended.send(()).unwrap();
    finished.await.unwrap().unwrap();
    assert!(access(&vmem, 0).share(&handle).unwrap().is_some());
    assert!(access(&vmem, 1).share(&handle).unwrap().is_none());
    drop(handle);
    vmem.close().await.unwrap();
}

/// Several writers behind one reader, and a device that is lost while a large request has kept
/// others from passing.
#[tokio::test]
async fn waiting_for_kernels_and_for_a_lost_device_costs_nothing() {
    let (vmem, _devices) = open(8 * MIB, &[MIB], Duration::from_secs(20));
    let handle = vmem.put(vec![1; 64 * KIB], HOST).await.unwrap();
    let share = access(&vmem, 0).hold(&handle).await.unwrap().end();
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let device = access(&vmem, 0);
            let handle = handle.clone();
            tokio::spawn(async move { device.change(&handle, false).await.map(drop) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_idle("eight writers behind one kernel").await;
    drop(share);
    for writer in writers {
        writer.await.unwrap().unwrap();
    }
    drop(handle);
    vmem.close().await.unwrap();

    let (vmem, devices) = open(8 * MIB, &[MIB], Duration::from_secs(20));
    let held = vmem.put(vec![1; 512 * KIB], HOST).await.unwrap();
    let _hold = access(&vmem, 0).hold(&held).await.unwrap();
    let large = vmem.put(vec![1; 600 * KIB], HOST).await.unwrap();
    let promotion = |handle: VMemHandle| {
        let vmem = vmem.clone();
        tokio::spawn(async move { vmem.promote(&handle, VRAM).await })
    };
    let mut waiting = vec![promotion(large)];
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..64 {
        let small = vmem.put(vec![2; 4 * KIB], HOST).await.unwrap();
        vmem.promote(&small, VRAM).await.unwrap();
    }
    waiting.push(promotion(vmem.put(vec![2; 4 * KIB], HOST).await.unwrap()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    devices[0].lose();
    for one in waiting {
        let refused = one.await.unwrap().unwrap_err();
        assert!(matches!(refused, VirtualMemoryError::TierNotAvailable { .. }), "{refused:?}");
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_idle("after the loss of a device").await;
}

#[tokio::test]
async fn sets_that_can_never_be_there_are_refused_at_once() {
    let wait = Duration::from_secs(20);
    let (vmem, _devices) = open(MIB, &[4 * MIB], wait);
    let mut many = Vec::new();
    for _ in 0..30 {
        many.push(vmem.put(vec![1; 33 * KIB], HOST).await.unwrap());
    }
    let asked = Instant::now();
    let refused = access(&vmem, 0).set(&[], &many).await.unwrap_err();
    assert!(
        matches!(refused, VirtualMemoryError::ExceedsCapacity { tier: HOST, .. }),
        "{refused:?}"
    );
    let twice = access(&vmem, 0).set(&many[..1], &many[..1]).await.unwrap_err();
    assert!(matches!(twice, VirtualMemoryError::InvalidConfig { .. }), "{twice:?}");
    let twice = [many[0].clone(), many[0].clone()];
    let twice = access(&vmem, 0).set(&[], &twice).await.unwrap_err();
    assert!(matches!(twice, VirtualMemoryError::InvalidConfig { .. }), "{twice:?}");
    assert!(asked.elapsed() < wait, "none of them waits");
}

#[tokio::test]
async fn an_empty_object_takes_nothing_of_a_full_budget() {
    let (vmem, _devices) = open(8 * MIB, &[256 * KIB], Duration::from_secs(20));
    let full = vmem.put(vec![1; 256 * KIB], HOST).await.unwrap();
    let empty = vmem.put(vec![], HOST).await.unwrap();
    let set = access(&vmem, 0).set(&[full, empty], &[]).await.unwrap();
    assert!(set.reads[0].range().is_some() && set.reads[1].range().is_none());
    drop(set);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn more_devices_than_can_be_told_apart_are_refused() {
    let devices = [4 * KIB; 33].map(|bytes| Arc::new(SimDevice::new(bytes as u64)) as Arc<_>);
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (MIB + STAGING) as u64,
        disk: DiskTier::new(MemDriver::new(), MIB as u64),
        catalog: None,
        devices: devices.into(),
        capabilities: Capabilities::new("memory".into(), "".into()),
    };
    let refused = VirtualMemory::with_backends(&config(MIB, |builder| builder), backends);
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, VirtualMemoryError::InvalidConfig { field: "gpus", .. }),
        "{refused:?}"
    );
}

/// All copies of a set are handed to the device before the first of them has ended.
#[tokio::test]
async fn copies_of_a_set_are_under_way_together() {
    const OBJECTS: usize = 12;
    let (vmem, devices) = open(8 * MIB, &[MIB], Duration::from_secs(60));
    let mut handles = Vec::new();
    for n in 0..OBJECTS {
        handles.push(vmem.put(vec![n as u8; 4 * KIB], HOST).await.unwrap());
    }
    devices[0].hold();
    let device = access(&vmem, 0);
    let writes = handles.split_off(OBJECTS / 2);
    let reads = handles;
    let set = tokio::spawn(async move { device.set(&reads, &writes).await });
    support::eventually("all copies", || devices[0].in_flight() == OBJECTS).await;
    // All or nothing: the last of them counts.
    devices[0].release(OBJECTS as u64 - 1);
    support::eventually("one copy is left", || devices[0].in_flight() == 1).await;
    assert!(!set.is_finished());
    devices[0].release_all();
    let set = set.await.unwrap().unwrap();
    assert_eq!((set.reads.len(), set.writes.len()), (OBJECTS / 2, OBJECTS / 2));
    drop(set);
    vmem.close().await.unwrap();
}

/// Sets over other objects do not wait for each other's copies; nor do those of single objects.
#[tokio::test]
async fn sets_over_other_objects_are_promoted_at_once() {
    const SETS: usize = 6;
    for each in [1, 3] {
        let (vmem, devices) = open(8 * MIB, &[MIB], Duration::from_secs(60));
        devices[0].hold();
        let mut sets = Vec::new();
        for n in 0..SETS {
            let mut handles = Vec::new();
            for _ in 0..each {
                handles.push(vmem.put(vec![n as u8; 4 * KIB], HOST).await.unwrap());
            }
            let device = access(&vmem, 0);
            sets.push(tokio::spawn(async move { device.set(&handles, &[]).await.map(drop) }));
        }
        support::eventually("copies of all", || devices[0].in_flight() == SETS * each).await;
        assert!(sets.iter().all(|set| !set.is_finished()));
        devices[0].release_all();
        for set in sets {
            set.await.unwrap().unwrap();
        }
        vmem.close().await.unwrap();
    }
}
