//! Versions that a device alone has, where something fails under them, on the emulated driver.
//!
//! Excluded: an older version without an error before it, half of a change, and the loss of what
//! was made durable: under a panic, a lost device, copies that are refused once or for as long as
//! one likes, and a flush and a close beside a kernel. `tests/it/vram/dirty` does the same over
//! simulated devices.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::CudaStream;
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryConfig, VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{
    HOST, LEN, bytes, launch, plus, refuse_copies_down, refuse_next_copy_down, stream, until,
};

async fn open(folder: &Path, write_back: WriteBack) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .disk_path(folder)
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(4 << 20)
        .write_back(write_back);
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// A kernel adds `n` to every byte, and its lease ends.
async fn add(vmem: &VirtualMemory, handle: &VMemHandle, n: u64, stream: &Arc<CudaStream>) {
    let lease = vmem.device_mut_on(handle, stream).await.unwrap();
    // SAFETY: used by the kernel, on the stream of the lease.
    launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, n, stream);
    lease.finish().await.unwrap();
}

/// Each read says that what the kernel wrote is lost.
async fn assert_lost(vmem: &VirtualMemory, handle: &VMemHandle) {
    let refused = [
        vmem.read(handle).await.unwrap_err(),
        vmem.read_at(handle, 10..20).await.unwrap_err(),
        vmem.read_into(handle, 10..20, &mut [0; 10]).await.unwrap_err(),
        vmem.flush(handle).await.unwrap_err(),
    ];
    for error in refused {
        let is_lost = match &error {
            VirtualMemoryError::NotFlushed { .. } => true,
            VirtualMemoryError::Device { operation, .. } => {
                *operation == "reading what a kernel wrote"
            }
            _ => false,
        };
        assert!(is_lost, "{error:?}");
    }
}

async fn assert_durable(folder: &Path, names: &[(&str, Vec<u8>)]) {
    let vmem = open(folder, WriteBack::Eager).await;
    for (name, expected) in names {
        let handle = vmem.open_named(name).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == *expected, "{name}");
    }
    vmem.close().await.unwrap();
}

