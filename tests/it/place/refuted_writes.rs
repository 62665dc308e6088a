//! A write that was dropped changes nothing, and none takes a pinned object away.
//!
//! A large write hands its version to a task, which publishes it under the gate. A task that did
//! not look whether its caller was still there could publish after the caller had gone and a later
//! write had completed, so that reads returned the older of the two. It looks with the gate held,
//! directly before it publishes.
//!
//! A write that went to disk while nothing pinned the object published there whatever had been
//! pinned meanwhile, and brought the object back behind it: until then, or for good where space was
//! short, its guard kept nothing.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use vmem::backend::{Backends, DeviceAccess};
use vmem::{Capabilities, MemoryTier, VirtualMemory};
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, Op, STAGING, bytes, config};

/// Too large to be written in place.
const LEN: usize = 300 * KIB;

fn open() -> VirtualMemory {
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (4 * MIB + STAGING) as u64,
        disk: DiskTier::new(MemDriver::new(), 64 * MIB as u64),
        catalog: None,
        devices: vec![Arc::new(SimDevice::new(MIB as u64))],
        capabilities: Capabilities::new("memory".into(), "".into()),
    };
    VirtualMemory::with_backends(&config(4 * MIB, |builder| builder), backends).unwrap()
}

/// One thread, and no await between the drop and the later write: the task has had no turn by then.
#[tokio::test]
async fn dropped_write_is_not_published_over_a_later_one() {
    let vmem = open();
    let handle = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    vmem.promote(&handle, MemoryTier::Vram).await.unwrap();
    // Holds the gate, as a kernel's lease does.
    let change = DeviceAccess::all(&vmem).next().unwrap().change(&handle, false).await.unwrap();
    let dropped = bytes(1, 2, LEN);
    let mut write = Box::pin(vmem.write(&handle, &dropped));
    // It copies its data, and hands the version to a task, which has not run.
    for _ in 0..8 {
        assert!((&mut write).now_or_never().is_none());
    }
    drop(change);
    drop(write);
    vmem.write_at(&handle, 7, [9; 100]).now_or_never().expect("the gate is open").unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let mut expected = bytes(1, 1, LEN);
    expected[7..107].fill(9);
    assert!(vmem.read(&handle).await.unwrap() == expected, "the later write is what is read");
    vmem.demote(&handle, DISK).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == expected);
    drop(handle);
    vmem.close().await.unwrap();
}

/// The object is on disk, as is the write, when it is pinned; what was pinned then stays in host
/// memory.
#[tokio::test(start_paused = true)]
async fn write_on_its_way_to_disk_does_not_take_a_pinned_object_away() {
    let (vmem, driver) = support::open(MIB, 64 * MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let slow = |op| Duration::from_secs(if op == Op::Write { 1 } else { 0 });
    driver.delay(slow);
    let writes = driver.writes();
    let (written, pinned) = tokio::join!(vmem.write(&handle, bytes(1, 2, LEN)), async {
        while driver.writes() == writes && driver.in_flight() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let guard = vmem.pin(&handle, HOST).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN), "not published yet");
        guard
    });
    written.unwrap();
    let residency = vmem.residency(&handle).unwrap();
    assert!(residency.host && residency.pins == 1, "{residency:?}");
    assert!(vmem.try_read(&handle).is_some_and(|read| read == bytes(1, 2, LEN)));
    drop(pinned);
    drop(handle);
    vmem.close().await.unwrap();
}
