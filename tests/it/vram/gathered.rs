//! Objects that come to a device since gathers read them from elsewhere again and again.
//!
//! Excluded: a promotion before the n-th gather, or to another device; one that takes the space of
//! what is hotter, held or was just prefetched; one that is asked for again and again, or waits
//! where it finds no space. Noticed by residency and by the counters. The counts are given here as
//! a gather gives them; real gathers are in `tests/gpu/gathered.rs`.

mod bounds;

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::backend::DeviceAccess;
use vmem::{
    MemoryTier, MigrationCause, Promotion, VMemHandle, VirtualMemory, VirtualMemoryConfigBuilder,
};
use vmem_testkit::SimDevice;

use crate::support::{self, DISK, HOST, KIB, MIB, MemDriver, bytes, settle};

const VRAM: MemoryTier = MemoryTier::Vram;
const LEN: usize = 64 * KIB;
/// Nothing that is expected takes longer.
const HANGS: Duration = Duration::from_secs(30);

struct Store {
    vmem: VirtualMemory,
    driver: Arc<MemDriver>,
    devices: Vec<SimDevice>,
}

impl Store {
    /// A store with devices of these many bytes, where the second gather promotes.
    fn open(vram: &[usize]) -> Self {
        Store::open_with(vram, |builder| builder.promotion(Promotion::OnNthGather(2)))
    }

    fn open_with(
        vram: &[usize],
        set: impl FnOnce(VirtualMemoryConfigBuilder) -> VirtualMemoryConfigBuilder,
    ) -> Self {
        let devices: Vec<_> = vram.iter().map(|&bytes| SimDevice::new(bytes as u64)).collect();
        let backends = devices.iter().map(|device| Arc::new(device.clone()) as Arc<_>);
        let (vmem, driver) = support::open_below(backends, 8 * MIB, 64 * MIB, set);
        Store { vmem, driver, devices }
    }

    fn access(&self, device: usize) -> DeviceAccess {
        DeviceAccess::all(&self.vmem).nth(device).unwrap()
    }

    async fn put(&self, count: u64) -> Vec<VMemHandle> {
        let mut handles = Vec::new();
        for object in 0..count {
            handles.push(self.vmem.put(bytes(object, 1, LEN), HOST).await.unwrap());
        }
        handles
    }

    /// Counts a gather as one does that copies these bytes; what it asks for has ended.
    async fn gather_bytes(&self, device: usize, handle: &VMemHandle, bytes: usize) {
        let access = self.access(device);
        let mut count = access.count_gather().unwrap();
        count.add(handle, bytes);
        count.end();
        settle(&self.vmem, &self.driver).await;
    }

    /// A gather of all of an object.
    async fn gather(&self, handle: &VMemHandle) {
        self.gather_bytes(0, handle, LEN).await;
    }

    /// A gather of an object beside one caller that waits: its promotion does not stay in the line.
    async fn gather_beside_a_waiter(&self, handle: &VMemHandle) {
        let access = self.access(0);
        let mut count = access.count_gather().unwrap();
        count.add(handle, LEN);
        count.end();
        let begun = std::time::Instant::now();
        tokio::time::sleep(Duration::from_millis(50)).await;
        support::eventually("it went", || self.vmem.stats().waiters == 1).await;
        assert!(begun.elapsed() < HANGS / 3, "it waited for its deadline");
    }

    fn is_on(&self, handle: &VMemHandle) -> bool {
        self.vmem.residency(handle).unwrap().vram
    }

    async fn close(self, handles: Vec<VMemHandle>) {
        for (object, handle) in handles.iter().enumerate() {
            assert!(self.vmem.read(handle).await.unwrap() == bytes(object as u64, 1, LEN));
        }
        drop(handles);
        let empty = || self.devices.iter().all(|device| device.in_flight() == 0);
        support::eventually("the devices are idle", empty).await;
        self.vmem.close().await.unwrap();
    }
}

#[tokio::test]
async fn nth_gather_promotes_to_its_device() {
    for n in 1..4 {
        let set = |builder: VirtualMemoryConfigBuilder| {
            builder.gather_promotion(Promotion::OnNthGather(n)).promotion(Promotion::Never)
        };
        let store = Store::open_with(&[MIB, MIB], set);
        let handles = store.put(2).await;
        let mut moves = Box::pin(store.vmem.migrations());
        for _ in 1..n {
            store.gather_bytes(1, &handles[0], LEN).await;
            let residency = store.vmem.residency(&handles[0]).unwrap();
            assert_eq!(residency.current_tier(), Some(HOST), "before gather {n}");
        }
        store.gather_bytes(1, &handles[0], LEN).await;
        let residency = store.vmem.residency(&handles[0]).unwrap();
        assert!(residency.is_in(MemoryTier::of_device(1)) && !residency.vram, "gather {n}");
        let moved = moves.next().await.unwrap();
        assert_eq!((moved.cause, moved.to), (MigrationCause::Gather, MemoryTier::of_device(1)));
        // The count of the other device is its own.
        if n > 1 {
            store.gather(&handles[0]).await;
            assert!(!store.is_on(&handles[0]));
        }
        store.close(handles).await;
    }
}

