//! Names that no handle leads to leave memory, and are found again as they were.
//!
//! Invariant: the catalog has core keep no closed name in memory here, so that each handle which is
//! dropped is a race between leaving and whatever comes next. What the names stand for is known
//! from a model.

mod model;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use vmem::backend::{Backends, Catalog, DeviceBackend};
use vmem::{
    Capabilities,
    MemoryTier::{Disk, Host, Vram},
    VirtualMemory, VirtualMemoryConfig, VirtualMemoryError,
};
use vmem_testkit::{ClosedNames, SimDevice, driver_under_test};

/// A store in a real directory, which keeps this many closed names in memory.
async fn open(directory: &Path, closed_names_max: usize) -> VirtualMemory {
    open_below(None, directory, closed_names_max).await
}

/// The same, below a device.
async fn open_below(
    device: Option<SimDevice>,
    directory: &Path,
    closed_names_max: usize,
) -> VirtualMemory {
    let path = directory.to_owned();
    let driver = driver_under_test();
    let disk = tokio::task::spawn_blocking(move || {
        vmem_io::open_disk(Some(&path), Some(256 << 20), driver, 1 << 20).unwrap()
    });
    let disk = disk.await.unwrap();
    let catalog: Arc<dyn Catalog> = disk.catalog;
    let config = VirtualMemoryConfig::builder()
        .host_capacity(384 << 10)
        .staging_capacity(128 << 10)
        .wait_timeout(Duration::from_secs(60));
    let backends = Backends {
        remote: None,
        host_capacity_bytes: 384 << 10,
        disk: disk.backend,
        catalog: Some(Arc::new(ClosedNames(catalog, closed_names_max))),
        devices: device
            .into_iter()
            .map(|device| Arc::new(device) as Arc<dyn DeviceBackend>)
            .collect(),
        capabilities: Capabilities::new("a directory".into(), "not in this test".into()),
    };
    VirtualMemory::with_backends(&config.build().unwrap(), backends).unwrap()
}

/// All that is counted of names and objects in memory goes back when a hundred thousand were opened
/// and dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_names_opened_and_dropped_leave_memory() {
    const COUNT: usize = 100_000;
    const CLOSED: usize = 1000;
    const AT_ONCE: usize = 256;
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path(), CLOSED).await;
    let name = |n: usize| format!("a name of the usual length {n:07}");
    let put = |n: usize| {
        let vmem = &vmem;
        let name = name(n);
        async move { vmem.put_named(&name, n.to_le_bytes(), Disk).await.map(drop) }
    };
    stream::iter(0..COUNT).map(put).buffer_unordered(AT_ONCE).try_collect::<()>().await.unwrap();
    let bounded = |when: &str| {
        let stats = vmem.stats();
        assert!(stats.names_in_memory <= (CLOSED + AT_ONCE) as u64, "{when}: {stats:?}");
        assert!(stats.objects <= (CLOSED + AT_ONCE) as u64, "{when}: {stats:?}");
        assert!(stats.metadata_bytes <= 1200 * stats.objects, "{when}: {stats:?}");
        assert_eq!(stats.disk.used_bytes, (COUNT * 512) as u64, "{when}: nothing was freed");
    };
    bounded("put");
    let open = |n: usize| {
        let vmem = &vmem;
        let name = name(n);
        async move {
            let handle = vmem.open_named(&name).await?;
            assert_eq!(vmem.read(&handle).await?[..], n.to_le_bytes());
            Ok::<_, VirtualMemoryError>(())
        }
    };
    stream::iter(0..COUNT).map(open).buffer_unordered(AT_ONCE).try_collect::<()>().await.unwrap();
    bounded("opened");
    // All of them at once: what they take is what is open.
    let handles = stream::iter(0..COUNT).map(|n| {
        let vmem = &vmem;
        let name = name(n);
        async move { vmem.open_named(&name).await }
    });
    let handles: Vec<_> = handles.buffered(AT_ONCE).try_collect().await.unwrap();
    let all = vmem.stats();
    assert_eq!((all.names_in_memory, all.objects), (COUNT as u64, COUNT as u64));
    assert!(all.metadata_bytes > (COUNT * 200) as u64, "{all:?}");
    drop(handles);
    bounded("dropped");
    vmem.close().await.unwrap();
}

