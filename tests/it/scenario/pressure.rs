//! Scenarios of more work than there is space or speed for, over a simulated disk on a paused
//! clock.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use tokio::time::Instant;
use vmem::backend::Backends;
use vmem::{Capabilities, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_io::DiskTier;
use vmem_testkit::sim::Speed;
use vmem_testkit::{Seed, SimConfig, SimDriver};

use crate::support::{self, DISK, HOST, KIB, MIB, bytes};

fn open(space: usize, disk: usize, speed: Speed) -> (VirtualMemory, Arc<SimDriver>) {
    let driver = SimDriver::new(SimConfig { speed, ..SimConfig::default() });
    let backends = Backends {
        remote: None,
        host_capacity_bytes: (space + support::STAGING) as u64,
        disk: DiskTier::new(driver.clone(), disk as u64),
        catalog: None,
        devices: Vec::new(),
        capabilities: Capabilities::new("simulated".into(), "not in this test".into()),
    };
    let config = support::config(space, |builder| builder);
    (VirtualMemory::with_backends(&config, backends).unwrap(), driver)
}

fn disk_of(mebibytes_per_second: u64) -> Speed {
    Speed {
        read_latency: Duration::from_micros(500),
        write_latency: Duration::from_micros(500),
        bytes_per_second: Some(mebibytes_per_second << 20),
        queue_depth: 32,
        ..Speed::default()
    }
}

async fn on_disk(vmem: &VirtualMemory, count: usize, len: usize) -> Vec<VMemHandle> {
    support::put_all(vmem, count, len, DISK).await
}

/// Simulated time of reading these objects one after the other, without promoting them.
async fn demand_time(vmem: &VirtualMemory, objects: &[VMemHandle], hot: &[VMemHandle]) -> Duration {
    let began = Instant::now();
    for (n, handle) in objects.iter().enumerate() {
        let options = vmem::ReadOptions::new().promote(false);
        let read = vmem.read_with(handle, options).await.unwrap();
        assert!(read == bytes(n as u64 + 1, 1, handle.len()));
        // What is hot stays hot.
        vmem.read(&hot[n % hot.len()]).await.unwrap();
    }
    began.elapsed()
}

/// Mechanism: only `read` looked at the clock of accesses, each eighth time. Effect: what was hit
/// by other calls alone had stamps as old as the last look, and made way for a prefetch. Fix: hits
/// count, whichever call they serve.
#[tokio::test(start_paused = true)]
async fn objects_hit_without_a_wait_make_no_way_for_a_prefetch() {
    let (vmem, _) = open(MIB, 16 * MIB, disk_of(100));
    let cold = vmem.put(bytes(1, 1, 512 * KIB), DISK).await.unwrap();
    vmem.demote(&cold, DISK).await.unwrap();
    let hot = support::put_all(&vmem, 14, 64 * KIB, HOST).await;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(hot.iter().all(|handle| vmem.try_read(handle).is_some()));
    }
    let soon = Duration::from_millis(50);
    let prefetched = tokio::time::timeout(soon, vmem.prefetch(&cold, HOST)).await;
    assert!(prefetched.is_err(), "it waits for what is hot to cool: {prefetched:?}");
    assert!(hot.iter().all(|handle| vmem.residency(handle).unwrap().host));
    vmem.close().await.unwrap();
}

/// Mechanism: one deadline for all pieces of a `read_into`. Effect: an object that takes the disk
/// longer than `wait_timeout` could never be read, however often. Fix: each piece that makes
/// progress has the deadline anew.
#[tokio::test(start_paused = true)]
async fn slow_read_into_goes_on_as_long_as_it_makes_progress() {
    const LEN: usize = 64 * MIB;
    let (vmem, _) = open(4 * MIB, 96 * MIB, disk_of(1));
    let handle = vmem.allocate(LEN, DISK).await.unwrap();
    let expected = bytes(1, 1, LEN);
    for start in (0..LEN).step_by(MIB) {
        vmem.write_at(&handle, start, &expected[start..start + MIB]).await.unwrap();
    }
    let began = Instant::now();
    let mut read = vec![0; LEN];
    vmem.read_into(&handle, 0..LEN, &mut read).await.unwrap();
    assert!(read == expected);
    let waits = support::config(MIB, |builder| builder).wait_timeout();
    assert!(began.elapsed() > waits, "it was slower than one wait: {:?}", began.elapsed());
    vmem.close().await.unwrap();
}

