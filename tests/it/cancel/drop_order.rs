//! Futures, then the tokio runtime, then the store are dropped with operations in flight, over
//! every disk driver that this machine has.
//!
//! Invariant: nothing hangs or panics, and the directory can be opened again as soon as the kernel
//! is done with what was in flight. Meant to run under AddressSanitizer too, where a buffer of the
//! heap that is freed early is caught when our side touches it; `crates/vmem-io/tests/rings.rs`
//! catches the kernel's side.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rand::Rng;
use tokio::runtime::Builder;
use vmem::{
    IoDriver, MemoryTier, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryConfig,
    VirtualMemoryError,
};
use vmem_testkit::Seed;

type Started = Pin<Box<dyn Future<Output = ()> + Send>>;

fn config(path: &Path, driver: IoDriver) -> VirtualMemoryConfig {
    VirtualMemoryConfig::builder()
        .disk_path(path)
        .io_driver(driver)
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .build()
        .unwrap()
}

/// Opens the store; the previous one may still have operations in flight, and its lock with them.
async fn reopen(path: &Path, driver: IoDriver) -> Result<VirtualMemory, VirtualMemoryError> {
    for _ in 0..10_000 {
        match vmem::open(config(path, driver)).await {
            Err(VirtualMemoryError::InUse { .. }) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            other => return other,
        }
    }
    panic!("the directory stays locked");
}

/// One of the calls that move bytes, not polled yet.
fn call(vmem: &VirtualMemory, handle: &VMemHandle, which: u32) -> Started {
    let vmem = vmem.clone();
    let handle = handle.clone();
    match which {
        0 => Box::pin(async move { drop(vmem.read(&handle).await) }),
        1 => Box::pin(async move {
            drop(vmem.read_with(&handle, ReadOptions::new().promote(false)).await);
        }),
        2 => Box::pin(async move {
            let mut heap = vec![0xee; handle.len()];
            drop(vmem.read_into(&handle, 0..handle.len(), &mut heap).await);
        }),
        3 => Box::pin(async move { drop(vmem.write(&handle, vec![3; handle.len()]).await) }),
        4 => Box::pin(async move { drop(vmem.demote(&handle, MemoryTier::Disk).await) }),
        5 => Box::pin(async move { drop(vmem.prefetch(&handle, MemoryTier::Host).await) }),
        _ => Box::pin(async move { drop(vmem.put(vec![4; 300_000], MemoryTier::Disk).await) }),
    }
}

#[test]
fn futures_then_runtime_then_store() {
    Seed::run("futures_then_runtime_then_store", |seed| {
        for driver in [IoDriver::Reactor, IoDriver::TokioUring, IoDriver::Blocking] {
            let mut rng = seed.fork(&driver.to_string()).rng();
            let directory = tempfile::tempdir().unwrap();
            for round in 0..12 {
                let runtime = match round % 2 {
                    0 => Builder::new_current_thread().enable_all().build().unwrap(),
                    _ => {
                        let mut builder = Builder::new_multi_thread();
                        builder.worker_threads(2).enable_all().build().unwrap()
                    }
                };
                let vmem = match runtime.block_on(reopen(directory.path(), driver)) {
                    Ok(vmem) => vmem,
                    Err(VirtualMemoryError::TierNotAvailable { reason, .. }) => {
                        println!("SKIPPED {driver}: {reason}");
                        break;
                    }
                    Err(error) => panic!("{driver}, round {round}: {error}"),
                };
                let handles: Vec<_> = runtime.block_on(async {
                    let mut handles = Vec::new();
                    for n in 0..40_usize {
                        let data = vec![n as u8; 1000 + n * 7001];
                        handles.push(vmem.put(data, MemoryTier::Disk).await.unwrap());
                    }
                    handles
                });
                let mut started: Vec<Started> = Vec::new();
                {
                    let _inside = runtime.enter();
                    let mut context = Context::from_waker(Waker::noop());
                    for handle in &handles {
                        let mut future = call(&vmem, handle, rng.random_range(0..7));
                        for _ in 0..rng.random_range(1..4) {
                            if let Poll::Ready(()) = future.as_mut().poll(&mut context) {
                                future = Box::pin(std::future::pending());
                            }
                        }
                        started.push(future);
                    }
                }
                let spin = rng.random_range(0..3_000);
                runtime.block_on(async {
                    for _ in 0..spin {
                        tokio::task::yield_now().await;
                    }
                });
                drop(started);
                drop(runtime);
                drop(handles);
                drop(vmem);
            }
        }
    });
}
