//! Scenarios about space in host memory: which requests get it, which wait, and their errors.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use vmem::{Promotion, ReadClass, ReadOptions, VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::support::{self, DISK, HOST, KIB, MIB, assert_empty, bytes, put_all, settle};

const LEN: usize = 64 * KIB;

// ---- 12: everything pinned or held
// ---------------------------------------------------------------

const TIMEOUT: Duration = Duration::from_secs(3);

/// Fails with `AllPinned`, with these bytes, at the deadline.
fn assert_all_pinned<T>(
    what: &str,
    asked: Instant,
    outcome: Result<T, VirtualMemoryError>,
    (pinned, held): (u64, u64),
) {
    let took = asked.elapsed();
    match outcome.err() {
        Some(VirtualMemoryError::AllPinned {
            pinned_bytes,
            held_bytes,
            leased_bytes: 0,
            waited,
            ..
        }) => {
            assert_eq!((pinned_bytes, held_bytes), (pinned, held), "{what}");
            assert!(waited <= took, "{what}");
        }
        other => panic!("{what}: {other:?}"),
    }
    // Simulated time: the deadline, and a moment for the answer to travel.
    let late = Duration::from_millis(50);
    assert!((TIMEOUT..TIMEOUT + late).contains(&took), "{what} took {took:?}");
}

