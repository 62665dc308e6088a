//! Captures and host functions as a card has them: the codes were read off an H100 with driver
//! 13.0.
//!
//! Invariant: each test has the emulator alone, as it is at first. Run by `cargo test`.
#![allow(missing_docs, clippy::unwrap_used, unsafe_code)]
#![cfg(target_os = "linux")]

use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DriverError, result, sys};
use vmem_cuda_emulator::Emulator;

const RELAXED: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;

fn code<T>(result: Result<T, DriverError>) -> i32 {
    result.map_or_else(|DriverError(code)| code as i32, |_| 0)
}

fn context() -> Arc<CudaContext> {
    let context = CudaContext::new(0).unwrap();
    // SAFETY: no slice is made here.
    unsafe { context.disable_event_tracking() };
    context
}

fn begin(stream: &CudaStream) {
    // SAFETY: a stream of this test.
    unsafe { result::stream::begin_capture(stream.cu_stream(), RELAXED) }.unwrap();
}

fn end(stream: &CudaStream) -> i32 {
    // SAFETY: the capture that was begun.
    code(unsafe { result::stream::end_capture(stream.cu_stream()) })
}

/// 0 no capture, 1 one that goes on, 2 one that is broken.
fn status(stream: &CudaStream) -> i32 {
    // SAFETY: a stream of this test.
    unsafe { result::stream::is_capturing(stream.cu_stream()) }.unwrap() as i32
}

#[test]
fn querying_a_captured_event_breaks_the_capture() {
    let _emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    begin(&stream);
    let event = stream.record_event(None).unwrap();
    assert_eq!(status(&stream), 1);
    assert_eq!(code(event.try_is_complete()), 907);
    assert_eq!(status(&stream), 2);
    // Nothing but its end is accepted now.
    assert_eq!(code(event.record(&stream)), 901);
    assert_eq!(code(stream.synchronize()), 900);
    assert_eq!(end(&stream), 901);
    assert_eq!(status(&stream), 0);
    assert_eq!(code(event.try_is_complete()), 1);
    event.record(&stream).unwrap();
    event.synchronize().unwrap();
    assert!(event.try_is_complete().unwrap());
}

#[test]
fn waiting_on_a_capturing_stream_breaks_its_capture() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let other = context.new_stream().unwrap();
    begin(&stream);
    assert_eq!(code(stream.synchronize()), 900);
    assert_eq!((status(&stream), end(&stream)), (2, 901));
    // An event of outside does not cross its border.
    let event = other.record_event(None).unwrap();
    begin(&stream);
    assert_eq!(code(stream.wait(&event)), 905);
    assert_eq!((status(&stream), end(&stream)), (2, 901));
    // One of inside takes the other stream in.
    begin(&stream);
    event.record(&stream).unwrap();
    other.wait(&event).unwrap();
    assert_eq!(status(&other), 1);
    assert_eq!((end(&stream), status(&other)), (0, 0));
    begin(&stream);
    emulator.invalidate_captures();
    assert_eq!((status(&stream), end(&stream)), (2, 901));
    assert_eq!(emulator.counter("captures_broken"), 3);
}

/// A graph does what was captured, with the addresses of then, each time that it is launched.
#[test]
fn a_graph_does_again_what_was_captured() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let buffer = stream.alloc_zeros::<u8>(100).unwrap();
    let (at, guard) = buffer.device_ptr(&stream);
    drop(guard);
    stream.synchronize().unwrap();
    let fill = |first: u64, value| {
        // SAFETY: within the buffer, which lives until the end.
        unsafe { result::memset_d8_async(at + first, value, 10, stream.cu_stream()) }.unwrap();
    };
    stream.begin_capture(RELAXED).unwrap();
    fill(0, 1);
    fill(5, 2);
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    let content = || stream.clone_dtoh(&buffer).unwrap();
    assert_eq!(content(), [0; 100], "a capture does nothing");
    for round in 0..2 {
        graph.launch().unwrap();
        let expected = [&[1; 5][..], &[2; 10], &[0; 85]].concat();
        assert_eq!(content(), expected, "launch {round}");
        fill(0, 0);
        fill(5, 0);
    }
    assert_eq!(emulator.counter("graphs_launched"), 2);
    drop(graph);
    // One that was broken gives no graph.
    begin(&stream);
    fill(0, 9);
    emulator.invalidate_captures();
    assert_eq!(end(&stream), 901);
    assert_eq!(content(), [0; 100]);
}

#[test]
fn a_refused_function_fails_until_it_is_allowed() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    emulator.refuse("cuEventCreate", 2);
    assert_eq!(code(context.new_event(None)), 2);
    assert_eq!(code(context.new_event(None)), 2);
    emulator.refuse("cuEventCreate", 0);
    assert_eq!(code(context.new_event(None)), 0);
}

unsafe extern "C" fn slow(_argument: *mut c_void) {
    std::thread::sleep(Duration::from_millis(200));
}

unsafe extern "C" fn quick(_argument: *mut c_void) {}

#[test]
fn a_slow_host_function_delays_those_of_other_streams() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let other = context.new_stream().unwrap();
    let launch = |stream: &CudaStream, function| {
        let nothing = std::ptr::null_mut();
        // SAFETY: the functions use no argument.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), function, nothing) }
            .unwrap();
    };
    let begun = Instant::now();
    launch(&stream, slow);
    while emulator.counter("host_functions") == 0 {
        std::thread::yield_now();
    }
    launch(&other, quick);
    other.synchronize().unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(200), "it stood behind the slow one");
    stream.synchronize().unwrap();
}
