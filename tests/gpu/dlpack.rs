//! Leases as DLPack tensors, in the hands of a consumer that knows nothing but the C interface, on
//! the emulated driver.
//!
//! Invariant: an object is pinned in VRAM as long as its tensor lives, and until what was queued on
//! the stream of its lease has ended.

use std::ffi::{CString, c_void};
use std::time::Duration;

use vmem::gpu::VramExt;
use vmem::gpu::cudarc::driver::{CudaStream, result};
use vmem::{VMemHandle, VirtualMemory, VirtualMemoryError};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_gpu::dlpack::{DLManagedTensor, DLManagedTensorVersioned, DLTensor, DlPackTensor};

use crate::support::{HOST, LEN, bytes, open_small, stream};

async fn tensor(vmem: &VirtualMemory, handle: &VMemHandle) -> DlPackTensor {
    vmem.device_on(handle, &stream()).await.unwrap().into_dlpack()
}

/// A tensor in the hands of another library, which may call on any thread.
pub(crate) struct Consumer(pub(crate) *mut DLManagedTensor);

// SAFETY: the deleter may be called on any thread, which is what is tested.
unsafe impl Send for Consumer {}

impl Consumer {
    pub(crate) fn tensor(&self) -> DLTensor {
        // SAFETY: it lives until `delete`.
        unsafe { (*self.0).dl_tensor }
    }

    pub(crate) fn delete(self) {
        // SAFETY: it lives until now.
        let deleter = unsafe { (*self.0).deleter }.unwrap();
        // SAFETY: called once, for it takes `self`.
        unsafe { deleter(self.0) };
    }
}

/// The only dimension of a tensor: its shape and its strides.
fn dimension(tensor: &DLTensor) -> (i64, i64) {
    assert_eq!(tensor.ndim, 1);
    // SAFETY: there is one dimension.
    let shape = unsafe { *tensor.shape };
    // SAFETY: as above, and the strides are there.
    (shape, unsafe { *tensor.strides })
}

/// What the tensor holds, as its fields say.
fn copied(tensor: &DLTensor, stream: &CudaStream) -> Vec<u8> {
    stream.context().bind_to_thread().unwrap();
    let mut into = vec![0; dimension(tensor).0 as usize];
    let from = tensor.data.addr() as u64 + tensor.byte_offset;
    // SAFETY: both are as long as the tensor; the memory of the vector is pageable, so the call
    // waits.
    unsafe { result::memcpy_dtoh_async(&mut into, from, stream.cu_stream()) }.unwrap();
    into
}

async fn pinned(vmem: &VirtualMemory, handle: &VMemHandle) -> bool {
    let pinned = match vmem.demote(handle, HOST).await {
        Err(VirtualMemoryError::Pinned { .. }) => true,
        other => other.map(|()| false).unwrap(),
    };
    assert_eq!(vmem.residency(handle).unwrap().vram, pinned);
    pinned
}

/// Ends well only if nothing pins it any more.
async fn demoted(vmem: &VirtualMemory, handle: &VMemHandle) {
    for _ in 0..2000 {
        if !pinned(vmem, handle).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it stays pinned: {:?}", vmem.residency(handle));
}

async fn end(vmem: VirtualMemory, handle: VMemHandle, emulator: &Emulator) {
    drop(handle);
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn a_consumer_finds_the_bytes() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(1), HOST).await.unwrap();
    let tensor = tensor(&vmem, &handle).await;
    assert_eq!((tensor.len(), tensor.is_empty()), (LEN, false));
    let stream = tensor.stream().clone();
    let consumer = Consumer(tensor.into_raw());
    let fields = consumer.tensor();
    let dtype = (fields.dtype.code, fields.dtype.bits, fields.dtype.lanes);
    assert_eq!(dtype, (1, 8, 1), "kDLUInt");
    assert_eq!((fields.device.device_type, fields.device.device_id), (2, 0), "kDLCUDA");
    assert_eq!((dimension(&fields), fields.byte_offset), ((LEN as i64, 1), 0));
    assert_eq!(fields.data.addr() % 256, 0, "DLPack asks for it");
    assert!(copied(&fields, &stream) == bytes(1));
    assert!(pinned(&vmem, &handle).await);
    // A write is another version; the tensor keeps its own.
    vmem.write(&handle, bytes(2)).await.unwrap();
    assert!(copied(&fields, &stream) == bytes(1));
    consumer.delete();
    demoted(&vmem, &handle).await;
    assert!(vmem.read(&handle).await.unwrap() == bytes(2));
    end(vmem, handle, &emulator).await;
}

#[tokio::test]
async fn the_versioned_form_says_that_it_is_read_only() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(3), HOST).await.unwrap();
    let tensor = tensor(&vmem, &handle).await;
    let stream = tensor.stream().clone();
    let raw: *mut DLManagedTensorVersioned = tensor.into_raw_versioned();
    // SAFETY: it lives until its deleter is called below.
    let managed = unsafe { *raw };
    assert_eq!((managed.version.major, managed.flags), (1, 1));
    assert_eq!(dimension(&managed.dl_tensor), (LEN as i64, 1));
    assert!(copied(&managed.dl_tensor, &stream) == bytes(3));
    assert!(pinned(&vmem, &handle).await);
    // SAFETY: called once.
    unsafe { managed.deleter.unwrap()(raw) };
    demoted(&vmem, &handle).await;
    end(vmem, handle, &emulator).await;
}

