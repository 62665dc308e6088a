//! Two emulated GPUs in one store.
//!
//! Invariant: a lease is on the device of its stream, whichever device has the newest version.

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::CudaContext;
use vmem::{GpuSelection, MemoryTier, VirtualMemoryConfig};
use vmem_cuda_emulator::Emulator;

use crate::support::{HOST, LEN, VRAM, bytes, launch, plus};

/// Kernels on two GPUs change one object in turn: each lease is where its stream is, and what
/// one wrote the other reads.
#[tokio::test]
async fn leases_are_on_the_device_of_their_stream() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .gpus([GpuSelection::Device(0), GpuSelection::Device(1)]);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    assert_eq!(vmem.capabilities().devices.len(), 2);
    let streams = [0, 1].map(|gpu| CudaContext::new(gpu).unwrap().new_stream().unwrap());
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    for round in 0..10_u8 {
        let device = usize::from(round % 2);
        let lease = vmem.device_mut_on(&handle, &streams[device]).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &streams[device]);
        lease.finish().await.unwrap();
        let residency = vmem.residency(&handle).unwrap();
        let tiers = [VRAM, MemoryTier::of_device(1)];
        assert!(residency.is_in(tiers[device]) && !residency.is_in(tiers[1 - device]));
        let after = vmem.read(&handle).await.unwrap();
        assert!(after == plus(&bytes(3), round + 1), "round {round}");
    }
    let set = vmem.device_set(&streams[1]).read(&handle).acquire().await.unwrap();
    assert_eq!(set.read[0].len(), LEN);
    drop(set);
    drop(handle);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}
