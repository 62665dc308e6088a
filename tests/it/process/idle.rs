//! Scenario 27, in a process of its own: an idle store costs nothing.

use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use vmem::{MemoryTier, VirtualMemoryConfig};
use vmem_testkit::process_cpu;

use crate::support::process::alone;

/// Excluded: an engine that polls, or a ring that spins. After some work, and with objects dirty
/// and held, ten seconds pass; the process used less than half a percent of a core.
#[test]
fn scenario_27_idle_costs_nothing() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let test = "scenario_27_idle_costs_nothing";
    alone(module_path!(), test, || runtime.block_on(stand_idle()));
}

async fn stand_idle() {
    let config = VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(8 << 20)
        .disk_capacity(256 << 20)
        .build()
        .unwrap();
    let vmem = vmem::open(config).await.unwrap();
    let mut handles = Vec::new();
    for n in 0..300_u16 {
        handles.push(vmem.put(vec![n as u8; 60_000], MemoryTier::Host).await.unwrap());
    }
    let held = vmem.read(&handles[299]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = process_cpu();
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let share = (process_cpu() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    println!("{:.3} % of a core", share * 100.0);
    assert!(share < 0.005, "{share} of a core while idle");
    drop(held);
    vmem.close().await.unwrap();
}
