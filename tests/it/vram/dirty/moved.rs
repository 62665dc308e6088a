//! Objects that move on a device of one block, to make free memory contiguous.
//!
//! Excluded: eviction where nothing but order is missing, a version that is lost or mixed by a
//! move, and a promotion that waits for ever where nothing can move.

use std::time::Duration;

use futures::FutureExt;
use vmem::{VMemHandle, VirtualMemoryError, WriteBack};

use super::{
    Bench, VRAM, WAIT, access, assert_all_back, change, finish, open_with, run_kernel,
    write_by_kernel,
};
use crate::support::{HOST, KIB, MIB, bytes, eventually};

const SMALL: usize = 16 * KIB;
const COUNT: usize = MIB / SMALL;
const LARGE: usize = 256 * KIB;

/// A device with every second place of `SMALL` bytes taken, by what it alone has.
async fn scattered() -> (Bench, Vec<VMemHandle>) {
    scattered_with(WAIT).await
}

/// Callers wait for so long.
async fn scattered_with(wait: Duration) -> (Bench, Vec<VMemHandle>) {
    let bench = open_with(WriteBack::OnEvict, 16 * MIB, &[MIB], wait);
    let mut handles = Vec::new();
    for object in 0..COUNT {
        let handle = bench.vmem.put(bytes(object as u64, 1, SMALL), HOST).await.unwrap();
        run_kernel(&bench.vmem, &handle, bytes(object as u64, 2, SMALL)).await;
        handles.push(handle);
    }
    let mut nth = 0;
    handles.retain(|_| {
        nth += 1;
        nth % 2 == 1
    });
    let vram = bench.vmem.stats().vram;
    assert_eq!((vram.used_bytes, vram.largest_free_bytes), (MIB as u64 / 2, SMALL as u64));
    (bench, handles)
}

async fn assert_versions(bench: &Bench, handles: &[VMemHandle]) {
    for (nth, handle) in (0..).zip(handles) {
        let read = bench.vmem.read(handle).await.unwrap();
        assert!(read == bytes(2 * nth, 2, SMALL), "object {nth}");
    }
}

async fn large(bench: &Bench) -> VMemHandle {
    bench.vmem.put(bytes(1000, 1, LARGE), HOST).await.unwrap()
}

#[tokio::test]
async fn objects_move_out_of_the_way_of_a_large_one() {
    let (bench, mut handles) = scattered().await;
    let vmem = &bench.vmem;
    let promoted = large(&bench).await;
    vmem.promote(&promoted, VRAM).await.unwrap();
    let stats = vmem.stats();
    assert_eq!((stats.evictions, stats.vram_to_host_bytes), (0, 0), "there was space for all");
    assert!((1..=LARGE as u64).contains(&stats.relocated_bytes), "{}", stats.relocated_bytes);
    assert_eq!(stats.vram.used_bytes, (MIB / 2 + LARGE) as u64);
    assert!(handles.iter().all(|handle| vmem.residency(handle).unwrap().vram));
    assert_versions(&bench, &handles).await;
    // Where they lie now they change as before.
    for (nth, handle) in (0..).zip(&handles) {
        run_kernel(vmem, handle, bytes(2 * nth, 2, SMALL)).await;
    }
    assert_versions(&bench, &handles).await;
    handles.push(promoted);
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn objects_that_cannot_be_copied_leave_instead() {
    let (bench, mut handles) = scattered().await;
    let vmem = &bench.vmem;
    let promoted = large(&bench).await;
    // The copies within, and none of those after them.
    bench.devices[0].fail_next(8);
    vmem.promote(&promoted, VRAM).await.unwrap();
    assert_eq!(vmem.stats().relocated_bytes, 0);
    assert!((1..=16).contains(&vmem.stats().evictions), "{}", vmem.stats().evictions);
    assert_versions(&bench, &handles).await;
    handles.push(promoted);
    assert_all_back(bench, handles).await;
}

/// Mechanism: memory that objects move to counted as held until they lay there. Effect: nothing
/// left for what needed most of the device, and its error named holds. Fix: it is counted apart.
#[tokio::test]
async fn memory_that_objects_move_to_is_held_by_nobody() {
    let (bench, mut handles) = scattered_with(Duration::from_millis(300)).await;
    let vmem = &bench.vmem;
    let promoted = large(&bench).await;
    let most = vmem.allocate(MIB - SMALL, HOST).await.unwrap();
    bench.devices[0].hold();
    let mut promotion = Box::pin(vmem.promote(&promoted, VRAM));
    assert!((&mut promotion).now_or_never().is_none());
    eventually("the copies", || bench.devices[0].in_flight() > 0).await;
    let late = vmem.promote(&most, VRAM).await.unwrap_err();
    assert!(matches!(late, VirtualMemoryError::TimedOut { .. }), "{late:?}");
    promotion.await.unwrap_err();
    bench.devices[0].release_all();
    handles.extend([promoted, most]);
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn objects_are_read_changed_and_freed_while_they_move() {
    let (bench, handles) = scattered().await;
    let vmem = &bench.vmem;
    let promoted = large(&bench).await;
    bench.devices[0].hold();
    let mut promotion = Box::pin(vmem.promote(&promoted, VRAM));
    assert!((&mut promotion).now_or_never().is_none());
    eventually("the copies", || bench.devices[0].in_flight() > 0).await;
    // Those that move, and those that do not: a third each is freed, read and changed.
    let mut handles: Vec<_> = (0_u64..).step_by(2).zip(handles).collect();
    let mut nth = 0;
    handles.retain(|_| {
        nth += 1;
        nth % 3 > 0
    });
    let reads = handles.iter().map(|(_, handle)| vmem.read(handle));
    let mut reads = Box::pin(futures::future::join_all(reads));
    assert!((&mut reads).now_or_never().is_none());
    let access = access(vmem, 0);
    for (object, handle) in &handles {
        assert!(access.share(handle).unwrap().is_some(), "{object} is on the device meanwhile");
    }
    let changes = handles.iter().step_by(2).map(|(_, handle)| change(vmem, handle));
    let mut changes = Box::pin(futures::future::join_all(changes));
    assert!((&mut changes).now_or_never().is_none());
    bench.devices[0].release_all();
    let (reads, changes) = futures::future::join(reads, changes).await;
    for ((object, _), read) in handles.iter().zip(reads) {
        assert!(read.unwrap() == bytes(*object, 2, SMALL), "object {object}");
    }
    for ((object, _), change) in handles.iter().step_by(2).zip(changes) {
        write_by_kernel(vmem, 0, &change, 0, bytes(*object, 3, SMALL)).await;
        finish(change).await.unwrap();
    }
    promotion.await.unwrap();
    for (nth, (object, handle)) in handles.iter().enumerate() {
        let version = if nth % 2 == 0 { 3 } else { 2 };
        let read = vmem.read(handle).await.unwrap();
        assert!(read == bytes(*object, version, SMALL), "object {object}");
    }
    let mut handles: Vec<_> = handles.into_iter().map(|(_, handle)| handle).collect();
    handles.push(promoted);
    assert_all_back(bench, handles).await;
}
