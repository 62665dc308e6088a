//! P6: allocating under pressure, with few handles and with many.

use std::time::Instant;

use tokio::runtime::Builder;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds};

/// Allocations that are timed in one round.
const TIMED: usize = 20_000;

struct Filled {
    vmem: VirtualMemory,
    handles: Vec<VMemHandle>,
}

/// A store whose host memory is full of `count` objects of 64 bytes, each touched again.
async fn filled(count: usize) -> anyhow::Result<Filled> {
    let config = VirtualMemoryConfig::builder()
        .host_capacity((count as u64 * 64).max(4 << 20) + (2 << 20))
        .staging_capacity(1 << 20)
        .disk_capacity(4 << 30)
        .build()?;
    let vmem = vmem::open(config).await?;
    let mut handles = Vec::with_capacity(count);
    for n in 0..count {
        handles.push(vmem.put((n as u64).to_le_bytes().repeat(8), MemoryTier::Host).await?);
    }
    let mut ballast = Vec::new();
    while vmem.stats().evictions == 0 {
        ballast.push(vmem.put([1; 64], MemoryTier::Host).await?);
    }
    handles.extend(ballast);
    for handle in &handles {
        vmem.read(handle).await?;
    }
    Ok(Filled { vmem, handles })
}

/// Median microseconds, and the worst, of allocate and first write of 64 bytes under pressure.
async fn allocate(filled: &mut Filled) -> anyhow::Result<(f64, f64)> {
    let mut times = Vec::with_capacity(TIMED);
    for n in 0..TIMED {
        let began = Instant::now();
        let handle = filled.vmem.put([n as u8; 64], MemoryTier::Host).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
        filled.handles.push(handle);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[TIMED / 2], times[TIMED - 1]))
}

/// The cost of making space does not depend on how many objects there are, right after every one
/// of them was touched again.
pub(crate) fn p6(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut few = Rounds::default();
    let mut many = Rounds::default();
    let mut few_worst = Rounds::default();
    let mut many_worst = Rounds::default();
    for _ in 0..rounds {
        for (count, typical, worst) in
            [(1_000, &mut few, &mut few_worst), (1_000_000, &mut many, &mut many_worst)]
        {
            let (median, longest) = runtime.block_on(async {
                let mut filled = filled(count).await?;
                let times = allocate(&mut filled).await?;
                filled.vmem.clone().close().await?;
                anyhow::Ok(times)
            })?;
            typical.0.push(median * 1e3);
            worst.0.push(longest);
        }
    }
    let what = "allocate + write 64 bytes under pressure, 10^6 handles, p50".into();
    let ours = &many;
    let theirs = &few;
    let unit = "ns";
    let peer = "10^3-handles";
    let bar = Some(1.5);
    report.add(&Bar { id: "P6", what, unit, ours, peer, theirs, bar });
    let what = "the same, the longest of 20,000".into();
    report.add(&Bar {
        id: "P6",
        what,
        unit: "us",
        ours: &many_worst,
        peer,
        theirs: &few_worst,
        bar: Some(2.0),
    });
    Ok(())
}