/// On a thread that has neither a runtime nor a context, while what was queued on the stream of the
/// lease still runs.
#[tokio::test]
async fn the_deleter_is_called_on_another_thread() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(4), HOST).await.unwrap();
    let tensor = tensor(&vmem, &handle).await;
    let stream = tensor.stream().clone();
    let sink = stream.alloc_zeros::<u8>(LEN).unwrap().leak();
    let consumer = Consumer(tensor.into_raw());
    emulator.hold(Kind::Kernel);
    copy_by_a_kernel(sink, consumer.tensor().data.addr() as u64, &stream);
    std::thread::spawn(move || consumer.delete()).join().unwrap();
    demoted(&vmem, &handle).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(vmem.stats().vram.used_bytes >= LEN as u64, "its kernel still reads");
    emulator.release_all();
    let mut read = vec![0; LEN];
    // SAFETY: both are as long; the memory of the vector is pageable, so the call waits.
    unsafe { result::memcpy_dtoh_async(&mut read, sink, stream.cu_stream()) }.unwrap();
    assert!(read == bytes(4), "the kernel read what it was given");
    // SAFETY: it was leaked above, and nothing uses it any more.
    unsafe { result::free_sync(sink) }.unwrap();
    end(vmem, handle, &emulator).await;
}

/// Launches a kernel that the emulator knows by name.
fn copy_by_a_kernel(to: u64, from: u64, stream: &CudaStream) {
    let text = CString::new(".entry vmem_slow_copy(").unwrap();
    stream.context().bind_to_thread().unwrap();
    // SAFETY: a text that ends.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap();
    let name = CString::new("vmem_slow_copy").unwrap();
    // SAFETY: the module was loaded just now, and stays.
    let kernel = unsafe { result::module::get_function(module, name) }.unwrap();
    let mut to = to;
    let mut from = from;
    let mut len = LEN as u64;
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut to).cast(), (&raw mut from).cast(), (&raw mut len).cast()];
    let grid = (1, 1, 1);
    let block = (32, 1, 1);
    // SAFETY: the arguments are those that the kernel takes.
    unsafe { result::launch_kernel(kernel, grid, block, 0, stream.cu_stream(), &mut arguments) }
        .unwrap();
}

#[tokio::test]
async fn a_tensor_that_nobody_took_ends_its_lease() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(5), HOST).await.unwrap();
    let kept = tensor(&vmem, &handle).await;
    assert!(pinned(&vmem, &handle).await);
    drop(kept);
    demoted(&vmem, &handle).await;
    // Given back, it is the lease that it was.
    let lease = tensor(&vmem, &handle).await.into_lease();
    assert!(pinned(&vmem, &handle).await);
    drop(lease);
    demoted(&vmem, &handle).await;
    end(vmem, handle, &emulator).await;
}

/// Two tensors of one object are two leases of it: each deleter ends its own.
#[tokio::test]
async fn each_deleter_ends_its_own_lease() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(6), HOST).await.unwrap();
    let first = Consumer(tensor(&vmem, &handle).await.into_raw());
    let second = Consumer(tensor(&vmem, &handle).await.into_raw());
    assert_eq!(first.tensor().data, second.tensor().data, "no copy");
    first.delete();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(pinned(&vmem, &handle).await);
    assert_eq!(vmem.residency(&handle).unwrap().pins, 1);
    second.delete();
    demoted(&vmem, &handle).await;
    end(vmem, handle, &emulator).await;
}

#[tokio::test]
async fn no_bytes_are_a_tensor_too() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put([], HOST).await.unwrap();
    let tensor = tensor(&vmem, &handle).await;
    assert!(tensor.is_empty());
    let consumer = Consumer(tensor.into_raw());
    let fields = consumer.tensor();
    assert_eq!((dimension(&fields), fields.data.is_null()), ((0, 1), true));
    assert_eq!(vmem.residency(&handle).unwrap().pins, 1);
    consumer.delete();
    for _ in 0..2000 {
        if vmem.residency(&handle).unwrap().pins == 0 {
            return end(vmem, handle, &emulator).await;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it stays pinned");
}

/// A consumer may keep a tensor for longer than there is a store.
#[tokio::test]
async fn a_tensor_outlives_its_store() {
    let emulator = Emulator::load().unwrap();
    let vmem = open_small(4 << 20).await;
    let handle = vmem.put(bytes(7), HOST).await.unwrap();
    let tensor = tensor(&vmem, &handle).await;
    let stream = tensor.stream().clone();
    let consumer = Consumer(tensor.into_raw());
    end(vmem, handle, &emulator).await;
    assert!(copied(&consumer.tensor(), &stream) == bytes(7));
    let allocations = emulator.counter("allocations");
    std::thread::spawn(move || consumer.delete()).join().unwrap();
    for _ in 0..2000 {
        if emulator.counter("allocations") < allocations {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(emulator.counter("allocations") < allocations, "the last lease frees the memory");
    assert_eq!(emulator.violations(), [""; 0]);
}
