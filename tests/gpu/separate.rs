//! An allocation of device memory for each object, so that a checker of memory sees where it ends.
//!
//! Invariant: the budget is that of the one block. The mode is that of a process, so that the test
//! runs in a child.

use std::process::Command;

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::{CudaContext, result};
use vmem::{MemoryTier, VirtualMemoryConfig};
use vmem_cuda_emulator::Emulator;

/// How device memory is allocated.
const MODE: &str = "VMEM_GPU_ALLOCATIONS";

/// The mode is read from the environment: a child has it, which is this test again.
#[test]
fn each_object_has_an_allocation() {
    if std::env::var_os(MODE).is_some() {
        return tokio::runtime::Runtime::new().unwrap().block_on(each_has_one());
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let test = format!("{module}::each_object_has_an_allocation");
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", &test]).env(MODE, "separate").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

async fn each_has_one() {
    let emulator = Emulator::load().unwrap();
    let len = 1000;
    let config = VirtualMemoryConfig::builder().vram_capacity(5 * 1024).host_capacity(64 << 20);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let before = emulator.counter("allocations");
    let bytes_before = emulator.counter("device_bytes");
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let mut objects = Vec::new();
    for object in 0..8_u8 {
        let handle = vmem.put(vec![object; len], MemoryTier::Host).await.unwrap();
        vmem.promote(&handle, MemoryTier::Vram).await.unwrap();
        objects.push(handle);
    }
    // Five fit the budget; the others left.
    assert_eq!(vmem.stats().vram.objects, 5);
    assert_eq!(emulator.counter("allocations") - before, 5);
    assert_eq!(emulator.counter("device_bytes") - bytes_before, 5 * len as u64, "to the byte");
    let lease = vmem.device_on(&objects[7], &stream).await.unwrap();
    // SAFETY: looked at by the copies below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    let mut bytes = vec![0_u8; len];
    // SAFETY: the object is that long, and the vector is alive until the copy has ended: it is
    // pageable.
    unsafe { result::memcpy_dtoh_async(&mut bytes, at, stream.cu_stream()) }.unwrap();
    assert_eq!(bytes, [7; 1000]);
    let mut more = vec![0_u8; len + 1];
    // SAFETY: a byte too many, which is what is to be seen.
    let seen = unsafe { result::memcpy_dtoh_async(&mut more, at, stream.cu_stream()) };
    assert!(seen.is_err(), "beyond its end there is nothing of the store's");
    emulator.sticky(0);
    drop(lease);
    stream.synchronize().unwrap();
    drop(objects);
    for _ in 0..2000 {
        if vmem.stats().vram.used_bytes == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(emulator.counter("allocations"), before);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}
