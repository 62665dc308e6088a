//! What the tests of the VRAM tier share: stores, streams, kernels and captures of a user.
//!
//! Invariant: what a kernel is given lives until the stream that it was launched on has passed it.
//! Called by every module here.

use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmem::gpu::cudarc::driver::{CudaContext, CudaStream, result, sys};
use vmem::{MemoryTier, VMemHandle, VirtualMemory, VirtualMemoryConfig};
use vmem_cuda_emulator::Emulator;

pub(crate) const VRAM: MemoryTier = MemoryTier::Vram;
pub(crate) const HOST: MemoryTier = MemoryTier::Host;
pub(crate) const DISK: MemoryTier = MemoryTier::Disk;
/// The length of an object, in bytes.
pub(crate) const LEN: usize = 100_000;
/// Nothing that is expected takes longer.
pub(crate) const HANGS: Duration = Duration::from_secs(30);

/// A store with this much device memory, in bytes.
pub(crate) async fn open(vram: u64) -> VirtualMemory {
    open_within(vram, Duration::from_secs(20)).await
}

/// The same, with this `wait_timeout`.
pub(crate) async fn open_within(vram: u64, wait_timeout: Duration) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(16 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(vram)
        .max_pinned(1.0)
        .wait_timeout(wait_timeout);
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// A store with little host memory, and this much device memory, in bytes.
pub(crate) async fn open_small(vram: u64) -> VirtualMemory {
    let config = VirtualMemoryConfig::builder()
        .host_capacity(4 << 20)
        .disk_capacity(64 << 20)
        .vram_capacity(vram)
        .wait_timeout(Duration::from_secs(5));
    vmem::open(config.build().unwrap()).await.unwrap()
}

/// A stream of a user, which has a context object of its own.
pub(crate) fn stream() -> Arc<CudaStream> {
    CudaContext::new(0).unwrap().new_stream().unwrap()
}

/// Copies to the host by the other ways of the driver: in one call with others, and by a kernel.
const OTHER_COPIES: [&str; 2] = ["cuMemcpyBatchAsync", "cuLaunchKernel"];
const COPY_DOWN: &str = "cuMemcpyDtoHAsync_v2";

/// The driver refuses every copy to the host with this code, and every kernel; 0 allows them.
pub(crate) fn refuse_copies_down(emulator: &Emulator, code: i32) {
    for function in OTHER_COPIES.into_iter().chain([COPY_DOWN]) {
        emulator.refuse(function, code);
    }
}

/// The driver refuses the next copy to the host, and kernels until copies are allowed.
pub(crate) fn refuse_next_copy_down(emulator: &Emulator, code: i32) {
    for function in OTHER_COPIES {
        emulator.refuse(function, code);
    }
    emulator.fail(COPY_DOWN, 1, code);
}

/// Launches one of the kernels that the emulator knows by name.
pub(crate) fn launch(name: &str, first: u64, second: u64, third: u64, stream: &CudaStream) {
    let text = CString::new(".entry vmem_fill( .entry vmem_add( .entry vmem_slow_copy(").unwrap();
    stream.context().bind_to_thread().unwrap();
    // SAFETY: a text that ends.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap();
    // SAFETY: the module was loaded just now, and stays.
    let function = unsafe { result::module::get_function(module, CString::new(name).unwrap()) };
    let mut first = first;
    let mut second = second;
    let mut third = third;
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut first).cast(), (&raw mut second).cast(), (&raw mut third).cast()];
    let grid = (1, 1, 1);
    let block = (32, 1, 1);
    // SAFETY: the arguments are those that the kernels take.
    unsafe {
        result::launch_kernel(function.unwrap(), grid, block, 0, stream.cu_stream(), &mut arguments)
    }
    .unwrap();
}

/// Begins a capture in relaxed mode.
pub(crate) fn begin_capture(stream: &CudaStream) {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a stream of this test.
    unsafe { result::stream::begin_capture(stream.cu_stream(), mode) }.unwrap();
}

/// Ends it; the code of the driver.
pub(crate) fn end_capture(stream: &CudaStream) -> i32 {
    stream.context().bind_to_thread().unwrap();
    // SAFETY: the capture that was begun.
    let ended = unsafe { result::stream::end_capture(stream.cu_stream()) };
    ended.map_or_else(|error| error.0 as i32, |_| 0)
}

pub(crate) fn bytes(seed: u8) -> Vec<u8> {
    (0..LEN).map(|at| (at >> 4) as u8 ^ seed).collect()
}

pub(crate) fn plus(bytes: &[u8], n: u8) -> Vec<u8> {
    bytes.iter().map(|byte| byte.wrapping_add(n)).collect()
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, come: impl Fn() -> bool) {
    let begun = Instant::now();
    while !come() {
        assert!(begun.elapsed() < HANGS, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Closes the store: everything was given back, and no rule of the driver was broken.
pub(crate) async fn end(vmem: VirtualMemory, handles: Vec<VMemHandle>, emulator: &Emulator) {
    drop(handles);
    until("the end of every use", || {
        let vram = vmem.stats().vram;
        (vram.used_bytes, vram.objects) == (0, 0)
    })
    .await;
    vmem.close().await.unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// As `end`; and nothing is left in the driver.
pub(crate) async fn end_all(vmem: VirtualMemory, handles: Vec<VMemHandle>, emulator: &Emulator) {
    end(vmem, handles, emulator).await;
    for gauge in ["created", "mapped_bytes", "reserved_bytes", "device_bytes"] {
        assert_eq!(emulator.counter(gauge), 0, "{gauge}");
    }
}
