//! Scenario 35, copies of what is large: `read_into` left alone between two pieces, or polled
//! rarely.
//!
//! Excluded: a reader count, staging or extents that such a future keeps; a mixture of two versions
//! once it goes on; a copy that never ends since what it has is taken back again and again. Noticed
//! by other tasks that need the space, by the bytes that the copy brings, and by its deadline.

use std::time::Duration;

use bytes::Bytes;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, assert_none, eventually, run, run_cases, succeeds, within,
};
use crate::keep::Kept;
use crate::stores::{DISK, HOST, KIB, MIB, Place, Sizes, bytes, check, open};

/// Not a multiple of any piece.
const LEN: usize = MIB + 300 * KIB + 5;
/// Two such objects do not fit.
const SIZES: Sizes = Sizes { space: 2 * MIB, disk: 16 * MIB };
/// Well beyond the time for which what is set aside is left to its caller.
const RARELY: Duration = Duration::from_millis(45);

/// How the object stands in host memory when its copy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Nowhere else.
    Dirty,
    /// The disk has it too.
    Clean,
    /// It is on disk only, and is loaded with the copy.
    Promoted,
}

/// What happens to the object while its copy is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Stays,
    IsWritten,
}

async fn copy(vmem: VirtualMemory, handle: VMemHandle) -> Result<Vec<u8>, VirtualMemoryError> {
    let mut buf = vec![0; LEN];
    vmem.read_into(&handle, 0..LEN, &mut buf).await.map(|()| buf)
}

async fn left_alone(found: Found, meanwhile: Meanwhile, polls: usize) -> Result<(), String> {
    let store = open(Place::Simulated, SIZES, |builder| builder).await;
    let vmem = &store.vmem;
    let other = vmem.put(bytes(2, 1, LEN), DISK).await.unwrap();
    vmem.demote(&other, DISK).await.unwrap();
    let subject = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    match found {
        Found::Dirty => {}
        Found::Clean => vmem.flush(&subject).await.unwrap(),
        Found::Promoted => {
            vmem.demote(&subject, DISK).await.unwrap();
            drop(vmem.read(&subject).await.unwrap());
            eventually("it is on disk only", || !vmem.residency(&subject).unwrap().host).await?;
        }
    }
    let kept = Kept::polled(copy(vmem.clone(), subject.clone()), polls).await;
    // It needs the space of the subject.
    let read = succeeds("read of another", BOUND, vmem.read(&other)).await?;
    check(2, &[1], 0, &read)?;
    drop(read);
    if meanwhile == Meanwhile::IsWritten {
        succeeds("write", BOUND, vmem.write(&subject, bytes(1, 2, LEN))).await?;
    }
    let versions: &[u64] = if meanwhile == Meanwhile::IsWritten { &[1, 2] } else { &[1] };
    let copied = succeeds("the kept copy", BOUND, kept.finish()).await?;
    check(1, versions, 0, &copied)?;
    let quiet = || (vmem.stats().held_bytes, vmem.stats().waiters) == (0, 0);
    eventually("nothing is held or waited for", quiet).await?;
    succeeds("close", CLOSE_BOUND, vmem.clone().close()).await
}

#[test]
fn copies_left_alone_between_two_pieces_hold_no_space() {
    let mut cases = Vec::new();
    for found in [Found::Dirty, Found::Clean, Found::Promoted] {
        for meanwhile in [Meanwhile::Stays, Meanwhile::IsWritten] {
            for polls in [1, 2, 3, 4] {
                cases.extend(THREADS.map(|threads| (threads, found, meanwhile, polls)));
            }
        }
    }
    assert_none(&run_cases(&cases, |(threads, found, meanwhile, polls)| {
        run(threads, move || left_alone(found, meanwhile, polls))
    }));
}

/// Where a copy that is polled rarely finds its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rarely {
    InHost,
    OnDisk,
}

/// Space that a task waits for as long as the returned bytes are held.
async fn pressure(vmem: &VirtualMemory) -> (Bytes, tokio::task::JoinHandle<()>) {
    let held = vmem.put(bytes(7, 1, 300 * KIB), HOST).await.unwrap();
    let held = vmem.read(&held).await.unwrap();
    let large = vmem.put(bytes(8, 1, SIZES.space - 200 * KIB), DISK).await.unwrap();
    let vmem = vmem.clone();
    let waiter = tokio::spawn(async move { drop(vmem.read(&large).await) });
    (held, waiter)
}

async fn polled_rarely(found: Rarely) -> Result<(), String> {
    let store = open(Place::Simulated, SIZES, |builder| builder).await;
    let vmem = &store.vmem;
    let subject = vmem.put(bytes(1, 1, LEN), HOST).await.unwrap();
    if found == Rarely::OnDisk {
        vmem.demote(&subject, DISK).await.unwrap();
    }
    let (held, waiter) = pressure(vmem).await;
    eventually("a waiter for space", || vmem.stats().waiters == 1).await?;
    let vmem = vmem.clone();
    let handle = subject.clone();
    let slow = Slow { copy: Box::pin(copy(vmem, handle)), rest: None };
    // Each chunk twice, each with a poll before and after: what is taken back again and again takes
    // for ever.
    let most = RARELY * (4 * LEN / (64 * KIB)) as u32;
    let copied = within("a copy that is polled rarely", most, slow).await?;
    check(1, &[1], 0, &copied.map_err(|error| error.to_string())?)?;
    drop(held);
    succeeds("the one that waits", BOUND, async {
        waiter.await.map_err(|_| VirtualMemoryError::Closed)
    })
    .await?;
    succeeds("close", CLOSE_BOUND, store.vmem.clone().close()).await
}

/// A future that is polled at most once in so long.
struct Slow<F> {
    copy: std::pin::Pin<Box<F>>,
    rest: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

impl<F: Future> Future for Slow<F> {
    type Output = F::Output;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<F::Output> {
        use std::task::Poll;
        if let Some(rest) = &mut self.rest {
            if rest.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.rest = None;
        }
        if let Poll::Ready(output) = self.copy.as_mut().poll(context) {
            return Poll::Ready(output);
        }
        // A wake makes it wait first.
        self.rest = Some(Box::pin(tokio::time::sleep(RARELY)));
        let rest = self.rest.as_mut().map(|rest| rest.as_mut().poll(context));
        assert!(rest.is_some_and(|rest| rest.is_pending()), "a sleep takes its time");
        Poll::Pending
    }
}

#[test]
fn copies_polled_rarely_end_while_others_wait_for_space() {
    let cases: Vec<_> = [Rarely::InHost, Rarely::OnDisk]
        .into_iter()
        .flat_map(|found| THREADS.map(|threads| (threads, found)))
        .collect();
    assert_none(&run_cases(&cases, |(threads, found)| run(threads, move || polled_rarely(found))));
}
