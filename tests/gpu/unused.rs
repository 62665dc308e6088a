//! Leases that write and that nobody has used, on the emulated driver.
//!
//! Invariant: the drop of such a lease changes nothing and copies nothing, by itself and in a set;
//! one whose bytes were asked for, or said to be written, is published.

use vmem::gpu::VramExt;
use vmem::{VirtualMemoryConfig, WriteBack};
use vmem_cuda_emulator::Emulator;

use crate::support::{HOST, LEN, VRAM, bytes, end, launch, open, plus, stream};

/// Mechanism: the drop of each lease that writes published, used or not. Effect: an unused one
/// copied its object down, and an unused one that overwrites published zeros. Fix: the drop of an
/// unused lease gives the change up.
#[tokio::test]
async fn unused_leases_leave_the_version_before() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let other = vmem.put(bytes(2), HOST).await.unwrap();
    let downs = emulator.counter("copies_down");
    drop(vmem.device_mut_on(&handle, &stream).await.unwrap());
    assert!(vmem.residency(&handle).unwrap().vram, "it is as it was");
    let set = vmem.device_set(&stream).write(&handle).write(&other);
    let mut set = set.acquire().await.unwrap();
    let taken = set.write.remove(0);
    drop(set);
    drop(taken);
    drop(vmem.device_overwrite_on(&handle, &stream).await.unwrap());
    assert!(vmem.read(&handle).await.unwrap() == bytes(1));
    assert!(vmem.read(&other).await.unwrap() == bytes(2));
    assert_eq!(emulator.counter("copies_down"), downs, "there is nothing to be copied");

    // Beside one that was used.
    let set = vmem.device_set(&stream).write(&handle).write(&other).acquire().await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { set.write[1].device_ptr() }, LEN as u64, 3, &stream);
    let before = emulator.counter("bytes_down");
    drop(set);
    assert!(vmem.read(&other).await.unwrap() == plus(&bytes(2), 3));
    assert!(vmem.read(&handle).await.unwrap() == bytes(1));
    assert_eq!(emulator.counter("bytes_down") - before, LEN as u64, "one of the two");
    end(vmem, vec![handle, other], &emulator).await;
}

/// What a device alone has stays there, or is written back before it is overwritten.
#[tokio::test]
async fn unused_leases_keep_what_a_device_alone_has() {
    let emulator = Emulator::load().unwrap();
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .write_back(WriteBack::OnEvict);
    let vmem = vmem::open(config.build().unwrap()).await.unwrap();
    let stream = stream();
    let clean = vmem.put(bytes(1), HOST).await.unwrap();
    drop(vmem.device_mut_on(&clean, &stream).await.unwrap());
    drop(vmem.device_set(&stream).write(&clean).acquire().await.unwrap());
    assert_eq!(vmem.stats().vram_dirty_bytes, 0, "nothing was written");

    let dirty = vmem.put(bytes(2), HOST).await.unwrap();
    let lease = vmem.device_mut_on(&dirty, &stream).await.unwrap();
    // SAFETY: used by the kernel below, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 5, &stream);
    lease.finish().await.unwrap();
    drop(vmem.device_mut_on(&dirty, &stream).await.unwrap());
    assert_eq!(vmem.stats().vram_dirty_bytes, LEN as u64, "it is where it was");
    drop(vmem.device_overwrite_on(&dirty, &stream).await.unwrap());
    assert!(vmem.read(&dirty).await.unwrap() == plus(&bytes(2), 5));
    end(vmem, vec![clean, dirty], &emulator).await;
}

#[tokio::test]
async fn leases_that_somebody_has_used_are_published() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    for way in 0..4 {
        let handle = vmem.put(bytes(way), HOST).await.unwrap();
        let mut lease = vmem.device_overwrite_on(&handle, &stream).await.unwrap();
        match way {
            0 => assert_eq!(lease.view().len(), LEN),
            1 => lease.scope(|_| ()),
            2 => lease.touched(0..10).unwrap(),
            _ => {
                lease.finish().await.unwrap();
                assert!(vmem.read(&handle).await.unwrap().iter().all(|&byte| byte == 0), "asked");
                continue;
            }
        }
        drop(lease);
        assert!(vmem.read(&handle).await.unwrap().iter().all(|&byte| byte == 0), "way {way}");
    }
    // What does not fit was not said.
    let handle = vmem.put(bytes(9), HOST).await.unwrap();
    vmem.promote(&handle, VRAM).await.unwrap();
    let mut lease = vmem.device_overwrite_on(&handle, &stream).await.unwrap();
    lease.touched(0..LEN + 1).unwrap_err();
    drop(lease);
    assert!(vmem.read(&handle).await.unwrap() == bytes(9));
    end(vmem, vec![handle], &emulator).await;
}
