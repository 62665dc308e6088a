//! What vmem assumes of a CUDA driver, through cudarc: asserted here on the emulator, and the same
//! on a card.
//!
//! Invariant: each test has the emulator alone, as it is at first. A rule that is broken on purpose
//! is found.
#![allow(missing_docs, clippy::unwrap_used, unsafe_code)]
#![cfg(target_os = "linux")]

use std::ffi::{CString, c_void};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use vmem_cuda_emulator::{Emulator, Kind};

const MIB: usize = 1 << 20;
/// What the kernels are called; their code is nobody's business here.
const PTX: &str = ".entry vmem_fill( .entry vmem_add( .entry vmem_copy( .entry unknown_kernel(";

fn code<T: std::fmt::Debug>(result: Result<T, DriverError>) -> i32 {
    result.map_or_else(|DriverError(code)| code as i32, |_| 0)
}

fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: no slice is used by two streams here without an order that the test makes.
    unsafe { context.disable_event_tracking() };
    context
}

fn until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it does not come");
        std::thread::yield_now();
    }
}

fn alloc(bytes: usize) -> u64 {
    // SAFETY: plain bytes.
    unsafe { result::malloc_sync(bytes) }.unwrap()
}

fn free(pointer: u64) {
    // SAFETY: each test frees what it allocated, once.
    unsafe { result::free_sync(pointer) }.unwrap();
}

/// Registered memory, for the length of a test.
struct Registered(Vec<u8>);

impl Registered {
    fn new(bytes: Vec<u8>) -> Self {
        let mut bytes = bytes;
        // SAFETY: the vector lives until it is unregistered, and does not move.
        unsafe { sys::cuMemHostRegister_v2(bytes.as_mut_ptr().cast(), bytes.len(), 1) }
            .result()
            .unwrap();
        Registered(bytes)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: it was registered.
        let _ = unsafe { sys::cuMemHostUnregister(self.0.as_mut_ptr().cast()) }.result();
    }
}

fn up(to: u64, bytes: &[u8], stream: &CudaStream) -> i32 {
    // SAFETY: the tests keep what they copy until it has been copied, or mean to break that.
    code(unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) })
}

fn down(to: &mut [u8], from: u64, stream: &CudaStream) -> i32 {
    // SAFETY: as above.
    code(unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) })
}

/// Launches a kernel that changes a range.
fn launch(name: &str, pointer: u64, len: u64, value: u8, stream: &CudaStream) -> i32 {
    let text = CString::new(PTX).unwrap();
    // SAFETY: a text that ends.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap();
    // SAFETY: the module was loaded just now, and stays.
    let function =
        match unsafe { result::module::get_function(module, CString::new(name).unwrap()) } {
            Ok(function) => function,
            Err(error) => return code::<()>(Err(error)),
        };
    let mut pointer = pointer;
    let mut len = len;
    let mut value = value;
    let mut arguments: [*mut c_void; 3] =
        [(&raw mut pointer).cast(), (&raw mut len).cast(), (&raw mut value).cast()];
    let grid = (1, 1, 1);
    let block = (32, 1, 1);
    // SAFETY: the arguments are those that the kernels take.
    code(unsafe {
        result::launch_kernel(function, grid, block, 0, stream.cu_stream(), &mut arguments)
    })
}

