//! The waiters for device memory are woken by each event that makes some usable.
//!
//! The last user of a copy may be a lane of the device, a kernel's watch or a caller on any thread;
//! in each case the waiter waits for the end of its share. A drop that wakes no waiter leaves it
//! asleep until its deadline.

use std::sync::Arc;
use std::time::Duration;

use vmem::backend::{Backends, DeviceAccess};
use vmem::{Capabilities, MemoryTier, VirtualMemory, VirtualMemoryError};
use vmem_io::DiskTier;
use vmem_testkit::SimDevice;

use crate::support::{HOST, KIB, MIB, MemDriver, STAGING, bytes, config};

const VRAM: MemoryTier = MemoryTier::Vram;
/// Long after any answer that does not come from a deadline.
const DEADLINE: Duration = Duration::from_secs(60);
/// What may be late on a loaded machine is not a minute late.
const HANG: Duration = Duration::from_secs(30);

fn open(vram: usize) -> VirtualMemory {
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (4 * MIB + STAGING) as u64,
        disk: DiskTier::new(MemDriver::new(), 64 * MIB as u64),
        catalog: None,
        devices: vec![Arc::new(SimDevice::new(vram as u64))],
        capabilities: Capabilities::new("memory".into(), "".into()),
    };
    let config = config(4 * MIB, |builder| builder.wait_timeout(DEADLINE));
    VirtualMemory::with_backends(&config, backends).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_drop_of_a_share_wakes_the_waiter_on_whatever_thread() {
    let vmem = open(128 * KIB);
    let used = vmem.put(bytes(1, 1, 100 * KIB), HOST).await.unwrap();
    let other = vmem.put(bytes(2, 1, 100 * KIB), HOST).await.unwrap();
    for round in 0..8 {
        vmem.promote(&used, VRAM).await.unwrap();
        let share = DeviceAccess::all(&vmem)
            .next()
            .unwrap()
            .share(&used)
            .unwrap()
            .expect("it is in device memory");
        let range = share.range();
        let waiter = tokio::spawn({
            let vmem = vmem.clone();
            let other = other.clone();
            async move { vmem.promote(&other, VRAM).await }
        });
        while vmem.stats().waiters == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(share);
        // The operation that has it ends somewhere else.
        std::thread::spawn(move || drop(range)).join().unwrap();
        let woken = tokio::time::timeout(HANG, waiter).await;
        woken
            .unwrap_or_else(|_| panic!("round {round}: the waiter was not woken"))
            .unwrap()
            .unwrap();
    }
    drop((used, other));
    vmem.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_that_waits_for_space_is_refused_by_the_close() {
    let vmem = open(128 * KIB);
    let used = vmem.put(bytes(1, 1, 100 * KIB), HOST).await.unwrap();
    let other = vmem.put(bytes(2, 1, 100 * KIB), HOST).await.unwrap();
    vmem.promote(&used, VRAM).await.unwrap();
    let device = DeviceAccess::all(&vmem).next().unwrap();
    let share = device.share(&used).unwrap().expect("it is in device memory");
    let waiter = tokio::spawn(async move { device.hold(&other).await.map(drop) });
    while vmem.stats().waiters == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let closing = tokio::spawn(vmem.close());
    let refused = tokio::time::timeout(HANG, waiter).await.expect("it learns of the close");
    assert!(matches!(refused.unwrap(), Err(VirtualMemoryError::Closed)));
    drop((share, used));
    closing.await.unwrap().unwrap();
}
