//! Scenario 37: a set, or a large object, that cannot get space now, beside small requests that
//! can.
//!
//! Excluded: a set that holds what it has gathered while it waits for the rest, so that small
//! requests wait behind it. Noticed by small requests that are not done well before the wait
//! timeout, and by the bytes that are held while the set waits.

use std::time::{Duration, Instant};

use bytes::Bytes;
use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::CudaContext;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};

use crate::harness::{
    BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, eventually, run, succeeds, within,
};
use crate::stores::{
    DISK, HOST, KIB, MIB, Place, Sizes, Store, VRAM, check, cold, on_a_device, open,
};

const SIZES: Sizes = Sizes { space: 8 * MIB, disk: 96 * MIB };
const LARGE: usize = MIB;
const SMALL: usize = 32 * KIB;
const SMALLS: usize = 500;

/// The call that waits for space that readers hold.
#[derive(Clone, Copy, Debug)]
enum Waits {
    /// One set of this number of objects, a megabyte each.
    Set(usize),
    /// Two sets, one of which has some of its objects in host memory.
    TwoSets,
    /// A read of one object of six megabytes.
    LargeRead,
    /// A promotion of that object, to stay.
    LargePromotion,
    /// Such a pin.
    LargePin,
}

const ALL: [Waits; 6] = [
    Waits::Set(6),
    Waits::Set(7),
    Waits::TwoSets,
    Waits::LargeRead,
    Waits::LargePromotion,
    Waits::LargePin,
];

struct World {
    store: Store,
    large: Vec<VMemHandle>,
    huge: VMemHandle,
    small: Vec<VMemHandle>,
    /// Three megabytes that slow readers have.
    held: Vec<Bytes>,
}

impl World {
    async fn new(place: Place) -> Self {
        let store = open(place, SIZES, |builder| builder).await;
        let vmem = &store.vmem;
        let large = cold(vmem, 0, 20, LARGE).await;
        let huge = cold(vmem, 100, 1, 6 * MIB).await.remove(0);
        let small = cold(vmem, SMALLS, 48, SMALL).await;
        let mut held = Vec::new();
        for handle in &large[..3] {
            held.push(vmem.read(handle).await.unwrap());
        }
        World { store, large, huge, small, held }
    }

    /// Starts what waits, as tasks.
    fn wait(&self, what: Waits) -> tokio::task::JoinSet<Result<(), VirtualMemoryError>> {
        let mut tasks = tokio::task::JoinSet::new();
        let vmem = self.store.vmem.clone();
        let huge = self.huge.clone();
        let mut set = |vmem: VirtualMemory, set: Vec<VMemHandle>| {
            tasks.spawn(async move { vmem.read_many(&set).await.map(drop) });
        };
        match what {
            Waits::Set(count) => set(vmem, self.large[5..5 + count].to_vec()),
            Waits::TwoSets => {
                set(vmem.clone(), self.large[5..11].to_vec());
                set(vmem, [&self.large[..2], &self.large[12..17]].concat());
            }
            Waits::LargeRead => {
                tasks.spawn(async move { vmem.read(&huge).await.map(drop) });
            }
            Waits::LargePromotion => {
                tasks.spawn(async move { vmem.promote(&huge, HOST).await });
            }
            Waits::LargePin => {
                tasks.spawn(async move { vmem.pin(&huge, HOST).await.map(drop) });
            }
        }
        tasks
    }
}

/// Small requests of each kind; returns the most bytes that readers held meanwhile.
async fn small_ones(vmem: &VirtualMemory, small: &[VMemHandle]) -> Result<u64, String> {
    let mut held = 0;
    for (n, handles) in small.chunks(2).enumerate() {
        let what = format!("small request {n}");
        let first = &handles[0];
        let key = SMALLS + 2 * n;
        match n % 6 {
            0 => {
                let read = succeeds(&what, BOUND, vmem.read(first)).await?;
                check(key, &[1], 0, &read)?;
            }
            1 => {
                let read = succeeds(&what, BOUND, vmem.read_many(handles)).await?;
                check(key, &[1], 0, &read[0])?;
                check(key + 1, &[1], 0, &read[1])?;
            }
            2 => {
                let read = succeeds(&what, BOUND, vmem.read_at(first, 10..20_000)).await?;
                check(key, &[1], 10, &read)?;
            }
            3 => drop(succeeds(&what, BOUND, vmem.pin(first, HOST)).await?),
            4 => succeeds(&what, BOUND, vmem.promote(first, HOST)).await?,
            _ => {
                let part = vec![n as u8; 5_000];
                succeeds(&what, BOUND, vmem.write_with(first, |to| to[..5_000].fill(n as u8)))
                    .await?;
                let read = succeeds(&what, BOUND, vmem.read_at(first, 0..5_000)).await?;
                if read != part {
                    return Err(format!("{what} reads something else than it wrote"));
                }
            }
        }
        held = held.max(vmem.stats().held_bytes);
    }
    Ok(held)
}

