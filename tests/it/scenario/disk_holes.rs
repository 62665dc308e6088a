//! Scenario 21 on disk: free space in pieces is of use.
//!
//! Invariant: whatever fits by its footprint is served. Not called by other tests.

use std::sync::Arc;

use rand::Rng;
use vmem::{VMemHandle, VirtualMemory};
use vmem_testkit::{Seed, SimConfig, SimDriver};

use crate::support::over;
use crate::support::{DISK, KIB, MIB, bytes};

/// A disk, and a host tier too small to hide it.
fn disk_alone(disk: usize) -> VirtualMemory {
    let sim: Arc<SimDriver> = SimDriver::new(SimConfig::default());
    over(sim, MIB, disk as u64, |b| b.promotion(vmem::Promotion::Never))
}

/// Excluded: a disk whose free space is of no use. A simulated day at 90 % fill, sizes from 512 B
/// to a fifteenth of the disk: whatever fits by its footprint is served.
#[test]
fn scenario_21_a_day_of_a_disk_at_90_percent() {
    Seed::simulate("scenario_21_disk", async |seed| {
        let disk = 16 * MIB;
        let vmem = disk_alone(disk);
        let mut rng = seed.rng();
        let mut live: Vec<(u64, VMemHandle)> = Vec::new();
        let mut used = 0;
        for object in 0..8000_u64 {
            let len = 512 << rng.random_range(0..12);
            let len: usize = rng.random_range(len / 2 + 1..=len);
            while used + len.next_multiple_of(512) > disk * 9 / 10 {
                let (_, gone) = live.swap_remove(rng.random_range(0..live.len()));
                used -= gone.len().next_multiple_of(512);
            }
            let handle = vmem.put(bytes(object, 1, len), DISK).await;
            let handle = handle.unwrap_or_else(|e| panic!("{len} at step {object}: {e:?}"));
            used += len.next_multiple_of(512);
            live.push((object, handle));
            assert_eq!(vmem.stats().disk.used_bytes, used as u64, "step {object}");
            if object.is_multiple_of(16) {
                // What is said to be free in one piece is, and not a block more than all there is.
                let largest = vmem.stats().disk.largest_free_bytes as usize;
                assert!(largest <= disk - used);
                drop(vmem.allocate(largest, DISK).await.expect("as was said"));
            }
        }
        for (object, handle) in live.iter().step_by(7) {
            let mut read = vec![0; handle.len()];
            vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
            assert!(read == bytes(*object, 1, read.len()), "object {object}");
        }
    });
}

/// The worst order of events: the disk is full of small objects and every second one goes, so that
/// no hole holds a chunk. Half of the disk is free; an object of a quarter of it must find space.
#[tokio::test(start_paused = true)]
async fn scenario_21_holes_that_are_smaller_than_a_chunk() {
    let vmem = disk_alone(8 * MIB);
    let mut live = Vec::new();
    while let Ok(handle) = vmem.put(vec![live.len() as u8; 32 * KIB], DISK).await {
        live.push(handle);
    }
    let mut at = 0;
    live.retain(|_| {
        at += 1;
        at % 2 == 0
    });
    let stats = vmem.stats();
    assert_eq!(stats.disk.used_bytes, 4 * MIB as u64);
    let fits = vmem.put(bytes(1, 1, 2 * MIB), DISK).await;
    assert!(fits.is_ok(), "{fits:?} with {stats:?}");
}