/// Excluded: prefetches that take the link from demand reads, and that evict what is in use.
/// Noticed by the simulated time of the same reads alone and under the storm.
#[tokio::test(start_paused = true)]
async fn scenario_16_a_promotion_storm() {
    let (vmem, driver) = open(8 * MIB, 512 * MIB, disk_of(200));
    let cold = on_disk(&vmem, 60, 128 * KIB).await;
    let stormy = on_disk(&vmem, 50, MIB).await;
    let hot: Vec<_> = support::put_all(&vmem, 40, 128 * KIB, HOST).await;
    for handle in &hot {
        vmem.promote(handle, HOST).await.unwrap();
    }
    let alone = demand_time(&vmem, &cold, &hot).await;
    let before = driver.stats().read_bytes;
    let storm: Vec<_> = stormy.iter().map(|handle| vmem.prefetch(handle, HOST)).collect();
    let under_storm = demand_time(&vmem, &cold, &hot).await;
    let share = alone.as_secs_f64() / under_storm.as_secs_f64();
    println!("{alone:?} alone, {under_storm:?} under 50 prefetches: {share:.3} of the throughput");
    assert!(share >= 0.8, "{alone:?} alone, {under_storm:?} under the storm");
    for handle in &hot {
        assert!(vmem.residency(handle).unwrap().host, "what is hot made way for a prefetch");
    }
    let demanded = 60 * 128 * KIB as u64;
    assert!(driver.stats().read_bytes > before + demanded, "some prefetching was done meanwhile");
    drop(storm);
}

/// Excluded: a slow disk that lets dirty bytes or queues grow without bound, or that slows what
/// does not need it. Noticed by the gauges while ten times host memory is written through.
#[tokio::test(start_paused = true)]
async fn scenario_20_a_slow_disk() {
    let space = 4 * MIB;
    let (vmem, driver) = open(space, 256 * MIB, disk_of(50));
    let hot = support::put_all(&vmem, 4, 64 * KIB, HOST).await;
    let mut written = Vec::new();
    for n in 0..10 * space / (64 * KIB) {
        let handle = vmem.put(bytes(100 + n as u64, 1, 64 * KIB), HOST).await.unwrap();
        written.push(handle);
        let began = Instant::now();
        for handle in &hot {
            if vmem.residency(handle).unwrap().host {
                vmem.read(handle).await.unwrap();
                assert_eq!(began.elapsed(), Duration::ZERO, "a hit waited for the disk");
            }
        }
        let stats = vmem.stats();
        assert!(stats.dirty_bytes <= space as u64 && stats.host.used_bytes <= space as u64);
        assert!(driver.stats().in_flight <= 64, "{:?}", driver.stats());
    }
    driver.set_speed(Speed::default());
    for (n, handle) in written.iter().enumerate() {
        let mut read = vec![0; 64 * KIB];
        vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
        assert!(read == bytes(100 + n as u64, 1, 64 * KIB), "object {n}");
    }
}

/// Excluded: free memory in pieces, none large enough. A long random life at 90 % fill, sizes from
/// 512 bytes to an eighth of host memory: every request that fits is served, and what
/// `largest_free_bytes` says is true.
#[test]
fn scenario_21_fragmentation() {
    Seed::simulate("scenario_21", async |seed| {
        let space = 16 * MIB;
        let mut rng = seed.rng();
        let (vmem, _driver) = open(space, 512 * MIB, Speed::default());
        let mut live: Vec<(u64, VMemHandle)> = Vec::new();
        let mut bytes_live = 0;
        for object in 0..4000_u64 {
            let len = 512 << rng.random_range(0..13);
            let len = rng.random_range(len / 2 + 1..=len);
            while bytes_live + len > space * 9 / 10 {
                let (_, gone) = live.swap_remove(rng.random_range(0..live.len()));
                bytes_live -= gone.len();
            }
            let handle = vmem.put(bytes(object, 1, len), HOST).await.unwrap();
            // It can always be promoted: everything else is evictable.
            vmem.promote(&handle, HOST).await.unwrap();
            assert!(vmem.residency(&handle).unwrap().host);
            bytes_live += len;
            live.push((object, handle));
            let free = vmem.stats().host.largest_free_bytes as usize;
            if object % 16 == 0 && free > 0 {
                let before = vmem.stats().evictions;
                let probe = vmem.allocate(free, HOST).await.unwrap();
                let there = vmem.residency(&probe).unwrap().host;
                assert!(
                    there || vmem.stats().evictions > before,
                    "{free} bytes were said to be free"
                );
            }
        }
        for (object, handle) in &live {
            let mut read = vec![0; handle.len()];
            vmem.read_into(handle, 0..read.len(), &mut read).await.unwrap();
            assert!(read == bytes(*object, 1, read.len()), "object {object}");
        }
    });
}