/// Excluded: an actor that spins while it can do nothing; calls that wait for ever, or wait
/// although they have an alternative; an error that does not say what has the memory. Noticed by
/// the simulated clock (an actor that spins would keep it from moving at all), by the numbers in
/// the error, and by how often the runtime woke up.
#[tokio::test(start_paused = true)]
async fn scenario_12_everything_pinned_or_held() {
    let (vmem, driver) =
        support::open(10 * LEN, 64 * MIB, |b| b.max_pinned(0.5).wait_timeout(TIMEOUT));
    let cold = put_all(&vmem, 6, LEN, DISK).await;
    let warm = put_all(&vmem, 10, LEN, HOST).await;
    let mut pins = Vec::new();
    let mut readers = Vec::new();
    for (at, handle) in warm.iter().enumerate() {
        if at < 4 {
            pins.push(vmem.pin(handle, HOST).await.unwrap());
        } else {
            readers.push(vmem.read_with(handle, ReadOptions::new().promote(true)).await.unwrap());
        }
    }
    let stats = settle(&vmem, &driver).await;
    assert_eq!(stats.host.used_bytes, stats.host.capacity_bytes);
    let pinned = 4 * LEN as u64;
    let held = 6 * LEN as u64;
    assert_eq!((stats.pinned_bytes, stats.held_bytes), (pinned, held));

    let metrics = tokio::runtime::Handle::current().metrics();
    let parks = metrics.worker_park_count(0);
    let asked = Instant::now();
    let fill = |buf: &mut [u8]| buf.fill(1);
    let answers = tokio::join!(
        async { ("read", vmem.read(&cold[0]).await.map(drop), Instant::now()) },
        async { ("read_at", vmem.read_at(&cold[1], 5..LEN / 2).await.map(drop), Instant::now()) },
        async { ("promote", vmem.promote(&cold[2], HOST).await, Instant::now()) },
        async { ("write_with", vmem.write_with(&cold[4], fill).await, Instant::now()) },
        async { ("read_many", vmem.read_many(&cold[4..6]).await.map(drop), Instant::now()) },
    );
    let pin_asked = Instant::now();
    let pinned_too = vmem.pin(&cold[3], HOST).await;
    // A pin that waits is not charged.
    assert_all_pinned("pin", pin_asked, pinned_too, (pinned, held));
    let woken = metrics.worker_park_count(0) - parks;
    for (what, outcome, ended) in [answers.0, answers.1, answers.2, answers.3, answers.4] {
        // They all began together; each ended on its own.
        let began = Instant::now() - (ended - asked);
        assert_all_pinned(what, began, outcome, (pinned, held));
    }
    println!("the runtime went to sleep {woken} times in {TIMEOUT:?}");
    assert!(woken < 200, "the actor does not spin: {woken} wake-ups");

    // What has another way takes it, at once.
    let asked = Instant::now();
    let new = vmem.put(bytes(30, 1, LEN), HOST).await.unwrap();
    assert!(!vmem.residency(&new).unwrap().host, "host memory is full");
    let space = vmem.allocate(LEN, HOST).await.unwrap();
    vmem.write(&cold[0], bytes(31, 1, LEN)).await.unwrap();
    vmem.write_at(&cold[1], 100, [7; 50]).await.unwrap();
    // Held: the reader keeps its version, the new one finds space on disk.
    vmem.write(&warm[9], bytes(32, 1, LEN)).await.unwrap();
    for (handle, object) in [(&new, 30), (&cold[0], 31), (&warm[9], 32)] {
        let mut buf = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut buf).await.unwrap();
        assert!(buf == bytes(object, 1, LEN), "object {object}");
    }
    assert!(*readers.last().unwrap() == bytes(10, 1, LEN), "a snapshot changed");
    assert!(asked.elapsed() < TIMEOUT / 10, "waited {:?}", asked.elapsed());
    drop(space);

    // One reader that drops its bytes serves one waiter.
    let waiter = tokio::spawn({
        let vmem = vmem.clone();
        let handle = cold[2].clone();
        async move { vmem.read(&handle).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiter.is_finished() && vmem.stats().waiters == 1);
    readers.remove(0);
    assert!(waiter.await.unwrap().unwrap() == bytes(3, 1, LEN));
    drop((pins, readers, warm, cold, new));
    assert_empty(&settle(&vmem, &driver).await, "pins and readers");
}

/// The same measured as processor time, on a real clock: an actor that spins uses all of it.
#[test]
fn scenario_12_nothing_spins_while_all_is_held() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (vmem, _driver) =
            support::open(4 * LEN, 64 * MIB, |b| b.wait_timeout(Duration::from_millis(800)));
        let cold = put_all(&vmem, 3, LEN, DISK).await;
        let warm = put_all(&vmem, 4, LEN, HOST).await;
        let mut readers = Vec::new();
        for handle in &warm {
            readers.push(vmem.read(handle).await.unwrap());
        }
        let metrics = tokio::runtime::Handle::current().metrics();
        let busy = metrics.worker_total_busy_duration(0);
        let began = std::time::Instant::now();
        let (read, promoted) = tokio::join!(vmem.read(&cold[0]), vmem.promote(&cold[1], HOST));
        let busy = metrics.worker_total_busy_duration(0) - busy;
        let share = busy.as_secs_f64() / began.elapsed().as_secs_f64();
        println!("busy for {:.1} % of the time", share * 100.0);
        assert!(matches!(read, Err(VirtualMemoryError::AllPinned { .. })), "{read:?}");
        assert!(matches!(promoted, Err(VirtualMemoryError::AllPinned { .. })), "{promoted:?}");
        assert!(share < 0.3, "busy for {:.0} % of the time", share * 100.0);
    });
}

// ---- 14: waiters
// ---------------------------------------------------------------------------------

/// A full tier whose memory is held by readers, one for each object.
async fn all_held(vmem: &VirtualMemory, count: usize) -> (Vec<VMemHandle>, Vec<bytes::Bytes>) {
    let handles = put_all(vmem, count, LEN, HOST).await;
    let mut readers = Vec::new();
    for handle in &handles {
        readers.push(vmem.read(handle).await.unwrap());
    }
    (handles, readers)
}

fn open_held(count: usize) -> (VirtualMemory, Arc<support::MemDriver>) {
    support::open(count * LEN, 64 * MIB, |b| {
        b.promotion(Promotion::Never)
            .watermarks(0.98, 1.0)
            .max_held(1.0)
            .wait_timeout(Duration::from_secs(60))
    })
}

type Served = Arc<Mutex<Vec<usize>>>;

/// A task that reads the object, notes that it was served, and drops the bytes after a while.
fn reader(vmem: &VirtualMemory, handle: &VMemHandle, served: &Served, nth: usize) {
    let vmem = vmem.clone();
    let handle = handle.clone();
    let served = served.clone();
    drop(tokio::spawn(async move {
        let read = vmem.read(&handle).await.unwrap();
        served.lock().push(nth);
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(read);
    }));
}

