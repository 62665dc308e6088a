//! The VRAM tier over the emulated driver: bytes, owners, order, lost notices, failures, and
//! machines that have no GPU.
//!
//! Invariant: after each test the emulator has seen no rule broken: no race on device memory, no
//! host memory used under a copy.
#![allow(missing_docs, clippy::unwrap_used)]
#![cfg(target_os = "linux")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use vmem_core::backend::{DeviceBackend, DeviceError, DeviceRange, IoBuf};
use vmem_core::{GpuSelection, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_gpu::open_device;

const MIB: u64 = 1 << 20;

type Device = Arc<dyn DeviceBackend>;

fn device(capacity: u64) -> Device {
    open_device(&GpuSelection::Auto, Some(capacity)).unwrap().device.unwrap()
}

fn bytes(len: usize, seed: u8) -> Bytes {
    (0..len).map(|at| ((at * 31) >> 3) as u8 ^ seed).collect::<Vec<u8>>().into()
}

async fn read(device: &Device, range: &Arc<DeviceRange>) -> Vec<u8> {
    let into = IoBuf::from_vec(vec![0; range.len() + 2]);
    let (buf, outcome) = device.download(range.clone(), 0, range.len(), into, 1).await;
    outcome.unwrap();
    buf[1..=range.len()].to_vec()
}

/// Closes it, and checks that everything was given back.
async fn end(device: Device, emulator: &Emulator) {
    device.close().await.unwrap();
    drop(device);
    let left = ["device_bytes", "allocations", "streams", "events", "registrations", "contexts"]
        .map(|name| (name, emulator.counter(name)));
    assert!(left.iter().all(|(_, count)| *count == 0), "{left:?}");
    assert_eq!(emulator.violations(), [""; 0]);
    assert_eq!(emulator.counter("context_synchronisations"), 0, "never the whole device");
}

#[tokio::test]
async fn bytes_go_up_and_down() {
    let emulator = Emulator::load().unwrap();
    let device = device(16 * MIB);
    assert_eq!(&*device.describe(), "vmem emulated GPU (device 0), 16777216 bytes");
    let mut ranges = Vec::new();
    for (seed, len) in [1, 255, 512, 4096, 100_001, 3_000_000].into_iter().enumerate() {
        let range = Arc::new(device.reserve(len).unwrap());
        assert_eq!(range.address() % 256, 0, "aligned for kernels");
        device.upload(range.clone(), 0, bytes(len, seed as u8)).await.unwrap();
        ranges.push((range, seed as u8));
    }
    for (range, seed) in &ranges {
        assert!(read(&device, range).await == bytes(range.len(), *seed));
    }
    // A part.
    let (range, _) = &ranges[4];
    device.upload(range.clone(), 500, bytes(20, 9)).await.unwrap();
    let mut expected = bytes(100_001, 4).to_vec();
    expected[500..520].copy_from_slice(&bytes(20, 9));
    assert!(read(&device, range).await == expected);
    device.zero(range.clone()).await.unwrap();
    assert!(read(&device, range).await == vec![0; 100_001]);
    // Past its end.
    let refused = device.upload(range.clone(), 100_000, bytes(2, 0)).await;
    assert!(matches!(refused, Err(DeviceError::Failed { code: 1, .. })), "{refused:?}");
    assert!(device.lost().is_none());
    ranges.clear();
    assert_eq!(device.usage().used_bytes, 0);
    end(device, &emulator).await;
}

/// A future that is dropped frees nothing that a copy still uses, and a range is not reused under
/// it.
#[tokio::test]
async fn a_copy_owns_what_it_touches() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    let range = Arc::new(device.reserve(1 << 20).unwrap());
    emulator.hold(Kind::Up);
    let source = bytes(1 << 20, 3);
    let mut upload = device.upload(range.clone(), 0, source.clone());
    assert!((&mut upload).now_or_never().is_none());
    drop((upload, range));
    assert!(!source.is_unique(), "the copy has it");
    assert_eq!(device.usage().used_bytes, 1 << 20, "and the range");
    emulator.release_all();
    while device.usage().used_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(source.is_unique());
    end(device, &emulator).await;
}

/// A notice that never comes costs a tenth of a second.
#[tokio::test]
async fn a_lost_notice() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    emulator.suppress_host_functions(true);
    let range = Arc::new(device.reserve(5000).unwrap());
    for seed in 0..3 {
        device.upload(range.clone(), 0, bytes(5000, seed)).await.unwrap();
        assert!(read(&device, &range).await == bytes(5000, seed));
    }
    assert!(emulator.counter("suppressed_host_functions") >= 3);
    drop(range);
    end(device, &emulator).await;
}

/// What waits when the device fails for good ends with an error, and so does what comes after.
#[tokio::test]
async fn a_device_that_is_lost() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    let range = Arc::new(device.reserve(1000).unwrap());
    emulator.hold(Kind::Up);
    let upload = device.upload(range.clone(), 0, bytes(1000, 1));
    tokio::time::sleep(Duration::from_millis(20)).await;
    emulator.sticky(719);
    let error = upload.await.unwrap_err();
    // A copy that blocks says so itself; of one in flight the event says so.
    assert!(
        matches!(&error, DeviceError::Lost(_) | DeviceError::Failed { code: 719, .. }),
        "{error:?}"
    );
    let (buf, outcome) =
        device.download(range.clone(), 0, 10, IoBuf::from_vec(vec![0; 10]), 0).await;
    assert_eq!(buf.len(), 10, "the buffer comes back");
    assert!(outcome.is_err());
    assert!(device.lost().unwrap().contains("719"), "{:?}", device.lost());
    assert!(device.reserve(10).is_none());
    let error = device.upload(range.clone(), 0, bytes(10, 1)).await.unwrap_err();
    assert!(matches!(error, DeviceError::Lost(_)), "{error:?}");
    drop(range);
    device.close().await.unwrap();
    emulator.sticky(0);
}

