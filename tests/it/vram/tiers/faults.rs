//! Promotions and prefetches that are dropped, devices that fail, and everything at random.
//!
//! Invariant: nothing stays taken, on the device or above. Run on each device by the module above.

use std::time::Duration;

use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{VMemHandle, VirtualMemoryError};

use super::{VRAM, Which, assert_all_back, in_vram, open};
use crate::support::{self, DISK, HOST, KIB, MIB, bytes, put_all};

pub(super) async fn a_promotion_that_is_dropped_half_way(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.put(bytes(1, 1, 100_000), HOST).await.unwrap();
    gpu.hold();
    let promote = tokio::spawn({
        let vmem = vmem.clone();
        let handle = handle.clone();
        async move { vmem.promote(&handle, VRAM).await }
    });
    while !gpu.is_busy() {
        tokio::task::yield_now().await;
    }
    promote.abort();
    assert!(promote.await.unwrap_err().is_cancelled());
    // Readers are served meanwhile.
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 100_000));
    assert_eq!(vmem.stats().vram.used_bytes, 100_352);
    // A write waits for it, and wins.
    let mut write = Box::pin(vmem.write(&handle, bytes(1, 2, 100_000)));
    assert!((&mut write).now_or_never().is_none());
    gpu.release_all();
    write.await.unwrap();
    assert!(!in_vram(&vmem, &handle));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, 100_000));

    // Freed while it is promoted.
    gpu.hold();
    let promote = vmem.promote(&handle, VRAM);
    let mut promote = Box::pin(promote);
    assert!((&mut promote).now_or_never().is_none());
    while !gpu.is_busy() {
        tokio::task::yield_now().await;
    }
    vmem.free(handle.clone()).await.unwrap();
    drop(promote);
    assert!(vmem.stats().vram.used_bytes > 0, "the copy in flight has it");
    gpu.release_all();
    assert_all_back(vmem, &driver, &gpu, Vec::new()).await;
}

pub(super) async fn a_device_that_fails_and_one_that_is_lost(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handles = put_all(&vmem, 3, 20_000, HOST).await;
    vmem.demote(&handles[2], DISK).await.unwrap();
    for handle in &handles {
        gpu.fail_next_upload();
        let error = vmem.promote(handle, VRAM).await.unwrap_err();
        assert!(matches!(error, VirtualMemoryError::Device { code: 719, .. }), "{error:?}");
        assert_eq!(vmem.stats().vram.used_bytes, 0, "what was taken came back");
        vmem.promote(handle, VRAM).await.unwrap();
        assert!(in_vram(&vmem, handle));
        vmem.demote(handle, HOST).await.unwrap();
    }
    vmem.promote(&handles[1], VRAM).await.unwrap();
    gpu.lose();
    assert!(vmem.promote(&handles[0], VRAM).await.is_err());
    assert!(!in_vram(&vmem, &handles[1]));
    for (n, handle) in handles.iter().enumerate() {
        let error = vmem.promote(handle, VRAM).await.unwrap_err();
        let VirtualMemoryError::TierNotAvailable { tier: VRAM, reason } = error else {
            panic!("{error:?}")
        };
        assert!(!reason.is_empty());
        assert!(vmem.pin(handle, VRAM).await.is_err());
        assert!(vmem.allocate(10, VRAM).await.is_err());
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 1, 20_000));
        vmem.write(handle, bytes(n as u64 + 1, 2, 20_000)).await.unwrap();
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64 + 1, 2, 20_000));
    }
    assert_all_back(vmem, &driver, &gpu, handles).await;
}

pub(super) async fn a_prefetch_that_is_dropped_half_way(which: Which) {
    let (vmem, driver, gpu) = open(which, MIB, MIB, |config| config);
    let handle = vmem.put(bytes(1, 1, 100_000), HOST).await.unwrap();
    gpu.hold();
    let prefetch = vmem.prefetch(&handle, VRAM);
    while !gpu.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(vmem.stats().vram.used_bytes > 0);
    drop(prefetch);
    gpu.release_all();
    let mut left = vmem.stats().vram.used_bytes;
    for _ in 0..2000 {
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        left = vmem.stats().vram.used_bytes;
    }
    assert_eq!((left, vmem.stats().vram.objects), (0, 0));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 100_000));
    assert_all_back(vmem, &driver, &gpu, vec![handle]).await;
}

