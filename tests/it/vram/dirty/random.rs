//! Every call at random beside kernels, each object against the versions that it may have.
//!
//! Excluded: bytes of no version, a loss that is not told, or not told again, a loss where each
//! lease is written back, a way back to before the last flush, and bytes or space that are left
//! behind. Noticed by the bytes that each call returns.
//!
//! `VMEM_DEVICE_RUNS=1000 cargo test --test it vram::dirty::random -- --nocapture` for more.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::backend::{DeviceError, UseEnd, VramHold};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError, WriteBack};

use super::{VRAM, access, assert_all_back, is_lost, open};
use crate::support::{self, DISK, HOST, KIB, bytes};

/// The bytes that one object may have: those of the last call that ended well, and of calls that
/// were dropped or failed since.
struct Owned {
    handle: VMemHandle,
    may_have: Vec<Vec<u8>>,
    /// What writes that were dropped may still make of it: one that was about to be published then
    /// is there a moment later, and before anything else that changes the object.
    dropped: Vec<Vec<u8>>,
    /// What a lost version may go back to.
    before: Vec<Vec<u8>>,
    /// What was done with it, for the message of a failure.
    history: Vec<String>,
}

impl Owned {
    fn new(handle: VMemHandle) -> Self {
        let zeros = vec![vec![0; handle.len()]];
        let history = vec![format!("{handle:?}")];
        Owned { handle, before: zeros.clone(), may_have: zeros, dropped: Vec::new(), history }
    }

    /// Notes what was done, and what it may be after that.
    fn note(&mut self, what: String) {
        let versions: Vec<_> = self.may_have.iter().map(|bytes| label(bytes)).collect();
        self.history.push(format!("{what}: {versions:x?}"));
    }

    fn is_now(&mut self, bytes: Vec<u8>) {
        self.before.push(bytes.clone());
        self.may_have = vec![bytes];
        self.dropped.clear();
    }

    /// What it may have, now or in a moment.
    fn may_come_to(&self) -> Vec<Vec<u8>> {
        self.may_have.iter().chain(&self.dropped).cloned().collect()
    }

    fn may_be(&mut self, bytes: Vec<u8>) {
        self.before.push(bytes.clone());
        self.may_have.push(bytes);
    }

    /// Bytes that were read of it from `offset` on.
    fn check(&mut self, offset: usize, read: &[u8]) {
        let end = offset + read.len();
        let is_it = |bytes: &Vec<u8>| bytes[offset..end] == *read;
        self.may_have.retain(is_it);
        if self.may_have.is_empty() {
            self.may_have = self.dropped.iter().filter(|bytes| is_it(bytes)).cloned().collect();
        }
        if self.may_have.is_empty() {
            let history = self.history.join("\n");
            panic!("{:x}.. from {offset} on is no version of {history}", label(read));
        }
    }
}

/// What tells versions apart in a message.
fn label(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum: u32, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
}

async fn step(vmem: &VirtualMemory, rng: &mut SmallRng, owned: &mut Owned) -> Option<bool> {
    let handle = owned.handle.clone();
    let len = handle.len();
    let tier = [VRAM, HOST, DISK][rng.random_range(0..3)];
    let limit = match rng.random_range(0..4) {
        0 => Duration::from_micros(rng.random_range(0..2000)),
        _ => Duration::from_secs(20),
    };
    let at = rng.random_range(0..len);
    let until = rng.random_range(at..=len);
    let call = rng.random_range(0..16);
    let outcome = match call {
        0..=2 => {
            let read = tokio::time::timeout(limit, vmem.read(&handle)).await;
            read.map(|read| read.map(|read| owned.check(0, &read)))
        }
        3 => {
            let read = tokio::time::timeout(limit, vmem.read_at(&handle, at..until)).await;
            read.map(|read| read.map(|read| owned.check(at, &read)))
        }
        4 => {
            let mut buf = vec![0; until - at];
            let read = vmem.read_into(&handle, at..until, &mut buf);
            let read = tokio::time::timeout(limit, read).await;
            read.map(|read| read.map(|()| owned.check(at, &buf)))
        }
        5 => {
            let new: Vec<u8> = bytes(rng.random(), 1, len);
            let write = tokio::time::timeout(limit, vmem.write(&handle, &new)).await;
            match write {
                Ok(Ok(())) => owned.is_now(new),
                Ok(Err(_)) => owned.may_be(new),
                Err(_) => {
                    owned.dropped.push(new.clone());
                    owned.may_be(new);
                }
            }
            write
        }
        6 => {
            let new = vec![rng.random(); until - at];
            let write = tokio::time::timeout(limit, vmem.write_at(&handle, at, &new)).await;
            let over = |mut bytes: Vec<u8>| {
                bytes[at..until].copy_from_slice(&new);
                bytes
            };
            let after: Vec<_> = owned.may_come_to().into_iter().map(over).collect();
            owned.before.extend(after.iter().cloned());
            match write {
                Ok(Ok(())) => {
                    owned.may_have = after;
                    owned.dropped.clear();
                }
                Ok(Err(_)) => owned.may_have.extend(after),
                Err(_) => {
                    owned.dropped.extend(after.iter().cloned());
                    owned.may_have.extend(after);
                }
            }
            write
        }
        7..=10 => return leases(vmem, rng, owned).await,
        11 => tokio::time::timeout(limit, vmem.promote(&handle, tier)).await,
        12 => tokio::time::timeout(limit, vmem.demote(&handle, tier)).await,
        13 => {
            let flushed = tokio::time::timeout(limit, vmem.flush(&handle)).await;
            if matches!(flushed, Ok(Ok(()))) && handle.home_tier() != VRAM {
                // It is written back: nothing goes back beyond that.
                owned.before = owned.may_come_to();
            }
            flushed
        }
        14 => {
            let hold = tokio::time::timeout(limit, access(vmem, 0).hold(&handle)).await;
            let pause = Duration::from_micros(rng.random_range(0..500));
            // Its kernel has not ended when the lease does.
            let ends = |hold: VramHold| {
                let share = hold.end().map(|share| share.until(Some(Arc::new(()))));
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    drop(share);
                });
            };
            hold.map(|hold| hold.map(ends))
        }
        _ => {
            vmem.prefetch(&handle, tier).detach();
            Ok(Ok(()))
        }
    };
    owned.note(format!("call {call} {at}..{until} {tier} {outcome:?}"));
    match outcome {
        Ok(outcome) => told(owned, outcome),
        Err(_dropped) => None,
    }
}