/// Excluded: gauges that drift from what they count, and an order of eviction that rots. After
/// every step the ledger is the sum over the objects; the victim is the one that a list names.
#[test]
fn scenario_22_the_ledger_and_the_order() {
    Seed::simulate("scenario_22", async |seed| {
        let mut rng: SmallRng = seed.rng();
        let len = 32 * KIB;
        let fitting = 16;
        let (vmem, _driver) = open(fitting * len, 64 * MIB, Speed::default());
        // Least recently used first; only objects in host memory.
        let mut order: Vec<VMemHandle> = Vec::new();
        let mut pinned: Vec<(VMemHandle, vmem::PinGuard)> = Vec::new();
        for step in 0..600 {
            tokio::time::advance(Duration::from_millis(2)).await;
            let some = (!order.is_empty()).then(|| order[rng.random_range(0..order.len())].clone());
            match (rng.random_range(0..10), some) {
                (0..=2, Some(handle)) => {
                    vmem.read(&handle).await.unwrap();
                    order.retain(|other| *other != handle);
                    order.push(handle);
                }
                (3, Some(handle)) if pinned.iter().all(|(other, _)| *other != handle) => {
                    order.retain(|other| *other != handle);
                    vmem.free(handle).await.unwrap();
                }
                (4, Some(handle)) if pinned.len() < 4 => {
                    if pinned.iter().all(|(other, _)| *other != handle) {
                        // Asking for it is a use of it.
                        let guard = vmem.pin(&handle, HOST).await.unwrap();
                        order.retain(|other| *other != handle);
                        order.push(handle.clone());
                        pinned.push((handle, guard));
                    }
                }
                (5, _) if !pinned.is_empty() => {
                    drop(pinned.swap_remove(rng.random_range(0..pinned.len())));
                }
                (6, Some(handle)) => {
                    vmem.write(&handle, vec![step as u8; len]).await.unwrap();
                    order.retain(|other| *other != handle);
                    order.push(handle);
                }
                _ => {
                    let handle = vmem.put(vec![step as u8; len], HOST).await.unwrap();
                    assert!(vmem.residency(&handle).unwrap().host);
                    order.push(handle);
                }
            }
            // Let the evictor come to rest, then see what it took: exactly the front of the list.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let is_pinned = |handle: &VMemHandle| pinned.iter().any(|(other, _)| other == handle);
            let gone: Vec<_> =
                order.iter().filter(|h| !vmem.residency(h).unwrap().host).cloned().collect();
            let expected: Vec<_> =
                order.iter().filter(|h| !is_pinned(h)).take(gone.len()).cloned().collect();
            assert_eq!(gone, expected, "step {step}: not the least recently used");
            order.retain(|handle| !gone.contains(handle));

            let stats = vmem.stats();
            assert_eq!(stats.host.used_bytes, (order.len() * len) as u64, "step {step}");
            assert_eq!(stats.host.objects, order.len() as u64, "step {step}");
            assert_eq!(stats.pinned_bytes, (pinned.len() * len) as u64, "step {step}");
            let dirty = order.iter().filter(|h| vmem.residency(h).unwrap().dirty).count();
            assert_eq!(stats.dirty_bytes, (dirty * len) as u64, "step {step}");
        }
        assert!(vmem.stats().evictions > 50, "the test evicts");
    });
}

/// Excluded: writes that are dropped when a queue is full. A burst of ten times the request queue,
/// on a slow disk: each is readable afterwards, or returned an error.
#[tokio::test(start_paused = true)]
async fn scenario_23_a_write_burst() {
    let (vmem, _driver) = open(2 * MIB, 256 * MIB, disk_of(20));
    let writes: Vec<_> = (0..10_240_u64)
        .map(|n| {
            let vmem = vmem.clone();
            tokio::spawn(async move { (n, vmem.put(bytes(n, 1, 1024), HOST).await) })
        })
        .collect();
    let mut readable = 0;
    for write in writes {
        let (n, outcome) = write.await.unwrap();
        match outcome {
            Ok(handle) => {
                let mut read = vec![0; 1024];
                vmem.read_into(&handle, 0..1024, &mut read).await.unwrap();
                assert!(read == bytes(n, 1, 1024), "write {n}");
                readable += 1;
            }
            Err(VirtualMemoryError::TimedOut { .. } | VirtualMemoryError::TierFull { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    println!("{readable} of 10240 accepted and readable");
    assert!(readable > 0);
}

/// One read from disk for sixty-four tasks that ask at once, and one failure for all of them.
#[tokio::test(start_paused = true)]
async fn concurrent_cold_reads_share_one_fetch() {
    let (vmem, driver) = open(4 * MIB, 64 * MIB, disk_of(50));
    let handle = vmem.put(bytes(1, 1, MIB), DISK).await.unwrap();
    let ask = || {
        (0..64).map(|_| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            tokio::spawn(async move { vmem.read(&handle).await })
        })
    };
    let before = driver.stats().reads;
    let asked: Vec<_> = ask().collect();
    for reader in asked {
        assert!(reader.await.unwrap().unwrap() == bytes(1, 1, MIB));
    }
    assert_eq!(driver.stats().reads, before + 1);

    driver.damage(|image| {
        for at in (100..image.len()).step_by(4096) {
            let byte = image.read_vec(at, 1)[0];
            image.write(at, &[byte ^ 1]);
        }
    });
    vmem.demote(&handle, DISK).await.unwrap();
    let asked: Vec<_> = ask().collect();
    for reader in asked {
        let error = reader.await.unwrap().err().unwrap();
        assert!(matches!(error, VirtualMemoryError::Corrupt { chunk: 0, .. }), "{error:?}");
    }
    assert_eq!(driver.stats().reads, before + 2);
    // Once and for all: no further read asks the disk, until the object is written whole.
    assert!(vmem.read(&handle).await.is_err());
    assert_eq!(driver.stats().reads, before + 2);
    vmem.write(&handle, bytes(1, 2, MIB)).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, MIB));
}
