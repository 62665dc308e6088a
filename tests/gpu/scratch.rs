//! Scratch memory, and versions that stay on the device, under kernels on the emulated driver.
//!
//! Invariant: as in `leases`; nothing of scratch is copied down, and nothing of a version that
//! stays on the device before it is asked for.

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::result;
use vmem::{VirtualMemory, VirtualMemoryConfig, VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HOST, LEN, VRAM, bytes, end, launch, open, plus, stream, until};

#[tokio::test]
async fn scratch_is_zeros_and_not_reused_under_its_kernel() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    vmem.demote(&handle, HOST).await.unwrap();
    let mut scratch = vmem.allocate_scratch(LEN, &stream).await.unwrap();
    assert_eq!((scratch.len(), scratch.view_mut().len(), scratch.view().len()), (LEN, LEN, LEN));
    let mut copied = vec![1_u8; LEN];
    // SAFETY: read by the copy below, on the stream of the scratch.
    let address = unsafe { scratch.device_ptr() };
    // SAFETY: both are as long as the scratch; the memory of the vector is pageable, so the call
    // waits.
    unsafe { result::memcpy_dtoh_async(&mut copied, address, stream.cu_stream()) }.unwrap();
    assert!(copied == [0; LEN], "what was there is another's");
    let down = emulator.counter("bytes_down");
    let used = vmem.stats().vram.used_bytes;
    assert!(used >= LEN as u64);
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the scratch.
    launch("vmem_fill", unsafe { scratch.device_ptr() }, LEN as u64, 9, &stream);
    drop(scratch);
    // All that is free is taken, and none of it is what the kernel still writes to.
    let rest = vmem.allocate_scratch((4 << 20) - used as usize, &stream).await;
    let rest = rest.expect("the rest is free");
    assert_eq!(vmem.stats().vram.used_bytes, 4 << 20);
    emulator.release_all();
    until("the end of the kernel", || vmem.stats().vram.used_bytes < 4 << 20).await;
    drop(rest);
    let none = vmem.allocate_scratch(0, &stream).await.unwrap();
    assert!(none.is_empty());
    drop(none);
    let refused = vmem.allocate_scratch(5 << 20, &stream).await.unwrap_err();
    assert!(matches!(refused, VirtualMemoryError::ExceedsCapacity { .. }), "{refused:?}");
    assert_eq!(emulator.counter("bytes_down"), down, "nothing of it is anybody's");
    end(vmem, vec![handle], &emulator).await;
}

async fn open_lazy(vram: u64) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(vram)
        .max_pinned(1.0)
        .write_back(WriteBack::OnEvict);
    vmem::open(config.build().unwrap()).await.unwrap()
}

#[tokio::test]
async fn versions_of_kernels_stay_on_the_device() {
    let emulator = Emulator::load().unwrap();
    // More than the device holds, twice over.
    let vmem = open_lazy(4 << 20).await;
    let stream = stream();
    let mut handles = Vec::new();
    for object in 0..80 {
        handles.push(vmem.put(bytes(object), HOST).await.unwrap());
    }
    let down = emulator.counter("bytes_down");
    for _ in 0..20 {
        let mut lease = vmem.device_mut_on(&handles[0], &stream).await.unwrap();
        lease.touched(0..10).unwrap();
        // SAFETY: used by the kernel below, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        lease.finish().await.unwrap();
    }
    assert_eq!(emulator.counter("bytes_down"), down, "nothing has asked for it");
    for handle in &handles {
        let lease = vmem.device_mut_on(handle, &stream).await.unwrap();
        // SAFETY: as above.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        drop(lease);
    }
    for (object, handle) in (0..).zip(&handles) {
        let by = if object == 0 { 21 } else { 1 };
        assert!(vmem.read(handle).await.unwrap() == plus(&bytes(object), by), "object {object}");
    }
    vmem.flush_all().await.unwrap();
    assert_eq!(vmem.stats().vram_dirty_bytes, 0);
    end(vmem, handles, &emulator).await;
}

#[tokio::test]
async fn appends_of_kernels_move_about_as_much_as_they_write() {
    const BLOCK: usize = 1 << 20;
    const APPEND: usize = 4096;
    let emulator = Emulator::load().unwrap();
    for write_back in [WriteBack::Eager, WriteBack::OnEvict] {
        let config = VirtualMemoryConfig::builder()
            .host_capacity(16 << 20)
            .disk_capacity(64 << 20)
            .vram_capacity(4 << 20)
            .write_back(write_back);
        let vmem = vmem::open(config.build().unwrap()).await.unwrap();
        let stream = stream();
        let block = vmem.put(vec![0; BLOCK], HOST).await.unwrap();
        let down = emulator.counter("bytes_down");
        for nth in 0..1000 {
            let mut lease = vmem.device_mut_on(&block, &stream).await.unwrap();
            let start = nth * APPEND % BLOCK;
            lease.touched(start..start + APPEND).unwrap();
            // SAFETY: used by the kernel below, on the stream of the lease.
            let address = unsafe { lease.device_ptr() } + start as u64;
            launch("vmem_add", address, APPEND as u64, 1, &stream);
            lease.finish().await.unwrap();
        }
        let read = vmem.read(&block).await.unwrap();
        let times = |at: usize| if at / APPEND < 1000 % (BLOCK / APPEND) { 4 } else { 3 };
        assert!(read.iter().enumerate().all(|(at, byte)| *byte == times(at)));
        drop(read);
        let moved = emulator.counter("bytes_down") - down;
        assert!(moved <= 8 << 20, "{write_back:?}: {moved} bytes");
        end(vmem, vec![block], &emulator).await;
    }
}
