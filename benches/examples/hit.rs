//! Reads one resident object many times: what `scripts/hit-instructions.sh` counts.
use vmem::{MemoryTier, VirtualMemoryConfig};
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), vmem::VirtualMemoryError> {
    let reads: u32 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(200_000);
    let config = VirtualMemoryConfig::builder()
        .host_capacity(64 << 20)
        .disk_capacity(64 << 20)
        .gpu(vmem::GpuSelection::Off);
    let vmem = vmem::open(config.build()?).await?;
    let handle = vmem.put(vec![7; 4096], MemoryTier::Host).await?;
    let mut sum = 0_usize;
    for _ in 0..reads {
        sum += vmem.read(&handle).await?.len();
    }
    assert_eq!(sum, reads as usize * 4096);
    vmem.close().await?;
    Ok(())
}
