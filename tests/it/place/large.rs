//! What is larger than host memory, and host memory that readers hold: both go on through disk.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vmem::{MemoryTier, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError};

const MIB: usize = 1 << 20;

async fn store(host: usize, disk: usize) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .io_driver(vmem_testkit::driver_under_test())
        .host_capacity(host as u64)
        .disk_capacity(disk as u64)
        .max_held(1.0)
        .build()
        .unwrap();
    vmem::open(config).await.unwrap()
}

fn fill(start: usize, buf: &mut [u8]) {
    for (at, byte) in (start..).zip(buf) {
        *byte = (at ^ (at >> 8) ^ (at >> 16)) as u8;
    }
}

fn expected(range: std::ops::Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; range.len()];
    fill(range.start, &mut bytes);
    bytes
}

/// Written in pieces and as a whole, range-read at random places, and freed, under a budget of a
/// sixteenth of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_under_64_mebibytes() {
    const LEN: usize = 1024 * MIB;
    let vmem = store(64 * MIB, LEN + 64 * MIB).await;
    let handle = vmem.allocate(LEN, MemoryTier::Host).await.unwrap();
    assert!(vmem.residency(&handle).unwrap().disk, "reserved where it fits");
    let mut piece = vec![0; 4 * MIB];
    for start in (0..LEN).step_by(piece.len()) {
        fill(start, &mut piece);
        vmem.write_at(&handle, start, &piece).await.unwrap();
    }
    let mut rng = SmallRng::seed_from_u64(1);
    let mut into = vec![0; 3 * MIB];
    for _ in 0..40 {
        let len = rng.random_range(1..into.len());
        let start = rng.random_range(0..LEN - len);
        let range = start..start + len;
        vmem.read_into(&handle, range.clone(), &mut into[..len]).await.unwrap();
        assert!(into[..len] == expected(range.clone()), "{range:?}");
        assert!(vmem.read_at(&handle, range.clone()).await.unwrap() == expected(range.clone()));
    }
    for refused in
        [vmem.read(&handle).await.err(), vmem.promote(&handle, MemoryTier::Host).await.err()]
    {
        assert!(matches!(refused, Some(VirtualMemoryError::ExceedsCapacity { .. })), "{refused:?}");
    }
    let stats = vmem.stats();
    assert!(stats.host.peak_bytes <= stats.host.capacity_bytes);
    vmem.free(handle).await.unwrap();
    assert_eq!(vmem.stats().disk.used_bytes, 0);
    vmem.close().await.unwrap();
}

/// A whole write of an object larger than host memory replaces it, at once for readers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_write_larger_than_host() {
    let vmem = store(8 * MIB, 64 * MIB).await;
    let handle = vmem.put(expected(0..20 * MIB), MemoryTier::Host).await.unwrap();
    let second = vec![0x5A; 20 * MIB];
    vmem.write(&handle, &second).await.unwrap();
    let mut read = vec![0; 20 * MIB];
    vmem.read_into(&handle, 0..20 * MIB, &mut read).await.unwrap();
    assert!(read == second);
    vmem.close().await.unwrap();
}

/// Readers hold the whole of object space: writes, allocations and `read_into` go on through
/// staging and disk, without waiting for the readers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_on_while_readers_hold_host() {
    let vmem = store(16 * MIB, 256 * MIB).await;
    let mut held = Vec::new();
    loop {
        let handle = vmem.put(vec![held.len() as u8; MIB], MemoryTier::Host).await.unwrap();
        if !vmem.residency(&handle).unwrap().host {
            break;
        }
        let bytes = vmem.read(&handle).await.unwrap();
        held.push((handle, bytes));
    }
    assert!(vmem.stats().held_bytes >= 12 * MIB as u64, "{:?}", vmem.stats());
    let mut on_disk = Vec::new();
    for n in 0..20_u8 {
        let handle = vmem.put(vec![n; 300_000], MemoryTier::Host).await.unwrap();
        let mut read = vec![0; 300_000];
        vmem.read_into(&handle, 0..300_000, &mut read).await.unwrap();
        assert!(read.iter().all(|&byte| byte == n));
        on_disk.push(handle);
    }
    // Objects that are held are written too: the readers keep what they have.
    for (n, (handle, bytes)) in held.iter().enumerate() {
        vmem.write(handle, vec![0xFF; MIB]).await.unwrap();
        assert!(bytes.iter().all(|&byte| byte == n as u8), "a snapshot changed");
    }
    let stats = vmem.stats();
    assert!(stats.host.used_bytes <= stats.host.capacity_bytes);
    let handles: Vec<_> = held.into_iter().map(|(handle, _)| handle).collect();
    for handle in &handles {
        assert!(vmem.read(handle).await.unwrap().iter().all(|&byte| byte == 0xFF));
    }
    drop((handles, on_disk));
    let stats = vmem.stats();
    assert_eq!((stats.held_bytes, stats.host.used_bytes), (0, 0), "{stats:?}");
    vmem.close().await.unwrap();
}