#[test]
fn bytes_go_round() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    assert_eq!(context.name().unwrap(), "vmem emulated GPU");
    assert_eq!(context.mem_get_info().unwrap(), (256 * MIB, 256 * MIB));
    let stream = context.new_stream().unwrap();
    let bytes: Vec<u8> = (0..100_000_u32).map(|at| (at * 7) as u8).collect();
    let pointer = alloc(bytes.len());
    assert_eq!(emulator.counter("device_bytes"), 100_000);
    // Fresh memory is no zeros.
    let mut back = vec![0; bytes.len()];
    assert_eq!(down(&mut back, pointer, &stream), 0);
    assert!(back.iter().all(|&byte| byte != 0));
    assert_eq!(up(pointer, &bytes, &stream), 0);
    assert_eq!(down(&mut back, pointer, &stream), 0);
    // Pageable memory: the calls wait.
    assert!(back == bytes);
    assert_eq!(emulator.counter("blocking_copies"), 3);
    free(pointer);
    drop(stream);
    drop(context);
    assert_eq!(emulator.counter("device_bytes") + emulator.counter("contexts"), 0);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn pinned_copies_are_asynchronous() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(4096);
    let source = Registered::new(vec![7; 4096]);
    emulator.hold(Kind::Up);
    assert_eq!(up(pointer, &source.0, &stream), 0);
    let event = stream.record_event(None).unwrap();
    assert!(!event.try_is_complete().unwrap(), "it was held");
    emulator.release_all();
    event.synchronize().unwrap();
    assert!(event.try_is_complete().unwrap());
    let mut target = Registered::new(vec![0; 4096]);
    assert_eq!(down(&mut target.0, pointer, &stream), 0);
    stream.synchronize().unwrap();
    assert!(target.0 == source.0);
    free(pointer);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn host_memory_that_is_used_in_flight_is_found() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(4096);
    let mut source = Registered::new(vec![7; 4096]);
    emulator.hold(Kind::Up);
    assert_eq!(up(pointer, &source.0, &stream), 0);
    source.0[100] = 8;
    emulator.release_all();
    stream.synchronize().unwrap();
    assert!(emulator.violations()[0].contains("source"), "{:?}", emulator.violations());

    let mut target = Registered::new(vec![0; 4096]);
    emulator.hold(Kind::Down);
    assert_eq!(down(&mut target.0, pointer, &stream), 0);
    assert!(target.0[0] != 7 && target.0[0] != 0, "nobody reads it before its end");
    target.0[5] = 1;
    emulator.release_all();
    stream.synchronize().unwrap();
    assert!(emulator.violations()[1].contains("destination"), "{:?}", emulator.violations());

    emulator.hold(Kind::Up);
    assert_eq!(up(pointer, &source.0, &stream), 0);
    let address = source.0.as_mut_ptr().cast::<c_void>().expose_provenance();
    let unregister = std::thread::spawn({
        let context = context.clone();
        move || {
            context.bind_to_thread().unwrap();
            let address = std::ptr::with_exposed_provenance_mut(address);
            // SAFETY: it was registered; that a copy is in flight is what is tried.
            code(unsafe { sys::cuMemHostUnregister(address) }.result())
        }
    });
    until(|| emulator.violations().len() == 3);
    emulator.release_all();
    assert_eq!(unregister.join().unwrap(), 0);
    assert!(emulator.violations()[2].contains("unregistered"));
    free(pointer);
}

#[test]
fn registrations_do_not_overlap_and_no_copy_crosses_one() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(8192);
    let mut bytes = vec![1_u8; 8192];
    let register = |bytes: &mut [u8]| {
        // SAFETY: the vector lives to the end of the test.
        code(
            unsafe { sys::cuMemHostRegister_v2(bytes.as_mut_ptr().cast(), bytes.len(), 1) }
                .result(),
        )
    };
    assert_eq!(register(&mut bytes[..4096]), 0);
    assert_eq!(register(&mut bytes[..4096]), 712, "twice");
    assert_eq!(register(&mut bytes[2048..6000]), 712, "overlapping");
    assert_eq!(up(pointer, &bytes, &stream), 1, "half of it is registered");
    assert_eq!(register(&mut bytes[4096..]), 0);
    assert_eq!(up(pointer, &bytes, &stream), 1, "across two registrations");
    assert_eq!(up(pointer, &bytes[4096..], &stream), 0);
    stream.synchronize().unwrap();
    // SAFETY: it is registered, once.
    let unregister = |at: *mut u8| code(unsafe { sys::cuMemHostUnregister(at.cast()) }.result());
    assert_eq!(unregister(bytes[4096..].as_mut_ptr()), 0);
    assert_eq!(unregister(bytes[4096..].as_mut_ptr()), 713);
    assert_eq!(unregister(bytes.as_mut_ptr()), 0);
    emulator.registered_max(100);
    assert_eq!(register(&mut bytes), 2);
    free(pointer);
}

#[test]
fn events_have_generations_and_order_streams() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let first = context.new_stream().unwrap();
    let second = context.new_stream().unwrap();
    let pointer = alloc(4096);
    let source = Registered::new(vec![3; 4096]);
    let event = context.new_event(None).unwrap();
    assert!(event.try_is_complete().unwrap(), "never recorded");
    emulator.hold(Kind::Up);
    assert_eq!(up(pointer, &source.0, &first), 0);
    event.record(&first).unwrap();
    second.wait(&event).unwrap();
    let mut target = Registered::new(vec![0; 4096]);
    assert_eq!(down(&mut target.0, pointer, &second), 0);
    // Recorded again, where nothing is: who waited for it before still waits for the copy.
    let idle = context.new_stream().unwrap();
    event.record(&idle).unwrap();
    event.synchronize().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(emulator.counter("copies_down"), 0);
    emulator.release_all();
    second.synchronize().unwrap();
    assert!(target.0 == source.0);
    free(pointer);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn races_are_found_whatever_the_timing() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let first = context.new_stream().unwrap();
    let second = context.new_stream().unwrap();
    let pointer = alloc(8192);
    let source = Registered::new(vec![3; 4096]);
    let mut target = Registered::new(vec![0; 4096]);
    // Not ordered: it may have ended long ago, and is wrong all the same.
    assert_eq!(up(pointer, &source.0, &first), 0);
    until(|| emulator.counter("copies_up") == 1);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(down(&mut target.0, pointer, &second), 0);
    assert_eq!(emulator.violations().len(), 1, "{:?}", emulator.violations());
    assert!(emulator.violations()[0].contains("race"));
    // Of other memory, or after the host saw the end, it is not.
    assert_eq!(up(pointer + 4096, &source.0, &second), 0);
    first.synchronize().unwrap();
    second.synchronize().unwrap();
    assert_eq!(down(&mut target.0, pointer, &second), 0);
    second.synchronize().unwrap();
    assert_eq!(emulator.violations().len(), 1);
    // A reused range: the reader is not waited for.
    assert_eq!(down(&mut target.0, pointer, &second), 0);
    assert_eq!(up(pointer, &source.0, &first), 0);
    assert_eq!(emulator.violations().len(), 2);
    context.synchronize().unwrap();
    free(pointer);
}