pub(super) async fn every_tier_at_random(which: Which) {
    let seed = support::seed();
    let (vmem, driver, gpu) = open(which, 1500 * KIB, MIB, |config| {
        config.wait_timeout(Duration::from_millis(300)).max_pinned(0.5)
    });
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8_u64 {
        let vmem = vmem.clone();
        let gpu = gpu.clone();
        tasks.spawn(async move {
            let mut rng = SmallRng::seed_from_u64(seed ^ (task << 32));
            let mut counts = [0_usize; 2];
            let mut objects = Vec::new();
            for step in 0..400_u64 {
                if objects.len() < 12 || rng.random_ratio(1, 20) {
                    let len = [500, 4096, 40_000, 65_536, 150_000][rng.random_range(0..5)];
                    let home = [VRAM, HOST, DISK][rng.random_range(0..3)];
                    if let Ok(handle) = vmem.allocate(len, home).await {
                        objects.push((handle, 0, 0));
                    }
                    continue;
                }
                let at = rng.random_range(0..objects.len());
                let (handle, done, begun): &mut (VMemHandle, u64, u64) = &mut objects[at];
                let id = handle.id();
                let len = handle.len();
                let tier = [VRAM, HOST, DISK][rng.random_range(0..3)];
                let timeout = match rng.random_range(0..4) {
                    0 => Duration::from_micros(rng.random_range(0..2000)),
                    _ => Duration::from_secs(20),
                };
                if rng.random_ratio(1, 50) {
                    gpu.fail_next_upload();
                    gpu.fail_next_download();
                }
                let outcome = match rng.random_range(0..9) {
                    0..=2 => {
                        let read = tokio::time::timeout(timeout, vmem.read(handle)).await;
                        if let Ok(Ok(read)) = &read {
                            let right = (*done..=*begun)
                                .any(|version| read[..] == bytes(id, version, len)[..]);
                            assert!(right, "step {step}: object {id} versions {done}..={begun}");
                        }
                        read.map(|read| read.map(drop))
                    }
                    3 => {
                        *begun += 1;
                        let new = bytes(id, *begun, len);
                        let write = tokio::time::timeout(timeout, vmem.write(handle, new)).await;
                        if let Ok(Ok(())) = write {
                            *done = *begun;
                        }
                        write
                    }
                    4 | 5 => tokio::time::timeout(timeout, vmem.promote(handle, tier)).await,
                    6 => tokio::time::timeout(timeout, vmem.demote(handle, tier)).await,
                    7 => {
                        let pin = tokio::time::timeout(timeout, vmem.pin(handle, tier)).await;
                        tokio::task::yield_now().await;
                        if let Ok(Ok(_guard)) = &pin
                            && tier == VRAM
                        {
                            let residency = vmem.residency(handle).unwrap();
                            assert!(residency.vram, "pinned, and not there: {residency:?}");
                        }
                        pin.map(|pin| pin.map(drop))
                    }
                    _ if rng.random_bool(0.5) => {
                        vmem.prefetch(handle, tier).detach();
                        Ok(Ok(()))
                    }
                    _ => {
                        objects.swap_remove(at);
                        continue;
                    }
                };
                match outcome {
                    Ok(Ok(())) => counts[0] += 1,
                    Ok(Err(VirtualMemoryError::Device { .. })) => {}
                    Ok(Err(error)) if support::is_pressure(&error) => counts[1] += 1,
                    Ok(Err(error)) => panic!("{error:?}"),
                    Err(_dropped) => {}
                }
                let stats = vmem.stats();
                assert!(stats.vram.used_bytes <= stats.vram.capacity_bytes, "{stats:#?}");
            }
            counts
        });
    }
    let counts = tasks.join_all().await;
    println!("{counts:?}, {:?}", vmem.stats());
    let stats = vmem.stats();
    assert!(stats.vram.hits > 0 && stats.host_to_vram_bytes > 0 && stats.evictions > 0);
    assert!(counts.iter().map(|counts| counts[0]).sum::<usize>() > 1000, "{counts:?}");
    assert_all_back(vmem, &driver, &gpu, Vec::new()).await;
}
