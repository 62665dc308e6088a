//! Every use of a device while its budget changes.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::VMemHandle;
use vmem::gpu::VramExt;
use vmem_cuda_emulator::{Emulator, Kind};

use super::{KIB, MIB, PAGE, open};
use crate::support::{HOST, VRAM, end_all, launch, plus, stream};

/// Kernels, promotions, evictions and reads, while the budget changes.
#[tokio::test]
async fn objects_are_whole_while_the_budget_changes_at_random() {
    let emulator = Emulator::load().unwrap();
    let given = std::env::var("VMEM_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut given_back = 0;
    for seed in given.map_or(0..4, |seed| seed..seed + 1) {
        println!("VMEM_SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        emulator.unmap_waits(seed % 2 == 1);
        let vmem = open().await;
        let stream = stream();
        let released = emulator.calls("cuMemRelease");
        emulator.delay(Kind::Kernel, 300);
        let mut objects: Vec<(VMemHandle, Vec<u8>)> = Vec::new();
        for n in 0..40_u8 {
            let longest = [64 * KIB, 2 * MIB, 5 * MIB][random.random_range(0..3)];
            let bytes = vec![n; random.random_range(1..longest)];
            let handle = vmem.put(bytes.clone(), HOST).await.unwrap();
            objects.push((handle, bytes));
        }
        let mut change = None;
        for _ in 0..300 {
            let at = random.random_range(0..objects.len());
            let (handle, bytes) = &mut objects[at];
            match random.random_range(0..12) {
                0..=5 => {
                    let lease = vmem.device_mut_on(handle, &stream).await.unwrap();
                    // SAFETY: the kernel is launched on the stream of the lease.
                    let address = unsafe { lease.device_ptr() };
                    launch("vmem_add", address, bytes.len() as u64, 1, &stream);
                    *bytes = plus(bytes, 1);
                }
                6..=7 => vmem.promote(handle, VRAM).await.unwrap(),
                8 => vmem.demote(handle, HOST).await.unwrap(),
                9 => assert!(vmem.read(handle).await.unwrap() == bytes[..], "{at}"),
                10 => {
                    let vmem = vmem.clone();
                    let wanted = random.random_range(4..40) * PAGE;
                    // The one before goes on, beside this one.
                    change = Some(tokio::spawn(async move {
                        vmem.set_vram_capacity(VRAM, wanted).await.map(|_| wanted)
                    }));
                }
                _ => {
                    if let Some(change) = change.take() {
                        let wanted = change.await.unwrap().unwrap();
                        assert_eq!(vmem.stats().vram.capacity_bytes, wanted);
                    }
                }
            }
        }
        if let Some(change) = change {
            change.await.unwrap().unwrap();
        }
        for (at, (handle, bytes)) in objects.iter().enumerate() {
            assert!(vmem.read(handle).await.unwrap() == bytes[..], "{at}");
        }
        let capacity = vmem.stats().vram.capacity_bytes;
        assert_eq!(emulator.counter("device_bytes"), capacity);
        emulator.delay(Kind::Kernel, 0);
        given_back += emulator.calls("cuMemRelease") - released;
        end_all(vmem, objects.into_iter().map(|(handle, _)| handle).collect(), &emulator).await;
    }
    assert!(given_back > 40, "{given_back} pages were given back");
}
