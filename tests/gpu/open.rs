//! The store as a user opens it, on a machine whose driver is the emulated one.

use vmem::{GpuSelection, MemoryTier, VirtualMemoryConfig, VirtualMemoryError};
use vmem_cuda_emulator::Emulator;

fn config() -> vmem::VirtualMemoryConfigBuilder {
    VirtualMemoryConfig::builder().host_capacity(16 << 20).disk_capacity(64 << 20)
}

#[tokio::test]
async fn a_store_with_vram() {
    let emulator = Emulator::load().unwrap();
    let vmem = vmem::open(config().vram_capacity(8 << 20).build().unwrap()).await.unwrap();
    let told = vmem.capabilities().to_string();
    assert!(told.contains("vram: vmem emulated GPU (device 0), 8388608 bytes"), "{told}");
    assert_eq!(vmem.stats().vram.capacity_bytes, 8 << 20);
    assert_eq!(emulator.counter("registrations"), 1, "staging");

    let bytes: Vec<u8> = (0..1_000_000_u32).map(|at| (at >> 3) as u8).collect();
    let handle = vmem.put(&bytes, MemoryTier::Disk).await.unwrap();
    vmem.promote(&handle, MemoryTier::Vram).await.unwrap();
    assert_eq!(vmem.residency(&handle).unwrap().current_tier(), Some(MemoryTier::Vram));
    assert_eq!(emulator.counter("bytes_up"), 1_000_000 + 4096, "the object, and the trial");
    assert!(vmem.read(&handle).await.unwrap() == bytes);
    assert_eq!(emulator.counter("bytes_down"), 1_000_000 + 4096, "it was read from there");

    // A named object at home in device memory is durable on disk too.
    let named = vmem.put_named("weights", &bytes, MemoryTier::Vram).await.unwrap();
    vmem.flush(&named).await.unwrap();
    assert_eq!(named.home_tier(), MemoryTier::Vram);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
    let left = ["device_bytes", "streams", "events", "registrations", "contexts", "in_flight"]
        .map(|name| (name, emulator.counter(name)));
    assert!(left.iter().all(|(_, count)| *count == 0), "{left:?}");
}

#[tokio::test]
async fn a_store_without_vram_says_why() {
    let emulator = Emulator::load().unwrap();
    let off = config().gpu(GpuSelection::Off).build().unwrap();
    let vmem = vmem::open(off).await.unwrap();
    assert!(vmem.capabilities().to_string().contains("vram: none: switched off"));
    vmem.close().await.unwrap();

    emulator.devices(0);
    let vmem = vmem::open(config().build().unwrap()).await.unwrap();
    assert!(vmem.capabilities().vram_reason.contains("NO_DEVICE"));
    let error = vmem.allocate(10, MemoryTier::Vram).await.unwrap_err();
    assert!(error.to_string().contains("NO_DEVICE"), "{error}");
    vmem.close().await.unwrap();

    let asked = config().gpu(GpuSelection::Device(0)).build().unwrap();
    let error = vmem::open(asked).await.unwrap_err();
    assert!(
        matches!(error, VirtualMemoryError::TierNotAvailable { tier: MemoryTier::Vram, .. }),
        "{error:?}"
    );

    // Full of data of others.
    emulator.devices(1);
    emulator.others((256 << 20) - (1 << 20));
    let vmem = vmem::open(config().build().unwrap()).await.unwrap();
    assert!(vmem.capabilities().vram.is_none());
    assert!(vmem.capabilities().vram_reason.contains("1048576 bytes free"));
    vmem.close().await.unwrap();

    // Registration is refused: it works, more slowly, and says so.
    emulator.others(0);
    emulator.registered_max(0);
    let vmem = vmem::open(config().vram_capacity(8 << 20).build().unwrap()).await.unwrap();
    let told = vmem.capabilities().to_string();
    assert!(told.contains("staging is not registered"), "{told}");
    let handle = vmem.put(vec![7; 5000], MemoryTier::Disk).await.unwrap();
    vmem.promote(&handle, MemoryTier::Vram).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == [7; 5000][..]);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn a_percentage_of_device_memory_is_of_what_is_free() {
    let _emulator = Emulator::load().unwrap();
    let default = vmem::open(config().build().unwrap()).await.unwrap();
    let three_quarters = default.stats().vram.capacity_bytes;
    assert_eq!(default.config().vram_capacity(), Some(three_quarters));
    default.close().await.unwrap();
    let vmem = vmem::open(config().vram_percent(37.5).build().unwrap()).await.unwrap();
    let half = vmem.stats().vram.capacity_bytes;
    // Rounded down to what device memory is taken in.
    assert!(half <= three_quarters / 2 && half + (1 << 20) > three_quarters / 2, "{half}");
    assert_eq!(vmem.config().vram_capacity(), Some(half));
    assert_eq!(vmem.config().gpus(), [GpuSelection::Auto]);
    vmem.close().await.unwrap();
    let off = vmem::open(config().gpu(GpuSelection::Off).build().unwrap()).await.unwrap();
    assert_eq!(off.config().gpus(), [GpuSelection::Off]);
    off.close().await.unwrap();
}