#[tokio::test]
async fn a_panic_in_a_change_of_what_a_device_alone_has_is_reported() {
    let emulator = Emulator::load().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let vmem = open(folder.path(), WriteBack::OnEvict).await;
    let stream = stream();
    let handle = vmem.put_named("weights", bytes(1), HOST).await.unwrap();
    for _ in 0..2 {
        add(&vmem, &handle, 1, &stream).await;
        let panicked = tokio::spawn({
            let vmem = vmem.clone();
            let handle = handle.clone();
            let stream = stream.clone();
            async move {
                let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
                // SAFETY: used by the kernel, on the stream of the lease.
                let at = unsafe { lease.device_ptr() };
                launch("vmem_add", at, LEN as u64 / 2, 9, &stream);
                panic!("half way");
            }
        });
        assert!(panicked.await.unwrap_err().is_panic());
        assert_lost(&vmem, &handle).await;
        vmem.revert(&handle).await.unwrap();
        assert!(vmem.read(&handle).await.unwrap() == bytes(1), "what was durable");
    }
    add(&vmem, &handle, 3, &stream).await;
    drop(handle);
    vmem.close().await.unwrap();
    assert_durable(folder.path(), &[("weights", plus(&bytes(1), 3))]).await;
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn a_flush_and_a_close_beside_a_kernel_make_its_version_durable() {
    let emulator = Emulator::load().unwrap();
    for write_back in [WriteBack::OnEvict, WriteBack::After(Duration::from_secs(600))] {
        let folder = tempfile::tempdir().unwrap();
        let vmem = open(folder.path(), write_back).await;
        let stream = stream();
        let handle = vmem.put_named("weights", bytes(1), HOST).await.unwrap();
        add(&vmem, &handle, 1, &stream).await;
        emulator.hold(Kind::Kernel);
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        // SAFETY: used by the kernel, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 4, &stream);
        drop(lease);
        let flushing = tokio::spawn({
            let vmem = vmem.clone();
            let handle = handle.clone();
            async move { vmem.flush(&handle).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!flushing.is_finished(), "a kernel still writes");
        let closing = tokio::spawn(vmem.close());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!closing.is_finished(), "a kernel still writes");
        emulator.release_all();
        let flushed = flushing.await.unwrap();
        assert!(matches!(flushed, Ok(()) | Err(VirtualMemoryError::Closed)), "{flushed:?}");
        closing.await.unwrap().unwrap();
        drop(handle);
        assert_durable(folder.path(), &[("weights", plus(&bytes(1), 5))]).await;
    }
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn objects_of_a_lost_device_are_errors_until_they_are_reverted_or_written() {
    let emulator = Emulator::load().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let vmem = open(folder.path(), WriteBack::OnEvict).await;
    let stream = stream();
    let mut handles = Vec::new();
    for (seed, name) in (1..).zip(["reverted", "written", "left"]) {
        let handle = vmem.put_named(name, bytes(seed), HOST).await.unwrap();
        add(&vmem, &handle, 9, &stream).await;
        handles.push(handle);
    }
    emulator.sticky(719);
    for handle in &handles {
        // The first of them finds out.
        let error = vmem.read(handle).await.unwrap_err();
        assert!(matches!(error, VirtualMemoryError::Device { .. }), "{error:?}");
    }
    for handle in &handles {
        assert_lost(&vmem, handle).await;
    }
    vmem.revert(&handles[0]).await.unwrap();
    vmem.write(&handles[1], bytes(7)).await.unwrap();
    assert!(vmem.read(&handles[0]).await.unwrap() == bytes(1));
    assert!(vmem.read(&handles[1]).await.unwrap() == bytes(7));
    assert_lost(&vmem, &handles[2]).await;
    handles.clear();
    drop(stream);
    let refused = vmem.close().await.unwrap_err();
    let VirtualMemoryError::NotFlushed { names, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(names.iter().map(|name| &**name).collect::<Vec<_>>(), ["left"]);
    emulator.sticky(0);
    let durable = [("reverted", bytes(1)), ("written", bytes(7)), ("left", bytes(3))];
    assert_durable(folder.path(), &durable).await;
}

#[tokio::test]
async fn copies_that_are_refused_lose_nothing_and_are_reported() {
    let emulator = Emulator::load().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for write_back in [WriteBack::OnEvict, WriteBack::After(Duration::from_secs(600))] {
        let vmem = open(folder.path(), write_back).await;
        let stream = stream();
        let handle = vmem.put_named("weights", bytes(1), HOST).await.unwrap();
        vmem.flush(&handle).await.unwrap();
        add(&vmem, &handle, 2, &stream).await;
        // Once: the next one succeeds.
        refuse_next_copy_down(&emulator, 1);
        let error = vmem.flush(&handle).await.unwrap_err();
        let is_told = matches!(
            error,
            VirtualMemoryError::Device { code: 1, .. } | VirtualMemoryError::NotFlushed { .. }
        );
        assert!(is_told, "{error:?}");
        vmem.flush(&handle).await.unwrap();
        assert_eq!(vmem.stats().vram_dirty_bytes, 0);
        refuse_copies_down(&emulator, 0);
        // For as long as one likes: the version stays where it is.
        add(&vmem, &handle, 3, &stream).await;
        refuse_copies_down(&emulator, 1);
        for _ in 0..3 {
            let error = vmem.read(&handle).await.unwrap_err();
            assert!(matches!(error, VirtualMemoryError::Device { code: 1, .. }), "{error:?}");
            vmem.flush(&handle).await.unwrap_err();
        }
        refuse_copies_down(&emulator, 0);
        assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(1), 5));
        vmem.flush(&handle).await.unwrap();
        // Nor does the close wait for ever: it says whose last version it leaves behind.
        add(&vmem, &handle, 4, &stream).await;
        refuse_copies_down(&emulator, 1);
        drop((handle, stream));
        let refused = vmem.close().await.unwrap_err();
        let VirtualMemoryError::NotFlushed { names, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(names.len(), 1);
        refuse_copies_down(&emulator, 0);
        assert_durable(folder.path(), &[("weights", plus(&bytes(1), 5))]).await;
    }
    until("the end of every use", || emulator.counter("device_bytes") == 0).await;
    assert_eq!(emulator.violations(), [""; 0]);
}
