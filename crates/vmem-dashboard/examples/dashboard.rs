//! A store under a load to look at, and its page.
//!
//! ```sh
//! cargo run --release -p vmem-dashboard --example dashboard
//! cargo run --release -p vmem-dashboard --example dashboard -- 3580 60   # this port, for 60 s
//! ```
//!
//! The objects are three times what memory holds. Most reads are of a few hot ones; others walk
//! through all of them; now and then somebody reads and keeps everything, so that others wait for
//! space, or hundreds read at once, so that they wait for their turn.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const LEN: usize = 256 << 10;
const OBJECTS: usize = 768;
const HOT: usize = 96;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().map_or(Ok(3580), |port| port.parse())?;
    let seconds = arguments.next().map_or(Ok(u64::MAX / 4), |seconds| seconds.parse())?;
    let config = VirtualMemoryConfig::builder()
        .host_capacity(72 << 20)
        .disk_capacity(1 << 30)
        .slow_read_threshold(Duration::MAX)
        .build()?;
    let vmem = vmem::open(config).await?;
    let page = vmem_dashboard::serve(vmem.clone(), ([127, 0, 0, 1], port)).await?;
    println!("http://{}/", page.address());
    tokio::spawn(page.run());

    let mut handles = Vec::new();
    for n in 0..OBJECTS {
        let data = vec![n as u8; LEN];
        handles.push(vmem.put_named(&format!("model/layer-{n:03}"), data, MemoryTier::Host).await?);
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let _pinned = vmem.pin(&handles[0], MemoryTier::Host).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        tasks.spawn(read_hot(vmem.clone(), handles.clone(), until));
    }
    tasks.spawn(walk(vmem.clone(), handles.clone(), until));
    tasks.spawn(write(vmem.clone(), handles.clone(), until));
    tasks.spawn(hold_all(vmem.clone(), handles.clone(), until));
    tasks.spawn(crowd(vmem.clone(), handles.clone(), until));
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    drop(_pinned);
    drop(handles);
    Ok(vmem.close().await?)
}

/// Reads that are hits, mostly.
async fn read_hot(vmem: VirtualMemory, handles: Vec<VMemHandle>, until: Instant) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(1);
    while Instant::now() < until {
        let n = rng.random_range(0..HOT);
        for _ in 0..20 {
            give_up_late(vmem.read(&handles[n]).await)?;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Parts of each object, one after the other, into memory of the caller.
async fn walk(vmem: VirtualMemory, handles: Vec<VMemHandle>, until: Instant) -> Result<()> {
    let mut buf = vec![0; LEN];
    for handle in handles.iter().cycle() {
        if Instant::now() >= until {
            break;
        }
        give_up_late(vmem.read_into(handle, 0..LEN, &mut buf).await)?;
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    Ok(())
}

/// New versions, which are dirty until they are written back.
async fn write(vmem: VirtualMemory, handles: Vec<VMemHandle>, until: Instant) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(2);
    while Instant::now() < until {
        let n = rng.random_range(0..OBJECTS);
        give_up_late(vmem.write(&handles[n], vec![n as u8; LEN]).await)?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Holds nearly all of memory for some seconds, and lets go for some.
async fn hold_all(vmem: VirtualMemory, handles: Vec<VMemHandle>, until: Instant) -> Result<()> {
    let options = || ReadOptions::new().promote(true).timeout(Duration::from_secs(2));
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let mut held = Vec::new();
        for handle in &handles[HOT..] {
            let Ok(bytes) = vmem.read_with(handle, options()).await else { break };
            held.push(bytes);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    Ok(())
}

/// Hundreds of reads at once.
async fn crowd(vmem: VirtualMemory, handles: Vec<VMemHandle>, until: Instant) -> Result<()> {
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let reads = handles[HOT..].iter().step_by(2).map(|handle| vmem.read_at(handle, 0..4096));
        for outcome in futures::future::join_all(reads).await {
            give_up_late(outcome)?;
        }
    }
    Ok(())
}

/// What came too late is on the page.
fn give_up_late<T>(outcome: std::result::Result<T, vmem::VirtualMemoryError>) -> Result<()> {
    match outcome {
        Err(error) if !error.is_retryable() => Err(error.into()),
        _ => Ok(()),
    }
}
