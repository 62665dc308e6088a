//! Streams of another library, by their handles, on the emulated driver.
//!
//! Invariant: an adopted stream serves leases and gathers as one of cudarc's does, is kept no
//! longer than what they used, and is never destroyed by vmem.

use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use vmem::gpu::cudarc::driver::{CudaContext, CudaStream, DevicePtr, sys};
use vmem::gpu::{DeviceTarget, VramExt, adopt_stream};
use vmem::{VirtualMemoryError, WriteBack};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::support::{HOST, LEN, bytes, end, launch, open, plus, until};

/// The last clone is the caller's once what leases and gathers used has ended.
async fn is_released(stream: &Arc<CudaStream>) {
    until("the release of the stream", || Arc::strong_count(stream) == 1).await;
}

#[tokio::test]
async fn adopted_streams_serve_leases_and_gathers() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let context = CudaContext::new(0).unwrap();
    let theirs = context.new_stream().unwrap();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    // Their own, and the default stream by its two handles.
    let default = [ptr::null_mut(), ptr::without_provenance_mut(1)];
    for (round, raw) in [theirs.cu_stream()].into_iter().chain(default).enumerate() {
        let destroyed = emulator.calls("cuStreamDestroy_v2");
        // SAFETY: it lives until the end of this test.
        let stream = unsafe { adopt_stream(&context, raw) }.unwrap();
        let lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
        emulator.hold(Kind::Kernel);
        // SAFETY: used by the kernel below, on the stream of the lease.
        launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
        drop(lease);
        assert!(Arc::strong_count(&stream) > 1, "the end of the kernel is waited for on it");
        emulator.release_all();
        let expected = plus(&bytes(1), round as u8 + 1);
        assert!(vmem.read(&handle).await.unwrap() == expected, "round {round}");
        let mut buffer = stream.alloc_zeros::<u8>(LEN).unwrap();
        let target = DeviceTarget::from_slice(&mut buffer);
        vmem.gather(&[(&handle, 0..LEN, 0)], &target).await.unwrap();
        drop(target);
        assert!(stream.clone_dtoh(&buffer).unwrap() == expected, "round {round}");
        assert_ne!(buffer.device_ptr(&stream).0, 0);
        drop(buffer);
        is_released(&stream).await;
        drop(stream);
        assert_eq!(emulator.calls("cuStreamDestroy_v2"), destroyed, "it is not ours");
    }
    end(vmem, vec![handle], &emulator).await;
}

#[tokio::test]
async fn streams_of_other_contexts_and_of_each_thread_are_refused() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|gpu| CudaContext::new(gpu).unwrap());
    let theirs = contexts[1].new_stream().unwrap();
    let refused = |raw: sys::CUstream| {
        // SAFETY: it lives until the end of this test, or is no stream that is used.
        let adopted = unsafe { adopt_stream(&contexts[0], raw) }.map(drop);
        let Err(VirtualMemoryError::InvalidConfig { field: "stream", .. }) = adopted else {
            panic!("{adopted:?}")
        };
    };
    refused(theirs.cu_stream());
    refused(ptr::without_provenance_mut(2));
    // SAFETY: as above.
    unsafe { adopt_stream(&contexts[1], theirs.cu_stream()) }.unwrap();
    emulator.fail("cuStreamGetCtx", 1, 400);
    // SAFETY: as above.
    let failed = unsafe { adopt_stream(&contexts[1], theirs.cu_stream()) }.map(drop);
    assert!(matches!(failed, Err(VirtualMemoryError::Device { code: 400, .. })), "{failed:?}");
    assert_eq!(emulator.violations(), [""; 0]);
}

/// The handle of the default stream is the same for each device: leases on it are of the device of
/// their context, and end there, also in a set that has one of the other.
#[tokio::test]
async fn default_streams_of_two_devices_are_two() {
    let emulator = Emulator::load().unwrap();
    let vmem = crate::devices::open(&emulator, 16 << 20, WriteBack::Eager).await;
    // SAFETY: the default stream is never destroyed.
    let adopt = |gpu| unsafe { adopt_stream(&CudaContext::new(gpu).unwrap(), ptr::null_mut()) };
    let streams = [0, 1].map(|gpu| adopt(gpu).unwrap());
    let first = vmem.put(bytes(1), HOST).await.unwrap();
    let second = vmem.put(bytes(2), HOST).await.unwrap();
    let mut set = vmem.device_set(&streams[0]).write(&first).acquire().await.unwrap();
    set.write.push(vmem.device_mut_on(&second, &streams[1]).await.unwrap());
    emulator.hold(Kind::Kernel);
    // SAFETY: used by the kernel below, on the stream of the lease.
    let address = unsafe { set.write[1].device_ptr() };
    launch("vmem_add", address, LEN as u64, 1, &streams[1]);
    drop(set);
    let read = tokio::time::timeout(Duration::from_millis(200), vmem.read(&second)).await;
    assert!(read.is_err(), "its kernel has not ended");
    emulator.release_all();
    assert!(vmem.read(&first).await.unwrap() == bytes(1));
    assert!(vmem.read(&second).await.unwrap() == plus(&bytes(2), 1));
    drop((first, second));
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}
