//! Mapped memory: pages with a handle, at addresses that were reserved.
//!
//! Invariant: as that of all tests here; each gives back what it reserved, mapped and created.

use cudarc::driver::{CudaContext, result, sys};
use vmem_cuda_emulator::{Emulator, Kind};

use crate::pages::*;
use crate::tools::*;

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + at / 4096) as u8).collect()
}

#[test]
fn mapped_page_keeps_its_bytes_at_another_address() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let addresses = reserve(4 * PAGE);
    assert!(addresses.is_multiple_of(PAGE as u64));
    let page = create(0);
    map(addresses, page);
    grant(addresses, PAGE);
    let bytes = pattern(PAGE);
    assert_eq!(up(addresses, &bytes, &stream), 0);
    stream.synchronize().unwrap();
    let elsewhere = addresses + 3 * PAGE as u64;
    assert_eq!(unmap(addresses, PAGE), 0);
    map(elsewhere, page);
    grant(elsewhere, PAGE);
    let mut back = vec![0; PAGE];
    assert_eq!(down(&mut back, elsewhere, &stream), 0);
    stream.synchronize().unwrap();
    assert!(back == bytes);
    assert_eq!(emulator.counter("mapped_bytes"), PAGE as u64);
    assert_eq!(emulator.counter("reserved_bytes"), 4 * PAGE as u64);
    assert_eq!(unmap(elsewhere, PAGE), 0);
    assert_eq!(release(page), 0);
    assert_eq!(free_addresses(addresses, 4 * PAGE), 0);
    let left = ["mapped_bytes", "reserved_bytes", "created", "device_bytes"];
    assert_eq!(left.map(|name| emulator.counter(name)), [0; 4]);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn operations_span_adjacent_mappings() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let addresses = reserve(3 * PAGE);
    let pages = [0; 3].map(create);
    // Not in the order in which they were created.
    for (nth, page) in [2, 0, 1].into_iter().enumerate() {
        map(addresses + (nth * PAGE) as u64, pages[page]);
    }
    grant(addresses, 3 * PAGE);
    let first = PAGE - 1000;
    let mut bytes = pattern(PAGE + 2000);
    assert_eq!(up(addresses + first as u64, &bytes, &stream), 0);
    let mut back = vec![0; bytes.len()];
    assert_eq!(down(&mut back, addresses + first as u64, &stream), 0);
    stream.synchronize().unwrap();
    assert!(back == bytes);
    // So do a copy within the device, a fill and a kernel.
    let plain = alloc(bytes.len());
    // SAFETY: both ranges are as long, and freed or unmapped below.
    unsafe {
        let from = addresses + first as u64;
        result::memcpy_dtod_async(plain, from, bytes.len(), stream.cu_stream())
    }
    .unwrap();
    assert_eq!(down(&mut back, plain, &stream), 0);
    stream.synchronize().unwrap();
    assert!(back == bytes);
    let border = addresses + PAGE as u64;
    // SAFETY: within the mappings.
    unsafe { result::memset_d8_async(border - 10, 3, 20, stream.cu_stream()) }.unwrap();
    assert_eq!(launch("vmem_add", border - 10, 20, 1, &stream), 0);
    bytes[990..1010].fill(4);
    assert_eq!(down(&mut back, addresses + first as u64, &stream), 0);
    stream.synchronize().unwrap();
    assert!(back == bytes);
    free(plain);
    assert_eq!(unmap(addresses, 3 * PAGE), 0);
    assert_eq!(pages.map(release), [0; 3]);
    assert_eq!(free_addresses(addresses, 3 * PAGE), 0);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn mapping_has_no_access_at_first() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let addresses = reserve(PAGE);
    let page = create(0);
    map(addresses, page);
    grant(addresses, PAGE);
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &stream), 0);
    stream.synchronize().unwrap();
    // What was granted went with the mapping.
    assert_eq!(unmap(addresses, PAGE), 0);
    map(addresses, page);
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &stream), 0);
    assert_eq!(code(stream.synchronize()), 700);
    assert_eq!(try_create(0, PAGE), Err(700), "it sticks");
    emulator.sticky(0);
    grant(addresses, PAGE);
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &stream), 0);
    stream.synchronize().unwrap();
    // Past the last mapping nothing is found.
    assert_eq!(launch("vmem_fill", addresses, PAGE as u64 + 1, 1, &stream), 0);
    assert_eq!(code(stream.synchronize()), 700);
    emulator.sticky(0);
    assert_eq!(unmap(addresses, PAGE), 0);
    assert_eq!(release(page), 0);
    assert_eq!(free_addresses(addresses, PAGE), 0);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn access_is_granted_to_each_device() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|device| CudaContext::new(device).unwrap());
    let streams = contexts.each_ref().map(|context| context.new_stream().unwrap());
    let addresses = reserve(PAGE);
    let page = create(1);
    map(addresses, page);
    grant(addresses, PAGE);
    contexts[0].bind_to_thread().unwrap();
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &streams[0]), 0);
    streams[0].synchronize().unwrap();
    contexts[1].bind_to_thread().unwrap();
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &streams[1]), 0);
    assert_eq!(code(streams[1].synchronize()), 700, "its own memory, and no access");
    emulator.sticky(0);
    // To read is not to write.
    let read = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ;
    assert_eq!(set_access(addresses, PAGE, 1, read), 0);
    let mut back = vec![0; 100];
    assert_eq!(down(&mut back, addresses, &streams[1]), 0);
    streams[1].synchronize().unwrap();
    assert_eq!(back, [1; 100]);
    assert_eq!(launch("vmem_fill", addresses, 100, 1, &streams[1]), 0);
    assert_eq!(code(streams[1].synchronize()), 700);
    emulator.sticky(0);
    assert_eq!(set_access(addresses, PAGE, 2, read), 101, "there is no such device");
    assert_eq!(unmap(addresses, PAGE), 0);
    assert_eq!(release(page), 0);
    assert_eq!(free_addresses(addresses, PAGE), 0);
    contexts[0].bind_to_thread().unwrap();
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn memory_unmapped_under_an_operation_is_found() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let addresses = reserve(2 * PAGE);
    let pages = [0; 2].map(create);
    map(addresses, pages[0]);
    map(addresses + PAGE as u64, pages[1]);
    grant(addresses, 2 * PAGE);
    let source = Registered::new(vec![7; 4096]);
    emulator.hold(Kind::Up);
    assert_eq!(up(addresses, &source.0, &stream), 0);
    // The other page may go.
    assert_eq!(unmap(addresses + PAGE as u64, PAGE), 0);
    assert_eq!(emulator.violations(), [""; 0]);
    assert_eq!(unmap(addresses, PAGE), 0);
    let found = emulator.violations();
    assert_eq!(found, ["device memory was unmapped under an operation in flight"]);
    emulator.release_all();
    assert_eq!(code(stream.synchronize()), 700);
    emulator.sticky(0);
    // An operation that has begun is in flight too.
    map(addresses, pages[0]);
    grant(addresses, PAGE);
    emulator.delay(Kind::Within, 1_000_000);
    // SAFETY: within the mapping; that it goes too early is what is tried.
    unsafe { result::memset_d8_async(addresses, 3, 20, stream.cu_stream()) }.unwrap();
    until(|| emulator.counter("queued_within") == 0);
    assert_eq!(unmap(addresses, PAGE), 0);
    assert_eq!(emulator.violations().len(), 2);
    assert_eq!(code(stream.synchronize()), 700);
    emulator.sticky(0);
    assert_eq!(pages.map(release), [0; 2]);
    assert_eq!(free_addresses(addresses, 2 * PAGE), 0);
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let emulator = Emulator::load().unwrap();
    let _context = context();
    let mut granularity = 0;
    let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: a place for the granularity, and properties.
    unsafe { sys::cuMemGetAllocationGranularity(&mut granularity, &properties(0), least) }
        .result()
        .unwrap();
    assert_eq!(granularity, PAGE);
    assert_eq!(try_create(0, PAGE / 2), Err(1));
    assert_eq!(try_create(0, 0), Err(1));
    assert_eq!(try_create(7, PAGE), Err(101));
    assert_eq!(try_reserve(0, 0), Err(1));
    assert_eq!(try_reserve(PAGE, 3 * PAGE), Err(1), "no power of two");
    let aligned = try_reserve(PAGE, 16 * PAGE).unwrap();
    assert!(aligned.is_multiple_of(16 * PAGE as u64));
    assert_eq!(free_addresses(aligned, PAGE), 0);

    let addresses = reserve(4 * PAGE);
    let at = |nth: usize| addresses + (nth * PAGE) as u64;
    let large = try_create(0, 2 * PAGE).unwrap();
    let small = create(0);
    assert_eq!(map_at(at(0), PAGE, PAGE, large), 1, "an offset");
    assert_eq!(map_at(at(0), PAGE, 0, large), 1, "a part of it");
    assert_eq!(map_at(at(0) + 4096, PAGE, 0, small), 1, "not aligned");
    assert_eq!(map_at(at(3), 2 * PAGE, 0, large), 1, "past the reservation");
    assert_eq!(map_at(at(1), 2 * PAGE, 0, large), 0);
    assert_eq!(map_at(at(2), PAGE, 0, small), 1, "mapped already");
    assert_eq!(map_at(at(0), 2 * PAGE, 0, large), 1, "mapped in part");
    map(at(0), small);
    let both = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    assert_eq!(set_access(at(0), 4 * PAGE, 0, both), 1, "not mapped throughout");
    assert_eq!(unmap(at(0), 4 * PAGE), 1, "not mapped throughout");
    assert_eq!(unmap(at(0), 2 * PAGE), 1, "across a mapping");
    assert_eq!(unmap(at(2), PAGE), 1, "a part of a mapping");
    assert_eq!(free_addresses(addresses, 4 * PAGE), 1, "something is mapped");
    assert_eq!(unmap(at(0), 3 * PAGE), 0);
    assert_eq!(unmap(at(0), PAGE), 1, "twice");
    assert_eq!(free_addresses(addresses, PAGE), 1, "a part of a reservation");
    assert_eq!(free_addresses(addresses, 4 * PAGE), 0);
    assert_eq!(free_addresses(addresses, 4 * PAGE), 1, "twice");
    assert_eq!(map_at(at(0), PAGE, 0, small), 1, "no longer reserved");
    assert_eq!(release(large), 0);
    assert_eq!(release(small), 0);
    assert_eq!(emulator.violations(), [""; 0]);
    assert_eq!(release(small), 1);
    assert!(emulator.violations()[0].contains("released twice"), "{:?}", emulator.violations());
}

