//! Scenario 36: host memory and disk full of live objects, from a handful to twenty thousand of
//! them resident, under each policy.
//!
//! Excluded: a search for a victim that restarts for ever and never says that there is none; a
//! request that waits out its timeout where no space can come; a busy core; freed space that stays
//! unused. Noticed by the error that ends the filling, by the share of the wait timeout that it
//! took, by the CPU time of an idle store, and by the calls that are served afterwards.

use std::time::Instant;

use vmem::{PolicyKind, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::thread_cpu;

use crate::harness::{BOUND, CLOSE_BOUND, Threads, WAIT, assert_none, run, succeeds, within};
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, bytes, check, open};

const POLICIES: [PolicyKind; 3] = [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo];

/// The length of an object, and the host memory and disk that such objects fill. From 5 to 20,000
/// of them are resident.
const FILLS: [(usize, Sizes); 8] = [
    (100, Sizes { space: 2 * MIB, disk: 2 * MIB }),
    (5_000, Sizes { space: 2 * MIB, disk: 2 * MIB }),
    (20_000, Sizes { space: 2 * MIB, disk: 3 * MIB }),
    (60_000, Sizes { space: 4 * MIB, disk: 4 * MIB }),
    (60_000, Sizes { space: 16 * MIB, disk: 8 * MIB }),
    (300_000, Sizes { space: 2 * MIB, disk: 2 * MIB }),
    (300_000, Sizes { space: 32 * MIB, disk: 4 * MIB }),
    (1_000_000, Sizes { space: 96 * MIB, disk: 4 * MIB }),
];

/// Puts objects until one is refused. Each is numbered by its place in what is returned.
async fn fill(
    vmem: &VirtualMemory,
    len: usize,
    home: impl Fn(usize) -> vmem::MemoryTier,
) -> Result<Vec<VMemHandle>, String> {
    let mut handles = Vec::new();
    loop {
        let n = handles.len();
        let began = Instant::now();
        let put = vmem.put(bytes(n, 1, len), home(n));
        match within("put", 2 * WAIT, put).await? {
            Ok(handle) => handles.push(handle),
            Err(error) => {
                refused_at_once(&format!("put {n}"), began, &error)?;
                return Ok(handles);
            }
        }
        if began.elapsed() > BOUND {
            return Err(format!("put {n} succeeded after {:?}", began.elapsed()));
        }
    }
}

/// A request for which there can be no space gets `TierFull`, and not by its deadline.
pub(crate) fn refused_at_once(
    what: &str,
    began: Instant,
    error: &VirtualMemoryError,
) -> Result<(), String> {
    let took = began.elapsed();
    match error {
        VirtualMemoryError::TierFull { .. } if took < WAIT / 2 => Ok(()),
        other => Err(format!("{what}, after {took:?}: {other}")),
    }
}

/// The calls that are served, or refused at once, on a full store; then freed space is used.
async fn serves(vmem: &VirtualMemory, mut full: Vec<VMemHandle>, len: usize) -> Result<(), String> {
    let is_resident = |handle: &VMemHandle| vmem.residency(handle).unwrap().host;
    let hot = full.iter().position(is_resident);
    let cold = full.iter().position(|handle| !is_resident(handle));
    for n in hot.into_iter().chain(cold) {
        let mut buf = vec![0; len];
        let copied = vmem.read_into(&full[n], 0..len, &mut buf);
        succeeds("read_into", BOUND, copied).await?;
        check(n, &[1], 0, &buf)?;
    }
    if let Some(n) = hot {
        let read = succeeds("read of a resident object", BOUND, vmem.read(&full[n])).await?;
        check(n, &[1], 0, &read)?;
        let new = bytes(n, 2, len);
        drop(read);
        succeeds("write in place", BOUND, vmem.write(&full[n], &new)).await?;
        let old = bytes(n, 1, len);
        succeeds("write in place", BOUND, vmem.write(&full[n], &old)).await?;
    }
    idle_costs_nothing("full").await?;
    if let Some(n) = cold {
        let began = Instant::now();
        match within("read of a cold object", 2 * WAIT, vmem.read(&full[n])).await? {
            Ok(read) => check(n, &[1], 0, &read)?,
            Err(error) => refused_at_once("read of a cold object", began, &error)?,
        }
    }
    // A tenth goes, or two objects: the next puts find space, several times over.
    let gone = (full.len() / 10).max(2);
    for _ in 0..3 {
        let at = full.len() - gone;
        drop(full.split_off(at));
        let mut came = 0;
        while came < gone.div_ceil(2) {
            let put = vmem.put(bytes(at + came, 1, len), HOST);
            full.push(succeeds("put into freed space", BOUND, put).await?);
            came += 1;
        }
    }
    for (n, handle) in full.iter().enumerate().step_by(full.len() / 40 + 1) {
        let mut buf = vec![0; len];
        succeeds("read_into", BOUND, vmem.read_into(handle, 0..len, &mut buf)).await?;
        check(n, &[1], 0, &buf)?;
    }
    Ok(())
}

