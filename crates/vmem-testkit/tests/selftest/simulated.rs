//! The simulated disk: time, space and power cuts.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use vmem_io::driver::Driver;
use vmem_testkit::sim::Speed;
use vmem_testkit::{Errno, Seed, SimConfig, SimDriver};

use crate::{Plain, instant_disk, piece, read, run, slow_disk, zeros};

#[test]
fn the_bandwidth_holds_for_many_small_operations() {
    Seed::simulate("the_bandwidth_holds_for_many_small_operations", |_| async {
        let disk = SimDriver::new(SimConfig {
            speed: Speed {
                bytes_per_second: Some(50_000_000),
                queue_depth: 32,
                ..Speed::default()
            },
            ..SimConfig::default()
        });
        let start = Instant::now();
        let writes = (0..10_000).map(|n| disk.start_write(run(n * 5_000, &[1; 5_000])));
        assert!(join_all(writes).await.iter().all(Result::is_ok));
        // 50 MB at 50 MB/s: the device is never idle, so the rate is exact but for the ends.
        let took = start.elapsed();
        let error = took.abs_diff(Duration::from_secs(1));
        assert!(error < Duration::from_millis(5), "took {took:?}");
        let stats = disk.stats();
        assert_eq!((stats.writes, stats.written_bytes), (10_000, 50_000_000));
        assert_eq!((stats.max_in_flight, stats.max_in_service), (10_000, 32));
        assert_eq!(stats.in_flight, 0);
    });
}

#[test]
fn a_small_read_is_not_stuck_behind_a_large_write() {
    Seed::simulate("a_small_read_is_not_stuck_behind_a_large_write", |_| async {
        let disk = slow_disk();
        let start = Instant::now();
        let large = disk.start_write(run(0, &vec![1; 20_000_000]));
        let _ = disk.start_read(zeros(4096), piece(0, 4096)).await;
        let small_took = start.elapsed();
        assert!(large.await.is_ok());
        let large_took = start.elapsed();
        assert!(small_took * 10 < large_took, "{small_took:?} against {large_took:?}");
    });
}

#[test]
fn a_full_disk_takes_a_prefix_and_says_enospc() {
    Seed::simulate("a_full_disk_takes_a_prefix_and_says_enospc", |_| async {
        let disk = instant_disk();
        disk.set_free_bytes(Some(3 * 4096));
        let error = disk.start_write(run(0, &[7; 5 * 4096])).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        assert_eq!(disk.image().allocated_bytes(), 3 * 4096);
        assert!(
            disk.start_write(run(0, &[8; 3 * 4096])).await.is_ok(),
            "overwriting takes no space"
        );
        disk.start_punch(vec![4096..2 * 4096; 1]).await.unwrap();
        assert!(disk.start_write(run(8 * 4096, &[9; 4096])).await.is_ok(), "a punch gives space");
        assert!(disk.start_write(run(9 * 4096, &[9; 1])).await.is_err());
        disk.set_free_bytes(None);
        assert!(disk.start_write(run(9 * 4096, &[9; 1])).await.is_ok());
    });
}

#[test]
fn overlapping_transfers_tear() {
    Seed::simulate("overlapping_transfers_tear", |_| async {
        let disk = slow_disk();
        disk.start_write(run(0, &[1; 8192])).await.unwrap();
        let write = disk.start_write(run(0, &[2; 8192]));
        tokio::time::sleep(Duration::from_millis(1)).await;
        let bytes = disk.peek(0, 8192);
        assert_eq!((bytes[0], bytes[8191]), (2, 1), "half of a write in flight is there");
        write.await.unwrap();
        assert_eq!(disk.peek(0, 8192), [2; 8192]);
    });
}

#[test]
fn a_power_cut_keeps_what_was_synced() {
    Seed::simulate("a_power_cut_keeps_what_was_synced", |seed| async move {
        let config = SimConfig { power_cuts: true, ..SimConfig::default() };
        let disk = SimDriver::new(config.clone());
        disk.start_write(run(0, &[1; 4096])).await.unwrap();
        disk.sync().await.unwrap();
        disk.start_write(run(4096, &[2; 4096])).await.unwrap();
        disk.fail_syncs(1);
        let mut rng = seed.rng();
        let mut lengths = std::collections::BTreeSet::new();
        for _ in 0..50 {
            let image = disk.crash_image(&mut rng);
            lengths.insert(image.len());
            let again = SimDriver::with_image(config.clone(), image);
            assert_eq!(read(&*again, 0, 4096).await.unwrap(), [1; 4096]);
        }
        assert!(lengths.len() > 1, "what was not synced is sometimes there, sometimes not");
        assert!(disk.sync().await.is_err());
        disk.sync().await.unwrap();
        let image = disk.crash_image(&mut rng);
        assert_eq!(image.read_vec(4096, 4096), [0; 4096], "a failed sync was taken back");
    });
}

#[test]
fn a_runtime_that_ends_leaves_the_disk_usable() {
    let disk = slow_disk();
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };
    runtime().block_on(async {
        drop(disk.start_write(run(0, &[1; 512])));
        tokio::task::yield_now().await;
    });
    assert_eq!(disk.stats().in_flight, 1, "the runtime went before the write ended");
    runtime().block_on(async {
        disk.start_write(run(512, &[2; 512])).await.unwrap();
        disk.close().await.unwrap();
    });
    assert_eq!(disk.peek(0, 1), [1]);
    assert_eq!(disk.stats().in_flight, 0);
}

/// Mechanism: a runtime that shuts down drops its tasks, and one of them gave space back as it was
/// dropped; the pump that this started was dropped at once, under the lock of the disk that its end
/// takes. Effect: the thread waited for itself. Fix: the pump is spawned without the lock.
#[test]
fn call_made_while_the_runtime_shuts_down_does_not_deadlock() {
    struct PunchOnDrop(Arc<SimDriver>);
    impl Drop for PunchOnDrop {
        fn drop(&mut self) {
            drop(self.0.start_punch(std::iter::once(0..512).collect()));
        }
    }
    let disk = instant_disk();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let guard = PunchOnDrop(disk.clone());
    runtime.spawn(async move {
        let _guard = guard;
        std::future::pending::<()>().await;
    });
    runtime.block_on(tokio::task::yield_now());
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(runtime);
        sender.send(()).unwrap();
    });
    ended.recv_timeout(Duration::from_secs(20)).expect("the runtime ends");
    assert_eq!(disk.stats().punches, 1);
}

#[test]
fn damage_is_what_is_read() {
    Seed::simulate("damage_is_what_is_read", |_| async {
        let disk = instant_disk();
        disk.start_write(run(0, &[0; 1024])).await.unwrap();
        disk.damage(|image| image.flip_bit(1000, 3));
        assert_eq!(read(&*disk, 1000, 1).await.unwrap(), [8]);
        disk.damage(|image| image.set_len(1000));
        let error = read(&*disk, 999, 2).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    });
}