/// One lease that writes all of the object, or several of which each begins before the kernel of
/// the one before has ended, where that is known and the store does not wait for it.
async fn leases(vmem: &VirtualMemory, rng: &mut SmallRng, owned: &mut Owned) -> Option<bool> {
    let handle = owned.handle.clone();
    let len = handle.len();
    let count = if rng.random_ratio(1, 2) { 1 } else { rng.random_range(2..5) };
    let mut refused = Ok(());
    let mut finished = Vec::new();
    let mut reads = Vec::new();
    let mut fails = false;
    for _ in 0..count {
        let change = match access(vmem, 0).change(&handle, rng.random_ratio(1, 8)).await {
            Ok(change) => change,
            Err(error) => {
                refused = Err(error);
                break;
            }
        };
        if rng.random_ratio(1, 10) {
            // Nobody knew where it is, unless it was zeroed.
            drop(change);
            owned.note("dropped lease".to_owned());
            continue;
        }
        let new: Bytes = bytes(rng.random(), 1, len).into();
        let range = change.range().unwrap();
        let written = access(vmem, 0).backend().upload(range, 0, new.clone()).await;
        // A read under the lease waits for its end, and never finds the bytes lost.
        if rng.random_ratio(1, 4) {
            let vmem = vmem.clone();
            let handle = handle.clone();
            reads.push(tokio::spawn(async move { vmem.read(&handle).await }));
        }
        if rng.random_ratio(1, 2) {
            tokio::task::yield_now().await;
        }
        let ended = if rng.random_ratio(1, 5) { Err(DeviceError::Closed) } else { written };
        fails |= ended.is_err();
        let pause = Duration::from_micros(rng.random_range(0..500));
        let ready = async move {
            tokio::time::sleep(pause).await;
            ended
        };
        let end = rng.random_ratio(3, 4).then(|| -> UseEnd { Arc::new(()) });
        finished.push((new, change.finish(ready.boxed(), end)));
    }
    let mut may_show = owned.may_come_to();
    may_show.extend(finished.iter().map(|(new, _)| new.to_vec()));
    for (new, finish) in finished {
        let outcome = finish.await;
        if outcome.is_ok() {
            owned.is_now(new.to_vec());
        }
        owned.note(format!("lease {:x} {outcome:?}", label(&new)));
        // Else the previous version stays, or is lost.
        refused = refused.and(outcome);
    }
    owned.note(format!("{count} leases {refused:?}"));
    for read in reads {
        match read.await.unwrap() {
            Ok(read) => {
                let is_one = may_show.iter().any(|one| one[..] == read[..]);
                assert!(is_one, "object {} under a lease", handle.id());
            }
            Err(error) if is_lost(&error) => {
                let is_expected = fails || access(vmem, 0).backend().lost().is_some();
                assert!(is_expected, "{error:?} of a lease that ends");
            }
            Err(VirtualMemoryError::Device { .. }) => {}
            Err(error) if support::is_pressure(&error) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    told(owned, refused)
}

/// Reads an object once what is in the way for a while has passed.
async fn read_again(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
) -> Result<Bytes, VirtualMemoryError> {
    loop {
        match vmem.read(handle).await {
            Err(error) if support::is_pressure(&error) => {}
            Err(VirtualMemoryError::Device { code: 719, .. }) => {}
            outcome => return outcome,
        }
    }
}

/// What a call came to: whether it ended well, or none if its object was lost.
fn told(owned: &mut Owned, outcome: Result<(), VirtualMemoryError>) -> Option<bool> {
    match outcome {
        Ok(()) => Some(true),
        Err(error) if is_lost(&error) => {
            owned.may_have.clear();
            None
        }
        Err(VirtualMemoryError::Device { .. } | VirtualMemoryError::Closed) => Some(false),
        // The device was lost, with what else it had.
        Err(VirtualMemoryError::TierNotAvailable { tier: VRAM, .. }) => Some(false),
        Err(error) if support::is_pressure(&error) => Some(false),
        Err(error) => panic!("{error:?}"),
    }
}

/// Returns how many versions were lost: with kernels that failed, or with the device, if that is
/// lost half way (`loses`).
async fn at_random(write_back: WriteBack, loses: bool, seed: u64) -> usize {
    let bench = open(write_back, 700 * KIB, 800 * KIB);
    let vmem = &bench.vmem;
    // So that copies down fail three times, too.
    let refused = if (seed >> 40).is_multiple_of(2) { 40 } else { 3 };
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6_u64 {
        let vmem = vmem.clone();
        let device = bench.devices[0].clone();
        let mut rng = SmallRng::seed_from_u64(seed ^ (task << 32));
        tasks.spawn(async move {
            let mut objects: Vec<Owned> = Vec::new();
            let mut counts = [0; 2];
            let loss = (loses && task == 0).then(|| rng.random_range(50..250));
            for nth in 0..300 {
                if loss == Some(nth) {
                    device.lose();
                }
                if objects.len() < 6 || rng.random_ratio(1, 30) {
                    let len = [500, 4096, 40_000, 65_536, 150_000][rng.random_range(0..5)];
                    let home = [VRAM, HOST, DISK][rng.random_range(0..3)];
                    objects.extend(vmem.allocate(len, home).await.ok().map(Owned::new));
                    continue;
                }
                if rng.random_ratio(1, refused) {
                    device.fail_next(1);
                }
                let at = rng.random_range(0..objects.len());
                let owned = &mut objects[at];
                let before = owned.may_have.clone();
                let outcome = step(&vmem, &mut rng, owned).await;
                counts[0] += usize::from(outcome == Some(true));
                if !owned.may_have.is_empty() {
                    if rng.random_ratio(1, 30) {
                        objects.swap_remove(at);
                    }
                    continue;
                }
                // It was lost: it says so until it goes back, or is written.
                counts[1] += 1;
                for _ in 0..rng.random_range(0..3) {
                    let again = read_again(&vmem, &owned.handle).await;
                    assert!(again.as_ref().is_err_and(is_lost), "{again:?} after a loss");
                }
                let is_eager = write_back == WriteBack::Eager;
                assert!(!is_eager, "it was {} versions", before.len());
                if rng.random_ratio(1, 3) {
                    let new: Vec<u8> = bytes(rng.random(), 1, owned.handle.len());
                    let written = vmem.write(&owned.handle, &new).await;
                    let is_written = written.is_ok();
                    let what = format!("write {:x} of what is lost: {written:?}", label(&new));
                    if is_written {
                        owned.is_now(new);
                    }
                    owned.note(what);
                    if is_written {
                        continue;
                    }
                }
                match vmem.revert(&owned.handle).await {
                    Ok(()) => {
                        let read = read_again(&vmem, &owned.handle).await.unwrap().to_vec();
                        let was = owned.before.contains(&read);
                        assert!(was, "object {} was never that", owned.handle.id());
                        owned.may_have = vec![read];
                        owned.dropped.clear();
                        owned.note("revert".to_owned());
                    }
                    Err(error) => {
                        assert!(is_lost(&error), "{error:?}");
                        objects.swap_remove(at);
                    }
                }
            }
            counts
        });
    }
    let counts = tasks.join_all().await;
    let stats = vmem.stats();
    println!("{write_back:?}, {loses}, seed {seed}: {counts:?}, {stats:?}");
    let lost = counts.iter().map(|counts| counts[1]).sum::<usize>();
    let least = if loses { 300 } else { 500 };
    assert!(counts.iter().map(|counts| counts[0]).sum::<usize>() > least, "{counts:?}");
    assert_all_back(bench, Vec::new()).await;
    lost
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_at_random_beside_kernels() {
    let seed = support::seed();
    let runs = std::env::var("VMEM_DEVICE_RUNS").map_or(5, |text| text.parse().unwrap());
    let after = WriteBack::After(Duration::from_millis(2));
    let kinds = [
        (WriteBack::Eager, false),
        (after, false),
        (WriteBack::OnEvict, false),
        (after, true),
        (WriteBack::OnEvict, true),
    ];
    let mut lost = 0;
    for (nth, (write_back, loses)) in (0..runs).zip(kinds.into_iter().cycle()) {
        lost += at_random(write_back, loses, seed ^ nth << 40).await;
    }
    println!("{runs} runs, {lost} versions lost and reported");
    assert!(lost > 0, "kernels failed, and nothing was lost");
}
