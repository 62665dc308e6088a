//! Tensors of other libraries as targets of gathers and scatters, on the emulated driver.
//!
//! Invariant: a tensor that was taken over is deleted once, when no copy uses its memory any more,
//! whatever became of the calls; one that was refused is not touched.

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use vmem::VirtualMemoryError;
use vmem::gpu::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use vmem::gpu::{DeviceTarget, VramExt};
use vmem_cuda_emulator::{Emulator, Kind};
use vmem_gpu::dlpack::{
    DLDataTypeCode, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion, DLTensor,
    dtype,
};

use crate::gather::on_disk;
use crate::support::{HANGS, HOST, LEN, VRAM, bytes, end, launch, open, stream, until};

/// What the deleter of a tensor ends, and what it tells.
struct Theirs {
    buffer: CudaSlice<u8>,
    shape: Vec<i64>,
    strides: Vec<i64>,
    deleted: Arc<AtomicUsize>,
    /// Taken by the deleter, as the lock of an interpreter is.
    lock: Arc<Mutex<()>>,
}

unsafe extern "C" fn delete(tensor: *mut DLManagedTensor) {
    // SAFETY: made by `Tensor::give`, and deleted once.
    let tensor = unsafe { Box::from_raw(tensor) };
    // SAFETY: as above.
    let theirs = unsafe { Box::from_raw(tensor.manager_ctx.cast::<Theirs>()) };
    let Theirs { buffer, deleted, lock, .. } = *theirs;
    drop(lock.lock().unwrap());
    drop(buffer);
    deleted.fetch_add(1, Ordering::SeqCst);
}

/// A tensor of another library: `LEN` bytes from its offset on, as rows of ten floats.
struct Tensor {
    raw: *mut DLManagedTensor,
    deleted: Arc<AtomicUsize>,
    lock: Arc<Mutex<()>>,
}

const OFFSET: usize = 512;

impl Tensor {
    fn give(stream: &Arc<CudaStream>) -> Self {
        let buffer = stream.alloc_zeros::<u8>(OFFSET + LEN).unwrap();
        stream.synchronize().unwrap();
        let deleted = Arc::new(AtomicUsize::new(0));
        let lock = Arc::new(Mutex::new(()));
        let address = buffer.device_ptr(stream).0;
        let mut theirs = Box::new(Theirs {
            buffer,
            shape: vec![LEN as i64 / 40, 1, 10],
            strides: vec![10, 77, 1],
            deleted: deleted.clone(),
            lock: lock.clone(),
        });
        let dl_tensor = DLTensor {
            data: std::ptr::without_provenance_mut(address as usize),
            device: DLDevice { device_type: 2, device_id: 0 },
            ndim: 3,
            dtype: dtype(DLDataTypeCode::kDLFloat, 32),
            shape: theirs.shape.as_mut_ptr(),
            strides: theirs.strides.as_mut_ptr(),
            byte_offset: OFFSET as u64,
        };
        let manager_ctx: *mut c_void = Box::into_raw(theirs).cast();
        let managed = DLManagedTensor { dl_tensor, manager_ctx, deleter: Some(delete) };
        Tensor { raw: Box::into_raw(Box::new(managed)), deleted, lock }
    }

    fn target(&self, stream: &Arc<CudaStream>) -> DeviceTarget<'static> {
        // SAFETY: nothing else uses it, and it is taken once.
        unsafe { DeviceTarget::from_dlpack(self.raw, stream) }.unwrap()
    }

    fn deleted(&self) -> usize {
        self.deleted.load(Ordering::SeqCst)
    }

    fn refused(&self, stream: &Arc<CudaStream>) {
        // SAFETY: what is wrong with it is found before anything is touched.
        let refused = unsafe { DeviceTarget::from_dlpack(self.raw, stream) }.map(drop);
        let Err(VirtualMemoryError::InvalidConfig { field: "tensor", .. }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(self.deleted(), 0, "it stays the caller's");
    }

    /// Changes what its fields say for as long as `during` runs.
    fn with(&mut self, change: impl FnOnce(&mut DLTensor), during: impl FnOnce(&Self)) {
        // SAFETY: it was not taken.
        let before = unsafe { (*self.raw).dl_tensor };
        // SAFETY: as above.
        change(unsafe { &mut (*self.raw).dl_tensor });
        during(self);
        // SAFETY: as above.
        unsafe { (*self.raw).dl_tensor = before };
    }
}

