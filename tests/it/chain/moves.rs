//! Where calls put objects.

use vmem::VirtualMemoryError;

use super::{Chain, REMOTE, open};
use crate::support::{DISK, HOST, KIB, MIB, bytes};

const LENS: [usize; 4] = [1, 3000, 64 * KIB, 300_000];

fn spacious() -> Chain {
    open((4 * MIB, 8 * MIB, 16 * MIB), |builder| builder)
}

#[tokio::test(start_paused = true)]
async fn objects_move_down_and_up_step_by_step() {
    let chain = spacious();
    let vmem = &chain.vmem;
    for (object, len) in (1..).zip(LENS) {
        let handle = vmem.put(bytes(object, 1, len), HOST).await.unwrap();
        vmem.demote(&handle, DISK).await.unwrap();
        assert_eq!(chain.places(&handle), [false, true, false]);
        vmem.demote(&handle, REMOTE).await.unwrap();
        assert_eq!(chain.places(&handle), [false, false, true]);
        assert_eq!(vmem.residency(&handle).unwrap().current_tier(), Some(REMOTE));
        // Demoting to where it is, or to a faster tier, does nothing.
        vmem.demote(&handle, DISK).await.unwrap();
        assert_eq!(chain.places(&handle), [false, false, true]);
        vmem.promote(&handle, DISK).await.unwrap();
        assert_eq!(chain.places(&handle), [false, true, true], "the slower copy stays");
        assert_eq!(vmem.residency(&handle).unwrap().current_tier(), Some(DISK));
        vmem.promote(&handle, HOST).await.unwrap();
        assert_eq!(chain.places(&handle), [true, true, true]);
        assert!(vmem.read(&handle).await.unwrap() == bytes(object, 1, len));
        // A copy that the tier below has too leaves without a write.
        let written = chain.remote.writes();
        vmem.demote(&handle, REMOTE).await.unwrap();
        assert_eq!(chain.places(&handle), [false, false, true]);
        assert_eq!(chain.remote.writes(), written);
        assert!(vmem.read(&handle).await.unwrap() == bytes(object, 1, len));
    }
    chain.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn object_that_only_host_memory_has_goes_to_the_last_tier_in_one_step() {
    let chain = spacious();
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, 200_000), HOST).await.unwrap();
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert_eq!(chain.places(&handle), [false, false, true]);
    assert_eq!(chain.disk.writes(), 0, "not by way of the disk");
    let mut read = vec![0; 200_000];
    vmem.read_into(&handle, 0..200_000, &mut read).await.unwrap();
    assert!(read == bytes(1, 1, 200_000));
    assert_eq!(&vmem.read_at(&handle, 99_000..99_100).await.unwrap()[..], &read[99_000..99_100]);
    assert_eq!(vmem.stats().disk_to_host_bytes, 0);
    assert!(vmem.stats().remote_to_host_bytes >= 200_000);
    assert!(vmem.stats().remote.hits >= 2);
}

#[tokio::test(start_paused = true)]
async fn object_at_home_in_the_last_tier_is_flushed_there() {
    let chain = spacious();
    let vmem = &chain.vmem;
    for (object, len) in (1..).zip(LENS) {
        let handle = vmem.put(bytes(object, 1, len), REMOTE).await.unwrap();
        assert_eq!(chain.places(&handle), [false, false, true]);
        vmem.promote(&handle, HOST).await.unwrap();
        vmem.write_at(&handle, 0, bytes(object, 2, len)).await.unwrap();
        vmem.flush(&handle).await.unwrap();
        assert_eq!(chain.places(&handle), [true, false, true]);
        assert!(!vmem.residency(&handle).unwrap().dirty);
        // Also what the disk alone has.
        vmem.write(&handle, bytes(object, 3, len)).await.unwrap();
        vmem.demote(&handle, DISK).await.unwrap();
        assert_eq!(chain.places(&handle), [false, true, false]);
        vmem.flush_all().await.unwrap();
        assert_eq!(chain.places(&handle), [false, true, true]);
        assert!(vmem.read(&handle).await.unwrap() == bytes(object, 3, len));
    }
    chain.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn part_that_is_written_below_leaves_the_other_chunks_where_they_are() {
    let chain = spacious();
    let vmem = &chain.vmem;
    let len = 10 * 64 * KIB;
    let handle = vmem.put(bytes(1, 1, len), DISK).await.unwrap();
    vmem.demote(&handle, REMOTE).await.unwrap();
    vmem.write_at(&handle, 3 * 64 * KIB + 5, [7; 100]).await.unwrap();
    assert_eq!(chain.places(&handle), [false; 3], "each tier has a part");
    let mut expected = bytes(1, 1, len);
    expected[3 * 64 * KIB + 5..][..100].fill(7);
    assert!(vmem.read(&handle).await.unwrap() == expected);
    for (tier, places) in [(DISK, [false, true, false]), (REMOTE, [false, false, true])] {
        vmem.demote(&handle, tier).await.unwrap();
        if tier == DISK {
            vmem.promote(&handle, DISK).await.unwrap();
            assert!(vmem.residency(&handle).unwrap().disk);
        } else {
            assert_eq!(chain.places(&handle), places);
        }
        let mut read = vec![0; len];
        vmem.read_into(&handle, 0..len, &mut read).await.unwrap();
        assert!(read == expected, "{tier}");
    }
    drop(handle);
    chain.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn object_that_was_never_written_moves_without_a_byte() {
    let chain = spacious();
    let vmem = &chain.vmem;
    for home in [HOST, DISK, REMOTE] {
        let handle = vmem.allocate(200_000, home).await.unwrap();
        vmem.demote(&handle, REMOTE).await.unwrap();
        assert_eq!(chain.places(&handle), [false, false, true], "{home}");
        vmem.promote(&handle, DISK).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == vec![0; 200_000]);
        vmem.demote(&handle, REMOTE).await.unwrap();
        vmem.write(&handle, bytes(1, 1, 200_000)).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 200_000), "{home}");
        drop(handle);
        chain.assert_empty().await;
    }
    assert!(chain.remote.reads() <= 6, "zeros are not read: {}", chain.remote.reads());
}