/// A name that is resident when its last handle goes leaves later, when it is evicted; one that is
/// not durable when it is flushed; and reads and pins of it go on until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resident_and_unflushed_names_leave_when_that_ends() {
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path(), 0).await;
    let handle = vmem.put_named("resident", [1; 1000], Host).await.unwrap();
    assert_eq!(vmem.stats().host.objects, 1);
    let held = vmem.read(&handle).await.unwrap();
    drop(handle);
    assert_eq!(vmem.stats().names_in_memory, 1, "it is in host memory");
    // Others evict it, once it is not held.
    drop(held);
    let fill: Vec<_> =
        stream::iter(0..400).then(|_| vmem.put([0; 1000], Host)).try_collect().await.unwrap();
    vmem_testkit::conformance::settle("the resident name leaves", async || {
        vmem.stats().names_in_memory == 0
    })
    .await;
    drop(fill);
    assert_eq!(
        vmem.read(&vmem.open_named("resident").await.unwrap()).await.unwrap()[..],
        [1; 1000]
    );

    let handle = vmem.allocate_named("unflushed", 1000, Disk).await.unwrap();
    vmem.write(&handle, [2; 1000]).await.unwrap();
    vmem.demote(&handle, Disk).await.unwrap();
    drop(handle);
    assert_eq!(vmem.stats().names_in_memory, 1, "the catalog does not have it");
    assert_eq!(
        vmem.read(&vmem.open_named("unflushed").await.unwrap()).await.unwrap()[..],
        [2; 1000]
    );
    vmem.flush_all().await.unwrap();
    assert_eq!(vmem.stats().names_in_memory, 0);

    // The caller of the flush and the last handle have gone before it ends.
    let handle = vmem.open_named("unflushed").await.unwrap();
    vmem.write(&handle, [3; 1000]).await.unwrap();
    vmem.demote(&handle, Disk).await.unwrap();
    let commits = vmem.stats().commits;
    assert!(vmem_testkit::poll_then_drop(vmem.flush(&handle), 1).await.is_none());
    drop(handle);
    vmem_testkit::conformance::settle(
        "a name that was flushed without a handle leaves",
        async || vmem.stats().names_in_memory == 0,
    )
    .await;
    assert_eq!(vmem.stats().commits, commits + 1);

    let handle = vmem.open_named("unflushed").await.unwrap();
    let pin = vmem.pin(&handle, Host).await.unwrap();
    drop(handle);
    assert_eq!(vmem.stats().names_in_memory, 1, "a pin has a handle");
    drop(pin);
    let handle = vmem.open_named("unflushed").await.unwrap();
    vmem.demote(&handle, Disk).await.unwrap();
    drop(handle);
    assert_eq!((vmem.stats().names_in_memory, vmem.stats().objects), (0, 0));
    assert_eq!(vmem.stats().metadata_bytes, 0);
    vmem.close().await.unwrap();
}

/// A handle by number is taken without the table of names: one that is given out leads to a living
/// object.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn handles_by_number_are_none_or_alive_while_names_leave() {
    const ROUNDS: usize = 60_000;
    let directory = tempfile::tempdir().unwrap();
    let vmem = open(directory.path(), 0).await;
    drop(vmem.put_named("a", [1; 100], Disk).await.unwrap());
    let (latest, ids) = tokio::sync::watch::channel(0);
    let vmem = &vmem;
    let revive = || {
        let vmem = vmem.clone();
        let ids = ids.clone();
        tokio::task::spawn_blocking(move || {
            let mut revived = 0;
            while ids.has_changed().is_ok() {
                let Some(handle) = vmem.handle(*ids.borrow()) else { continue };
                assert!(vmem.residency(&handle).is_ok(), "a handle of a dead object");
                revived += 1;
            }
            revived
        })
    };
    let tasks = [revive(), revive()];
    let mut objects = HashSet::new();
    let mut rounds = 0;
    // On a loaded machine it leaves memory less often.
    while rounds < ROUNDS || objects.len() <= 10 && rounds < 20 * ROUNDS {
        let handle = vmem.open_named("a").await.unwrap();
        objects.insert(handle.id());
        latest.send(handle.id()).unwrap();
        drop(handle);
        rounds += 1;
    }
    drop(latest);
    println!("{} objects in {rounds} rounds", objects.len());
    for task in tasks {
        println!("{} handles by number", task.await.unwrap());
    }
    // The last two that looked at it may have been in each other's way.
    drop(vmem.open_named("a").await.unwrap());
    assert_eq!(vmem.stats().names_in_memory, 0);
    assert!(objects.len() > 10, "it left memory {} times only", objects.len());
    vmem.clone().close().await.unwrap();
}

/// What is in device memory stays in memory; it leaves once it has left that, as any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_in_device_memory_leave_when_they_have_left_that() {
    let directory = tempfile::tempdir().unwrap();
    let device = SimDevice::new(1 << 20);
    let vmem = open_below(Some(device), directory.path(), 0).await;
    let handle = vmem.put_named("a", [5; 1000], Vram).await.unwrap();
    vmem.promote(&handle, Vram).await.unwrap();
    drop(handle);
    assert_eq!(vmem.stats().names_in_memory, 1);
    let handle = vmem.open_named("a").await.unwrap();
    vmem.demote(&handle, Disk).await.unwrap();
    drop(handle);
    assert_eq!((vmem.stats().names_in_memory, vmem.stats().vram.objects), (0, 0));
    let handle = vmem.open_named("a").await.unwrap();
    assert_eq!(handle.home_tier(), Vram);
    assert_eq!(vmem.read(&handle).await.unwrap()[..], [5; 1000]);
    drop(handle);
    vmem.close().await.unwrap();
}
