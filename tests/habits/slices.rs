//! Scenario 38, in part: little is kept of what is large.
//!
//! Excluded: a header of 64 bytes that holds its megabyte of host memory. Noticed by the bytes that
//! are held, which are those that are kept, each rounded up to [`ROUNDING`] at most, and by other
//! readers that want space meanwhile.

use vmem::{ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, run, succeeds};
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, bytes, check, open};

/// What keeping a part that is copied may take beyond its own bytes.
const ROUNDING: usize = 512;
const SIZES: Sizes = Sizes { space: 12 * MIB, disk: 128 * MIB };

/// Where the object is when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    InHost,
    OnDisk,
    /// On disk, and read so often that it is promoted meanwhile.
    Often,
}

/// How long the objects are, how many, and the parts that are kept of each.
const KEPT: [(usize, usize, usize, usize); 7] = [
    (MIB, 40, 0, 64),
    (MIB, 40, MIB - 64, 64),
    (MIB, 40, 65_500, 100),
    (MIB, 40, 500_000, 4 * KIB),
    (3 * MIB + 5, 12, 7, 1),
    (200 * KIB, 150, 100_000, 3_000),
    (60 * KIB, 400, 20_000, 64),
];

async fn read(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    n: usize,
    at: usize,
    len: usize,
) -> Result<bytes::Bytes, VirtualMemoryError> {
    match n % 3 {
        0 => vmem.read_with(handle, ReadOptions::new().range(at..at + len)).await,
        _ => vmem.read_at(handle, at..at + len).await,
    }
}

async fn keep(
    place: Place,
    found: Found,
    (len, count, at, kept_len): (usize, usize, usize, usize),
) -> Result<(), String> {
    let store = open(place, SIZES, |builder| builder).await;
    let vmem = &store.vmem;
    let mut handles = Vec::new();
    let mut kept = Vec::new();
    for n in 0..count {
        let what = format!("put {n}, with {} parts kept", kept.len());
        let handle = succeeds(&what, BOUND, vmem.put(bytes(n, 1, len), HOST)).await?;
        if found != Found::InHost {
            let what = format!("demote {n}, with {} parts kept", kept.len());
            succeeds(&what, BOUND, vmem.demote(&handle, DISK)).await?;
        }
        for round in 0..if found == Found::Often { 4 } else { 1 } {
            let what = format!("part {n}, with {} parts kept", kept.len());
            let part = read(vmem, &handle, n + round, at, kept_len);
            let part = succeeds(&what, BOUND, part).await?;
            check(n, &[1], at, &part)?;
            kept.push(part);
        }
        handles.push(handle);
    }
    let held = vmem.stats().held_bytes;
    let most = (kept.len() * (kept_len + ROUNDING)) as u64;
    if held > most {
        let parts = kept.len();
        return Err(format!("{parts} parts of {kept_len} bytes hold {held} bytes, not {most}"));
    }
    // Others have nearly all of host memory to themselves.
    for n in [0, count - 1, count / 2] {
        let read = succeeds("read of another", BOUND, vmem.read(&handles[n])).await?;
        check(n, &[1], 0, &read)?;
    }
    let half = SIZES.space / 2 / len;
    let set = succeeds("a set", BOUND, vmem.read_many(&handles[..half.min(count)])).await?;
    drop(set);
    // What is kept never changes, whatever happens to its object.
    for (n, handle) in handles.iter().enumerate().step_by(3) {
        let written = vmem.write(handle, bytes(n, 2, len));
        succeeds("write", BOUND, written).await?;
    }
    drop(handles);
    let each = kept.len() / count;
    for (n, part) in kept.iter().enumerate() {
        check(n / each, &[1], at, part)?;
    }
    drop(kept);
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

fn each(place: Place, found: Found, threads: &[Threads]) {
    let mut complaints = Vec::new();
    for kept in KEPT {
        for &threads in threads {
            let ended = run(threads, move || keep(place, found, kept)).err();
            complaints.extend(ended.map(|why| format!("{kept:?}, {place:?}, {threads:?}: {why}")));
        }
    }
    assert_none(&complaints);
}

#[test]
fn parts_kept_of_resident_objects_hold_only_themselves() {
    each(Place::Simulated, Found::InHost, &[Threads::One]);
}

#[test]
fn parts_kept_of_cold_objects_hold_only_themselves() {
    each(Place::Simulated, Found::OnDisk, &[Threads::One]);
}

#[test]
fn parts_kept_of_objects_that_are_promoted_hold_only_themselves() {
    each(Place::Simulated, Found::Often, &[Threads::Two]);
}

#[test]
fn parts_kept_over_a_real_disk_hold_only_themselves() {
    each(Place::Real, Found::OnDisk, &[Threads::Two]);
}

/// Headers that forty tasks keep, each with a stream of other objects behind it.
#[test]
fn tasks_that_keep_headers_do_not_delay_each_other() {
    let mut complaints = Vec::new();
    for threads in THREADS {
        let found = run(threads, || async {
            let store = open(Place::Simulated, SIZES, |builder| builder).await;
            let vmem = &store.vmem;
            let mut handles = Vec::new();
            for n in 0..40 {
                handles.push(vmem.put(bytes(n, 1, MIB), HOST).await.unwrap());
            }
            let mut tasks = tokio::task::JoinSet::new();
            for task in 0..40 {
                let vmem = vmem.clone();
                let handles = handles.clone();
                tasks.spawn(async move {
                    let mut headers = Vec::new();
                    for n in (task..task + 6).map(|n| n % 40) {
                        let what = format!("header {n} of task {task}");
                        let header = vmem.read_at(&handles[n], 128..192);
                        headers.push((n, succeeds(&what, BOUND, header).await?));
                        let body = vmem.read_at(&handles[(n + 1) % 40], 1_000..65_000);
                        let body = succeeds("a body", BOUND, body).await?;
                        check((n + 1) % 40, &[1], 1_000, &body)?;
                    }
                    headers.iter().try_for_each(|(n, header)| check(*n, &[1], 128, header))
                });
            }
            while let Some(task) = tasks.join_next().await {
                task.unwrap()?;
            }
            succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
        });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}
