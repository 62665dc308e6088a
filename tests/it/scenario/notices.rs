//! What operators learn: pressure, refusals, faults and fallbacks, as `docs/seeing.md` has them.
//!
//! Invariant: each test has a subscriber of its own thread, on which its store runs too. A storm
//! leaves one event a second for each kind and tier. Not called by other tests.

use std::sync::Arc;
use std::time::Duration;

use tracing::Level;
use vmem::backend::DeviceBackend;
use vmem::{
    IncidentKind, IoDriver, MemoryTier, Promotion, VirtualMemory, VirtualMemoryError, WriteBack,
};
use vmem_testkit::{
    Denied, Errno, Fault, FaultDriver, FaultPlan, OpKind, Seed, Seen, SeenEvent, SimConfig,
    SimDevice, SimDriver, When,
};

use crate::support::process::alone;
use crate::support::{self, DISK, HOST, KIB, MIB, bytes, put_all};

const LEN: usize = 64 * KIB;
const WAIT: Duration = Duration::from_millis(100);

/// A store with space for two objects in host memory, and for `disk` bytes below.
fn small(disk: usize) -> VirtualMemory {
    let driver = SimDriver::new(SimConfig::default());
    support::over(driver, 2 * LEN, disk as u64, |builder| {
        builder.promotion(Promotion::Never).wait_timeout(WAIT)
    })
}

/// The only event of this target, which is of this level and tier.
fn only(seen: &Seen, target: &str, level: Level, tier: MemoryTier) -> SeenEvent {
    let events = seen.events(target);
    assert_eq!(events.len(), 1, "{target}: {events:?}");
    assert_eq!(events[0].level, level, "{events:?}");
    assert_eq!(events[0].fields.text("tier"), tier.to_string(), "{events:?}");
    events[0].clone()
}

#[tokio::test(start_paused = true)]
async fn pressure_and_refusal_leave_an_event_a_second() {
    let (seen, _watching) = Seen::watch();
    let vmem = small(64 * MIB);
    let handles = put_all(&vmem, 3, LEN, DISK).await;
    let held = vmem.read_many(&handles[..2]).await.unwrap();
    assert!(seen.events("vmem::pressure").is_empty(), "nothing waited so far");
    let reads = (0..50).map(|_| vmem.read(&handles[2]));
    let first = futures::future::join_all(reads).await;
    let error = first[0].as_ref().unwrap_err();
    assert!(matches!(error, VirtualMemoryError::AllPinned { .. }), "{error}");

    let pressure = only(&seen, "vmem::pressure", Level::DEBUG, HOST);
    assert_eq!(pressure.fields.number("requested_bytes"), LEN as u128);
    assert_eq!(pressure.fields.number("used_bytes"), 2 * LEN as u128);
    assert_eq!(pressure.fields.number("waiters"), 1);
    let refusal = only(&seen, "vmem::refusal", Level::WARN, HOST);
    assert!(refusal.fields.text("error").contains("held by readers"), "{refusal:?}");
    assert_eq!(refusal.fields.number("left_out"), 0);
    // One of them is in the list.
    let counted = vmem.tier_stats(HOST).refusals;
    let incidents = vmem.incidents();
    assert_eq!(incidents.len(), 1, "{incidents:?}");
    assert_eq!((incidents[0].kind, incidents[0].tier), (IncidentKind::Refusal, HOST));
    assert!(incidents[0].error.contains("held by readers"), "{incidents:?}");

    // Each of these is refused after 100 ms, one after the other.
    for _ in 0..20 {
        vmem.read(&handles[2]).await.unwrap_err();
    }
    // All are counted, those without an event too.
    assert!(vmem.tier_stats(HOST).refusals >= counted + 20, "{:?}", vmem.tier_stats(HOST));
    let refusals = seen.events("vmem::refusal");
    assert!((2..=4).contains(&refusals.len()), "one a second: {refusals:?}");
    assert!(refusals[1].fields.number("left_out") >= 5, "{refusals:?}");
    drop(held);
    vmem.read(&handles[2]).await.unwrap();
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn full_disk_leaves_a_refusal() {
    let (seen, _watching) = Seen::watch();
    let vmem = small(2 * LEN);
    let _handles = put_all(&vmem, 2, LEN, DISK).await;
    let error = vmem.put(bytes(3, 1, LEN), DISK).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::TierFull { .. }), "{error}");
    let refusal = only(&seen, "vmem::refusal", Level::WARN, DISK);
    assert_eq!(refusal.fields.text("error"), error.to_string());
    assert_eq!(vmem.tier_stats(DISK).refusals, 1, "of one request");
    vmem.close().await.unwrap();
}

