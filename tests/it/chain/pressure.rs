//! More objects than the faster tiers hold.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::VirtualMemoryError;

use super::{REMOTE, open};
use crate::support::{DISK, HOST, KIB, MIB, bytes, seed};

const LEN: usize = 64 * KIB;

#[tokio::test(start_paused = true)]
async fn objects_without_space_on_disk_fall_below_it() {
    let chain = open((MIB, 2 * MIB, 16 * MIB), |builder| builder);
    let vmem = &chain.vmem;
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut handles = Vec::new();
    for object in 1..=120_u64 {
        let home = [HOST, DISK][rng.random_range(0..2)];
        handles.push(vmem.put(bytes(object, 1, LEN), home).await.unwrap());
    }
    let stats = chain.settle().await;
    assert!(stats.remote.objects > 60, "{stats:#?}");
    for tier in [stats.host, stats.disk, stats.remote] {
        assert!(tier.peak_bytes <= tier.capacity_bytes, "{stats:#?}");
    }
    assert!(stats.disk.used_bytes > MIB as u64, "the disk is used before what is below it");
    for (object, handle) in (1..).zip(&handles) {
        let mut read = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
        assert!(read == bytes(object, 1, LEN), "object {object}");
    }
    drop(handles);
    chain.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn coldest_objects_leave_the_disk_down_to_the_low_mark() {
    let disk = 100 * LEN;
    let chain = open((MIB, disk, 16 * MIB), |builder| builder.watermarks(0.5, 0.8));
    let vmem = &chain.vmem;
    let mut handles = Vec::new();
    for object in 1..=80_u64 {
        handles.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
        tokio::time::advance(Duration::from_millis(3)).await;
    }
    let stats = chain.settle().await;
    assert_eq!(stats.remote.objects, 0, "at the mark, not above");
    // The oldest are used again.
    for handle in &handles[..10] {
        let mut read = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
        tokio::time::advance(Duration::from_millis(3)).await;
    }
    handles.push(vmem.put(bytes(81, 1, LEN), DISK).await.unwrap());
    let stats = chain.settle().await;
    assert!(stats.disk.used_bytes <= (50 * LEN) as u64, "{stats:#?}");
    assert!(stats.disk.used_bytes > (46 * LEN) as u64, "no further: {stats:#?}");
    for (at, handle) in handles.iter().enumerate() {
        let on_disk = vmem.residency(handle).unwrap().disk;
        let is_cold = (10..41).contains(&at);
        assert_eq!(on_disk, !is_cold, "object {at}");
    }
}

#[tokio::test(start_paused = true)]
async fn promotion_to_a_full_disk_makes_colder_objects_leave_it() {
    let chain = open((MIB, 16 * LEN, 16 * MIB), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let mut handles = Vec::new();
    for object in 1..=16_u64 {
        handles.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
        tokio::time::advance(Duration::from_millis(3)).await;
    }
    let cold = vmem.put(bytes(17, 1, 3 * LEN), REMOTE).await.unwrap();
    vmem.promote(&cold, DISK).await.unwrap();
    assert!(vmem.residency(&cold).unwrap().disk);
    let left = handles.iter().filter(|handle| !vmem.residency(handle).unwrap().disk).count();
    assert_eq!(left, 3, "as many as were needed");
    assert!(handles[..3].iter().all(|handle| chain.places(handle) == [false, false, true]));
    let stats = chain.settle().await;
    assert!(stats.disk.peak_bytes <= stats.disk.capacity_bytes);
}

#[tokio::test(start_paused = true)]
async fn full_chain_refuses_at_once_and_names_the_last_tier() {
    let chain = open((4 * LEN, 4 * LEN, 4 * LEN), |builder| builder);
    let vmem = &chain.vmem;
    let began = tokio::time::Instant::now();
    let mut handles = Vec::new();
    let refused = loop {
        match vmem.put(bytes(1, 1, LEN), HOST).await {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
        assert!(handles.len() < 20, "more than there is space for");
    };
    let VirtualMemoryError::TierFull { tier, capacity_bytes, .. } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((tier, capacity_bytes), (REMOTE, (4 * LEN) as u64));
    assert!(handles.len() >= 10, "{} objects had space", handles.len());
    assert!(began.elapsed() < Duration::from_secs(5), "no deadline was waited for");
    for handle in &handles {
        let mut read = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
        assert!(read == bytes(1, 1, LEN));
    }
    let refused = vmem.promote(&handles[0], DISK).await;
    let explained = matches!(refused, Ok(()) | Err(VirtualMemoryError::TierFull { .. }));
    assert!(explained, "{refused:?}");
    // What is freed can be used again at once.
    handles.truncate(handles.len() - 2);
    handles.push(vmem.put(bytes(1, 1, LEN), HOST).await.unwrap());
    drop(handles);
    chain.assert_empty().await;
}

/// Excluded: a waiter for space on disk that sleeps although a reader has given space back.
#[tokio::test(start_paused = true)]
async fn promotion_waits_for_space_that_a_reader_gives_back() {
    let chain = open((MIB, 4 * LEN, 16 * MIB), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let pinned = vmem.put(bytes(1, 1, 2 * LEN), DISK).await.unwrap();
    let _pin = vmem.pin(&pinned, DISK).await.unwrap();
    let read = vmem.put(bytes(2, 1, LEN), DISK).await.unwrap();
    let _other_pin = vmem.pin(&read, DISK).await.unwrap();
    // A reader keeps the version that it began with, by its extents; the object has another.
    use tokio::io::AsyncReadExt;
    let mut reader = vmem.reader(&read, 0..LEN);
    reader.read_exact(&mut [0; 10]).await.unwrap();
    vmem.write(&read, bytes(2, 2, LEN)).await.unwrap();
    let cold = vmem.put(bytes(3, 1, LEN), REMOTE).await.unwrap();
    let promoting = tokio::spawn({
        let vmem = vmem.clone();
        let cold = cold.clone();
        async move { vmem.promote(&cold, DISK).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!promoting.is_finished(), "{:?}", promoting.await);
    drop(reader);
    tokio::time::timeout(Duration::from_secs(1), promoting).await.unwrap().unwrap().unwrap();
    assert!(vmem.residency(&cold).unwrap().disk);
}

/// Excluded: one request that waits for space on disk, past which nothing gets any.
#[tokio::test(start_paused = true)]
async fn small_object_passes_a_promotion_that_waits_for_space() {
    let chain = open((MIB, 8 * LEN, 16 * MIB), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let pinned = vmem.put(bytes(1, 1, 4 * LEN), DISK).await.unwrap();
    let pin = vmem.pin(&pinned, DISK).await.unwrap();
    let large = vmem.put(bytes(2, 1, 6 * LEN), REMOTE).await.unwrap();
    let promoting = tokio::spawn({
        let vmem = vmem.clone();
        let large = large.clone();
        async move { vmem.promote(&large, DISK).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let small = vmem.put(bytes(3, 1, LEN), DISK).await.unwrap();
    assert_eq!(chain.places(&small), [false, true, false]);
    drop(pin);
    tokio::time::timeout(Duration::from_secs(1), promoting).await.unwrap().unwrap().unwrap();
    assert!(vmem.residency(&large).unwrap().disk);
}

/// Excluded: a refusal for lack of space while the disk has copies that are below it too.
#[tokio::test(start_paused = true)]
async fn copies_leave_a_full_disk_also_where_the_tier_below_is_full() {
    let chain = open((MIB, 8 * LEN, 8 * LEN), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let mut handles = Vec::new();
    for object in 1..=8 {
        let handle = vmem.put(bytes(object, 1, LEN), REMOTE).await.unwrap();
        vmem.promote(&handle, DISK).await.unwrap();
        handles.push(handle);
    }
    assert_eq!(vmem.stats().disk.used_bytes, (8 * LEN) as u64);
    for object in 9..=16 {
        handles.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
    }
    let refused = vmem.put(bytes(17, 1, LEN), DISK).await;
    assert!(matches!(refused, Err(VirtualMemoryError::TierFull { .. })), "{refused:?}");
    for (object, handle) in (1..).zip(&handles) {
        let mut read = vec![0; LEN];
        vmem.read_into(handle, 0..LEN, &mut read).await.unwrap();
        assert!(read == bytes(object, 1, LEN), "{object}");
    }
}

#[tokio::test(start_paused = true)]
async fn promotion_of_one_chunk_takes_the_space_of_one() {
    let chain = open((MIB, 8 * LEN, 64 * LEN), |builder| builder.watermarks(0.98, 1.0));
    let vmem = &chain.vmem;
    let large = vmem.put(bytes(1, 1, 5 * LEN), DISK).await.unwrap();
    let pin = vmem.pin(&large, DISK).await.unwrap();
    let mut others = Vec::new();
    for object in 2..=4 {
        others.push(vmem.put(bytes(object, 1, LEN), DISK).await.unwrap());
    }
    // The new chunk is written below the full disk, and comes back where the object is pinned.
    vmem.write_at(&large, 2 * LEN, bytes(5, 1, LEN)).await.unwrap();
    let whole = async {
        while !vmem.residency(&large).unwrap().disk {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), whole).await.unwrap();
    let has_left = |other| !vmem.residency(other).unwrap().disk;
    assert!(!others.iter().any(has_left), "the chunk before it had the space of one");
    let mut read = vec![0; 5 * LEN];
    vmem.read_into(&large, 0..5 * LEN, &mut read).await.unwrap();
    assert!(read[2 * LEN..3 * LEN] == bytes(5, 1, LEN));
    drop(pin);
}

/// Excluded: a write that waits for pins which keep it from ever having space.
#[tokio::test(start_paused = true)]
async fn write_beyond_what_pins_leave_is_refused_at_once() {
    let chain = open((MIB, 8 * LEN, LEN), |builder| builder);
    let vmem = &chain.vmem;
    let pinned = vmem.put(bytes(1, 1, 5 * LEN), DISK).await.unwrap();
    let _pin = vmem.pin(&pinned, DISK).await.unwrap();
    let began = tokio::time::Instant::now();
    let refused = vmem.put(bytes(2, 1, 4 * LEN), DISK).await;
    assert!(matches!(refused, Err(VirtualMemoryError::TierFull { .. })), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "no deadline was waited for");
}