/// Excluded: a first write of space that was reserved, whose object keeps, as a copy in a slower
/// tier, the zeros that were flushed there before.
#[tokio::test(start_paused = true)]
async fn first_write_outdates_what_was_flushed_before_it() {
    let chain = spacious();
    let vmem = &chain.vmem;
    let handle = vmem.allocate(200_000, REMOTE).await.unwrap();
    vmem.promote(&handle, DISK).await.unwrap();
    vmem.flush(&handle).await.unwrap();
    vmem.write(&handle, bytes(1, 1, 200_000)).await.unwrap();
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 200_000));
}

#[tokio::test(start_paused = true)]
async fn pinned_object_stays_where_it_is_pinned() {
    let chain = spacious();
    let vmem = &chain.vmem;
    let handle = vmem.put(bytes(1, 1, 100_000), REMOTE).await.unwrap();
    let pin = vmem.pin(&handle, DISK).await.unwrap();
    assert_eq!(chain.places(&handle), [false, true, true]);
    assert_eq!(vmem.residency(&handle).unwrap().pins, 1);
    let refused = vmem.demote(&handle, REMOTE).await;
    let Err(VirtualMemoryError::Pinned { tier, pins: 1, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(tier, DISK);
    // The last tier is left by nothing, so there is nothing to keep an object from.
    drop(vmem.pin(&handle, REMOTE).await.unwrap());
    drop(pin);
    vmem.demote(&handle, REMOTE).await.unwrap();
    assert_eq!(chain.places(&handle), [false, false, true]);
    assert_eq!(vmem.residency(&handle).unwrap().pins, 0);
}

#[tokio::test(start_paused = true)]
async fn prefetch_brings_objects_as_far_up_as_it_says() {
    let chain = spacious();
    let vmem = &chain.vmem;
    let mut handles = Vec::new();
    for object in 1..=6 {
        handles.push(vmem.put(bytes(object, 1, 50_000), REMOTE).await.unwrap());
    }
    vmem.prefetch_many(&handles, DISK).await.unwrap();
    assert!(handles.iter().all(|handle| chain.places(handle) == [false, true, true]));
    vmem.prefetch_many(&handles, HOST).await.unwrap();
    assert!(handles.iter().all(|handle| chain.places(handle) == [true, true, true]));
}

#[tokio::test(start_paused = true)]
async fn streams_go_to_the_last_tier_and_come_from_it() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let chain = spacious();
    let vmem = &chain.vmem;
    let len = 900_000;
    let mut writer = vmem.writer(REMOTE);
    writer.write_all(&bytes(1, 1, len)).await.unwrap();
    let handle = writer.commit().await.unwrap();
    assert_eq!(chain.places(&handle), [false, false, true]);
    let mut read = Vec::new();
    vmem.reader(&handle, 0..len).read_to_end(&mut read).await.unwrap();
    assert!(read == bytes(1, 1, len));
}

#[tokio::test(start_paused = true)]
async fn store_without_a_tier_below_the_disk_says_so() {
    let (vmem, _driver) = crate::support::open(MIB, MIB, |builder| builder);
    let handle = vmem.put([1; 100], DISK).await.unwrap();
    let refused = [
        vmem.put([1; 100], REMOTE).await.map(drop),
        vmem.demote(&handle, REMOTE).await,
        vmem.promote(&handle, REMOTE).await,
        vmem.pin(&handle, REMOTE).await.map(drop),
        vmem.prefetch(&handle, REMOTE).await,
    ];
    for refused in refused {
        let is_it =
            matches!(refused, Err(VirtualMemoryError::TierNotAvailable { tier: REMOTE, .. }));
        assert!(is_it, "{refused:?}");
    }
}