#[test]
fn host_functions_are_serial_and_may_not_call_the_driver() {
    static ORDER: AtomicU32 = AtomicU32::new(0);
    static REFUSED: AtomicI32 = AtomicI32::new(0);
    unsafe extern "C" fn first(_: *mut c_void) {
        ORDER.store(ORDER.load(Ordering::SeqCst) * 10 + 1, Ordering::SeqCst);
        REFUSED.store(code(result::mem_get_info()), Ordering::SeqCst);
    }
    unsafe extern "C" fn second(_: *mut c_void) {
        ORDER.store(ORDER.load(Ordering::SeqCst) * 10 + 2, Ordering::SeqCst);
    }
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    for function in [first as unsafe extern "C" fn(_), second] {
        // SAFETY: the functions need no argument.
        unsafe {
            result::stream::launch_host_function(stream.cu_stream(), function, std::ptr::null_mut())
        }
        .unwrap();
    }
    stream.synchronize().unwrap();
    assert_eq!(ORDER.load(Ordering::SeqCst), 12);
    assert_eq!(REFUSED.load(Ordering::SeqCst), 800);

    emulator.suppress_host_functions(true);
    // SAFETY: as above.
    unsafe {
        result::stream::launch_host_function(stream.cu_stream(), second, std::ptr::null_mut())
    }
    .unwrap();
    stream.synchronize().unwrap();
    assert_eq!(ORDER.load(Ordering::SeqCst), 12, "it was dropped");
}

#[test]
fn an_error_sticks() {
    static CALLED: AtomicU32 = AtomicU32::new(0);
    unsafe extern "C" fn called(_: *mut c_void) {
        CALLED.fetch_add(1, Ordering::SeqCst);
    }
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(4096);
    let mut target = Registered::new(vec![0; 8192]);
    // Past the end of what was allocated: found when it runs.
    assert_eq!(down(&mut target.0, pointer, &stream), 0);
    // SAFETY: the function needs no argument.
    unsafe {
        result::stream::launch_host_function(stream.cu_stream(), called, std::ptr::null_mut())
    }
    .ok();
    let event = context.new_event(None);
    until(|| code(context.mem_get_info()) == 700);
    assert_eq!(code(stream.synchronize()), 700);
    if let Ok(event) = event {
        assert_eq!(code(event.try_is_complete()), 700);
    }
    until(|| emulator.counter("in_flight") == 0);
    assert_eq!(CALLED.load(Ordering::SeqCst), 0, "not after an error");
    assert_eq!(code(stream.record_event(None)), 700);
    emulator.sticky(0);
    drop(target);
    free(pointer);
}

#[test]
fn contexts_belong_to_threads() {
    let _emulator = Emulator::load().unwrap();
    let context = context();
    std::thread::spawn(move || {
        assert_eq!(code(result::mem_get_info()), 201, "a thread without a context");
        context.bind_to_thread().unwrap();
        assert_eq!(code(result::mem_get_info()), 0);
    })
    .join()
    .unwrap();
}

#[test]
fn memory_runs_out() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    emulator.memory(10 << 20);
    emulator.others(4 << 20);
    assert_eq!(context.mem_get_info().unwrap(), (6 * MIB, 10 * MIB));
    // SAFETY: plain bytes.
    assert_eq!(code(unsafe { result::malloc_sync(7 * MIB) }), 2);
    let pointer = alloc(6 * MIB);
    // SAFETY: plain bytes.
    assert_eq!(code(unsafe { result::malloc_sync(1) }), 2);
    free(pointer);
    emulator.fail("cuMemAlloc_v2", 1, 2);
    // SAFETY: plain bytes.
    assert_eq!(code(unsafe { result::malloc_sync(1) }), 2, "as injected");
    assert_eq!(emulator.calls("cuMemAlloc_v2"), 4);
    drop(context);
    emulator.devices(0);
    assert_eq!(code(CudaContext::new(0).map(drop)), CUresult::CUDA_ERROR_NO_DEVICE as i32);
}

