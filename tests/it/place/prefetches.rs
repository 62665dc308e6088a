//! How much of one prefetch is in flight at once.
//!
//! Excluded: large objects that all come at once, so that none of them is there soon, and objects
//! that come one after the other. Noticed by the reads that a disk has begun that stands
//! still.

use std::time::Duration;

use crate::support::{self, DISK, HOST, KIB, MIB, STAGING, put_all};

/// Prefetches `count` objects of `len` bytes from a disk that stands still: this many are read.
async fn assert_begun(count: usize, len: usize, expected: usize) {
    let (vmem, driver) = support::open(8 * MIB, 16 * MIB, |builder| builder);
    let handles = put_all(&vmem, count, len, DISK).await;
    driver.stand_still();
    let prefetch = vmem.prefetch_many(&handles, HOST);
    support::eventually("the first reads", || driver.in_flight() == expected).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(driver.in_flight(), expected, "{count} objects of {len} bytes");
    driver.go_on();
    prefetch.await.unwrap();
    assert!(handles.iter().all(|handle| vmem.residency(handle).unwrap().host));
    drop(handles);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn prefetch_in_flight_is_bounded_by_bytes() {
    assert_begun(20, 16 * KIB, STAGING / (16 * KIB)).await;
    assert_begun(20, 24 * KIB, STAGING / (24 * KIB)).await;
}

#[tokio::test]
async fn small_objects_of_a_prefetch_are_bounded_by_number() {
    assert_begun(40, KIB, 32).await;
}

#[tokio::test]
async fn few_large_objects_come_at_once_in_any_case() {
    assert_begun(8, 64 * KIB, 4).await;
    assert_begun(6, MIB, 4).await;
}

/// The error is that of the first that failed, in the order of the call.
#[tokio::test]
async fn first_error_of_a_prefetch_is_in_the_order_of_the_call() {
    let (vmem, driver) = support::open(8 * MIB, 16 * MIB, |builder| builder);
    let mut handles = put_all(&vmem, 6, 16 * KIB, DISK).await;
    let flip = |content: &[u8]| driver.flip(driver.find(content).expect("it is there"));
    flip(&support::bytes(5, 1, 16 * KIB));
    // It takes longer than the one that is damaged too.
    let long = support::bytes(77, 1, 2 * MIB);
    handles[1] = vmem.put(&long, DISK).await.unwrap();
    flip(&long[long.len() - 16 * KIB..]);
    let refused = vmem.prefetch_many(&handles, HOST).await.unwrap_err();
    let expected = handles[1].id();
    assert!(
        matches!(refused, vmem::VirtualMemoryError::Corrupt { handle, .. } if handle == expected),
        "{refused:?}"
    );
    for (nth, handle) in handles.iter().enumerate() {
        assert_eq!(vmem.residency(handle).unwrap().host, nth != 1 && nth != 4, "object {nth}");
    }
    drop(handles);
    vmem.close().await.unwrap();
}