async fn tick() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

/// Excluded: waiters that overtake each other, starve, or stay in the queue after they were
/// cancelled and are granted space in vain. Noticed by the order in which they are served.
#[tokio::test(start_paused = true)]
async fn scenario_14_waiters_of_one_size_are_served_in_order() {
    let (vmem, driver) = open_held(4);
    let cold = put_all(&vmem, 24, LEN, DISK).await;
    let (warm, mut held) = all_held(&vmem, 4).await;
    let served = Served::default();
    for (nth, handle) in cold.iter().enumerate() {
        reader(&vmem, handle, &served, nth);
        tick().await;
    }
    assert_eq!(vmem.stats().waiters, 24);
    while let Some(reader) = held.pop() {
        drop(reader);
        tick().await;
    }
    settle(&vmem, &driver).await;
    let served = served.lock().clone();
    assert_eq!(served, (0..24).collect::<Vec<_>>(), "first come first served");
    drop((cold, warm));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_empty(&settle(&vmem, &driver).await, "waiters");
}

/// A large one waits first; small ones pass it, but not for ever.
#[tokio::test(start_paused = true)]
async fn scenario_14_small_waiters_pass_a_large_one_a_bounded_number_of_times() {
    let (vmem, driver) = open_held(8);
    let large = vmem.put(bytes(1, 1, 6 * LEN), DISK).await.unwrap();
    let small = put_all(&vmem, 200, LEN, DISK).await;
    let (warm, mut held) = all_held(&vmem, 8).await;
    let served = Served::default();
    reader(&vmem, &large, &served, usize::MAX);
    tick().await;
    for (nth, handle) in small.iter().enumerate() {
        reader(&vmem, handle, &served, nth);
        tick().await;
    }
    // One place comes and goes; it is too small for the large one.
    held.pop();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let passed = served.lock().clone();
    println!("{} passed the large one", passed.len());
    assert!(passed.len() > 8, "small ones are not blocked by a large one");
    assert!(passed.len() <= 64, "nor is the large one by small ones: {}", passed.len());
    assert_eq!(passed, (0..passed.len()).collect::<Vec<_>>(), "in order among themselves");
    // Now there is space for it: it goes first, and two small ones beside it at most.
    held.clear();
    tokio::time::sleep(Duration::from_secs(20)).await;
    settle(&vmem, &driver).await;
    let served = served.lock().clone();
    let at = served.iter().position(|&nth| nth == usize::MAX).expect("the large one was served");
    assert!(at <= passed.len() + 2, "{} small ones went first", at - passed.len());
    assert_eq!(served.len(), 201, "all were served");
    drop((large, small, warm));
    assert_empty(&settle(&vmem, &driver).await, "waiters");
}

/// What is held keeps a large request from being served for seconds: smaller ones wait for it a
/// moment at a time, and never until its deadline.
#[tokio::test(start_paused = true)]
async fn small_waiters_are_served_while_holds_block_a_large_one() {
    let (vmem, driver) = open_held(8);
    let large = vmem.put(bytes(1, 1, 6 * LEN), DISK).await.unwrap();
    let small = put_all(&vmem, 200, LEN, DISK).await;
    let (warm, mut held) = all_held(&vmem, 8).await;
    let served = Served::default();
    reader(&vmem, &large, &served, usize::MAX);
    tick().await;
    for (nth, handle) in small.iter().enumerate() {
        reader(&vmem, handle, &served, nth);
        tick().await;
    }
    held.pop();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(*served.lock(), (0..200).collect::<Vec<_>>(), "all small ones, in order");
    held.clear();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(served.lock().last(), Some(&usize::MAX), "then the large one");
    settle(&vmem, &driver).await;
    drop((large, small, warm));
    assert_empty(&settle(&vmem, &driver).await, "waiters");
}

