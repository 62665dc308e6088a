//! P15: random ranges of one hot object, large beside small.
//!
//! Both objects are in host memory once they are warm; what is read is checked. The cost is CPU
//! time of the reading thread. A part is so small that `read_at` returns a copy.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::Builder;
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds, thread_cpu_ns};

const RANGE: usize = 4096;
const READS: usize = 50_000;

pub(crate) fn p15(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = VirtualMemoryConfig::builder()
            .host_capacity(64 << 20)
            .disk_capacity(64 << 20)
            .build()?;
        let vmem = vmem::open(config).await?;
        let mut objects = Vec::new();
        for len in [8 << 20, 48 << 10] {
            let handle = vmem.put(bytes(len), MemoryTier::Disk).await?;
            // Reads of ranges must warm it, so nothing here calls `promote`.
            for seed in 0..20 {
                into(&vmem, &handle, seed, 1000).await?;
            }
            objects.push(handle);
        }
        for (what, copied) in [("read_at", false), ("read_into", true)] {
            let mut sides = [Rounds::default(), Rounds::default()];
            for round in 0..=rounds {
                for (side, handle) in objects.iter().enumerate() {
                    let seed = round as u64;
                    let before = thread_cpu_ns();
                    if copied {
                        into(&vmem, handle, seed, READS).await?;
                    } else {
                        at(&vmem, handle, seed, READS).await?;
                    }
                    if round > 0 {
                        sides[side].0.push((thread_cpu_ns() - before) / READS as f64);
                    }
                }
            }
            let [ours, theirs] = &sides;
            let what = format!("{what} of 4 KiB of a hot object of 8 MiB");
            report.add(&Bar {
                id: "P15",
                what,
                unit: "ns CPU",
                ours,
                peer: "object-of-48-KiB",
                theirs,
                bar: Some(1.5),
            });
        }
        drop(objects);
        vmem.close().await?;
        floor(report, rounds)
    })
}

/// What memory alone costs: the same ranges of two plain vectors.
fn floor(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let vectors = [bytes(8 << 20), bytes(48 << 10)];
    let mut sides = [Rounds::default(), Rounds::default()];
    let mut buffer = [0; RANGE];
    for round in 0..=rounds {
        for (vector, side) in vectors.iter().zip(&mut sides) {
            let before = thread_cpu_ns();
            for start in starts(vector.len(), round as u64, READS) {
                buffer.copy_from_slice(&vector[start..start + RANGE]);
                check(std::hint::black_box(&buffer), start)?;
            }
            if round > 0 {
                side.0.push((thread_cpu_ns() - before) / READS as f64);
            }
        }
    }
    let [ours, theirs] = &sides;
    let what = "the floor: 4 KiB copied from a plain vector of 8 MiB".to_owned();
    report.add(&Bar {
        id: "P15",
        what,
        unit: "ns CPU",
        ours,
        peer: "vector-of-48-KiB",
        theirs,
        bar: None,
    });
    Ok(())
}

/// Bytes whose words of eight each have their own index.
fn bytes(len: usize) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(u64::to_le_bytes).collect()
}

fn starts(len: usize, seed: u64, count: usize) -> impl Iterator<Item = usize> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..count).map(move |_| rng.random_range(0..=(len - RANGE) / 8) * 8)
}

fn check(read: &[u8], start: usize) -> anyhow::Result<()> {
    let first = u64::from_le_bytes(read[..8].try_into()?);
    anyhow::ensure!(first == start as u64 / 8 && read.len() == RANGE, "the range at {start}");
    Ok(())
}

async fn at(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    seed: u64,
    count: usize,
) -> anyhow::Result<()> {
    for start in starts(handle.len(), seed, count) {
        check(&vmem.read_at(handle, start..start + RANGE).await?, start)?;
    }
    Ok(())
}

async fn into(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    seed: u64,
    count: usize,
) -> anyhow::Result<()> {
    let mut buffer = [0; RANGE];
    for start in starts(handle.len(), seed, count) {
        vmem.read_into(handle, start..start + RANGE, &mut buffer).await?;
        check(&buffer, start)?;
    }
    Ok(())
}