/// On a current-thread runtime the engine runs on this thread.
pub(crate) async fn idle_costs_nothing(when: &str) -> Result<(), String> {
    let cpu = thread_cpu();
    let began = Instant::now();
    tokio::time::sleep(std::time::Duration::from_millis(250)).await;
    let busy = thread_cpu() - cpu;
    let took = began.elapsed();
    match busy * 4 > took {
        true => Err(format!("{when}: {busy:?} of CPU in {took:?} of doing nothing")),
        false => Ok(()),
    }
}

fn each_fill(place: Place, policy: PolicyKind, fills: &[(usize, Sizes)]) {
    let mut complaints = Vec::new();
    for &(len, sizes) in fills {
        let found = run(Threads::One, move || async move {
            let store = open(place, sizes, |builder| builder.policy(policy)).await;
            let full = fill(&store.vmem, len, |_| HOST).await?;
            serves(&store.vmem, full, len).await?;
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
        });
        let about = format!("{place:?}, {policy}, {len} bytes in {sizes:?}");
        complaints.extend(found.err().map(|why| format!("{about}: {why}")));
    }
    assert_none(&complaints);
}

#[test]
fn full_tiers_refuse_at_once_under_lru() {
    each_fill(Place::Simulated, PolicyKind::Lru, &FILLS);
}

#[test]
fn full_tiers_refuse_at_once_under_sieve() {
    each_fill(Place::Simulated, PolicyKind::Sieve, &FILLS);
}

#[test]
fn full_tiers_refuse_at_once_under_s3_fifo() {
    each_fill(Place::Simulated, PolicyKind::S3Fifo, &FILLS);
}

#[test]
fn full_tiers_refuse_at_once_over_a_real_disk() {
    let fills = [FILLS[1], FILLS[3], FILLS[5]];
    for policy in POLICIES {
        each_fill(Place::Real, policy, &fills);
    }
}

/// Sizes and homes mixed, and eight tasks that fill at once: all are refused, none hangs.
#[test]
fn full_tiers_refuse_at_once_whoever_filled_them() {
    let mut complaints = Vec::new();
    for (n, policy) in POLICIES.into_iter().enumerate() {
        let threads = if n == 0 { Threads::One } else { Threads::Two };
        let found = run(threads, move || async move {
            let sizes = Sizes { space: 6 * MIB, disk: 4 * MIB };
            let store = open(Place::Simulated, sizes, |builder| builder.policy(policy)).await;
            let mut tasks = tokio::task::JoinSet::new();
            for task in 0..8 {
                let vmem = store.vmem.clone();
                let len = [3_000, 30_000, 65_536, 200_000][task % 4];
                tasks.spawn(async move {
                    let home = |n| if n % 3 == 0 { DISK } else { HOST };
                    fill(&vmem, len + task, home).await.map(|full| (full, len + task))
                });
            }
            let mut filled = Vec::new();
            while let Some(task) = tasks.join_next().await {
                filled.push(task.unwrap()?);
            }
            // Each task ended at its first refusal: what is left is for the smallest.
            filled.push((fill(&store.vmem, 2_999, |_| HOST).await?, 2_999));
            for (full, len) in &filled {
                for (n, handle) in full.iter().enumerate() {
                    let mut buf = vec![0; *len];
                    succeeds("read_into", BOUND, store.vmem.read_into(handle, 0..*len, &mut buf))
                        .await?;
                    check(n, &[1], 0, &buf)?;
                }
            }
            drop(filled);
            succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
        });
        complaints.extend(found.err().map(|why| format!("{policy}, {threads:?}: {why}")));
    }
    assert_none(&complaints);
}

/// Reservations fill both tiers, not bytes: they move, are refused, and are all writable.
#[test]
fn allocations_fill_both_tiers_and_stay_writable() {
    let found = run(Threads::One, || async {
        let sizes = Sizes { space: 4 * MIB, disk: 4 * MIB };
        let store = open(Place::Simulated, sizes, |builder| builder).await;
        let vmem = &store.vmem;
        let len = 50 * KIB;
        let mut full = Vec::new();
        loop {
            let began = Instant::now();
            match within("allocate", 2 * WAIT, vmem.allocate(len, HOST)).await? {
                Ok(handle) => full.push(handle),
                Err(error) => break refused_at_once("allocate", began, &error)?,
            }
        }
        for (n, handle) in full.iter().enumerate() {
            succeeds("first write", BOUND, vmem.write(handle, bytes(n, 1, len))).await?;
        }
        for (n, handle) in full.iter().enumerate() {
            let mut buf = vec![0; len];
            succeeds("read_into", BOUND, vmem.read_into(handle, 0..len, &mut buf)).await?;
            check(n, &[1], 0, &buf)?;
        }
        succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
    });
    assert_none(&Vec::from_iter(found.err()));
}
