//! Scenario 5: operations of the disk that end after everything that they were for is gone.
//!
//! Invariant: the driver sees each access to the memory of an operation in flight. Run in `it`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmem::VirtualMemoryError;

use crate::support::{
    self, DISK, DropAt, HOST, KIB, MIB, assert_empty, bytes, dropped_at, put_all, settle, taken,
};

/// Waits until the disk stands still with at least this many operations.
async fn stuck(driver: &support::MemDriver, operations: usize) {
    for _ in 0..1000 {
        if driver.in_flight() >= operations {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{} operations in flight, not {operations}", driver.in_flight());
}

/// Excluded: memory or space that is reused while a late read or write still touches it; a
/// completion that finds its operation recycled and is taken for another's. Noticed by the ledger,
/// which must still count what is in flight, by the bytes of later operations, and by the driver,
/// which sees accesses to its memory. (The driver trait cannot express a completion that comes
/// twice: its answer is a value, taken once.)
#[tokio::test(start_paused = true)]
async fn scenario_05_reads_that_end_after_their_objects() {
    const LEN: usize = 96 * KIB;
    let (vmem, driver) = support::open(9 * LEN, 16 * MIB, |b| b.watermarks(0.9, 0.95));
    let old = put_all(&vmem, 4, LEN, DISK).await;
    driver.stand_still();
    for handle in &old {
        assert!(dropped_at(DropAt::Polled(1), vmem.read(handle)).await.is_none());
    }
    stuck(&driver, 4).await;
    drop(old);
    assert_eq!(vmem.stats().objects, 0);
    let in_flight = vmem.stats();
    assert_eq!(in_flight.host.used_bytes, 4 * LEN as u64, "memory of reads in flight is taken");
    assert_eq!(in_flight.disk.used_bytes, 4 * LEN as u64, "and so is what they read");
    // Others take the rest of host memory, and keep it; no write-back gets stuck on the disk.
    let mut new = Vec::new();
    for object in 10..14 {
        let handle = vmem.put(bytes(object, 1, LEN), HOST).await.unwrap();
        new.push((object, vmem.pin(&handle, HOST).await.unwrap(), handle));
        assert_eq!(vmem.residency(&new.last().unwrap().2).unwrap().pins, 1);
    }
    driver.go_on();
    let stats = settle(&vmem, &driver).await;
    assert_eq!(stats.host.used_bytes, 4 * LEN as u64, "the late ones gave back what they had");
    for (object, _pin, handle) in &new {
        assert!(vmem.read(handle).await.unwrap() == bytes(*object, 1, LEN), "late bytes");
    }
    drop(new);
    assert_empty(&settle(&vmem, &driver).await, "late reads");
    driver.assert_untouched();
}

/// The same where the caller's future, which is dropped, was all that knew of the read.
#[tokio::test(start_paused = true)]
async fn scenario_05_reads_through_staging_that_end_after_their_objects() {
    const LEN: usize = 64 * KIB;
    let (vmem, driver) = support::open(9 * LEN, 4 * LEN, |builder| builder);
    let old = put_all(&vmem, 2, LEN, DISK).await;
    driver.stand_still();
    let mut buf = vec![0xEE; LEN];
    for handle in &old {
        let read = vmem.read_into(handle, 0..LEN, &mut buf);
        assert!(dropped_at(DropAt::Polled(1), read).await.is_none());
    }
    stuck(&driver, 2).await;
    drop(old);
    assert_eq!(vmem.stats().disk.used_bytes, 2 * LEN as u64, "what is being read is taken");
    let new = [vmem.allocate(LEN, DISK).await.unwrap(), vmem.allocate(LEN, DISK).await.unwrap()];
    let full = vmem.allocate(LEN, DISK).await.unwrap_err();
    assert!(matches!(full, VirtualMemoryError::TierFull { .. }), "{full}");
    driver.go_on();
    let stats = settle(&vmem, &driver).await;
    assert_eq!(stats.disk.used_bytes, 2 * LEN as u64);
    // Both pieces of staging are back, or this would wait for ever.
    for handle in &new {
        vmem.read_into(handle, 0..LEN, &mut buf).await.unwrap();
    }
    drop(new);
    assert_empty(&settle(&vmem, &driver).await, "late reads");
    driver.assert_untouched();
}

#[tokio::test(start_paused = true)]
async fn scenario_05_writes_that_end_after_their_objects() {
    const LEN: usize = 64 * KIB;
    let (vmem, driver) = support::open(8 * LEN, 16 * LEN, |builder| builder);
    let handles = put_all(&vmem, 4, LEN, HOST).await;
    driver.stand_still();
    for handle in &handles {
        assert!(dropped_at(DropAt::Polled(1), vmem.demote(handle, DISK)).await.is_none());
    }
    let direct = vmem.allocate(LEN, DISK).await.unwrap();
    let two = bytes(9, 2, LEN);
    let ended = dropped_at(DropAt::Polled(2), vmem.write(&direct, &two)).await;
    assert!(ended.is_none(), "{ended:?}");
    stuck(&driver, 5).await;
    drop((handles, direct));
    let stats = vmem.stats();
    assert_eq!(stats.objects, 0);
    assert_eq!(stats.host.used_bytes, 4 * LEN as u64, "what is being written is taken");
    assert_eq!(stats.disk.used_bytes, 5 * LEN as u64, "and so is the space that it goes to");
    // The disk is filled with others; none may get the space of a write in flight.
    let mut others = Vec::new();
    for _ in 0..11 {
        others.push(vmem.allocate(LEN, DISK).await.unwrap());
    }
    let full = vmem.allocate(LEN, DISK).await.unwrap_err();
    assert!(matches!(full, VirtualMemoryError::TierFull { .. }), "{full}");
    driver.go_on();
    let stats = settle(&vmem, &driver).await;
    assert_eq!((stats.host.used_bytes, stats.disk.used_bytes), (0, 11 * LEN as u64));
    for other in &others {
        let mut buf = vec![0xEE; LEN];
        vmem.read_into(other, 0..LEN, &mut buf).await.unwrap();
        assert!(buf.iter().all(|&byte| byte == 0), "another object's bytes show through");
    }
    drop(others);
    assert_empty(&settle(&vmem, &driver).await, "late writes");
    driver.assert_untouched();
}

/// The store goes while its disk stands still: what is in flight owns all that it needs.
#[tokio::test(start_paused = true)]
async fn scenario_05_operations_that_end_after_their_store() {
    for faulty in [false, true] {
        let (vmem, driver) = support::open(MIB, 16 * MIB, |builder| builder);
        let cold = put_all(&vmem, 3, 100 * KIB, DISK).await;
        let warm = put_all(&vmem, 3, 100 * KIB, HOST).await;
        driver.stand_still();
        for (cold, warm) in cold.iter().zip(&warm) {
            assert!(dropped_at(DropAt::Polled(1), vmem.read(cold)).await.is_none());
            assert!(dropped_at(DropAt::Polled(1), vmem.demote(warm, DISK)).await.is_none());
        }
        stuck(&driver, 6).await;
        drop((cold, warm, vmem));
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(driver.in_flight(), 6, "operations go on without a store");
        if faulty {
            driver.fail(|_, _| Some(io::Error::from_raw_os_error(5)));
        }
        driver.go_on();
        for _ in 0..1000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(driver.in_flight(), 0);
        driver.assert_untouched();
        // Extents, tier, actor and tasks are gone: only this test holds the driver.
        assert_eq!(Arc::strong_count(&driver), 1, "something of the store is left");
    }
}

/// `close` takes the store along, so each point has a store of its own.
#[tokio::test(start_paused = true)]
async fn scenario_04_close_dropped_at_every_poll() {
    for polls in 0..100 {
        let mut ended = true;
        for at in [DropAt::Polled(polls), DropAt::Woken(polls)] {
            let (vmem, driver) = support::open(MIB, 16 * MIB, |builder| builder);
            driver.delay(|_| Duration::from_millis(3));
            let handles = put_all(&vmem, 4, 100 * KIB, DISK).await;
            let read = |handle| {
                let vmem = vmem.clone();
                tokio::spawn(async move { vmem.read(&handle).await })
            };
            let reads: Vec<_> = handles.iter().cloned().map(read).collect();
            tokio::task::yield_now().await;
            let outcome = dropped_at(at, vmem.clone().close()).await;
            ended &= outcome.is_some();
            if let Some(outcome) = outcome {
                outcome.unwrap();
            }
            for read in reads {
                match read.await.unwrap() {
                    Ok(read) => drop(read),
                    Err(VirtualMemoryError::Closed) => {}
                    Err(error) => panic!("{at:?}: {error}"),
                }
            }
            if polls > 0 {
                let closed = vmem.read(&handles[0]).await.unwrap_err();
                assert!(matches!(closed, VirtualMemoryError::Closed), "{at:?}: {closed}");
            }
            drop(handles);
            let left = taken(&settle(&vmem, &driver).await);
            assert_eq!(left, support::Taken::default(), "{at:?}");
            driver.assert_untouched();
        }
        if ended {
            assert!(polls > 1, "closing waited for the reads in flight");
            return;
        }
    }
    panic!("close never ends");
}
