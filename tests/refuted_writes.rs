//! A write that was dropped changes nothing.
//!
//! A large write hands its version to a task, which publishes it under the gate. A task that did not look whether its
//! caller was still there could publish after the caller had gone and a later write had completed, so that reads
//! returned the older of the two. It looks with the gate held, directly before it publishes.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{DISK, HOST, KIB, MIB, MemDriver, STAGING, bytes, config};
use futures::FutureExt;
use vmem::backend::{Backends, DeviceAccess};
use vmem::{Capabilities, MemoryTier, VirtualMemory};
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

/// Too large to be written in place.
const LEN: usize = 300 * KIB;

fn open() -> VirtualMemory {
    let backends = Backends {
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
