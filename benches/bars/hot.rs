//! P1 and P2: reads of host-resident objects.

use std::sync::{Arc, Barrier};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::runtime::{Builder, Runtime};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};

use crate::report::{Bar, Report, Rounds, thread_cpu_ns};

/// A set of objects, each beginning with its own number.
pub(crate) struct Set {
    pub(crate) len: usize,
    pub(crate) count: usize,
    pub(crate) reads: usize,
}

impl Set {
    pub(crate) fn bytes(&self, n: usize) -> Vec<u8> {
        let mut bytes = vec![n as u8; self.len];
        bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
        bytes
    }

    pub(crate) fn order(&self, seed: u64) -> Vec<usize> {
        let mut rng = SmallRng::seed_from_u64(seed);
        (0..self.reads).map(|_| rng.random_range(0..self.count)).collect()
    }

    pub(crate) fn what(&self) -> String {
        format!("{} objects of {} bytes", self.count, self.len)
    }
}

pub(crate) struct Ours {
    /// Where the actor runs.
    #[cfg_attr(not(feature = "watched"), expect(dead_code, reason = "it runs the actor"))]
    pub(crate) runtime: Runtime,
    pub(crate) vmem: VirtualMemory,
    handles: Vec<VMemHandle>,
}

impl Ours {
    pub(crate) fn with(set: &Set) -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let footprint = (set.len as u64).max(64).next_multiple_of(64) * set.count as u64;
        let config = VirtualMemoryConfig::builder()
            .host_capacity(footprint + footprint / 2 + (320 << 20))
            .disk_capacity(1 << 30)
            .build()?;
        let (vmem, handles) = runtime.block_on(async {
            let vmem = vmem::open(config).await?;
            let mut handles = Vec::with_capacity(set.count);
            for n in 0..set.count {
                handles.push(vmem.put(set.bytes(n), MemoryTier::Host).await?);
            }
            anyhow::Ok((vmem, handles))
        })?;
        Ok(Ours { runtime, vmem, handles })
    }

    /// Nanoseconds of CPU for one read.
    pub(crate) async fn round(&self, order: &[usize]) -> f64 {
        let before = thread_cpu_ns();
        for &n in order {
            let bytes = self.vmem.read(&self.handles[n]).await.expect("resident");
            assert!(bytes[..8] == (n as u64).to_le_bytes(), "object {n}");
        }
        (thread_cpu_ns() - before) / order.len() as f64
    }
}

fn on_this_thread() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// P1: nanoseconds of CPU for a read, on one thread, beside foyer on the same data.
pub(crate) fn p1(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let here = on_this_thread()?;
    let sets = [
        (Set { len: 4096, count: 65_536, reads: 200_000 }, 1.0 / 3.0),
        (Set { len: 1 << 20, count: 256, reads: 200_000 }, 0.5),
    ];
    for (set, bar) in &sets {
        let ours = Ours::with(set)?;
        #[cfg(feature = "peers")]
        let peers = crate::peer::Peers::with(set)?;
        let mut mine = Rounds::default();
        #[cfg(feature = "peers")]
        let mut hybrid = Rounds::default();
        #[cfg(feature = "peers")]
        let mut memory = Rounds::default();
        for round in 0..=rounds {
            let order = set.order(round as u64);
            let cost = here.block_on(ours.round(&order));
            #[cfg(feature = "peers")]
            let theirs = here.block_on(peers.round(&order));
            // The first round warms up.
            if round > 0 {
                mine.0.push(cost);
                #[cfg(feature = "peers")]
                {
                    hybrid.0.push(theirs.0);
                    memory.0.push(theirs.1);
                }
            }
        }
        #[cfg(feature = "peers")]
        for (peer, theirs, bar) in
            [("foyer-hybrid", &hybrid, Some(*bar)), ("foyer-memory", &memory, None)]
        {
            report.add(&Bar {
                id: "P1",
                what: set.what(),
                unit: "ns",
                ours: &mine,
                peer,
                theirs,
                bar,
            });
        }
        #[cfg(not(feature = "peers"))]
        {
            let _ = bar;
            let peer = "itself";
            report.add(&Bar {
                id: "P1",
                what: set.what(),
                unit: "ns",
                ours: &mine,
                peer,
                theirs: &mine,
                bar: None,
            });
        }
    }
    same_at_every_size(report, rounds)
}