/// Errors that stick are not the only ones.
#[tokio::test]
async fn a_copy_that_is_refused() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    let range = Arc::new(device.reserve(1000).unwrap());
    emulator.fail("cuMemcpyHtoDAsync_v2", 1, 1);
    let error = device.upload(range.clone(), 0, bytes(1000, 1)).await.unwrap_err();
    let DeviceError::Failed { operation, code: 1, message } = error else { panic!("{error:?}") };
    assert_eq!((operation, &*message), ("copying to the device", "CUDA_ERROR_INVALID_VALUE"));
    device.upload(range.clone(), 0, bytes(1000, 2)).await.unwrap();
    assert!(read(&device, &range).await == bytes(1000, 2));
    // No notice can be asked for; the copy ends nevertheless.
    emulator.fail("cuLaunchHostFunc", 1, 1);
    device.upload(range.clone(), 0, bytes(1000, 3)).await.unwrap();
    drop(range);
    end(device, &emulator).await;
}

#[tokio::test]
async fn many_at_once() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    emulator.delay(Kind::Up, 50);
    emulator.delay(Kind::Down, 30);
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..32_u8 {
        let device = device.clone();
        tasks.spawn(async move {
            for round in 0..20_u8 {
                let len = 100 + usize::from(task) * 300 + usize::from(round) * 1000;
                let Some(range) = device.reserve(len) else { continue };
                let range = Arc::new(range);
                let seed = task.wrapping_mul(31) ^ round;
                device.upload(range.clone(), 0, bytes(len, seed)).await.unwrap();
                if round % 3 == 0 {
                    // Dropped while it is under way; the next one comes behind it.
                    drop(device.upload(range.clone(), 0, bytes(len, seed)));
                    device.upload(range.clone(), 0, bytes(len, seed)).await.unwrap();
                }
                assert!(read(&device, &range).await == bytes(len, seed), "{task} {round}");
            }
        });
    }
    tasks.join_all().await;
    let copies = emulator.counter("copies_up") + emulator.counter("copies_down");
    assert!(emulator.counter("host_functions") < copies, "several share a notice");
    end(device, &emulator).await;
}

/// Idle it sleeps: no thread of the tier asks for anything.
#[tokio::test]
async fn idle_it_asks_nothing() {
    let emulator = Emulator::load().unwrap();
    let device = device(8 * MIB);
    let range = Arc::new(device.reserve(1000).unwrap());
    device.upload(range.clone(), 0, bytes(1000, 1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = emulator.calls("cuEventQuery");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(emulator.calls("cuEventQuery"), before);
    drop(range);
    end(device, &emulator).await;
}

#[tokio::test]
async fn probe_agrees_with_the_emulated_machine() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(0);
    let opened = open_device(&GpuSelection::Auto, None).unwrap();
    assert!(opened.device.is_none() && opened.reason.contains("NO_DEVICE"), "{}", opened.reason);
    let error = open_device(&GpuSelection::Device(0), None).unwrap_err();
    assert!(matches!(error, VirtualMemoryError::TierNotAvailable { .. }), "{error:?}");

    emulator.devices(2);
    let error = open_device(&GpuSelection::Device(2), None).unwrap_err();
    assert!(error.to_string().contains("there is no device 2, but: 0 GPU-e0000000"), "{error}");
    let uuid = "GPU-e0000000-0000-0000-0000-000000000001";
    let opened = open_device(&GpuSelection::Uuid(uuid.into()), None).unwrap();
    let second = opened.device.unwrap();
    assert!(second.describe().contains("device 1"));
    assert_eq!(second.usage().capacity_bytes, 192 * MIB, "three quarters of what is free");
    second.close().await.unwrap();

    // Full of data of others.
    emulator.devices(1);
    emulator.others(255 * MIB);
    let opened = open_device(&GpuSelection::Auto, None).unwrap();
    assert!(opened.device.is_none(), "{}", opened.reason);
    assert!(opened.reason.contains("1048576 bytes free"), "{}", opened.reason);
    // More than there is: as much as there is.
    emulator.others(200 * MIB);
    let some = device(4096 * MIB);
    assert_eq!(some.usage().capacity_bytes, 56 * MIB);
    some.close().await.unwrap();
    // Another user takes the memory first: as one block, and as pages.
    emulator.others(0);
    emulator.paged(false);
    emulator.fail("cuMemAlloc_v2", 1, 2);
    let less = device(64 * MIB);
    assert_eq!(less.usage().capacity_bytes, 56 * MIB);
    end(less, &emulator).await;
    emulator.paged(true);
    emulator.fail("cuMemCreate", 31, 2);
    let less = device(64 * MIB);
    assert_eq!(less.usage().capacity_bytes, 27 * 2 * MIB, "an eighth of the 30 is left");
    end(less, &emulator).await;

    // It starts, and cannot copy.
    emulator.fail("cuMemcpyDtoHAsync_v2", 1, 1);
    let opened = open_device(&GpuSelection::Auto, None).unwrap();
    assert!(opened.device.is_none() && opened.reason.contains("trial"), "{}", opened.reason);
}
