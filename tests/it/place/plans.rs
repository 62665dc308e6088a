//! What a plan of eviction takes, seen from outside: neighbours on a device, moves within host
//! memory, and what was prefetched.
//!
//! Excluded: an eviction in the order of the last use alone, which empties a tier until some free
//! piece is long enough by chance; a refusal, or a write to disk, where moving small objects
//! together would do; a prefetch that is evicted before its first use while other objects could go.
//! Noticed by the counters.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use vmem::backend::DeviceAccess;
use vmem::{
    MemoryTier, PolicyKind, PrefetchPlan, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder,
    VirtualMemoryError,
};
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, bytes};

const VRAM: MemoryTier = MemoryTier::Vram;
const SMALL: usize = 16 * KIB;
/// Nothing that is expected takes longer.
const HANGS: std::time::Duration = std::time::Duration::from_secs(30);

/// A store with plenty of host memory below this many bytes of device memory.
fn open(
    vram: usize,
    set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
) -> VirtualMemory {
    let device = Arc::new(SimDevice::new(vram as u64)) as Arc<_>;
    support::open_below([device], 32 * MIB, 64 * MIB, set).0
}

async fn full_of_small_objects(policy: PolicyKind) -> (VirtualMemory, Vec<VMemHandle>) {
    let vmem = open(8 * MIB, |builder| builder.policy(policy));
    let mut small = Vec::new();
    for n in 0..8 * MIB / SMALL {
        let handle = vmem.put(bytes(n as u64, 1, SMALL), HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        small.push(handle);
    }
    assert_eq!(vmem.stats().vram.used_bytes, 8 * MIB as u64, "it is full");
    // The order of the last use has nothing to do with where they lie.
    let mut order: Vec<_> = (0..small.len()).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(support::seed()));
    for n in order {
        vmem.promote(&small[n], VRAM).await.unwrap();
    }
    (vmem, small)
}

#[tokio::test]
async fn a_large_promotion_evicts_no_more_than_it_needs() {
    for policy in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        for need in [256 * KIB, MIB, 4 * MIB] {
            let (vmem, small) = full_of_small_objects(policy).await;
            let large = vmem.put(bytes(9, 1, need), HOST).await.unwrap();
            let before = vmem.stats().evictions;
            vmem.promote(&large, VRAM).await.unwrap();
            let evicted = (vmem.stats().evictions - before) as usize * SMALL;
            assert!(evicted <= need, "{policy}, {need} bytes: {evicted} evicted");
            assert!(vmem.read(&large).await.unwrap() == bytes(9, 1, need));
            drop((small, large));
            vmem.close().await.unwrap();
        }
    }
}

/// Half of the slots of small spans are free, and neither host nor disk has a free piece for a
/// larger object: those that stay move together.
#[tokio::test]
async fn small_objects_move_together_where_the_disk_is_full() {
    let (vmem, driver) = support::open(MIB, MIB, |builder| builder);
    let mut below = Vec::new();
    while let Ok(handle) = vmem.put(bytes(7, 1, SMALL), DISK).await {
        below.push(handle);
    }
    let mut small = Vec::new();
    while let Ok(handle) = vmem.put(bytes(small.len() as u64, 1, 1000), HOST).await {
        small.push(Some(handle));
    }
    small.iter_mut().step_by(2).for_each(|handle| *handle = None);
    let writes = driver.writes();
    let large = vmem.put(bytes(5, 1, 300 * KIB), HOST).await.unwrap();
    assert!(vmem.residency(&large).unwrap().host);
    assert!(vmem.stats().relocated_bytes > 0, "{:?}", vmem.stats());
    assert_eq!(driver.writes(), writes, "no I/O");
    assert!(vmem.read(&large).await.unwrap() == bytes(5, 1, 300 * KIB));
    for (n, handle) in small.iter().enumerate() {
        let Some(handle) = handle else { continue };
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64, 1, 1000), "object {n}");
    }
    vmem.close().await.unwrap();
}

/// Readers run over objects that move: each read has the bytes of its object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_whole_objects_while_these_move() {
    let (vmem, _driver) = support::open(MIB, MIB, |builder| builder);
    let mut below = Vec::new();
    while let Ok(handle) = vmem.put(bytes(7, 1, SMALL), DISK).await {
        below.push(handle);
    }
    let mut relocated = 0;
    for round in 0..20_u64 {
        let mut small = Vec::new();
        while let Ok(handle) = vmem.put(bytes(small.len() as u64, round, 1000), HOST).await {
            small.push(Some(handle));
        }
        small.iter_mut().step_by(2).for_each(|handle| *handle = None);
        let small = Arc::new(small);
        let reader = tokio::spawn({
            let vmem = vmem.clone();
            let small = small.clone();
            async move {
                for _ in 0..4 {
                    for (n, handle) in small.iter().enumerate() {
                        let Some(handle) = handle else { continue };
                        let read = vmem.read(handle).await.unwrap();
                        assert!(read == bytes(n as u64, round, 1000), "round {round}, object {n}");
                    }
                }
            }
        });
        // Held slots do not move, so now and then there is no space at the moment.
        let large = vmem.put(bytes(5, 1, 200 * KIB), HOST).await;
        reader.await.unwrap();
        relocated = vmem.stats().relocated_bytes;
        drop((large, small));
    }
    assert!(relocated > 0, "nothing moved");
    vmem.close().await.unwrap();
}

