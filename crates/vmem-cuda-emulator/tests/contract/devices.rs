//! Two devices: each has its memory, its streams and its errors.
//!
//! Invariant: as that of all tests here; each leaves the thread with the first device's context.

use cudarc::driver::{CudaContext, result};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::tools::*;

#[test]
fn a_device_that_fails_leaves_the_other() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|device| CudaContext::new(device).unwrap());
    let streams = contexts.each_ref().map(|context| context.new_stream().unwrap());
    let events = contexts.each_ref().map(|context| context.new_event(None).unwrap());
    contexts[1].bind_to_thread().unwrap();
    let pointer = alloc(4096);
    let source = Registered::new(vec![3; 4096]);
    // One device has a copy under way when the other one fails.
    emulator.hold(Kind::Up);
    assert_eq!(up(pointer, &source.0, &streams[1]), 0);
    emulator.sticky_on(0, 719);
    emulator.release_all();
    streams[1].synchronize().unwrap();
    let mut target = Registered::new(vec![0; 4096]);
    assert_eq!(down(&mut target.0, pointer, &streams[1]), 0);
    events[1].record(&streams[1]).unwrap();
    events[1].synchronize().unwrap();
    assert!(target.0 == source.0);
    // What names the lost device fails on any thread, and so does all in its context.
    assert_eq!(code(result::mem_get_info()), 0);
    // SAFETY: both are alive.
    let recorded = unsafe { result::event::record(events[0].cu_event(), streams[0].cu_stream()) };
    assert_eq!(code(recorded), 719);
    // SAFETY: the event is alive.
    assert_eq!(code(unsafe { result::event::query(events[0].cu_event()) }), 719);
    // SAFETY: the stream is alive.
    assert_eq!(code(unsafe { result::stream::synchronize(streams[0].cu_stream()) }), 719);
    assert_eq!(code(contexts[0].synchronize()), 719);
    assert_eq!(code(contexts[0].bind_to_thread().and_then(|()| result::mem_get_info())), 719);
    assert_eq!(code(CudaContext::new(0)), 719);
    emulator.sticky(0);
    contexts[1].bind_to_thread().unwrap();
    free(pointer);
    contexts[0].bind_to_thread().unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

/// An illegal access is an error of the device that made it.
#[test]
fn a_kernel_over_memory_of_a_peer_fails_its_own_device() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|device| CudaContext::new(device).unwrap());
    let streams = contexts.each_ref().map(|context| context.new_stream().unwrap());
    contexts[0].bind_to_thread().unwrap();
    let pointer = alloc(4096);
    let free_bytes = |context: &CudaContext| context.mem_get_info().unwrap().0;
    assert_eq!(free_bytes(&contexts[0]) + 4096, free_bytes(&contexts[1]), "each has its own");
    // A copy between devices is no fault, and a function is launched in its own context only.
    contexts[1].bind_to_thread().unwrap();
    let theirs = alloc(4096);
    // SAFETY: both are as long, and freed below.
    let copied =
        unsafe { result::memcpy_dtod_async(theirs, pointer, 4096, streams[1].cu_stream()) };
    copied.unwrap();
    assert_eq!(launch("vmem_fill", pointer, 4096, 9, &streams[0]), 400, "of another context");
    let event = contexts[1].new_event(None).unwrap();
    // SAFETY: both are alive.
    let recorded = unsafe { result::event::record(event.cu_event(), streams[0].cu_stream()) };
    assert_eq!(code(recorded), 400, "of another context");
    assert_eq!(launch("vmem_fill", theirs, 4096, 9, &streams[1]), 0);
    streams[1].synchronize().unwrap();
    assert_eq!(launch("vmem_fill", pointer, 4096, 9, &streams[1]), 0);
    assert_eq!(code(streams[1].synchronize()), 700);
    contexts[0].synchronize().unwrap();
    contexts[0].bind_to_thread().unwrap();
    let fresh = alloc(4096);
    assert_eq!(launch("vmem_fill", fresh, 4096, 9, &streams[0]), 0);
    streams[0].synchronize().unwrap();
    free(fresh);
    emulator.sticky(0);
    free(pointer);
    free(theirs);
    assert_eq!(emulator.violations(), [""; 0]);
}