#[tokio::test]
async fn tensors_are_gathered_into_and_scattered_from() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let from = vmem.put(bytes(1), HOST).await.unwrap();
    let to = vmem.put(bytes(2), HOST).await.unwrap();
    let tensor = Tensor::give(&stream);
    let target = tensor.target(&stream);
    assert_eq!(target.len(), LEN);
    let half = LEN / 2;
    vmem.gather(&[(&from, 0..half, half), (&from, half..LEN, 0)], &target).await.unwrap();
    vmem.scatter(&target, &[(0, &to, 0..LEN)]).await.unwrap();
    let expected = [&bytes(1)[half..], &bytes(1)[..half]].concat();
    assert!(vmem.read(&to).await.unwrap() == expected, "from the offset of the tensor on");
    assert!(vmem.gather(&[(&from, 0..LEN, 1)], &target).await.is_err(), "it ends where it ends");
    assert_eq!(tensor.deleted(), 0);
    drop(target);
    assert_eq!(tensor.deleted(), 1, "no copy uses it");
    end(vmem, vec![from, to], &emulator).await;
}

#[tokio::test]
async fn tensors_that_will_not_do_stay_their_callers() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let stream = stream();
    let mut tensor = Tensor::give(&stream);
    tensor.with(|fields| fields.device.device_type = 1, |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.device.device_id = 1, |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.device.device_id = -1, |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.ndim = -1, |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.dtype.bits = 1, |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.shape = std::ptr::null_mut(), |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.data = std::ptr::null_mut(), |tensor| tensor.refused(&stream));
    tensor.with(|fields| fields.byte_offset = u64::MAX - 7, |tensor| tensor.refused(&stream));
    for (place, length) in [(0, -1), (2, i64::MAX)] {
        let mut shape = vec![LEN as i64 / 40, 1, 10];
        shape[place] = length;
        tensor.with(|fields| fields.shape = shape.as_mut_ptr(), |tensor| tensor.refused(&stream));
    }
    // Turned, with gaps, and backwards.
    for mut strides in [[1, 1, LEN as i64 / 40], [11, 1, 1], [10, 1, -1]] {
        tensor.with(
            |fields| fields.strides = strides.as_mut_ptr(),
            |tensor| {
                tensor.refused(&stream);
            },
        );
    }
    // No strides are those of a contiguous one.
    // SAFETY: it was not taken.
    unsafe { (*tensor.raw).dl_tensor.strides = std::ptr::null_mut() };
    assert_eq!(tensor.target(&stream).len(), LEN);
    assert_eq!(tensor.deleted(), 1);
    // SAFETY: null is looked for.
    unsafe { DeviceTarget::from_dlpack(std::ptr::null_mut(), &stream) }.unwrap_err();
    // SAFETY: as above.
    unsafe { DeviceTarget::from_dlpack_versioned(std::ptr::null_mut(), &stream) }.unwrap_err();
    assert_eq!(emulator.violations(), [""; 0]);
}

#[tokio::test]
async fn the_versioned_form_is_taken_unless_it_is_read_only() {
    let emulator = Emulator::load().unwrap();
    let stream = stream();
    unsafe extern "C" fn count(tensor: *mut DLManagedTensorVersioned) {
        // SAFETY: alive until now.
        let inner = unsafe { (*tensor).manager_ctx }.cast::<DLManagedTensor>();
        // SAFETY: it is the other form of the same tensor, deleted once.
        unsafe { delete(inner) };
    }
    let tensor = Tensor::give(&stream);
    let mut managed = DLManagedTensorVersioned {
        version: DLPackVersion { major: 1, minor: 1 },
        manager_ctx: tensor.raw.cast(),
        deleter: Some(count),
        flags: 0,
        // SAFETY: it was not taken.
        dl_tensor: unsafe { (*tensor.raw).dl_tensor },
    };
    for (major, flags) in [(1, 1), (0, 0), (2, 0)] {
        managed.version.major = major;
        managed.flags = flags;
        // SAFETY: nothing else uses it; what is wrong is found first.
        let refused = unsafe { DeviceTarget::from_dlpack_versioned(&raw mut managed, &stream) };
        refused.map(drop).unwrap_err();
        assert_eq!(tensor.deleted(), 0);
    }
    managed.version.major = 1;
    // Copied by its producer: ours alone.
    managed.flags = 2;
    // SAFETY: nothing else uses it, and it is taken once.
    let target = unsafe { DeviceTarget::from_dlpack_versioned(&raw mut managed, &stream) };
    assert_eq!(target.unwrap().len(), LEN);
    assert_eq!(tensor.deleted(), 1);
    assert_eq!(emulator.violations(), [""; 0]);
}

