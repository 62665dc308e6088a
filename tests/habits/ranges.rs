//! Scenario 39: a hot object that is only ever read in ranges, at every size.
//!
//! Excluded: a rule for promotion that does not see ranges, so that each of them is a read from
//! disk for ever, with the whole of its chunk. Noticed by the bytes that were moved, by where the
//! object is in the end, and by reads of a warm object that move anything.

use rand::Rng;
use vmem::{Promotion, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::Seed;

use crate::harness::{BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, run, succeeds};
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, bytes, check, open};

const SIZES: Sizes = Sizes { space: 24 * MIB, disk: 64 * MIB };
const LENS: [usize; 6] = [8 * KIB, 48 * KIB, 64 * KIB + 1, 200 * KIB + 7, MIB, 6 * MIB];
/// What is asked for, as a multiple of the object, before it counts as warm.
const TIMES: usize = 6;

#[derive(Clone, Copy, Debug)]
enum How {
    ReadAt,
    ReadWith,
    ReadInto,
    InTurn,
}

const HOWS: [How; 4] = [How::ReadAt, How::ReadWith, How::ReadInto, How::InTurn];

/// Which ranges are read.
#[derive(Clone, Copy, Debug)]
enum Ranges {
    /// Anywhere, four kibibytes.
    Random,
    /// From start to end, in pieces of ten thousand bytes, again and again.
    Scans,
}

async fn one(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    how: How,
    nth: usize,
    range: std::ops::Range<usize>,
) -> Result<Vec<u8>, VirtualMemoryError> {
    let how = match how {
        How::InTurn => HOWS[nth % 3],
        how => how,
    };
    match how {
        How::ReadAt => vmem.read_at(handle, range).await.map(Vec::from),
        How::ReadWith => {
            let read = vmem.read_with(handle, ReadOptions::new().range(range)).await;
            read.map(Vec::from)
        }
        How::ReadInto | How::InTurn => {
            let mut buf = vec![0; range.len()];
            vmem.read_into(handle, range, &mut buf).await.map(|()| buf)
        }
    }
}

/// Reads ranges until `bytes` were asked for; returns the bytes that were asked for.
async fn read_ranges(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    (how, ranges, bytes): (How, Ranges, usize),
) -> Result<usize, String> {
    let mut rng = Seed::new(39).fork_nth("ranges", handle.len() as u64).rng();
    let mut asked = 0;
    let mut nth = 0;
    let mut at = 0;
    while asked < bytes {
        let range = match ranges {
            Ranges::Random => {
                let len = (4 * KIB).min(handle.len());
                let start = rng.random_range(0..=handle.len() - len);
                start..start + len
            }
            Ranges::Scans => at..(at + 10_000).min(handle.len()),
        };
        at = if range.end == handle.len() { 0 } else { range.end };
        let what = format!("read {nth}");
        let read = one(vmem, handle, how, nth, range.clone());
        let read = succeeds(&what, BOUND, read).await?;
        check(1, &[1], range.start, &read)?;
        asked += range.len();
        nth += 1;
    }
    Ok(asked)
}