/// A waiter whose caller has gone leaves the queue at once: nothing is fetched or evicted for it.
#[tokio::test(start_paused = true)]
async fn scenario_14_a_cancelled_waiter_leaves_the_queue() {
    let (vmem, driver) = open_held(4);
    let cold = put_all(&vmem, 6, LEN, DISK).await;
    let (warm, mut held) = all_held(&vmem, 4).await;
    let served = Served::default();
    type Call = std::pin::Pin<Box<dyn Future<Output = Result<(), VirtualMemoryError>> + Send>>;
    let calls: Vec<(&str, Call)> = vec![
        ("read", {
            let v = vmem.clone();
            let h = cold[0].clone();
            Box::pin(async move { v.read(&h).await.map(drop) })
        }),
        ("read_at", {
            let v = vmem.clone();
            let h = cold[1].clone();
            Box::pin(async move { v.read_at(&h, 0..LEN / 2).await.map(drop) })
        }),
        ("read_many", {
            let v = vmem.clone();
            let h = cold[1..3].to_vec();
            Box::pin(async move { v.read_many(&h).await.map(drop) })
        }),
        ("background", {
            let v = vmem.clone();
            let h = cold[3].clone();
            Box::pin(async move {
                v.read_with(&h, ReadOptions::new().class(ReadClass::Background)).await.map(drop)
            })
        }),
        ("promote", {
            let v = vmem.clone();
            let h = cold[3].clone();
            Box::pin(async move { v.promote(&h, HOST).await })
        }),
        ("prefetch", {
            let v = vmem.clone();
            let h = cold[3].clone();
            Box::pin(async move { v.prefetch(&h, HOST).await })
        }),
        ("pin", {
            let v = vmem.clone();
            let h = cold[4].clone();
            Box::pin(async move { v.pin(&h, HOST).await.map(drop) })
        }),
        ("write_with", {
            let v = vmem.clone();
            let h = cold[4].clone();
            Box::pin(async move { v.write_with(&h, |_| ()).await })
        }),
    ];
    for (what, call) in calls {
        let waits = tokio::time::timeout(Duration::from_millis(50), call);
        assert!(waits.await.is_err(), "{what} waits");
        tick().await;
        assert_eq!(vmem.stats().waiters, 0, "{what} was dropped and waits on");
    }
    let reads = driver.reads();
    // One of two waiters for the same object is dropped; the other is served.
    let first = vmem.clone();
    let second = vmem.clone();
    let one = cold[0].clone();
    let other = cold[0].clone();
    let first = tokio::spawn(async move { first.read(&one).await.map(drop) });
    tick().await;
    let second = tokio::spawn(async move { second.read(&other).await });
    reader(&vmem, &cold[5], &served, 5);
    tick().await;
    first.abort();
    tick().await;
    assert_eq!(vmem.stats().waiters, 2, "two objects are waited for");
    drop(held.drain(..));
    assert!(second.await.unwrap().unwrap() == bytes(1, 1, LEN));
    settle(&vmem, &driver).await;
    assert_eq!(*served.lock(), [5]);
    assert_eq!(driver.reads() - reads, 2, "nothing was read in vain");
    drop((cold, warm));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_empty(&settle(&vmem, &driver).await, "cancelled waiters");
}

/// Without other work a background read is served as soon as what is in its way has cooled down.
#[tokio::test(start_paused = true)]
async fn scenario_14_a_background_read_waits_for_what_is_hot_and_no_longer() {
    let (vmem, driver) = support::open(8 * LEN, 64 * MIB, |b| b.watermarks(0.8, 0.9));
    let cold = vmem.put(bytes(99, 1, LEN), DISK).await.unwrap();
    let warm = put_all(&vmem, 7, LEN, HOST).await;
    settle(&vmem, &driver).await;
    for handle in &warm {
        drop(vmem.read(handle).await.unwrap());
    }
    let asked = Instant::now();
    let options = ReadOptions::new().class(ReadClass::Background);
    assert!(vmem.read_with(&cold, options).await.unwrap() == bytes(99, 1, LEN));
    let waited = asked.elapsed();
    println!("waited {waited:?}");
    assert!(waited < Duration::from_secs(5), "nothing was in use for so long: {waited:?}");
    drop((warm, cold));
}