/// What is written in one run, and object by object after that, is refused once for one cause.
#[tokio::test(start_paused = true)]
async fn batch_that_is_refused_counts_once() {
    let disk = SimDriver::new(SimConfig::default());
    let faults = FaultDriver::new(disk, Seed::new(1));
    let vmem = support::over(faults.clone(), 16 * LEN, 64 * MIB as u64, |builder| {
        builder.promotion(Promotion::Never).write_back(WriteBack::OnEvict)
    });
    let handles = put_all(&vmem, 5, LEN, DISK).await;
    for handle in &handles {
        vmem.promote(handle, HOST).await.unwrap();
        vmem.write(handle, bytes(2, 1, LEN)).await.unwrap();
    }
    faults.set(FaultPlan::new().on(OpKind::Write, When::ALWAYS, Fault::Error(Errno::NOSPC)));
    let error = vmem.flush_all().await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::TierFull { .. }), "{error}");
    let stats = vmem.tier_stats(DISK);
    assert_eq!((stats.refusals, stats.faults), (1, 0), "{:?}", vmem.incidents());
    faults.clear();
    vmem.flush_all().await.unwrap();
    drop(handles);
    vmem.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn disk_that_fails_leaves_a_fault_for_reads_and_writes() {
    for (kind, word) in [(OpKind::Read, "reading"), (OpKind::Write, "writing")] {
        let (seen, _watching) = Seen::watch();
        let disk = SimDriver::new(SimConfig::default());
        let faults = FaultDriver::new(disk, Seed::new(1));
        let vmem = support::over(faults.clone(), 16 * LEN, 64 * MIB as u64, |builder| {
            builder.promotion(Promotion::Never)
        });
        let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
        assert!(seen.events("vmem::fault").is_empty());
        faults.set(FaultPlan::new().on(kind, When::ALWAYS, Fault::Error(Errno::IO)));
        let error = match kind {
            OpKind::Read => vmem.read(&handle).await.unwrap_err(),
            _ => vmem.put(bytes(2, 1, LEN), DISK).await.unwrap_err(),
        };
        assert!(matches!(error, VirtualMemoryError::Io { .. }), "{word}: {error}");
        let fault = only(&seen, "vmem::fault", Level::WARN, DISK);
        assert!(fault.fields.text("error").contains("code: 5"), "{word}: {fault:?}");
        faults.clear();
        vmem.close().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn device_that_fails_leaves_a_fault_and_a_fallback() {
    let (seen, _watching) = Seen::watch();
    let device = Arc::new(SimDevice::new(MIB as u64));
    let above: Arc<dyn DeviceBackend> = device.clone();
    let (vmem, _driver) = support::open_below([above], 16 * LEN, 64 * MIB, |builder| {
        builder.promotion(Promotion::Never)
    });
    let handle = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    vmem.promote(&handle, MemoryTier::Vram).await.unwrap();
    device.fail_next(1);
    assert_eq!(vmem.read(&handle).await.unwrap(), bytes(1, 1, LEN), "the disk serves");
    only(&seen, "vmem::fault", Level::WARN, MemoryTier::Vram);
    let fallback = only(&seen, "vmem::fallback", Level::WARN, MemoryTier::Vram);
    assert!(!fallback.fields.text("error").is_empty(), "{fallback:?}");
    let stats = vmem.tier_stats(MemoryTier::Vram);
    assert_eq!((stats.faults, stats.fallbacks), (1, 1), "{:?}", vmem.incidents());
    // A copy to the device that fails is one more, however many layers pass its error on.
    let other = vmem.put(bytes(2, 1, LEN), DISK).await.unwrap();
    device.fail_next(1);
    let error = vmem.promote(&other, MemoryTier::Vram).await.unwrap_err();
    assert!(matches!(error, VirtualMemoryError::Device { .. }), "{error}");
    let stats = vmem.tier_stats(MemoryTier::Vram);
    assert_eq!((stats.faults, stats.fallbacks), (2, 1), "{:?}", vmem.incidents());
    vmem.close().await.unwrap();
}

/// In a child, which denies itself io_uring.
#[test]
fn driver_that_is_denied_leaves_a_fallback() {
    alone(module_path!(), "driver_that_is_denied_leaves_a_fallback", || {
        if let Err(why) = (Denied::IoUring { errno: libc::EPERM }).enforce() {
            println!("SKIPPED: {why}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (seen, _watching) = Seen::watch();
        let disk = vmem_io::open_disk(Some(dir.path()), Some(1 << 20), IoDriver::Auto, 1 << 20);
        let disk = disk.unwrap();
        assert_eq!(disk.driver, IoDriver::Blocking);
        let fallbacks = seen.events("vmem::fallback");
        let reasons: Vec<_> = fallbacks.iter().map(|event| event.fields.text("error")).collect();
        let notes: Vec<_> = disk.notes.iter().map(|note| &**note).collect();
        assert_eq!(reasons, notes, "what the capabilities say, as it occurs");
        assert!(reasons.iter().any(|reason| reason.contains("reactor driver")), "{reasons:?}");
        for event in &fallbacks {
            assert_eq!(event.level, Level::WARN);
            assert_eq!(event.fields.text("driver"), "blocking");
        }
        futures::executor::block_on(disk.backend.close()).unwrap();
    });
}

/// What an evictor cannot write is counted too, which no caller learns of.
#[tokio::test(start_paused = true)]
async fn refusal_of_what_is_evicted_is_counted() {
    let disk = SimDriver::new(SimConfig::default());
    let faults = FaultDriver::new(disk, Seed::new(1));
    let vmem = support::over(faults.clone(), 4 * LEN, 64 * MIB as u64, |builder| {
        builder.promotion(Promotion::Never).write_back(WriteBack::OnEvict).wait_timeout(WAIT)
    });
    let cold = vmem.put(bytes(1, 1, LEN), DISK).await.unwrap();
    let dirty = put_all(&vmem, 4, LEN, HOST).await;
    faults.set(FaultPlan::new().on(OpKind::Write, When::ALWAYS, Fault::Error(Errno::NOSPC)));
    // It writes nothing itself.
    vmem.promote(&cold, HOST).await.unwrap_err();
    support::eventually("it is counted", || vmem.tier_stats(DISK).refusals > 0).await;
    faults.clear();
    drop(dirty);
    vmem.close().await.unwrap();
}
