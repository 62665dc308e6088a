//! Scenario 35 on a full disk: copies and writes left alone between two pieces, and writes that
//! were dropped there.
//!
//! Excluded: extents that such a future keeps, of an old version or of a new one, while the disk
//! says that it is full; space that `allocate` had promised and that a dropped write has lost; a
//! gate that is held while space is waited for. Noticed by a `put` that is refused, by a write to
//! the object that the space was for, and by writes beside it.

use std::time::Duration;

use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, Threads, WAIT, assert_none, run, run_cases, succeeds, within,
};
use crate::keep::Kept;
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, Store, bytes, check, open};

/// More than host memory has, in whole chunks but for the last one.
const LEN: usize = 2 * MIB + 5;
const CHUNK: usize = 64 * KIB;
/// The disk holds two such objects, and a few chunks.
const TWO: Sizes = Sizes { space: MIB, disk: 2 * LEN + 4 * CHUNK };
/// The disk holds one, and a few chunks.
const ONE: Sizes = Sizes { space: MIB, disk: LEN + 4 * CHUNK };

/// How long the store may work on what it was asked, before others come.
const MEANWHILE: Duration = Duration::from_millis(30);

type Ended = Result<(), VirtualMemoryError>;

async fn copy(vmem: VirtualMemory, handle: VMemHandle) -> Result<Vec<u8>, VirtualMemoryError> {
    let mut buf = vec![0; LEN];
    vmem.read_into(&handle, 0..LEN, &mut buf).await.map(|()| buf)
}

async fn write(vmem: VirtualMemory, handle: VMemHandle, version: u64) -> Ended {
    vmem.write(&handle, bytes(1, version, LEN)).await
}

async fn is_version(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    versions: &[u64],
) -> Result<(), String> {
    let copied = succeeds("a copy", BOUND, copy(vmem.clone(), handle.clone())).await?;
    check(1, versions, 0, &copied)
}