/// Copies that stand still, on a stream of the tier or behind a kernel on that of the target, keep
/// the tensor, although its gather and its target are gone.
#[tokio::test]
async fn dropped_gathers_keep_their_tensors_until_their_copies_end() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let there = vmem.put(bytes(200), HOST).await.unwrap();
    vmem.promote(&there, VRAM).await.unwrap();
    let mut handles = on_disk(&vmem, &emulator, &stream).await;
    handles.push(there);
    let mut scrap = stream.alloc_zeros::<u8>(LEN).unwrap();
    stream.synchronize().unwrap();
    for (at, kind) in [(0, Kind::Up), (handles.len() - 1, Kind::Kernel)] {
        let tensor = Tensor::give(&stream);
        let target = tensor.target(&stream);
        emulator.hold(kind);
        if at > 0 {
            let address = scrap.device_ptr(&stream).0;
            launch("vmem_fill", address, LEN as u64, 7, &stream);
        }
        let pieces = [(&handles[at], 0..LEN, 0)];
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        if at == 0 {
            until("the copy", || emulator.counter("queued_up") > 0).await;
        }
        drop(gather);
        drop(target);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(tensor.deleted(), 0, "a copy still writes to it");
        emulator.release_all();
        until("the deleter", || tensor.deleted() == 1).await;
    }
    // One that never began keeps nothing.
    let tensor = Tensor::give(&stream);
    let target = tensor.target(&stream);
    drop(vmem.gather(&[(&handles[0], 0..LEN, 0)], &target));
    drop(target);
    assert_eq!(tensor.deleted(), 1);
    stream.memset_zeros(&mut scrap).unwrap();
    drop(scrap);
    end(vmem, handles, &emulator).await;
}

/// A deleter may wait for the lock of an interpreter, and its owner for vmem.
#[tokio::test]
async fn deleters_that_wait_delay_nothing_else() {
    let emulator = Emulator::load().unwrap();
    let vmem = open(4 << 20).await;
    let stream = stream();
    let there = vmem.put(bytes(200), HOST).await.unwrap();
    vmem.promote(&there, VRAM).await.unwrap();
    let mut handles = on_disk(&vmem, &emulator, &stream).await;
    let tensors = [Tensor::give(&stream), Tensor::give(&stream)];
    let locks: Vec<_> = tensors.iter().map(|tensor| tensor.lock.lock().unwrap()).collect();
    emulator.hold(Kind::Up);
    emulator.hold(Kind::Kernel);
    let mut scrap = stream.alloc_zeros::<u8>(LEN).unwrap();
    for (tensor, handle) in tensors.iter().zip([&handles[0], &there]) {
        let target = tensor.target(&stream);
        if std::ptr::eq(handle, &raw const there) {
            launch("vmem_fill", scrap.device_ptr(&stream).0, LEN as u64, 7, &stream);
        }
        let pieces = [(handle, 0..LEN, 0)];
        let mut gather = Box::pin(vmem.gather(&pieces, &target));
        assert!((&mut gather).now_or_never().is_none());
        if tensor.deleted.as_ptr() == tensors[0].deleted.as_ptr() {
            until("the copy", || emulator.counter("queued_up") > 0).await;
        }
        drop(gather);
        drop(target);
    }
    emulator.release_all();
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The lane and the thread that waits for streams go on.
    let served = async {
        for handle in [&handles[1], &there] {
            vmem.promote(handle, VRAM).await.unwrap();
            let lease = vmem.device_mut_on(handle, &stream).await.unwrap();
            // SAFETY: used by the kernel below, on the stream of the lease.
            launch("vmem_add", unsafe { lease.device_ptr() }, LEN as u64, 1, &stream);
            lease.finish().await.unwrap();
        }
    };
    tokio::time::timeout(HANGS, served).await.expect("it waits for a deleter");
    assert_eq!(tensors.each_ref().map(Tensor::deleted), [0, 0]);
    drop(locks);
    until("the deleters", || tensors.iter().all(|tensor| tensor.deleted() == 1)).await;
    stream.memset_zeros(&mut scrap).unwrap();
    drop(scrap);
    handles.push(there);
    end(vmem, handles, &emulator).await;
}
