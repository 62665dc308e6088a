//! The load of the example: tasks with names, each of which does one thing that tokio-console is to
//! show. And the layer that sends it there.
//!
//! Invariant: a read that came too late or found all memory held is a thing to look at; every other
//! error ends the load. Called by the program and the test.

use std::future::Future;
use std::time::Duration;

use console_subscriber::{ConsoleLayer, ServerAddr};
use futures::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;
use vmem::{
    MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};

const LEN: usize = 512 << 10;
const OBJECTS: usize = 128;
/// What the hot reads are of.
const HOT: usize = 12;
/// How long all memory is held, in each turn.
const HELD: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_secs(4);

/// Sends tasks, and all that the store shows, to a console that connects to this address.
///
/// From its buffer the subscriber takes at most 128 events for each update that it publishes: what
/// tokio tells of its timers, locks and channels would delay everything else, soon by minutes. So
/// that is left out, and an update is published ten times a second.
pub fn layer<S>(address: impl Into<ServerAddr>) -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    ConsoleLayer::builder()
        .server_addr(address)
        .publish_interval(Duration::from_millis(100))
        .retention(Duration::from_secs(60))
        .spawn()
        .with_filter(filter_fn(is_shown))
}

/// Of tokio the tasks alone, and what wakes them.
fn is_shown(metadata: &Metadata<'_>) -> bool {
    let is_of_tokio = metadata.module_path().is_some_and(|path| path.starts_with("tokio::"));
    !is_of_tokio || metadata.target().starts_with("tokio::task")
}

/// Runs until `end`.
pub async fn run(end: impl Future<Output = ()>) -> anyhow::Result<()> {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(24 << 20)
        .disk_capacity(256 << 20)
        .wait_timeout(Duration::from_secs(30))
        .build()?;
    let vmem = vmem::open(config).await?;
    let mut tasks = JoinSet::new();
    spawn(&mut tasks, "fill", fill(vmem.clone()));
    tokio::pin!(end);
    let ended = loop {
        tokio::select! {
            () = &mut end => break Ok(()),
            Some(outcome) = tasks.join_next() => match outcome? {
                Ok(handles) if !handles.is_empty() => start(&mut tasks, &vmem, &handles),
                Ok(_) => {}
                Err(error) => break Err(error.into()),
            },
        }
    };
    tasks.shutdown().await;
    vmem.close().await?;
    ended
}

type Outcome = Result<Vec<VMemHandle>, VirtualMemoryError>;

/// Everything that goes on once the objects are there.
fn start(tasks: &mut JoinSet<Outcome>, vmem: &VirtualMemory, handles: &[VMemHandle]) {
    let both = || (vmem.clone(), handles.to_vec());
    spawn(tasks, "read the hot ones", read_hot(both()));
    spawn(tasks, "prefetch storm", prefetch(both()));
    spawn(tasks, "keep all memory", keep(both()));
    spawn(tasks, "reader that looks stuck", look_stuck(both()));
}

fn spawn(
    tasks: &mut JoinSet<Outcome>,
    name: &str,
    work: impl Future<Output = Outcome> + Send + 'static,
) {
    #[cfg(tokio_unstable)]
    drop(
        tasks.build_task().name(name).spawn(work).expect("invariant: tokio refuses threads alone"),
    );
    #[cfg(not(tokio_unstable))]
    {
        let _ = name;
        drop(tasks.spawn(work));
    }
}

/// A tier that fills: first host memory, then the disk below it.
async fn fill(vmem: VirtualMemory) -> Outcome {
    let put = async |number: usize| {
        let name = format!("model/layer-{number:03}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        vmem.put_named(&name, vec![number as u8; LEN], MemoryTier::Host).await
    };
    futures::stream::iter(0..OBJECTS).map(put).buffered(2).try_collect().await
}

/// Hits, mostly.
async fn read_hot((vmem, handles): (VirtualMemory, Vec<VMemHandle>)) -> Outcome {
    for handle in handles[..HOT].iter().cycle() {
        pass_late(vmem.read(handle).await)?;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(Vec::new())
}

/// Many objects that are asked for at once, before anybody reads them.
async fn prefetch((vmem, handles): (VirtualMemory, Vec<VMemHandle>)) -> Outcome {
    for part in handles[HOT..].chunks(16).cycle() {
        pass_late(vmem.prefetch_many(part, MemoryTier::Host).await)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(Vec::new())
}

/// Reads what memory holds, and keeps it for a while.
async fn keep((vmem, handles): (VirtualMemory, Vec<VMemHandle>)) -> Outcome {
    let options = || ReadOptions::new().promote(true).timeout(Duration::from_secs(1));
    loop {
        let mut kept = Vec::new();
        for handle in &handles[HOT..] {
            let Ok(bytes) = vmem.read_with(handle, options()).await else { break };
            kept.push(bytes);
        }
        tokio::time::sleep(HELD).await;
        drop(kept);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Reads objects that nobody has read before, one after the other. It waits for the task
/// that keeps all memory.
async fn look_stuck((vmem, handles): (VirtualMemory, Vec<VMemHandle>)) -> Outcome {
    for handle in handles.iter().rev().cycle() {
        tokio::time::sleep(Duration::from_millis(200)).await;
        pass_late(vmem.read_with(handle, ReadOptions::new().promote(true)).await)?;
    }
    Ok(Vec::new())
}

fn pass_late<T>(outcome: Result<T, VirtualMemoryError>) -> Result<(), VirtualMemoryError> {
    match outcome {
        Err(error) if !error.is_retryable() => Err(error),
        _ => Ok(()),
    }
}

/// The page of the guide whose program sends to a console; doctests compile it.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide/src/console.md")]
mod guide {}
