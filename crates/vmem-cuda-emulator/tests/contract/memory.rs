//! Memory: copies, registered pages, what is used in flight, and what runs out.
//!
//! Invariant: as that of all tests here.

use std::ffi::c_void;
use std::io::Write;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, result, sys};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::tools::*;

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
    assert!(target.0[0] != 7 && target.0[0] != 0, "it must not be read before its end");
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

/// A registration is of the pages that were there: if they are given back to the system under it,
/// the device reads pages that the process no longer sees.
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
