//! What vmem assumes of a CUDA driver, through cudarc: asserted here on the emulator, and the same
//! on a card.
//!
//! Invariant: each test has the emulator alone, as it is at first. A rule that is broken on purpose
//! is found.
#![allow(missing_docs, clippy::unwrap_used, unsafe_code)]
#![cfg(target_os = "linux")]

mod devices;
mod mapped;
mod memory;
mod pages;
mod tools;

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use cudarc::driver::{CudaContext, result, sys};
use vmem_cuda_emulator::{Emulator, Kind};

use self::tools::*;

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
    // Recorded again on an idle stream: an earlier waiter still waits for the copy.
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
    // Not ordered: the operation may have ended long ago, and is wrong nevertheless.
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

/// Whichever context is current, and the first handles name none.
#[test]
fn streams_name_their_context() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|gpu| CudaContext::new(gpu).unwrap());
    let stream = contexts[0].new_stream().unwrap();
    contexts[1].bind_to_thread().unwrap();
    assert_eq!(context_of(stream.cu_stream()), contexts[0].cu_ctx());
    assert_eq!(context_of(std::ptr::null_mut()), contexts[1].cu_ctx());
}

fn context_of(stream: sys::CUstream) -> sys::CUcontext {
    let mut context = std::ptr::null_mut();
    // SAFETY: a stream of a test, and a place for its context.
    unsafe { sys::cuStreamGetCtx(stream, &mut context) }.result().unwrap();
    context
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