#[tokio::test]
async fn pieces_count_by_their_bytes() {
    let store = Store::open(&[MIB]);
    let handles = store.put(1).await;
    for piece in 0..4 {
        store.gather_bytes(0, &handles[0], LEN / 4).await;
        assert!(!store.is_on(&handles[0]), "piece {piece}");
    }
    store.gather_bytes(0, &handles[0], 1).await;
    assert!(store.is_on(&handles[0]), "as much as the object has was copied before");
    store.close(handles).await;
}

#[tokio::test]
async fn gathers_promote_nothing_unless_told_to() {
    let store = Store::open_with(&[MIB], |builder| builder);
    assert!(store.access(0).count_gather().is_none());
    store.close(Vec::new()).await;
}

#[tokio::test]
async fn object_comes_up_from_disk_and_again_once_it_has_left() {
    let store = Store::open(&[MIB]);
    let handles = store.put(1).await;
    store.vmem.demote(&handles[0], DISK).await.unwrap();
    for _round in 0..2 {
        store.gather(&handles[0]).await;
        assert!(!store.is_on(&handles[0]), "it is counted anew");
        store.gather(&handles[0]).await;
        let residency = store.vmem.residency(&handles[0]).unwrap();
        assert!(residency.vram && !residency.host, "through staging");
        store.vmem.demote(&handles[0], DISK).await.unwrap();
    }
    store.close(handles).await;
}

/// A cold object makes way; one that was used since the first gather does not, and so a set that is
/// larger than the device does not chase itself through it.
#[tokio::test]
async fn hotter_objects_stay_on_the_device() {
    let store = Store::open(&[2 * LEN]);
    let handles = store.put(4).await;
    for resident in &handles[..2] {
        store.vmem.promote(resident, VRAM).await.unwrap();
    }
    store.gather(&handles[2]).await;
    for resident in &handles[..2] {
        store.vmem.promote(resident, VRAM).await.unwrap();
    }
    let evictions = store.vmem.stats().evictions;
    store.gather(&handles[2]).await;
    assert!(!store.is_on(&handles[2]) && store.is_on(&handles[0]) && store.is_on(&handles[1]));
    assert_eq!(store.vmem.stats().evictions, evictions, "both were used since");

    // From the beginning: by the second gather only one of the two was used since the first.
    store.gather(&handles[2]).await;
    store.vmem.promote(&handles[1], VRAM).await.unwrap();
    store.gather(&handles[2]).await;
    assert!(store.is_on(&handles[2]) && store.is_on(&handles[1]) && !store.is_on(&handles[0]));

    let evictions = store.vmem.stats().evictions;
    for _round in 0..10 {
        for handle in &handles {
            match store.is_on(handle) {
                true => store.vmem.promote(handle, VRAM).await.unwrap(),
                false => store.gather(handle).await,
            }
        }
    }
    assert_eq!(store.vmem.stats().evictions, evictions, "in turn all are as hot");
    store.close(handles).await;
}

#[tokio::test]
async fn held_and_prefetched_objects_stay_on_the_device() {
    let set = |builder: VirtualMemoryConfigBuilder| {
        builder.gather_promotion(Promotion::OnNthGather(1)).max_pinned(1.0)
    };
    let store = Store::open_with(&[3 * LEN], set);
    let handles = store.put(4).await;
    let pin = store.vmem.pin(&handles[0], VRAM).await.unwrap();
    let lease = store.access(0).hold(&handles[1]).await.unwrap();
    store.vmem.prefetch(&handles[2], VRAM).await.unwrap();
    tokio::time::timeout(HANGS, store.gather(&handles[3])).await.expect("it waits");
    assert!(!store.is_on(&handles[3]) && handles[..3].iter().all(|handle| store.is_on(handle)));
    let stats = store.vmem.stats();
    assert_eq!((stats.evictions, stats.waiters, stats.errors), (0, 0, 0));
    // Once it was used it is as any other.
    store.vmem.promote(&handles[2], VRAM).await.unwrap();
    store.gather(&handles[3]).await;
    assert!(store.is_on(&handles[3]) && !store.is_on(&handles[2]));
    drop((pin, lease));
    store.close(handles).await;
}

#[tokio::test]
async fn object_is_asked_for_once_while_it_is_copied() {
    let store = Store::open(&[MIB]);
    let handles = store.put(1).await;
    store.gather(&handles[0]).await;
    store.devices[0].hold();
    let access = store.access(0);
    for _ in 0..5 {
        let mut count = access.count_gather().unwrap();
        count.add(&handles[0], LEN);
        count.add(&handles[0], LEN);
        count.end();
    }
    support::eventually("the copy", || store.devices[0].in_flight() > 0).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(store.devices[0].in_flight(), 1);
    store.devices[0].release_all();
    settle(&store.vmem, &store.driver).await;
    assert_eq!(store.vmem.stats().promotions, 1);
    store.close(handles).await;
}