async fn beside(place: Place, what: Waits) -> Result<(), String> {
    let mut world = World::new(place).await;
    let vmem = world.store.vmem.clone();
    let mut waiting = world.wait(what);
    // It has asked, and has whatever it takes.
    eventually("a waiter", || vmem.stats().waiters > 0).await?;
    tokio::time::sleep(Duration::from_millis(30)).await;
    let most = small_ones(&vmem, &world.small).await?;
    // What is held is what slow readers have, and a small request.
    let theirs = world.held.len() as u64 * LARGE as u64 + 4 * SMALL as u64;
    if most > theirs {
        return Err(format!("{most} bytes are held while it waits, {theirs} of them by readers"));
    }
    world.held.clear();
    while let Some(ended) = within("what waited", BOUND, waiting.join_next()).await? {
        ended.unwrap().map_err(|error| format!("what waited: {error}"))?;
    }
    succeeds("close", CLOSE_BOUND, vmem.close()).await
}

fn each(place: Place, threads: &[Threads]) {
    let mut complaints = Vec::new();
    for what in ALL {
        for &threads in threads {
            let found = run(threads, move || beside(place, what)).err();
            complaints.extend(found.map(|why| format!("{what:?}, {place:?}, {threads:?}: {why}")));
        }
    }
    assert_none(&complaints);
}

#[test]
fn small_requests_pass_what_waits_for_much_space() {
    each(Place::Simulated, &THREADS);
}

#[test]
fn small_requests_pass_what_waits_for_much_space_over_a_real_disk() {
    each(Place::Real, &[Threads::Two]);
}

/// Small ones that never end do not keep the set waiting once there is space for it.
#[test]
fn set_gets_its_space_beside_small_requests_that_never_end() {
    let found = run(Threads::Two, || async {
        let mut world = World::new(Place::Simulated).await;
        let vmem = world.store.vmem.clone();
        let mut waiting = world.wait(Waits::Set(6));
        let small = world.small.clone();
        let stream = {
            let vmem = vmem.clone();
            tokio::spawn(async move {
                for n in (0..small.len()).cycle() {
                    let Ok(_read) = vmem.read(&small[n]).await else { return };
                    drop(vmem.demote(&small[n], DISK).await);
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        world.held.clear();
        let ended = within("the set", BOUND, waiting.join_next()).await?;
        ended.unwrap().unwrap().map_err(|error| format!("the set: {error}"))?;
        stream.abort();
        succeeds("close", CLOSE_BOUND, vmem.close()).await
    });
    assert_none(&Vec::from_iter(found.err()));
}

/// A set that is given up leaves nothing behind.
#[test]
fn set_that_is_dropped_while_it_waits_leaves_nothing() {
    let mut complaints = Vec::new();
    for threads in THREADS {
        let found = run(threads, || async {
            let mut world = World::new(Place::Simulated).await;
            let vmem = world.store.vmem.clone();
            for count in [6, 7, 6] {
                let waiting = world.wait(Waits::Set(count));
                eventually("a waiter", || vmem.stats().waiters > 0).await?;
                drop(waiting);
                let what = format!("a set of {count} was dropped");
                eventually(&what, || vmem.stats().waiters == 0).await?;
            }
            world.held.clear();
            eventually("nothing is held", || vmem.stats().held_bytes == 0).await?;
            let set = succeeds("a set", BOUND, vmem.read_many(&world.large[4..11])).await?;
            check(4, &[1], 0, &set[0])?;
            drop(set);
            succeeds("close", CLOSE_BOUND, vmem.close()).await
        });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}

/// The same in device memory: a set of leases that pins keep from its space.
#[test]
fn small_leases_pass_a_set_that_waits_for_device_memory() {
    let test = async |store: &Store| {
        let vmem = &store.vmem;
        let objects = cold(vmem, 0, 8, 600 * KIB).await;
        let small = cold(vmem, 100, 8, 20 * KIB).await;
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let pins = [vmem.pin(&objects[0], VRAM).await, vmem.pin(&objects[1], VRAM).await];
        let pins = pins.map(Result::unwrap);
        let request = objects[2..7].iter().fold(vmem.device_set(&stream), |set, o| set.read(o));
        let waiting = tokio::spawn(request.acquire());
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        for (n, handle) in small.iter().enumerate() {
            let what = format!("small lease {n}");
            match n % 3 {
                0 => drop(succeeds(&what, BOUND, vmem.device_on(handle, &stream)).await?),
                1 => succeeds(&what, BOUND, vmem.promote(handle, VRAM)).await?,
                _ => {
                    let set = vmem.device_set(&stream).read(handle).acquire();
                    drop(succeeds(&what, BOUND, set).await?);
                }
            }
        }
        if waiting.is_finished() && began.elapsed() < BOUND {
            return Err("the set did not wait".into());
        }
        drop(pins);
        let set = within("the set", BOUND, waiting).await?.unwrap();
        drop(set.map_err(|error| format!("the set: {error}"))?);
        Ok(())
    };
    let found = run(Threads::Two, move || on_a_device(4 << 20, SIZES, test));
    assert_none(&Vec::from_iter(found.err()));
}
