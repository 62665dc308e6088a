//! The events of migrations, and prefetches that run, end and are cancelled.
//!
//! Invariant: over the real driver, as a user opens the store. Not called by other tests.

use std::time::Duration;

use futures::StreamExt;
use vmem::MigrationCause;

use super::life::open;
use crate::support::{DISK, HOST};

/// A listener sees each migration once, and learns how many it missed.
#[tokio::test]
async fn migrations_are_told() {
    let vmem = open().await;
    let handle = vmem.put(vec![1; 5000], HOST).await.unwrap();
    let mut events = Box::pin(vmem.migrations());
    vmem.demote(&handle, DISK).await.unwrap();
    vmem.promote(&handle, HOST).await.unwrap();
    let down = events.next().await.unwrap();
    let up = events.next().await.unwrap();
    assert_eq!((down.from, down.to, down.cause), (HOST, DISK, MigrationCause::Demote));
    assert_eq!((up.from, up.to, up.cause), (DISK, HOST, MigrationCause::Promote));
    assert_eq!((down.handle, down.bytes, down.missed), (handle.id(), 5000, 0));
    for _ in 0..1500 {
        vmem.write(&handle, vec![2; 5000]).await.unwrap();
        vmem.demote(&handle, DISK).await.unwrap();
    }
    let mut seen = 0;
    let mut missed = 0;
    let quiet = Duration::from_millis(200);
    while let Ok(Some(event)) = tokio::time::timeout(quiet, events.next()).await {
        seen += 1;
        missed += event.missed;
    }
    assert!(missed > 0 && seen + missed >= 1500, "{seen} seen, {missed} missed");
    vmem.close().await.unwrap();
    assert!(events.next().await.is_none(), "the stream ends with the store");
}

/// A prefetch runs without being polled; dropped it is cancelled; detached it runs on.
#[tokio::test]
async fn prefetches_start_end_and_are_cancelled() {
    let vmem = open().await;
    let mut handles = Vec::new();
    for n in 0..8_u8 {
        handles.push(vmem.put(vec![n; 10_000], DISK).await.unwrap());
    }
    vmem.prefetch_many(&handles[..4], HOST).await.unwrap();
    assert!(handles[..4].iter().all(|handle| vmem.residency(handle).unwrap().host));
    vmem.prefetch(&handles[4], HOST).detach();
    for _ in 0..1000 {
        if vmem.residency(&handles[4]).unwrap().host {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(vmem.residency(&handles[4]).unwrap().host, "detached, it runs on");
    // Nothing ran in between: the actor finds it cancelled.
    drop(vmem.prefetch_many(&handles[5..], HOST));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(handles[5..].iter().all(|handle| !vmem.residency(handle).unwrap().host));
    vmem.close().await.unwrap();
}
