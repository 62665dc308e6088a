//! Several devices in one store: residency, leases, budgets and eviction of each, and the loss of
//! one.
//!
//! Excluded: a copy on one device that serves another, a stale copy on either after a change, bytes
//! beyond a budget, and a device that is lost together with another. Over simulated devices;
//! over two emulated GPUs in `tests/gpu/devices.rs`.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::backend::DeviceAccess;
use vmem::{GpuSelection, MemoryTier, PolicyKind, VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, bytes};

const FIRST: MemoryTier = MemoryTier::Vram;

fn second() -> MemoryTier {
    MemoryTier::of_device(1)
}

/// A store with two devices of this many bytes each.
fn open(host: usize, vram: usize) -> (VirtualMemory, [SimDevice; 2]) {
    let devices = [SimDevice::new(vram as u64), SimDevice::new(vram as u64)];
    let backends = devices.iter().map(|device| Arc::new(device.clone()) as Arc<_>);
    let wait = Duration::from_secs(20);
    let (vmem, _) = support::open_below(backends, host, 64 * MIB, |b| b.wait_timeout(wait));
    (vmem, devices)
}

#[tokio::test]
async fn copies_on_both_devices_are_of_one_version() {
    let (vmem, _devices) = open(4 * MIB, MIB);
    assert_eq!(vmem.capabilities().devices.len(), 2);
    let handle = vmem.put(bytes(1, 1, 100 * KIB), HOST).await.unwrap();
    vmem.promote(&handle, second()).await.unwrap();
    let residency = vmem.residency(&handle).unwrap();
    assert!(!residency.vram && residency.is_in(second()) && residency.is_in(HOST));
    assert_eq!(residency.current_tier(), Some(second()));
    // A copy on a sibling is none here.
    vmem.promote(&handle, FIRST).await.unwrap();
    assert!(vmem.residency(&handle).unwrap().vram);
    assert_eq!(vmem.tier_stats(FIRST).objects, 1);
    assert_eq!(vmem.tier_stats(second()).objects, 1);

    vmem.write(&handle, bytes(1, 2, 100 * KIB)).await.unwrap();
    let residency = vmem.residency(&handle).unwrap();
    assert!(!residency.vram && !residency.is_in(second()), "both are outdated");
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 2, 100 * KIB));

    vmem.promote(&handle, second()).await.unwrap();
    vmem.demote(&handle, DISK).await.unwrap();
    assert_eq!(vmem.residency(&handle).unwrap().current_tier(), Some(DISK));
    assert_eq!(vmem.tier_stats(second()).used_bytes, 0);
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn pins_and_homes_are_of_one_device() {
    let (vmem, _devices) = open(4 * MIB, MIB);
    let lives = vmem.put(bytes(1, 1, 64 * KIB), second()).await.unwrap();
    vmem.flush(&lives).await.unwrap();
    assert!(vmem.residency(&lives).unwrap().is_in(second()));
    assert_eq!(lives.home_tier().to_string(), "vram:1");
    let pin = vmem.pin(&lives, FIRST).await.unwrap();
    let refused = vmem.demote(&lives, HOST).await.unwrap_err();
    assert!(
        matches!(refused, VirtualMemoryError::Pinned { tier: FIRST, pins: 1, .. }),
        "{refused:?}"
    );
    // A write comes again to where it lives and to where it is pinned.
    vmem.write(&lives, bytes(1, 2, 64 * KIB)).await.unwrap();
    let both = || {
        let residency = vmem.residency(&lives).unwrap();
        residency.vram && residency.is_in(second())
    };
    while !both() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(pin);
    vmem.demote(&lives, HOST).await.unwrap();
    assert_eq!(vmem.residency(&lives).unwrap().current_tier(), Some(HOST));
    let none = vmem.promote(&lives, MemoryTier::of_device(2)).await.unwrap_err();
    assert!(matches!(none, VirtualMemoryError::TierNotAvailable { .. }), "{none:?}");
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn the_loss_of_one_device_leaves_the_other() {
    let (vmem, devices) = open(4 * MIB, MIB);
    let mut handles = Vec::new();
    for n in 0..8_u64 {
        let handle = vmem.put(bytes(n, 1, 64 * KIB), HOST).await.unwrap();
        vmem.promote(&handle, FIRST).await.unwrap();
        vmem.promote(&handle, second()).await.unwrap();
        handles.push(handle);
    }
    devices[0].lose();
    let lost = vmem.promote(&handles[0], FIRST).await.unwrap_err();
    assert!(matches!(lost, VirtualMemoryError::TierNotAvailable { tier: FIRST, .. }), "{lost:?}");
    for (n, handle) in handles.iter().enumerate() {
        let residency = vmem.residency(handle).unwrap();
        assert!(!residency.vram && residency.is_in(second()));
        vmem.demote(handle, DISK).await.unwrap();
        vmem.promote(handle, second()).await.unwrap();
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64, 1, 64 * KIB));
    }
    let survivor = DeviceAccess::all(&vmem).nth(1).unwrap();
    let hold = survivor.hold(&handles[3]).await.unwrap();
    assert!(hold.range().is_some());
    drop(hold);
    vmem.close().await.unwrap();
}