/// A promotion that a caller waits for has the space as soon as there is some, and a prefetch comes
/// before a gathered object too: that one does not wait for any.
#[tokio::test]
async fn gathered_object_stands_in_no_queue() {
    let store = Store::open_with(&[LEN], |builder| {
        builder.gather_promotion(Promotion::OnNthGather(1)).max_pinned(1.0)
    });
    let handles = store.put(3).await;
    let lease = store.access(0).hold(&handles[0]).await.unwrap();
    let mut demand = Box::pin(store.vmem.promote(&handles[1], VRAM));
    assert!((&mut demand).now_or_never().is_none());
    support::eventually("it waits", || store.vmem.stats().waiters == 1).await;
    store.gather_beside_a_waiter(&handles[2]).await;
    drop(lease);
    demand.await.unwrap();
    settle(&store.vmem, &store.driver).await;
    assert!(store.is_on(&handles[1]) && !store.is_on(&handles[2]));
    store.close(handles).await;
}

/// A gather that is dropped half way has counted, and asks for nothing.
#[tokio::test]
async fn dropped_gather_asks_for_nothing() {
    let store = Store::open(&[MIB]);
    let handles = store.put(1).await;
    let access = store.access(0);
    for _ in 0..3 {
        let mut count = access.count_gather().unwrap();
        count.add(&handles[0], LEN);
        drop(count);
    }
    settle(&store.vmem, &store.driver).await;
    assert!(!store.is_on(&handles[0]));
    store.gather(&handles[0]).await;
    assert!(store.is_on(&handles[0]));
    store.close(handles).await;
}

/// A failed copy, or a freed object, leaves nothing behind, and the object may come later.
#[tokio::test]
async fn failed_promotion_is_counted_anew() {
    let store = Store::open(&[MIB]);
    let mut handles = store.put(2).await;
    store.devices[0].fail_next(1);
    store.gather(&handles[0]).await;
    store.gather(&handles[0]).await;
    assert!(!store.is_on(&handles[0]));
    assert_eq!(store.vmem.tier_stats(VRAM).used_bytes, 0);
    store.gather(&handles[0]).await;
    assert!(!store.is_on(&handles[0]));
    store.gather(&handles[0]).await;
    assert!(store.is_on(&handles[0]));

    store.gather(&handles[1]).await;
    store.devices[0].hold();
    let access = store.access(0);
    let mut count = access.count_gather().unwrap();
    count.add(&handles[1], LEN);
    count.end();
    drop(handles.pop());
    store.devices[0].release_all();
    settle(&store.vmem, &store.driver).await;
    assert_eq!(store.vmem.tier_stats(VRAM).objects, 1);
    store.close(handles).await;
}

/// Whatever else moves or changes the objects meanwhile.
#[tokio::test]
async fn random_gathers_beside_other_calls_lose_nothing() {
    let seed = support::seed();
    let mut random = SmallRng::seed_from_u64(seed);
    let store = Store::open(&[8 * LEN, 8 * LEN]);
    let vmem = &store.vmem;
    let mut handles = store.put(24).await;
    let mut versions = vec![1; handles.len()];
    for step in 0..4000 {
        let n = random.random_range(0..handles.len());
        let handle = &handles[n];
        let device = random.random_range(0..2_u8);
        let what = format!("seed {seed}, step {step}, object {n}");
        match random.random_range(0..16) {
            0 => {
                versions[n] += 1;
                let written = bytes(n as u64, versions[n], LEN);
                vmem.write(handle, written).await.expect(&what);
            }
            1 => vmem.promote(handle, MemoryTier::of_device(device)).await.expect(&what),
            2 => vmem.prefetch(handle, MemoryTier::of_device(device)).detach(),
            3 => vmem.demote(handle, [HOST, DISK][usize::from(device)]).await.expect(&what),
            4 => {
                let read = vmem.read(handle).await.expect(&what);
                assert!(read == bytes(n as u64, versions[n], LEN), "{what}");
            }
            5 => {
                versions[n] = 1;
                handles[n] = vmem.put(bytes(n as u64, 1, LEN), HOST).await.expect(&what);
            }
            _ => {
                let access = store.access(device.into());
                let mut count = access.count_gather().unwrap();
                count.add(handle, random.random_range(1..=LEN));
                count.end();
            }
        }
        for tier in [VRAM, MemoryTier::of_device(1), HOST] {
            let stats = vmem.tier_stats(tier);
            assert!(stats.used_bytes <= stats.capacity_bytes, "{what}: {tier} {stats:?}");
        }
    }
    settle(vmem, &store.driver).await;
    for (n, handle) in handles.iter().enumerate() {
        assert!(vmem.read(handle).await.unwrap() == bytes(n as u64, versions[n], LEN));
    }
    let moved = vmem.stats().migrations();
    let gathered = moved.iter().filter(|one| one.cause == MigrationCause::Gather);
    let gathered: u64 = gathered.map(|one| one.migrations).sum();
    assert!(gathered > 50, "{gathered} were promoted by gathers");
    handles.clear();
    store.close(handles).await;
}
