//! The threads of the tier, counted; alone in its process, so that no others are counted.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod common;

use bytes::Bytes;
use common::eventually;
use futures::executor::block_on;
use futures::future::join_all;
use vmem_io::open_disk;

/// How many threads of ours the process has, and the processor time that they took, in ticks.
fn threads() -> (usize, u64) {
    let mut found = (0, 0);
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
        let stat = stat.unwrap_or_default();
        let name = stat.split(['(', ')']).nth(1).unwrap_or_default();
        if name.starts_with("vmem-io") {
            let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            let ticks = |field: usize| fields[field].parse::<u64>().unwrap();
            found = (found.0 + 1, found.1 + ticks(11) + ticks(12));
        }
    }
    found
}

#[test]
fn threads_come_with_work_sleep_without_and_go_with_the_tier() {
    for dropped in [false, true] {
        let disk = open_disk(None, Some(64 << 20), vmem_core::IoDriver::Blocking, 1 << 20).unwrap();
        assert_eq!(threads().0, 0, "none before there is work");
        let write = || {
            let extents = disk.backend.reserve(&[65536; 16]).unwrap();
            let payload = Bytes::from(vec![1; 65536]);
            let pieces = extents.into_iter().map(|extent| (extent, payload.clone()));
            disk.backend.write(pieces.collect())
        };
        let results = block_on(join_all((0..32).map(|_| write())));
        assert!(results.iter().all(Result::is_ok));
        drop(results);
        let (count, _) = threads();
        assert!((1..=8).contains(&count), "{count}");
        // Once the punches are done nothing runs: a busy loop would take all of this time.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let before = threads().1;
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert!(threads().1 - before <= 5, "idle threads cost nothing");
        if !dropped {
            block_on(disk.backend.close()).unwrap();
        }
        drop(disk);
        eventually("no thread is left", || threads().0 == 0);
    }
}