async fn hot(place: Place, len: usize, how: How, ranges: Ranges) -> Result<(), String> {
    let store = open(place, SIZES, |builder| builder).await;
    let vmem = &store.vmem;
    let handle = vmem.put(bytes(1, 1, len), HOST).await.unwrap();
    vmem.demote(&handle, DISK).await.unwrap();
    let before = vmem.stats().disk_to_host_bytes;
    let asked = read_ranges(vmem, &handle, (how, ranges, TIMES * len)).await? as u64;
    let moved = vmem.stats().disk_to_host_bytes - before;
    if !vmem.residency(&handle).unwrap().host {
        return Err(format!("it is not in host memory, {asked} bytes asked, {moved} moved"));
    }
    if moved > 2 * asked {
        return Err(format!("{moved} bytes moved for {asked} that were asked for"));
    }
    let warm = vmem.stats();
    read_ranges(vmem, &handle, (how, ranges, 2 * len)).await?;
    let after = vmem.stats();
    let moved = after.disk_to_host_bytes - warm.disk_to_host_bytes;
    if moved != 0 || after.host.hits == warm.host.hits {
        return Err(format!("{moved} bytes moved once it is warm"));
    }
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

fn each(place: Place, ranges: Ranges, threads: &[Threads]) {
    let mut complaints = Vec::new();
    for len in LENS {
        for how in HOWS {
            for &threads in threads {
                let found = run(threads, move || hot(place, len, how, ranges)).err();
                let about = format!("{len} bytes, {how:?}, {place:?}, {threads:?}");
                complaints.extend(found.map(|why| format!("{about}: {why}")));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn object_is_promoted_where_it_is_read_at_random() {
    each(Place::Simulated, Ranges::Random, &[Threads::One]);
}

#[test]
fn object_is_promoted_where_it_is_scanned_in_parts() {
    each(Place::Simulated, Ranges::Scans, &[Threads::One]);
}

#[test]
fn object_is_promoted_where_its_ranges_come_from_a_real_disk() {
    each(Place::Real, Ranges::Random, &[Threads::Two]);
}

/// Eight tasks share the reads of one object.
#[test]
fn object_is_promoted_where_many_tasks_read_its_ranges() {
    let mut complaints = Vec::new();
    for threads in THREADS {
        for how in HOWS {
            let found = run(threads, move || async move {
                let store = open(Place::Simulated, SIZES, |builder| builder).await;
                let vmem = &store.vmem;
                let handle = vmem.put(bytes(1, 1, MIB), DISK).await.unwrap();
                let mut tasks = tokio::task::JoinSet::new();
                for _ in 0..8 {
                    let vmem = vmem.clone();
                    let handle = handle.clone();
                    tasks.spawn(async move {
                        read_ranges(&vmem, &handle, (how, Ranges::Random, MIB)).await
                    });
                }
                let mut asked = 0;
                while let Some(task) = tasks.join_next().await {
                    asked += task.unwrap()? as u64;
                }
                let moved = vmem.stats().disk_to_host_bytes;
                match vmem.residency(&handle).unwrap().host && moved <= 2 * asked {
                    true => Ok(()),
                    false => Err(format!("{moved} bytes moved for {asked}")),
                }
            });
            complaints.extend(found.err().map(|why| format!("{threads:?}, {how:?}: {why}")));
        }
    }
    assert_none(&complaints);
}

/// The rule is the rule for ranges too: never is never, and the first read is enough where it is.
#[test]
fn object_read_in_ranges_follows_the_rule_for_promotion() {
    let mut complaints = Vec::new();
    for (promotion, comes) in [(Promotion::Never, false), (Promotion::OnNthRead(1), true)] {
        for len in [48 * KIB, MIB] {
            let found = run(Threads::One, move || async move {
                let set = |builder: vmem::VirtualMemoryConfigBuilder| builder.promotion(promotion);
                let store = open(Place::Simulated, SIZES, set).await;
                let vmem = &store.vmem;
                let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
                read_ranges(vmem, &handle, (How::InTurn, Ranges::Random, 3 * len)).await?;
                match vmem.residency(&handle).unwrap().host == comes {
                    true => Ok(()),
                    false => Err("it did not do what the rule says".to_owned()),
                }
            });
            complaints.extend(found.err().map(|why| format!("{promotion:?}, {len}: {why}")));
        }
    }
    assert_none(&complaints);
}

/// An object that exceeds host memory stays on disk, and its ranges are right.
#[test]
fn object_larger_than_host_memory_is_read_in_ranges() {
    let found = run(Threads::One, || async {
        let sizes = Sizes { space: MIB, disk: 32 * MIB };
        let store = open(Place::Simulated, sizes, |builder| builder).await;
        let handle = store.vmem.put(bytes(1, 1, 3 * MIB), DISK).await.unwrap();
        for how in HOWS {
            read_ranges(&store.vmem, &handle, (how, Ranges::Scans, 4 * MIB)).await?;
        }
        succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
    });
    assert_none(&Vec::from_iter(found.err()));
}