/// A cycle over three times what fits, prefetched a few early: each is there when it is used, under
/// every policy.
#[tokio::test]
async fn prefetched_object_is_resident_at_its_first_use() {
    for policy in [PolicyKind::Lru, PolicyKind::Sieve, PolicyKind::S3Fifo] {
        let vmem = open(2 * MIB, |builder| builder.policy(policy));
        let mut layers = Vec::new();
        for n in 0..96 {
            layers.push(vmem.put(bytes(n, 1, 64 * KIB), HOST).await.unwrap());
        }
        let mut present = 0;
        for step in 0..3 * layers.len() {
            vmem.prefetch(&layers[(step + 4) % layers.len()], VRAM).await.unwrap();
            let layer = &layers[step % layers.len()];
            present += usize::from(vmem.residency(layer).unwrap().vram);
            vmem.promote(layer, VRAM).await.unwrap();
        }
        // All but the first few, which were not asked for.
        assert!(present >= 3 * layers.len() - 8, "{policy}: {present} of {}", 3 * layers.len());
        drop(layers);
        vmem.close().await.unwrap();
    }
}

/// The same by a plan, which asks for what comes next by itself.
#[tokio::test]
async fn planned_objects_are_resident_when_their_turn_comes() {
    let vmem = open(2 * MIB, |builder| builder);
    let mut layers = Vec::new();
    for n in 0..96 {
        layers.push(vmem.put(bytes(n, 1, 64 * KIB), HOST).await.unwrap());
    }
    let plan = PrefetchPlan::cyclic(layers.clone(), 4 * 64 * KIB as u64);
    let planned = vmem.prefetch_plan(plan).unwrap();
    let device = DeviceAccess::all(&vmem).next().unwrap();
    for step in 0..2 * layers.len() {
        let layer = &layers[step % layers.len()];
        let comes = async {
            while !vmem.residency(layer).unwrap().vram {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        let came = tokio::time::timeout(HANGS, comes).await;
        assert!(came.is_ok(), "step {step}: nobody has asked for it");
        // Whichever way it is used, the plan moves on.
        match step % 3 {
            0 => drop(device.hold(layer).await.unwrap()),
            1 => vmem.promote(layer, VRAM).await.unwrap(),
            _ => planned.used(layer),
        }
    }
    drop(planned);
    drop(layers);
    // Its task has let go of them.
    let freed = async {
        while vmem.stats().host.objects > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(HANGS, freed).await.expect("the plan has ended");
    vmem.close().await.unwrap();
}

/// A plan that has all of its order early asks again for what has left since its turn.
#[tokio::test]
async fn planned_object_that_was_evicted_comes_again() {
    let vmem = open(2 * MIB, |builder| builder);
    let mut both = Vec::new();
    for n in 0..2 {
        both.push(vmem.put(bytes(n, 1, 64 * KIB), HOST).await.unwrap());
    }
    let planned = vmem.prefetch_plan(PrefetchPlan::cyclic(both.clone(), u64::MAX)).unwrap();
    let comes = async |handle: &VMemHandle| {
        let comes = async {
            while !vmem.residency(handle).unwrap().vram {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(HANGS, comes).await.expect("it comes");
    };
    for _ in 0..3 {
        comes(&both[0]).await;
        comes(&both[1]).await;
        vmem.demote(&both[0], HOST).await.unwrap();
        planned.used(&both[0]);
        comes(&both[0]).await;
        planned.used(&both[1]);
    }
    drop((planned, both));
    vmem.close().await.unwrap();
}

/// A plan for one device does not move for what is used on another.
#[tokio::test]
async fn plan_follows_its_own_device() {
    let devices = [0, 1].map(|_| Arc::new(SimDevice::new(MIB as u64)) as Arc<_>);
    let vmem = support::open_below(devices, 32 * MIB, 64 * MIB, |builder| builder).0;
    let mut layers = Vec::new();
    for n in 0..8 {
        layers.push(vmem.put(bytes(n, 1, 64 * KIB), HOST).await.unwrap());
    }
    let plan = PrefetchPlan::cyclic(layers.clone(), 0).to(MemoryTier::of_device(1));
    let planned = vmem.prefetch_plan(plan).unwrap();
    let devices: Vec<_> = DeviceAccess::all(&vmem).collect();
    let is_on_second = |layer: &VMemHandle| devices[1].share(layer).unwrap().is_some();
    let comes = async |layer: &VMemHandle| {
        let comes = async {
            while !is_on_second(layer) {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(HANGS, comes).await.expect("it is prefetched");
    };
    comes(&layers[0]).await;
    drop(devices[0].hold(&layers[4]).await.unwrap());
    drop(devices[1].hold(&layers[0]).await.unwrap());
    comes(&layers[1]).await;
    assert!(!is_on_second(&layers[5]), "the plan moved for the other device");
    drop((planned, layers));
    vmem.close().await.unwrap();
}

/// A plan of nothing, or to a tier that is not there, is refused, and one outlives its store.
#[tokio::test]
async fn plans_that_cannot_be_are_refused() {
    let vmem = open(MIB, |builder| builder);
    let handle = vmem.put(bytes(1, 1, 64 * KIB), HOST).await.unwrap();
    let refused = vmem.prefetch_plan(PrefetchPlan::cyclic([], 1)).unwrap_err();
    assert!(matches!(refused, VirtualMemoryError::InvalidConfig { .. }), "{refused:?}");
    let to_none = PrefetchPlan::cyclic([handle.clone()], 1).to(MemoryTier::Remote);
    let refused = vmem.prefetch_plan(to_none).unwrap_err();
    assert!(matches!(refused, VirtualMemoryError::TierNotAvailable { .. }), "{refused:?}");
    let planned = vmem.prefetch_plan(PrefetchPlan::cyclic([handle.clone()], 1)).unwrap();
    vmem.clone().close().await.unwrap();
    planned.used(&handle);
    let refused = vmem.prefetch_plan(PrefetchPlan::cyclic([handle], 1)).unwrap_err();
    assert!(matches!(refused, VirtualMemoryError::Closed), "{refused:?}");
}

/// A prefetch that finds the free space in pieces takes no neighbours that were used after it was
/// asked for.
#[tokio::test]
async fn a_prefetch_evicts_no_neighbours_that_are_in_use() {
    let timeout = std::time::Duration::from_millis(500);
    let vmem = open(MIB, |builder| builder.wait_timeout(timeout));
    let mut four = Vec::new();
    for n in 0..4 {
        let handle = vmem.put(bytes(n, 1, 256 * KIB), HOST).await.unwrap();
        vmem.promote(&handle, VRAM).await.unwrap();
        four.push(handle);
    }
    vmem.demote(&four[0], HOST).await.unwrap();
    vmem.demote(&four[2], HOST).await.unwrap();
    let late = vmem.put(bytes(9, 1, 512 * KIB), HOST).await.unwrap();
    let evictions = vmem.stats().evictions;
    let device = DeviceAccess::all(&vmem).next().unwrap();
    let prefetch = vmem.prefetch(&late, VRAM);
    // Before the prefetch has its first turn: this runtime has one thread, which is here.
    for handle in [&four[1], &four[3]] {
        assert!(device.share(handle).unwrap().is_some());
    }
    let refused = prefetch.await.unwrap_err();
    assert!(matches!(refused, vmem::VirtualMemoryError::TimedOut { .. }), "{refused:?}");
    assert_eq!(vmem.stats().evictions, evictions, "what is in use was evicted for a prefetch");
    for handle in [&four[1], &four[3]] {
        assert!(vmem.residency(handle).unwrap().vram);
    }
}

/// Old versions that readers keep lie in spans of objects whose current bytes lie elsewhere:
/// nothing moves, or leaves, for them.
#[tokio::test]
async fn old_versions_that_are_held_move_nothing() {
    let timeout = std::time::Duration::from_secs(2);
    let (vmem, _driver) = support::open(MIB, 64 * MIB, |b| b.max_pinned(1.0).wait_timeout(timeout));
    let mut kept = Vec::new();
    let mut held = Vec::new();
    let mut all = Vec::new();
    for n in 0..900_u64 {
        all.push(vmem.put(bytes(n, 1, 1024), HOST).await.unwrap());
    }
    for (n, handle) in all.into_iter().enumerate() {
        if n % 16 == 0 {
            held.push(vmem.read(&handle).await.unwrap());
            kept.push(handle);
        }
    }
    for (n, handle) in kept.iter().enumerate() {
        vmem.write(handle, bytes(n as u64, 2, 1024)).await.unwrap();
    }
    // The rest of the spans that old versions keep is no use for it.
    let large = vmem.put(vec![1; 600 * KIB], DISK).await.unwrap();
    let refused = vmem.pin(&large, HOST).await.unwrap_err();
    assert!(matches!(refused, vmem::VirtualMemoryError::AllPinned { .. }), "{refused:?}");
    let moved = vmem.stats().relocated_bytes;
    assert!(moved <= 256 * KIB as u64, "{moved} bytes moved, over and over");
    for (n, handle) in kept.iter().enumerate() {
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64, 2, 1024));
    }
    assert!(held.iter().enumerate().all(|(n, old)| *old == bytes(16 * n as u64, 1, 1024)));
}
