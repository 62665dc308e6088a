//! What is written back before its device memory is needed.
//!
//! Excluded: promotions to a full device that each wait for a copy down, copies of what is used or
//! pinned there, and copies where the policy is to wait for a request.

use std::time::Duration;

use vmem::{VMemHandle, WriteBack};

use super::{Bench, VRAM, assert_all_back, open, run_kernel};
use crate::support::{HOST, KIB, MIB, bytes, eventually};

const LEN: usize = 64 * KIB;
/// As many as the device has memory for.
const COUNT: usize = 2 * MIB / LEN;
/// Those of its cold end.
const COLD: usize = 2;

/// A device that is full of what kernels wrote; the first object was written first.
async fn full(write_back: WriteBack) -> (Bench, Vec<VMemHandle>) {
    let bench = open(write_back, 16 * MIB, 2 * MIB);
    let mut handles = Vec::new();
    for object in 0..COUNT {
        let handle = bench.vmem.put(bytes(object as u64, 1, LEN), HOST).await.unwrap();
        run_kernel(&bench.vmem, &handle, bytes(object as u64, 2, LEN)).await;
        handles.push(handle);
    }
    (bench, handles)
}

fn is_alone(bench: &Bench, handle: &VMemHandle) -> bool {
    let residency = bench.vmem.residency(handle).unwrap();
    residency.vram && !residency.host && !residency.disk
}

async fn promote_another(bench: &Bench, handles: &mut Vec<VMemHandle>) {
    let number = handles.len() as u64;
    let handle = bench.vmem.put(bytes(number, 2, LEN), HOST).await.unwrap();
    bench.vmem.promote(&handle, VRAM).await.unwrap();
    handles.push(handle);
}

async fn assert_versions(bench: &Bench, handles: &[VMemHandle]) {
    for (object, handle) in (0..).zip(handles) {
        let read = bench.vmem.read(handle).await.unwrap();
        assert!(read == bytes(object, 2, LEN), "object {object}");
    }
}

#[tokio::test]
async fn victims_were_written_back_before_their_memory_is_needed() {
    let (bench, mut handles) = full(WriteBack::After(Duration::from_secs(3600))).await;
    let vmem = &bench.vmem;
    // The first one stays, and the second one goes last.
    let pin = vmem.pin(&handles[0], VRAM).await.unwrap();
    for (object, handle) in (0..2).zip(&handles) {
        run_kernel(vmem, handle, bytes(object, 2, LEN)).await;
    }
    let is_dirty = |handle: &VMemHandle| is_alone(&bench, handle);
    for victim in 2..COUNT {
        let before = vmem.stats();
        promote_another(&bench, &mut handles).await;
        let after = vmem.stats();
        let evicted = after.evictions - before.evictions;
        assert_eq!(evicted, 1, "one makes space for another");
        assert!(!vmem.residency(&handles[victim]).unwrap().vram, "object {victim} is the victim");
        if victim > 2 {
            assert_eq!(after.clean_drops - before.clean_drops, evicted, "at {victim}");
        }
        let next = (victim + 1).min(COUNT)..(victim + 1 + COLD).min(COUNT);
        let after_next = next.end..COUNT;
        let are_clean = || !handles[next.clone()].iter().any(is_dirty);
        eventually("the next victims are clean", are_clean).await;
        assert!(is_dirty(&handles[0]), "what is pinned there is not copied");
        assert!(handles[after_next].iter().all(is_dirty), "at {victim}");
    }
    eventually("the last one is clean", || !is_dirty(&handles[1])).await;
    drop(pin);
    assert_versions(&bench, &handles).await;
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn nothing_is_written_early_where_nothing_leaves() {
    let (bench, handles) = full(WriteBack::After(Duration::from_secs(3600))).await;
    for (object, handle) in (0..).zip(&handles) {
        run_kernel(&bench.vmem, handle, bytes(object, 2, LEN)).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(bench.vmem.stats().vram_to_host_bytes, 0);
    assert_versions(&bench, &handles).await;
    assert_all_back(bench, handles).await;
}

#[tokio::test]
async fn nothing_is_written_early_where_that_was_not_asked_for() {
    let (bench, mut handles) = full(WriteBack::OnEvict).await;
    for _ in 0..5 {
        promote_another(&bench, &mut handles).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stats = bench.vmem.stats();
    assert_eq!(stats.vram_to_host_bytes, 5 * LEN as u64, "what has left, and no more");
    assert_versions(&bench, &handles).await;
    assert_all_back(bench, handles).await;
}