#[test]
fn created_memory_returns_once_released_and_unmapped() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    emulator.memory(3 * PAGE as u64);
    let free_pages = || context.mem_get_info().unwrap().0 / PAGE;
    let addresses = reserve(2 * PAGE);
    assert_eq!(free_pages(), 3, "addresses take none");
    let page = create(0);
    assert_eq!(try_create(0, 3 * PAGE), Err(2));
    assert_eq!(free_pages(), 2);
    // One memory at two addresses.
    map(addresses, page);
    map(addresses + PAGE as u64, page);
    assert_eq!(free_pages(), 2);
    grant(addresses, 2 * PAGE);
    assert_eq!(launch("vmem_fill", addresses, 100, 5, &stream), 0);
    let mut back = vec![0; 100];
    assert_eq!(down(&mut back, addresses + PAGE as u64, &stream), 0);
    stream.synchronize().unwrap();
    assert_eq!(back, [5; 100]);
    assert_eq!(release(page), 0);
    assert_eq!(unmap(addresses, PAGE), 0);
    assert_eq!((free_pages(), emulator.counter("created")), (2, 1), "it is mapped once more");
    assert_eq!(map_at(addresses, PAGE, 0, page), 1, "its handle has ended");
    assert_eq!(unmap(addresses + PAGE as u64, PAGE), 0);
    assert_eq!((free_pages(), emulator.counter("created")), (3, 0));
    let page = create(0);
    assert_eq!((free_pages(), emulator.counter("device_bytes")), (2, PAGE as u64));
    assert_eq!(release(page), 0);
    assert_eq!(free_pages(), 3);
    assert_eq!(free_addresses(addresses, 2 * PAGE), 0);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn failed_device_loses_its_handles_and_mappings() {
    let emulator = Emulator::load().unwrap();
    emulator.devices(2);
    let contexts = [0, 1].map(|device| CudaContext::new(device).unwrap());
    let addresses = reserve(2 * PAGE);
    let pages = [0, 1].map(create);
    map(addresses, pages[0]);
    map(addresses + PAGE as u64, pages[1]);
    emulator.sticky_on(0, 719);
    contexts[1].bind_to_thread().unwrap();
    assert_eq!(try_create(0, PAGE), Err(719), "of the device that failed");
    let [lost, working] = contexts;
    drop(lost);
    assert_eq!(emulator.counter("mapped_bytes"), PAGE as u64);
    assert_eq!(emulator.counter("created"), 1);
    working.bind_to_thread().unwrap();
    assert_eq!(unmap(addresses, PAGE), 1, "it is mapped no more");
    assert_eq!(unmap(addresses + PAGE as u64, PAGE), 0);
    assert_eq!(release(pages[1]), 0);
    assert_eq!(free_addresses(addresses, 2 * PAGE), 0);
    emulator.sticky(0);
    assert_eq!(emulator.violations(), [""; 0]);
}

#[test]
fn device_without_mappings_refuses_them() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    assert!(is_supported());
    emulator.paged(false);
    assert!(!is_supported());
    assert_eq!(try_reserve(PAGE, 0), Err(801));
    assert_eq!(try_create(0, PAGE), Err(801));
    drop(context);
    drop(emulator);
    let _emulator = Emulator::load().unwrap();
    let _context = self::context();
    assert!(is_supported());
}

#[test]
fn created_memory_breaks_a_global_capture() {
    let emulator = Emulator::load().unwrap();
    let context = context();
    let stream = context.new_stream().unwrap();
    let global = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: a stream of this test.
    unsafe { result::stream::begin_capture(stream.cu_stream(), global) }.unwrap();
    assert_eq!(try_create(0, PAGE), Err(900));
    assert_eq!(emulator.counter("captures_broken"), 1);
    // SAFETY: the capture that was begun.
    unsafe { result::stream::end_capture(stream.cu_stream()) }.ok();
}
