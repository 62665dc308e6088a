//! P7: bytes of metadata for each handle.

use tokio::runtime::Builder;
use vmem::{MemoryTier, VirtualMemoryConfig};

use crate::report::Report;

/// Resident memory of this process, in bytes.
pub(crate) fn resident_bytes() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = status.split(' ').nth(1).unwrap_or("0").parse()?;
    Ok(pages * 4096.0)
}

/// Which half of the measurement a child process is to do, and over how many objects.
const CHILD: &str = "VMEM_BENCH_P7_CHILD";

/// Objects of 64 bytes, in host memory and on disk: what is resident beyond their bytes. The vector
/// of handles (8 bytes each) counts, as a caller has it too. Each half runs in a process of its
/// own, since memory that an earlier bar gave back would hide what is taken.
pub(crate) fn p7(report: &mut Report, count: usize) -> anyhow::Result<()> {
    for (what, bar) in [("host", 256.0), ("disk", 160.0)] {
        let child = std::process::Command::new(std::env::current_exe()?)
            .env(CHILD, format!("{what} {count}"))
            .output()?;
        let printed = String::from_utf8(child.stdout)?;
        let used: f64 = printed.trim().parse()?;
        let what = format!("metadata of a {what}-resident object of 64 bytes, {count} handles");
        report.figure("P7", &what, used, "bytes", bar);
    }
    Ok(())
}

/// Does a half, if this is a child process. True if it was.
pub(crate) fn child() -> anyhow::Result<bool> {
    let Ok(half) = std::env::var(CHILD) else { return Ok(false) };
    let (what, count) = half.split_once(' ').unwrap_or(("host", "1000"));
    let (home, payload) =
        if what == "host" { (MemoryTier::Host, 64.0) } else { (MemoryTier::Disk, 0.0) };
    println!("{}", metadata(home, payload, count.parse()?)?);
    Ok(true)
}

/// Bytes beyond the payload for each of `count` objects at home in this tier.
fn metadata(home: MemoryTier, payload: f64, count: usize) -> anyhow::Result<f64> {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
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
        Ok((after - before) / count as f64 - payload)
    })
}