/// The cost of a hit does not depend on the size of the object, nor, within the slope of the memory
/// system, on how many there are.
fn same_at_every_size(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    let here = on_this_thread()?;
    let pairs = [
        ("64 MiB against 4 KiB, 16 objects", (64 << 20, 16), (4096, 16)),
        ("10^6 handles against 10^2, 64 bytes", (64, 1_000_000), (64, 100)),
    ];
    for (what, large, small) in pairs {
        let set = |(len, count)| Set { len, count, reads: 200_000 };
        let large = set(large);
        let small = set(small);
        let one = Ours::with(&large)?;
        let other = Ours::with(&small)?;
        let mut costs = Rounds::default();
        let mut base = Rounds::default();
        for round in 0..=rounds {
            let seed = round as u64;
            let cost = here.block_on(one.round(&large.order(seed)));
            let base_cost = here.block_on(other.round(&small.order(seed)));
            if round > 0 {
                costs.0.push(cost);
                base.0.push(base_cost);
            }
        }
        let name = what.to_owned();
        report.add(&Bar {
            id: "P1",
            what: name,
            unit: "ns",
            ours: &costs,
            peer: "ours",
            theirs: &base,
            bar: None,
        });
    }
    slope(report, rounds);
    Ok(())
}

/// The memory system's own slope from 10^2 to 10^6 objects: the same order of accesses to a vector
/// of `Bytes`, each cloned, looked at and dropped.
fn slope(report: &mut Report, rounds: usize) {
    let set = |count| Set { len: 64, count, reads: 200_000 };
    let many = set(1_000_000);
    let few = set(100);
    let filled = |set: &Set| -> Vec<bytes::Bytes> {
        (0..set.count).map(|n| bytes::Bytes::from(set.bytes(n))).collect()
    };
    let large = filled(&many);
    let small = filled(&few);
    let round = |objects: &[bytes::Bytes], order: &[usize]| {
        let before = thread_cpu_ns();
        for &n in order {
            let bytes = std::hint::black_box(objects[n].clone());
            assert!(bytes[..8] == (n as u64).to_le_bytes());
        }
        (thread_cpu_ns() - before) / order.len() as f64
    };
    let mut costs = Rounds::default();
    let mut base = Rounds::default();
    for seed in 0..=rounds as u64 {
        let cost = round(&large, &many.order(seed));
        let base_cost = round(&small, &few.order(seed));
        if seed > 0 {
            costs.0.push(cost);
            base.0.push(base_cost);
        }
    }
    let what = "control: a vector of 10^6 Bytes against 10^2, 64 bytes".into();
    report.add(&Bar {
        id: "P1",
        what,
        unit: "ns",
        ours: &costs,
        peer: "control",
        theirs: &base,
        bar: None,
    });
}

/// P2: the same on two threads over distinct objects, against one thread.
pub(crate) fn p2(report: &mut Report, rounds: usize) -> anyhow::Result<()> {
    for set in [
        Set { len: 4096, count: 65_536, reads: 200_000 },
        Set { len: 1 << 20, count: 256, reads: 200_000 },
    ] {
        let ours = Arc::new(Ours::with(&set)?);
        let halves = |round: usize| {
            let order = set.order(round as u64);
            let half = set.count / 2;
            let lower: Vec<_> = order.iter().map(|n| n % half).collect();
            let upper: Vec<_> = order.iter().map(|n| half + n % half).collect();
            (lower, upper)
        };
        let mut two = Rounds::default();
        let mut one = Rounds::default();
        let mut rate = Rounds::default();
        for round in 0..=rounds {
            let (lower, upper) = halves(round);
            let alone = on_this_thread()?.block_on(ours.round(&lower));
            let barrier = Arc::new(Barrier::new(2));
            let started = std::time::Instant::now();
            let threads: Vec<_> = [lower, upper]
                .into_iter()
                .map(|order| {
                    let ours = ours.clone();
                    let barrier = barrier.clone();
                    std::thread::spawn(move || {
                        let here = on_this_thread().expect("a runtime");
                        barrier.wait();
                        here.block_on(ours.round(&order))
                    })
                })
                .collect();
            let costs: Vec<f64> =
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
            let reads = 2.0 * set.reads as f64 / started.elapsed().as_secs_f64();
            if round > 0 {
                one.0.push(alone);
                two.0.push(costs.iter().sum::<f64>() / 2.0);
                rate.0.push(reads / 1e6);
            }
        }
        let what = format!("{} on two threads, {:.1} M reads/s", set.what(), rate.median());
        report.add(&Bar {
            id: "P2",
            what,
            unit: "ns",
            ours: &two,
            peer: "one-thread",
            theirs: &one,
            bar: Some(1.15),
        });
    }
    Ok(())
}
