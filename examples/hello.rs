//! Stores an object, sends it down to disk, and reads a part of it from wherever it is.

use vmem::{MemoryTier, VirtualMemoryConfig, VirtualMemoryError};

#[tokio::main]
async fn main() -> Result<(), VirtualMemoryError> {
    // Budgets in bytes. The data file lies in a private temporary directory.
    let config = VirtualMemoryConfig::builder().host_capacity(64 << 20).disk_capacity(1 << 30);
    let vmem = vmem::open(config.build()?).await?;

    let handle = vmem.put(b"an embedding", MemoryTier::Host).await?;
    vmem.demote(&handle, MemoryTier::Disk).await?;

    let prefetch = vmem.prefetch(&handle, MemoryTier::Host); // has begun; dropping it cancels it
    let part = vmem.read_at(&handle, 3..12).await?; // a `Bytes`, from host memory or from disk
    assert_eq!(&part[..], b"embedding");
    prefetch.await?;

    println!("now in {:?}", vmem.residency(&handle)?.current_tier());
    vmem.close().await
}
