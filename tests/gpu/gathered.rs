//! Gathers that bring objects to device memory, on the emulated driver.
//!
//! Invariant: what a gather reads from host memory or disk counts, what the device has does not;
//! and once the object has come no byte of it is copied to the device again.

use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_cuda_emulator::Emulator;

use crate::support::{DISK, HANGS, HOST, LEN, bytes, end, stream, until};

async fn open(vram: u64, nth: u32) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(vram)
        .promotion(Promotion::Never)
        .gather_promotion(Promotion::OnNthGather(nth))
        .wait_timeout(HANGS);
    vmem::open(config.build().unwrap()).await.unwrap()
}

fn is_on_device(vmem: &VirtualMemory, handle: &VMemHandle) -> bool {
    vmem.residency(handle).unwrap().vram
}

/// Waits until nothing moves.
async fn quiet(vmem: &VirtualMemory) {
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    until("the end of all migrations", || vmem.stats().migrations_in_flight == 0).await;
}

#[tokio::test]
async fn third_gather_promotes_and_the_fourth_copies_within_the_device() {
    let emulator = Emulator::load().unwrap();
    for below in [HOST, DISK] {
        let vmem = open(1 << 20, 3).await;
        let stream = stream();
        let handles =
            [vmem.put(bytes(1), HOST).await.unwrap(), vmem.put(bytes(2), HOST).await.unwrap()];
        for handle in &handles {
            vmem.demote(handle, below).await.unwrap();
        }
        let mut buffer = stream.alloc_zeros::<u8>(2 * LEN).unwrap();
        let target = DeviceTarget::from_slice(&mut buffer);
        let pieces = [(&handles[0], 0..LEN, 0), (&handles[1], 0..LEN, LEN)];
        for nth in 1..=3 {
            assert!(!handles.iter().any(|handle| is_on_device(&vmem, handle)), "gather {nth}");
            vmem.gather(&pieces, &target).await.unwrap();
            if nth < 3 {
                quiet(&vmem).await;
            }
        }
        until("both", || handles.iter().all(|handle| is_on_device(&vmem, handle))).await;
        let up = emulator.counter("bytes_up");
        vmem.gather(&pieces, &target).await.unwrap();
        assert_eq!(emulator.counter("bytes_up"), up, "the device has both");
        drop(target);
        let got = stream.clone_dtoh(&buffer).unwrap();
        assert!(got[..LEN] == bytes(1) && got[LEN..] == bytes(2));
        drop(buffer);
        end(vmem, handles.into(), &emulator).await;
    }
}

/// Rows of one object count by their bytes, in one call or in several.
#[tokio::test]
async fn rows_of_an_object_count_by_their_bytes() {
    const ROW: usize = LEN / 10;
    let emulator = Emulator::load().unwrap();
    let vmem = open(1 << 20, 2).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
    let target = DeviceTarget::from_slice(&mut buffer);
    let row = |n: usize| (&handle, n * ROW..(n + 1) * ROW, n * ROW);
    for _ in 0..5 {
        vmem.gather(&[row(1), row(7)], &target).await.unwrap();
        quiet(&vmem).await;
        assert!(!is_on_device(&vmem, &handle));
    }
    vmem.gather(&[row(2)], &target).await.unwrap();
    until("the object", || is_on_device(&vmem, &handle)).await;
    drop(target);
    drop(buffer);
    end(vmem, vec![handle], &emulator).await;
}
