//! DLPack tensors with a type and a shape, and those that their consumers write to, on the emulated
//! driver.
//!
//! Invariant: a tensor has the bytes of its lease, no more and no fewer; what was written to it is
//! published by its deleter, and by nothing else.

use std::slice;
use std::sync::Arc;

use vmem::gpu::cudarc::driver::CudaStream;
use vmem::gpu::{DeviceLeaseMut, VramExt};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_cuda_emulator::Emulator;
use vmem_gpu::dlpack::{DLDataType, DLDataTypeCode, DLTensor, DlPackTensor, dtype};

use crate::dlpack::Consumer;
use crate::support::{HOST, LEN, bytes, end, launch, open, plus, stream};

async fn writable(
    vmem: &VirtualMemory,
    handle: &VMemHandle,
    stream: &Arc<CudaStream>,
) -> DlPackTensor<DeviceLeaseMut> {
    vmem.device_mut_on(handle, stream).await.unwrap().into_dlpack()
}

/// The type, shape and strides of a tensor.
fn described(tensor: &DLTensor) -> ((u8, u8, u16), Vec<i64>, Vec<i64>) {
    let DLDataType { code, bits, lanes } = tensor.dtype;
    let count = usize::try_from(tensor.ndim).unwrap();
    // SAFETY: as many as there are dimensions.
    let shape = unsafe { slice::from_raw_parts(tensor.shape, count) };
    // SAFETY: as above.
    let strides = unsafe { slice::from_raw_parts(tensor.strides, count) };
    ((code, bits, lanes), shape.to_vec(), strides.to_vec())
}

/// A consumer writes to the tensor, on the stream of its lease.
fn add(tensor: &DLTensor, n: u64, stream: &CudaStream) {
    launch("vmem_add", tensor.data.addr() as u64, LEN as u64, n, stream);
}

#[tokio::test]
async fn tensors_have_the_type_and_the_shape_that_were_said() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let mut tensor = vmem.device_on(&handle, &stream).await.unwrap().into_dlpack();
    let float = dtype(DLDataTypeCode::kDLFloat, 32);
    tensor.view_as(float, &[5, 50, 100]).unwrap();
    let refused = [
        (float, vec![5, 50, 101]),
        (float, vec![5, 50, 0]),
        (float, vec![]),
        (float, vec![usize::MAX, 50, 100]),
        (dtype(DLDataTypeCode::kDLFloat4_e2m1fn, 4), vec![2 * LEN]),
        (DLDataType { lanes: 0, ..float }, vec![LEN]),
    ];
    for (dtype, shape) in refused {
        let error = tensor.view_as(dtype, &shape).unwrap_err();
        let named = matches!(error, VirtualMemoryError::InvalidConfig { field: "tensor", .. });
        assert!(named, "{error:?}");
    }
    assert_eq!(tensor.len(), LEN);
    let consumer = Consumer(tensor.into_raw());
    let found = described(&consumer.tensor());
    assert_eq!(found, ((2, 32, 1), vec![5, 50, 100], vec![5000, 100, 1]), "what it was before");
    consumer.delete();

    // A scalar and no elements have their bytes too.
    let scalar = vmem.put([7; 8], HOST).await.unwrap();
    let mut tensor = writable(&vmem, &scalar, &stream).await;
    tensor.view_as(dtype(DLDataTypeCode::kDLInt, 64), &[]).unwrap();
    let consumer = Consumer(tensor.into_raw());
    assert_eq!(described(&consumer.tensor()), ((0, 64, 1), vec![], vec![]));
    consumer.delete();
    let empty = vmem.put([], HOST).await.unwrap();
    let mut tensor = writable(&vmem, &empty, &stream).await;
    tensor.view_as(float, &[3, 0, 7]).unwrap();
    let consumer = Consumer(tensor.into_raw());
    assert_eq!(described(&consumer.tensor()), ((2, 32, 1), vec![3, 0, 7], vec![7, 7, 1]));
    consumer.delete();
    end(vmem, vec![handle, scalar, empty], &emulator).await;
}

#[tokio::test]
async fn deleters_publish_what_was_written() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(2), HOST).await.unwrap();
    let tensor = writable(&vmem, &handle, &stream).await;
    assert_eq!(tensor.stream().cu_stream(), stream.cu_stream());
    let consumer = Consumer(tensor.into_raw());
    add(&consumer.tensor(), 3, &stream);
    std::thread::spawn(move || consumer.delete()).join().unwrap();
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(2), 3));

    let raw = writable(&vmem, &handle, &stream).await.into_raw_versioned();
    // SAFETY: it lives until its deleter is called below.
    let managed = unsafe { *raw };
    assert_eq!((managed.version.major, managed.flags), (1, 0), "not read only");
    add(&managed.dl_tensor, 4, &stream);
    // SAFETY: called once.
    unsafe { managed.deleter.unwrap()(raw) };
    assert!(vmem.read(&handle).await.unwrap() == plus(&bytes(2), 7));

    // What was said of the lease counts.
    let mut lease = vmem.device_mut_on(&handle, &stream).await.unwrap();
    lease.touched(0..4096).unwrap();
    let consumer = Consumer(lease.into_dlpack().into_raw());
    launch("vmem_add", consumer.tensor().data.addr() as u64, 4096, 1, &stream);
    let before = emulator.counter("bytes_down");
    consumer.delete();
    let after = vmem.read(&handle).await.unwrap();
    assert!(after[..4096] == plus(&bytes(2), 8)[..4096]);
    assert!(after[4096..] == plus(&bytes(2), 7)[4096..]);
    assert!(emulator.counter("bytes_down") - before < LEN as u64 / 2, "no more than was touched");
    drop(after);
    end(vmem, vec![handle], &emulator).await;
}

/// Half of a change is no version, and none of it is no new one.
#[tokio::test]
async fn tensors_that_nobody_took_and_panics_publish_nothing() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    let downs = emulator.counter("copies_down");
    drop(writable(&vmem, &handle, &stream).await);
    drop(vmem.device_overwrite_on(&handle, &stream).await.unwrap().into_dlpack());
    drop(writable(&vmem, &handle, &stream).await.into_lease());
    assert!(vmem.read(&handle).await.unwrap() == bytes(3));

    struct Held(Option<Consumer>);
    impl Drop for Held {
        fn drop(&mut self) {
            self.0.take().unwrap().delete();
        }
    }
    let held = Held(Some(Consumer(writable(&vmem, &handle, &stream).await.into_raw())));
    add(&held.0.as_ref().unwrap().tensor(), 9, &stream);
    let panicked = std::thread::spawn(move || {
        let _held = held;
        panic!("half way");
    });
    assert!(panicked.join().is_err());
    assert!(vmem.read(&handle).await.unwrap() == bytes(3), "half of a change");
    assert_eq!(emulator.counter("copies_down"), downs);
    end(vmem, vec![handle], &emulator).await;
}
