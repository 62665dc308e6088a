//! The store around kept futures: the state that it is in, the tasks that use it meanwhile, and
//! what must hold of all of them.
//!
//! Invariant: those tasks use objects of their own, and some that kept futures are about; each has
//! a bound that is well within the wait timeout. Called by the tests of scenario 35.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, join_all};
use vmem::{ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::calls::{Call, LEN, Subject, name};
use crate::harness::{BOUND, CLOSE_BOUND, Threads, is_deadline, run, run_cases, succeeds, within};
use crate::keep::Kept;
use crate::stores::{DISK, HOST, MIB, Place, Sizes, Store, bytes, check, cold, fill_host, open};

/// Host memory is a tenth of what the kept futures are about.
const SIZES: Sizes = Sizes { space: 3 * MIB, disk: 128 * MIB };
const BESIDE: usize = 1_000;
const FILLERS: usize = 2_000;
/// How long the store may work on what it was asked, before others come.
const MEANWHILE: Duration = Duration::from_millis(30);
/// How long a prefetch of the other tasks is waited for.
const PREFETCH_WAIT: Duration = Duration::from_millis(200);

/// The state in which the calls find the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Host memory is nearly empty, everything is on disk.
    HostCold,
    /// Host memory is full of what was never written back.
    HostFull,
    /// The disk is slow, and readers that run keep all of staging in use.
    StagingBusy,
}

pub(crate) const STATES: [State; 3] = [State::HostCold, State::HostFull, State::StagingBusy];

/// Keeps this call in each state, and returns what it did to others.
pub(crate) fn keep(place: Place, call: Call, cases: &[(State, Threads)]) -> Vec<String> {
    run_cases(cases, |(state, threads)| run(threads, move || case(place, call, state)))
}

async fn case(place: Place, call: Call, state: State) -> Result<(), String> {
    let store = open(place, SIZES, |builder| builder).await;
    let vmem = store.vmem.clone();
    let objects = cold(&vmem, 0, call.count(), LEN).await;
    let beside = beside(&vmem).await;
    if call.is_of_names() {
        let vmem = &vmem;
        let named = (0..call.count())
            .map(|n| async move { vmem.put_named(&name(n), b"named", HOST).await });
        join_all(named).await.into_iter().for_each(|named| drop(named.unwrap()));
    }
    let filled = match state {
        State::HostFull => fill_host(&vmem, FILLERS, 40_000).await,
        State::HostCold | State::StagingBusy => Vec::new(),
    };
    let busy = (state == State::StagingBusy).then(|| Busy::start(&store, &beside[12..]));
    let subject = Subject { vmem: vmem.clone(), objects, dir: store.dir.path().to_owned() };

    let mut kept = Vec::with_capacity(call.count());
    for i in 0..call.count() {
        kept.push(Kept::once(call.start(&subject, i)).await);
    }
    tokio::time::sleep(MEANWHILE).await;
    run_others(&subject, call, &beside).await?;
    if let Some(busy) = busy {
        busy.stop().await?;
    }
    drop(filled);
    let kept = finish_some(call, &subject, kept).await?;
    succeeds("close", CLOSE_BOUND, vmem.close()).await?;
    for (i, kept) in kept {
        end_after_close(i, kept).await?;
    }
    Ok(())
}

/// Objects for the other tasks.
pub(crate) async fn beside(vmem: &VirtualMemory) -> Vec<VMemHandle> {
    cold(vmem, BESIDE, 16, LEN).await
}

/// Runs the other tasks, all at once: none may be delayed.
pub(crate) async fn run_others(
    subject: &Subject,
    call: Call,
    beside: &[VMemHandle],
) -> Result<(), String> {
    let others = others(subject, call, beside).into_iter().map(|(what, other)| async move {
        let ended = within(what, BOUND, tokio::spawn(other)).await;
        ended?.unwrap().map_err(|why| format!("{what}: {why}"))
    });
    let delayed: Vec<_> = join_all(others).await.into_iter().filter_map(Result::err).collect();
    match delayed.is_empty() {
        true => Ok(()),
        false => Err(format!("others are delayed: {}", delayed.join("; "))),
    }
}

