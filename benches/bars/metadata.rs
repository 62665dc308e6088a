//! P7: bytes of metadata for each handle.

use tokio::runtime::Builder;
use vmem::{MemoryTier, VirtualMemoryConfig};

use crate::report::Report;

/// Resident memory of this process, in bytes.
fn resident_bytes() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = status.split(' ').nth(1).unwrap_or("0").parse()?;
    Ok(pages * 4096.0)
}

/// Objects of 64 bytes, in host memory and on disk: what is resident beyond their bytes. The vector of
/// handles (8 bytes each) counts, as a caller has it too.
pub(crate) fn p7(report: &mut Report, count: usize) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for (what, home, payload, bar) in [
        ("host-resident", MemoryTier::Host, 64.0, 256.0),
        ("disk-resident", MemoryTier::Disk, 0.0, 160.0),
    ] {
        let used = runtime.block_on(async {
            let config = VirtualMemoryConfig::builder()
                .host_capacity(count as u64 * 64 * 2 + (16 << 20))
                .staging_capacity(1 << 20)
                .disk_capacity(count as u64 * 512 + (64 << 20))
                .build()?;
            let vmem = vmem::open(config).await?;
            let before = resident_bytes()?;
            let mut handles = Vec::with_capacity(count);
            for _ in 0..count {
                let handle = vmem.allocate(64, home).await?;
                if home == MemoryTier::Host {
                    vmem.write(&handle, [1; 64]).await?;
                }
                handles.push(handle);
            }
            let after = resident_bytes()?;
            vmem.clone().close().await?;
            drop(handles);
            anyhow::Ok((after - before) / count as f64 - payload)
        })?;
        let what = format!("metadata of a {what} object of 64 bytes, {count} handles");
        report.figure("P7", &what, used, "bytes", bar);
    }
    Ok(())
}
