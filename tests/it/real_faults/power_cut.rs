//! Real power cuts, as far as a running kernel can make them: an ext4 that is shut down without its
//! log.
//!
//! Invariant: what was acknowledged of a named object is there after the next mount, whole; twenty
//! cuts of one store in a row.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use vmem::{VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};
use vmem_testkit::Seed;

use super::machine::{block_on, drivers, skipped, test};
use super::place::{Ext4, Shutdown};
use crate::support::journal::{May, Pair, Task, found, settle};

const CUTS: u64 = 20;
const TASKS: usize = 6;
const LARGEST: usize = 200_000;

#[test]
fn acknowledged_names_survive_a_real_power_cut() {
    test("acknowledged_names_survive_a_real_power_cut", |seed| {
        let ext4 = match Ext4::mount(192 << 20, 512) {
            Ok(ext4) => ext4,
            Err(why) => return skipped("real power cuts", why),
        };
        let drivers: Vec<_> = drivers().collect();
        let mut states: Vec<Pair> = vec![[None; 2]; TASKS];
        let mut total = 0;
        for cut in 0..CUTS {
            let config = VirtualMemoryConfig::builder()
                .disk_path(ext4.path().join("store"))
                .host_capacity(2 << 20)
                .disk_capacity(48 << 20)
                .io_driver(drivers[cut as usize % drivers.len()])
                .build()
                .unwrap();
            block_on(async {
                let vmem = vmem::open(config.clone()).await.unwrap();
                let seed = seed.fork_nth("cut", cut);
                let may = until_cut(vmem, &ext4, seed, cut * 1_000_000, &states).await;
                total += may.acknowledged_count();
                ext4.remount().unwrap();
                let vmem = vmem::open(config).await.unwrap();
                let found = found(&vmem, TASKS, 512).await;
                states = settle(&found, &may.0.lock(), LARGEST, &format!("cut {cut}"));
                drop(found);
                vmem.close().await.unwrap();
            });
        }
        assert!(total > 0, "something was acknowledged");
        println!("{CUTS} power cuts, {total} acknowledged changes: none lost, none torn");
    });
}

/// Changes names until the file system dies, at a random moment.
async fn until_cut(
    vmem: VirtualMemory,
    ext4: &Ext4,
    seed: Seed,
    version: u64,
    states: &[Pair],
) -> Arc<May> {
    let may = Arc::new(May::of(states));
    let tasks: Vec<_> = states
        .iter()
        .enumerate()
        .map(|(number, &state)| {
            let vmem = vmem.clone();
            let may = may.clone();
            let rng = seed.fork_nth("task", number as u64).rng();
            let task = Task { number, state, version, largest: LARGEST, rng };
            tokio::spawn(async move { task.run(&vmem, &*may, usize::MAX).await })
        })
        .collect();
    let wait = seed.fork("moment").rng().random_range(20..200);
    tokio::time::sleep(Duration::from_millis(wait)).await;
    ext4.shut_down(Shutdown::NoLogFlush).unwrap();
    for task in tasks {
        let error = task.await.unwrap().unwrap_err();
        assert!(matches!(error, VirtualMemoryError::Io { .. }), "{error:?}");
    }
    // What it could not make durable it names; it must end.
    match vmem.close().await {
        Ok(()) | Err(VirtualMemoryError::NotFlushed { .. } | VirtualMemoryError::Io { .. }) => {}
        Err(error) => panic!("{error:?}"),
    }
    may
}
