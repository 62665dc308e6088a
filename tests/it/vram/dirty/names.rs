//! Names of objects that kernels write: what is durable, and when.
//!
//! Excluded: an older version, or zeros, that a flush makes durable in place of what the kernel
//! wrote.

use std::sync::Arc;

use vmem::backend::Backends;
use vmem::{Capabilities, VirtualMemory, VirtualMemoryError, WriteBack};
use vmem_io::DiskTier;
use vmem_io::catalog::NameCatalog;
use vmem_testkit::tape::Image;
use vmem_testkit::{SimDevice, Tape, TapeDriver, TapeStorage};

use super::run_kernel;
use crate::support::{self, HOST, KIB, MIB, STAGING, bytes};

const LEN: usize = 200 * KIB;

fn open(tape: &Arc<Tape>) -> (VirtualMemory, SimDevice) {
    let (catalog, taken) = NameCatalog::over(Arc::new(TapeStorage(tape.clone())), 512).unwrap();
    let device = SimDevice::new(MIB as u64);
    let backends = Backends {
        host_capacity_bytes: (MIB + STAGING) as u64,
        disk: DiskTier::with_taken(TapeDriver::new(tape, false), 8 << 20, &taken, None).unwrap(),
        remote: None,
        catalog: Some(Arc::new(catalog)),
        devices: vec![Arc::new(device.clone())],
        capabilities: Capabilities::new("a tape".into(), "not in this test".into()),
    };
    let config = support::config(MIB, |config| config.write_back(WriteBack::OnEvict));
    (VirtualMemory::with_backends(&config, backends).unwrap(), device)
}

#[tokio::test]
async fn named_objects_are_durable_as_the_kernel_wrote_them() {
    let tape = Tape::of(Image::default());
    let (vmem, _device) = open(&tape);
    for name in ["flushed", "closed", "forgotten"] {
        let handle = vmem.put_named(name, bytes(1, 1, LEN), HOST).await.unwrap();
        run_kernel(&vmem, &handle, bytes(1, 2, LEN)).await;
        if name == "flushed" {
            vmem.flush(&handle).await.unwrap();
            assert_eq!(vmem.stats().vram_dirty_bytes, 0);
        }
    }
    // A crash now: what was flushed is there, the others are what they were.
    let (crashed, _device) = open(&Tape::of(tape.image()));
    for (name, version) in [("flushed", 2), ("closed", 1), ("forgotten", 1)] {
        let handle = crashed.open_named(name).await.unwrap();
        assert!(crashed.read(&handle).await.unwrap() == bytes(1, version, LEN), "{name}");
    }
    crashed.close().await.unwrap();

    let handle = vmem.open_named("closed").await.unwrap();
    assert!(vmem.read_at(&handle, 0..LEN).await.unwrap() == bytes(1, 2, LEN));
    drop(handle);
    vmem.close().await.unwrap();
    let (again, _device) = open(&Tape::of(tape.image()));
    for name in ["flushed", "closed", "forgotten"] {
        let handle = again.open_named(name).await.unwrap();
        assert!(again.read(&handle).await.unwrap() == bytes(1, 2, LEN), "{name}");
    }
    again.close().await.unwrap();
}

#[tokio::test]
async fn lost_versions_of_names_are_reverted_to_what_is_durable() {
    let tape = Tape::of(Image::default());
    let (vmem, device) = open(&tape);
    let handle = vmem.put_named("name", bytes(1, 1, LEN), HOST).await.unwrap();
    run_kernel(&vmem, &handle, bytes(1, 9, LEN)).await;
    drop(vmem.pin(&handle, HOST).await.unwrap());
    // Its bytes in host memory are no version that can be gone back to.
    run_kernel(&vmem, &handle, bytes(1, 2, LEN)).await;
    let other = vmem.put_named("other", bytes(2, 1, LEN), HOST).await.unwrap();
    run_kernel(&vmem, &other, bytes(2, 2, LEN)).await;
    device.lose();
    let refused = vmem.flush_all().await.unwrap_err();
    let VirtualMemoryError::NotFlushed { names, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(names.len(), 2);
    vmem.revert(&handle).await.unwrap();
    assert!(vmem.read(&handle).await.unwrap() == bytes(1, 1, LEN));
    vmem.flush(&handle).await.unwrap();
    drop((handle, other));
    let refused = vmem.close().await.unwrap_err();
    let VirtualMemoryError::NotFlushed { names, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(names.iter().map(|name| &**name).collect::<Vec<_>>(), ["other"]);
    let (again, _device) = open(&Tape::of(tape.image()));
    for (name, object) in [("name", 1), ("other", 2)] {
        let handle = again.open_named(name).await.unwrap();
        assert!(again.read(&handle).await.unwrap() == bytes(object, 1, LEN), "{name}");
    }
    again.close().await.unwrap();
}