/// Finishes every second one, alone, and drops one of four; the rest is kept.
async fn finish_some(
    call: Call,
    subject: &Subject,
    kept: Vec<Kept<crate::calls::Outcome>>,
) -> Result<Vec<(usize, Kept<crate::calls::Outcome>)>, String> {
    let mut left = Vec::new();
    for (i, kept) in kept.into_iter().enumerate() {
        match i % 4 {
            0 | 2 => finish(call, subject, i, kept).await?,
            1 => drop(kept),
            _ => left.push((i, kept)),
        }
    }
    Ok(left)
}

/// A kept future brings its bytes when it is polled again; only after its deadline, its error.
async fn finish(
    call: Call,
    subject: &Subject,
    i: usize,
    kept: Kept<crate::calls::Outcome>,
) -> Result<(), String> {
    let what = format!("kept future {i}, polled again");
    let age = kept.age();
    let ended = match within(&what, BOUND, kept.finish()).await? {
        Ok(got) => got.check(subject.objects.len()).map(|()| true)?,
        Err(error) if is_deadline(&error) && age + BOUND > crate::harness::WAIT => false,
        Err(error) => return Err(format!("{what}: {error}")),
    };
    if call.ends_objects() {
        return Ok(());
    }
    let mut found = vec![0; LEN];
    let read = subject.vmem.read_into(&subject.objects[i], 0..LEN, &mut found);
    succeeds("reading its object", BOUND, read).await?;
    call.check_object(i, ended, &found)
}