#[test]
fn a_full_queue_makes_the_caller_wait() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(64);
    let source = Registered::new(vec![3; 64]);
    emulator.queue_max(4);
    emulator.hold(Kind::Up);
    let submitted = Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let submitted = &submitted;
        let stream = &stream;
        let source = &source;
        let context = &context;
        scope.spawn(move || {
            context.bind_to_thread().unwrap();
            for _ in 0..8 {
                assert_eq!(up(pointer, &source.0, stream), 0);
                submitted.fetch_add(1, Ordering::SeqCst);
            }
        });
        until(|| submitted.load(Ordering::SeqCst) == 4);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(submitted.load(Ordering::SeqCst), 4);
        emulator.release_all();
    });
    stream.synchronize().unwrap();
    free(pointer);
}

#[test]
fn a_capture_is_broken_by_careless_threads_only() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    // SAFETY: a stream of ours.
    unsafe {
        result::stream::begin_capture(
            stream.cu_stream(),
            sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        )
    }
    .unwrap();
    // SAFETY: plain bytes.
    assert_eq!(code(unsafe { result::malloc_sync(1) }), 900);
    assert_eq!(emulator.counter("captures_broken"), 1);
    let careful = context.clone();
    std::thread::spawn(move || {
        careful.bind_to_thread().unwrap();
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a place for the mode.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result().unwrap();
        free(alloc(1));
    })
    .join()
    .unwrap();
    assert_eq!(emulator.counter("captures_broken"), 1);
    // SAFETY: the capture that was begun.
    unsafe { result::stream::end_capture(stream.cu_stream()) }.ok();
}

#[test]
fn kernels_by_name() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let pointer = alloc(1000);
    assert_eq!(launch("vmem_fill", pointer, 1000, 2, &stream), 0);
    assert_eq!(launch("vmem_add", pointer, 1000, 3, &stream), 0);
    let mut back = vec![0; 1000];
    assert_eq!(down(&mut back, pointer, &stream), 0);
    assert!(back.iter().all(|&byte| byte == 5));
    assert_eq!(emulator.counter("kernels"), 2);
    assert_eq!(launch("unknown_kernel", pointer, 1, 0, &stream), 98);
    assert_eq!(launch("not_there", pointer, 1, 0, &stream), 500);
    // A kernel takes part in the order of streams.
    let other = context.new_stream().unwrap();
    assert_eq!(launch("vmem_add", pointer, 10, 1, &other), 0);
    assert_eq!(launch("vmem_add", pointer + 5, 10, 1, &stream), 0);
    assert_eq!(emulator.violations().len(), 1, "{:?}", emulator.violations());
    context.synchronize().unwrap();
    free(pointer);
}

/// What is registered is the pages that were there: whoever gives them back to the system under a
/// registration has the device read what nobody sees any more.
#[test]
fn registered_memory_is_the_pages_that_were_there() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let len = 64 * 1024;
    // SAFETY: a new mapping, at an address of the system's choice.
    let memory = unsafe {
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), len, read_write, private, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: mapped above, that long, and this test's own.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), len) };
    bytes.fill(1);
    // SAFETY: it stays mapped until it is unregistered.
    unsafe { sys::cuMemHostRegister_v2(memory, len, 1) }.result().unwrap();
    let device = alloc(len);
    let mut back = vec![0; len];
    let mut round = |bytes: &[u8]| -> u8 {
        assert_eq!(up(device, bytes, &stream), 0);
        stream.synchronize().unwrap();
        assert_eq!(down(&mut back, device, &stream), 0);
        back[len / 2]
    };
    assert_eq!(round(bytes), 1);
    // SAFETY: whole pages of the mapping.
    assert_eq!(unsafe { libc::madvise(memory, len, libc::MADV_DONTNEED) }, 0);
    bytes.fill(2);
    match emulator.counter("pinned") {
        // Past the capture of the test harness.
        0 => writeln!(std::io::stderr(), "SKIPPED stale pages: the system pins none here").unwrap(),
        _ => assert_eq!(round(bytes), 1, "the pages of before, not those at the addresses"),
    }
    // SAFETY: registered above.
    unsafe { sys::cuMemHostUnregister(memory) }.result().unwrap();
    assert_eq!(round(bytes), 2);
    free(device);
    drop(emulator);
    // SAFETY: mapped above, and used no more.
    unsafe { libc::munmap(memory, len) };
}
