//! Faults that a review found in the VRAM tier, and that do not come back: each on the emulated
//! driver.
//!
//! Invariant: a kernel of one user, however slow, keeps no other user waiting, and no thread but
//! the store's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmem::gpu::cudarc::driver::{CudaStream, DevicePtr, result, sys};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem::{VirtualMemory, VirtualMemoryConfig};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HOST, LEN, VRAM, launch, stream};

/// How long a kernel of another user stands still.
const STANDS: Duration = Duration::from_secs(2);

async fn open() -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .wait_timeout(Duration::from_secs(30));
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// Adds to bytes, by a kernel.
fn add(at: u64, len: usize, value: u64, stream: &CudaStream) {
    launch("vmem_add", at, len as u64, value, stream);
}

/// Waits, and lets all kernels go on then.
fn release_later(emulator: &Arc<Emulator>) -> std::thread::JoinHandle<()> {
    let emulator = emulator.clone();
    std::thread::spawn(move || {
        std::thread::sleep(STANDS);
        emulator.release_all();
    })
}

/// The waiters for a kernel do not keep its end from being taken up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_behind_those_who_wait_for_it() {
    let _emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let stream = stream();
    let handle = vmem.put(vec![1; LEN], HOST).await.unwrap();
    let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    let promotes: Vec<_> = (0..1200)
        .map(|_| {
            let vmem = vmem.clone();
            let handle = handle.clone();
            tokio::spawn(async move { vmem.promote(&handle, VRAM).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    lease.finish().await.unwrap();
    for promote in promotes {
        promote.await.unwrap().unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    drop(handle);
    vmem.close().await.unwrap();
}

/// A gather waits for what its caller queued, and not for the kernel of another user; and while it
/// waits it can be dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gathers_behind_the_kernel_of_somebody_else() {
    let emulator = Arc::new(Emulator::load().unwrap());
    let vmem = open().await;
    let one = stream();
    let two = stream();
    let handle = vmem.put(vec![1; LEN], HOST).await.unwrap();
    let mut mine = one.alloc_zeros::<u8>(LEN).unwrap();
    let mut theirs = two.alloc_zeros::<u8>(LEN).unwrap();
    let scratch = one.alloc_zeros::<u8>(LEN).unwrap();
    one.synchronize().unwrap();
    two.synchronize().unwrap();
    emulator.hold(Kind::Kernel);
    let at = scratch.device_ptr(&one).0;
    add(at, LEN, 1, &one);
    let later = release_later(&emulator);
    let begun = Instant::now();
    {
        let target = DeviceTarget::from_slice(&mut mine);
        let pieces = [(&handle, 0..LEN, 0)];
        let waits = vmem.gather(&pieces, &target);
        let dropped = tokio::time::timeout(Duration::from_millis(100), waits).await;
        assert!(dropped.is_err(), "it is behind a kernel of its caller");
    }
    vmem.gather(&[(&handle, 0..LEN, 0)], &DeviceTarget::from_slice(&mut theirs)).await.unwrap();
    assert!(begun.elapsed() < STANDS, "{:?}", begun.elapsed());
    vmem.gather(&[(&handle, 0..LEN, 0)], &DeviceTarget::from_slice(&mut mine)).await.unwrap();
    assert!(begun.elapsed() >= STANDS, "not before what the caller queued");
    later.join().unwrap();
    assert!(two.clone_dtoh(&theirs).unwrap() == [1; LEN]);
    assert!(one.clone_dtoh(&mine).unwrap() == [1; LEN]);
    drop((handle, mine, theirs, scratch));
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// A lease that is dropped after the store was closed does not hold its thread until the kernel has
/// ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_dropped_after_close() {
    let emulator = Arc::new(Emulator::load().unwrap());
    let vmem = open().await;
    let one = stream();
    let handle = vmem.put(vec![1; LEN], HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &one).await.unwrap();
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the lease.
    let at = unsafe { lease.device_ptr() };
    add(at, LEN, 0, &one);
    drop(handle);
    vmem.close().await.unwrap();
    let later = release_later(&emulator);
    let begun = Instant::now();
    drop(lease);
    assert!(begun.elapsed() < STANDS / 2, "{:?}", begun.elapsed());
    assert!(emulator.counter("device_bytes") > 0, "its kernel still runs");
    later.join().unwrap();
    drop(one);
    all_gone(&emulator).await;
    assert_eq!(emulator.violations(), [""; 0]);
}

/// The last lease of a closed store goes while a library captures a graph: neither notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_lease_goes_beside_a_capture() {
    let emulator = Emulator::load().unwrap();
    let vmem = open().await;
    let one = stream();
    let library = stream();
    let handle = vmem.put(vec![1; LEN], HOST).await.unwrap();
    let lease = vmem.device_on(&handle, &one).await.unwrap();
    drop(handle);
    vmem.close().await.unwrap();
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: a stream of this test.
    unsafe { result::stream::begin_capture(library.cu_stream(), mode) }.unwrap();
    std::thread::spawn(move || drop(lease)).join().unwrap();
    for _ in 0..2000 {
        if emulator.counter("device_bytes") == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(emulator.counter("device_bytes"), 0, "its memory is free");
    // SAFETY: the capture that was begun.
    unsafe { result::stream::end_capture(library.cu_stream()) }.unwrap();
    assert_eq!(emulator.counter("captures_broken"), 0);
    drop((one, library));
    all_gone(&emulator).await;
}

/// Nothing of a store is left in the driver.
async fn all_gone(emulator: &Emulator) {
    for _ in 0..5000 {
        if emulator.counter("device_bytes") + emulator.counter("contexts") == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("something is left");
}