/// What each object holds, as the calls that were answered say.
struct Model {
    handles: Vec<VMemHandle>,
    lens: Vec<usize>,
    versions: Vec<u64>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_moves_between_two_devices_lose_nothing() {
    let seed = support::seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let (vmem, _devices) = open(2 * MIB, MIB);
    let mut model = Model { handles: Vec::new(), lens: Vec::new(), versions: Vec::new() };
    let homes = [FIRST, second(), HOST, DISK];
    for n in 0..64 {
        let len = random.random_range(1..96 * KIB);
        let home = homes[random.random_range(0..4)];
        model.handles.push(vmem.put(bytes(n as u64, 0, len), home).await.unwrap());
        model.lens.push(len);
        model.versions.push(0);
    }
    let mut pins = Vec::new();
    for step in 0..4000 {
        let n = random.random_range(0..model.handles.len());
        let handle = &model.handles[n];
        let len = model.lens[n];
        let what = format!("seed {seed}, step {step}, object {n} of {len} bytes");
        match random.random_range(0..10) {
            0 => vmem.promote(handle, FIRST).await.expect(&what),
            1 => vmem.promote(handle, second()).await.expect(&what),
            2 => {
                // A pinned one stays.
                let _ = vmem.demote(handle, homes[random.random_range(2..4)]).await;
            }
            3 | 4 => {
                model.versions[n] += 1;
                vmem.write(handle, bytes(n as u64, model.versions[n], len)).await.expect(&what);
            }
            5 => vmem.prefetch(handle, homes[random.random_range(0..2)]).detach(),
            6 if pins.len() < 4 => {
                let tier = homes[random.random_range(0..2)];
                pins.push(vmem.pin(handle, tier).await.expect(&what));
            }
            7 => pins.truncate(random.random_range(0..=pins.len())),
            _ => {
                let read = vmem.read(handle).await.expect(&what);
                assert!(read == bytes(n as u64, model.versions[n], len), "{what}");
            }
        }
        for tier in [FIRST, second(), HOST] {
            let stats = vmem.tier_stats(tier);
            assert!(stats.used_bytes <= stats.capacity_bytes, "{what}: {tier} {stats:?}");
        }
    }
    drop(pins);
    for (n, handle) in model.handles.iter().enumerate() {
        assert!(
            vmem.read(handle).await.unwrap() == bytes(n as u64, model.versions[n], model.lens[n])
        );
    }
    assert!(vmem.stats().evictions > 100, "they fell from full tiers: {:?}", vmem.stats());
    model.handles.clear();
    let is_empty =
        || [FIRST, second(), HOST].iter().all(|&tier| vmem.tier_stats(tier).used_bytes == 0);
    while !is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn scratch_counts_as_leased_and_is_waited_for() {
    let (vmem, _devices) = open(4 * MIB, MIB);
    let access = DeviceAccess::all(&vmem).next().unwrap();
    let handle = vmem.put(bytes(1, 1, 600 * KIB), HOST).await.unwrap();
    vmem.promote(&handle, FIRST).await.unwrap();
    // The object leaves for it; three quarters of the memory may be held.
    let scratch = access.take_scratch(700 * KIB).await.unwrap();
    assert!(!vmem.residency(&handle).unwrap().vram);
    assert_eq!(vmem.tier_stats(FIRST).used_bytes, 700 << 10);
    let dropped = tokio::time::timeout(Duration::from_millis(50), access.take_scratch(500 * KIB));
    assert!(dropped.await.is_err(), "the first has it");
    let asked = tokio::spawn(async move { access.take_scratch(500 * KIB).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!asked.is_finished());
    drop(scratch);
    let second = asked.await.unwrap().unwrap();
    assert_eq!(second.range().map(|range| range.len()), Some(500 * KIB));
    vmem.promote(&handle, FIRST).now_or_never();
    drop(second);
    vmem.promote(&handle, FIRST).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, 600 * KIB));
    drop(handle);
    support::eventually("all is free", || vmem.tier_stats(FIRST).used_bytes == 0).await;
    vmem.close().await.unwrap();
}

/// Layers in turn, a third more than the device holds.
#[tokio::test]
async fn policy_of_device_memory_is_its_own() {
    for (policy, finds) in [(PolicyKind::Lru, false), (PolicyKind::S3Fifo, true)] {
        let device = SimDevice::new(MIB as u64);
        let (vmem, _) = support::open_below([Arc::new(device) as Arc<_>], 8 * MIB, MIB, |config| {
            config.policy(PolicyKind::Sieve).vram_policy(policy)
        });
        let mut layers = Vec::new();
        for layer in 1..=16 {
            layers.push(vmem.put(bytes(layer, 1, 88 * KIB), HOST).await.unwrap());
        }
        let mut found = 0;
        for _ in 0..10 {
            for layer in &layers {
                found += usize::from(vmem.residency(layer).unwrap().vram);
                vmem.promote(layer, FIRST).await.unwrap();
            }
        }
        assert_eq!(found > 0, finds, "{policy:?}: {found} of 160");
        vmem.close().await.unwrap();
    }
}

/// The same layers on two devices, of which only one finds any.
#[tokio::test]
async fn policies_of_two_devices_are_their_own() {
    let devices = [(); 2].map(|()| Arc::new(SimDevice::new(MIB as u64)) as Arc<_>);
    let (vmem, _) = support::open_below(devices, 8 * MIB, MIB, |config| {
        let config = config.gpus([0, 1].map(GpuSelection::Device));
        config.vram_policies([PolicyKind::S3Fifo, PolicyKind::Lru])
    });
    let mut layers = Vec::new();
    for layer in 1..=16 {
        layers.push(vmem.put(bytes(layer, 1, 88 * KIB), HOST).await.unwrap());
    }
    let mut found = [0; 2];
    for _ in 0..10 {
        for layer in &layers {
            for (number, found) in (0..).zip(&mut found) {
                let tier = MemoryTier::of_device(number);
                *found += usize::from(vmem.residency(layer).unwrap().is_in(tier));
                vmem.promote(layer, tier).await.unwrap();
            }
        }
    }
    assert!(found[0] > 0 && found[1] == 0, "{found:?} of 160");
    vmem.close().await.unwrap();
}
