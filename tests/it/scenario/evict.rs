//! Scenarios about what is evicted: for which requests, how much, and to which tier.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use crate::support::{self, DISK, HOST, KIB, MIB, assert_empty, bytes, put_all, seed, settle};

const LEN: usize = 64 * KIB;

// ---- 11: fragmentation
// ---------------------------------------------------------------------------

/// Excluded: free space that no object can use, since it lies in pieces between others; an
/// allocation that goes to disk, or fails, although everything in its way could move. Noticed by
/// where the object is, and by the simulated clock.
#[tokio::test(start_paused = true)]
async fn scenario_11_one_large_allocation_in_a_fragmented_tier() {
    let mut rng = SmallRng::seed_from_u64(seed());
    let space = 8 * MIB;
    for share in [50, 80, 100] {
        let (vmem, driver) = support::open(space, 64 * MIB, |b| b.watermarks(0.98, 1.0));
        let mut objects = Vec::new();
        let mut object = 0;
        // Small ones of every class until there is no more space, then a hole at every second
        // place.
        while vmem.stats().evictions == 0 {
            object += 1;
            let len = rng.random_range(64..24 * KIB);
            let handle = vmem.put(bytes(object, 1, len), HOST).await.unwrap();
            objects.push((object, handle));
        }
        let mut at = 0;
        objects.retain(|_| {
            at += 1;
            at % 2 == 0
        });
        settle(&vmem, &driver).await;
        let len = space / 100 * share / 4096 * 4096;
        assert!(vmem.stats().host.largest_free_bytes < len as u64, "it is not simply there");
        let asked = Instant::now();
        let large = vmem.allocate(len, HOST).await.unwrap();
        assert!(vmem.residency(&large).unwrap().host, "{share} % went elsewhere");
        assert!(asked.elapsed() < Duration::from_secs(1), "one round, not a deadline");
        vmem.write(&large, bytes(7, 7, len)).await.unwrap();
        for (object, handle) in &objects {
            let mut buf = vec![0xEE; handle.len()];
            vmem.read_into(handle, 0..buf.len(), &mut buf).await.unwrap();
            assert!(buf == bytes(*object, 1, buf.len()), "object {object}");
        }
        let mut buf = vec![0; len];
        vmem.read_into(&large, 0..len, &mut buf).await.unwrap();
        assert!(buf == bytes(7, 7, len));
        drop((objects, large));
        assert_empty(&settle(&vmem, &driver).await, "fragmentation");
    }
}

// ---- 14: waiters start eviction

/// Below the high mark nothing is evicted, except for waiters.
#[tokio::test(start_paused = true)]
async fn scenario_14_waiters_start_eviction() {
    let (vmem, driver) = support::open(16 * LEN, 64 * MIB, |b| b.watermarks(0.98, 1.0));
    let warm = put_all(&vmem, 16, LEN, HOST).await;
    settle(&vmem, &driver).await;
    assert_eq!(vmem.stats().evictions, 0, "full to the mark and not above");
    let cold = vmem.put(bytes(99, 1, 3 * LEN), DISK).await.unwrap();
    assert!(vmem.read(&cold).await.unwrap() == bytes(99, 1, 3 * LEN));
    assert_eq!(settle(&vmem, &driver).await.evictions, 3, "as many as were needed");
    drop((warm, cold));
}

// ---- 15: how much is evicted
// ---------------------------------------------------------------------

/// Excluded: an evictor that overshoots (64 MiB were needed, 1 GiB was moved), or that stops short
/// and starts again with every allocation. Noticed by what is left in host memory.
#[tokio::test(start_paused = true)]
async fn scenario_15_the_high_mark_and_the_low_mark() {
    for (low, high) in [(0.5, 0.8), (0.7, 0.9)] {
        let (vmem, driver) = support::open(100 * LEN, 64 * MIB, |b| b.watermarks(low, high));
        let low = (100.0 * low) as usize;
        let high = (100.0 * high) as usize;
        let mut warm = put_all(&vmem, high, LEN, HOST).await;
        let stats = settle(&vmem, &driver).await;
        assert_eq!(stats.evictions, 0, "at the mark, not above");
        assert_eq!(stats.host.used_bytes, (high * LEN) as u64);
        warm.push(vmem.put(bytes(200, 1, LEN), HOST).await.unwrap());
        let stats = settle(&vmem, &driver).await;
        assert_eq!(stats.host.used_bytes, (low * LEN) as u64, "down to the low mark, no further");
        // The coldest went, the newest stayed.
        for (at, handle) in warm.iter().enumerate() {
            let host = vmem.residency(handle).unwrap().host;
            assert_eq!(host, at >= warm.len() - low, "object {at} of {}", warm.len());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn scenario_15_a_large_need_evicts_no_more_than_it_and_the_band() {
    for need in [3, 10, 25] {
        let (vmem, driver) = support::open(100 * LEN, 64 * MIB, |b| b.watermarks(0.85, 0.95));
        let warm = put_all(&vmem, 95, LEN, HOST).await;
        settle(&vmem, &driver).await;
        let large = vmem.allocate(need * LEN, HOST).await.unwrap();
        assert!(vmem.residency(&large).unwrap().host);
        let stats = settle(&vmem, &driver).await;
        let band = 10;
        println!("{need} needed, {} evicted", stats.evictions);
        assert!(stats.evictions as usize <= need + band, "{} for {need}", stats.evictions);
        assert!(stats.host.used_bytes <= 95 * LEN as u64, "not left above the mark");
        drop((warm, large));
    }
}