async fn end_after_close(i: usize, kept: Kept<crate::calls::Outcome>) -> Result<(), String> {
    let what = format!("kept future {i}, polled again after close");
    match within(&what, BOUND, kept.finish()).await? {
        Ok(_) | Err(VirtualMemoryError::Closed) => Ok(()),
        Err(error) if is_deadline(&error) => Ok(()),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

/// The calls of the other tasks, none of which need wait for another call.
type Other = BoxFuture<'static, Result<(), String>>;

fn others(subject: &Subject, call: Call, beside: &[VMemHandle]) -> Vec<(&'static str, Other)> {
    let vmem = &subject.vmem;
    let of = |n: usize| (vmem.clone(), beside[n].clone(), BESIDE + n);
    let mut others = vec![
        ("read", read_whole(of(0)).boxed()),
        ("read_at", read_part(of(1), 100..LEN - 100).boxed()),
        ("small read_at", read_part(of(2), 70_000..70_064).boxed()),
        ("read_into", copy(of(3)).boxed()),
        ("read_with, to stay", read_to_stay(of(4)).boxed()),
        ("read_many", read_set(of(5), beside[6].clone()).boxed()),
        ("write", write_and_read(of(7), true).boxed()),
        ("write_at", write_and_read(of(8), false).boxed()),
        ("put on disk, and back", put_and_read(vmem.clone(), DISK).boxed()),
        ("put in host memory", put_and_read(vmem.clone(), HOST).boxed()),
        ("promote, demote, flush", move_about(of(9)).boxed()),
        ("pin", pin(of(10)).boxed()),
        ("prefetch", prefetch(of(11)).boxed()),
        ("names", put_and_open(vmem.clone()).boxed()),
        ("flush_all", flush_all(vmem.clone()).boxed()),
    ];
    if !call.ends_objects() {
        // Some that kept futures are about, none of those that are finished later.
        let same = |n: usize| (vmem.clone(), subject.objects[n].clone(), n);
        others.push(("read_into of a kept one's object", copy_any(same(1), call).boxed()));
        others.push(("write of a kept one's object", overwrite(same(3)).boxed()));
    }
    others
}

type About = (VirtualMemory, VMemHandle, usize);

async fn read_whole((vmem, handle, n): About) -> Result<(), String> {
    check(n, &[1], 0, &vmem.read(&handle).await.map_err(|error| error.to_string())?)
}

async fn read_part((vmem, handle, n): About, part: std::ops::Range<usize>) -> Result<(), String> {
    let read = vmem.read_at(&handle, part.clone()).await;
    check(n, &[1], part.start, &read.map_err(|error| error.to_string())?)
}

async fn copy((vmem, handle, n): About) -> Result<(), String> {
    let mut buf = vec![0; LEN];
    let copied = vmem.read_into(&handle, 0..LEN, &mut buf).await;
    copied.map_err(|error| error.to_string())?;
    check(n, &[1], 0, &buf)
}

async fn copy_any((vmem, handle, n): About, call: Call) -> Result<(), String> {
    let mut buf = vec![0; LEN];
    let copied = vmem.read_into(&handle, 0..LEN, &mut buf).await;
    copied.map_err(|error| error.to_string())?;
    call.check_object(n, false, &buf)
}

async fn read_to_stay((vmem, handle, n): About) -> Result<(), String> {
    let read = vmem.read_with(&handle, ReadOptions::new().promote(true)).await;
    check(n, &[1], 0, &read.map_err(|error| error.to_string())?)
}

async fn read_set((vmem, handle, n): About, second: VMemHandle) -> Result<(), String> {
    let read = vmem.read_many(&[handle, second]).await.map_err(|error| error.to_string())?;
    check(n, &[1], 0, &read[0])?;
    check(n + 1, &[1], 0, &read[1])
}

async fn write_and_read((vmem, handle, n): About, whole: bool) -> Result<(), String> {
    let new = bytes(n, 2, LEN);
    let written = match whole {
        true => vmem.write(&handle, &new).await,
        false => vmem.write_at(&handle, 50_000, &new[50_000..90_000]).await,
    };
    written.map_err(|error| error.to_string())?;
    let mut buf = vec![0; 1_000];
    let copied = vmem.read_into(&handle, 65_000..66_000, &mut buf).await;
    copied.map_err(|error| error.to_string())?;
    check(n, &[2], 65_000, &buf)
}

async fn overwrite((vmem, handle, n): About) -> Result<(), String> {
    vmem.write(&handle, bytes(n, 3, LEN)).await.map_err(|error| error.to_string())
}

async fn put_and_read(vmem: VirtualMemory, home: vmem::MemoryTier) -> Result<(), String> {
    let put = vmem.put(bytes(9, 9, LEN), home).await;
    copy_version((vmem, put.map_err(|error| error.to_string())?, 9), 9).await
}

async fn copy_version((vmem, handle, n): About, version: u64) -> Result<(), String> {
    let mut buf = vec![0; LEN];
    let copied = vmem.read_into(&handle, 0..LEN, &mut buf).await;
    copied.map_err(|error| error.to_string())?;
    check(n, &[version], 0, &buf)
}

async fn move_about((vmem, handle, _): About) -> Result<(), String> {
    let moves = async {
        vmem.promote(&handle, HOST).await?;
        vmem.write_at(&handle, 5, b"dirty").await?;
        vmem.flush(&handle).await?;
        vmem.demote(&handle, DISK).await
    };
    moves.await.map_err(|error| error.to_string())
}

async fn pin((vmem, handle, _): About) -> Result<(), String> {
    vmem.pin(&handle, HOST).await.map(drop).map_err(|error| error.to_string())
}

/// A prefetch gives way to whatever is wanted, other prefetches before it too: it may be late.
async fn prefetch((vmem, handle, _): About) -> Result<(), String> {
    match tokio::time::timeout(PREFETCH_WAIT, vmem.prefetch(&handle, HOST)).await {
        Ok(ended) => ended.map_err(|error| error.to_string()),
        Err(_late) => Ok(()),
    }
}

async fn put_and_open(vmem: VirtualMemory) -> Result<(), String> {
    let named = async {
        drop(vmem.put_named("of another", b"its bytes", HOST).await?);
        vmem.open_named("of another").await
    };
    named.await.map(drop).map_err(|error| error.to_string())
}

async fn flush_all(vmem: VirtualMemory) -> Result<(), String> {
    vmem.flush_all().await.map_err(|error| error.to_string())
}

/// Readers that run, and use all of staging.
struct Busy {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Result<(), VirtualMemoryError>>>,
}

impl Busy {
    fn start(store: &Store, objects: &[VMemHandle]) -> Self {
        store.slow(Duration::from_millis(1), 4);
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let tasks = objects.iter().map(|handle| {
            let vmem = store.vmem.clone();
            let handle = handle.clone();
            let stop = stop.clone();
            let done = done.clone();
            tokio::spawn(async move {
                let mut buf = vec![0; LEN];
                while !stop.load(Ordering::Relaxed) {
                    vmem.read_into(&handle, 0..LEN, &mut buf).await?;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        });
        Busy { tasks: tasks.collect(), stop, done }
    }

    /// Each of them must have got on, and must end.
    async fn stop(self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            succeeds("a reader that runs", BOUND, async { task.await.unwrap() }).await?;
        }
        match self.done.load(Ordering::Relaxed) {
            0 => Err("no reader got on".into()),
            _ => Ok(()),
        }
    }
}