async fn copy_left_alone(polls: usize) -> Result<(), String> {
    let store = open(Place::Simulated, TWO, |builder| builder).await;
    let vmem = &store.vmem;
    let subject = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let kept = Kept::polled(copy(vmem.clone(), subject.clone()), polls).await;
    tokio::time::sleep(MEANWHILE).await;
    succeeds("write", BOUND, write(vmem.clone(), subject.clone(), 2)).await?;
    // Where the previous version was.
    let other = vmem.put(bytes(2, 1, LEN), DISK);
    let other = succeeds("put where the old version was", BOUND, other).await?;
    let copied = succeeds("the kept copy", BOUND, kept.finish()).await?;
    check(1, &[1, 2], 0, &copied)?;
    is_version(vmem, &subject, &[2]).await?;
    drop(other);
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

#[test]
fn copies_left_alone_keep_no_space_on_disk() {
    let cases: Vec<_> = [1, 2, 3, 7]
        .into_iter()
        .flat_map(|polls| THREADS.map(|threads| (threads, polls)))
        .collect();
    assert_none(&run_cases(&cases, |(threads, polls)| {
        run(threads, move || copy_left_alone(polls))
    }));
}

async fn write_left_alone(threads: Threads, polls: usize, finished: bool) -> Result<(), String> {
    let store = open(Place::Simulated, TWO, |builder| builder).await;
    let vmem = &store.vmem;
    let subject = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let kept = Kept::polled(write(vmem.clone(), subject.clone(), 2), polls).await;
    if !kept.is_pending() {
        // On another thread the store was faster.
        return succeeds("the write", BOUND, kept.finish()).await;
    }
    tokio::time::sleep(MEANWHILE).await;
    let other = vmem.put(bytes(2, 1, LEN), DISK);
    let other = succeeds("put where the new version would be", BOUND, other).await?;
    // On another thread the store may have taken all of the bytes within these polls.
    let may_be: &[u64] = if threads == Threads::One { &[1] } else { &[1, 2] };
    is_version(vmem, &subject, may_be).await?;
    drop(other);
    if finished {
        succeeds("the kept write", BOUND, kept.finish()).await?;
        is_version(vmem, &subject, &[2]).await?;
    } else {
        drop(kept);
        is_version(vmem, &subject, may_be).await?;
    }
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

#[test]
fn writes_left_alone_keep_no_space_on_disk() {
    let mut cases = Vec::new();
    for polls in [1, 2, 3, 7] {
        for finished in [true, false] {
            cases.extend(THREADS.map(|threads| (threads, polls, finished)));
        }
    }
    assert_none(&run_cases(&cases, |(threads, polls, finished)| {
        run(threads, move || write_left_alone(threads, polls, finished))
    }));
}

/// Objects of one chunk, until the disk has no space for another one.
async fn fill_disk(store: &Store) -> Result<Vec<VMemHandle>, String> {
    let mut handles = Vec::new();
    loop {
        match within("put", BOUND, store.vmem.put(bytes(9, 1, CHUNK), DISK)).await? {
            Ok(handle) => handles.push(handle),
            Err(VirtualMemoryError::TierFull { .. }) => return Ok(handles),
            Err(error) => return Err(format!("put: {error}")),
        }
    }
}

/// What happens to the first write of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Dropped,
    LeftAlone,
    /// And the disk was full before.
    LeftAloneOnFullDisk,
    /// And the next one comes while a task still has it.
    LeftWithItsTask,
}

async fn promise(threads: Threads, first: First, polls: usize, slow: bool) -> Result<(), String> {
    let store = open(Place::Simulated, ONE, |builder| builder).await;
    let vmem = &store.vmem;
    let subject = vmem.allocate(LEN, DISK).await.unwrap();
    let mut filled = match first {
        First::LeftAloneOnFullDisk | First::LeftWithItsTask => fill_disk(&store).await?,
        First::Dropped | First::LeftAlone => Vec::new(),
    };
    if slow {
        let is_with_its_task = first == First::LeftWithItsTask;
        store.slow(Duration::from_millis(if is_with_its_task { 20 } else { 8 }), 1);
    }
    let kept = Kept::polled(write(vmem.clone(), subject.clone(), 1), polls).await;
    if !kept.is_pending() {
        // On another thread the store was faster.
        return succeeds("the first write", BOUND, kept.finish()).await;
    }
    if !slow || first == First::LeftAloneOnFullDisk {
        // A slow disk still works on what it was given.
        tokio::time::sleep(MEANWHILE).await;
    }
    let kept = (first != First::Dropped).then_some(kept);
    if filled.is_empty() {
        filled = fill_disk(&store).await?;
    }
    if filled.len() > 4 {
        return Err(format!("{} chunks are free", filled.len()));
    }
    match within("the next write", BOUND, write(vmem.clone(), subject.clone(), 2)).await? {
        Ok(()) => is_version(vmem, &subject, &[2]).await?,
        // On another thread the store may have taken all of the first write within these polls.
        // Then the space is in use, and the disk has none for a second version.
        Err(VirtualMemoryError::TierFull { .. }) if threads == Threads::Two => {
            return is_version(vmem, &subject, &[1]).await;
        }
        Err(error) => return Err(format!("the next write: {error}")),
    }
    if let Some(kept) = kept {
        drop(filled);
        // There may be space for another version, or not.
        match within("the first write", BOUND, kept.finish()).await? {
            Ok(()) => is_version(vmem, &subject, &[1]).await?,
            Err(VirtualMemoryError::TierFull { .. }) => is_version(vmem, &subject, &[2]).await?,
            Err(error) => return Err(format!("the first write: {error}")),
        }
    }
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

#[test]
fn first_write_that_was_dropped_or_left_alone_leaves_the_space_to_its_object() {
    let mut cases = Vec::new();
    for first in [First::Dropped, First::LeftAlone, First::LeftAloneOnFullDisk] {
        for polls in [1, 2, 3, 7] {
            for slow in [false, true] {
                cases.extend(THREADS.map(|threads| (threads, first, polls, slow)));
            }
        }
    }
    assert_none(&run_cases(&cases, |(threads, first, polls, slow)| {
        run(threads, move || promise(threads, first, polls, slow))
    }));
}

/// Its pieces are on their way to a slow disk, so nothing lies aside that could be taken back.
#[test]
fn first_write_that_a_task_still_has_is_waited_for() {
    let cases: Vec<_> = [1, 2, 3, 7, 15]
        .into_iter()
        .flat_map(|polls| THREADS.map(|threads| (threads, polls)))
        .collect();
    assert_none(&run_cases(&cases, |(threads, polls)| {
        run(threads, move || promise(threads, First::LeftWithItsTask, polls, true))
    }));
}

/// An object that is pinned while it is written to disk, and for which host memory has no space
/// then.
async fn pinned_meanwhile() -> Result<(), String> {
    const LEN: usize = MIB + MIB / 4;
    let sizes = Sizes { space: 2 * MIB, disk: 16 * MIB };
    let store = open(Place::Simulated, sizes, |builder| builder).await;
    let vmem = &store.vmem;
    let subject = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    store.slow(Duration::from_millis(8), 1);
    let writer = vmem.clone();
    let handle = subject.clone();
    let written = tokio::spawn(async move { writer.write(&handle, bytes(1, 2, LEN)).await });
    tokio::time::sleep(Duration::from_millis(12)).await;
    let pin = succeeds("pin", BOUND, vmem.pin(&subject, HOST)).await?;
    let old = succeeds("read", BOUND, vmem.read(&subject)).await?;
    check(1, &[1], 0, &old)?;
    // There is no space for two versions in host memory, which the new one must not leave: it waits
    // until its deadline, as any write to a pinned object does, and no other call waits behind it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    if written.is_finished() {
        return Err("it went past the pin".into());
    }
    succeeds("flush", BOUND, vmem.flush(&subject)).await?;
    drop(old);
    succeeds("another write", BOUND, vmem.write_at(&subject, 5, &bytes(1, 1, LEN)[5..300])).await?;
    match within("the write", WAIT + BOUND, async { written.await.unwrap() }).await? {
        Err(VirtualMemoryError::AllPinned { .. }) => {}
        other => return Err(format!("the write: {other:?}")),
    }
    if !vmem.residency(&subject).unwrap().host {
        return Err("it is not in host memory".into());
    }
    check(1, &[1], 0, &succeeds("read", BOUND, vmem.read(&subject)).await?)?;
    drop(pin);
    succeeds("the write again", BOUND, vmem.write(&subject, bytes(1, 2, LEN))).await?;
    check(1, &[2], 0, &succeeds("read", BOUND, vmem.read(&subject)).await?)?;
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

#[test]
fn object_pinned_while_it_is_written_stays_and_its_gate_is_open() {
    assert_none(&run_cases(&THREADS, |threads| run(threads, pinned_meanwhile)));
}
